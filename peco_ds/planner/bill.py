"""What a chain of stages costs on so many GPUs, with the recipes' own settings and with the recommended ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from peco_ds.errors import UserError
from peco_ds.planner.chain import DEFAULT_JSON, Chain
from peco_ds.planner.data_side import SOURCE_BYTES, checkpoints_bytes, token_set_bytes
from peco_ds.planner.estimate import Estimate, Recommendation, estimate, recommend
from peco_ds.planner.fitting import DeepSpeedChoice, gpus_that_divide, shares, shipped
from peco_ds.planner.hardware import Hardware
from peco_ds.planner.stages import Kind, Stage
from peco_ds.planner.step_cost import PACES, closed_form
from peco_ds.planner.traffic import traffic_by_operation

# Half of the GPUs are worth it below this many times the hours.
WORTH_HALF = 1.25


@dataclass(frozen=True)
class Bill:
    """A chain on so many GPUs of one kind."""

    chain: Chain
    hardware: Hardware
    gpus: int
    # Estimates with the recipes' own settings; () where only a recommendation was asked for.
    written: tuple[Estimate, ...]
    recommended: tuple[Recommendation, ...]
    # Stages that do not fit as written; the recommended settings stand in their place.
    unfit: tuple[Stage, ...] = ()

    def hours(self, pace: str = "typical") -> float:
        """Wall hours of all stages, one after the other, with the recommended settings."""
        return sum(found.best.hours(pace) for found in self.recommended)

    def gpu_hours(self, pace: str = "typical") -> float:
        """GPU-hours of all stages; those that use fewer GPUs than there are give the others back."""
        return sum(found.best.gpu_hours(pace) for found in self.recommended)

    def held_gpu_hours(self, pace: str = "typical") -> float:
        """GPU-hours if all GPUs are held from the first stage to the last."""
        return self.gpus * self.hours(pace)

    @property
    def shown(self) -> tuple[Estimate, ...]:
        """Estimates as written where those were asked for, else as recommended."""
        return self.written or tuple(found.best for found in self.recommended)

    @property
    def main(self) -> Estimate:
        """The stage that was asked for, with the recommended settings."""
        return self.recommended[self.chain.stages.index(self.chain.main)].best

    @property
    def mains(self) -> list[Estimate]:
        """The stage that was asked for: as shown, and as recommended where that differs."""
        shown = self.shown[self.chain.stages.index(self.chain.main)]
        return [shown] if shown == self.main else [shown, self.main]


def make_bill(
    chain: Chain, hardware: Hardware, gpus: int, asked: DeepSpeedChoice | None = None, *, as_written: bool = True
) -> Bill:
    """Estimates of every stage.

    Args:
        asked: DeepSpeed JSON of the main stage; None: its entry point's own.
        as_written: also with the recipes' own settings.
    Raises: UserError as `estimate`: for the main stage if the GPUs do not divide its batch, for any stage that fits
        nowhere.
    """
    written, recommended, unfit = [], [], []
    for stage in chain.stages:
        is_main, choice = stage is chain.main, _choice_of(stage.kind, asked, chain.main.kind)
        count = gpus if is_main else gpus_that_divide(stage, gpus, hardware)
        if as_written and is_main:
            written.append(estimate(stage, hardware, count, choice))
        found = recommend(stage, hardware, count, choice)
        if as_written and not is_main:
            try:
                written.append(estimate(stage, hardware, count, choice))
            except UserError:
                written.append(found.best)
                unfit.append(stage)
        recommended.append(found if is_main else _on_fewer(found, stage, choice))
    return Bill(chain, hardware, gpus, tuple(written), tuple(recommended), tuple(unfit))


def _choice_of(kind: Kind, asked: DeepSpeedChoice | None, main: Kind) -> DeepSpeedChoice:
    """The JSON of a stage: the one asked for is the main stage's, the others take their entry point's own."""
    if asked is not None and kind == main:
        return asked
    return next(choice for choice in shipped() if choice.name == DEFAULT_JSON[kind])


def _on_fewer(found: Recommendation, stage: Stage, choice: DeepSpeedChoice) -> Recommendation:
    """The same stage on half of the GPUs, and half of those, as long as a half takes less than `WORTH_HALF` times as
    long: short stages do not scale as the long one does.
    """
    made, half, node = found.best, found.best.gpus // 2, found.best.hardware.gpus_per_node
    if not half or (stage.trains and not shares(stage, half)) or (half > node and half % node):
        return found
    try:
        fewer = recommend(stage, made.hardware, half, choice)
    except UserError:
        # Fewer GPUs may lack the memory.
        return found
    return _on_fewer(fewer, stage, choice) if fewer.best.hours() < WORTH_HALF * made.hours() else found


def bad_node_costs(made: Estimate) -> dict[str, float]:
    """How much longer a step of a training takes, as a share, when one node is slow; {} on a single node.

    All ranks wait for its GPUs where they compute longer; every ring crosses its network where that is slow.
    """
    if made.nodes == 1 or not made.stage.trains:
        return {}
    inputs, usual = made.inputs(), made.cost().seconds
    slow = {f"computes {words}": replace(inputs, slow_node=times) for words, times in _SLOWER.items()}
    for words, share in _NETWORKS.items():
        network = made.hardware.network_bytes_s * share
        slow[f"has its network at {words}"] = replace(inputs, hardware=replace(made.hardware, network_bytes_s=network))
    return {case: closed_form(changed).seconds / usual - 1 for case, changed in slow.items()}


_SLOWER = {"10% longer": 1.1, "twice as long": 2.0}
_NETWORKS = {"a half": 0.5, "a tenth": 0.1}


# ---------------------------------------------------------------------------------------- plain values


def storage_bytes(made: Sequence[Estimate]) -> dict[str, float]:
    """Bytes on the shared file system by what lies there."""
    found: dict[str, float] = {"image shards": made[0].stage.num_samples * SOURCE_BYTES}
    for each in made:
        if each.stage.kind == "tokenizing" or (each.stage.kind == "pre-training" and "token shards" not in found):
            found["token shards"] = token_set_bytes(each.stage)
        if each.stage.trains:
            found[f"checkpoints of {each.stage.name}"] = checkpoints_bytes(each.stage, each.choice.raw)
    return found


def memory_parts(made: Estimate) -> dict[str, float]:
    """Bytes on one GPU by part, and their total, in which what is reserved is too."""
    state = made.room.state
    return {
        **{name: getattr(state, name) for name in ("weights", "gradients", "optimizer", "buffers")},
        "fixed": made.room.fixed_bytes,
        "activations": made.micro_batch * made.room.bytes_per_image,
        "total": made.room.used_bytes(made.micro_batch),
    }


def bill_facts(bill: Bill) -> dict:
    """A bill as JSON holds it: numbers in bytes, seconds, FLOP, hours."""
    return {
        "hardware": asdict(bill.hardware),
        "gpus": bill.gpus,
        "written": [_facts(made) for made in bill.written],
        "recommended": [_facts(found.best) | {"reason": found.reason} for found in bill.recommended],
        "total_hours": {pace: bill.hours(pace) for pace in PACES},
        "total_gpu_hours": {pace: bill.gpu_hours(pace) for pace in PACES},
        "held_gpu_hours": {pace: bill.held_gpu_hours(pace) for pace in PACES},
        "storage_bytes": storage_bytes(bill.shown),
    }


def _facts(made: Estimate) -> dict:
    stage = made.stage
    facts = {
        "stage": stage.kind,
        "recipe": stage.recipe.name,
        "gpus": made.gpus,
        "images": stage.images,
        "parameters": stage.parameters,
        "model_flops_per_image": stage.model_flops,
        "micro_batch": made.micro_batch,
        "largest_micro_batch": made.room.largest_micro_batch,
        "memory_bytes": memory_parts(made),
        "loader_cores_a_node": made.loader_cores,
        "loader_bound": made.loader_bound,
        "by_pace": {
            pace: {
                "images_s": made.images_s(pace),
                "mfu": made.mfu(pace),
                "hours": made.hours(pace),
                "gpu_hours": made.gpu_hours(pace),
                "goodput": asdict(made.goodput(pace)),
            }
            for pace in PACES
        },
    }
    if not stage.trains:
        return facts
    traffic = traffic_by_operation(made.collectives, made.gpus)
    return facts | {
        "deepspeed_config": made.choice.name,
        "zero_stage": made.choice.stage,
        "activation_checkpointing": stage.run.activation_checkpointing,
        "micro_steps": made.micro_steps,
        "steps": stage.durations.total_steps,
        "host_bytes_a_node": made.host_bytes,
        "traffic": {name: asdict(found) for name, found in traffic.items()},
        "step": {pace: asdict(cost) for pace, cost in made.costs.items()},
    }
