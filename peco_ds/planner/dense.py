"""What segmentation adds to a backbone: the convolutions of branches and heads, layer by layer.

Letters: D width of the backbone, g patches a side, C channels of the decode head, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from peco_ds.config import SegmentRecipe
from peco_ds.costs import FLOPS_PER_MAC, FP32_BYTES
from peco_ds.planner.shapes import ELEMENT_BYTES
from peco_ds.planner.work import Segment, Work, _trained, finetune_segments

# Sides that pyramid pooling averages the coarsest map to (`models/uper_head.py`).
POOL_SCALES = (1, 2, 3, 6)


@dataclass(frozen=True)
class Conv:
    """A convolution, or a transposed one of kernel 2 and stride 2, with what stands behind it."""

    channels_in: int
    channels: int
    kernel: int
    # Places of its output.
    places: int
    transposed: bool = False
    # With batch norm and no bias of its own; else with a bias.
    normed: bool = True

    @property
    def macs(self) -> int:
        # Each place of a transposed one's output has one weight's sum of all channels.
        weights = 1 if self.transposed else self.kernel**2
        return self.channels_in * self.channels * weights * self.places

    @property
    def elements(self) -> tuple[int, ...]:
        weight = self.channels_in * self.channels * self.kernel**2
        return (weight, self.channels, self.channels) if self.normed else (weight, self.channels)


def branches(recipe: SegmentRecipe) -> tuple[Conv, ...]:
    width, patches = recipe.model.width, recipe.model.grid**2
    doubled = dict(transposed=True)
    return (
        Conv(width, width, 2, 4 * patches, **doubled, normed=False),
        Conv(width, width, 2, 16 * patches, **doubled, normed=False),
        Conv(width, width, 2, 4 * patches, **doubled, normed=False),
    )


def decode_head(recipe: SegmentRecipe, num_classes: int) -> tuple[Conv, ...]:
    width, patches = recipe.model.width, recipe.model.grid**2
    inner = recipe.segmenter.head_width or width
    finest, coarsest = 16 * patches, patches // 4
    pooled = tuple(Conv(width, inner, 1, side**2) for side in POOL_SCALES)
    laterals = tuple(Conv(width, inner, 1, places) for places in (finest, 4 * patches, patches))
    outputs = tuple(Conv(inner, inner, 3, places) for places in (finest, 4 * patches, patches))
    return (
        *pooled,
        Conv(width + len(POOL_SCALES) * inner, inner, 3, coarsest),
        *laterals,
        *outputs,
        Conv(4 * inner, inner, 3, finest),
        Conv(inner, num_classes, 1, finest, normed=False),
    )


def auxiliary_head(recipe: SegmentRecipe, num_classes: int) -> tuple[Conv, ...]:
    if not recipe.segmenter.auxiliary_weight:
        return ()
    inner, patches = recipe.segmenter.auxiliary_width, recipe.model.grid**2
    return (
        Conv(recipe.model.width, inner, 3, patches),
        Conv(inner, num_classes, 1, patches, normed=False),
    )


def segment_segments(recipe: SegmentRecipe, num_classes: int) -> tuple[Segment, ...]:
    """Embedding and blocks as of a classifier; branches, decode head with loss, auxiliary head with loss."""
    backbone = finetune_segments(recipe, num_classes)[:-1]
    parts = {
        "branches": (*branches(recipe), Conv(0, recipe.model.width, 1, 4 * recipe.model.grid**2)),
        "decode head": decode_head(recipe, num_classes),
        "auxiliary head": auxiliary_head(recipe, num_classes),
    }
    labels = recipe.model.image_px**2 * num_classes * FP32_BYTES
    return (*backbone, *(_conv_segment(name, layers, recipe, labels) for name, layers in parts.items() if layers))


def _conv_segment(name: str, layers: tuple[Conv, ...], recipe: SegmentRecipe, labels: int) -> Segment:
    element = ELEMENT_BYTES[recipe.run.precision]
    flops = FLOPS_PER_MAC * sum(layer.macs for layer in layers)
    maps = sum(layer.channels * layer.places for layer in layers)
    # Batch norm reads in two passes and writes, ReLU reads and writes; resized maps are written, read, written again.
    moved, back = 8 * maps * element, 14 * maps * element
    if name != "branches":
        # Logits at the labels' size: resized, log-softmax, arg max; the same gradients.
        moved, back = moved + 5 * labels, back + 4 * labels
    elements = tuple(count for layer in layers for count in layer.elements if count)
    kernels = 12 * len(layers)
    return _trained(
        name,
        elements,
        element,
        Work(convolutions=flops, moved_bytes=moved, kernels=kernels),
        Work(convolutions=2 * flops, moved_bytes=back, kernels=2 * kernels),
    )


def segment_activation_bytes(recipe: SegmentRecipe, num_classes: int) -> float:
    """Device memory of one image's branches and heads between forward and backward pass.

    A unit keeps the input of its convolution, of its norm and of its ReLU; a loss its logits at the labels' size and
    their log-probabilities, and for a moment their gradient, in 32 bits.
    """
    element = ELEMENT_BYTES[recipe.run.precision]
    heads = decode_head(recipe, num_classes), auxiliary_head(recipe, num_classes)
    maps = sum(3 * layer.channels * layer.places for layers in (branches(recipe), *heads) for layer in layers)
    # The four maps side by side, before the last 3 x 3 convolution.
    fused = 4 * (recipe.segmenter.head_width or recipe.model.width) * 16 * recipe.model.grid**2
    losses = 3 * num_classes * recipe.model.image_px**2 * FP32_BYTES * (2 if heads[1] else 1)
    return (maps + fused) * element + losses


def segment_parameters(recipe: SegmentRecipe, num_classes: int) -> int:
    """Trained parameters."""
    return sum(segment.parameters for segment in segment_segments(recipe, num_classes))
