"""Does the simulation of many ranks say what the planner's closed forms say? Step time over 1 to 1024 GPUs, and the
goodput of a month. Needs no GPU.

    python benchmarks/plan_simulate.py [--recipe peco_vith14] [--hardware h100] [--gpus 1 8 64 512] [--record FILE.md]
    [key.sub=value ...]

Both start from the same inputs: seconds of each block, the collectives of DeepSpeed's JSON, links, noise. The closed
form takes the longest path through them, for a rank that is as slow as the slowest of so many is on average; the
simulation plays every rank through every step. Tables: the recipe over GPU counts, with stragglers; every shipped JSON
over GPU counts, micro-batches and networks, of which the largest disagreements are printed; what one slow node or one
node behind a slow network costs, which the simulation alone can say; a month with saves and failures.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from record import at_least

from peco_ds.command_line import Parser, run
from peco_ds.errors import UserError
from peco_ds.planner.chain import DEFAULT_JSON, read_chain
from peco_ds.planner.compute import segment_seconds
from peco_ds.planner.estimate import Estimate, estimate
from peco_ds.planner.fitting import DeepSpeedChoice, check_gpus, merged, shipped
from peco_ds.planner.goodput import FAILURES_PER_1000_NODE_DAYS, goodput
from peco_ds.planner.hardware import Hardware, find_hardware
from peco_ds.planner.simulation import simulate_run, simulate_step
from peco_ds.planner.stages import Stage
from peco_ds.planner.step_cost import StepInputs, closed_form
from peco_ds.planner.traffic import step_collectives

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# networks: shares of the machine's own
GRID_GPUS, MICRO_BATCHES, NETWORKS = (8, 64, 256, 1024), (1, 8, 64), (0.1, 0.5, 1.0)
GRID_MICRO_STEPS = (1, 4)
NODES = (1, 8, 32, 64, 128)
MONTH_S = 30 * 86400.0
AGREEMENT = (
    "Where all ranks are alike both must give the same; with noise the closed form takes the "
    "slowest rank for one that is slow by as much as the slowest is on average."
)


@dataclass(frozen=True)
class Compared:
    """One step both ways, in seconds."""

    where: str
    reckoned_s: float
    mean_s: float
    alike_reckoned_s: float
    alike_s: float

    @property
    def difference(self) -> float:
        return self.reckoned_s / self.mean_s - 1

    @property
    def alike_difference(self) -> float:
        return self.alike_reckoned_s / self.alike_s - 1


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", default="peco_vith14", help="of a pre-training or a fine-tuning (default: %(default)s)"
    )
    parser.add_argument("--hardware", default="h100", metavar="NAME", help="as plan.py takes it (default: %(default)s)")
    parser.add_argument("--gpus", nargs="+", type=at_least(1), default=GPUS, metavar="N", help="default: 1 to 1024")
    parser.add_argument("--steps", type=at_least(1), default=200, help="simulated of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="also draw the scaling curve with the spread of steps"
    )
    parser.add_argument("--record", type=Path, metavar="FILE.md", help="also write the tables to this file")
    given = sys.argv[1:] if argv is None else argv
    # else --gpus would take them for numbers
    settings = [text for text in given if "=" in text and not text.startswith("-")]
    args = parser.parse_args([text for text in given if text not in settings])
    hardware, stage = find_hardware(args.hardware), read_chain(args.recipe, settings).main
    counts = counts_that_divide(stage, hardware, args.gpus)
    began = time.perf_counter()
    rows = [
        (made, *scaled(made, args))
        for made in (estimate(stage, hardware, count, own_choice(stage)) for count in counts)
    ]
    parts = [
        f"## {stage.name} on {hardware.name}, {own_choice(stage).name}\n\n{scaling_table(rows)}",
        "## Every shipped "
        f"JSON\n\n{grid_text([compared(where, inputs, args) for where, inputs in grid(stage, hardware, counts)])}",
        f"## One bad node\n\n{bad_node_table(rows, args)}",
        f"## A month with failures\n\n{month_table(rows[0][0], args.seed)}",
    ]
    parts.append(
        f"{args.steps} steps of each, noise of {100 * rows[0][0].inputs().noise:g}% a rank and pass; "
        f"{time.perf_counter() - began:.0f} s on this machine. {AGREEMENT}"
    )
    sys.stdout.write("\n\n".join(parts) + "\n")
    if args.plot:
        scaling_plot(args.plot, stage, rows)
    if args.record:
        from record import write_record

        command = shlex.join(["python", "benchmarks/plan_simulate.py", *given])
        write_record(args.record, "Closed form and simulation of many ranks", command, "\n\n".join(parts), "numpy")
    return 0


def own_choice(stage: Stage) -> DeepSpeedChoice:
    return next(choice for choice in shipped() if choice.name == DEFAULT_JSON[stage.kind])


def counts_that_divide(stage: Stage, hardware: Hardware, asked: Sequence[int]) -> list[int]:
    """Raises: UserError where none of the counts divides the recipe's batch, or one is no number of whole nodes."""
    found = sorted({count for count in asked if count < 1 or stage.run.global_batch % count == 0})
    if not found:
        raise UserError(
            f"--gpus {' '.join(map(str, asked))}: none divides run.global_batch {stage.run.global_batch}; "
            "use divisors of it"
        )
    for count in found:
        check_gpus(count, hardware, stage)
    return found


