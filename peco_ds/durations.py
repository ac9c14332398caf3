"""Steps from settings: the schedule in optimiser steps, and gradient accumulation."""

from __future__ import annotations

import math
from dataclasses import dataclass

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


def micro_steps(run: RunSettings, world_size: int) -> int:
    """Gradient accumulation: forward passes a rank makes for one optimiser step.

    Raises: UserError if the global batch does not divide.
    """
    per_pass = run.micro_batch * world_size
    if run.global_batch % per_pass:
        low = run.global_batch // per_pass * per_pass
        near = f"{low} or {low + per_pass}" if low else f"{per_pass}"
        raise UserError(
            f"global_batch {run.global_batch} is not a multiple of micro_batch {run.micro_batch} x "
            f"{world_size} ranks = {per_pass}; "
            f"use {near}, or change run.micro_batch"
        )
    return run.global_batch // per_pass
