"""The estimates of a chain as text and as plain values: what it costs, of what that is made, and on which assumptions
it rests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil

from peco_ds.errors import UserError
from peco_ds.planner.chain import DEFAULT_JSON, Chain
from peco_ds.planner.compute import PACES
from peco_ds.planner.data_side import SOURCE_BYTES, checkpoints_bytes, loader_core_s, token_set_bytes
from peco_ds.planner.estimate import Estimate, estimate
from peco_ds.planner.fitting import GIB, DeepSpeedChoice, gpus_that_divide, shares, shipped
from peco_ds.planner.hardware import Hardware
from peco_ds.planner.recommend import Recommendation, recommend
from peco_ds.planner.simulation import simulate_run, simulate_step
from peco_ds.planner.stages import Kind, Stage
from peco_ds.planner.traffic import traffic_by_operation

# so many times the hours at most, for half of the GPUs
WORTH_HALF = 1.25


@dataclass(frozen=True)
class Bill:
    """A chain on so many GPUs of one kind."""

    chain: Chain
    hardware: Hardware
    gpus: int
    # settings as the recipes have them; () where a recommendation alone was asked for
    written: tuple[Estimate, ...]
    recommended: tuple[Recommendation, ...]
    # neighbours that do not fit as written, in whose place the recommended settings stand
    unfit: tuple[str, ...] = ()

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
        """As written where that was asked for, else as recommended."""
        return self.written or tuple(found.best for found in self.recommended)

    @property
    def mains(self) -> list[Estimate]:
        """The stage that was asked for: as shown, and as recommended where that differs."""
        shown = self.shown[self.chain.stages.index(self.chain.main)]
        return [shown] if shown == self.main else [shown, self.main]

    @property
    def main(self) -> Estimate:
        """The stage that was asked for, with the recommended settings."""
        return self.recommended[self.chain.stages.index(self.chain.main)].best


def choice_of(kind: Kind, asked: DeepSpeedChoice | None, main: Kind) -> DeepSpeedChoice:
    """The JSON of a stage: the one asked for is the main stage's, the others take their entry point's own."""
    if asked is not None and kind == main:
        return asked
    return next(choice for choice in shipped() if choice.name == DEFAULT_JSON[kind])


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
        choice = choice_of(stage.kind, asked, chain.main.kind)
        count = gpus if stage is chain.main else gpus_that_divide(stage, gpus, hardware)
        if as_written and stage is chain.main:
            written.append(estimate(stage, hardware, count, choice))
        found = recommend(stage, hardware, count, choice)
        if as_written and stage is not chain.main:
            try:
                written.append(estimate(stage, hardware, count, choice))
            except UserError:
                written.append(found.best)
                unfit.append(
                    f"  {stage.name}: does not fit as its recipe is written; the recommended settings stand there"
                )
        recommended.append(found if stage is chain.main else _on_fewer(found, stage, choice))
    return Bill(chain, hardware, gpus, tuple(written), tuple(recommended), tuple(unfit))


def _on_fewer(found: Recommendation, stage: Stage, choice: DeepSpeedChoice) -> Recommendation:
    """The same stage on half of the GPUs, and half of those, as long as a half takes less than `WORTH_HALF` times as
    long: short stages do not scale as the long one does.
    """
    made = found.best
    half = made.gpus // 2
    if (
        made.gpus < 2
        or (stage.trains and not shares(stage, half))
        or (half > (node := made.hardware.gpus_per_node) and half % node)
    ):
        return found
    try:
        fewer = recommend(stage, made.hardware, half, choice)
    except UserError:  # they have not the memory
        return found
    return _on_fewer(fewer, stage, choice) if fewer.best.hours() < WORTH_HALF * made.hours() else found


# ------------------------------------------------------------------------------------------------ text

HEADS = (
    "stage",
    "GPUs",
    "DeepSpeed",
    "checkpointing",
    "micro-batch x passes",
    "GiB a GPU",
    "step s",
    "images/s",
    "MFU",
    "hours",
    "GPU-hours",
)


def stage_row(made: Estimate) -> list[str]:
    """One line of the chain's table; ranges from the fast to the slow pace."""
    stage = made.stage
    used = made.room.used_bytes(made.micro_batch)
    return [
        stage.name,
        str(made.gpus),
        made.choice.name.removesuffix(".json") if stage.trains else "-",
        stage.run.activation_checkpointing if stage.trains else "-",
        f"{made.micro_batch} x {made.micro_steps}" if stage.trains else f"{made.micro_batch}",
        f"{used / GIB:.1f} of {made.hardware.memory_bytes / GIB:.0f}",
        f"{made.step_s():.3g}" if stage.trains else "-",
        f"{made.images_s():,.0f}" + ("*" if made.loader_bound else ""),
        f"{made.mfu():.0%} ({made.mfu('slow'):.0%} to {made.mfu('fast'):.0%})",
        ranged(made.hours),
        ranged(made.gpu_hours),
    ]


