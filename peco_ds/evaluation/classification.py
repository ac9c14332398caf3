"""Top-1 and top-5 of a classifier over a labelled set, every image counted once over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy


@torch.no_grad()
def classification_quality(
    forward: Callable[[torch.Tensor], torch.Tensor], batches: Iterable, *, num_classes: int, device: torch.device
) -> dict[str, float]:
    """Top-1, top-5 and loss. Collective: torchmetrics sums the counts over the ranks of the process group, if any.

    Args:
        forward: images_norm [B, 3, S, S] -> logits [B, C].
        batches: have `.images_norm` and `.labels` (int64 [B], -1 where a row only fills the batch up).
    Returns: top1, top5 (percent; of fewer than five classes: top-C), loss (cross-entropy), images (how many were
        counted).
    """
    accuracies = {
        f"top{k}": MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro") for k in (1, 5)
    }
    metrics = MetricCollection(
        {**accuracies, "loss": MeanMetric(nan_strategy="disable"), "images": SumMetric()}, compute_groups=False
    ).to(device)
    for batch in batches:
        logits = forward(batch.images_norm).float()
        real = batch.labels >= 0
        logits, labels = logits[real], batch.labels[real]
        if len(labels):
            metrics["top1"].update(logits, labels)
            metrics["top5"].update(logits, labels)
            metrics["loss"].update(F.cross_entropy(logits, labels, reduction="none"))
            metrics["images"].update(len(labels))
    values = {name: float(value) for name, value in metrics.compute().items()}
    return {
        "top1": round(100 * values["top1"], 4),
        "top5": round(100 * values["top5"], 4),
        "loss": values["loss"],
        "images": int(values["images"]),
    }
