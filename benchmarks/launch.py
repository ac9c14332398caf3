"""What a start of pre-training spends its time on, from the command to the first finished optimiser step.

    python -m benchmarks.launch [--gpu] [--launchers python deepspeed torchrun] [--ranks 2] [--starts 3]
    [--record FILE.md] [key.sub=value ...]

Each start is the user's own command on a small packed set that is drawn and tokenized on the spot, ended once two steps
stand in its metrics. What a phase took is what the run itself wrote into starts.jsonl. Beside every round stands a bare
`python -c "import torch, deepspeed"`: totals are given as multiples of it. One start before the first round finds an
empty compile cache, and builds what DeepSpeed builds once a machine; it has a column of its own and is in no median.
CPU-sized by default (peco_vittiny16 on two ranks); --gpu starts peco_vith14 at full size on every GPU of the machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from benchmarks.record import at_least, benchmark_parser, markdown_table, parse, publish
from benchmarks.sets import make_root
from benchmarks.stages import STAGES, call, ended, launcher
from benchmarks.turns import ratios, spread
from peco_ds.command_line import run
from peco_ds.config import PretrainRecipe
from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.errors import UserError
from peco_ds.recipe_files import SETTINGS, load_recipe
from peco_ds.runtime.timeline import METRICS_FILE, STARTS_FILE, read_rows

PHASES = tuple("launcher imports data ranks records model engine checkpoint".split()) + ("first batch", "first step")
LAUNCHERS = ("python", "deepspeed", "torchrun")
BARE = [sys.executable, "-c", "import torch, deepspeed"]
LONGEST_START_S = 900.0
SMALL = "run.micro_batch=4 run.precision=fp32 data.num_workers=1".split()
Start = dict[str, float]  # seconds by phase


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(
        "launch",
        __doc__,
        gpu="peco_vith14 at full size; without it peco_vittiny16 with a small batch",
        overrides="settings of the recipe",
    )
    parser.add_argument("--recipe", help="another one (default: by --gpu)")
    parser.add_argument("--deepspeed_config", type=Path, default=DS_CONFIGS / "zero3.json")
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=LAUNCHERS)
    ranks = "of deepspeed and torchrun (default: the GPUs of the machine, 2 without one)"
    parser.add_argument("--ranks", type=at_least(1), help=ranks)
    starts = "of each launcher, by turns (default: %(default)s)"
    parser.add_argument("--starts", type=at_least(1), default=3, help=starts)
    parser.add_argument("--work", type=Path, help="folder for the set and the runs (default: a temporary one)")
    args = parse(parser, argv)
    # a time limit ends the start in hand too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    def keep(found: dict[str, list[Start]]) -> str:
        title = "From the command to the first step"
        return publish(args, title, table(found), "deepspeed", "timm", "torchvision")

    with tempfile.TemporaryDirectory(prefix="peco_launch_") as temporary:
        sys.stdout.write(keep(measure(args, (args.work or Path(temporary)).resolve(), keep)))
    return 0


def measure(args: argparse.Namespace, work: Path, keep: Callable[[dict], object]) -> dict[str, list[Start]]:
    """Starts by launcher.

    "bare" has the bare imports, "first" the start that came before all. `keep` is given them after every round.
    """
    recipe = args.recipe or ("peco_vith14" if args.gpu else "peco_vittiny16")
    settings = [*([] if args.gpu else SMALL), *args.overrides]
    micro_batch = load_recipe(PretrainRecipe, recipe, settings).recipe.run.micro_batch
    settings += make_root(work, recipe, settings, images=max(32, 4 * micro_batch))
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled")}
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"

    def start(name: str, folder: str) -> Start:
        ranks = 1 if name == "python" else args.ranks or torch.cuda.device_count() or 2
        out = work / "runs" / folder
        command = [*launcher(name, ranks), STAGES / "pretrain.py", "--recipe", recipe, "--out", out]
        command += ["--deepspeed_config", args.deepspeed_config, *settings, f"run.global_batch={micro_batch * ranks}"]
        return phases_of(out, [str(word) for word in command], env)

    found: dict[str, list[Start]] = {"bare": [], "first": [start(args.launchers[0], "first")]}
    found |= {name: [] for name in args.launchers}
    for number in range(args.starts):
        begun = time.perf_counter()
        call(BARE, env)
        found["bare"].append({"total": time.perf_counter() - begun})
        for name in args.launchers[:: 1 if number % 2 else -1]:
            found[name].append(start(name, f"{name}_{number}"))
        keep(found)
    return found


def phases_of(out: Path, command: list[str], env: dict[str, str]) -> Start:
    """Run a start until its second step is logged, then end it and what it started.

    Returns: seconds by phase, "total" to the end of the first step, and "second step".
    Raises: UserError with the end of its output if it ends by itself before, or takes too long.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / "output.txt"
    if log.exists() and not (out / SETTINGS).is_file():
        raise UserError(f"{log}: stands there already, and no run beside it; give another --work, or move it away")
    begun, deadline = time.time(), time.monotonic() + LONGEST_START_S
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
        try:
            while len(rows := read_rows(out / METRICS_FILE)[0]) < 2:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ended(command, process.poll(), f"no second step; {log.read_text(errors='replace')}")
                time.sleep(0.1)
        finally:
            end_tree(process)
    events = {row.get("event"): row for row in read_rows(out / STARTS_FILE)[0]}
    launcher_s = events["start"]["time"] - begun
    return phases_from(events["start"], events["first_step"], rows[1]["step_s"], launcher_s=launcher_s)


