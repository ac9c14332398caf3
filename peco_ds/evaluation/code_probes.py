"""Represent an image by its codes alone, to measure what a classifier can learn from the tokens.

PeCo's table 4 has top-1 of a linear classifier of the mean of an image's code vectors. The bag of its codes stands
beside it: it knows which codes there are, not what their vectors say.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from peco_ds.config import ProbeSettings
from peco_ds.evaluation.knn import knn_top1
from peco_ds.evaluation.linear_probes import linear_accuracy
from peco_ds.evaluation.logistic_regression import ITERATIONS, logistic_regressions

BAG, MEAN = "bag of codes", "mean code vector"
# What table 4 of the paper (arXiv 2111.12710) calls the classification accuracy of the tokens.
OF_THE_PAPER = f"{MEAN}, linear"
# Strengths of the penalty, strongest first: each is solved from the one before, which is near. The numbers of a mean
# vector are strongly correlated, so that weak penalties, too, decide what is used of them; a bag's are not.
PENALTIES = {BAG: tuple(10.0**-power for power in range(6)), MEAN: tuple(10.0**-power for power in range(11))}


def bag_of_codes(codes: torch.Tensor, num_codes: int, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """The codes of an image without their positions: square roots of their shares, so that every image has length 1.

    Args:
        codes: integers [n, N].
    Returns: int64 [b] -> float32 [b, V].
    """

    def rows(index: torch.Tensor) -> torch.Tensor:
        chosen = codes[index].to(device, torch.int64)
        share = torch.full((1, 1), 1.0 / chosen.shape[1], device=device).expand(chosen.shape)
        return torch.zeros(len(chosen), num_codes, device=device).scatter_add_(1, chosen, share).sqrt()

    return rows


def mean_code_vector(
    codes: torch.Tensor, vectors: torch.Tensor, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The mean of an image's code vectors.

    Args:
        codes: integers [n, N].  vectors: [V, C], the codebook.
    Returns: int64 [b] -> float32 [b, C].
    """
    vectors = vectors.to(device, torch.float32)
    return lambda index: vectors[codes[index].to(device, torch.int64)].mean(dim=1)


def probe_codes(
    vectors: torch.Tensor,
    train: tuple[torch.Tensor, torch.Tensor],
    val: tuple[torch.Tensor, torch.Tensor],
    num_classes: int,
    world,
) -> dict:
    """What a linear classifier and nearest neighbours make of the codes alone, in percent.

    The linear classifiers are solved on all of `train` and measured on all of `val`, one for each strength of the
    penalty. The best one counts.

    Args:
        vectors: [V, C], the codebook.
        train, val: codes integers [n, N] and labels int64 [n], the same on every rank.
        world: the ranks (`runtime.distributed.World`).
    Returns: {"images_as": {form: best_linear, best_knn, linear [{penalty, top1, top5}], knn {k: top1}}, "mean code
        vector, linear": the best of that form, "settings"}.
    Collective; the two forms of an image are shared out.
    """
    settings, device = ProbeSettings(), world.device
    forms = {
        BAG: lambda codes: bag_of_codes(codes, len(vectors), device),
        MEAN: lambda codes: mean_code_vector(codes, vectors, device),
    }
    (train_codes, train_labels), (val_codes, val_labels) = train, val
    found = {}
    for name in list(forms)[world.rank :: world.size]:
        train_rows, val_rows = forms[name](train_codes), forms[name](val_codes)
        probes = logistic_regressions(train_rows, train_labels, PENALTIES[name], num_classes=num_classes, device=device)
        linear = [
            {"penalty": penalty, **accuracy}
            for penalty, accuracy in zip(PENALTIES[name], linear_accuracy(probes, val_rows, val_labels))
        ]
        knn = knn_top1(
            train_rows,
            train_labels,
            val_rows,
            val_labels,
            ks=settings.knn_k,
            temperature=settings.knn_temperature,
            num_classes=num_classes,
            device=device,
        )
        found[name] = {
            "best_linear": max(row["top1"] for row in linear),
            "best_knn": max(knn.values()),
            "linear": linear,
            "knn": {str(k): top1 for k, top1 in knn.items()},
        }
    everything = {name: value for part in world.gather_objects(found) for name, value in part.items()}
    return {
        "images_as": {name: everything[name] for name in forms},
        OF_THE_PAPER: max(everything[MEAN]["linear"], key=lambda row: row["top1"]),
        "settings": {
            "solver": "L-BFGS",
            "penalties": PENALTIES,
            "iterations": ITERATIONS,
            "knn_k": settings.knn_k,
            "knn_temperature": settings.knn_temperature,
        },
    }
