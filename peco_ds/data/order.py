"""The order of samples, a pure function (seed, epoch, position) -> sample, and the cursor that marks a place in it.

Every epoch permutes the shards, groups them into windows, and permutes the samples inside each window, so that reading
stays local to a few tars while batches mix many. Positions count on across epochs: position p is sample p mod n of
epoch p div n. The result does not depend on which rank, worker or micro-batch asks, so 1, 2 or 512 ranks see the same
global batches in the same order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from peco_ds.config import RunSettings
from peco_ds.errors import UserError

# First word of every seed sequence, so that no two uses of one seed share a stream.
SHARDS, WINDOW, VIEW, MASK, VIEW_CYCLE, AUGMENT, MIX, OBJECTS = range(8)


def generator(*words: int) -> np.random.Generator:
    """A generator that is a pure function of its words (non-negative integers)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def uniform(draw: np.random.Generator, low: float, high: float) -> float:
    """What `draw.uniform(low, high)` gives for two numbers, without its checks for arrays, which take longer than a
    mask's arithmetic.
    """
    return low + (high - low) * draw.random()


@dataclass(frozen=True)
class Cursor:
    """Where a run stands in its data; holds for any number of ranks, workers and any micro-batch.

    `samples` counts what was trained on over all ranks, not what was prefetched.
    """

    # The fingerprint of the image set: another set has another order.
    fingerprint: str
    seed: int
    samples: int

    def check(self, fingerprint: str, seed: int) -> None:
        """Raises: UserError if the order this cursor points into is not the one at hand."""
        if fingerprint != self.fingerprint:
            raise UserError(
                f"checkpoint was trained on image set {self.fingerprint[:12]}, this run reads "
                f"{fingerprint[:12]}; resume with the same images or start a new --out"
            )
        if seed != self.seed:
            raise UserError(
                f"checkpoint was trained with run.seed {self.seed}, this run has {seed}; resume with the same "
                "seed or start a new --out"
            )


class _Window(NamedTuple):
    """The samples of a few shards in their order.

    Places are permuted, not samples: in place and in 32 bits, which takes a quarter of the memory.
    """

    # [n], a permutation of 0 .. n - 1, counted through the shards as they were drawn
    places: np.ndarray
    # Where each shard ends, in these places.
    ends: list[int]
    # For each shard, global sample number minus place.
    shifts: list[int]


class SampleOrder:
    """The order of a whole run over a set of shards.

    Args:
        shard_sizes: [S] samples in each shard.
        seed: of the run.
        window_shards: permuted shards whose samples are mixed.
        repeats: r > 1 is repeated augmentation (arXiv 1902.05509; DeiT has 3): an epoch keeps its length n, and shows
            each of the first ceil(n / r) samples of its permutation r times in a row.
    """

    def __init__(self, shard_sizes: np.ndarray, seed: int, window_shards: int, repeats: int = 1) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self.num_samples = int(self._starts[-1])
        if self.num_samples == 0:
            raise UserError("the set of shards holds no sample")
        self._seed = seed
        self._window_shards = max(1, window_shards)
        self._repeats = repeats
        # Bounded: positions are asked for in turn, and a window may be as large as the set.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=2)(self._make_window)

    # The caches are not sent to loader processes.
    def __reduce__(self):
        return SampleOrder, (self._sizes, self._seed, self._window_shards, self._repeats)

    def epoch_of(self, position: int) -> int:
        return position // self.num_samples

    def repeat_of(self, position: int) -> int:
        """Which showing of its sample in this epoch a position is, counted from 0."""
        return position % self.num_samples % self._repeats

    def sample_at(self, position: int) -> int:
        """Global sample number at a position of the run; 0 <= result < num_samples."""
        epoch, place = divmod(position, self.num_samples)
        place //= self._repeats
        _, window_starts = self._epoch(epoch)
        window = bisect_right(window_starts, place) - 1
        places, ends, shifts = self._window(epoch, window)
        shuffled = int(places[place - window_starts[window]])
        return shuffled + shifts[bisect_right(ends, shuffled)]

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        shards = generator(SHARDS, self._seed, epoch).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[shards])
        starts = np.concatenate([[0], ends])[: len(shards) : self._window_shards]
        return shards, starts.tolist()

    def _make_window(self, epoch: int, window: int) -> _Window:
        shards, _ = self._epoch(epoch)
        chosen = shards[window * self._window_shards : (window + 1) * self._window_shards]
        ends = np.cumsum(self._sizes[chosen])
        places = np.arange(ends[-1], dtype=np.uint32 if ends[-1] < 1 << 32 else np.int64)
        # The permutation depends on the number of places, not on their type.
        generator(WINDOW, self._seed, epoch, window).shuffle(places)
        return _Window(places, ends.tolist(), (self._starts[chosen + 1] - ends).tolist())


def view_at(seed: int, epoch: int, sample: int, num_views: int) -> int:
    """Which recorded view of a sample an epoch uses.

    Each sample walks its K views in its own order, a new one for every K epochs: no view repeats before all were seen.
    """
    if num_views == 1:
        return 0
    cycle, place = divmod(epoch, num_views)
    return int(generator(VIEW_CYCLE, seed, sample, cycle).permutation(num_views)[place])


def rank_positions(
    run: RunSettings, rank: int, world_size: int, *, first_step: int, last_step: int
) -> Iterator[np.ndarray]:
    """The positions of each forward pass of one rank, step after step: arrays of run.micro_batch.

    Micro-step m of rank r takes the m * world_size + r -th slice of the global batch, so the union over ranks and
    micro-steps of one optimiser step is positions [step * global_batch, (step + 1) * global_batch) however it is
    divided.
    """
    slices = run.global_batch // run.micro_batch
    for step in range(first_step, last_step):
        for slice_number in range(rank, slices, world_size):
            start = step * run.global_batch + slice_number * run.micro_batch
            yield np.arange(start, start + run.micro_batch)
