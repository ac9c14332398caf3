"""Mask R-CNN on a vision transformer of the BEiT family, in torch and torchvision alone.

This file lies in a release folder as `detector.py`, beside the weights and numbers that it reads:

    model = load("FOLDER")
    found = model([image])[0]     # image: uint8 [3, H, W], or float in [0, 1]
    found["boxes"], found["labels"], found["scores"], found["masks"]

as torchvision's own detectors give them: boxes [N, 4], x1 y1 x2 y2 in the image's pixels; labels from 1, whose names
and category ids are `model.categories[label - 1]`; scores; masks [N, 1, H, W], probabilities. It is for inference.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
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

STRIDES = (4, 8, 16, 32)
ANCHOR_STRIDES, ANCHOR_SCALE, RATIOS = (*STRIDES, 64), 8, (0.5, 1.0, 2.0)
CLASS_ROWS = 3


def load(folder: str | Path) -> Detector:
    """The detector of a release folder, in eval mode, float32."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = Detector(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


class Detector(nn.Module):
    """A list of images, uint8 or float in [0, 1], each [3, H, W] -> for each a dictionary as torchvision's detectors
    give it.
    """

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config, self.categories = config, config["categories"]
        width, channels = config["backbone"]["width"], config["pyramid"]["channels"]
        self.backbone = Backbone(**config["backbone"])
        norm = {"none": None, "layer": ChannelNorm, "batch": nn.BatchNorm2d}[config["heads"]["norm"]]
        self.pyramid: nn.Module
        if config["pyramid"]["kind"] == "branches":
            branch_norm = nn.BatchNorm2d if config["pyramid"]["branch_norm"] == "batch" else group_norm
            self.pyramid = BranchesAndFpn(width, channels, branch_norm, norm)
        else:
            self.pyramid = SimplePyramid(width, channels, norm or ChannelNorm)
        self.rpn = proposals(channels, config["heads"])
        self.roi_heads = heads(channels, config["heads"], len(self.categories) + 1, norm)

    @torch.no_grad()
    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        batch = self.batch([self.resized(image) for image in images])
        features = self.features(batch)
        boxes, _ = self.rpn(batch, features)
        found, _ = self.roi_heads(features, boxes, batch.image_sizes)
        for each, image, seen in zip(found, images, batch.image_sizes):
            height, width = image.shape[1:]
            scale = [width / seen[1], height / seen[0]] * 2
            each["boxes"] = each["boxes"] * torch.tensor(scale, device=each["boxes"].device)
            each["masks"] = paste_masks(each["masks"][:, 0], each["boxes"], height, width)
        return found

    def resized(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [3, h, w] of the size that the detector was measured at."""
        if image.is_floating_point():
            image = (255 * image).round().clamp(0, 255).to(torch.uint8)
        height, width = image.shape[1:]
        short_px, long_px = self.config["short_px"], self.config["long_px"]
        factor = min(short_px / min(height, width), long_px / max(height, width))
        size = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
        if size == (height, width):
            return image
        return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]

    def batch(self, images: list[torch.Tensor]) -> ImageList:
        """Normalised, and filled up with the mean colour to one shape."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        square, step = self.config["square_px"], STRIDES[-1]
        height, width = (square, square) if square else (-(-max(side) // step) * step for side in zip(*sizes))
        device = images[0].device
        mean, std = (
            255 * torch.tensor(self.config[name], device=device)[:, None, None] for name in ("image_mean", "image_std")
        )
        batch = torch.zeros(len(images), 3, height, width, device=device)
        for row, image in zip(batch, images):
            row[:, : image.shape[1], : image.shape[2]] = (image.float() - mean) / std
        return ImageList(batch, sizes)

    def features(self, batch: ImageList) -> dict[str, torch.Tensor]:
        maps = self.pyramid(self.backbone(batch.tensors))
        return OrderedDict((str(level), each) for level, each in enumerate(maps))


def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Masks of boxes [N, m, m] -> of the whole image [N, 1, height, width]; bilinear, at the pixels' centres."""
    across, down = (torch.arange(side, device=masks.device) + 0.5 for side in (width, height))
    left, top, right, bottom = (side[:, None] for side in boxes.unbind(1))
    x = (across[None] - left) / (right - left) * 2 - 1
    y = (down[None] - top) / (bottom - top) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=3)
    return F.grid_sample(masks[:, None], grid, align_corners=False)


# ------------------------------------------------------------------------------------------ backbone


class Attention(nn.Module):
    """Attention with a bias by relative position, over all patches or inside windows."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + CLASS_ROWS, heads))

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias).unflatten(2, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = F.embedding(index, self.relative_position_bias_table).permute(2, 0, 1).contiguous()[None]
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.proj(found.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Args: window: patches a side of its windows; 0: it sees the whole image."""

    def __init__(self, width: int, heads: int, hidden: int, table_grid: int, window: int, scaled: bool) -> None:
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = Attention(width, heads, window or table_grid)
        self.mlp = Mlp(width, hidden)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(width)) if scaled else None for _ in range(2))

    def forward(self, x: torch.Tensor, index: torch.Tensor, height: int, width: int) -> torch.Tensor:
        seen = self.norm1(x)
        if self.window:
            windows = self.attn(to_windows(seen, height, width, self.window), index)
            found = from_windows(windows, height, width, self.window)
        else:
            found = self.attn(seen, index)
        x = x + (found if self.gamma_1 is None else self.gamma_1 * found)
        found = self.mlp(self.norm2(x))
        return x + (found if self.gamma_2 is None else self.gamma_2 * found)


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch_px: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_px, patch_px)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Backbone(nn.Module):
    """Images [B, 3, H, W] -> the maps [B, D, H / p, W / p] after the blocks `taps`.

    Args:
        table_grid: patches a side of the largest square that the bias tables are for.
        window: patches a side of the windows of all blocks but `global_blocks`; 0: there are none, and a class token.
    """

    def __init__(
        self, *, patch_px: int, width: int, depth: int, heads: int, hidden: int, table_grid: int, taps: list[int],
        window: int, global_blocks: list[int], layer_scale: bool, absolute_positions: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch_px, self.table_grid, self.taps, self.window = patch_px, table_grid, taps, window
        self.patch_embed = PatchEmbed(width, patch_px)
        self.cls_token = None if window else nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + table_grid**2, width)) if absolute_positions else None
        windows = [0 if number in global_blocks else window for number in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, hidden, table_grid, side, layer_scale) for side in windows)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        height, width = (side // self.patch_px for side in images.shape[2:])
        tokens = self.patch_embed(images)
        first = 0 if self.cls_token is None else 1
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        if self.pos_embed is not None:
            tokens = tokens + places(self.pos_embed, height, width, self.table_grid)[:, 1 - first :]
        whole = position_index(height, width, self.table_grid, tokens.device)[1 - first :, 1 - first :]
        inside = position_index(self.window, self.window, self.window, tokens.device)[1:, 1:]
        maps = []
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, inside if block.window else whole, height, width)
            if number in self.taps:
                maps.append(tokens[:, first:].unflatten(1, (height, width)).permute(0, 3, 1, 2))
        return maps


