"""Find out whether what a run goes on from is finite: weights, optimiser state, moving average, codebook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from peco_ds.models.weight_files import is_finite
from peco_ds.runtime.ema import WeightEma, local_masters


def part_not_finite(engine, ema: WeightEma | None = None) -> str:
    """The part of this rank's training state that holds NaN or infinity, in words; "" if none does.

    A step with such a loss or gradient is skipped, but a finite gradient can still carry a weight out of range, and
    what an optimiser remembers of it stays. Reads every value once, from where it lies; what is on NVMe is passed over.
    """
    parts: dict[str, Iterable[torch.Tensor]] = {
        "the weights": local_masters(engine),
        "the optimiser's state": _optimizer_tensors(engine),
        "the moving average of the weights": ema.shards if ema is not None else (),
        "a buffer of the model": engine.module.buffers(),
    }
    return next((name for name, tensors in parts.items() if not all(map(is_finite, tensors))), "")


def _optimizer_tensors(engine) -> Iterator[torch.Tensor]:
    for state in engine.basic_optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
