"""What attention computes and moves on a GPU, by its form (`models/attention.py`): whole tiles, whatever lies in them.

A kernel multiplies tiles of rows, keys and columns of a head. Where T is just above a multiple of a tile, or a head
dimension no tile's width, most of a last tile is nothing.

Letters: T tokens, H heads, D head dimension, E bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peco_ds.config import AttentionForm
from peco_ds.costs import FLOPS_PER_MAC, FP32_BYTES

# `fused`: a kernel for attention without a learned bias, counted without tiles.
Form = Literal["fused", "triton", "unfused", "efficient"]

# In models/attention.py, rows of the bias start at multiples of it, in elements.
ALIGNMENT = 16
# In models/attention_unfused.py, what rows are padded to a multiple of.
UNFUSED_MULTIPLE = 8
# In models/attention_kernels.py.
TRITON_TILE, TRITON_SMALLEST = 64, 16
# Products of T x T: query and key, weights and value. Backward: the scores again, the gradients of weights, query, key
# and value. The unfused form has kept the weights.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
# Tiles a second of the Triton kernels over those of the memory-efficient ones. Assumed: these are written for Ampere's
# instructions and share 128 x 128 tiles among few multiprocessors; nothing was measured on a GPU.
TRITON_PACE = 1.6


def form_of(asked: AttentionForm) -> Form:
    """The form that a plan counts: the recipe's. auto: triton, which is predicted to be the fastest."""
    return "triton" if asked == "auto" else asked


@dataclass(frozen=True)
class AttentionCost:
    """One image's attention in one direction."""

    # FLOP of the tiles that attention kernels compute, at the pace of the memory-efficient ones.
    tiles: float = 0.0
    # FLOP of batched products, with what pads them.
    batched: float = 0.0
    # Bytes read and written beside the operands that kernels load while they multiply, and the kernels that move them.
    moved_bytes: float = 0.0
    kernels: float = 0.0


def attention_cost(
    form: Form, tokens: int, heads: int, dim: int, element: int, *, biased: bool = True
) -> tuple[AttentionCost, AttentionCost]:
    """Forward and backward of one image.

    Args:
        dim: D.  element: E.  biased: with a bias that all images share and that learns.
    """
    row = tokens * heads * dim * element
    if form == "fused":
        useful = float(FLOPS_PER_MAC * heads * tokens**2 * dim)
        # Gradients of query, key and value copied together.
        copied = AttentionCost(BACKWARD_PRODUCTS * useful, moved_bytes=6 * row, kernels=3)
        return AttentionCost(FORWARD_PRODUCTS * useful), copied
    if form == "unfused":
        return _unfused(tokens, heads, dim, element)
    sizes = _triton_tiles if form == "triton" else _efficient_tiles
    forward, backward = (
        FLOPS_PER_MAC * heads * rows * keys * columns
        for rows, keys, columns in (sizes(tokens, dim, backward=False), sizes(tokens, dim, backward=True))
    )
    scores, pace = score_gradient_bytes(form, tokens, heads, element), TRITON_PACE if form == "triton" else 1.0
    if form == "triton":
        # The product of output and gradient, rows of it; the scores' gradient written, read for that of the query, read
        # for that of the bias.
        moved, kernels = 2 * row + 3 * scores, 5
    elif biased:
        # The scores' gradient of each image, written, and read for the sum.
        moved, kernels = 2 * scores, 3
    else:
        moved, kernels = 6 * row, 3
    return (
        AttentionCost(FORWARD_PRODUCTS * forward / pace),
        AttentionCost(BACKWARD_PRODUCTS * backward / pace, moved_bytes=moved, kernels=kernels),
    )


def score_gradient_bytes(form: Form, tokens: int, heads: int, element: int) -> int:
    """Bytes of one image's gradient of the scores, which a backward pass holds for all its images; unfused: twice."""
    if form == "fused":
        return 0
    if form == "unfused":
        return 2 * unfused_weight_bytes(tokens, heads, element)
    return heads * tokens * aligned(tokens) * element


def unfused_weight_bytes(tokens: int, heads: int, element: int) -> int:
    """Bytes of one image's weights, which the unfused form keeps for the backward pass."""
    return heads * _up(tokens, UNFUSED_MULTIPLE) ** 2 * element


def aligned(tokens: int) -> int:
    return _up(tokens, ALIGNMENT)


def bias_sum_bytes(tokens: int, heads: int) -> int:
    """Bytes moved once a pass for the bias's gradient: the float32 sum over the images, read and written."""
    return 2 * FP32_BYTES * heads * tokens**2


def _triton_tiles(tokens: int, dim: int, *, backward: bool) -> tuple[int, int, int]:
    """Rows, keys and columns: whole tiles, and one for the rest whose side is a power of two."""
    rest = tokens % TRITON_TILE
    side = tokens - rest + (_power_of_two(rest) if rest else 0)
    main = max(TRITON_SMALLEST, 2 ** (dim.bit_length() - 1))
    columns = main + (_power_of_two(dim - main) if dim > main else 0)
    return side, side, columns


def _efficient_tiles(tokens: int, dim: int, *, backward: bool) -> tuple[int, int, int]:
    """Of PyTorch's memory-efficient kernels on compute capability 8.0 and above (read in its sources): tiles of 64 for
    heads of up to 64, else of 128 columns with 128 keys, and backward 128 rows.
    """
    if dim <= 64:
        return _up(tokens, 64), _up(tokens, 64), 64
    return _up(tokens, 128 if backward else 64), _up(tokens, 128), _up(dim, 128)


def _unfused(tokens: int, heads: int, dim: int, element: int) -> tuple[AttentionCost, AttentionCost]:
    """Batched products of few columns wait for memory as much as they multiply: their operands of T x T count."""
    product = FLOPS_PER_MAC * heads * _up(tokens, UNFUSED_MULTIPLE) ** 2 * dim
    weights, row = unfused_weight_bytes(tokens, heads, element), tokens * heads * dim * element
    # Query, key and value padded: zeros, read, written; the scores written, read, the weights written and read; the
    # output turned.
    forward = AttentionCost(batched=2 * product, moved_bytes=(3 + 6 + 2) * row + 4 * weights, kernels=6)
    # All four padded; the weights' gradient written, read with the weights, the scores' written and read for the sum
    # and two products, the weights read for the value's; three gradients turned.
    backward = AttentionCost(batched=4 * product, moved_bytes=(12 + 6) * row + 8 * weights, kernels=14)
    return forward, backward


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _power_of_two(size: int) -> int:
    return max(TRITON_SMALLEST, 2 ** (size - 1).bit_length())
