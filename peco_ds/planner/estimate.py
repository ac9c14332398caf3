"""One stage on so many GPUs of one kind: how long a step takes, what the whole costs, and which settings to take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peco_ds.errors import UserError
from peco_ds.planner.data_side import LOADER_PACE, loader_core_s
from peco_ds.planner.fitting import (
    GIB,
    KEPT_FREE,
    MOST_GPUS,
    DeepSpeedChoice,
    Room,
    merged,
    require_divides,
    require_known,
    room,
    shares,
    shipped,
)
from peco_ds.planner.goodput import (
    FAILURES_PER_1000_NODE_DAYS,
    RESTART_S,
    Goodput,
    goodput,
    stall_seconds,
    write_seconds,
)
from peco_ds.planner.hardware import HARDWARE, Hardware
from peco_ds.planner.memory import checkpoint_bytes, host_bytes_per_node, saved_bytes
from peco_ds.planner.shapes import ELEMENT_BYTES
from peco_ds.planner.stages import Stage
from peco_ds.planner.step_cost import (
    HOST_LINK_BYTES_S,
    PACES,
    StepCost,
    StepInputs,
    closed_form,
    offloaded_optimizer_seconds,
    optimizer_seconds,
    segment_seconds,
)
from peco_ds.planner.traffic import Collective, step_collectives

# Share of the typical bandwidth between GPUs, by pace; assumed. Neighbours on the same switches are what takes it away.
LINK_SHARE = {"slow": 0.7, "typical": 1.0, "fast": 1.1}
# Minutes between saves of a recipe without checkpoint.every_minutes, whose epochs or steps decide; assumed.
NO_INTERVAL_MINUTES = 60.0
# Seconds for a shard of tokens, which an interrupted tokenizing computes again; assumed.
SHARD_S = 120.0
# Kinds of activation checkpointing, the simplest first.
CHECKPOINTING = ("none", "selective", "full")
# Settings within five per cent of the quickest count as equally quick, because the model is no more exact than that.
SAME_SPEED = 1.05
# Number of micro-batches that are compared, the largest that fit.
SMALLER_MICRO_BATCHES = 3


def checkpointing_of(stage: Stage) -> tuple[str, ...]:
    """The kinds of activation checkpointing that the stage's training has."""
    return (
        CHECKPOINTING
        if stage.kind in ("pre-training", "fine-tuning", "segmentation", "detection")
        else CHECKPOINTING[:1]
    )


