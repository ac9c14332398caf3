"""Mask R-CNN on the dense backbone: torchvision's parts, with the losses, anchors and pooling of the published recipes.

What differs from torchvision's own model, and why (the settings of mmdetection and detectron2, which the published
numbers come from): aligned RoIAlign with adaptive sampling, L1 instead of smoothed L1, mask targets of 0 and 1, anchors
that are not rounded and lie on exact strides, 1000 proposals after training's suppression.

Seams: maps, logits and deltas leave every head in float32, and anchors, pooling, suppression and losses stay there;
only convolutions and linear layers run in the parameters' dtype. Anchors and proposals are chosen by a seed that
belongs to the image, so neither rank nor restart changes a loss. Every head runs in every pass, with or without
objects, so that all ranks make the same calls.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from peco_ds.config import DetectorSettings, ModelSettings
from peco_ds.models.dense_backbone import build_dense_backbone
from peco_ds.models.pyramids import ChannelNorm, FourBranches, SimplePyramid
from peco_ds.models.sync_norm import AllReduce, SyncBatchNorm, on_one_rank
from peco_ds.models.vit import ActivationCheckpointing
from peco_ds.models.window_backbone import build_window_backbone
from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD

STRIDES = (4, 8, 16, 32)
# Anchors of this many strides; the last level is pooled from the one before.
_ANCHOR_STRIDES, _ANCHOR_SCALE = (*STRIDES, 64), 8
_RATIOS = (0.5, 1.0, 2.0)
_MASK_PX = 28


class Detection(NamedTuple):
    """What was found in one image, best first."""

    boxes: torch.Tensor  # float32 [N, 4], x1 y1 x2 y2 in pixels of the image that was given
    scores: torch.Tensor  # float32 [N]
    labels: torch.Tensor  # int64 [N], from 1
    masks: torch.Tensor  # float32 [N, 28, 28], probabilities inside the box
    # Of features and class logits: what is NaN passes no threshold, and so would be an image without objects.
    is_finite: bool = True


def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Masks of boxes -> masks of the whole image.

    Args:
        masks: float [N, m, m], probabilities over the box.  boxes: [N, 4], x1 y1 x2 y2 in pixels of the image.
    Returns: bool [N, height, width], where the probability is at least a half; bilinear, at the pixels' centres.
    """
    across, down = (torch.arange(side, device=masks.device) + 0.5 for side in (width, height))
    left, top, right, bottom = (side[:, None] for side in boxes.unbind(1))
    # [-1, 1] over the box, as grid_sample takes them.
    x = (across[None] - left) / (right - left) * 2 - 1
    y = (down[None] - top) / (bottom - top) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=3)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5


