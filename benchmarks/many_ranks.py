"""What a start, a step and a save cost as the ranks of one machine grow: where time grows with ranks for no reason, it
shows here before a cluster is paid for.

    python -m benchmarks.many_ranks [--ranks 1 2 4 8 16] [--starts 1] [--gpu] [--record FILE.md] [--plot FILE.png]
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
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.plots import drawing, log_curves
from benchmarks.record import at_least, benchmark_parser, markdown_table, parse, publish
from benchmarks.sets import make_root
from benchmarks.stages import STAGES, call, launcher
from peco_ds.command_line import run
from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.errors import UserError
from peco_ds.runtime.timeline import METRICS_FILE, STARTS_FILE, read_rows

STEPS = 4
PHASES = ("imports", "data", "ranks", "records", "model", "engine", "checkpoint")
SMALL = (
    "views.tokenizer_px=64 model.image_px=64 model.patch_px=16 model.width=48 model.depth=2 "
    "model.heads=3 mask.count=6 mask.min_block=2 objective.num_codes=64 "
    "data.num_workers=0 run.precision=fp32"
).split()
LONGEST_S = 1800.0
DRAWN = {
    "first step": "to the first step",
    "engine": "engine",
    "step": "a step",
    "save": "a save",
    "cpu": "processor time a rank",
}
Found = dict[int, list[dict[str, float]]]  # starts by number of ranks, each as seconds by phase


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(
        "many_ranks",
        __doc__,
        gpu="peco_vith14 at full size; without it a small model",
        plot="processor time and seconds against ranks",
        overrides="settings of the recipe",
    )
    ranks = "numbers of ranks (default: %(default)s; with --gpu as many of them as there are GPUs)"
    parser.add_argument("--ranks", nargs="+", type=at_least(1), default=[1, 2, 4, 8, 16], help=ranks)
    parser.add_argument("--starts", type=at_least(1), default=1, help="of each number, by turns (default: %(default)s)")
    parser.add_argument("--launcher", choices=("deepspeed", "torchrun"), default="torchrun")
    parser.add_argument("--deepspeed_config", type=Path, default=DS_CONFIGS / "zero3.json")
    args = parse(parser, argv)
    with tempfile.TemporaryDirectory(prefix="peco_ranks_") as work:
        found = measure(args, Path(work))
    text = table(found)
    if args.plot:
        draw(args.plot, found)
        text += f"\n\n![against the number of ranks]({args.plot.name})"
    sys.stdout.write(publish(args, "Start, step and save against the number of ranks", text, "deepspeed"))
    return 0


def measure(args: argparse.Namespace, work: Path) -> Found:
    numbers = sorted(set(args.ranks))
    if args.gpu:
        gpus = torch.cuda.device_count()
        if numbers[0] > gpus:
            raise UserError(f"--ranks {numbers[0]}: this machine has {gpus} GPUs; give so many or fewer")
        numbers = [ranks for ranks in numbers if ranks <= gpus]
    recipe, settings = ("peco_vith14", []) if args.gpu else ("peco_vittiny16", SMALL)
    batch = max(16 if args.gpu else 32, *numbers)
    for ranks in numbers:
        if batch % ranks:
            raise UserError(
                f"--ranks {ranks}: the global batch of {batch} images cannot be shared by so many; give "
                "divisors of the largest number"
            )
    settings = [*settings, *args.overrides]
    settings += make_root(work, recipe, settings, images=4 * batch)
    settings += [f"run.global_batch={batch}", f"schedule.steps={STEPS}", "schedule.warmup_steps=1"]
    settings += ["checkpoint.every_steps=1", "checkpoint.keep_last=1"]
    found: Found = {ranks: [] for ranks in numbers}
    for number in range(args.starts):
        for ranks in numbers:
            out = work / "runs" / f"{ranks}_{number}"
            command = [*launcher(args.launcher, ranks), STAGES / "pretrain.py", "--recipe", recipe, "--out", out]
            command += ["--deepspeed_config", args.deepspeed_config, *settings, f"run.micro_batch={batch // ranks}"]
            found[ranks].append(one_start(command, out, ranks, on_gpu=args.gpu))
            sys.stderr.write(f"{ranks} ranks: first step after {found[ranks][-1]['first step']:.1f} s\n")
    return found


def one_start(command: list, out: Path, ranks: int, *, on_gpu: bool) -> dict[str, float]:
    """Run a start to its end.

    Returns: seconds of rank 0's phases, from the command to the first step, a step, a save; processor seconds a rank of
        all that was started; files of a checkpoint.
    Raises: UserError with the end of its output if it fails.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if on_gpu else {"DS_ACCELERATOR": "cpu"})
    before, begun = _children_s(), time.time()
    call(command, env, timeout_s=LONGEST_S)
    cpu_s = _children_s() - before
    events = {row["event"]: row for row in read_rows(out / STARTS_FILE)[0]}
    start = events["start"]
    newest = out / "checkpoints" / (out / "checkpoints" / "latest").read_text().strip()
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return {
        **{name: start["phases_s"].get(name, 0.0) for name in PHASES},
        "first step": start["time"] - begun + events["first_step"]["up_s"],
        "step": statistics.median(row["step_s"] for row in read_rows(out / METRICS_FILE)[0][1:]),
        "save": events["end"]["save_s"] / STEPS,
        "cpu": cpu_s / ranks,
        "files": len(files),
        "mb": sum(num_bytes for num_bytes, _ in files.values()) / 1e6,
    }


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def medians(found: Found) -> dict[int, dict[str, float]]:
    return {
        ranks: {name: statistics.median(one[name] for one in all_) for name in all_[0]} for ranks, all_ in found.items()
    }


def table(found: Found) -> str:
    """Markdown: medians; processor time and saves also as multiples of the smallest number of ranks."""
    by_ranks = medians(found)
    fewest, first = next(iter(by_ranks.items()))
    heads = ["ranks", *(f"{name} s" for name in PHASES), "to the first step s", "step s", "save s"]
    heads += ["processor s a rank", "of the fewest", "save a rank, of the fewest", "files", "MB"]
    rows = [
        (
            ranks,
            *(f"{row[name]:.2f}" for name in (*PHASES, "first step", "step", "save")),
            f"{row['cpu']:.1f}",
            f"{row['cpu'] / first['cpu']:.2f}",
            f"{row['save'] / ranks / (first['save'] / fewest):.2f}",
            f"{row['files']:.0f}",
            f"{row['mb']:.1f}",
        )
        for ranks, row in by_ranks.items()
    ]
    about = (
        f"Seconds of rank 0, medians of {len(found[fewest])} starts of {STEPS} steps on "
        f"{len(os.sched_getaffinity(0))} cores; a save is what the loop waits for it, from the copy to the rename."
    )
    return f"{about}\n\n{markdown_table(heads, rows)}"


def draw(path: Path, found: Found) -> None:
    """Both axes logarithmic."""
    by_ranks = medians(found)
    curves = {label: [row[name] for row in by_ranks.values()] for name, label in DRAWN.items()}
    with drawing(path, 1, 1, size=(6.5, 4.5)) as drawn:
        axes = drawn[0, 0]
        log_curves(axes, list(by_ranks), curves, "ranks on one machine", "seconds")
        axes.set_xticks(list(by_ranks), [str(ranks) for ranks in by_ranks])


if __name__ == "__main__":
    run(main)