@dataclass(frozen=True)
class Estimate:
    """A stage on so many GPUs, with one choice of settings.

    Quantities by pace (`step_cost.PACES`) take what is reached of data sheets' rates as slow, typical or fast.
    """

    stage: Stage
    hardware: Hardware
    gpus: int
    choice: DeepSpeedChoice
    micro_batch: int
    # Memory of the stage on these GPUs with this JSON.
    room: Room

    @property
    def micro_steps(self) -> int:
        return self.stage.run.global_batch // (self.micro_batch * self.gpus) if self.stage.trains else 1

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.hardware.gpus_per_node)

    @property
    def node_gpus(self) -> int:
        """GPUs of one node that are used."""
        return min(self.gpus, self.hardware.gpus_per_node)

    @property
    def precision(self) -> str:
        return self.stage.run.precision if self.stage.trains else self.stage.recipe.views.tokenizer_precision

    @property
    def settings(self) -> str:
        """The settings in words: JSON, activation checkpointing, micro-batch x passes."""
        kind = self.stage.run.activation_checkpointing
        return (
            f"{self.choice.name}, activation checkpointing {kind}, micro-batch {self.micro_batch} x {self.micro_steps}"
        )

    # ------------------------------------------------------------------------------------------ a step

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Collectives of one optimiser step."""
        if not self.stage.trains or self.gpus == 1:
            return ()
        return step_collectives(
            self.stage.segments,
            ds_config=merged(self.stage, self.choice),
            precision=self.precision,
            micro_steps=self.micro_steps,
            ranks=self.gpus,
            # In fine-tuning the learning rate differs from block to block, so each has its own parameter groups.
            groups="segment" if self.stage.kind in ("fine-tuning", "segmentation", "detection") else "whole",
        )

    def inputs(self, pace: str = "typical") -> StepInputs:
        """What the closed form of an optimiser step starts from."""
        return StepInputs(
            segments=tuple(
                segment_seconds(segment, self.micro_batch, self.hardware, self.precision, pace)
                for segment in self.stage.segments
            ),
            collectives=self.collectives,
            micro_steps=self.micro_steps,
            optimizer_s=self._optimizer_s,
            ranks=self.gpus,
            hardware=self.hardware,
            link_share=LINK_SHARE[pace],
        )

    @property
    def _optimizer_s(self) -> float:
        """Seconds of the optimiser in one step, on this rank's part of the parameters.

        They include the way of offloaded weights to the GPU, which a pass waits for.
        """
        part = self.stage.parameters / (self.gpus if self.choice.stage else 1)
        on_gpu = self.choice.offload_device("optimizer") == "none"
        own = optimizer_seconds(part, self.hardware) if on_gpu else offloaded_optimizer_seconds(part, self.node_gpus)
        if self.choice.offload_device("param") == "none":
            return own
        return own + part * ELEMENT_BYTES[self.precision] * self.micro_steps / HOST_LINK_BYTES_S

    @cached_property
    def _known_costs(self) -> dict[str, StepCost]:
        return {}

    def cost(self, pace: str = "typical") -> StepCost:
        """Cost of an optimiser step without its loader.

        Computed when a pace is first asked for: a recommendation compares many settings by their typical pace alone.
        """
        if pace not in self._known_costs:
            self._known_costs[pace] = closed_form(self.inputs(pace))
        return self._known_costs[pace]

    @property
    def costs(self) -> dict[str, StepCost]:
        """`cost` by pace; {} for tokenizing, which has no optimiser step."""
        return {pace: self.cost(pace) for pace in PACES} if self.stage.trains else {}

    # ------------------------------------------------------------------------------------------- speed

    def loader_images_s(self, pace: str = "typical") -> float:
        """Images (of tokenizing: views) a second that all loader processes give."""
        workers = min(self.hardware.cores_per_node, max(1, self.stage.recipe.data.num_workers) * self.node_gpus)
        return self.nodes * workers / (LOADER_PACE[pace] * loader_core_s(self.stage))

    def computed_images_s(self, pace: str = "typical") -> float:
        """Images a second over all GPUs if data never ran short."""
        if self.stage.trains:
            return self.stage.run.global_batch / self.cost(pace).seconds
        passed = sum(segment.forward for segment in self.inputs(pace).segments)
        return self.gpus * self.micro_batch / passed

    def images_s(self, pace: str = "typical") -> float:
        """Images (of tokenizing: views) a second over all GPUs."""
        return min(self.computed_images_s(pace), self.loader_images_s(pace))

    def step_s(self, pace: str = "typical") -> float:
        """Seconds of an optimiser step; of tokenizing, of one pass."""
        images = self.stage.run.global_batch if self.stage.trains else self.gpus * self.micro_batch
        return images / self.images_s(pace)

    def mfu(self, pace: str = "typical") -> float:
        """Model FLOP utilisation of the GPUs' peak; recomputation is no work."""
        return self.images_s(pace) * self.stage.model_flops / (self.gpus * self.hardware.peak_flops[self.precision])

    @property
    def loader_bound(self) -> bool:
        return self.loader_images_s() < self.computed_images_s()

    @property
    def loader_cores(self) -> float:
        """Loader cores of one node that the GPUs' typical pace keeps busy."""
        return self.computed_images_s() * loader_core_s(self.stage) / self.nodes

    # ------------------------------------------------------------------------------------------- hours

    def training_hours(self, pace: str = "typical") -> float:
        """Hours of training, without evaluations, saves and failures."""
        return self.stage.images / self.images_s(pace) / 3600

    def evaluation_hours(self, pace: str = "typical") -> float:
        """Hours of a classifier's evaluations: forward passes alone."""
        if not self.stage.evaluated:
            return 0.0
        forward = sum(segment.forward for segment in self.inputs(pace).segments) / self.micro_batch
        return self.stage.evaluated * max(forward / self.gpus, 1 / self.loader_images_s(pace)) / 3600

    def interruptions(self, pace: str = "typical") -> dict[str, Any]:
        """What `goodput` is told of saves and failures: a slow pace has many failures and slow restarts, a fast one few
        and quick ones.

        Tokenizing writes shard by shard: an interruption loses the shard in hand.
        """
        stage, place = self.stage, ("fast", "typical", "slow").index(pace)
        saves = dict(interval_s=SHARD_S, stall_s=0.0, write_s=0.0)
        if stage.trains:
            sizes: dict[str, Any] = dict(stage=self.choice.stage, precision=self.precision, average=stage.averages)
            # Rank 0 writes the largest part; `a_node` is the part of its node.
            first = saved_bytes(stage.parameters, world_size=self.gpus, first_rank=True, **sizes)
            a_node = max(first, checkpoint_bytes(stage.parameters, **sizes) / self.nodes)
            saves = dict(
                interval_s=60 * self.minutes_between_saves,
                stall_s=stall_seconds(first),
                write_s=write_seconds(a_node, 1, self.hardware.storage_bytes_s),
            )
        failures = dict(restart_s=RESTART_S[place], failures_per_1000_node_days=FAILURES_PER_1000_NODE_DAYS[place])
        return dict(nodes=self.nodes, **saves, **failures)

    @property
    def minutes_between_saves(self) -> float:
        """Minutes between saves, as the recipe says or as is assumed where its epochs or steps decide."""
        return self.stage.recipe.checkpoint.every_minutes or NO_INTERVAL_MINUTES

    def running_hours(self, pace: str = "typical") -> float:
        """Hours of training and evaluations, without saves and failures."""
        return self.training_hours(pace) + self.evaluation_hours(pace)

    def goodput(self, pace: str = "typical") -> Goodput:
        return goodput(3600 * self.running_hours(pace), **self.interruptions(pace))

    def hours(self, pace: str = "typical") -> float:
        """Wall time of the stage, with evaluations, saves, failures and what they lose."""
        return self.running_hours(pace) / self.goodput(pace).share

    def gpu_hours(self, pace: str = "typical") -> float:
        return self.gpus * self.hours(pace)

    @property
    def host_bytes(self) -> float:
        """Host memory of one node: what ZeRO has offloaded, and a save in flight."""
        if not self.stage.trains:
            return 0.0
        return host_bytes_per_node(
            self.room.state,
            self.stage.parameters,
            stage=self.choice.stage,
            world_size=self.gpus,
            ranks_per_node=self.node_gpus,
            precision=self.precision,
            average=self.stage.averages,
        )