def places(square: torch.Tensor, height: int, width: int, grid: int) -> torch.Tensor:
    """The class token's vector and those of the upper left height x width places of grid x grid: [1, 1 + h w, D]."""
    rows = square[:, 1:].unflatten(1, (grid, grid))[:, :height, :width]
    return torch.cat([square[:, :1], rows.flatten(1, 2)], dim=1)


def position_index(height: int, width: int, grid: int, device: torch.device) -> torch.Tensor:
    """Rows of a grid x grid bias table for height x width patches: int64 [1 + h w, 1 + h w], the class token first."""
    if max(height, width) > grid:
        raise ValueError(f"{height} x {width} patches: the bias tables are for at most {grid} a side")
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    down = rows[:, None] - rows[None] + grid - 1
    across = columns[:, None] - columns[None] + grid - 1
    patches = down[:, None, :, None] * (2 * grid - 1) + across[None, :, None, :]
    of_class = (2 * grid - 1) ** 2
    index = torch.empty(1 + height * width, 1 + height * width, dtype=torch.int64, device=device)
    index[1:, 1:] = patches.reshape(height * width, height * width)
    index[0], index[1:, 0], index[0, 0] = of_class, of_class + 1, of_class + 2
    return index


def to_windows(x: torch.Tensor, height: int, width: int, window: int) -> torch.Tensor:
    """Tokens [B, h w, D] -> [B n, window^2, D]; the grid is filled up with zeros below and on the right."""
    x = F.pad(x.view(len(x), height, width, -1), (0, 0, 0, -width % window, 0, -height % window))
    batch, high, wide, channels = x.shape
    x = x.view(batch, high // window, window, wide // window, window, channels).transpose(2, 3)
    return x.reshape(-1, window * window, channels)


def from_windows(x: torch.Tensor, height: int, width: int, window: int) -> torch.Tensor:
    rows, columns, channels = -(-height // window), -(-width // window), x.shape[2]
    x = x.view(-1, rows, columns, window, window, channels).transpose(2, 3)
    x = x.reshape(-1, rows * window, columns * window, channels)[:, :height, :width]
    return x.reshape(len(x), height * width, channels)


# ------------------------------------------------------------------------------------------- pyramid


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place of a map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels)


def doubled(width: int, out: int | None = None) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, out or width, kernel_size=2, stride=2)


