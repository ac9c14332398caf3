"""What every training loop has around its steps: guard, meter and saver, set up from where the run stands."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from peco_ds.config import CheckpointSettings, RunSettings
from peco_ds.data.image_set import BadImages
from peco_ds.durations import Durations
from peco_ds.runtime.checkpoint.save_restore import Restored, Saver
from peco_ds.runtime.distributed import World
from peco_ds.runtime.ema import WeightEma
from peco_ds.runtime.metrics import Meter
from peco_ds.runtime.step_guard import StepGuard


class AroundSteps(NamedTuple):
    guard: StepGuard
    meter: Meter
    saver: Saver


def around_steps(
    out: Path,
    engine,
    restored: Restored,
    *,
    run: RunSettings,
    checkpoint: CheckpointSettings,
    durations: Durations,
    num_samples: int,
    training_flops: float,
    bad: BadImages,
    world: World,
    ema: WeightEma | None = None,
) -> AroundSteps:
    """Guard, meter and saver of a run; what a checkpoint kept of them, and of `bad`, goes on.

    Args:
        out: run folder.
        num_samples: images of an epoch.
        training_flops: of one image.
        bad: the loader's, counted in every row.
        ema: the run's moving average, saved along.
    """
    guard = StepGuard(engine, run, world)
    meter = Meter(
        out,
        world,
        first_step=restored.progress.step,
        durations=durations,
        run=run,
        num_samples=num_samples,
        training_flops=training_flops,
        counters={"bad_images": lambda: bad.count},
    )
    saver = Saver(
        out,
        engine,
        restored,
        settings=checkpoint,
        durations=durations,
        global_batch=run.global_batch,
        world=world,
        parts={"meter": meter, "bad_images": bad},
        shared={"guard": guard},
        ema=ema,
    )
    return AroundSteps(guard, meter, saver)
