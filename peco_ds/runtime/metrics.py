"""What a run reports: TensorBoard, metrics.jsonl, and one progress line.

Values stay on the device until a step logs.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from peco_ds.config import RunSettings
from peco_ds.durations import Durations
from peco_ds.errors import UserError
from peco_ds.registry import stat_tags
from peco_ds.runtime.distributed import World
from peco_ds.runtime.engine import grad_norm, memory_gib
from peco_ds.runtime.timeline import (
    EVALUATION_FILE,
    METRICS_FILE,
    STARTS_FILE,
    account_of,
    append_row,
    clock,
    drop_redone_steps,
    drop_rows_after,
    process_age_s,
    read_evaluation,
    read_metrics,
    record_start,
    sync_rows,
    write_row,
)

logger = logging.getLogger("peco_ds")

__all__ = ["EVALUATION_FILE", "METRICS_FILE", "Meter", "read_evaluation", "read_metrics"]

# Name in metrics.jsonl -> TensorBoard tag. A name with a slash is its own tag; any other one goes under loss/.
_TAGS = {
    "loss": "loss/total",
    "accuracy": "tokens/masked_accuracy",
    "aggregated_accuracy": "tokens/aggregated_accuracy",
    "train_top1": "train/top1",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "skipped_steps": "optim/skipped_steps",
    "images_per_s": "time/images_per_s",
    "mfu": "time/mfu",
    "step_s": "time/step_s",
    "data_wait_s": "time/data_wait_s",
    "save_s": "time/save_s",
    "evaluation_s": "time/evaluation_s",
    "memory_gib": "memory/peak_gib",
    "images": "data/images_seen",
    "epoch": "data/epoch",
    "bad_images": "data/bad_images",
    "codes_used": "tokens/codes_used",
    "perplexity": "tokens/perplexity",
}
# Names of the meter's own in a row. A statistic of an objective may have none of them.
_OWN_NAMES = frozenset(
    "loss step images epoch lr grad_norm skipped_steps memory_gib step_s images_per_s data_wait_s mfu save_s "
    "evaluation_s time start up_s".split()
)
_NO_SCALARS = ("step", "time", "start", "up_s")
# A shorter pause was none: the loop only asked whether something was due.
_SHORTEST_S = 1e-3


def _check_stats(stats: dict[str, torch.Tensor]) -> None:
    for name, value in stats.items():
        if name in _OWN_NAMES:
            raise UserError(f"the objective's statistic {name!r}: rows of {METRICS_FILE} have one; rename it")
        if not isinstance(value, torch.Tensor) or value.dim():
            found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(f"the objective's statistic {name!r}: is {found}; give a scalar tensor")


class Meter:
    """Means over the steps since the last log, over all ranks; one read of the device a log.

    Records the start, and the end by `close`.

    Args:
        run_folder: metrics.jsonl, starts.jsonl and tensorboard/ are written there by rank 0.
        first_step: rows after it, left by a run that went on past its last checkpoint, are dropped: no step is missing
            or there twice.
        training_flops: FLOP of one image, forward and backward.
        peak_flops: FLOP a second of all ranks' devices, 0 where it is not known; with it model FLOP utilisation is
            logged.
        counters: name -> what this rank counted since the run began; every row has the sum over ranks.
    """

    def __init__(
        self,
        run_folder: Path,
        world: World,
        *,
        first_step: int,
        durations: Durations,
        run: RunSettings,
        num_samples: int,
        training_flops: float = 0.0,
        peak_flops: float = 0.0,
        counters: dict[str, Callable[[], int]] | None = None,
    ) -> None:
        self._run_folder, self._world = run_folder, world
        self._training_flops, self._peak_flops = training_flops, peak_flops
        self._durations, self._run, self._num_samples = durations, run, num_samples
        self._done = first_step
        self._counters = counters or {}
        self._paused_since: float | None = None
        # Time at which this start asked for its first batch.
        self._first_step_from: float | None = None
        self._first_waited_s = 0.0
        self._first_is_done = self._stats_are_checked = False
        self._discard_step()
        self._reset()
        self._file = self._tensorboard = None
        if world.is_main:
            from torch.utils.tensorboard import SummaryWriter

            drop_redone_steps(run_folder, first_step)
            # The evaluation at the step of the start is made again.
            drop_rows_after(run_folder / EVALUATION_FILE, first_step - 1)
            self._start = record_start(
                run_folder,
                ranks=world.size,
                step=first_step,
                total_steps=durations.total_steps,
                stop_step=durations.stop_step,
            )
            # Age of the process at monotonic time 0.
            self._age_s = process_age_s() - time.monotonic()
            self._account = account_of(run_folder)
            # Unbuffered: a row is one write, whole or cut short by a kill.
            self._file = open(run_folder / METRICS_FILE, "ab", buffering=0)
            self._tensorboard = SummaryWriter(str(run_folder / "tensorboard"), purge_step=first_step + 1)

    def _reset(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._passes = self._steps = 0
        self._data_wait_s = 0.0
        self._spent_s = {"save": 0.0, "evaluation": 0.0}
        self._since = time.perf_counter()

    def _discard_step(self) -> None:
        self._step_sums: dict[str, torch.Tensor] = {}
        self._step_passes = 0

    def next(self, batches: Iterator):
        """The next batch; the time the loop stands still for it is counted."""
        before = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - before
        self._data_wait_s += waited
        if not self._first_is_done:
            self._first_step_from = before if self._first_step_from is None else self._first_step_from
            self._first_waited_s += waited
        return batch

    def add(self, loss: torch.Tensor, stats: dict[str, torch.Tensor]) -> None:
        """One forward pass's loss and statistics: scalar tensors on the device, averaged over passes, steps and ranks.

        Raises: UserError for a statistic that is no scalar tensor, or has a name of the meter's own.
        """
        if not self._stats_are_checked:
            _check_stats(stats)
            self._stats_are_checked = True
        for name, value in {"loss": loss, **stats}.items():
            value = value.detach().float()
            self._step_sums[name] = self._step_sums[name] + value if name in self._step_sums else value
        self._step_passes += 1

    def close_step(
        self,
        done: int,
        engine,
        lr: float,
        extra: Callable[[], dict[str, float]] = dict,
        *,
        applied: bool = True,
        skipped: int = 0,
    ) -> None:
        """End of optimiser step number `done` (from 1); logs if it is time to. Collective when it logs.

        Args:
            lr: learning rate of the step.  extra: further numbers, asked for only when the step logs.
            applied: False for a step that was skipped, on all ranks: its statistics do not enter the means.
            skipped: such steps of the run so far.
        """
        if applied:
            for name, value in self._step_sums.items():
                self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._passes += self._step_passes
        self._discard_step()
        self._steps += 1
        self._done = done
        if not self._first_is_done:
            self._record_first_step()
        if done % self._run.log_every_steps and done != self._durations.stop_step:
            return
        means, counts = self._means()
        elapsed = time.perf_counter() - self._since
        images = done * self._run.global_batch
        images_per_s = self._steps * self._run.global_batch / elapsed
        row = {"step": done, "images": images, "epoch": round(images / self._num_samples, 4), **means}
        row |= {
            "lr": lr,
            "grad_norm": grad_norm(engine),
            "skipped_steps": skipped,
            "memory_gib": memory_gib(self._world.device),
            **counts,
            **extra(),
        }
        row |= {
            "step_s": elapsed / self._steps,
            "images_per_s": images_per_s,
            "data_wait_s": self._data_wait_s / self._steps,
        }
        if self._training_flops and self._peak_flops:
            row["mfu"] = images_per_s * self._training_flops / self._peak_flops
        row |= self._pauses()
        self._reset()
        if self._file is not None:
            row |= {"time": round(time.time(), 3), "start": self._start, "up_s": round(self._up_s(), 3)}
            write_row(self._file, row)
            self._account.row(row)
            self.scalars(row, done)
            self.scalars({f"goodput/{name}": share for name, share in self._account.goodput().shares().items()}, done)
            self._progress_line(row)

    def _record_first_step(self) -> None:
        """Which may compile: users want to know why a start takes long."""
        self._first_is_done = True
        if self._file is not None and self._first_step_from is not None:
            spent = time.perf_counter() - self._first_step_from
            event = {"event": "first_step", "start": self._start, "up_s": round(self._up_s(), 3)}
            event |= {"batch_s": round(self._first_waited_s, 3), "step_s": round(spent - self._first_waited_s, 3)}
            append_row(self._run_folder / STARTS_FILE, event)
            self._account.event(event)

    def _means(self) -> tuple[dict[str, float | None], dict[str, int]]:
        """Means of the window and counters, over all ranks. Collective."""
        # After a resume with another number of ranks, what one rank took over another need not have.
        counts = {name: counted() for name, counted in self._counters.items()}
        parts = self._world.gather_objects((sorted(self._sums), counts))
        names = sorted({name for names, _ in parts for name in names})
        zero = torch.zeros((), device=self._world.device)
        sums = torch.stack(
            [self._sums.get(name, zero) for name in names]
            + [torch.tensor(float(self._passes), device=self._world.device)]
        )
        *values, passes = self._world.all_reduce(sums).tolist()
        means = {name: value / passes for name, value in zip(names, values)} if passes else {"loss": None}
        return means, {name: sum(of_rank[name] for _, of_rank in parts) for name in counts}

    def _pauses(self) -> dict[str, float]:
        return {f"{kind}_s": round(spent, 3) for kind, spent in self._spent_s.items() if spent >= _SHORTEST_S}

    def _up_s(self) -> float:
        return time.monotonic() + self._age_s

    @contextmanager
    def paused(self, kind: Literal["save", "evaluation"]):
        """What happens inside is no training time; it is counted under its kind. Not nested."""
        assert self._paused_since is None, "a pause within a pause would be counted twice"
        self._paused_since = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - self._paused_since
            self._paused_since = None
            self._since += spent
            self._spent_s[kind] += spent

    def state(self) -> dict:
        """This rank's sums between two steps; plain numbers, so that it loads with weights_only. Reads the device.

        Rank 0's rows up to here are on disk when it returns: a checkpoint never holds a step whose row could still be
        lost.
        """
        assert not self._step_passes, "a step is open"
        names = sorted(self._sums)
        values = torch.stack([self._sums[name] for name in names]).tolist() if names else []
        if self._file is not None:
            sync_rows(self._file)
        written_by = {"start": self._start, "up_s": self._up_s()} if self._file is not None else {}
        return {
            **written_by,
            "sums": dict(zip(names, values)),
            "passes": self._passes,
            "steps": self._steps,
            "elapsed_s": self._open_s(),
            "data_wait_s": self._data_wait_s,
        }

    def _open_s(self) -> float:
        """Training seconds since the last row."""
        return (time.perf_counter() if self._paused_since is None else self._paused_since) - self._since

    def load_state(self, states: list[dict]) -> None:
        """Go on in the middle of a window, before the first step.

        Args:
            states: what this rank takes over: its own part, [] for nothing. With another number of ranks every part of
                the run goes to exactly one rank, for example `parts[rank :: world_size]`.
        """
        for state in states:
            for name, value in state["sums"].items():
                value = torch.tensor(value, dtype=torch.float32, device=self._world.device)
                self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._passes += state["passes"]
        # Time passes on all ranks alike.
        if states:
            self._steps, self._data_wait_s = states[0]["steps"], states[0]["data_wait_s"]
            self._since = time.perf_counter() - states[0]["elapsed_s"]
        if self._file is not None and states and "start" in states[0]:
            event = {"event": "continued", "start": states[0]["start"], "up_s": round(states[0]["up_s"], 3)}
            append_row(self._run_folder / STARTS_FILE, event)
            self._account.event(event)

    def scalars(self, values: dict[str, float | None], step: int) -> None:
        """Scalars to TensorBoard (rank 0 only; elsewhere nothing)."""
        tags = stat_tags() | _TAGS
        with self._curves():
            for name, value in values.items():
                if self._tensorboard is not None and name not in _NO_SCALARS and value is not None:
                    self._tensorboard.add_scalar(tags.get(name, name if "/" in name else f"loss/{name}"), value, step)

    @contextmanager
    def _curves(self):
        """TensorBoard is for looking at: a disk that takes no more of it does not end a run whose rows and checkpoints
        it still takes.
        """
        try:
            yield
        except OSError as error:
            self._tensorboard = None
            logger.warning(
                "%s: TensorBoard cannot be written (%s); this start goes on without", self._run_folder, error.strerror
            )

    def evaluation(self, step: int, quality: dict[str, float]) -> None:
        """One row of evaluation.jsonl, TensorBoard, and a line (rank 0 only)."""
        if self._file is not None:
            append_row(self._run_folder / EVALUATION_FILE, {"step": step, **quality})
            self.scalars({f"eval/{name}": value for name, value in quality.items()}, step)
            sys.stdout.write(
                f"held-out at step {step}: "
                + "  ".join(f"{name} {value:.4g}" for name, value in quality.items())
                + "\n"
            )
            sys.stdout.flush()

    def image(self, tag: str, image_u8: torch.Tensor, step: int) -> None:
        """uint8 [3, H, W] to TensorBoard (rank 0 only)."""
        with self._curves():
            if self._tensorboard is not None:
                self._tensorboard.add_image(tag, image_u8, step)

    def close(self, code: int, reason: str = "") -> None:
        """Record how this start ended, and say where its time went. Not collective; only the first call counts.

        Args:
            code: exit code this process is about to end with.  reason: for people, one line.
        """
        if self._file is None:
            return
        end = {
            "event": "end",
            "start": self._start,
            "time": round(time.time(), 3),
            "up_s": round(self._up_s(), 3),
            "code": code,
            "reason": reason,
        }
        end |= {"step": self._done, "open_steps": self._steps, **self._pauses()}
        if self._steps:
            end |= {"open_s": round(self._open_s(), 3), "open_wait_s": round(self._data_wait_s, 3)}
        self._file.close()
        self._file = None
        self._account.event(end)
        found = self._account.goodput()
        sys.stdout.write(found.line() + "\n")
        sys.stdout.flush()
        self.scalars({f"goodput/{name}": share for name, share in found.shares().items()}, self._done)
        with self._curves():
            if self._tensorboard is not None:
                self._tensorboard.close()
        append_row(self._run_folder / STARTS_FILE, end)

    def _progress_line(self, row: dict) -> None:
        total = self._durations.total_steps
        parts = [f"step {row['step']}/{total}", "no step applied" if row["loss"] is None else f"loss {row['loss']:.4f}"]
        parts += [
            f"{name} {row[name]:.4g}"
            for name in ("accuracy", "train_top1", "psnr", "codes_used", "grad_norm", "lr")
            if name in row
        ]
        parts += [f"{row['skipped_steps']} skipped"] if row["skipped_steps"] else []
        parts += [f"{row['images_per_s']:.1f} images/s"] + ([f"MFU {row['mfu']:.1%}"] if "mfu" in row else [])
        parts += [f"ETA {clock((total - row['step']) * row['step_s'])}"]
        sys.stdout.write("  ".join(parts) + "\n")
        sys.stdout.flush()
