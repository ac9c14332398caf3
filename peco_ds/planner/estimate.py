"""One stage on so many GPUs of one kind: how long a step takes and what the whole costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from peco_ds.errors import UserError
from peco_ds.planner.compute import (
    HOST_LINK_BYTES_S,
    PACES,
    offloaded_optimizer_seconds,
    optimizer_seconds,
    segment_seconds,
)
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
from peco_ds.planner.hardware import HARDWARE, Hardware, find_hardware
from peco_ds.planner.memory import checkpoint_bytes, host_bytes_per_node, saved_bytes
from peco_ds.planner.shapes import ELEMENT_BYTES
from peco_ds.planner.stages import Stage
from peco_ds.planner.step_cost import StepCost, StepInputs, closed_form
from peco_ds.planner.traffic import Collective, step_collectives

# Share of the typical bandwidth between GPUs, by pace; assumed. Neighbours on the same switches are what takes it away.
LINK_SHARE = {"slow": 0.7, "typical": 1.0, "fast": 1.1}
# between saves of a recipe without checkpoint.every_minutes, whose epochs or steps decide; assumed
NO_INTERVAL_MINUTES = 60.0
# a shard of tokens, which is what an interrupted tokenizing does again; assumed
SHARD_S = 120.0
CHECKPOINTING = ("none", "selective", "full")  # from the simplest


def checkpointing_of(stage: Stage) -> tuple[str, ...]:
    """The kinds of activation checkpointing that the stage's training has."""
    return CHECKPOINTING if stage.kind in ("pre-training", "fine-tuning") else CHECKPOINTING[:1]