class Detector(nn.Module):
    """Training: (images_u8, targets) -> losses by name. Evaluation: images_u8 -> one `Detection` an image.

    Images are uint8 [3, H, W], each of its own shape; they are normalised here and filled up below and on the right to
    one shape, with the mean colour. Targets are those of `data.objects.ObjectTargets`.

    Args:
        square_px: images are filled up to this square; 0: to the largest of the batch, rounded up to 32 px.
        mean, std: of images in [0, 1].
    """

    def __init__(
        self,
        backbone: nn.Module,
        pyramid: nn.Module,
        rpn: Proposals,
        roi_heads: Heads,
        *,
        square_px: int = 0,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.backbone, self.pyramid, self.rpn, self.roi_heads = backbone, pyramid, rpn, roi_heads
        self.square_px, self.mean, self.std = square_px, mean, std

    def forward(self, images_u8: Sequence[torch.Tensor], targets: Sequence | None = None):
        images = batch_images(images_u8, self.mean, self.std, self.square_px)
        maps = self.pyramid(self.backbone(images.tensors))
        features = OrderedDict((str(level), found.float()) for level, found in enumerate(maps))
        wanted = None
        if targets is not None:
            wanted = [{"boxes": each.boxes, "labels": each.labels, "masks": each.masks} for each in targets]
            for part in (self.rpn, self.roi_heads):
                part.fg_bg_sampler.seeds = [each.seed for each in targets]
        proposals, losses = self.rpn(images, features, wanted)
        found, more = self.roi_heads(features, proposals, images.image_sizes, wanted)
        if self.training:
            return losses | more
        return [Detection(**each) for each in found]


def batch_images(
    images_u8: Sequence[torch.Tensor], mean: tuple[float, ...], std: tuple[float, ...], square_px: int = 0
) -> ImageList:
    """Normalised images [B, 3, H, W] float32, filled up with 0 (the mean colour), and their own sizes."""
    step = STRIDES[-1]
    sizes = [(image.shape[1], image.shape[2]) for image in images_u8]
    height, width = (
        (square_px, square_px) if square_px else (-(-max(side) // step) * step for side in zip(*sizes, strict=True))
    )
    device = images_u8[0].device
    centre, spread = (255 * torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
    batch = torch.zeros(len(images_u8), 3, height, width, device=device)
    for row, image in zip(batch, images_u8):
        row[:, : image.shape[1], : image.shape[2]] = (image.float() - centre) / spread
    return ImageList(batch, sizes)


# ----------------------------------------------------------------------------------------- proposals


class Anchors(AnchorGenerator):
    """Anchors of 8 strides in three shapes, not rounded, centred on multiples of the stride."""

    def __init__(self) -> None:
        super().__init__(tuple((_ANCHOR_SCALE * stride,) for stride in _ANCHOR_STRIDES), (_RATIOS,) * 5)

    # torchvision's signature, with its defaults.
    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=torch.device("cpu")):  # noqa: B008
        scales, ratios = (torch.as_tensor(values, dtype=dtype, device=device) for values in (scales, aspect_ratios))
        heights, widths = (((root[:, None] * scales[None]).view(-1)) for root in (ratios.sqrt(), 1 / ratios.sqrt()))
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in _ANCHOR_STRIDES]
        anchors = torch.cat(self.grid_anchors([list(each.shape[-2:]) for each in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class SeededSampler:
    """Picks anchors or proposals to learn from, a given share of them on objects, by each image's own seed.

    A proposal's luck follows from its own coordinates, not from its place in the list: scores of untrained proposals
    lie so close that rounding swaps them, and a swap would pick others.

    Source: torchvision's BalancedPositiveNegativeSampler, whose draws follow the process.
    """

    def __init__(self, number: int, positive_share: float) -> None:
        self.number, self.positive_share = number, positive_share
        # One an image of the pass.
        self.seeds: list[int] = []
        # [A, 4] an image, where the labels are those of proposals.
        self.boxes: list[torch.Tensor] | None = None

    def __call__(self, labels: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """
        Args:
            labels: [A] an image; from 1: on an object, 0: background, below: not used.
        Returns: bool [A] an image: picked on objects, picked of the background.
        """
        positives, negatives = [], []
        for place, (of_image, seed) in enumerate(zip(labels, self.seeds, strict=True)):
            number = torch.arange(len(of_image), device=of_image.device)[:, None]
            luck = scattered(number if self.boxes is None else (8 * self.boxes[place]).round().long(), seed)
            positive = _luckiest(of_image >= 1, luck, int(self.number * self.positive_share))
            positives.append(positive)
            negatives.append(_luckiest(of_image == 0, luck, self.number - int(positive.sum())))
        return positives, negatives


def scattered(words: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows of whole numbers int64 [A, k] -> int64 [A], as good as random, the same for the same row and seed.

    Source: the mixing function of splitmix64 (Steele, Lea and Flood, 2014), on numbers with a sign.
    """
    out = torch.full_like(words[:, 0], seed)
    for word in words.unbind(1):
        out = (out ^ word) * -7046029254386353131
        out = (out ^ (out >> 30)) * -4658895280553007687
        out = (out ^ (out >> 27)) * -7723592293110705685
        out = out ^ (out >> 31)
    return out


def _luckiest(candidates: torch.Tensor, luck: torch.Tensor, number: int) -> torch.Tensor:
    places = candidates.nonzero()[:, 0]
    picked = torch.zeros_like(candidates, dtype=torch.bool)
    picked[places[luck[places].argsort(stable=True)[:number]]] = True
    return picked


class Proposals(RegionProposalNetwork):
    """torchvision's, with L1 for boxes."""

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets):
        positive, negative = (torch.cat(picked).nonzero()[:, 0] for picked in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        targets = torch.cat(regression_targets)
        box_loss = F.l1_loss(pred_bbox_deltas[positive], targets[positive], reduction="sum") / max(1, len(sampled))
        wanted = torch.cat(labels)[sampled]
        loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], wanted, reduction="sum")
        return loss / max(1, len(sampled)), box_loss


# ---------------------------------------------------------------------------------------------- heads


class AlignedPooler(MultiScaleRoIAlign):
    """torchvision's, aligned, with as many samples as a bin has places, and scales that are those of the strides."""

    def __init__(self, size: int) -> None:
        super().__init__([str(level) for level in range(len(STRIDES))], size, sampling_ratio=0)
        self.level_of = LevelMapper(2, 5)

    def forward(self, x: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes) -> torch.Tensor:
        maps = [x[name] for name in self.featmap_names]
        places = torch.cat([torch.full_like(each[:, :1], number) for number, each in enumerate(boxes)])
        rois, levels = torch.cat([places, torch.cat(boxes)], dim=1), self.level_of(boxes)
        out = maps[0].new_zeros(len(rois), maps[0].shape[1], *self.output_size)
        for level, (found, stride) in enumerate(zip(maps, STRIDES)):
            chosen = (levels == level).nonzero()[:, 0]
            # A level without boxes is pooled too: its map stays part of the graph on every rank.
            out = out.index_add(
                0, chosen, roi_align(found, rois[chosen], self.output_size, 1 / stride, sampling_ratio=0, aligned=True)
            )
        return out


class Heads(RoIHeads):
    """torchvision's box and mask heads, with L1 for boxes and mask targets of 0 and 1."""

    def assign_targets_to_proposals(self, proposals, gt_boxes, gt_labels):
        self.fg_bg_sampler.boxes = proposals
        return super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)

    def forward(self, features, proposals, image_shapes, targets=None):
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        logits, deltas = self._boxes(features, proposals, image_shapes)
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        masks = self._masks(features, boxes, image_shapes).sigmoid()
        picked = masks[torch.arange(len(masks), device=masks.device), torch.cat(labels)]
        split = picked.split([len(each) for each in boxes])
        of_images = logits.split([len(each) for each in proposals])
        finite = [
            all(bool(found[place].isfinite().all()) for found in (*features.values(), of_images))
            for place in range(len(proposals))
        ]
        parts = zip(boxes, scores, labels, split, finite)
        return [dict(zip(Detection._fields, each)) for each in parts], {}

    def _boxes(self, features, proposals, image_shapes):
        return self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))

    def _masks(self, features, boxes, image_shapes):
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))

    def _losses(self, features, proposals, image_shapes, targets) -> dict[str, torch.Tensor]:
        proposals, matched, labels, box_targets = self.select_training_samples(proposals, targets)
        logits, deltas = self._boxes(features, proposals, image_shapes)
        wanted = torch.cat(labels)
        on_objects = wanted > 0
        rows = on_objects.nonzero()[:, 0]
        of_class = deltas.view(len(deltas), -1, 4)[rows, wanted[rows]]
        box_loss = F.l1_loss(of_class, torch.cat(box_targets)[rows], reduction="sum") / max(1, len(wanted))
        split = on_objects.split([len(each) for each in proposals])
        chosen = [boxes[on] for boxes, on in zip(proposals, split)]
        mask_logits = self._masks(features, chosen, image_shapes)
        mask_targets = torch.cat(
            [
                mask_targets_of(target["masks"], boxes, places[on])
                for target, boxes, places, on in zip(targets, chosen, matched, split)
            ]
        )
        of_class = mask_logits[torch.arange(len(rows), device=rows.device), wanted[rows]]
        # Without objects the sum of nothing is 0 and has a graph, so every rank makes the same backward pass.
        mask_loss = F.binary_cross_entropy_with_logits(of_class, mask_targets, reduction="sum")
        return {
            "loss_class": F.cross_entropy(logits, wanted, reduction="sum") / max(1, len(wanted)),
            "loss_box": box_loss,
            "loss_mask": mask_loss / max(1, mask_targets.numel()),
        }


