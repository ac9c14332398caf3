"""What a start of pre-training spends its time on, from the command to the first finished optimiser step.

    python benchmarks/launch.py [--gpu] [--launchers python deepspeed torchrun] [--ranks 2] [--starts 3] [--record
    FILE.md] [key.sub=value ...]

Each start is the user's own command on a small packed set that is drawn and tokenized on the spot, ended once two steps
stand in its metrics. What a phase took is what
the run itself wrote into starts.jsonl. Beside every round stands a bare `python -c "import torch, deepspeed"`: totals
are given as multiples of it. One start before the first round finds an empty compile cache, and builds what DeepSpeed
builds once a machine; it has a column of its own and is in no median. CPU-sized by default (peco_vittiny16 on two
ranks); --gpu starts peco_vith14 at full size on every GPU of the machine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from record import at_least, require_gpu

from peco_ds.command_line import Parser, run
from peco_ds.errors import UserError

PHASES = (
    "launcher",
    "imports",
    "data",
    "ranks",
    "records",
    "model",
    "engine",
    "checkpoint",
    "first batch",
    "first step",
)
BARE = [sys.executable, "-c", "import torch, deepspeed"]
IMAGES_PX = (320, 256)
LONGEST_START_S = 900.0
SMALL = "run.micro_batch=4 run.precision=fp32 data.num_workers=1".split()


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpu", action="store_true", help="peco_vith14 at full size; without it peco_vittiny16 with a small batch"
    )
    parser.add_argument("--recipe", help="another one (default: by --gpu)")
    parser.add_argument("--deepspeed_config", type=Path, default=HERE.parent / "ds_configs" / "zero3.json")
    parser.add_argument(
        "--launchers",
        nargs="+",
        choices=("python", "deepspeed", "torchrun"),
        default=["python", "deepspeed", "torchrun"],
    )
    parser.add_argument(
        "--ranks", type=at_least(1), help="of deepspeed and torchrun (default: the GPUs of the machine, 2 without one)"
    )
    parser.add_argument(
        "--starts", type=at_least(1), default=3, help="of each launcher, by turns (default: %(default)s)"
    )
    parser.add_argument("--work", type=Path, help="folder for the set and the runs (default: a temporary one)")
    parser.add_argument("--record", type=Path, help="also write the table to this file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings of the recipe")
    args = parser.parse_intermixed_args(argv)
    # a time limit ends the start in hand too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    command = shlex.join(["python", "benchmarks/launch.py", *(sys.argv[1:] if argv is None else argv)])

    def keep(found: dict[str, list[dict[str, float]]]) -> None:
        from record import write_record

        if args.record:
            write_record(
                args.record,
                "From the command to the first step",
                command,
                table(found),
                "deepspeed",
                "timm",
                "torchvision",
            )

    with tempfile.TemporaryDirectory(prefix="peco_launch_") as temporary:
        found = measure(args, (args.work or Path(temporary)).resolve(), keep)
    sys.stdout.write(table(found) + "\n")
    return 0


def measure(args: argparse.Namespace, work: Path, keep: Callable[[dict], None]) -> dict[str, list[dict[str, float]]]:
    """Starts by launcher, each as seconds by phase.

    "bare" has the bare imports, "first" the start that came before all. `keep` is given them after every round.
    """
    import torch

    if args.gpu:
        require_gpu()
    ranks = args.ranks or torch.cuda.device_count() or 2
    recipe = args.recipe or ("peco_vith14" if args.gpu else "peco_vittiny16")
    settings = [*([] if args.gpu else SMALL), *args.overrides]
    micro_batch = _micro_batch(recipe, settings)
    data = make_set(work, recipe, settings, images=max(32, 4 * micro_batch))
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled")}
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"

    def start(launcher: str, name: str) -> dict[str, float]:
        of_launcher = 1 if launcher == "python" else ranks
        out = work / "runs" / name
        command = [
            *_launcher(launcher, of_launcher),
            str(HERE.parent / "peco_ds" / "pretrain.py"),
            "--recipe",
            recipe,
            "--deepspeed_config",
            str(args.deepspeed_config),
            "--out",
            str(out),
        ]
        return phases_of(out, [*command, *settings, *data, f"run.global_batch={micro_batch * of_launcher}"], env)

    found: dict[str, list[dict[str, float]]] = {
        "bare": [],
        "first": [start(args.launchers[0], "first")],
        **{launcher: [] for launcher in args.launchers},
    }
    for number in range(args.starts):
        found["bare"].append({"total": _seconds_of(BARE, env)})
        for launcher in args.launchers[:: 1 if number % 2 else -1]:
            found[launcher].append(start(launcher, f"{launcher}_{number}"))
        keep(found)
    return found


def _launcher(name: str, ranks: int) -> list[str]:
    if name == "deepspeed":
        with socket.socket() as free:  # its own default port may be another run's
            free.bind(("127.0.0.1", 0))
            return [
                sys.executable,
                "-m",
                "deepspeed.launcher.runner",
                "--master_port",
                str(free.getsockname()[1]),
                "--num_gpus",
                str(ranks),
            ]
    return [
        sys.executable,
        *(
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
            if name == "torchrun"
            else []
        ),
    ]


def _micro_batch(recipe: str, settings: list[str]) -> int:
    from peco_ds.config import PretrainRecipe
    from peco_ds.recipe_files import load_recipe

    return load_recipe(PretrainRecipe, recipe, settings).recipe.run.micro_batch


def make_set(work: Path, recipe: str, settings: list[str], *, images: int) -> list[str]:
    """Draw images, pack them, and tokenize them with a tokenizer of random weights: a start does not look at what
    they show.

    Returns: the settings that make the recipe read them, for steps without end and without a save.
    """
    import torch

    from peco_ds.config import PretrainRecipe, TokenizerSettings
    from peco_ds.models.tokenizers import build_tokenizer, save_tokenizer
    from peco_ds.recipe_files import load_recipe

    cfg = load_recipe(PretrainRecipe, recipe, settings).recipe
    levels = (cfg.views.tokenizer_px // cfg.model.grid).bit_length()  # stride 2 ** (levels - 1)
    tokenizer = TokenizerSettings(
        channels=16,
        channel_mults=(1,) * levels,
        blocks_per_level=1,
        attention=False,
        z_channels=16,
        num_codes=cfg.objective.num_codes,
        code_dim=8,
        l2_normalized=True,
    )
    torch.manual_seed(0)
    save_tokenizer(work / "tokenizer", build_tokenizer(tokenizer).state_dict(), tokenizer, {"judge": "none"})
    draw_images(work / "raw", images)
    own = [f"data.root={work}", "data.tokens=tokens/train", "views.count=1", "run.log_every_steps=1"]
    own += [
        "schedule.epochs=null",
        "schedule.steps=1000000",
        "schedule.warmup_epochs=null",
        "schedule.warmup_steps=10",
        "checkpoint.every_epochs=null",
    ]
    stages = HERE.parent / "peco_ds"
    _call(
        [
            sys.executable,
            str(stages / "pack_images.py"),
            "--images",
            str(work / "raw"),
            "--out",
            str(work / "images" / "train"),
            "--workers",
            "2",
        ]
    )
    _call([sys.executable, str(stages / "tokenize_shards.py"), "--recipe", recipe, *settings, *own, "run.compile=none"])
    return own


def draw_images(folder: Path, count: int) -> None:
    """JPEGs of soft random colours."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        colours = Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8))
        colours.resize(IMAGES_PX, Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=90)


