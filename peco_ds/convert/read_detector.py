"""Read a detector's release (`to_torchvision.py`) back into the canonical form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from peco_ds.config import DetectorSettings, ModelSettings
from peco_ds.convert.read import DIVERGED, json_of, named
from peco_ds.convert.release import CONFIG, WEIGHTS
from peco_ds.convert.to_torchvision import LAYOUT
from peco_ds.errors import UserError
from peco_ds.models.detector_weights import DetectorWeights
from peco_ds.models.mask_rcnn import build_detector
from peco_ds.models.vit import mlp_ratio_of
from peco_ds.models.vit_layouts import terms_beside
from peco_ds.models.weight_files import check_finite, count_of, read_tensor_file
from peco_ds.user_paths import released_path

_strict = ConfigDict(extra="forbid", strict=True)
# Bounds that no detector reaches, so that a damaged number builds no network that fills the memory.
Size = Annotated[int, Field(ge=1, le=1 << 16)]
Count = Annotated[int, Field(ge=0, le=1 << 10)]
Layers = Annotated[int, Field(ge=1, le=1 << 10)]
Three = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=3, max_length=3)]


@dataclass(frozen=True, config=_strict)
class _Backbone:
    patch_px: Size
    width: Size
    depth: Layers
    heads: Size
    hidden: Size
    table_grid: Size
    taps: list[Count]
    window: Count
    global_blocks: list[Count]
    layer_scale: bool
    absolute_positions: bool


@dataclass(frozen=True, config=_strict)
class _Pyramid:
    kind: Literal["branches", "simple"]
    channels: Size
    branch_norm: Literal["batch", "group"]


@dataclass(frozen=True, config=_strict)
class _Heads:
    norm: Literal["none", "layer", "batch"]
    rpn_convs: Layers
    box_convs: Count
    box_layers: Layers
    box_width: Size
    mask_convs: Layers
    detections: Size


@dataclass(frozen=True, config=_strict)
class _Category:
    id: int
    name: str


@dataclass(frozen=True, config=_strict)
class _Config:
    """What `to_torchvision.detector_config` writes."""

    layout: Literal["torchvision_detection"]
    backbone: _Backbone
    pyramid: _Pyramid
    heads: _Heads
    image_mean: Three
    image_std: Three
    short_px: Size
    long_px: Size
    square_px: Annotated[int, Field(ge=0, le=1 << 16)]
    categories: Annotated[list[_Category], Field(min_length=1)]


def is_detector_release(path: str | Path) -> bool:
    """Whether a path is a detector's release. A folder that cannot be read is none."""
    folder = released_path(path)
    try:
        return (folder / CONFIG).is_file() and json_of(folder / CONFIG).get("layout") == LAYOUT
    except (UserError, OSError):
        return False


def read_detector_release(path: str | Path) -> DetectorWeights:
    """float32 weights of a release folder.

    Raises: UserError if its config is not what `to_torchvision.py` writes, or a tensor is missing, left over, of
        another shape, or not finite.
    """
    folder = released_path(path)
    try:
        # As JSON: strict types of Python would ask for the dataclasses themselves.
        config = TypeAdapter(_Config).validate_json(json.dumps(json_of(folder / CONFIG)))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{folder / CONFIG}: {place}: {first['msg']}; fetch the folder again") from None
    source = named(folder / WEIGHTS, f"{folder.name}/{WEIGHTS}")
    tensors = read_tensor_file(folder / WEIGHTS)
    weights = DetectorWeights(
        _model_of(config),
        _detector_of(config),
        tensors,
        source,
        tuple(category.name for category in config.categories),
        tuple(category.id for category in config.categories),
        short_px=config.short_px,
        long_px=config.long_px,
        square_px=config.square_px,
        mean=tuple(config.image_mean),
        std=tuple(config.image_std),
        facts=terms_beside(folder),
    )
    _check_tensors(weights)
    check_finite(tensors, source, DIVERGED)
    return weights


def _model_of(config: _Config) -> ModelSettings:
    backbone = config.backbone
    return ModelSettings(
        image_px=backbone.table_grid * backbone.patch_px,
        patch_px=backbone.patch_px,
        width=backbone.width,
        depth=backbone.depth,
        heads=backbone.heads,
        mlp_ratio=mlp_ratio_of(backbone.width, backbone.hidden),
        # Of a trained network only whether there is one matters.
        layer_scale=0.1 if backbone.layer_scale else 0.0,
        drop_path=0.0,
        absolute_positions=backbone.absolute_positions,
    )


def _detector_of(config: _Config) -> DetectorSettings:
    return DetectorSettings(
        pyramid=config.pyramid.kind,
        taps=tuple(config.backbone.taps),
        window=config.backbone.window,
        global_blocks=tuple(config.backbone.global_blocks),
        branch_norm=config.pyramid.branch_norm,
        head_norm=config.heads.norm,
        channels=config.pyramid.channels,
        rpn_convs=config.heads.rpn_convs,
        box_convs=config.heads.box_convs,
        box_layers=config.heads.box_layers,
        box_width=config.heads.box_width,
        mask_convs=config.heads.mask_convs,
        detections=config.heads.detections,
    )


def _check_tensors(weights: DetectorWeights) -> None:
    """Raises: UserError if the tensors are not those of the network that the config describes."""
    model, detector, tensors = weights.model, weights.detector, weights.tensors
    blocks = count_of(tensors, "backbone.blocks.{}.norm1.weight", first=0)
    fault = ""
    if blocks != model.depth:
        fault = f"its config says depth {model.depth}, its tensors are of {blocks} blocks"
    elif model.width % model.heads:
        fault = f"its config says width {model.width} and {model.heads} heads, which do not divide it"
    elif list(detector.taps) != sorted(set(detector.taps)) or not detector.taps or detector.taps[-1] != blocks - 1:
        fault = f"its config says taps {list(detector.taps)}, and there are {blocks} blocks"
    if fault:
        raise UserError(f"{weights.source}: {fault}; fetch the folder again")
    with torch.device("meta"):
        wanted = build_detector(model, detector, len(weights.classes), square_px=weights.square_px).state_dict()
    for name in sorted(wanted.keys() ^ tensors.keys()):
        what = "is missing" if name in wanted else "has no place in the network that its config describes"
        raise UserError(f"{weights.source}: tensor {name[:80]} {what}; fetch the folder again")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            shapes = f"shape {tuple(tensors[name].shape)}, its config asks for {tuple(tensor.shape)}"
            raise UserError(f"{weights.source}: tensor {name} has {shapes}; fetch the folder again")