def ranged(quantity) -> str:
    """Typical, and from the fast to the slow pace."""
    return f"{figure(quantity('typical'))} ({figure(quantity('fast'))} to {figure(quantity('slow'))})"


def figure(value: float) -> str:
    """Three figures, thousands with commas."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def bill_text(bill: Bill, *, assumed: bool) -> str:
    """One bill in full, without a final newline.

    Args:
        assumed: the number of images is a guess.
    """
    main, hardware = bill.chain.main, bill.hardware
    nodes = -(-bill.gpus // hardware.gpus_per_node)
    alone = main.kind == "pre-training" and len(bill.chain.stages) == 1
    lines = [
        f"{main.name}{'' if len(bill.chain.stages) == 1 else ' and what belongs to it'}, on "
        f"{bill.gpus} {hardware.title} ({nodes} node{'s' if nodes > 1 else ''}); {main.num_samples:,} "
        "images" + (" (assumed: ImageNet-1K; no set was read)" if assumed else ""),
        *(
            [
                "No tokenizer and no fine-tuning are known for this recipe; name them by --tokenizer_recipe "
                "and --finetune_recipes."
            ]
            if alone
            else []
        ),
        "",
    ]
    best = tuple(found.best for found in bill.recommended)
    if bill.written:
        lines += ["As the recipes are written:", *_table(bill, bill.written), *bill.unfit, ""]
    if best == bill.written:
        lines += ["Recommended for these GPUs: the same."]
    else:
        lines += ["Recommended for these GPUs:", *_table(bill, best)]
    lines += [
        "",
        "Why:",
        *(
            f"  {found.best.stage.name}: {found.reason}; {overrides_of(found.best)}"
            for found in bill.recommended
            if found.best.stage.trains
        ),
    ]
    for made in bill.mains:
        lines += ["", *detail_lines(made)] if made.stage.trains else []
    return "\n".join([*lines, "", *storage_lines(bill)])


def _table(bill: Bill, made: Sequence[Estimate]) -> list[str]:
    return [*aligned([HEADS, *(stage_row(each) for each in made), _total_row(made)]), *_notes(bill, made)]


def overrides_of(made: Estimate) -> str:
    """What to type after the stage's command to run with these settings."""
    return (
        f"--deepspeed_config {made.choice.path} run.micro_batch={made.micro_batch} "
        f"run.activation_checkpointing={made.stage.run.activation_checkpointing}"
    )


def _total_row(made: Sequence[Estimate]) -> list[str]:
    def total(quantity):
        return ranged(lambda pace: sum(getattr(each, quantity)(pace) for each in made))

    return ["total", *[""] * (len(HEADS) - 3), total("hours"), total("gpu_hours")]


def _notes(bill: Bill, made: Sequence[Estimate]) -> list[str]:
    notes = [f"  {each.stage.name}: images are views there" for each in made if not each.stage.trains]
    for each, stage in zip(made, bill.chain.stages):
        if each.loader_bound:
            notes.append(
                f"* {each.stage.name}: data run short: {each.loader_cores:.0f} cores a node would feed "
                f"{each.computed_images_s():,.0f} images/s; {_more_cores(each)}"
            )
        asked = stage.run.micro_batch
        if stage.trains and each.micro_batch < asked:
            notes.append(
                f"  {stage.name}: run.micro_batch={each.micro_batch} in place of {asked}, "
                + ("which does not fit" if each.room.largest_micro_batch < asked else "which does not divide")
            )
        if each.precision == "bf16" and each.hardware.peak_flops["bf16"] <= each.hardware.peak_flops.get("fp32", 0.0):
            notes.append(
                f"  {stage.name}: {each.hardware.name} has no units for bf16 and computes it at the pace of "
                "fp32; run.precision=fp16 is "
                f"{each.hardware.peak_flops['fp16'] / each.hardware.peak_flops['bf16']:.0f} times as fast on "
                "paper"
            )
    return notes


def _more_cores(made: Estimate) -> str:
    """Which limit of the loaders binds."""
    ranks = min(made.gpus, made.hardware.gpus_per_node)
    needed = ceil(made.loader_cores / ranks)
    if needed * ranks <= made.hardware.cores_per_node:
        return f"set data.num_workers={needed} in place of {made.stage.recipe.data.num_workers}"
    return (
        f"the node has {made.hardware.cores_per_node}; pack the images smaller (--short_side), or take nodes with more"
    )


