"""Move batches from loader processes to the device; on a GPU the next one is copied while the current step runs.

A batch is copied out of pinned memory and prepared (jitter, normalisation) on a stream of its own, one batch ahead.
Nothing else is done ahead. When a batch's turn comes it is counted, its errors are raised, and what has to run on the
step's stream (an online tokenizer) begins, so a run that stops and continues has everything at the same batch as an
uninterrupted one. On a CPU there is nothing to overlap, and nothing is read ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, TypeVar

import numpy as np
import torch

from peco_ds.data.workers import RawBatch, load_raw

Ready = TypeVar("Ready")
Batch = TypeVar("Batch")


def device_batches(
    make: Callable[[np.ndarray], RawBatch],
    places: Iterable[np.ndarray],
    prepare: Callable[[RawBatch], Ready],
    finish: Callable[[Ready, RawBatch], Batch],
    *,
    num_workers: int,
    device: torch.device,
    in_turn: Callable[[RawBatch], None] | None = None,
) -> Iterator[Batch]:
    """Batches in the order of `places`, on the device.

    Args:
        make: as of `load_raw`, in `num_workers` processes.
        prepare: copies to the device (non_blocking: what it finds is pinned there) and what can follow without the
            step; its tensors, in tuples. It draws from no global random generator.
        finish: the batch, made of what `prepare` gave; on the step's stream, in the batch's turn.
        in_turn: called with every batch just before it is yielded; may raise.
    Raises: what `load_raw`, `prepare`, `in_turn` and `finish` raise, in the turn of the batch that they raise it for.
    """
    on_gpu = device.type == "cuda"
    raws = load_raw(make, places, num_workers, pin=on_gpu)
    return prepared_batches(raws, prepare, finish, lane=SideStream(device) if on_gpu else None, in_turn=in_turn)


def prepared_batches(
    raws: Generator[RawBatch, None, None],
    prepare: Callable[[RawBatch], Ready],
    finish: Callable[[Ready, RawBatch], Batch],
    *,
    lane: SideStream | None,
    in_turn: Callable[[RawBatch], None] | None = None,
) -> Iterator[Batch]:
    """As `device_batches`, for a given iterator of raw batches, which is closed with this one.

    Args:
        lane: prepares one batch ahead; None: each in its turn.
    """

    def take() -> tuple[RawBatch | None, Any, Exception | None]:
        try:
            raw = next(raws)
            return raw, (lane.begin(prepare, raw) if lane else prepare(raw)), None
        except Exception as error:
            # StopIteration, the end of the batches, is kept too.
            return None, None, error

    with closing(raws):
        coming = take() if lane else None
        while True:
            raw, ready, error = coming or take()
            # Taken before the batch is yielded: once its step has begun, the host may have nothing left to do but
            # wait for the device.
            coming = take() if lane and error is None else None
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            assert raw is not None
            if in_turn is not None:
                in_turn(raw)
            yield finish(lane.hand_over(ready) if lane else ready, raw)


class SideStream:
    """A CUDA stream beside the step's, and the order between the two."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def begin(self, prepare: Callable[[RawBatch], Ready], raw: RawBatch) -> tuple[Ready, torch.cuda.Event]:
        """Queue `prepare` on this stream.

        What it reads on the host may be let go: the allocator of pinned memory knows of the copies under way.
        """
        with torch.cuda.stream(self._stream):
            ready = prepare(raw)
            return ready, self._stream.record_event()

    def hand_over(self, begun: tuple[Ready, torch.cuda.Event]) -> Ready:
        """What `prepare` gave, for the current stream: it waits for this one, and the host waits for neither."""
        ready, prepared = begun
        consumer = torch.cuda.current_stream(self._device)
        consumer.wait_event(prepared)
        for tensor in _tensors(ready):
            # Otherwise its memory would go to a later batch while the step still reads it.
            tensor.record_stream(consumer)
        return ready


def _tensors(value) -> Iterator[torch.Tensor]:
    """The tensors of a device in nested tuples."""
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
