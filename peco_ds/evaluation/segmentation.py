"""mIoU of a segmenter over whole scenes: windows, scales, and one confusion matrix of all ranks.

A scene is resized, seen in windows whose logits are averaged where they overlap, and its logits are resized to the
scene's own size in bands of rows: the memory of a large original does not grow with its number of classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from peco_ds.config import ModelSettings, SegmentationSettings
from peco_ds.data.scene_augment import IGNORED_PIXEL, bounded_size, resize_image
from peco_ds.data.views import normalize
from peco_ds.errors import UserError

# Elements of a band's logits, of all classes.
BAND_ELEMENTS = 2**24
# images_norm [n, 3, S, S] -> logits [n, C, h, w] of any stride
Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Windows:
    """Where windows lie on an image of height x width.

    Source: mmsegmentation's `slide_inference`: the last one of a row or column moves back to the border.
    """

    height: int
    width: int
    side: int
    stride: int

    def boxes(self) -> list[tuple[int, int]]:
        """Top and left of each window."""
        return [(top, left) for top in self._starts(self.height) for left in self._starts(self.width)]

    def _starts(self, length: int) -> list[int]:
        number = max(length - self.side + self.stride - 1, 0) // self.stride + 1
        return [max(min(place * self.stride + self.side, length) - self.side, 0) for place in range(number)]


class ScenePredictor:
    """The class of every pixel of a scene, by the settings of an evaluation.

    Args:
        forward: the model.
        most_passes: this rank's number of forward passes -> the most of any rank's, so that all make the same number;
            collective.
        batch: windows a pass.
        mean, std: statistics of images in [0, 1].
    """

    def __init__(
        self,
        forward: Forward,
        settings: SegmentationSettings,
        model: ModelSettings,
        *,
        batch: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        most_passes: Callable[[int], int] = lambda passes: passes,
    ) -> None:
        self._forward, self._settings, self._model, self._batch = forward, settings, model, batch
        self._mean, self._std, self._most_passes = mean, std, most_passes

    def __call__(self, image_u8: torch.Tensor) -> torch.Tensor:
        """uint8 [3, H, W] -> uint8 [H, W]. Collective."""
        height, width = image_u8.shape[1:]
        views = [self._resized(image_u8, scale) for scale in self._settings.scales]
        if self._settings.flip:
            views = [view for one in views for view in (one, one.flip(-1))]
        logits = self.logits_of(views)
        if self._settings.flip:
            logits = [found.flip(-1) if place % 2 else found for place, found in enumerate(logits)]
        return predicted_classes(logits, height, width)

    def _resized(self, image_u8: torch.Tensor, scale: float) -> torch.Tensor:
        """float32 [3, h, w], normalised, of the size that the settings ask for."""
        settings, side = self._settings, self._model.image_px
        height, width = image_u8.shape[1:]
        size = bounded_size(height, width, int(settings.long_px * scale), int(settings.short_px * scale))
        if len(settings.scales) > 1 and min(size) < side:
            size = bounded_size(height, width, 10**9, side)
        return normalize(resize_image(image_u8, size)[None], self._mean, self._std)[0]

    def logits_of(self, views: list[torch.Tensor]) -> list[torch.Tensor]:
        """float32 [C, h, w] of each view, mean of the windows that see a place."""
        pieces = [(view, top, left) for view in range(len(views)) for top, left in self._boxes(views[view])]
        sums: list[torch.Tensor | None] = [None] * len(views)
        counts = [view.new_zeros(view.shape[1:]) for view in views]
        for some, logits in self._passes(views, pieces):
            for (view, top, left), found in zip(some, logits):
                height, width = views[view].shape[1:]
                bottom, right = min(top + found.shape[1], height), min(left + found.shape[2], width)
                total = sums[view]
                if total is None:
                    total = sums[view] = found.new_zeros(len(found), height, width)
                total[:, top:bottom, left:right] += found[:, : bottom - top, : right - left]
                counts[view][top:bottom, left:right] += 1
        return [total / count for total, count in zip(sums, counts) if total is not None]

    def _boxes(self, view: torch.Tensor) -> list[tuple[int, int]]:
        if self._settings.windows == "whole":
            return [(0, 0)]
        height, width = view.shape[1:]
        return Windows(height, width, self._model.image_px, self._settings.stride_px).boxes()

    def _passes(self, views, pieces) -> Iterator[tuple[list, torch.Tensor]]:
        """Windows of one pass and their float32 logits at the windows' size; passes without windows keep the other
        ranks company.
        """
        whole = self._settings.windows == "whole"
        batch = 1 if whole else self._batch
        for number in range(self._most_passes(math.ceil(len(pieces) / batch))):
            some = pieces[number * batch : (number + 1) * batch]
            side = self._model.image_px
            size = (side, side)
            if whole and some:
                patch = self._model.patch_px
                height, width = views[some[0][0]].shape[1:]
                size = -(-height // patch) * patch, -(-width // patch) * patch
            # Always a whole batch: one shape, one compiled graph.
            images = views[0].new_zeros(batch, 3, *size)
            for place, (view, top, left) in enumerate(some):
                window = views[view][:, top : top + size[0], left : left + size[1]]
                images[place, :, : window.shape[1], : window.shape[2]] = window
            logits = self._forward(images)[: len(some)].float()
            if some:
                yield some, F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def predicted_classes(views: list[torch.Tensor], height: int, width: int) -> torch.Tensor:
    """The likeliest class of every pixel: of several views by the mean of their probabilities.

    Args:
        views: float32 [C, h_i, w_i].
    Returns: uint8 [height, width]; IGNORED_PIXEL where the scores are not finite: the arg max of NaN is class 0.
    """
    rows = max(1, BAND_ELEMENTS // (views[0].shape[0] * width))
    found = torch.empty(height, width, dtype=torch.uint8, device=views[0].device)
    for first in range(0, height, rows):
        last = min(first + rows, height)
        bands = [resized_rows(view, first, last, height, width) for view in views]
        scores = bands[0] if len(bands) == 1 else sum(band.softmax(0) for band in bands)
        found[first:last] = scores.argmax(0).masked_fill(~scores.amax(0).isfinite(), IGNORED_PIXEL)
    return found


def resized_rows(x: torch.Tensor, first: int, last: int, height: int, width: int) -> torch.Tensor:
    """Rows first to last of x [C, h, w] resized to height x width, bilinear, corners not aligned: [C, rows, width]."""
    places = ((torch.arange(first, last, device=x.device) + 0.5) * (x.shape[1] / height) - 0.5).clamp_min(0)
    upper = places.long().clamp_max(x.shape[1] - 1)
    lower = (upper + 1).clamp_max(x.shape[1] - 1)
    share = (places - upper)[:, None]
    rows = x[:, upper] * (1 - share) + x[:, lower] * share
    return F.interpolate(rows[None], size=(last - first, width), mode="bilinear", align_corners=False)[0]


class Confusion:
    """Counts of (label, prediction) over the labelled pixels of a rank's scenes."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        # Scenes, and those with a pixel that has no prediction.
        self._scenes = torch.zeros(2, dtype=torch.int64, device=device)

    def add(self, labels: torch.Tensor, predictions: torch.Tensor) -> None:
        """
        Args:
            labels: uint8 [H, W]; IGNORED_PIXEL is counted nowhere.  predictions: uint8 [H, W]; IGNORED_PIXEL: none.
        """
        has_none = predictions == IGNORED_PIXEL
        classes, valid = len(self._counts), (labels != IGNORED_PIXEL) & ~has_none
        pairs = labels[valid].long() * classes + predictions[valid].long()
        self._counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        self._scenes += torch.stack([torch.ones_like(has_none[0, 0]), has_none.any()])

    def result(self, all_reduce: Callable[[torch.Tensor], object]) -> dict[str, float]:
        """miou, aacc, macc (percent), images (scenes counted). Collective.

        Raises: UserError on every rank if no pixel is labelled, or the logits of one were not finite.
        Source: mmsegmentation: IoU = I / (P + L - I), mean over classes with a union; aAcc = sum I / sum L; mAcc = mean
            I / L over classes with labels.
        """
        counts = torch.cat([self._counts.flatten(), self._scenes])
        all_reduce(counts)
        scenes, lost = counts[-2:].tolist()
        if lost:
            raise UserError(
                f"the segmenter gives values that are not finite on {lost} of {scenes} scenes, so there is no score; "
                "take weights of an earlier step, or more precision (fp32)"
            )
        return iou_scores(counts[:-2].view_as(self._counts)) | {"images": scenes}


