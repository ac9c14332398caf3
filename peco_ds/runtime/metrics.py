"""What a run reports: TensorBoard, metrics.jsonl, and one progress line. Values stay on the device until a step logs."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from peco_ds.config import Durations, RunSettings
from peco_ds.errors import UserError
from peco_ds.runtime.distributed import World
from peco_ds.runtime.engine import grad_norm, memory_gib

METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.jsonl"

# metrics.jsonl name -> TensorBoard tag
_TAGS = {
    "loss": "loss/total",
    "accuracy": "tokens/masked_accuracy",
    "train_top1": "train/top1",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "skipped_steps": "optim/skipped_steps",
    "images_per_s": "time/images_per_s",
    "step_s": "time/step_s",
    "data_wait_s": "time/data_wait_s",
    "memory_gib": "memory/peak_gib",
    "images": "data/images_seen",
    "epoch": "data/epoch",
    "codes_used": "tokens/codes_used",
    "perplexity": "tokens/perplexity",
}


class Meter:
    """Means over the steps since the last log, over all ranks; one read of the device a log.

    Args:
        run_folder: metrics.jsonl and tensorboard/ are written there by rank 0.
        first_step: rows after it, left by a run that went on past its last checkpoint, are dropped: no step is missing or there twice.
    """

    def __init__(self, run_folder: Path, world: World, *, first_step: int, durations: Durations, run: RunSettings, num_samples: int) -> None:
        self._run_folder, self._world = run_folder, world
        self._durations, self._run, self._num_samples = durations, run, num_samples
        self._reset()
        self._file = self._tensorboard = None
        if world.is_main:
            from torch.utils.tensorboard import SummaryWriter

            path = run_folder / METRICS_FILE
            _drop_rows_after(path, first_step)
            _drop_rows_after(run_folder / EVALUATION_FILE, first_step - 1)  # the moment of the start is evaluated again
            self._file = open(path, "a", buffering=1)
            self._tensorboard = SummaryWriter(str(run_folder / "tensorboard"), purge_step=first_step + 1)

    def _reset(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._passes = self._steps = 0
        self._data_wait_s = 0.0
        self._since = time.perf_counter()

    def next(self, batches: Iterator):
        """The next batch; the time the loop stands still for it is counted."""
        before = time.perf_counter()
        batch = next(batches)
        self._data_wait_s += time.perf_counter() - before
        return batch

    def add(self, loss: torch.Tensor, stats: dict[str, torch.Tensor]) -> None:
        """One forward pass's loss and statistics (scalars on the device)."""
        for name, value in {"loss": loss, **stats}.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._passes += 1

    def close_step(self, done: int, engine, rate: float, extra: Callable[[], dict[str, float]] = dict) -> None:
        """End of optimiser step number `done` (from 1); logs if it is time to. Collective when it logs.

        Args:
            rate: learning rate of the step.  extra: further numbers, asked for only when the step logs.
        Raises: UserError if the mean loss since the last log is not finite; nothing is saved after it.
        """
        self._steps += 1
        if done % self._run.log_every_steps and done != self._durations.stop_step:
            return
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names] + [torch.tensor(float(self._passes), device=self._world.device)])
        *values, passes = self._world.all_reduce(sums).tolist()
        elapsed = time.perf_counter() - self._since
        images = done * self._run.global_batch
        row = {"step": done, "images": images, "epoch": round(images / self._num_samples, 4)}
        row |= {name: value / passes for name, value in zip(names, values)}
        row |= {"lr": rate, "grad_norm": grad_norm(engine), "skipped_steps": engine.skipped_steps, "memory_gib": memory_gib(self._world.device), **extra()}
        row |= {"step_s": elapsed / self._steps, "images_per_s": self._steps * self._run.global_batch / elapsed, "data_wait_s": self._data_wait_s / self._steps}
        self._reset()
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self.scalars(row, done)
            self._progress_line(row)
        if not math.isfinite(row["loss"]):
            raise UserError(f"loss {row['loss']} in the steps up to {done}; the last checkpoint is untouched: continue it with a lower optim.lr or in run.precision=fp32")

    @contextmanager
    def paused(self):
        """What happens inside is no training time: saves, evaluation."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Scalars to TensorBoard (rank 0 only; elsewhere nothing)."""
        if self._tensorboard is not None:
            for name, value in values.items():
                if name != "step":
                    self._tensorboard.add_scalar(_TAGS.get(name, name if "/" in name else f"loss/{name}"), value, step)

    def evaluation(self, step: int, quality: dict[str, float]) -> None:
        """One row of evaluation.jsonl, TensorBoard, and a line (rank 0 only)."""
        if self._file is not None:
            with open(self._run_folder / EVALUATION_FILE, "a") as file:
                file.write(json.dumps({"step": step, **quality}) + "\n")
            self.scalars({f"eval/{name}": value for name, value in quality.items()}, step)
            sys.stdout.write(f"held-out at step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in quality.items()) + "\n")
            sys.stdout.flush()

    def picture(self, tag: str, image_u8: torch.Tensor, step: int) -> None:
        """uint8 [3, H, W] to TensorBoard (rank 0 only)."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(tag, image_u8, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._tensorboard.close()

    def _progress_line(self, row: dict) -> None:
        total = self._durations.total_steps
        left = (total - row["step"]) * row["step_s"]
        eta = f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
        parts = [f"step {row['step']}/{total}", f"loss {row['loss']:.4f}"]
        parts += [f"{name} {row[name]:.4g}" for name in ("accuracy", "train_top1", "psnr", "codes_used", "grad_norm", "lr") if name in row]
        parts += [f"{row['images_per_s']:.1f} images/s", f"ETA {eta}"]
        sys.stdout.write("  ".join(parts) + "\n")
        sys.stdout.flush()


def read_metrics(run_folder: Path) -> list[dict]:
    """Rows of metrics.jsonl, in order; [] if there are none."""
    return _rows(Path(run_folder) / METRICS_FILE)


def read_evaluation(run_folder: Path) -> list[dict]:
    """Rows of evaluation.jsonl, in order; [] if there are none."""
    return _rows(Path(run_folder) / EVALUATION_FILE)


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # a last line that was cut short
            break
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    os.replace(temporary, path)