def detail_lines(made: Estimate) -> list[str]:
    """Memory by part, traffic by operation, the step by part, loaders, failures of one training stage."""
    state, cost, loss = made.room.state, made.cost(), made.goodput()
    parts = {
        "weights": state.weights,
        "gradients": state.gradients,
        "optimiser": state.optimizer,
        "buffers": state.buffers,
        "fixed": made.room.fixed_bytes,
        f"activations of {made.micro_batch}": made.micro_batch * made.room.bytes_per_image,
        "reserved": made.room.used_bytes(0) - state.state - made.room.fixed_bytes,
        "total": made.room.used_bytes(made.micro_batch),
    }
    lines = [
        f"{made.stage.name} with {made.choice.name}, activation checkpointing "
        f"{made.stage.run.activation_checkpointing}, micro-batch {made.micro_batch} x "
        f"{made.micro_steps}:",
        _line(
            "memory, GiB",
            ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items() if value)
            + f" of {made.hardware.memory_bytes / GIB:.1f}; largest micro-batch that fits: "
            f"{made.room.largest_micro_batch}",
        ),
        _line(
            "FLOP",
            f"{made.stage.model_flops / 1e9:,.1f} GFLOP an image, "
            f"{made.stage.model_flops * made.stage.images:.3g} in all ({made.stage.images:,} images)",
        ),
    ]
    if made.host_bytes:
        lines.append(
            _line(
                "host memory, GiB",
                f"{made.host_bytes / GIB:.1f} of {made.hardware.host_memory_bytes / GIB:.0f} a node, with a "
                "save in flight",
            )
        )
    traffic = traffic_by_operation(made.collectives, made.gpus)
    lines += [
        _line(
            "traffic a step",
            "; ".join(f"{name} {found.calls} calls, {found.num_bytes / 1e9:.2f} GB" for name, found in traffic.items())
            + f"; sent by a GPU {sum(found.sent for found in traffic.values()) / 1e9:.2f} GB"
            if traffic
            else "none: one GPU",
        ),
        _line(
            "step, s",
            f"{cost.seconds:.4g}: passes {cost.compute_s:.4g}, optimiser {cost.optimizer_s:.2g}, "
            f"communication {cost.communication_s:.3g} of which {cost.exposed_s:.3g} not hidden, products "
            f"beside it slower by {cost.contention_s:.2g}, stragglers {cost.straggler_s:.2g}",
        ),
        _line(
            "loaders",
            f"{made.loader_cores:.1f} of {made.hardware.cores_per_node} cores a node "
            f"({1e3 * loader_core_s(made.stage):.2f} ms an image and core)",
        ),
        _line(
            "failures",
            f"{loss.expected_failures:.2g} expected; goodput {loss.share:.1%}: saves "
            f"{loss.saving_s / 3600:.2g} h, work lost {loss.lost_s / 3600:.2g} h, restarts "
            f"{loss.restarting_s / 3600:.2g} h; best interval between saves "
            f"{loss.best_interval_s / 60:.0f} min, here {made.minutes_between_saves:g}",
        ),
    ]
    return lines


def storage_bytes(made: Sequence[Estimate]) -> dict[str, float]:
    """Bytes on the shared file system by what lies there."""
    first = made[0].stage
    found: dict[str, float] = {"image shards": first.num_samples * SOURCE_BYTES}
    for each in made:
        if each.stage.kind == "tokenizing" or (each.stage.kind == "pre-training" and "token shards" not in found):
            found["token shards"] = token_set_bytes(each.stage)
        if each.stage.trains:
            found[f"checkpoints of {each.stage.name}"] = checkpoints_bytes(each.stage, each.choice.raw)
    return found


def storage_lines(bill: Bill) -> list[str]:
    found = storage_bytes(bill.shown)
    return [
        _line(
            "storage, GB",
            ", ".join(f"{name} {figure(size / 1e9)}" for name, size in found.items())
            + f"; {figure(sum(found.values()) / 1e9)} in all",
        )
    ]


def _line(label: str, text: str) -> str:
    return f"  {label:<18}{text}"


def simulation_lines(bill: Bill, *, steps: int = 200, seed: int = 0) -> list[str]:
    """The main stage played through, beside the closed form: an optimiser step with stragglers, and the whole run with
    failures; as written and as recommended.
    """
    return [line for each in bill.mains for line in _simulated(each, steps, seed)]