def mask_targets_of(masks: torch.Tensor, boxes: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What a mask head should give inside boxes: float32 [n, 28, 28] of 0 and 1.

    Args:
        masks: uint8 [N, H, W].  boxes: [n, 4].  places: int64 [n], each box's mask.
    """
    if not len(boxes):
        return boxes.new_zeros(0, _MASK_PX, _MASK_PX)
    rois = torch.cat([places.to(boxes)[:, None], boxes], dim=1)
    sampled = roi_align(masks[:, None].to(boxes), rois, _MASK_PX, 1.0, sampling_ratio=0, aligned=True)
    return (sampled[:, 0] >= 0.5).to(boxes)


class _Seam(nn.Module):
    """Before another class: its layers run in the parameters' dtype, what it gives is float32."""

    def forward(self, x):
        dtype = next(self.parameters()).dtype
        x = [each.to(dtype) for each in x] if isinstance(x, list) else x.to(dtype)
        return _float(super().forward(x))


def _float(value):
    if isinstance(value, torch.Tensor):
        return value.float()
    return type(value)(_float(each) for each in value)


class _ProposalHead(_Seam, RPNHead):
    pass


class _BoxHead(_Seam, FastRCNNConvFCHead):
    pass


class _BoxPredictor(_Seam, FastRCNNPredictor):
    pass


class _MaskHead(_Seam, MaskRCNNHeads):
    pass


class _MaskPredictor(_Seam, MaskRCNNPredictor):
    pass


# ------------------------------------------------------------------------------------------- building


class BranchesAndFpn(nn.Module):
    """Four taps -> five maps of `channels` at strides 4 to 64."""

    def __init__(self, width: int, channels: int, branch_norm, norm) -> None:
        super().__init__()
        self.branches = FourBranches(width, branch_norm)
        self.fpn = FeaturePyramidNetwork([width] * 4, channels, LastLevelMaxPool(), norm)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        rescaled = self.branches(maps)
        return list(self.fpn(OrderedDict((str(level), each) for level, each in enumerate(rescaled))).values())


class SimplePyramidAndPool(SimplePyramid):
    """`SimplePyramid`, and a fifth map pooled from the fourth."""

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        maps = super().forward(maps)
        return [*maps, F.max_pool2d(maps[-1], 1, 2)]


def build_detector(
    model: ModelSettings,
    settings: DetectorSettings,
    num_classes: int,
    *,
    square_px: int = 0,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    all_reduce: AllReduce = on_one_rank,
    activation_checkpointing: ActivationCheckpointing = "none",
) -> Detector:
    """A freshly initialised detector.

    Args:
        num_classes: without the background.  all_reduce: of batch norms, over ranks.
        square_px, mean, std: as of `Detector`.
        activation_checkpointing: of each block in the backward pass.
    Source: Mask R-CNN (arXiv 1703.06870) with an FPN (arXiv 1612.03144), in mmdetection's settings.
    """
    if settings.window:
        backbone = build_window_backbone(
            model,
            settings.taps,
            window=settings.window,
            global_blocks=settings.global_blocks,
            activation_checkpointing=activation_checkpointing,
        )
    else:
        backbone = build_dense_backbone(model, settings.taps, activation_checkpointing=activation_checkpointing)
    batch_norm = partial(SyncBatchNorm, all_reduce=all_reduce)
    norm: Callable[[int], nn.Module] | None = {"none": None, "layer": ChannelNorm, "batch": batch_norm}[
        settings.head_norm
    ]
    width, channels = model.width, settings.channels
    pyramid: nn.Module
    if settings.pyramid == "branches":
        branch_norm = batch_norm if settings.branch_norm == "batch" else _group_norm
        pyramid = BranchesAndFpn(width, channels, branch_norm, norm)
    else:
        pyramid = SimplePyramidAndPool(width, channels, norm or ChannelNorm)
    parts = _proposals(settings), _heads(settings, num_classes + 1, norm)
    return Detector(backbone, pyramid, *parts, square_px=square_px, mean=mean, std=std)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _proposals(settings: DetectorSettings) -> Proposals:
    anchors = Anchors()
    head = _ProposalHead(settings.channels, len(_RATIOS), conv_depth=settings.rpn_convs)
    counts = {"training": 2000, "testing": 1000}, {"training": 1000, "testing": 1000}
    rpn = Proposals(anchors, head, 0.7, 0.3, 256, 0.5, *counts, 0.7)
    rpn.fg_bg_sampler = SeededSampler(256, 0.5)
    return rpn


def _heads(settings: DetectorSettings, num_classes: int, norm) -> Heads:
    channels = settings.channels
    box_head = _BoxHead(
        (channels, 7, 7), [channels] * settings.box_convs, [settings.box_width] * settings.box_layers, norm_layer=norm
    )
    heads = Heads(
        AlignedPooler(7),
        box_head,
        _BoxPredictor(settings.box_width, num_classes),
        0.5,
        0.5,
        settings.rois,
        0.25,
        None,
        0.05,
        0.5,
        settings.detections,
        AlignedPooler(_MASK_PX // 2),
        _MaskHead(channels, [channels] * settings.mask_convs, 1, norm_layer=norm),
        _MaskPredictor(channels, channels, num_classes),
    )
    heads.fg_bg_sampler = SeededSampler(settings.rois, 0.25)
    return heads
