"""A classifier of ImageNet-1K on images of some of its classes, which their folders name by synset.

Imagenette, Imagewoof and ImageNet-100 are such sets. The classifier chooses among the classes of the set alone, as timm
evaluates on ImageNet-A and ImageNet-R.
"""

from __future__ import annotations

import torch
from timm.data import ImageNetInfo
from torch import nn

NUM_CLASSES = 1000


def imagenet_columns(classes: tuple[str, ...]) -> list[int] | None:
    """Where these classes stand in ImageNet-1K's order; None unless all are synsets of it."""
    place = {synset: number for number, synset in enumerate(ImageNetInfo().label_names())}
    return [place[name] for name in classes] if all(name in place for name in classes) else None


class OfSomeClasses(nn.Module):
    """images [B, 3, S, S] -> the logits [B, C] of some classes.

    Args:
        model: images -> logits of all classes.  columns: of the C classes.
    """

    columns: torch.Tensor

    def __init__(self, model: nn.Module, columns: list[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)[:, self.columns]
