"""Turn views of images into token records and token shards, asynchronously, so that the device never waits."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from peco_ds.data.loaders import Codes, ViewsBatch
from peco_ds.data.token_parts import TokenParts
from peco_ds.data.token_shards import TokenRecord
from peco_ds.errors import UserError, printable
from peco_ds.schema import NO_CODE

_REMEDY = "set views.tokenizer_precision=fp32, or bf16 in place of fp16, or take another tokenizer"


def record_batches(
    batches: Iterable[ViewsBatch], codes: Callable[[torch.Tensor], Codes]
) -> Iterator[list[TokenRecord]]:
    """The records of each batch, a record an image.

    A batch is queued on the device before the host waits for the batch before it. An error of a batch is raised after
    the batch before it was yielded.

    Args:
        codes: images_11 [b * K, 3, T, T] -> Codes (`token_source.codes_function`).
    Raises: UserError naming an image that has no codes.
    """
    ahead, fault = None, None
    batches = iter(batches)
    while fault is None:
        queued = None
        try:
            batch = next(batches, None)
            queued = _Fetched(batch.keys, batch.rows, codes(batch.images_11)) if batch is not None else None
        except Exception as error:
            fault = error
        if ahead is not None:
            yield ahead.records()
        if fault is None and queued is None:
            return
        ahead = queued
    raise fault


class _Fetched:
    """A batch's codes on their way to the host."""

    def __init__(self, keys: list[str], rows: np.ndarray, codes: Codes) -> None:
        self._keys, self._rows = keys, rows
        narrow = [
            values.to(kind)
            for values, kind in zip(codes, (torch.int32, torch.int32, torch.float16))
            if values is not None
        ]
        self._done = None
        self._host = narrow
        if narrow[0].is_cuda:
            self._host = [
                torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
                for values in narrow
            ]
            self._done = torch.cuda.Event()
            self._done.record()

    def records(self) -> list[TokenRecord]:
        if self._done is not None:
            self._done.synchronize()
        images, views = self._rows.shape[:2]
        self._refuse_lost(images)
        stored = [
            values.numpy().astype(kind).reshape(images, views, *values.shape[1:])
            for values, kind in zip(self._host, (np.uint16, np.uint16, np.float16))
        ]
        if len(stored) > 2 and not np.isfinite(stored[2]).all():
            raise UserError(
                "the tokenizer gives soft codes that are not finite, first among "
                f"{', '.join(self._keys[:4])}; {_REMEDY}"
            )
        return [
            TokenRecord(key, stored[0][place], self._rows[place], *(values[place] for values in stored[1:]))
            for place, key in enumerate(self._keys)
        ]

    def _refuse_lost(self, images: int) -> None:
        is_lost = (self._host[0].numpy() == NO_CODE).reshape(images, -1).any(axis=1)
        if is_lost.any():
            first = self._keys[int(is_lost.argmax())]
            raise UserError(
                f"the tokenizer's numbers are not finite on {is_lost.sum()} of a batch of {images} images, first "
                f"{printable(first)}, so they have no codes; {_REMEDY}"
            )


class _Batch(NamedTuple):
    shard: int
    # None: the shard has no more records.
    records: list[TokenRecord] | None


class _Dropped(Exception):
    """The current shard will not be finished."""


class ShardWriter:
    """A thread that writes, hashes and flushes token shards while the next batches are computed.

        with ShardWriter(parts) as writer:
            for number in shards:
                for records in ...:
                    writer.put(number, records)
                writer.end(number)

    Leaving the block waits for the shards that were ended; a shard that was not, as after an exception, is dropped
    whole. An error of the thread is raised by the next call, or at the end of the block.
    """

    # Batches that may wait for the disk.
    AHEAD = 4

    def __init__(self, parts: TokenParts) -> None:
        self._parts = parts
        # None: no batch follows.
        self._waiting: queue.Queue[_Batch | None] = queue.Queue(self.AHEAD)
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="token shard writer", daemon=True)

    def __enter__(self) -> ShardWriter:
        return self

    def put(self, shard: int, records: list[TokenRecord]) -> None:
        """Write the next records of a shard; the records of a shard are put without another's in between.

        Waits while AHEAD batches are not written yet.
        """
        self._hand_over(_Batch(shard, records))

    def end(self, shard: int) -> None:
        """Finish a shard, all of whose records were put."""
        self._hand_over(_Batch(shard, None))

    def __exit__(self, kind, *_) -> None:
        if self._thread.ident is None:
            return
        try:
            self._hand_over(None)
            self._thread.join()
            self._raise_fault()
        except BaseException:
            # Otherwise the exception of the block itself is raised.
            if kind is None:
                raise

    def _hand_over(self, batch: _Batch | None) -> None:
        # Started at the first batch, because loader processes, forked for it, would otherwise inherit an open shard and
        # its lock.
        if self._thread.ident is None:
            self._thread.start()
        while True:
            self._raise_fault()
            try:
                return self._waiting.put(batch, timeout=0.2)
            except queue.Full:
                continue

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _run(self) -> None:
        try:
            while (batch := self._waiting.get()) is not None:
                self._parts.write(batch.shard, self._records(batch))
        except _Dropped:
            pass
        except BaseException as fault:  # noqa: BLE001  whatever it is, the main thread has to know of it
            self._fault = fault

    def _records(self, batch: _Batch | None) -> Iterator[TokenRecord]:
        while batch is not None and batch.records is not None:
            yield from batch.records
            batch = self._waiting.get()
        if batch is None:
            raise _Dropped
