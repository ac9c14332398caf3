"""Steps from settings: the schedule in optimiser steps, and gradient accumulation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from peco_ds.config import DetectRecipe, FinetuneRecipe, RunSettings, SegmentRecipe
from peco_ds.errors import UserError


@dataclass(frozen=True)
class Durations:
    """The schedule in optimiser steps."""

    total_steps: int
    warmup_steps: int
    # Between checkpoints. 0: only at the end.
    checkpoint_steps: int
    # Where this run ends: total_steps, or schedule.stop_at_step.
    stop_step: int
    # Between evaluations of a classifier or a dense model. 0: only at the end.
    evaluation_steps: int = 0
    # Between checkpoints that are kept for good. 0: none.
    keep_steps: int = 0

    def save_after(self, step: int) -> bool:
        """Whether a checkpoint is due when `step` steps are done."""
        return step == self.stop_step or any(
            cadence > 0 and step % cadence == 0 for cadence in (self.checkpoint_steps, self.keep_steps)
        )

    def evaluate_after(self, step: int) -> bool:
        """Whether a classifier or a dense model is measured when `step` steps are done."""
        return step == self.stop_step or (self.evaluation_steps > 0 and step % self.evaluation_steps == 0)


def resolve_durations(recipe, num_samples: int) -> Durations:
    """Epochs -> steps, once. An epoch is every sample once; batches run across its end, so nothing is dropped.

    Raises: UserError if a run would have no step at all.
    """
    schedule, batch = recipe.schedule, recipe.run.global_batch

    def steps(epochs, count, default):
        if count is not None:
            return count
        return math.floor(epochs * num_samples / batch) if epochs is not None else default

    total = steps(schedule.epochs, schedule.steps, 0)
    if total < 1:
        raise UserError(
            f"schedule gives {total} steps: {num_samples} samples, global_batch {batch}, epochs "
            f"{schedule.epochs}; raise schedule.epochs or lower run.global_batch"
        )
    every = steps(recipe.checkpoint.every_epochs, recipe.checkpoint.every_steps, 0)
    warmup = steps(schedule.warmup_epochs, schedule.warmup_steps, 0)
    if warmup > total:
        key = "schedule.warmup_steps" if schedule.warmup_steps is not None else "schedule.warmup_epochs"
        given = (
            f"{key} {warmup}"
            if schedule.warmup_steps is not None
            else f"{key} {schedule.warmup_epochs} = {warmup} steps"
        )
        raise UserError(f"the warm-up ({given}) is longer than the run of {total} steps; set {key} lower")
    evaluation = 0
    if isinstance(recipe, SegmentRecipe):
        evaluation = recipe.evaluation.every_steps
    if isinstance(recipe, (FinetuneRecipe, DetectRecipe)) and recipe.evaluation.every_epochs:
        evaluation = max(1, steps(recipe.evaluation.every_epochs, None, 0))
    return Durations(
        total, warmup, every, min(total, schedule.stop_at_step or total), evaluation, recipe.checkpoint.keep_every_steps
    )


def mixes_pairs(recipe) -> bool:
    """Whether the images of a pass are mixed in pairs, so that it needs an even number."""
    if not isinstance(recipe, FinetuneRecipe):
        return False
    augment = recipe.augment
    return augment.mix_probability > 0 and (augment.mixup > 0 or augment.cutmix > 0)


def micro_batches(run: RunSettings, world_size: int, *, pairs: bool = False) -> list[int]:
    """Numbers of images a pass that divide a rank's part of the global batch, smallest first.

    [] if the ranks do not divide it.

    Args:
        pairs: even numbers alone.
    """
    part, left = divmod(run.global_batch, world_size)
    if left:
        return []
    return [size for size in range(1, part + 1) if part % size == 0 and not (pairs and size % 2)]


def settle_micro_batch(run: RunSettings, world_size: int, *, pairs: bool = False) -> RunSettings:
    """The settings with the images of a pass that so many ranks take: the most, up to run.micro_batch, that divide a
    rank's part of the global batch.

    Raises: UserError if there are none.
    """
    fitting = [size for size in micro_batches(run, world_size, pairs=pairs) if size <= run.micro_batch]
    if not fitting:
        unit = world_size * (2 if pairs else 1)
        low = run.global_batch // unit * unit
        near = f"{low} or {low + unit}" if low else f"{unit}"
        raise UserError(
            f"global_batch {run.global_batch} is not a multiple of {world_size} ranks"
            f"{' x 2 images, which mixup and cutmix pair' if pairs else ''}; use {near}, or other ranks"
        )
    return replace(run, micro_batch=fitting[-1])


def micro_steps(run: RunSettings, world_size: int) -> int:
    """Gradient accumulation: forward passes a rank makes for one optimiser step.

    Args:
        run: as `settle_micro_batch` gives it for these ranks.
    """
    steps, left = divmod(run.global_batch, run.micro_batch * world_size)
    assert left == 0, (run.global_batch, run.micro_batch, world_size)
    return steps