def iou_scores(confusion: torch.Tensor) -> dict[str, float]:
    """miou, aacc, macc in percent of counts [label, prediction].

    Raises: UserError if no pixel is labelled.
    """
    if not confusion.any():
        raise UserError(
            "no pixel of data.val_images is labelled, so there is no mIoU; give scenes whose maps hold classes"
        )
    counts = confusion.double().cpu()
    both, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    union = labelled + predicted - both
    scores = {
        "miou": (both / union)[union > 0].mean(),
        "aacc": both.sum() / labelled.sum(),
        "macc": (both / labelled)[labelled > 0].mean(),
    }
    return {name: round(100 * float(value), 4) for name, value in scores.items()}


@torch.no_grad()
def segmentation_quality(
    predict: ScenePredictor, scenes: Iterable, num_classes: int, world, *, shown: int = 0
) -> tuple[dict[str, float], list[tuple[torch.Tensor, ...]]]:
    """mIoU, aAcc, mAcc, and the first scenes of this rank with their predictions. Collective.

    Args:
        scenes: have `.image_u8`, `.labels` and `.sample` (-1: none, which is predicted and not counted).
        shown: how many scenes are kept.
    Returns: as `Confusion.result`; (image uint8 [3, H, W], labels, predictions uint8 [H, W]) on the CPU.
    """
    confusion = Confusion(num_classes, world.device)
    kept: list[tuple[torch.Tensor, ...]] = []
    for scene in scenes:
        predictions = predict(scene.image_u8)
        if scene.sample < 0:
            continue
        confusion.add(scene.labels, predictions)
        if len(kept) < shown:
            kept.append((scene.image_u8.cpu(), scene.labels.cpu(), predictions.cpu()))
    return confusion.result(world.all_reduce), kept
