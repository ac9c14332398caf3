"""FLOP of a detector (models/mask_rcnn.py) by closed formulas: two a multiplication and addition.

Letters: N patches, T tokens, D width, F hidden width, C channels of the pyramid.
"""

from __future__ import annotations

from dataclasses import replace

from peco_ds.config import DetectorSettings, DetectRecipe, ModelSettings
from peco_ds.costs import FLOPS_PER_MAC, FP32_BYTES, IMAGE_CHANNELS
from peco_ds.planner.shapes import ELEMENT_BYTES, relative_positions
from peco_ds.planner.work import Segment, Work, finetune_segments

# Values of a box and its anchors: an anchor's score and its four deltas, of three anchors a place.
_ANCHORS, _BOX = 3, 4
# Places of a pooled box and of a pooled mask.
_BOX_PLACES, _MASK_PLACES = 7 * 7, 14 * 14
_KERNEL = 9
# The published schedules' mean image after resizing to 800 / 1333 (COCO's usual 640 x 480).
MEAN_SHAPE = 800, 1088
# Of an image's proposals, so many are on objects.
POSITIVE_SHARE = 0.25


def image_shape(recipe: DetectRecipe) -> tuple[int, int]:
    """Height and width in px of the usual image of a training pass, filled up."""
    augment = recipe.augment
    if augment.kind == "scale_jitter":
        return augment.long_px, augment.long_px
    scale = augment.short_px / MEAN_SHAPE[0]
    height, width = (max(32, round(side * scale / 32) * 32) for side in MEAN_SHAPE)
    return min(height, recipe.model.image_px), min(width, recipe.model.image_px)