@dataclass(frozen=True)
class Estimate:
    """A stage on so many GPUs, with one choice of settings.

    Quantities by pace (`compute.PACES`) take what is reached of data sheets' rates as slow, typical or fast.
    """

    stage: Stage
    hardware: Hardware
    gpus: int
    choice: DeepSpeedChoice
    micro_batch: int
    room: Room  # of the stage on these GPUs with this JSON

    @property
    def micro_steps(self) -> int:
        return self.stage.run.global_batch // (self.micro_batch * self.gpus) if self.stage.trains else 1

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.hardware.gpus_per_node)

    @property
    def precision(self) -> str:
        return self.stage.run.precision if self.stage.trains else self.stage.recipe.views.tokenizer_precision

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Of one optimiser step."""
        if not self.stage.trains or self.gpus == 1:
            return ()
        # rates fall from block to block
        groups = "segment" if self.stage.kind == "fine-tuning" else "whole"
        return step_collectives(
            self.stage.segments,
            ds_config=merged(self.stage, self.choice),
            precision=self.precision,
            micro_steps=self.micro_steps,
            ranks=self.gpus,
            groups=groups,
        )

    def inputs(self, pace: str = "typical") -> StepInputs:
        """What closed form and simulation of an optimiser step start from."""
        hardware = self.hardware
        return StepInputs(
            segments=tuple(
                segment_seconds(segment, self.micro_batch, hardware, self.precision, pace)
                for segment in self.stage.segments
            ),
            collectives=self.collectives,
            micro_steps=self.micro_steps,
            optimizer_s=self._optimizer_s,
            ranks=self.gpus,
            hardware=hardware,
            link_share=LINK_SHARE[pace],
        )

    @property
    def _optimizer_s(self) -> float:
        """Of a step, on this rank's part of the parameters.

        With what offloaded weights take on their way up, which a pass waits for.
        """
        part = self.stage.parameters / (self.gpus if self.choice.stage else 1)
        if self.choice.offload_device("optimizer") == "none":
            own = optimizer_seconds(part, self.hardware)
        else:
            own = offloaded_optimizer_seconds(part, min(self.gpus, self.hardware.gpus_per_node))
        fetched = (
            part * ELEMENT_BYTES[self.precision] * self.micro_steps
            if self.choice.offload_device("param") != "none"
            else 0.0
        )
        return own + fetched / HOST_LINK_BYTES_S

    @cached_property
    def _known_costs(self) -> dict[str, StepCost]:
        return {}

    def cost(self, pace: str = "typical") -> StepCost:
        """Of an optimiser step without its loader.

        Reckoned when a pace is first asked for: a recommendation compares many settings by their typical pace alone.
        """
        if pace not in self._known_costs:
            self._known_costs[pace] = closed_form(self.inputs(pace))
        return self._known_costs[pace]

    @property
    def costs(self) -> dict[str, StepCost]:
        """`cost` by pace; {} for tokenizing, which has no optimiser step."""
        return {pace: self.cost(pace) for pace in PACES} if self.stage.trains else {}

    def loader_images_s(self, pace: str = "typical") -> float:
        """Images (of tokenizing: views) a second that all loader processes give."""
        node_gpus = min(self.gpus, self.hardware.gpus_per_node)
        workers = min(self.hardware.cores_per_node, max(1, self.stage.recipe.data.num_workers) * node_gpus)
        return self.nodes * workers / (LOADER_PACE[pace] * loader_core_s(self.stage))

    def computed_images_s(self, pace: str = "typical") -> float:
        """Images a second over all GPUs if data never ran short."""
        if self.stage.trains:
            return self.stage.run.global_batch / self.cost(pace).seconds
        passed = sum(
            segment_seconds(segment, self.micro_batch, self.hardware, self.precision, pace).forward
            for segment in self.stage.segments
        )
        return self.gpus * self.micro_batch / passed

    def images_s(self, pace: str = "typical") -> float:
        """Images (of tokenizing: views) a second over all GPUs."""
        return min(self.computed_images_s(pace), self.loader_images_s(pace))

    def step_s(self, pace: str = "typical") -> float:
        """Seconds of an optimiser step; of tokenizing, of one pass."""
        return (self.stage.run.global_batch if self.stage.trains else self.gpus * self.micro_batch) / self.images_s(
            pace
        )

    def mfu(self, pace: str = "typical") -> float:
        """Model FLOP utilisation of the GPUs' peak; recomputation is no work."""
        return self.images_s(pace) * self.stage.model_flops / (self.gpus * self.hardware.peak_flops[self.precision])

    @property
    def loader_bound(self) -> bool:
        return self.loader_images_s() < self.computed_images_s()

    @property
    def loader_cores(self) -> float:
        """Of one node, that the GPUs' typical pace keeps busy."""
        return self.computed_images_s() * loader_core_s(self.stage) / self.nodes

    def training_hours(self, pace: str = "typical") -> float:
        """Without evaluations, saves, failures."""
        return self.stage.images / self.images_s(pace) / 3600

    def evaluation_hours(self, pace: str = "typical") -> float:
        """Of a classifier's evaluations: forward passes alone."""
        if not self.stage.evaluated:
            return 0.0
        segments = self.inputs(pace).segments
        forward = sum(segment.forward for segment in segments) / self.micro_batch
        return self.stage.evaluated * max(forward / self.gpus, 1 / self.loader_images_s(pace)) / 3600

    def interruptions(self, pace: str = "typical") -> dict[str, float]:
        """What `goodput` and `simulate_run` are told of saves and failures: a slow pace has many failures and slow
        restarts, a fast one few and quick ones.

        Tokenizing writes shard by shard: an interruption loses the shard in hand.
        """
        stage, place = self.stage, ("fast", "typical", "slow").index(pace)
        saves = dict(interval_s=SHARD_S, stall_s=0.0, write_s=0.0)
        if stage.trains:
            sizes = dict(stage=self.choice.stage, precision=self.precision, average=stage.averages)
            # the largest part, and its node's
            first = saved_bytes(stage.parameters, world_size=self.gpus, first_rank=True, **sizes)
            a_node = max(first, checkpoint_bytes(stage.parameters, **sizes) / self.nodes)
            saves = dict(
                interval_s=60 * self.minutes_between_saves,
                stall_s=stall_seconds(first),
                write_s=write_seconds(a_node, 1, self.hardware.storage_bytes_s),
            )
        return dict(
            nodes=self.nodes,
            **saves,
            restart_s=RESTART_S[place],
            failures_per_1000_node_days=FAILURES_PER_1000_NODE_DAYS[place],
        )

    @property
    def minutes_between_saves(self) -> float:
        """As the recipe says, or as is assumed where its epochs or steps decide."""
        return self.stage.recipe.checkpoint.every_minutes or NO_INTERVAL_MINUTES

    def running_hours(self, pace: str = "typical") -> float:
        """Of training and evaluations, without saves and failures."""
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
        """Of one node: what ZeRO has offloaded, and a save in flight."""
        if not self.stage.trains:
            return 0.0
        ranks = min(self.gpus, self.hardware.gpus_per_node)
        sizes = dict(
            stage=self.choice.stage,
            world_size=self.gpus,
            ranks_per_node=ranks,
            precision=self.precision,
            average=self.stage.averages,
        )
        return host_bytes_per_node(self.room.state, self.stage.parameters, **sizes)


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
    found = room(stage, hardware, gpus, choice)
    made = _as_asked(stage, hardware, gpus, choice, found, micro_batch)
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
    stage: Stage, hardware: Hardware, gpus: int, choice: DeepSpeedChoice, found: Room, micro_batch: int | None
) -> Estimate | None:
    """With the micro-batch that was asked for, or the largest up to the recipe's that divides and fits.

    None: there is none.
    """
    sizes = shares(stage, gpus) if stage.trains else range(1, stage.run.micro_batch + 1)
    fitting = [size for size in sizes if size <= min(micro_batch or stage.run.micro_batch, found.largest_micro_batch)]
    if not fitting or (micro_batch and micro_batch not in fitting):
        return None
    return Estimate(stage.with_run(micro_batch=fitting[-1]), hardware, gpus, choice, fitting[-1], found)


