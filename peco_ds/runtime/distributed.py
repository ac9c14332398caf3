"""Join the ranks of srun, deepspeed, torchrun or a plain process; device, seeds, collectives, stop flag."""

from __future__ import annotations

import atexit
import logging
import os
import random
import re
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import psutil
import torch

if not torch.cuda.is_available():
    # DeepSpeed reads this once, at its import.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist

from peco_ds.errors import StoreFault, UserError
from peco_ds.stop_signals import on_stop_signal

logger = logging.getLogger("peco_ds")

# Longer than any watchdog of a run (run.hang_timeout_s, an hour for start, saves and evaluation), because the watchdog
# says where each rank hangs. DeepSpeed's own default of ten minutes is less than a conversion of a large checkpoint or
# a first compilation may take on rank 0.
COLLECTIVE_TIMEOUT_H = 2


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without compiling it.

    Given any optimiser, DeepSpeed imports Muon to compare the two, and Muon passes its functions to torch.compile at
    once. That loads all of torch's compiler and takes seconds of every start, also of one that compiles nothing. Runs
    use AdamW only, so Muon's functions may stay uncompiled.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    except ImportError:
        # This DeepSpeed release has no Muon.
        pass
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


import_muon_uncompiled()


class Launcher:
    """The `deepspeed` or `torchrun` that started this rank.

    Once the launcher was killed, nothing tells the rank to stop.
    """

    def __init__(self) -> None:
        self._chain = [psutil.Process(os.getppid())]
        words = " ".join(self._words(self._chain[0]))
        # This is the second of deepspeed's two processes; the first is the one that users see and end.
        if "deepspeed.launcher.launch" in words:
            self._chain += self._chain[0].parents()[:1]
        elif not re.search(r"torchrun|torch\.distributed\.(run|launch)", words):
            # The parent is no launcher, but a shell, say, which may end before what it started.
            self._chain = []

    def gone(self) -> bool:
        return not all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in self._chain)

    @staticmethod
    def _words(process: psutil.Process) -> list[str]:
        try:
            return process.cmdline()
        except psutil.Error:
            return []


class Agreed(NamedTuple):
    """What all ranks agree on at the end of a step."""

    # Some rank was asked to stop.
    stop: bool
    # Some rank still writes its part of a checkpoint.
    busy: bool
    # A checkpoint is due by the clock.
    due: bool


@dataclass
class World:
    """This process among all, and the few collectives that stages need."""

    rank: int
    size: int
    device: torch.device
    # Whether this rank was asked to stop; `agree_on` asks all ranks.
    stop_seen: bool = False
    launcher: Launcher | None = None
    # Answers on their way to the host.
    _asked: tuple[torch.Tensor, torch.cuda.Event] | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's values, in place."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Equal-shaped tensors of all ranks, concatenated along the first dimension in rank order, on every rank."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def gather_objects(self, value) -> list:
        """One small picklable value of each rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, fault: str | StoreFault) -> None:
        """Raise one rank's fault on all ranks, so that none is left waiting for the others. Collective.

        Args:
            fault: "" if this rank has none.
        Raises: UserError or StoreFault with the first rank's fault.
        """
        first = next(filter(None, self.gather_objects(fault)), "")
        if isinstance(first, StoreFault):
            raise first
        if first:
            raise UserError(first)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def watch_signals(self) -> None:
        """From here on a stop signal only sets a flag; the loop ends the step and saves."""
        on_stop_signal(self._set_stop_seen)

    def _set_stop_seen(self) -> None:
        self.stop_seen = True

    def agree_on(self, *, busy: bool = False, due: bool = False) -> Agreed:
        """The same answers on every rank, once an optimiser step. Collective.

        On a GPU the answers are those of the previous call: to read the current ones would make the host wait for the
        step.

        Args:
            busy: this rank still writes its part of a checkpoint.  due: rank 0's clock says that one is due.
        """
        self.stop_seen = self.stop_seen or (self.launcher is not None and self.launcher.gone())
        flags = torch.zeros(3, device=self.device)
        for place, flag in enumerate((self.stop_seen, busy, due)):
            if flag:
                # To copy a tensor from host values would wait for the device.
                flags[place].fill_(1.0)
        self.all_reduce(flags)
        if self.device.type == "cuda":
            asked, self._asked = (
                self._asked,
                (torch.empty(3, pin_memory=True).copy_(flags, non_blocking=True), torch.cuda.Event()),
            )
            self._asked[1].record()
            if asked is None:
                return Agreed(stop=False, busy=True, due=False)
            asked[1].synchronize()
            flags = asked[0]
        return Agreed(*(count > 0 for count in flags.tolist()))

    def forget_answers(self) -> None:
        """Discard answers under way, because what they were asked about has changed."""
        self._asked = None

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop. Collective, as `agree_on`."""
        return self.agree_on().stop


def start_world() -> World:
    """Join the process group that the launcher described, or make one of this process alone.

    From here on stop signals only set a flag.
    """
    _translate_environment()
    if torch.cuda.is_available():
        if torch.cuda.device_count() == 1:
            # Each task sees only its own GPU (--gpus-per-task).
            os.environ["LOCAL_RANK"] = "0"
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank}: {torch.cuda.device_count()} GPUs are visible on "
                f"{socket.gethostname()}; start one task a GPU"
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        # The deepspeed launcher sets OMP_NUM_THREADS to 1.
        if "OMP_NUM_THREADS" not in os.environ or "LOCAL_SIZE" in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size()))
    rank = int(os.environ["RANK"])
    _configure_logging(rank)
    deepspeed.init_distributed(
        dist_backend=None, auto_mpi_discovery=False, verbose=False, timeout=timedelta(hours=COLLECTIVE_TIMEOUT_H)
    )
    # If this is left to the interpreter's end, gloo's threads sometimes outlive what they need and abort a rank that
    # was done.
    atexit.register(_leave)
    world = World(rank, int(os.environ["WORLD_SIZE"]), device, launcher=Launcher())
    world.watch_signals()
    return world


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def local_size() -> int:
    """Ranks on this node."""
    # The first is set by deepspeed's launcher, the second by torchrun.
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    # "2(x3),1": tasks of each node of a Slurm step; equal on all nodes of a training job
    return int(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0])


def _translate_environment() -> None:
    """Write RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT where the launcher did not.

    Under srun one task is one rank. SLURM_STEP_ID tells a task of srun from the batch script itself, which sees the
    other SLURM_* variables too.
    """
    env = os.environ
    if "RANK" not in env and "SLURM_STEP_ID" in env:
        env["RANK"] = env["SLURM_PROCID"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env["WORLD_SIZE"] = env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"])
        env.setdefault("MASTER_ADDR", env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
        env.setdefault("MASTER_PORT", str(15000 + int(env["SLURM_JOB_ID"]) % 20000))
    env.setdefault("RANK", "0")
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env["MASTER_PORT"] = str(free.getsockname()[1])


def _configure_logging(rank: int) -> None:
    """Our logger at INFO on the first rank and WARNING elsewhere; DeepSpeed's at WARNING."""
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if not os.environ.get("DEEPSPEED_LOG_LEVEL"):
        deepspeed.utils.logger.setLevel(logging.WARNING)
