"""Draw the masked patches of an image: block masks and random masks, from an explicit generator."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from peco_ds.data.order import MASK, generator, uniform

# Attempts to place each block.
_TRIES = 10


def draw_masked(
    *,
    seed: int,
    epoch: int,
    sample: int,
    grid: int,
    kind: str,
    count: int,
    min_block: int,
    min_aspect: float,
    exact: bool = True,
) -> np.ndarray:
    """Masked positions of one image, as a pure function of (seed, epoch, sample).

    Args:
        grid: patches a side.
        kind: "block" or "random".
        count: patches masked.
        exact: False: of blocks at most `count` patches; see `block_mask`.
    Returns: int64 [M], increasing row-major patch numbers; M = count, or 1 <= M <= count for blocks that are not exact.
    """
    draw = generator(MASK, seed, epoch, sample)
    if kind == "random":
        return np.sort(draw.choice(grid * grid, count, replace=False)).astype(np.int64)
    return np.flatnonzero(block_mask(draw, grid, count, min_block, min_aspect, exact=exact)).astype(np.int64)


def block_mask(
    draw: np.random.Generator, grid: int, count: int, min_block: int, min_aspect: float, *, exact: bool = True
) -> np.ndarray:
    """Rectangles of patches until `count` are masked or ten tries add nothing, then filled up at random to exactly
    `count`.

    Args:
        exact: False: not filled up. Where no block fits at all one patch is masked, so that every image has something
            to predict.
    Returns: bool [grid, grid]; True = masked.
    Source: blocks as BEiT (arXiv 2106.08254, algorithm 1; released `masking_generator.py`): area uniform between
        `min_block` and what is missing, aspect log-uniform, sides strictly smaller than the grid, a block is taken if
        it adds at least one and at most the missing number of patches. The exact count is BEiT v2's: a fixed number of
        masked patches keeps shapes static.
    """
    # Bit r * grid + c is a patch: a whole block is counted in one step. With an array of patches the counting would
    # take most of the time.
    covered = 0
    missing = count
    while missing > 0:
        block = _draw_block(draw, covered, grid, missing, min_block, min_aspect)
        if block == 0:
            break
        missing -= (block & ~covered).bit_count()
        covered |= block
    bits = np.array(bytearray(covered.to_bytes(-(-grid * grid // 8), "little")))
    mask = np.unpackbits(bits, count=grid * grid, bitorder="little").astype(bool).reshape(grid, grid)
    if not exact:
        missing = 1 if missing == count else 0
    if missing > 0:
        visible = np.flatnonzero(~mask)
        mask.flat[draw.choice(visible, missing, replace=False)] = True
    assert 0 < mask.sum() <= count and (mask.sum() == count or not exact)
    return mask


def _draw_block(
    draw: np.random.Generator, covered: int, grid: int, missing: int, min_block: int, min_aspect: float
) -> int:
    """One more block, as bits; 0 if no try fitted."""
    log_aspect = math.log(1.0 / min_aspect)
    for _ in range(_TRIES):
        # Towards the end fewer patches are missing than the smallest block has; the reference then draws between the
        # two.
        area = uniform(draw, min(min_block, missing), max(min_block, missing))
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