def _simulated(made: Estimate, steps: int, seed: int) -> list[str]:
    run = simulate_run(3600 * made.running_hours(), **made.interruptions(), step_s=made.step_s(), seed=seed)
    settings = (
        f"{made.choice.name}, activation checkpointing {made.stage.run.activation_checkpointing}, "
        f"micro-batch {made.micro_batch} x {made.micro_steps}"
    )
    lines = [f"Simulated, {made.stage.name} on {made.gpus} {made.hardware.name}, {settings}:"]
    if made.stage.trains:
        step, cost = simulate_step(made.inputs(), steps=steps, seed=seed), made.cost()
        lines.append(
            _line(
                "step, s",
                f"{step.mean_s:.4g} ({step.p5_s:.4g} to {step.p95_s:.4g} in nine of ten); closed form "
                f"{cost.seconds:.4g}, {cost.seconds / step.mean_s - 1:+.1%}; links busy {step.busy_share:.0%}",
            )
        )
    # else most runs meet none, and all lie in one point
    spread = f" ({run.p5_share:.2%} to {run.p95_share:.2%} in nine of ten runs)" if run.failures >= 3 else ""
    lines.append(
        _line(
            "goodput", f"{run.share:.2%}{spread}; closed form {made.goodput().share:.2%}; {run.failures:.2g} failures"
        )
    )
    return lines


# -------------------------------------------------------------------------------------- several counts

SCAN_HEADS = (
    "GPUs",
    "hardware",
    "settings",
    "step s",
    "images/s",
    "scaling",
    "MFU",
    "goodput",
    "hours of it",
    "hours of all",
    "GPU-hours of all",
)


def scan_rows(bills: Sequence[Bill]) -> list[list[str]]:
    """One line a bill, with the recommended settings; scaling is against the fewest GPUs of the same kind."""
    rows = []
    for bill in bills:
        made, first = bill.main, next(other.main for other in bills if other.hardware.name == bill.hardware.name)
        scaling = made.images_s() / made.gpus / (first.images_s() / first.gpus)
        rows.append(
            [
                str(bill.gpus),
                bill.hardware.name,
                f"{made.choice.name.removesuffix('.json')}, {made.stage.run.activation_checkpointing}, "
                f"{made.micro_batch} x {made.micro_steps}"
                if made.stage.trains
                else "-",
                f"{made.step_s():.3g}",
                f"{made.images_s():,.0f}" + ("*" if made.loader_bound else ""),
                f"{scaling:.0%}",
                f"{made.mfu():.0%} ({made.mfu('slow'):.0%} to {made.mfu('fast'):.0%})",
                f"{made.goodput().share:.1%}",
                ranged(made.hours),
                ranged(bill.hours),
                ranged(bill.gpu_hours),
            ]
        )
    return rows


def scan_notes(bills: Sequence[Bill]) -> list[str]:
    """What the columns of a scan do not say."""
    notes = [
        "Ranges go from the fast to the slow pace. Hours have evaluations, saves and failures in "
        "them; a short stage takes half of the GPUs where that is less than "
        f"{WORTH_HALF} times as long, and half of those, and gives the others back."
    ]
    if any(bill.main.loader_bound for bill in bills):
        notes.append("*: data run short; data.num_workers or the cores of a node hold the GPUs up.")
    return notes


# ---------------------------------------------------------------------------------------- plain values


def bill_facts(bill: Bill) -> dict:
    """A bill as JSON holds it: numbers in bytes, seconds, FLOP, hours."""
    return {
        "hardware": asdict(bill.hardware),
        "gpus": bill.gpus,
        "written": [estimate_facts(made) for made in bill.written],
        "recommended": [estimate_facts(found.best) | {"reason": found.reason} for found in bill.recommended],
        "total_hours": {pace: bill.hours(pace) for pace in PACES},
        "total_gpu_hours": {pace: bill.gpu_hours(pace) for pace in PACES},
        "held_gpu_hours": {pace: bill.held_gpu_hours(pace) for pace in PACES},
        "storage_bytes": storage_bytes(bill.shown),
    }


def estimate_facts(made: Estimate) -> dict:
    """One estimate as JSON holds it."""
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
        "memory_bytes": {
            **{name: getattr(made.room.state, name) for name in ("weights", "gradients", "optimizer", "buffers")},
            "fixed": made.room.fixed_bytes,
            "activations": made.micro_batch * made.room.bytes_per_image,
            "total": made.room.used_bytes(made.micro_batch),
        },
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
    if stage.trains:
        facts |= {
            "deepspeed_config": made.choice.name,
            "zero_stage": made.choice.stage,
            "activation_checkpointing": stage.run.activation_checkpointing,
            "micro_steps": made.micro_steps,
            "steps": stage.durations.total_steps,
            "host_bytes_a_node": made.host_bytes,
            "traffic": {
                name: asdict(found) for name, found in traffic_by_operation(made.collectives, made.gpus).items()
            },
            "step": {pace: asdict(cost) for pace, cost in made.costs.items()},
        }
    return facts