def fits(stage: Stage, hardware: Hardware, gpus: int, choice: DeepSpeedChoice) -> bool:
    """Whether `estimate` has an answer."""
    if stage.trains and not shares(stage, gpus):
        return False
    made = _as_asked(stage, hardware, gpus, choice, room(stage, hardware, gpus, choice), None)
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
        f"{found.used_bytes(smallest) / GIB:.1f} GiB a GPU, "
        f"which has {held:.1f} and keeps {KEPT_FREE:.0%} free; {_remedy(stage, hardware, gpus, choice)}"
    )


def _remedy(stage: Stage, hardware: Hardware, gpus: int, choice: DeepSpeedChoice) -> str:
    """What would fit: other settings on these GPUs, else more of them, else other ones."""
    others = [other for other in shipped() if other.name != choice.name]
    more = [count for count in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if count > gpus]
    for settings in ([choice], others):
        for kind in checkpointing_of(stage):
            for other in settings:
                if fits(stage.with_run(activation_checkpointing=kind), hardware, gpus, other):
                    return f"what fits there: --deepspeed_config {other.path} with run.activation_checkpointing={kind}"
    leanest = stage.with_run(activation_checkpointing=checkpointing_of(stage)[-1]) if stage.trains else stage
    for count in more:
        named = next((other for other in (choice, *others) if fits(leanest, hardware, count, other)), None)
        if named:
            return (
                f"no setting fits there; {count} {hardware.name} do with {named.name} and activation "
                f"checkpointing {leanest.run.activation_checkpointing}"
            )
    larger = [
        name for name in HARDWARE if any(fits(leanest, find_hardware(name), gpus, other) for other in (choice, *others))
    ]
    return (
        f"no number of them up to {MOST_GPUS} fits; {' or '.join(larger)} would"
        if larger
        else "no GPU of the catalogue fits; make the model, the image or the micro-batch smaller"
    )