# ------------------------------------------------------------------------------- with the recipe's settings


def estimate(
    stage: Stage, hardware: Hardware, gpus: int, choice: DeepSpeedChoice, *, micro_batch: int | None = None
) -> Estimate:
    """A stage with the recipe's own settings; its micro-batch is made smaller where it does not divide or fit.

    Args:
        micro_batch: this one and no other.
    Raises: UserError if the GPUs do not divide the batch, no micro-batch fits, or a node lacks the host memory for what
        is offloaded; it says what would fit.
    """
    require_divides(stage, gpus, hardware)
    require_known(choice)
    made = _as_asked(stage, hardware, gpus, choice, micro_batch)
    if made is None:
        raise UserError(does_not_fit(stage, hardware, gpus, choice, micro_batch))
    if made.host_bytes > hardware.host_memory_bytes:
        raise UserError(
            f"{stage.name}: {choice.name} keeps {made.host_bytes / GIB:.0f} GiB on the host of each node, "
            f"{hardware.name} has {hardware.host_memory_bytes / GIB:.0f} GiB there; "
            f"{_remedy(stage, hardware, gpus, choice)}"
        )
    return made


def _as_asked(
    stage: Stage, hardware: Hardware, gpus: int, choice: DeepSpeedChoice, micro_batch: int | None = None
) -> Estimate | None:
    """Estimate with the micro-batch that was asked for, or the largest up to the recipe's that divides and fits.

    None if there is no such micro-batch.
    """
    found = room(stage, hardware, gpus, choice)
    sizes = shares(stage, gpus) if stage.trains else range(1, stage.run.micro_batch + 1)
    fitting = [size for size in sizes if size <= min(micro_batch or stage.run.micro_batch, found.largest_micro_batch)]
    if not fitting or (micro_batch and micro_batch not in fitting):
        return None
    return Estimate(stage.with_run(micro_batch=fitting[-1]), hardware, gpus, choice, fitting[-1], found)


