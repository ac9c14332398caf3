"""Classify by nearest neighbours: how well the features separate the classes, with nothing trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


@torch.no_grad()
def knn_top1(
    train_rows: Callable,
    train_labels: torch.Tensor,
    val_rows: Callable,
    val_labels: torch.Tensor,
    *,
    ks: tuple[int, ...],
    temperature: float,
    num_classes: int,
    device: torch.device,
    chunk: int = 4096,
) -> dict[int, float]:
    """Weighted k-nearest-neighbour accuracy, in percent, for every k.

    Neighbours by cosine similarity s of the features as they are; each votes for its class with exp(s / temperature).

    Args:
        train_rows, val_rows: int64 [b] -> float32 [b, F] on `device`.  train_labels: int64 [n].  val_labels: int64 [m].
        ks: more than n count as n.
        chunk: images of either set in one matrix of similarities; memory depends on it and on the size of val.
    Source: DINO (arXiv 2104.14294), after Wu et al. (arXiv 1805.01978).
    """
    most = min(max(ks), len(train_labels))
    similarity = torch.empty(len(val_labels), 0, device=device)
    labels = torch.empty(len(val_labels), 0, dtype=torch.int64, device=device)
    val_unit = torch.cat([F.normalize(val_rows(index), dim=1) for index in torch.arange(len(val_labels)).split(chunk)])
    # The training set is read once, whatever the size of val.
    for index in torch.arange(len(train_labels)).split(chunk):
        train_unit, candidates = F.normalize(train_rows(index), dim=1), train_labels[index].to(device)
        kept = [
            _nearest(unit @ train_unit.t(), candidates, near, of, most)
            for unit, near, of in zip(val_unit.split(chunk), similarity.split(chunk), labels.split(chunk))
        ]
        similarity, labels = (torch.cat(parts) for parts in zip(*kept))
    # Similarities are taken relative to the nearest: the same votes, and no overflow.
    weights = torch.exp((similarity - similarity[:, :1]) / temperature)
    truth = val_labels.to(device)
    found = {}
    for k in ks:
        votes = torch.zeros(len(truth), num_classes, device=device).scatter_add_(1, labels[:, :k], weights[:, :k])
        found[k] = 100 * float((votes.argmax(dim=1) == truth).double().mean())
    return found


def _nearest(
    similarity: torch.Tensor, candidates: torch.Tensor, best: torch.Tensor, best_labels: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `most` nearest of what was kept so far and a chunk's candidates, nearest first."""
    similarity = torch.cat([best, similarity], dim=1)
    values, places = similarity.topk(min(most, similarity.shape[1]), dim=1)
    labels = torch.cat([best_labels, candidates.expand(len(similarity), -1)], dim=1)
    return values, labels.gather(1, places)
