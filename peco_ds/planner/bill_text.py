"""Bills as plain text: the tables of one count of GPUs and of several, and the assumptions they rest on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

from peco_ds.planner import data_side, estimate, fitting, goodput, step_cost
from peco_ds.planner.bill import WORTH_HALF, Bill, bad_node_costs, memory_parts, storage_bytes
from peco_ds.planner.data_side import loader_core_s
from peco_ds.planner.estimate import Estimate
from peco_ds.planner.fitting import GIB
from peco_ds.planner.hardware import Hardware
from peco_ds.planner.traffic import traffic_by_operation
from peco_ds.planner.work import frozen_of_unknown_cost

# -------------------------------------------------------------------------------------------- figures


def ranged(quantity: Callable[[str], float]) -> str:
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


def labelled(lines: dict[str, str], width: int, indent: str = "") -> list[str]:
    """One line a text, its label before it."""
    return [f"{indent}{label:<{width}}{text}" for label, text in lines.items()]


def images_of(num_samples: int, assumed: bool) -> str:
    return f"{num_samples:,} images" + (" (assumed: ImageNet-1K; no set was read)" if assumed else "")


def _mfu(made: Estimate) -> str:
    return f"{made.mfu():.0%} ({made.mfu('slow'):.0%} to {made.mfu('fast'):.0%})"


def _images_s(made: Estimate) -> str:
    return f"{made.images_s():,.0f}" + ("*" if made.loader_bound else "")


def _title(bill: Bill) -> str:
    return bill.chain.main.name + ("" if len(bill.chain.stages) == 1 else " and what belongs to it")


# ---------------------------------------------------------------------------------- one count of GPUs

_HEADS = (
    "stage, GPUs, DeepSpeed, checkpointing, micro-batch x passes, GiB a GPU, step s, images/s, MFU, hours, GPU-hours"
).split(", ")


def bill_text(bill: Bill, *, assumed: bool) -> str:
    """One bill in full, without a final newline.

    Args:
        assumed: the number of images is a guess.
    """
    main, nodes = bill.chain.main, ceil(bill.gpus / bill.hardware.gpus_per_node)
    lines = [
        f"{_title(bill)}, on {bill.gpus} {bill.hardware.title} ({nodes} node{'s' if nodes > 1 else ''}); "
        f"{images_of(main.num_samples, assumed)}"
    ]
    if main.kind == "pre-training" and len(bill.chain.stages) == 1:
        lines.append(
            "No tokenizer and no fine-tuning are known for this recipe; name them by --tokenizer_recipe and "
            "--finetune_recipes."
        )
    best = tuple(found.best for found in bill.recommended)
    lines.append("")
    if bill.written:
        lines += ["As the recipes are written:", *_table(bill, bill.written)]
        lines += [
            f"  {stage.name}: does not fit as its recipe is written; the recommended settings stand there"
            for stage in bill.unfit
        ]
        lines.append("")
    if best == bill.written:
        lines.append("Recommended for these GPUs: the same.")
    else:
        lines += ["Recommended for these GPUs:", *_table(bill, best)]
    lines += ["", "Why:"]
    for found in bill.recommended:
        made = found.best
        if made.stage.trains:
            lines.append(
                f"  {made.stage.name}: {found.reason}; --deepspeed_config {made.choice.path} "
                f"run.micro_batch={made.micro_batch} "
                f"run.activation_checkpointing={made.stage.run.activation_checkpointing}"
            )
    for made in bill.mains:
        lines += ["", *_details(made)] if made.stage.trains else []
    stored = storage_bytes(bill.shown)
    sizes = ", ".join(f"{name} {figure(size / 1e9)}" for name, size in stored.items())
    storage = {"storage, GB": f"{sizes}; {figure(sum(stored.values()) / 1e9)} in all"}
    return "\n".join([*lines, "", *labelled(storage, 18, "  ")])


def _table(bill: Bill, made: Sequence[Estimate]) -> list[str]:
    hours = ranged(lambda pace: sum(each.hours(pace) for each in made))
    gpu_hours = ranged(lambda pace: sum(each.gpu_hours(pace) for each in made))
    rows = [_HEADS, *map(_stage_row, made), ["total", *[""] * (len(_HEADS) - 3), hours, gpu_hours]]
    return [*aligned(rows), *_notes(bill, made)]


def _stage_row(made: Estimate) -> list[str]:
    """One line of the chain's table; ranges from the fast to the slow pace."""
    trains, memory = made.stage.trains, f"{made.room.used_bytes(made.micro_batch) / GIB:.1f}"
    return [
        made.stage.name,
        str(made.gpus),
        made.choice.name.removesuffix(".json") if trains else "-",
        made.stage.run.activation_checkpointing if trains else "-",
        f"{made.micro_batch} x {made.micro_steps}" if trains else f"{made.micro_batch}",
        f"{memory} of {made.hardware.memory_bytes / GIB:.0f}",
        f"{made.step_s():.3g}" if trains else "-",
        _images_s(made),
        _mfu(made),
        ranged(made.hours),
        ranged(made.gpu_hours),
    ]


