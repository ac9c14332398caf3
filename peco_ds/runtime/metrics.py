"""What a run reports: TensorBoard, metrics.jsonl, and one progress line. Values stay on the device until a step logs."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from peco_ds.runtime.distributed import World

METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.jsonl"

# metrics.jsonl name -> TensorBoard tag
_TAGS = {
    "loss": "loss/total",
    "accuracy": "tokens/masked_accuracy",
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

    def __init__(self, run_folder: Path, world: World, *, first_step: int, total_steps: int, stop_step: int, log_every: int, global_batch: int, num_samples: int) -> None:
        self._run_folder = run_folder
        self._world = world
        self._total_steps, self._stop_step = total_steps, stop_step
        self._log_every = log_every
        self._global_batch = global_batch
        self._num_samples = num_samples
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0
        self._steps = 0
        self._data_wait_s = 0.0
        self._since = time.perf_counter()
        self.first: dict[str, float] = {}  # first and last logged row of this process
        self.last: dict[str, float] = {}
        self._file = self._tensorboard = None
        if world.is_main:
            from torch.utils.tensorboard import SummaryWriter

            path = run_folder / METRICS_FILE
            _drop_rows_after(path, first_step)
            _drop_rows_after(run_folder / EVALUATION_FILE, first_step - 1)
            self._file = open(path, "a", buffering=1)
            self._tensorboard = SummaryWriter(str(run_folder / "tensorboard"), purge_step=first_step + 1)

    def add(self, loss: torch.Tensor, stats: dict[str, torch.Tensor]) -> None:
        """One forward pass's loss and statistics (scalars on the device)."""
        for name, value in {"loss": loss, **stats}.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def waited(self, seconds: float) -> None:
        """Time the loop stood still for data."""
        self._data_wait_s += seconds

    def due(self, step: int) -> bool:
        """Whether the step that ends as number `step` (from 1) logs."""
        return step % self._log_every == 0 or step == self._stop_step

    def log(self, step: int, extra: dict[str, float]) -> None:
        """Reduce, read, write. Collective.

        Args:
            step: optimiser steps done.  extra: host numbers of this moment (rate, gradient norm, memory).
        """
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names] + [torch.tensor(float(self._count), device=self._world.device)])
        values = self._world.all_reduce(sums).tolist()
        elapsed = time.perf_counter() - self._since
        steps = self._steps
        row = {"step": step, "images": step * self._global_batch, "epoch": round(step * self._global_batch / self._num_samples, 4)}
        row |= {name: value / values[-1] for name, value in zip(names, values)}
        row |= extra
        row |= {
            "step_s": elapsed / max(1, steps),
            "images_per_s": steps * self._global_batch / elapsed,
            "data_wait_s": self._data_wait_s / max(1, steps),
        }
        self._sums, self._count, self._steps, self._data_wait_s, self._since = {}, 0, 0, 0.0, time.perf_counter()
        self.first = self.first or row
        self.last = row
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self.scalars(row, step)
            self._progress_line(row)

    def step_done(self) -> None:
        self._steps += 1

    def pause(self) -> float:
        """A moment to hand to `resume`: what lies between is no training time (saves, evaluation)."""
        return time.perf_counter()

    def resume(self, paused_at: float) -> None:
        self._since += time.perf_counter() - paused_at

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
        left = max(0, self._total_steps - row["step"]) * row["step_s"]
        eta = f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
        parts = [f"step {row['step']}/{self._total_steps}", f"loss {row['loss']:.4f}"]
        parts += [f"{name} {row[name]:.4g}" for name in ("accuracy", "psnr", "codes_used", "grad_norm", "lr") if name in row]
        parts += [f"{row['images_per_s']:.1f} images/s", f"ETA {eta}"]
        sys.stdout.write("  ".join(parts) + "\n")
        sys.stdout.flush()


def read_metrics(run_folder: Path) -> list[dict]:
    """Rows of metrics.jsonl, in order; [] if there are none."""
    path = Path(run_folder) / METRICS_FILE
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
