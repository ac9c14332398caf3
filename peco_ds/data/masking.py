"""Draw the masked patches of an image: block masks and random masks, from an explicit generator."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from peco_ds.config import MaskSettings
from peco_ds.data.order import MASK, generator, uniform

# Attempts to place each block.
_TRIES = 10


def draw_masked(mask: MaskSettings, grid: int, *, seed: int, epoch: int, sample: int) -> np.ndarray:
    """Masked positions of one image, as a pure function of (seed, epoch, sample).

    Args:
        grid: patches a side.
    Returns: int64 [M], increasing row-major patch numbers. M is mask.count, or 1 <= M <= mask.count for blocks that are
        not exact (`block_mask`).
    """
    draw = generator(MASK, seed, epoch, sample)
    if mask.kind == "random":
        return np.sort(draw.choice(grid * grid, mask.count, replace=False)).astype(np.int64)
    return np.flatnonzero(block_mask(draw, mask, grid)).astype(np.int64)


def block_mask(draw: np.random.Generator, mask: MaskSettings, grid: int) -> np.ndarray:
    """Rectangles of patches until `mask.count` are masked or ten tries add nothing, then filled up at random to exactly
    `mask.count`.

    Where `mask.exact` is false it is not filled up; where no block fits at all one patch is masked, so that every image
    has something to predict.

    Returns: bool [grid, grid]; True = masked.
    Source: blocks as BEiT (arXiv 2106.08254, algorithm 1; released `masking_generator.py`): area uniform between
        `min_block` and what is missing, aspect log-uniform, sides strictly smaller than the grid, a block is taken if
        it adds at least one and at most the missing number of patches. The exact count is BEiT v2's: a fixed number of
        masked patches keeps shapes static.
    """
    # Bit r * grid + c is a patch: a whole block is counted in one step. With an array of patches the counting would
    # take most of the time.
    covered = 0
    missing = mask.count
    while missing > 0:
        block = _draw_block(draw, mask, covered, grid, missing)
        if block == 0:
            break
        missing -= (block & ~covered).bit_count()
        covered |= block
    bits = np.array(bytearray(covered.to_bytes(-(-grid * grid // 8), "little")))
    masked = np.unpackbits(bits, count=grid * grid, bitorder="little").astype(bool).reshape(grid, grid)
    if not mask.exact:
        missing = 1 if missing == mask.count else 0
    if missing > 0:
        visible = np.flatnonzero(~masked)
        masked.flat[draw.choice(visible, missing, replace=False)] = True
    assert 0 < masked.sum() <= mask.count and (masked.sum() == mask.count or not mask.exact)
    return masked


def _draw_block(draw: np.random.Generator, mask: MaskSettings, covered: int, grid: int, missing: int) -> int:
    """One more block, as bits; 0 if no try fitted."""
    log_aspect = math.log(1.0 / mask.min_aspect)
    for _ in range(_TRIES):
        # Towards the end fewer patches are missing than the smallest block has; the reference then draws between the
        # two.
        area = uniform(draw, min(mask.min_block, missing), max(mask.min_block, missing))
        aspect = math.exp(uniform(draw, -log_aspect, log_aspect))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < grid and 0 < width < grid):
            continue
        top, left = int(draw.integers(grid - height + 1)), int(draw.integers(grid - width + 1))
        block = _rectangle(grid, height, width) << (top * grid + left)
        if 0 < (block & ~covered).bit_count() <= missing:
            return block
    return 0


@lru_cache(maxsize=1024)
def _rectangle(grid: int, height: int, width: int) -> int:
    """Bits of a block in the first corner."""
    return sum(((1 << width) - 1) << (row * grid) for row in range(height))
