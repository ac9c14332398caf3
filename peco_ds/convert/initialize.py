"""Build models from canonical weights: a classifier to fine-tune, a backbone to probe, a classifier to evaluate."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Literal

import torch
from timm.layers import resample_patch_embed
from timm.models.beit import Beit

from peco_ds.config import ClassifierSettings, ModelSettings
from peco_ds.convert.resample import resize_bias_table, resize_places
from peco_ds.errors import UserError
from peco_ds.models.beit_weights import PLACES, SHARED_TABLE, TABLE, BeitWeights
from peco_ds.models.classifier import Classifier, build_classifier
from peco_ds.models.dense_backbone import DenseBackbone
from peco_ds.models.segmenter_weights import SegmenterWeights
from peco_ds.models.vit import timm_arguments
from peco_ds.models.window_backbone import WindowBackbone, WindowBlock

logger = logging.getLogger("peco_ds")

_SYNSET = re.compile(r"n\d{8}")
_OF_PRETRAINING = ("mask_token", "lm_head.weight", "lm_head.bias", SHARED_TABLE)
_POOLING_NORM = ("fc_norm.weight", "fc_norm.bias")
_KERNEL = "patch_embed.proj.weight"
_HEAD = ("head.weight", "head.bias")
_FINAL_NORM = ("norm.weight", "norm.bias")


def start_classifier(
    model: Classifier,
    weights: BeitWeights,
    settings: ModelSettings,
    *,
    classes: tuple[str, ...],
    head: Literal["auto", "new"],
) -> list[str]:
    """Copy weights into a freshly initialised classifier.

    A bias table that blocks shared is copied into every block; a table of another grid is resized. Tensors that only
    pre-training needs are left out.

    Args:
        settings: of `model`.  classes: of the images, in label order.  head: see `InitSettings.head`.
    Returns: names of the parameters that keep their fresh values.
    Raises: UserError if width, depth, heads or patch size differ, or a classifier that is to be kept has other classes.
    """
    check_sizes(weights, settings)
    tensors = per_block(weights, settings.grid)
    if weights.kind == "classifier" and head == "auto":
        check_head(weights, classes)
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in _HEAD}
    wanted = model.state_dict()
    taken = {name: tensor for name, tensor in tensors.items() if name in wanted}
    fresh = sorted(wanted.keys() - taken.keys())
    strange = tensors.keys() - taken.keys() - {*_FINAL_NORM, *_POOLING_NORM}
    assert not strange and set(fresh) <= {*_POOLING_NORM, *_FINAL_NORM, *_HEAD}, (strange, fresh)
    model.load_state_dict(taken, strict=False)
    return fresh


def start_backbone(backbone: DenseBackbone, weights: BeitWeights, settings: ModelSettings) -> None:
    """Copy weights into the backbone of a dense model, whichever kind they are; norms and heads are left out.

    A bias table that blocks shared is copied into every block; a table of another grid is resized.

    Args:
        settings: of `backbone`.
    Raises: UserError if width, depth, heads or patch size differ.
    """
    check_sizes(weights, settings)
    left_out = {*_FINAL_NORM, *_POOLING_NORM, *_HEAD}
    tensors = {
        name: tensor.float() for name, tensor in per_block(weights, backbone.table_grid).items() if name not in left_out
    }
    backbone.load_state_dict(tensors)


def classifier_of(weights: BeitWeights, image_px: int | None = None) -> Classifier:
    """A fine-tuned classifier in eval mode, float32, for images of `image_px` (None: those it was trained on).

    Raises: UserError if the weights have no classifier.
    """
    if weights.kind != "classifier":
        raise UserError(
            f"{weights.source}: has no classifier (kind {weights.kind}); fine-tune it with finetune.py, "
            "or probe its features with linear_probe.py"
        )
    settings = replace(weights.model, image_px=image_px or weights.model.image_px, drop_path=0.0)
    model = build_classifier(settings, ClassifierSettings(pooling=weights.pooling), weights.num_classes)
    model.load_state_dict({name: tensor.float() for name, tensor in per_block(weights, settings.grid).items()})
    return model.eval()


def feature_backbone(weights: BeitWeights, image_px: int) -> Beit:
    """The frozen backbone without head, float32, for images of `image_px`.

    Its `norm` is the final norm of pre-training. A classifier's weights have none and leave it at identity scale, so
    take features before it.
    """
    settings = replace(weights.model, image_px=image_px, drop_path=0.0)
    if image_px % settings.patch_px:
        raise UserError(
            f"images of {image_px} px: not a multiple of the patch size {settings.patch_px} of {weights.source}"
        )
    model = Beit(**timm_arguments(settings, shared_bias=False))
    tensors = {
        name: tensor.float()
        for name, tensor in per_block(weights, settings.grid).items()
        if name not in (*_POOLING_NORM, *_HEAD)
    }
    missing, strange = model.load_state_dict(tensors, strict=False)
    assert not strange and set(missing) <= set(_FINAL_NORM), (missing, strange)
    return model.eval().requires_grad_(False)


def start_detector(
    backbone: DenseBackbone, weights: BeitWeights, settings: ModelSettings, *, resample_patch: bool = False
) -> None:
    """Copy weights into the backbone of a detector, whichever kind they are, as `start_backbone`.

    Windowed blocks get the tables of their windows, and no class token is copied where the backbone has none.

    Args:
        resample_patch: weights of another patch size are taken: their kernel is resized.
    Raises: UserError as `check_sizes`.
    """
    if resample_patch and weights.model.patch_px != settings.patch_px:
        weights = _with_patches_of(weights, settings.patch_px)
    if not isinstance(backbone, WindowBackbone):
        start_backbone(backbone, weights, settings)
        return
    check_sizes(weights, settings)
    left_out = {*_FINAL_NORM, *_POOLING_NORM, *_HEAD, "cls_token"}
    tensors = {
        name: tensor.float() for name, tensor in per_block(weights, settings.grid).items() if name not in left_out
    }
    for number, block in enumerate(backbone.blocks):
        if isinstance(block, WindowBlock):
            table = weights.tensors.get(TABLE.format(number), weights.tensors.get(SHARED_TABLE))
            tensors[TABLE.format(number)] = resize_bias_table(table, block.window).float()
    backbone.load_state_dict(tensors)


def _with_patches_of(weights: BeitWeights, patch_px: int) -> BeitWeights:
    """The same weights for patches of another size and images of the same grid.

    The kernel is resized so that the resized patch gives the same token as far as it can (pseudo-inverse of the
    resizing; FlexiViT, arXiv 2212.08013).
    """
    kernel = resample_patch_embed(weights.tensors[_KERNEL].float(), [patch_px, patch_px])
    model = replace(weights.model, patch_px=patch_px, image_px=weights.model.grid * patch_px)
    return replace(weights, model=model, tensors=weights.tensors | {_KERNEL: kernel})


def check_head(weights: BeitWeights, classes: tuple[str, ...]) -> None:
    """Raises: UserError if a classifier's head, which is to be kept, cannot be the images'."""
    check_classes(
        weights.source,
        weights.num_classes,
        weights.classes,
        classes,
        what="the image set",
        remedy="or set init.head=new",
    )


def check_classes(
    source: str, num_classes: int, names: tuple[str, ...] | None, classes: tuple[str, ...], *, what: str, remedy: str
) -> None:
    """Whether a head can be that of a labelled set.

    Names that may only spell the classes differently (synsets, words) are let through with a warning.

    Args:
        num_classes, names: of the head; names None where they are not known.
        classes: of the set.
        what, remedy: parts of the message.
    Raises: UserError if the numbers differ, the same names stand in another order, or both name synsets and not the
        same ones.
    """
    if num_classes != len(classes):
        raise UserError(
            f"{source}: its head has {num_classes} classes, {what} has {len(classes)}; give images of "
            f"the classes it was trained for, {remedy}"
        )
    if names is None or names == classes:
        return
    number = next(i for i, (head, image) in enumerate(zip(names, classes)) if head != image)
    differs = f"{source}: class {number} of its head is {names[number]!r}, of {what} {classes[number]!r}"
    if sorted(names) == sorted(classes) or all(_SYNSET.fullmatch(name) for name in (*names, *classes)):
        raise UserError(f"{differs}; give images of its classes in the head's order, {remedy}")
    logger.warning("%s; they are taken for two spellings of the same classes, in the same order", differs)


def check_sizes(weights: BeitWeights | SegmenterWeights, settings: ModelSettings) -> None:
    """Raises: UserError naming the sizes in which the weights and the recipe's model differ; image size may."""
    names = [
        name
        for name in ("patch_px", "width", "depth", "heads", "mlp_ratio", "absolute_positions")
        if getattr(weights.model, name) != getattr(settings, name)
    ]
    if names:
        found, asked = (
            ", ".join(f"{name} {getattr(model, name)}" for name in names) for model in (weights.model, settings)
        )
        remedy = " ".join(f"model.{name}={str(getattr(weights.model, name)).lower()}" for name in names)
        raise UserError(
            f"{weights.source}: {found}, but the recipe's model has {asked}; take the recipe of that "
            f"size, or set {remedy}"
        )


def per_block(weights: BeitWeights, grid: int) -> dict[str, torch.Tensor]:
    """Tensors of a model with a bias table in every block, for a grid x grid image.

    Tensors that only pre-training needs are left out; vectors of places are resized with the tables.
    """
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in _OF_PRETRAINING}
    for block in range(weights.model.depth):
        table = weights.tensors.get(TABLE.format(block), weights.tensors.get(SHARED_TABLE))
        tensors[TABLE.format(block)] = table if grid == weights.model.grid else resize_bias_table(table, grid)
    if PLACES in tensors:
        tensors[PLACES] = resize_places(tensors[PLACES], grid)
    return tensors