def forward_flops(
    model: ModelSettings,
    detector: DetectorSettings,
    num_classes: int,
    shape: tuple[int, int],
    *,
    rois: float | None = None,
    masks: float | None = None,
) -> dict[str, float]:
    """FLOP of one image's forward pass, by part.

    Args:
        num_classes: without the background.  shape: height and width in px, filled up.
        rois, masks: boxes and masks that pass the heads; None: those of training.
    """
    rois = detector.rois if rois is None else rois
    masks = detector.rois * POSITIVE_SHARE if masks is None else masks
    height, width = (side // model.patch_px for side in shape)
    channels, patches = detector.channels, height * width
    # Places of the five maps; the last two are rounded.
    coarse = (height // 2) * (width // 2)
    pooled = -(-(height // 2) // 2) * -(-(width // 2) // 2)
    levels = 16 * patches, 4 * patches, patches, coarse
    macs = {
        "backbone": _backbone(model, detector, height, width),
        "pyramid": _pyramid(model.width, detector, patches, levels),
        "proposals": (sum(levels) + pooled)
        * (detector.rpn_convs * _KERNEL * channels**2 + channels * _ANCHORS * (1 + _BOX)),
        "boxes": rois * _box_head(detector, num_classes + 1),
        "masks": masks
        * (
            _MASK_PLACES * (detector.mask_convs * _KERNEL * channels**2 + 4 * channels**2)
            + 4 * _MASK_PLACES * channels * (num_classes + 1)
        ),
    }
    return {name: FLOPS_PER_MAC * value for name, value in macs.items()}


def _backbone(model: ModelSettings, detector: DetectorSettings, height: int, width: int) -> float:
    side, wide, hidden = detector.window, model.width, int(model.width * model.mlp_ratio)
    patches = height * width
    tokens = patches + (0 if side else 1)
    embedding = patches * IMAGE_CHANNELS * model.patch_px**2 * wide
    whole = tokens * (4 * wide**2 + 2 * wide * hidden) + 2 * tokens**2 * wide
    if not side:
        return embedding + model.depth * whole
    inside = -(-height // side) * -(-width // side) * side**2
    window = inside * 3 * wide**2 + 2 * inside * side**2 * wide + tokens * (wide**2 + 2 * wide * hidden)
    blocks = len(detector.global_blocks)
    return embedding + blocks * whole + (model.depth - blocks) * window


def _pyramid(width: int, detector: DetectorSettings, patches: int, levels: tuple[int, ...]) -> float:
    channels = detector.channels
    smooth = sum(levels) * _KERNEL * channels**2
    if detector.pyramid == "branches":
        # Deconvolutions: of stride 4 two, of stride 8 one; each place of the input gives four.
        return (1 + 4 + 1) * patches * 4 * width**2 + sum(levels) * width * channels + smooth
    half, quarter = width // 2, width // 4
    deconvolutions = 2 * patches * 4 * width * half + 4 * patches * 4 * half * quarter
    into = sum(places * inside for places, inside in zip(levels, (quarter, half, width, width)))
    return deconvolutions + into * channels + smooth


def _box_head(detector: DetectorSettings, outputs: int) -> float:
    channels, wide = detector.channels, detector.box_width
    layers = _BOX_PLACES * channels * wide + (detector.box_layers - 1) * wide**2
    return detector.box_convs * _BOX_PLACES * _KERNEL * channels**2 + layers + wide * outputs * (1 + _BOX)


def training_flops(recipe: DetectRecipe, num_classes: int) -> float:
    """FLOP of one image, forward and backward; recomputation is not counted."""
    forward = sum(forward_flops(recipe.model, recipe.detector, num_classes, image_shape(recipe)).values())
    height, width = (side // recipe.model.patch_px for side in image_shape(recipe))
    # No gradient of the image itself.
    image = FLOPS_PER_MAC * height * width * IMAGE_CHANNELS * recipe.model.patch_px**2 * recipe.model.width
    return 3 * forward - image


# ------------------------------------------------------------------------------- as the planner counts


def usual_model(recipe: DetectRecipe) -> ModelSettings:
    """The backbone at a square of about as many patches as the usual image has."""
    height, width = (side // recipe.model.patch_px for side in image_shape(recipe))
    return replace(recipe.model, image_px=round((height * width) ** 0.5) * recipe.model.patch_px)


def detect_segments(recipe: DetectRecipe, num_classes: int) -> tuple[Segment, ...]:
    """Embedding and blocks of the usual image; pyramid, proposal head, box head, mask head."""
    flops = forward_flops(recipe.model, recipe.detector, num_classes, image_shape(recipe))
    # Of embedding and blocks, in proportion to what square images without windows would cost.
    square = finetune_segments(replace(recipe, model=usual_model(recipe)), num_classes)[:-1]
    share = flops.pop("backbone") / sum(segment.forward.flops for segment in square)
    table = relative_positions(recipe.model.grid) - relative_positions(usual_model(recipe).grid)
    backbone = [
        replace(
            segment,
            forward=segment.forward.times(share),
            backward=segment.backward.times(share),
            recomputed=segment.recomputed.times(share),
            parameters=segment.parameters + (0 if number == 0 else table * recipe.model.heads),
        )
        for number, segment in enumerate(square)
    ]
    heads = [
        Segment(name, parameters, _TENSORS[name], Work(convolutions=flops[name]), Work(convolutions=2 * flops[name]))
        for name, parameters in head_parameters(recipe, num_classes).items()
    ]
    return (*backbone, *heads)


# About so many trained tensors.
_TENSORS = {"pyramid": 24, "proposals": 6, "boxes": 8, "masks": 14}


def head_parameters(recipe: DetectRecipe, num_classes: int) -> dict[str, int]:
    """Trained parameters beside the backbone, norms and biases left out: a thousandth of them."""
    settings, width = recipe.detector, recipe.model.width
    channels, outputs = settings.channels, num_classes + 1
    if settings.pyramid == "branches":
        pyramid = 3 * 4 * width**2 + 4 * width * channels + 4 * _KERNEL * channels**2
    else:
        half, quarter = width // 2, width // 4
        pyramid = 4 * (2 * width * half + half * quarter) + (quarter + half + 2 * width) * channels
        pyramid += 4 * _KERNEL * channels**2
    boxes = settings.box_convs * _KERNEL * channels**2 + _BOX_PLACES * channels * settings.box_width
    boxes += (settings.box_layers - 1) * settings.box_width**2 + settings.box_width * outputs * (1 + _BOX)
    return {
        "pyramid": pyramid,
        "proposals": settings.rpn_convs * _KERNEL * channels**2 + channels * _ANCHORS * (1 + _BOX),
        "boxes": boxes,
        "masks": settings.mask_convs * _KERNEL * channels**2 + 4 * channels**2 + channels * outputs,
    }


def head_bytes(recipe: DetectRecipe) -> float:
    """Device memory of one image's pyramid and heads between forward and backward pass.

    Maps leave the pyramid and every head in 32 bits; a unit keeps the input of its convolution and of its ReLU.
    """
    settings, shape = recipe.detector, image_shape(recipe)
    patches = shape[0] * shape[1] // recipe.model.patch_px**2
    places = (16 + 4 + 1 + 0.25) * patches
    element = ELEMENT_BYTES[recipe.run.precision]
    maps = places * settings.channels * ((4 + 2 * settings.rpn_convs) * element + 2 * FP32_BYTES)
    branches = 24 * patches * recipe.model.width * element
    boxes = settings.rois * _BOX_PLACES * settings.channels * (FP32_BYTES + 2 * element * (1 + settings.box_convs))
    masks = settings.rois * POSITIVE_SHARE * settings.channels * _MASK_PLACES
    return maps + branches + boxes + masks * (FP32_BYTES + 2 * element * (settings.mask_convs + 4))