def fits(stage: Stage, hardware: Hardware, gpus: int, choice: DeepSpeedChoice) -> bool:
    """Whether `estimate` has an answer."""
    if stage.trains and not shares(stage, gpus):
        return False
    made = _as_asked(stage, hardware, gpus, choice)
    return made is not None and made.host_bytes <= hardware.host_memory_bytes


def does_not_fit(
    stage: Stage, hardware: Hardware, gpus: int, choice: DeepSpeedChoice, micro_batch: int | None = None
) -> str:
    """One line: what is needed, what there is, and what would fit."""
    found, held = room(stage, hardware, gpus, choice), hardware.memory_bytes / GIB
    smallest = micro_batch or (shares(stage, gpus)[0] if stage.trains else 1)
    return (
        f"{stage.name} on {gpus} {hardware.name}: {choice.name} with activation checkpointing "
        f"{stage.run.activation_checkpointing} and micro-batch {smallest} needs "
        f"{found.used_bytes(smallest) / GIB:.1f} GiB a GPU, which has {held:.1f} and keeps {KEPT_FREE:.0%} free; "
        f"{_remedy(stage, hardware, gpus, choice)}"
    )


def _remedy(stage: Stage, hardware: Hardware, gpus: int, choice: DeepSpeedChoice) -> str:
    """What would fit: other settings on these GPUs, else more of them, else other ones."""
    others = [other for other in shipped() if other.name != choice.name]
    for settings in ([choice], others):
        for kind in checkpointing_of(stage):
            for other in settings:
                if fits(stage.with_run(activation_checkpointing=kind), hardware, gpus, other):
                    return f"what fits there: --deepspeed_config {other.path} with run.activation_checkpointing={kind}"
    leanest = stage.with_run(activation_checkpointing=checkpointing_of(stage)[-1]) if stage.trains else stage
    for count in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        for other in (choice, *others) if count > gpus else ():
            if fits(leanest, hardware, count, other):
                return (
                    f"no setting fits there; {count} {hardware.name} do with {other.name} and activation checkpointing "
                    f"{leanest.run.activation_checkpointing}"
                )
    larger = [
        name for name, machine in HARDWARE.items() if any(fits(leanest, machine, gpus, it) for it in (choice, *others))
    ]
    if larger:
        return f"no number of them up to {MOST_GPUS} fits; {' or '.join(larger)} would"
    return "no GPU of the catalogue fits; make the model, the image or the micro-batch smaller"


# --------------------------------------------------------------------------- with the recommended settings


@dataclass(frozen=True)
class Recommendation:
    best: Estimate
    reason: str


