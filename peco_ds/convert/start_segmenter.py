"""Start the training of a segmenter from a backbone's weights, or from those of a whole segmenter."""

from __future__ import annotations

import logging

import torch

from peco_ds.config import SegmentRecipe
from peco_ds.convert.initialize import check_classes, check_sizes, start_backbone
from peco_ds.convert.resample import resize_bias_table, resize_places
from peco_ds.errors import UserError
from peco_ds.models.beit_weights import PLACES, BeitWeights
from peco_ds.models.segmenter import Segmenter
from peco_ds.models.segmenter_weights import SegmenterWeights

logger = logging.getLogger("peco_ds")

# What a run tells and records of its fresh parts.
BRANCHES, HEADS, AUXILIARY = "branches", "heads", "auxiliary head"
_TENSORS_OF = {HEADS: ("decode_head.", "auxiliary_head."), AUXILIARY: ("auxiliary_head.",)}
_TENSORS_OF = {HEADS: ("decode_head.", "auxiliary_head."), AUXILIARY: ("auxiliary_head.",)}
_BACKBONE = "backbone."


def start_segmenter(
    model: Segmenter, weights: BeitWeights | SegmenterWeights, recipe: SegmentRecipe, classes: tuple[str, ...]
) -> list[str]:
    """Copy weights into a freshly initialised segmenter: the backbone, of a segmenter its branches, and its heads where
    they are for the same classes and of the same width.

    Args:
        model: of the recipe, for `classes`.
    Returns: the parts that keep their fresh values; why heads do is logged.
    Raises: UserError as `start_backbone`.
    """
    if isinstance(weights, BeitWeights):
        start_backbone(model.backbone, weights, recipe.model)
        return [BRANCHES, HEADS]
    check_sizes(weights, recipe.model)
    grid = model.backbone.table_grid
    tensors = {name: _for_grid(name, tensor, grid) for name, tensor in weights.tensors.items()}
    fault = "init.head is new" if recipe.init.head == "new" else _fault_of_heads(model, tensors, weights, classes)
    if fault:
        logger.warning("%s: its heads are left out, fresh ones are trained: %s", weights.source, fault)
    fresh = [HEADS] if fault else [] if takes_auxiliary(model, tensors) else [AUXILIARY]
    left_out = tuple(name for part in fresh for name in _TENSORS_OF[part])
    if not fault and weights.segmenter.taps != recipe.segmenter.taps:
        seen, wanted_taps = (", ".join(map(str, each.taps)) for each in (weights.segmenter, recipe.segmenter))
        logger.warning("%s: its heads saw blocks %s, the recipe's see %s", weights.source, seen, wanted_taps)
    wanted = model.state_dict()
    taken = {name: tensor for name, tensor in tensors.items() if name in wanted and not name.startswith(left_out)}
    model.load_state_dict(taken, strict=False)
    return fresh


def takes_auxiliary(model: Segmenter, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the model has no auxiliary head, or one that these tensors fit."""
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("auxiliary_head.")}
    return all(name in tensors and tensors[name].shape == tensor.shape for name, tensor in wanted.items())


def _for_grid(name: str, tensor: torch.Tensor, grid: int) -> torch.Tensor:
    """A tensor in the shape that images of grid x grid patches ask for."""
    if name.endswith("relative_position_bias_table"):
        return resize_bias_table(tensor, grid)
    return resize_places(tensor, grid) if name == _BACKBONE + PLACES else tensor


def _fault_of_heads(
    model: Segmenter, tensors: dict[str, torch.Tensor], weights: SegmenterWeights, classes: tuple[str, ...]
) -> str:
    """Why the decode head cannot be taken over; "" if it can."""
    try:
        check_classes(
            weights.source, weights.num_classes, weights.classes, classes, what="the image set", remedy="or go on so"
        )
    except UserError as error:
        return str(error).removeprefix(f"{weights.source}: ")
    wanted = model.decode_head.state_dict()
    name = next((name for name in wanted if tensors[f"decode_head.{name}"].shape != wanted[name].shape), None)
    if name is None:
        return ""
    return (
        f"its {name} has shape {tuple(tensors[f'decode_head.{name}'].shape)}, the recipe's {tuple(wanted[name].shape)} "
        "(segmenter.head_width)"
    )
