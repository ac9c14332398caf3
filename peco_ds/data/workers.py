"""Make batches in worker processes, in a given order; a worker that dies is replaced, no batch is lost or changed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from peco_ds.errors import StoreFault, UserError, describe_os_error
from peco_ds.stop_signals import ignore_stop_signals

logger = logging.getLogger("peco_ds")


@dataclass
class RawBatch:
    """A batch as it leaves a worker."""

    # Kind of crop, named by the maker -> uint8 [B, 3, size, size], in any memory format.
    cuts: dict[object, torch.Tensor] = field(default_factory=dict)
    rows: torch.Tensor | None = None  # float32 [B, len(VIEW_COLUMNS)]
    masked: torch.Tensor | None = None
    # Codes of token records: int64 [B, N]; where soft codes are asked for, also int64 [B, N, T] and float32 [B, N, T].
    stored: tuple[torch.Tensor, ...] = ()
    # int64 [B]; -1: this row only fills up the batch.
    labels: torch.Tensor | None = None
    # int64 [B], global sample numbers; -1: this row only fills up the batch.
    samples: torch.Tensor | None = None
    # The number of this batch in the run, counted over all ranks.
    slice_number: int = 0
    keys: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    # The text of a StoreFault raised in the worker, as `error`.
    fault: str = ""
    # The text of a UserError raised in the worker; the main process raises it again, in one line.
    error: str = ""

    def pin_memory(self) -> RawBatch:
        self.cuts = {size: images.pin_memory() for size, images in self.cuts.items()}
        self.stored = tuple(values.pin_memory() for values in self.stored)
        for name in ("rows", "masked", "labels", "samples"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.pin_memory())
        return self


class _Dataset(Dataset):
    """Positions (or samples) in, one finished batch out. `make` does the work and may raise UserError."""

    def __init__(self, make: Callable[[np.ndarray], RawBatch]) -> None:
        self._make = make

    def __getitem__(self, places: np.ndarray) -> RawBatch:
        # An exception that crosses a process boundary arrives as a traceback inside a message; a field arrives
        # unchanged.
        try:
            return self._make(places)
        except UserError as error:
            return RawBatch(error=str(error))
        except StoreFault as fault:
            return RawBatch(fault=str(fault))
        except OSError as error:
            return RawBatch(error=describe_os_error(error, "reading the data"))


# So many worker deaths with fewer than WORKER_STRETCH batches between them end the run.
MAX_WORKER_DEATHS = 3
WORKER_STRETCH = 100
# Signal -> likely reason, remedy.
_DEATHS: dict[int, tuple[str, str]] = {
    signal.SIGKILL: (
        "most often the system had run out of memory",
        "lower data.num_workers or give the job more memory",
    ),
    signal.SIGBUS: ("most often shared memory, /dev/shm, is full", "lower data.num_workers or enlarge /dev/shm"),
    signal.SIGSEGV: (
        "a crash inside a native decoder",
        "find the image and repair it, or run with data.num_workers=0 to see more",
    ),
}


def load_raw(
    make: Callable[[np.ndarray], RawBatch], places: Iterable[np.ndarray], num_workers: int, *, pin: bool = False
) -> Generator[RawBatch, None, None]:
    """Batches made in `num_workers` processes (0: in this one), in the order of `places` (arrays, one a batch).

    A worker that dies (out of memory, a crash) costs time and nothing else: all are started again from the first batch
    that was not yielded. No global random generator of this process is drawn from.

    Args:
        pin: copy the batches to page-locked memory, from which a GPU fetches them while the host goes on.
    Raises: UserError or StoreFault that `make` raised; UserError when workers keep dying.
    """
    places = _Places(places)
    deaths = num_yielded = 0
    while True:
        workers = _Workers(make, places, num_workers, pin)
        died = None
        try:
            for raw in workers:
                if raw.fault:
                    raise StoreFault(raw.fault)
                if raw.error:
                    raise UserError(raw.error)
                places.drop_first()
                num_yielded += 1
                yield raw
        except _WorkerDied as death:
            died = death.exit_code, str(death)
        finally:
            workers.close()
        if died is None:
            return
        deaths, num_yielded = (1 if num_yielded >= WORKER_STRETCH else deaths + 1), 0
        reason, remedy = _DEATHS.get(
            -died[0], ("no reason is known", "lower data.num_workers, or look into the system's log")
        )
        if deaths >= MAX_WORKER_DEATHS:
            raise UserError(
                f"data.num_workers {num_workers}: {deaths} loader workers died in a row, last {died[1]}: "
                f"{reason}; {remedy}"
            )
        logger.warning("%s: %s; workers are started again where they were, no batch is lost", died[1], reason)


class _Places:
    """The places of all batches, which can be iterated again from the first one that was not yielded."""

    def __init__(self, places: Iterable[np.ndarray]) -> None:
        self._rest = iter(places)
        # Places given to workers whose batches have not come back, or not in turn.
        self._pending: deque[np.ndarray] = deque()

    def __iter__(self) -> Iterator[np.ndarray]:
        yield from list(self._pending)
        for place in self._rest:
            self._pending.append(place)
            yield place

    def drop_first(self) -> None:
        self._pending.popleft()


class _WorkerDied(Exception):
    def __init__(self, process) -> None:
        self.exit_code = process.exitcode or 0
        how = signal.Signals(-self.exit_code).name if self.exit_code < 0 else f"exit code {self.exit_code}"
        super().__init__(f"loader worker {process.pid} ({how})")


class _Workers:
    """One set of worker processes at work on `places`; with num_workers 0, this process.

    torch raises the death of a worker from a handler of SIGCHLD, wherever the main thread is at that moment: in a
    backward pass, in a save. Here it is raised only where a batch is waited for.
    """

    def __init__(self, make: Callable[[np.ndarray], RawBatch], places: _Places, num_workers: int, pin: bool) -> None:
        loader = DataLoader(
            _Dataset(make),
            sampler=places,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin,
            worker_init_fn=_start_worker if num_workers else None,
            prefetch_factor=2 if num_workers else None,
            # Without a generator of its own the loader would draw from the global one, and a resumed run would drop
            # other paths.
            generator=torch.Generator(),
        )
        self._since = time.time()
        others = set(multiprocessing.active_children())
        on_child = signal.getsignal(signal.SIGCHLD)
        self._batches = iter(loader)
        if _in_main_thread():
            signal.signal(signal.SIGCHLD, on_child or signal.SIG_DFL)
        self._processes = [child for child in multiprocessing.active_children() if child not in others]

    def __iter__(self) -> Iterator[RawBatch]:
        while True:
            try:
                with self._woken_by_a_death():
                    raw = next(self._batches)
            except StopIteration:
                return
            except _WorkerDied:
                raise
            except Exception:
                # A batch that a dead worker left half sent raises errors of many types; the process may take a moment
                # to end.
                self._raise_if_one_died(within_s=1.0, any_exit=True)
                raise
            yield raw

    @contextmanager
    def _woken_by_a_death(self) -> Iterator[None]:
        """Without the signal torch would look after its workers only every five seconds, and wait for ever for the rest
        of a half-sent batch.
        """
        self._raise_if_one_died()
        if not self._processes or not _in_main_thread():
            yield
            return
        before = signal.signal(signal.SIGCHLD, lambda _number, _frame: self._raise_if_one_died())
        try:
            yield
        finally:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)

    def _raise_if_one_died(self, within_s: float = 0.0, any_exit: bool = False) -> None:
        """Args: any_exit: also one that ended with 0, as all do when there are no batches left."""
        deadline = time.monotonic() + within_s
        while self._processes:
            for process in self._processes:
                if process.exitcode or any_exit and process.exitcode is not None:
                    raise _WorkerDied(process) from None
            if time.monotonic() >= deadline:
                return
            time.sleep(0.02)

    def close(self) -> None:
        """No process is left, and nothing of theirs in shared memory."""
        # torch ends the workers with their iterator.
        self._batches = None
        for process in self._processes:
            process.join(0.1)
            if process.is_alive():
                process.kill()
                process.join()
            assert process.pid is not None
            # None: another thread was quicker to wait for it, so that the system no longer tells.
            if process.exitcode is None or process.exitcode < 0:
                _unlink_shared_memory_of(process.pid, self._since)


def _unlink_shared_memory_of(pid: int, since: float) -> None:
    """Files that torch names after their maker: one killed between the making of a file and its unlinking leaves it in
    memory until the next reboot.
    """
    for file in Path("/dev/shm").glob(f"torch_{pid}_*"):
        with suppress(FileNotFoundError):
            found = file.stat()
            # Containers may share the folder, and each numbers its processes from 1.
            if found.st_uid == os.getuid() and found.st_ctime >= since - 1:
                # Batches that were yielded are mapped, and stay usable.
                file.unlink()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _start_worker(_worker: int) -> None:
    # The workers are the parallelism; more threads would compete for the same cores.
    torch.set_num_threads(1)
    # Slurm signals every process of a step. The loop answers and ends its workers; one that died of the signal would
    # end the loop.
    ignore_stop_signals()