def scaled(made: Estimate, args: argparse.Namespace):
    """The closed form and the simulation of one plan."""
    return closed_form(made.inputs()), simulate_step(made.inputs(), steps=args.steps, seed=args.seed)


def compared(where: str, inputs: StepInputs, args: argparse.Namespace) -> Compared:
    alike = replace(inputs, noise=0.0)
    return Compared(
        where,
        closed_form(inputs).seconds,
        simulate_step(inputs, steps=args.steps, seed=args.seed).mean_s,
        closed_form(alike).seconds,
        simulate_step(alike, steps=1).mean_s,
    )


def grid(stage: Stage, hardware: Hardware, counts: Sequence[int]) -> Iterator[tuple[str, StepInputs]]:
    """Every shipped JSON that offloads nothing, whether or not it fits into memory."""
    for choice in (choice for choice in shipped() if not choice.offloads):
        for gpus in (count for count in GRID_GPUS if count <= max(counts)):
            for micro_batch in MICRO_BATCHES:
                passes = tuple(
                    segment_seconds(segment, micro_batch, hardware, stage.run.precision, "typical")
                    for segment in stage.segments
                )
                for micro_steps in GRID_MICRO_STEPS:
                    made = step_collectives(
                        stage.segments,
                        ds_config=merged(stage, choice),
                        precision=stage.run.precision,
                        micro_steps=micro_steps,
                        ranks=gpus,
                    )
                    for network in NETWORKS:
                        machine = replace(hardware, network_bytes_s=network * hardware.network_bytes_s)
                        where = (
                            f"{choice.name}, {gpus} GPUs, micro-batch {micro_batch} x {micro_steps}, network x "
                            f"{network:g}"
                        )
                        yield where, StepInputs(passes, made, micro_steps, 0.005, gpus, machine)