class FourBranches(nn.Module):
    """BEiT's: four maps of one stride become those of strides 4 to 32."""

    def __init__(self, width: int, norm) -> None:
        super().__init__()
        self.fpn1 = nn.Sequential(doubled(width), norm(width), nn.GELU(), doubled(width))
        self.fpn2 = nn.Sequential(doubled(width))
        self.fpn4 = nn.MaxPool2d(2)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.fpn1(maps[0]), self.fpn2(maps[1]), maps[2], self.fpn4(maps[3])]


class BranchesAndFpn(nn.Module):
    def __init__(self, width: int, channels: int, branch_norm, norm) -> None:
        super().__init__()
        self.branches = FourBranches(width, branch_norm)
        self.fpn = FeaturePyramidNetwork([width] * 4, channels, LastLevelMaxPool(), norm)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        rescaled = self.branches(maps)
        return list(self.fpn(OrderedDict((str(level), each) for level, each in enumerate(rescaled))).values())


class SimplePyramid(nn.Module):
    """ViTDet's (arXiv 2203.16527): all maps from the last one."""

    def __init__(self, width: int, channels: int, norm) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        first = nn.Sequential(doubled(width, half), norm(half), nn.GELU(), doubled(half, quarter))
        self.scaled = nn.ModuleList([first, doubled(width, half), nn.Identity(), nn.MaxPool2d(2)])
        self.out = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inside, channels, 1, bias=False),
                norm(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                norm(channels),
            )
            for inside in (quarter, half, width, width)
        )

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        found = [out(scaled(maps[-1])) for scaled, out in zip(self.scaled, self.out)]
        return [*found, F.max_pool2d(found[-1], 1, 2)]


# --------------------------------------------------------------------------------------------- heads


class Anchors(AnchorGenerator):
    """Anchors of 8 strides in three shapes, not rounded, centred on multiples of the stride."""

    def __init__(self) -> None:
        super().__init__(tuple((ANCHOR_SCALE * stride,) for stride in ANCHOR_STRIDES), (RATIOS,) * 5)

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=torch.device("cpu")):  # noqa: B008
        scales, ratios = (torch.as_tensor(values, dtype=dtype, device=device) for values in (scales, aspect_ratios))
        heights, widths = (((root[:, None] * scales[None]).view(-1)) for root in (ratios.sqrt(), 1 / ratios.sqrt()))
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in ANCHOR_STRIDES]
        anchors = torch.cat(self.grid_anchors([list(each.shape[-2:]) for each in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


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
            pooled = roi_align(found, rois[chosen], self.output_size, 1 / stride, sampling_ratio=0, aligned=True)
            out = out.index_add(0, chosen, pooled)
        return out


def proposals(channels: int, config: dict) -> RegionProposalNetwork:
    head = RPNHead(channels, len(RATIOS), conv_depth=config["rpn_convs"])
    counts = {"training": 2000, "testing": 1000}, {"training": 1000, "testing": 1000}
    return RegionProposalNetwork(Anchors(), head, 0.7, 0.3, 256, 0.5, *counts, 0.7)


def heads(channels: int, config: dict, num_classes: int, norm) -> RoIHeads:
    """Args: num_classes: with the background, which is 0."""
    box_head = FastRCNNConvFCHead(
        (channels, 7, 7),
        [channels] * config["box_convs"],
        [config["box_width"]] * config["box_layers"],
        norm_layer=norm,
    )
    box_predictor = FastRCNNPredictor(config["box_width"], num_classes)
    mask_head = MaskRCNNHeads(channels, [channels] * config["mask_convs"], 1, norm_layer=norm)
    mask_predictor = MaskRCNNPredictor(channels, channels, num_classes)
    of_boxes = AlignedPooler(7), box_head, box_predictor, 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, config["detections"]
    return RoIHeads(*of_boxes, AlignedPooler(14), mask_head, mask_predictor)
