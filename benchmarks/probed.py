"""The best figures of a linear probe's layers (`probe.json` of linear_probe.py), in percent."""

from __future__ import annotations


def linear_top1(layer: dict) -> float:
    """Of a layer, over its learning rates."""
    return max(row["top1"] for row in layer["linear"])


def best_linear(layers: list[dict]) -> float:
    return max(map(linear_top1, layers))


def best_knn(layers: list[dict]) -> float:
    return max(value for layer in layers for value in layer["knn"].values())