def _notes(bill: Bill, made: Sequence[Estimate]) -> list[str]:
    notes = [f"  {each.stage.name}: images are views there" for each in made if not each.stage.trains]
    for each, stage in zip(made, bill.chain.stages):
        name, asked, machine = each.stage.name, stage.run.micro_batch, each.hardware
        if each.loader_bound:
            notes.append(
                f"* {name}: data run short: {each.loader_cores:.0f} cores a node would feed "
                f"{each.computed_images_s():,.0f} images/s; {_more_cores(each)}"
            )
        if stage.trains and each.micro_batch < asked and each.room.largest_micro_batch < asked:
            notes.append(f"  {name}: run.micro_batch={each.micro_batch} in place of {asked}, which does not fit")
        unknown = frozen_of_unknown_cost(each.stage.recipe) if each.stage.kind == "tokenizer" else ""
        if unknown:
            notes.append(f"  {name}: what its {unknown} costs is not known; neither its memory nor its time is counted")
        if stage.trains and stage.run.fp8:
            notes.append(f"  {name}: run.fp8 is not counted, products are planned at the pace of 16 bits")
        peak = machine.peak_flops
        if each.precision == "bf16" and peak["bf16"] <= peak.get("fp32", 0.0):
            notes.append(
                f"  {name}: {machine.name} has no units for bf16 and computes it at the pace of fp32; "
                f"run.precision=fp16 is {peak['fp16'] / peak['bf16']:.0f} times as fast on paper"
            )
    return notes


def _more_cores(made: Estimate) -> str:
    """Which limit of the loaders binds."""
    needed = ceil(made.loader_cores / made.node_gpus)
    if needed * made.node_gpus <= made.hardware.cores_per_node:
        return f"set data.num_workers={needed} in place of {made.stage.recipe.data.num_workers}"
    return (
        f"the node has {made.hardware.cores_per_node}; pack the images smaller (--short_side), or take nodes with more"
    )


