"""Top-1 and top-5 of a classifier over a labelled set, every image counted once over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from peco_ds.errors import UserError


class ClassificationSums:
    """Right answers and losses, summed over a rank's images."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        accuracies = {
            f"top{k}": MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro") for k in (1, 5)
        }
        self._metrics = MetricCollection(
            {**accuracies, "loss": MeanMetric(nan_strategy="disable"), "images": SumMetric()}, compute_groups=False
        ).to(device)

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """
        Args:
            logits: [B, C].  labels: int64 [B]; -1: the row only fills the batch up and is not counted.
        """
        real = labels >= 0
        logits, labels = logits[real].float(), labels[real]
        if len(labels):
            self._metrics["top1"].update(logits, labels)
            self._metrics["top5"].update(logits, labels)
            self._metrics["loss"].update(F.cross_entropy(logits, labels, reduction="none"))
            self._metrics["images"].update(len(labels))

    def result(self) -> dict[str, float]:
        """top1, top5 (percent; of fewer than five classes: top-C), loss (cross-entropy), images (how many were
        counted).

        Collective: torchmetrics sums the counts over the ranks of the process group, if any.

        Raises: UserError on every rank where a logit was not finite: the highest of such logits is class 0, which
            would be a score.
        """
        values = {name: float(value) for name, value in self._metrics.compute().items()}
        if values["images"] and not math.isfinite(values["loss"]):
            raise UserError(
                f"the classifier gives values that are not finite (loss {values['loss']}), so there is no score; take "
                "weights of an earlier step, or more precision (fp32)"
            )
        return {
            "top1": round(100 * values["top1"], 4),
            "top5": round(100 * values["top5"], 4),
            "loss": values["loss"],
            "images": int(values["images"]),
        }


@torch.no_grad()
def classification_quality(
    forward: Callable[[torch.Tensor], torch.Tensor], batches: Iterable, *, num_classes: int, device: torch.device
) -> dict[str, float]:
    """Top-1, top-5 and loss. Collective.

    Args:
        forward: images_norm [B, 3, S, S] -> logits [B, C].
        batches: have `.images_norm` and `.labels` (int64 [B], -1 where a row only fills the batch up).
    Returns: as `ClassificationSums.result`.
    """
    sums = ClassificationSums(num_classes, device)
    for batch in batches:
        sums.add(forward(batch.images_norm), batch.labels)
    return sums.result()


def accuracy_of(quality: dict[str, float]) -> dict[str, float]:
    """top1 and top5 alone of a `ClassificationSums.result`."""
    return {name: quality[name] for name in ("top1", "top5")}