def phases_from(start: dict, first_step: dict, second_step_s: float, *, launcher_s: float) -> Start:
    """Rows of starts.jsonl -> seconds by phase.

    Args: launcher_s: from the command to the beginning of rank 0's process.
    """
    launcher_s = max(0.0, launcher_s)
    first = {"first batch": first_step["batch_s"], "first step": first_step["step_s"]}
    total = {"total": launcher_s + first_step["up_s"], "second step": second_step_s}
    return {"launcher": launcher_s, **start["phases_s"], **first, **total}


def end_tree(process: subprocess.Popen) -> None:
    """End a command with all it started, and remove what these kept in shared memory: a run that is asked to stop would
    save first.
    """
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    shared: set[Path] = set()
    # launchers first: they would report, or restart, the ranks
    for one in tree:
        try:
            shared |= {Path(found.path) for found in one.memory_maps() if found.path.startswith("/dev/shm/")}
            one.kill()
        except psutil.Error:
            continue
    process.wait()
    psutil.wait_procs(tree, timeout=30)
    for left in shared.union(*(Path("/dev/shm").glob(f"torch_{one.pid}_*") for one in tree)):
        left.unlink(missing_ok=True)


def table(found: dict[str, list[Start]]) -> str:
    """Medians by launcher, as markdown; the totals also as multiples of the bare imports of the same round."""
    launchers = [name for name in found if name not in ("bare", "first")]
    (first,), bare = found["first"], [one["total"] for one in found["bare"]]
    other = [name for one in found[launchers[0]] for name in one if name not in (*PHASES, "total", "second step")]
    rows = [
        (name, *(spread([one.get(name, 0.0) for one in found[by]]) for by in launchers), f"{first.get(name, 0.0):.2f}")
        for name in [*PHASES, *dict.fromkeys(other), "total", "second step"]
    ]
    multiples = [spread(ratios([one["total"] for one in found[by]], bare)) for by in launchers]
    rows.append(("total, in bare imports", *multiples, f"{first['total'] / statistics.median(bare):.2f}"))
    about = (
        f"Seconds by phase, medians of {len(bare)} starts (smallest to largest), by turns; `import torch, deepspeed` "
        f"alone: {spread(bare)} s. `first`: {launchers[0]}, with empty compile caches."
    )
    return f"{about}\n\n{markdown_table(['phase', *launchers, 'first'], rows)}"


if __name__ == "__main__":
    run(main)