def _details(made: Estimate) -> list[str]:
    """Memory by part, traffic by operation, the step by part, loaders, failures of one training stage."""
    stage, cost, loss = made.stage, made.cost(), made.goodput()
    parts = memory_parts(made)
    total = parts.pop("total")
    named = {"optimizer": "optimiser", "activations": f"activations of {made.micro_batch}"}
    parts = {named.get(name, name): size for name, size in parts.items()}
    parts |= {"reserved": fitting.RESERVED_BYTES, "total": total}
    sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    lines = {
        "memory, GiB": f"{sizes} of {made.hardware.memory_bytes / GIB:.1f}; largest micro-batch that fits: "
        f"{made.room.largest_micro_batch}",
        "FLOP": f"{stage.model_flops / 1e9:,.1f} GFLOP an image, {stage.model_flops * stage.images:.3g} in all "
        f"({stage.images:,} images)",
    }
    if made.host_bytes:
        lines["host memory, GiB"] = (
            f"{made.host_bytes / GIB:.1f} of {made.hardware.host_memory_bytes / GIB:.0f} a node, with a save in flight"
        )
    traffic = traffic_by_operation(made.collectives, made.gpus)
    sent = "; ".join(f"{name} {found.calls} calls, {found.num_bytes / 1e9:.2f} GB" for name, found in traffic.items())
    lines |= {
        "traffic a step": f"{sent}; sent by a GPU {sum(found.sent for found in traffic.values()) / 1e9:.2f} GB"
        if traffic
        else "none: one GPU",
        "step, s": f"{cost.seconds:.4g}: passes {cost.compute_s:.4g}, optimiser {cost.optimizer_s:.2g}, communication "
        f"{cost.communication_s:.3g} of which {cost.exposed_s:.3g} not hidden, products beside it slower by "
        f"{cost.contention_s:.2g}, stragglers {cost.straggler_s:.2g}",
        "loaders": f"{made.loader_cores:.1f} of {made.hardware.cores_per_node} cores a node "
        f"({1e3 * loader_core_s(stage):.2f} ms an image and core)",
        "failures": f"{loss.expected_failures:.2g} expected; goodput {loss.share:.1%}: saves {loss.saving_s / 3600:.2g}"
        f" h, work lost {loss.lost_s / 3600:.2g} h, restarts {loss.restarting_s / 3600:.2g} h; best interval between "
        f"saves {loss.best_interval_s / 60:.0f} min, here {made.minutes_between_saves:g}",
    }
    return [f"{stage.name} with {made.settings}:", *labelled(lines, 18, "  ")]


def bad_node_lines(bill: Bill) -> list[str]:
    """What one slow node costs the main stage, as written and as recommended."""
    lines = []
    for made in bill.mains:
        costs = ", ".join(f"{case} {share:+.1%}" for case, share in bad_node_costs(made).items())
        lines.append(
            f"One bad node, {made.stage.name} on {made.gpus} {made.hardware.name}, {made.settings}: "
            + (f"a step takes longer when it {costs}" if costs else "there is only one node")
        )
    return lines


# ------------------------------------------------------------------------------ several counts of GPUs

_SCAN_HEADS = (
    "GPUs, hardware, settings, step s, images/s, scaling, MFU, goodput, hours of it, hours of all, GPU-hours of all"
).split(", ")


def scan_text(bills: Sequence[Bill], *, assumed: bool) -> str:
    """Several bills as a table, without a final newline."""
    lines = [
        f"{_title(bills[0])}, with the settings recommended for each; "
        f"{images_of(bills[0].chain.main.num_samples, assumed)}",
        "",
        *aligned([_SCAN_HEADS, *scan_rows(bills)]),
        "",
        "Ranges go from the fast to the slow pace. Hours have evaluations, saves and failures in them; a short stage "
        f"takes half of the GPUs where that is less than {WORTH_HALF} times as long, and half of those, and gives the "
        "others back.",
    ]
    if any(bill.main.loader_bound for bill in bills):
        lines.append("*: data run short; data.num_workers or the cores of a node hold the GPUs up.")
    return "\n".join(lines)


def scan_rows(bills: Sequence[Bill]) -> list[list[str]]:
    """One line a bill, with the recommended settings; scaling is against the fewest GPUs of the same kind."""
    rows = []
    for bill in bills:
        made, first = bill.main, next(other.main for other in bills if other.hardware.name == bill.hardware.name)
        kind = made.stage.run.activation_checkpointing
        settings = f"{made.choice.name.removesuffix('.json')}, {kind}, {made.micro_batch} x {made.micro_steps}"
        rows.append(
            [
                str(bill.gpus),
                bill.hardware.name,
                settings if made.stage.trains else "-",
                f"{made.step_s():.3g}",
                _images_s(made),
                f"{made.images_s() / made.gpus / (first.images_s() / first.gpus):.0%}",
                _mfu(made),
                f"{made.goodput().share:.1%}",
                ranged(made.hours),
                ranged(bill.hours),
                ranged(bill.gpu_hours),
            ]
        )
    return rows


# ----------------------------------------------------------------------------------------- assumptions

