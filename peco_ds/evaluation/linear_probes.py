"""Probe frozen features with linear classifiers and nearest neighbours.

The classifiers of all learning rates lie side by side in one tensor, so that a pass over the features trains them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassAccuracy

from peco_ds.config import ProbeSettings
from peco_ds.errors import UserError
from peco_ds.evaluation.knn import knn_top1
from peco_ds.schedules import cosine_with_warmup

ROWS_AT_ONCE = 4096


class LinearProbes(NamedTuple):
    """R classifiers of standardised features."""

    weight: torch.Tensor  # float32 [R, C, F]
    bias: torch.Tensor  # float32 [R, C]
    mean: torch.Tensor  # float32 [F], of the training set
    # float32 [F], one over the standard deviation of the training set.
    scale: torch.Tensor

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 [b, F] -> [b, R, C]."""
        flat = torch.addmm(self.bias.flatten(), (rows - self.mean) * self.scale, self.weight.flatten(0, 1).t())
        return flat.unflatten(1, self.bias.shape)


@torch.no_grad()
def standardisation(rows: Callable, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and one over the standard deviation of every feature, float32 [F].

    A feature that never changes gets 0 for the latter.
    """
    total = squares = torch.zeros((), dtype=torch.float64)
    for index in torch.arange(num_rows).split(ROWS_AT_ONCE):
        values = rows(index).double()
        total, squares = total + values.sum(dim=0), squares + values.square().sum(dim=0)
    mean = total / num_rows
    variance = squares / num_rows - mean.square()
    # A variance that rounding alone explains is that of a constant feature.
    steady = variance <= 1e-12 * (squares / num_rows)
    return mean.float(), torch.where(steady, 0.0, variance.clamp_min(1e-30).rsqrt()).float()


def train_linear_probes(
    rows: Callable,
    labels: torch.Tensor,
    settings: ProbeSettings,
    *,
    num_classes: int,
    device: torch.device,
    stop: Callable[[], None] = lambda: None,
) -> LinearProbes:
    """Cross-entropy, AdamW, half a cosine from each learning rate to 0.

    Every feature is standardised over the training set first, as the parameter-free BatchNorm of MAE's probe does batch
    by batch: the scale of the residual stream grows with the layer, and without it one learning rate would not fit two
    layers. The whole set's statistics depend on no batch. The weights start at zero: the problem is convex, so no
    random start is needed.

    Args:
        rows: int64 [b] on the CPU -> float32 [b, F] on `device`.
        labels: int64 [n].
        settings: its lrs, epochs, global_batch (an epoch's last batch may be smaller), weight_decay and seed are read.
        stop: called before every epoch; may raise.
    Source: BEiT (arXiv 2106.08254), table 9: AdamW, 50 epochs, batch 1024; MAE (arXiv 2111.06377), appendix, for the
        normalisation.
    """
    lrs, epochs, batch = settings.lrs, settings.epochs, settings.global_batch
    mean, scale = standardisation(rows, len(labels))
    weight = torch.zeros(len(lrs), num_classes, len(mean), device=device, requires_grad=True)
    bias = torch.zeros(len(lrs), num_classes, device=device, requires_grad=True)
    probes = LinearProbes(weight, bias, mean, scale)
    # The optimiser moves each learning rate's slice; slices and their gradients share memory with the whole tensors.
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    groups, peaks = [], []
    for whole, decay in ((weight, settings.weight_decay), (bias, 0.0)):
        for part, gradient, lr in zip(whole.detach(), whole.grad, lrs):
            part.grad = gradient
            groups.append({"params": [part], "weight_decay": decay})
            peaks.append(lr)
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    truth = labels.to(device)
    order = torch.Generator().manual_seed(settings.seed)
    steps_an_epoch = -(-len(labels) // batch)
    for epoch in range(epochs):
        stop()
        for place, index in enumerate(torch.randperm(len(labels), generator=order).split(batch)):
            step = epoch * steps_an_epoch + place
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = cosine_with_warmup(
                    step, peak=peak, floor=0.0, warmup_steps=0, total_steps=epochs * steps_an_epoch
                )
            weight.grad.zero_()
            bias.grad.zero_()
            logits = probes.logits(rows(index))
            # Summed over the learning rates, so that none is affected by another's gradient.
            loss = F.cross_entropy(
                logits.flatten(0, 1), truth[index.to(device)].repeat_interleave(len(lrs)), reduction="sum"
            ) / len(index)
            loss.backward()
            optimizer.step()
    return probes._replace(weight=weight.detach(), bias=bias.detach())


@torch.no_grad()
def linear_accuracy(probes: LinearProbes, rows: Callable, labels: torch.Tensor) -> list[dict[str, float]]:
    """{"top1", "top5"} in percent, one entry a classifier; of fewer than five classes top5 is top-C. Not collective."""
    num_probes, num_classes = probes.bias.shape
    accuracies = [
        {
            k: MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro", sync_on_compute=False).to(
                probes.bias.device
            )
            for k in (1, 5)
        }
        for _ in range(num_probes)
    ]
    for index in torch.arange(len(labels)).split(ROWS_AT_ONCE):
        truth = labels[index].to(probes.bias.device)
        for metrics, logits in zip(accuracies, probes.logits(rows(index)).unbind(1)):
            for metric in metrics.values():
                metric.update(logits, truth)
    return [{f"top{k}": 100 * float(metric.compute()) for k, metric in metrics.items()} for metrics in accuracies]


def probe(
    train: tuple[Callable, torch.Tensor],
    val: tuple[Callable, torch.Tensor],
    settings: ProbeSettings,
    *,
    num_classes: int,
    device: torch.device,
    stop: Callable[[], None] = lambda: None,
) -> dict:
    """Linear classifiers and nearest neighbours of one kind of features. Not collective.

    Args:
        train, val: rows and labels, as `train_linear_probes` takes them.
    Returns: {"linear": [{"lr", "top1", "top5"}], "knn": {k: top1}} on `val`, in percent; k as text.
    Raises: UserError for a learning rate at which training diverges.
    """
    probes = train_linear_probes(*train, settings, num_classes=num_classes, device=device, stop=stop)
    for lr, weight, bias in zip(settings.lrs, probes.weight, probes.bias):
        if not bool(weight.isfinite().all() and bias.isfinite().all()):
            raise UserError(f"probe.lrs {lr:g}: its classifier is not finite, so it has no score; give lower rates")
    linear = [{"lr": lr, **accuracy} for lr, accuracy in zip(settings.lrs, linear_accuracy(probes, *val))]
    knn = (
        knn_top1(
            *train,
            *val,
            ks=settings.knn_k,
            temperature=settings.knn_temperature,
            num_classes=num_classes,
            device=device,
        )
        if settings.knn_k
        else {}
    )
    return {"linear": linear, "knn": {str(k): top1 for k, top1 in knn.items()}}
