"""Which settings a stage should run with on so many GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peco_ds.errors import UserError
from peco_ds.planner.estimate import CHECKPOINTING, Estimate, checkpointing_of, does_not_fit, estimate, fits
from peco_ds.planner.fitting import GIB, DeepSpeedChoice, require_divides, require_known, room, shares, shipped
from peco_ds.planner.hardware import Hardware
from peco_ds.planner.stages import Stage

# settings within five per cent of the quickest are taken for as quick: the model is no better than that
SAME_SPEED = 1.05
SMALLER_MICRO_BATCHES = 3  # the largest that fit are compared


@dataclass(frozen=True)
class Recommendation:
    best: Estimate
    reason: str


def recommend(stage: Stage, hardware: Hardware, gpus: int, asked: DeepSpeedChoice) -> Recommendation:
    """The settings of the shortest typical step.

    Of those that are as quick within five per cent the recipe's own, else the simplest.

    Compared: the JSON that was asked for and those of ds_configs (without ZeRO-0, which only costs memory, and with
    offload only where nothing fits without it), every kind of activation checkpointing, the largest micro-batches that
    divide and fit. The recipe's other settings stand.

    Raises: UserError if nothing fits.
    """
    require_known(asked)
    candidates: list[Estimate] = []
    for offload in (False, True):
        candidates = candidates or [
            made
            for made in _candidates(stage, hardware, gpus, asked, offload)
            if made.host_bytes <= hardware.host_memory_bytes
        ]
    if not candidates:
        raise UserError(does_not_fit(stage, hardware, gpus, asked))
    quickest = min(_typical_s(made) for made in candidates)
    best = min(
        (made for made in candidates if _typical_s(made) <= SAME_SPEED * quickest),
        key=lambda made: _plainness(made, stage, asked),
    )
    return Recommendation(best, _reason(best, candidates))


def _typical_s(made: Estimate) -> float:
    return made.stage.run.global_batch / made.computed_images_s() if made.stage.trains else 1 / made.computed_images_s()


def _plainness(made: Estimate, stage: Stage, asked: DeepSpeedChoice) -> tuple:
    """Smallest for what is recommended among equals: few changes of what was asked for, no recomputation, the lowest
    ZeRO stage above 0 that fits.
    """
    changes = (made.choice != asked, made.stage.run.activation_checkpointing != stage.run.activation_checkpointing)
    return (
        sum(changes),
        CHECKPOINTING.index(made.stage.run.activation_checkpointing),
        made.choice.stage or 9,
        abs(made.micro_batch - stage.run.micro_batch),
    )


def _candidates(
    stage: Stage, hardware: Hardware, gpus: int, asked: DeepSpeedChoice, offload: bool
) -> Iterable[Estimate]:
    require_divides(stage, gpus, hardware)
    if not stage.trains:
        if fits(stage, hardware, gpus, asked):
            yield estimate(stage, hardware, gpus, asked)
        return
    choices = [
        asked,
        *(other for other in shipped() if other.raw != asked.raw and other.offloads == offload and other.stage),
    ]
    for kind in checkpointing_of(stage):
        tried = stage.with_run(activation_checkpointing=kind)
        for choice in choices:
            found = room(tried, hardware, gpus, choice)
            for size in [size for size in shares(tried, gpus) if size <= found.largest_micro_batch][
                -SMALLER_MICRO_BATCHES:
            ]:
                yield Estimate(tried.with_run(micro_batch=size), hardware, gpus, choice, size, found)


def _told(made: Estimate) -> str:
    """A step, and what of it is communication that nothing hides where that matters: ZeRO-1 and 2 sum or gather when
    the passes are over.
    """
    cost = made.cost()
    return f"{cost.seconds:.3g} s" + (
        f" ({cost.exposed_s:.2g} s of communication not hidden)" if cost.exposed_s > 0.05 * cost.seconds else ""
    )


def _reason(best: Estimate, candidates: list[Estimate]) -> str:
    if not best.stage.trains:
        return "every GPU works by itself"
    parts = [f"step {_told(best)}"]

    def rival(label, keep):
        others = [made for made in candidates if keep(made)]
        if others:
            other = min(others, key=_typical_s)
            parts.append(
                f"{label} {_told(other)}"
                + (f" at micro-batch {other.micro_batch}" if other.micro_batch != best.micro_batch else "")
            )

    kind = best.stage.run.activation_checkpointing
    for stage in sorted({made.choice.stage for made in candidates} - {best.choice.stage}):
        rival(f"ZeRO-{stage}", lambda made, stage=stage: made.choice.stage == stage)
    for other in CHECKPOINTING:
        if other != kind:
            rival(f"checkpointing {other}", lambda made, other=other: made.stage.run.activation_checkpointing == other)
    spare = (best.hardware.memory_bytes - best.room.used_bytes(best.micro_batch)) / GIB
    limit = (
        "the whole of a GPU's part of the batch"
        if best.micro_steps == 1
        else f"of those that divide; {best.room.largest_micro_batch} would fit"
    )
    return f"{', '.join(parts)}; micro-batch {best.micro_batch} ({limit}) leaves {spare:.0f} GiB free"