_ASSUMED_OF_MACHINES = (
    "peak_flops product_share attention_share memory_bytes memory_bytes_s memory_share link_bytes_s network_bytes_s "
    "cores_per_node storage_bytes_s"
).split()


def assumption_lines(machines: Sequence[Hardware]) -> list[str]:
    """What a plan rests on, one line a value: name, the value that the code uses, source."""
    holds_for: dict[str, list[str]] = {}  # line -> machines
    for name in _ASSUMED_OF_MACHINES:
        for machine in {machine.name: machine for machine in machines}.values():
            line = f"{name}: {_shown(getattr(machine, name))}: {machine.sources.get(name, 'your own file')}"
            holds_for.setdefault(line, []).append(machine.name)
    return [*(f"  {', '.join(names)} {line}" for line, names in holds_for.items()), *_common_assumptions()]


def _common_assumptions() -> list[str]:
    low, usual, high = goodput.FAILURES_PER_1000_NODE_DAYS
    soon, later, late = (seconds / 60 for seconds in goodput.RESTART_S)
    slow, typical, fast = (estimate.LINK_SHARE[pace] for pace in step_cost.PACES)
    text = f"""
reserved on each GPU: {fitting.RESERVED_BYTES / GIB:g} GiB for context, communicators and workspaces, and \
{fitting.FRAGMENTATION - 1:.0%} of activations lost in the allocator; {fitting.KEPT_FREE:.0%} of its memory is kept \
free: assumed
links: {slow:g}, {typical:g}, {fast:g} of the typical rate: assumed (neighbours on the same switches); latencies and \
shares of the collectives: NCCL's own tuner and published nccl-tests (planner/network.py)
stragglers: passes of a rank vary by {step_cost.NOISE:.1%} (standard deviation): assumed; GPUs of one model were \
measured to differ by 8 % (arXiv 2208.11035)
a collective takes {step_cost.CONTENTION:.0%} of the multiprocessors from what is computed beside it: 24 of an H100's \
132 as users of NCCL report; assumed for all
failures of 1000 nodes a day: {low:g}, {usual:g}, {high:g}: Meta's clusters (arXiv 2410.21680) and Llama 3 405B (arXiv \
2407.21783); from a failure to the next step {soon:g}, {later:g}, {late:g} minutes: assumed
a save halts the loop while the state is copied to the host at {goodput.HOST_COPY_BYTES_S / 1e9:g} GB/s a GPU and \
{goodput.SAVE_CALL_S:g} s more, and is complete {goodput.WRITE_CALL_S:g} s after the file system has taken it: \
assumed; it is written beside the steps
an offloaded optimiser: {step_cost.HOST_MEMORY_BYTES_S / 1e9:g} GB/s of a node's memory, \
{step_cost.HOST_LINK_BYTES_S / 1e9:g} GB/s between a GPU and its host: assumed
loaders: decoding {1e9 * data_side.DECODE_S_A_PIXEL:.1f} ns a pixel and core, ImageNet's mean image \
{data_side.SOURCE_PIXELS:,} pixels and {data_side.SOURCE_BYTES / 1e3:.0f} kB; measured on one AMD EPYC core \
(benchmarks/data.py), {data_side.LOADER_PACE["slow"]:g} and {data_side.LOADER_PACE["fast"]:g} times that at a slow and \
a fast pace: assumed; after the first epoch images are taken to come from the node's memory or disk
without checkpoint.every_minutes a save every {estimate.NO_INTERVAL_MINUTES:g} minutes; tokenizing redoes \
{estimate.SHARD_S:g} s of work after an interruption: assumed
not in the hours: the queue, packing the images, conversion; and nothing here was compared with a GPU of ours yet \
(benchmarks/plan_step.py does it)"""
    return [f"  {line}" for line in text.strip().splitlines()]


def _shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part / 1e12:g} TFLOP/s" for key, part in value.items())
    if isinstance(value, tuple):
        return ", ".join(f"{part:g}" for part in value)
    return f"{value / 1e9:,.4g}e9" if value >= 1e9 else f"{value:g}"