def scaling_table(rows) -> str:
    lines = [
        "| GPUs | micro-batch | closed form, s | simulated, s (nine of ten steps) | difference | "
        "exposed | contention | stragglers | links busy | images/s | of linear |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = rows[0][0].stage.run.global_batch / rows[0][2].mean_s / rows[0][0].gpus
    for made, cost, played in rows:
        rate = made.stage.run.global_batch / played.mean_s
        shares = " | ".join(
            f"{part / cost.seconds:.1%}" for part in (cost.exposed_s, cost.contention_s, cost.straggler_s)
        )
        times = (
            f"{cost.seconds:.4g} | {played.mean_s:.4g} ({played.p5_s:.4g} to {played.p95_s:.4g}) | "
            f"{cost.seconds / played.mean_s - 1:+.2%}"
        )
        lines.append(
            f"| {made.gpus} | {made.micro_batch} x {made.micro_steps} | {times} | {shares} | "
            f"{played.busy_share:.0%} | {rate:,.0f} | {rate / made.gpus / first:.1%} |"
        )
    return "\n".join(lines)


def grid_text(found: Sequence[Compared]) -> str:
    worst = sorted(found, key=lambda each: -abs(each.difference))[:5]
    alike = max(found, key=lambda each: abs(each.alike_difference))
    typical = sorted(abs(each.difference) for each in found)[len(found) // 2]
    lines = [
        f"{len(found)} cases: with noise half of them differ by less than {typical:.2%}, all by at "
        f"most {abs(worst[0].difference):.2%}; "
        f"all ranks alike, by at most {abs(alike.alike_difference):.2%} ({alike.where}). The largest:",
        "",
        "| case | closed form, s | simulated, s | difference | all ranks alike |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(
        lines
        + [
            f"| {each.where} | {each.reckoned_s:.4g} | {each.mean_s:.4g} | {each.difference:+.2%} | "
            f"{each.alike_difference:+.2%} |"
            for each in worst
        ]
    )


def bad_node_table(rows, args: argparse.Namespace) -> str:
    """Only counts of several nodes."""
    cases = {
        "computes 10% longer": dict(slow_nodes={0: 1.1}),
        "computes twice as long": dict(slow_nodes={0: 2.0}),
        "network at a half": dict(slow_network=0.5),
        "network at a tenth": dict(slow_network=0.1),
    }
    lines = [
        "How much longer a step takes when one node:",
        "",
        "| GPUs | " + " | ".join(cases) + " |",
        "|---" * (1 + len(cases)) + "|",
    ]
    for made, _, played in rows:
        if made.nodes > 1:
            times = [
                simulate_step(made.inputs(), steps=args.steps, seed=args.seed, **case).mean_s for case in cases.values()
            ]
            lines.append(
                f"| {made.gpus} | " + " | ".join(f"{seconds / played.mean_s - 1:+.1%}" for seconds in times) + " |"
            )
    return "\n".join(lines)


def month_table(made: Estimate, seed: int) -> str:
    """Saves as the recipe has them, state and files of the plan on one GPU spread over all nodes."""
    lines = [
        "| nodes | failures of 1000 nodes a day | goodput, closed form | simulated (nine of ten months) | difference "
        "| failures | lost, h | saving, h | restarting, h | best interval, min |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for nodes in NODES:
        for rate in FAILURES_PER_1000_NODE_DAYS:
            usual = replace(made, gpus=nodes * made.hardware.gpus_per_node).interruptions()
            settings = {**usual, "failures_per_1000_node_days": rate}
            reckoned, played = goodput(MONTH_S, **settings), simulate_run(MONTH_S, **settings, seed=seed)
            hours = " | ".join(
                f"{seconds / 3600:.2f}" for seconds in (reckoned.lost_s, reckoned.saving_s, reckoned.restarting_s)
            )
            lines.append(
                f"| {nodes} | {rate:g} | {reckoned.share:.2%} | {played.share:.2%} ({played.p5_share:.2%} to "
                f"{played.p95_share:.2%}) | {reckoned.share / played.share - 1:+.2%} "
                f"| {reckoned.expected_failures:.1f} | {hours} | {reckoned.best_interval_s / 60:.0f} |"
            )
    return "\n".join(lines)


def scaling_plot(path: Path, stage: Stage, rows) -> None:
    """Images a second over GPU counts: closed form as a line, simulated steps as points with nine of ten in the
    whiskers, linear scaling dotted.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batch, gpus = stage.run.global_batch, [made.gpus for made, _, _ in rows]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    means = [batch / played.mean_s for _, _, played in rows]
    below = [max(0.0, batch / played.mean_s - batch / played.p95_s) for _, _, played in rows]
    above = [max(0.0, batch / played.p5_s - batch / played.mean_s) for _, _, played in rows]
    axes.plot(gpus, [batch / cost.seconds for _, cost, _ in rows], color="C0", label="closed form")
    axes.errorbar(
        gpus, means, yerr=[below, above], fmt="o", color="C1", capsize=3, label="simulated, nine of ten steps"
    )
    axes.plot(gpus, [means[0] / gpus[0] * count for count in gpus], color="0.4", linestyle=":", label="linear")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(gpus, [str(count) for count in gpus])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("images/s")
    axes.set_title(f"{stage.name} on {rows[0][0].hardware.name}, global batch {batch}", fontsize="medium")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main)
