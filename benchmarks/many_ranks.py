"""What a start, a step and a save cost as the ranks of one machine grow: where time grows with ranks for no reason, it
shows here before a cluster is paid for.

    python benchmarks/many_ranks.py [--ranks 1 2 4 8 16] [--starts 1] [--gpu] [--record FILE.md] [--plot FILE.png]
    [key.sub=value ...]

The same few steps of the same global batch by each number of ranks, a checkpoint after every one of them. Ranks share
the machine's cores, so seconds grow with them whatever they do; processor time a rank does not, and a collective whose
cost grows faster than its ranks would raise it. A small model by default; --gpu runs peco_vith14 at full size.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from launch import _launcher, make_set
from record import at_least, require_gpu

from peco_ds.command_line import Parser, run
from peco_ds.errors import UserError

STEPS = 4
PHASES = ("imports", "data", "ranks", "records", "model", "engine", "checkpoint")
SMALL = (
    "views.tokenizer_px=64 model.image_px=64 model.patch_px=16 model.width=48 model.depth=2 "
    "model.heads=3 mask.count=6 mask.min_block=2 objective.num_codes=64 "
    "data.num_workers=0 run.precision=fp32"
).split()
LONGEST_S = 1800.0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks",
        nargs="+",
        type=at_least(1),
        default=[1, 2, 4, 8, 16],
        help="numbers of ranks (default: %(default)s; with --gpu as many of them as there are GPUs)",
    )
    parser.add_argument("--starts", type=at_least(1), default=1, help="of each number, by turns (default: %(default)s)")
    parser.add_argument("--launcher", choices=("deepspeed", "torchrun"), default="torchrun")
    parser.add_argument("--gpu", action="store_true", help="peco_vith14 at full size; without it a small model")
    parser.add_argument("--deepspeed_config", type=Path, default=HERE.parent / "ds_configs" / "zero3.json")
    parser.add_argument("--record", type=Path, help="also write the table to this file")
    parser.add_argument("--plot", type=Path, help="also draw processor time and seconds against ranks")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings of the recipe")
    args = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory(prefix="peco_ranks_") as work:
        found = measure(args, Path(work))
    text = table(found)
    sys.stdout.write(text + "\n")
    if args.plot:
        draw(args.plot, found)
    if args.record:
        from record import write_record

        command = shlex.join(["python", "benchmarks/many_ranks.py", *(sys.argv[1:] if argv is None else argv)])
        drawing = f"\n\n![against the number of ranks]({args.plot.name})" if args.plot else ""
        write_record(
            args.record, "Start, step and save against the number of ranks", command, text + drawing, "deepspeed"
        )
    return 0


def measure(args: argparse.Namespace, work: Path) -> dict[int, list[dict[str, float]]]:
    """Starts by number of ranks, each as seconds by phase."""
    numbers = sorted(set(args.ranks))
    if args.gpu:
        import torch

        require_gpu()
        gpus = torch.cuda.device_count()
        if numbers[0] > gpus:
            raise UserError(f"--ranks {numbers[0]}: this machine has {gpus} GPUs; give so many or fewer")
        numbers = [ranks for ranks in numbers if ranks <= gpus]
    recipe, settings = ("peco_vith14", []) if args.gpu else ("peco_vittiny16", SMALL)
    batch = max(16 if args.gpu else 32, *numbers)
    uneven = [ranks for ranks in numbers if batch % ranks]
    if uneven:
        raise UserError(
            f"--ranks {uneven[0]}: the global batch of {batch} images cannot be shared by so many; give "
            "divisors of the largest number"
        )
    settings = [*settings, *args.overrides]
    own = make_set(work, recipe, settings, images=4 * batch)
    settings += [
        *own,
        f"run.global_batch={batch}",
        f"schedule.steps={STEPS}",
        "schedule.warmup_steps=1",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=1",
    ]
    found: dict[int, list[dict[str, float]]] = {ranks: [] for ranks in numbers}
    for number in range(args.starts):
        for ranks in numbers:
            out = work / "runs" / f"{ranks}_{number}"
            script = [
                str(HERE.parent / "peco_ds" / "pretrain.py"),
                "--recipe",
                recipe,
                "--deepspeed_config",
                str(args.deepspeed_config),
                "--out",
                str(out),
            ]
            command = [*_launcher(args.launcher, ranks), *script, *settings, f"run.micro_batch={batch // ranks}"]
            found[ranks].append(one_start(command, out, ranks, on_gpu=args.gpu))
            sys.stderr.write(f"{ranks} ranks: first step after {found[ranks][-1]['first step']:.1f} s\n")
    return found


def one_start(command: list[str], out: Path, ranks: int, *, on_gpu: bool) -> dict[str, float]:
    """Run a start to its end.

    Returns: seconds of rank 0's phases, from the command to the first step, a step, a save; processor seconds a rank of
        all that was started; files of a checkpoint.
    Raises: UserError with the end of its output if it fails.
    """
    from peco_ds.runtime.timeline import METRICS_FILE, STARTS_FILE, read_rows

    env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if on_gpu else {"DS_ACCELERATOR": "cpu"})
    before, begun = _children_s(), time.time()
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=LONGEST_S)
    if done.returncode:
        raise UserError(
            f"{shlex.join(command)}: exit code {done.returncode}; its output ends in: "
            f"{' '.join((done.stdout + done.stderr).split())[-600:]}"
        )
    events = {row["event"]: row for row in read_rows(out / STARTS_FILE)[0]}
    start, end = events["start"], events["end"]
    newest = out / "checkpoints" / (out / "checkpoints" / "latest").read_text().strip()
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return {
        **{name: start["phases_s"].get(name, 0.0) for name in PHASES},
        "first step": start["time"] - begun + events["first_step"]["up_s"],
        "step": statistics.median(row["step_s"] for row in read_rows(out / METRICS_FILE)[0][1:]),
        "save": end["save_s"] / STEPS,
        "cpu": (_children_s() - before) / ranks,
        "files": len(files),
        "mb": sum(num_bytes for num_bytes, _ in files.values()) / 1e6,
    }


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(found: dict[int, list[dict[str, float]]]) -> str:
    """Markdown: medians; processor time and saves also as multiples of the smallest number of ranks."""
    rows = {
        ranks: {name: statistics.median(one[name] for one in starts) for name in starts[0]}
        for ranks, starts in found.items()
    }
    first = next(iter(rows.values()))
    names = [*PHASES, "first step", "step", "save"]
    lines = [
        f"| {ranks} | {' | '.join(format(row[name], '.2f') for name in names)} | {row['cpu']:.1f} | "
        f"{row['cpu'] / first['cpu']:.2f} | "
        f"{row['save'] / ranks / (first['save'] / next(iter(rows))):.2f} "
        f"| {row['files']:.0f} | {row['mb']:.1f} |"
        for ranks, row in rows.items()
    ]
    head = [
        "ranks",
        *(f"{name} s" for name in PHASES),
        "to the first step s",
        "step s",
        "save s",
        "processor s a rank",
        "of the fewest",
        "save a rank, of the fewest",
        "files",
        "MB",
    ]
    starts = len(next(iter(found.values())))
    return "\n".join(
        [
            f"Seconds of rank 0, medians of {starts} starts of {STEPS} steps on "
            f"{len(os.sched_getaffinity(0))} cores; a save is what the loop waits for it, from the copy "
            "to the rename.",
            "",
            f"| {' | '.join(head)} |",
            "|" + "---:|" * len(head),
            *lines,
        ]
    )


def draw(path: Path, found: dict[int, list[dict[str, float]]]) -> None:
    """Both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label in (
        ("first step", "to the first step"),
        ("engine", "engine"),
        ("step", "a step"),
        ("save", "a save"),
        ("cpu", "processor time a rank"),
    ):
        axes.loglog(
            list(found),
            [statistics.median(one[name] for one in starts) for starts in found.values()],
            marker="o",
            markersize=4,
            label=label,
        )
    axes.set_xlabel("ranks on one machine")
    axes.set_ylabel("seconds")
    axes.set_xticks(list(found), [str(ranks) for ranks in found])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main)