def recommend(stage: Stage, hardware: Hardware, gpus: int, asked: DeepSpeedChoice) -> Recommendation:
    """The settings of the shortest typical step.

    Among settings that are as quick within five per cent, the recipe's own are taken, else the simplest.

    Compared: the JSON that was asked for and those of ds_configs (without ZeRO-0, which only costs memory, and with
    offload only where nothing fits without it), every kind of activation checkpointing, the largest micro-batches that
    divide and fit. The recipe's other settings stand.

    Raises: UserError if nothing fits.
    """
    require_known(asked)
    require_divides(stage, gpus, hardware)
    candidates: list[Estimate] = []
    for offload in (False, True):
        candidates = candidates or [
            made
            for made in _candidates(stage, hardware, gpus, asked, offload)
            if made.host_bytes <= hardware.host_memory_bytes
        ]
    if not candidates:
        raise UserError(does_not_fit(stage, hardware, gpus, asked))
    quickest = min(map(_typical_s, candidates))
    as_quick = [made for made in candidates if _typical_s(made) <= SAME_SPEED * quickest]
    best = min(as_quick, key=lambda made: _plainness(made, stage, asked))
    return Recommendation(best, _reason(best, candidates))


def _typical_s(made: Estimate) -> float:
    """Typical seconds of an optimiser step; for tokenizing, of one view."""
    return (made.stage.run.global_batch if made.stage.trains else 1) / made.computed_images_s()


def _plainness(made: Estimate, stage: Stage, asked: DeepSpeedChoice) -> tuple:
    """Smallest for what is recommended among equals: few changes of what was asked for, no recomputation, the lowest
    ZeRO stage above 0 that fits.
    """
    kind = made.stage.run.activation_checkpointing
    changes = (made.choice != asked) + (kind != stage.run.activation_checkpointing)
    distance = abs(made.micro_batch - stage.run.micro_batch)
    return changes, CHECKPOINTING.index(kind), made.choice.stage or 9, distance


def _candidates(
    stage: Stage, hardware: Hardware, gpus: int, asked: DeepSpeedChoice, offload: bool
) -> Iterator[Estimate]:
    if not stage.trains:
        if fits(stage, hardware, gpus, asked):
            yield estimate(stage, hardware, gpus, asked)
        return
    others = [other for other in shipped() if other.raw != asked.raw and other.offloads == offload and other.stage]
    for kind in checkpointing_of(stage):
        tried = stage.with_run(activation_checkpointing=kind)
        for choice in (asked, *others):
            found = room(tried, hardware, gpus, choice)
            fitting = [size for size in shares(tried, gpus) if size <= found.largest_micro_batch]
            for size in fitting[-SMALLER_MICRO_BATCHES:]:
                yield Estimate(tried.with_run(micro_batch=size), hardware, gpus, choice, size, found)


def _reason(best: Estimate, candidates: list[Estimate]) -> str:
    """The chosen step beside the best with another ZeRO stage or another kind of activation checkpointing."""
    if not best.stage.trains:
        return "every GPU works by itself"
    kind, micro_batch = best.stage.run.activation_checkpointing, best.micro_batch
    rivals = {f"ZeRO-{stage}": [made for made in candidates if made.choice.stage == stage] for stage in range(4)}
    del rivals[f"ZeRO-{best.choice.stage}"]
    for another in CHECKPOINTING:
        if another != kind:
            rivals[f"checkpointing {another}"] = [
                made for made in candidates if made.stage.run.activation_checkpointing == another
            ]
    parts = [f"step {_told(best)}"]
    for label, others in rivals.items():
        if others:
            other = min(others, key=_typical_s)
            at = f" at micro-batch {other.micro_batch}" if other.micro_batch != micro_batch else ""
            parts.append(f"{label} {_told(other)}{at}")
    spare = (best.hardware.memory_bytes - best.room.used_bytes(micro_batch)) / GIB
    limit = (
        "the whole of a GPU's part of the batch"
        if best.micro_steps == 1
        else f"of those that divide; {best.room.largest_micro_batch} would fit"
    )
    return f"{', '.join(parts)}; micro-batch {micro_batch} ({limit}) leaves {spare:.0f} GiB free"


def _told(made: Estimate) -> str:
    """A step, and what of it is communication that nothing hides where that matters: ZeRO-1 and 2 sum or gather when
    the passes are over.
    """
    cost = made.cost()
    exposed = f" ({cost.exposed_s:.2g} s of communication not hidden)" if cost.exposed_s > 0.05 * cost.seconds else ""
    return f"{cost.seconds:.3g} s{exposed}"