def phases_of(out: Path, command: list[str], env: dict[str, str]) -> dict[str, float]:
    """Run a start until its second step is logged, then end it and what it started.

    Returns: seconds by phase, "total" to the end of the first step, and "second step".
    Raises: UserError with the end of its output if it ends by itself before, or takes too long.
    """
    from peco_ds.runtime.timeline import METRICS_FILE, STARTS_FILE, read_rows

    out.mkdir(parents=True, exist_ok=True)
    log = out / "output.txt"
    begun, deadline = time.time(), time.monotonic() + LONGEST_START_S
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
        try:
            while len(rows := read_rows(out / METRICS_FILE)[0]) < 2:
                if process.poll() is not None or time.monotonic() > deadline:
                    tail = " ".join(log.read_text(errors="replace").split())[-600:]
                    raise UserError(
                        f"{shlex.join(command)}: no second step, exit code {process.poll()}; its output ends in: {tail}"
                    )
                time.sleep(0.1)
        finally:
            end_tree(process)
    events = {row.get("event"): row for row in read_rows(out / STARTS_FILE)[0]}
    return phases_from(
        events["start"], events["first_step"], rows[1]["step_s"], launcher_s=events["start"]["time"] - begun
    )


def phases_from(start: dict, first_step: dict, second_step_s: float, *, launcher_s: float) -> dict[str, float]:
    """Rows of starts.jsonl -> seconds by phase.

    Args: launcher_s: from the command to the beginning of rank 0's process.
    """
    spent = {
        "launcher": max(0.0, launcher_s),
        **start["phases_s"],
        "first batch": first_step["batch_s"],
        "first step": first_step["step_s"],
    }
    return {**spent, "total": max(0.0, launcher_s) + first_step["up_s"], "second step": second_step_s}


def end_tree(process: subprocess.Popen) -> None:
    """End a command with all it started, and remove what these kept in shared memory: a run that is asked to stop would
    save first.
    """
    import psutil

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


def _seconds_of(command: list[str], env: dict[str, str]) -> float:
    begun = time.perf_counter()
    _call(command, env)
    return time.perf_counter() - begun


def _call(command: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise UserError(
            f"{shlex.join(command)}: exit code {done.returncode}; its output ends in: "
            f"{' '.join((done.stdout + done.stderr).split())[-600:]}"
        )


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Medians by launcher, as markdown; the totals also as multiples of the bare imports of the same round."""
    launchers = [name for name in found if name not in ("bare", "first")]
    bare = [one["total"] for one in found["bare"]]

    def row(name: str) -> str:
        cells = [_spread([one.get(name, 0.0) for one in found[launcher]]) for launcher in launchers]
        return f"| {name} | {' | '.join([*cells, format(found['first'][0].get(name, 0.0), '.2f')])} |"

    ratios = [_spread([one["total"] / alone for one, alone in zip(found[launcher], bare)]) for launcher in launchers]
    other = [name for one in found[launchers[0]] for name in one if name not in (*PHASES, "total", "second step")]
    names = [*PHASES, *dict.fromkeys(other), "total", "second step"]
    return "\n".join(
        [
            f"Seconds by phase, medians of {len(bare)} starts (smallest to largest), by turns; `import "
            f"torch, deepspeed` alone: {_spread(bare)} s. `first`: {launchers[0]}, with empty compile "
            "caches.",
            "",
            f"| phase | {' | '.join(launchers)} | first |",
            f"|---|{'---|' * (len(launchers) + 1)}",
            *map(row, names),
            f"| total, in bare imports | {' | '.join(ratios)} | "
            f"{found['first'][0]['total'] / statistics.median(bare):.2f} |",
        ]
    )


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    run(main)
