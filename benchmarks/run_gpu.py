"""What one GPU can tell about this package in 8 minutes, the most telling first; whatever is cut off is kept.

    python3 -m benchmarks.run_gpu [--seconds 470] [--out FOLDER] [--wheels FOLDER] [--parts NAME,NAME]
    python3 -m benchmarks.run_gpu --small       # the same code at small sizes on a machine without a GPU

One process, so that imports and the device's start are paid once; what needs a process of its own is started with a
time limit. Each part has a budget. One that fails, runs out of memory or lacks a library is a line in the summary, and
the next one follows; one that hangs is left at the deadline with all that was found until then. After every part four
files in the folder are written anew: results.md, results.json, summary.txt, and logs.tar.gz with logs and plots. They
begin with a verdict a line against the bars that the package sets itself.

No network, no edit. Packages that the machine lacks are taken from a folder of wheels, which
benchmarks/gather_wheels.sh gathers where there is network. Nothing is imported before that but Python's own library.

Exit code 1 if a part failed; 0 also where parts were cut off.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.limits import Deadline, Processes
from benchmarks.gpu.parts import Part, PartPlan, run_part
from benchmarks.gpu.report import PartFound, Report
from benchmarks.gpu.verdicts import verdicts
from benchmarks.gpu.wheels import add_wheels, missing_packages
from benchmarks.record import hardware, versions
from peco_ds.errors import EXIT_BAD_INPUT, UserError

HERE = Path(__file__).resolve().parent
SECONDS = 470.0
# Kept for the last writing.
RESERVE_S = 6.0
LONGEST_S = 1e6
# Too little to begin a part with.
LEAST_S = 4.0
PACKAGES = ("deepspeed", "timm", "transformers", "triton", "torchvision", "pydantic")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def _step(name: str, title: str, budget_s: float, size: str, zero: str = "1") -> PartPlan:
    return PartPlan(name, f"Step of {title}", budget_s, "training:step", {"size": size, "zero": zero})


# Seconds as an H200 should need them; what one leaves is the others'.
PARTS = (
    PartPlan("attention", "Attention: right, and how fast", 40, "kernels:attention"),
    PartPlan("products", "The products of a block", 15, "kernels:products"),
    PartPlan("copies", "Copies", 10, "kernels:copies"),
    _step("step_h_zero1", "ViT-H/14 at 224, ZeRO-1", 60, "H/14 at 224"),
    _step("step_h_zero3", "ViT-H/14 at 224, ZeRO-3", 50, "H/14 at 224", "3"),
    PartPlan("resume", "A small run from images to weights, stopped and continued", 90, "resume:resume"),
    PartPlan("peers", "The same step in timm and Hugging Face, ViT-H/14 at 224", 130, "training:peers"),
    _step("step_l", "ViT-L/16 at 224", 40, "L/16 at 224"),
    _step("step_b", "ViT-B/16 at 224", 35, "B/16 at 224"),
    _step("step_h_448", "ViT-H/14 at 448", 45, "H/14 at 448"),
    PartPlan("tokenizing", "Tokenizing", 90, "training:tokenizing"),
    PartPlan("tokenizer_training", "A training step of a tokenizer", 60, "training:tokenizer_training"),
    PartPlan("tests", "Tests that need a GPU", 300, "resume:tests"),
    PartPlan("planner", "The planner's step beside the real one", 200, "training:planner"),
)


def main(argv: list[str] | None = None, parts: Sequence[PartPlan] = PARTS) -> int:
    begun, words = time.monotonic(), sys.argv[1:] if argv is None else argv
    args = arguments(words, parts)
    command = f"python3 -m benchmarks.run_gpu {shlex.join(words)}".strip()
    with tempfile.TemporaryDirectory(prefix="peco_gpu_", ignore_cleanup_errors=True) as name:
        try:
            run = GpuRun(args, Path(name), command, begun)
            try:
                return run.measure([plan for plan in parts if not args.parts or plan.name in args.parts])
            finally:
                run.close()
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            return EXIT_BAD_INPUT


def arguments(words: list[str], parts: Sequence[PartPlan]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.run_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = os.environ.get("PECO_BENCH_SECONDS", str(SECONDS))
    seconds = f"in all (default: $PECO_BENCH_SECONDS, or {SECONDS:g})"
    parser.add_argument("--seconds", type=float, default=default, help=seconds)
    out = "folder of the four files (default: benchmarks/out_gpu)"
    parser.add_argument("--out", type=Path, default=HERE / "out_gpu", help=out)
    wheels = "folder of wheels; what of them is not installed, or too old here, is used"
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help=wheels)
    names = f"leave out the others; of {', '.join(plan.name for plan in parts)}"
    parser.add_argument("--parts", metavar="NAME,NAME", type=lambda text: text.split(","), help=names)
    parser.add_argument(
        "--small", action="store_true", help="small sizes on the CPU; no bar of speed is meant for them"
    )
    args = parser.parse_args(words)
    unknown = sorted(set(args.parts or ()) - {plan.name for plan in parts})
    if unknown:
        parser.error(f"--parts {unknown[0]}: not one of {', '.join(plan.name for plan in parts)}")
    if not RESERVE_S < args.seconds < LONGEST_S:
        parser.error(f"--seconds {args.seconds:g}: give more than {RESERVE_S:g} and less than {LONGEST_S:g}")
    return args


class GpuRun:
    """The parts, one after another, and the end of the time.

    Args:
        work: a folder for what is not kept.
        begun: when the time began.
    """

    def __init__(self, args: argparse.Namespace, work: Path, command: str, begun: float) -> None:
        self.args, self.work, self.processes = args, work, Processes()
        self.logs = work / "logs"
        self.logs.mkdir()
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {args.out}: {error.strerror}; give a folder that can be written") from None
        self.report = Report(args.out, self.logs, command, lambda figures: verdicts(figures, small=args.small))
        # standard output itself, whatever a part's words go to
        self._out = os.dup(1)
        left = args.seconds - RESERVE_S - (time.monotonic() - begun)
        self.deadline = Deadline(left, self.end_at_once, self.logs / "deadline.log")
        self._terminate = signal.signal(signal.SIGTERM, self._told_to_end)

    def measure(self, parts: Sequence[PartPlan]) -> int:
        self.prepare()
        for plan in parts:
            self.report.parts[plan.name] = PartFound(plan.name, plan.title)
        self.report.write()
        for plan in parts:
            self.measure_part(plan, self.report.parts[plan.name])
        self.say(*(verdict.line() for verdict in self.report.verdicts()))
        self.say(f"results are in {self.args.out}")
        return 1 if self.report.failed else 0

    def prepare(self) -> None:
        """Packages, and a look at the device. Raises: UserError where there is no GPU, or no torch."""
        os.environ.update(OFFLINE)
        if self.args.small:
            os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
        if self.args.wheels:
            self.report.notes += add_wheels(self.args.wheels, self.work / "packages")
        self.report.notes += missing_packages()
        try:
            import torch
        except ImportError as error:
            raise UserError(f"no torch ({error}); install it first, see docs/install.md") from None
        if not self.args.small and not torch.cuda.is_available():
            raise UserError("torch finds no GPU here; start it where there is one, or give --small")
        about = {"hardware": hardware(), "versions": versions(*PACKAGES), "date": time.strftime("%d %B %Y")}
        self.report.about = about
        self.say(*self.report.notes, *about.values())

    def measure_part(self, plan: PartPlan, found: PartFound) -> None:
        left_s = self.deadline.left_s()
        if left_s < LEAST_S:
            found.reason = "the time is up"
            self.report.write()
        else:
            work = self.work / plan.name
            work.mkdir()
            budget_s = plan.small_budget_s if self.args.small else plan.budget_s
            ends = time.monotonic() + min(budget_s, left_s - 1.0)
            run_part(plan, Part(plan.name, self.args.small, work, self.logs, self.processes, ends, self.report, found))
        self.say(found.line())

    def end_at_once(self) -> int:
        """All that was found is written, and what was started is ended. Returns: the exit code."""
        self.report.cut_off("the time was up")
        self.report.write()
        self.processes.end_all(children=True)
        shutil.rmtree(self.work, ignore_errors=True)
        self.say("the time is up", *(verdict.line() for verdict in self.report.verdicts()))
        return 1 if self.report.failed else 0

    def say(self, *lines: str) -> None:
        os.write(self._out, "".join(f"{line}\n" for line in lines).encode())

    def close(self) -> None:
        self.deadline.cancel()
        signal.signal(signal.SIGTERM, self._terminate)
        os.close(self._out)

    def _told_to_end(self, number: int, _frame) -> None:
        self.report.cut_off("told to end")
        self.end_at_once()
        os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
