"""Linear classifiers of frozen features at the optimum: multinomial logistic regression by L-BFGS on the whole set.

The loss is convex, so nothing is left to a learning rate, a batch, a number of epochs or a seed; only the strength of
the penalty is, and several are solved one after the other. Means of code vectors are strongly correlated: some of their
directions have a thousandth of the variance of others. Steps of gradients, AdamW's too, hardly move along these, so the
solver works along the principal axes, each scaled to about the same curvature. That changes its path, not its goal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from peco_ds.evaluation.linear_probes import ROWS_AT_ONCE, LinearProbes, standardisation

# Most iterations of one penalty, and the largest entry of the gradient at which it is solved.
ITERATIONS = 200
TOLERANCE = 1e-5
# Features on the device stay there up to this size; larger sets are made again in every pass.
KEPT_BYTES = 8 * 2**30
# Wider features, such as bags of codes, are taken along their own axes: the principal ones would cost more than they
# save.
WIDEST_ROTATED = 2048


def logistic_regressions(
    rows: Callable, labels: torch.Tensor, penalties: tuple[float, ...], *, num_classes: int, device: torch.device
) -> LinearProbes:
    """Minimise mean cross-entropy + penalty / 2 |weight|^2 over standardised features; the bias is not penalised.

    Args:
        rows: int64 [b] on the CPU -> float32 [b, F] on `device`.
        labels: int64 [n].
        penalties: > 0; one classifier each, best from strong to weak.
    Returns: the classifiers in the order of the penalties.
    """
    mean, scale = standardisation(rows, len(labels))
    truth = labels.to(device)
    chunks = torch.arange(len(labels)).split(ROWS_AT_ONCE)

    def standardised(index: torch.Tensor) -> torch.Tensor:
        return (rows(index) - mean) * scale

    variances, axes = torch.ones_like(mean), None
    if len(mean) <= WIDEST_ROTATED:
        variances, axes = _principal_axes(map(standardised, chunks), len(labels))

    def made(index: torch.Tensor) -> torch.Tensor:
        return standardised(index) if axes is None else standardised(index) @ axes

    kept = [made(index) for index in chunks] if 4 * len(labels) * len(mean) <= KEPT_BYTES else None

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for place, index in enumerate(chunks):
            yield made(index) if kept is None else kept[place], truth[index.to(device)]

    weight, bias = torch.zeros(num_classes, len(mean), device=device), torch.zeros(num_classes, device=device)
    solved = []
    for penalty in penalties:
        # About the curvature along an axis: that of a softmax over C classes is near 1 / C of the variance.
        curvatures = variances / num_classes + penalty
        weight, bias = _solve(weight, bias, batches, len(labels), penalty, curvatures.rsqrt())
        solved.append((weight if axes is None else weight @ axes.t(), bias))
    weights, biases = (torch.stack(parts) for parts in zip(*solved))
    return LinearProbes(weights, biases, mean, scale)


@torch.no_grad()
def _principal_axes(batches: Iterator[torch.Tensor], num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances float32 [F] along the principal axes, and the axes float32 [F, F], one a column."""
    covariance = sum(features.double().t() @ features.double() for features in batches) / num_rows
    variances, axes = torch.linalg.eigh(covariance)
    return variances.clamp_min(0).float(), axes.float()


def _solve(
    weight: torch.Tensor, bias: torch.Tensor, batches: Callable, num_rows: int, penalty: float, units: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [C, F] and bias [C] at the minimum for this penalty.

    Args:
        weight, bias: where to start.
        units: [F], by which a coordinate of the search moves the weights of a feature.
    """
    place, bias = (weight / units).requires_grad_(True), bias.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [place, bias],
        max_iter=ITERATIONS,
        max_eval=2 * ITERATIONS,
        history_size=20,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def loss_of_all() -> torch.Tensor:
        optimizer.zero_grad()
        # In double precision: near the minimum, steps change the loss in its last digits.
        total = torch.zeros((), dtype=torch.float64, device=units.device)
        for features, truth in batches():
            logits = torch.addmm(bias, features, (place * units).t())
            loss = F.cross_entropy(logits, truth, reduction="sum") / num_rows
            loss.backward()
            total += loss.detach()
        cost = penalty / 2 * (place * units).square().sum()
        cost.backward()
        return total + cost.detach()

    optimizer.step(loss_of_all)
    return (place * units).detach(), bias.detach()
