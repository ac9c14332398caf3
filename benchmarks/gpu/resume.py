"""Parts whose work needs processes of its own: a small run from images to weights with a stop in between, and the tests
that need a GPU.

The run is stopped by a signal, as a job's time limit does it, and continued by the same command; beside it the same run
goes through without a stop. Both must end in the same bits.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path

from benchmarks.gpu.parts import Part
from benchmarks.record import markdown_table
from benchmarks.stages import without_ranks

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RECIPE = "peco_vittiny16"
# Four passes a step. On a GPU enough steps that the signal comes before the last one.
GPU = "run.micro_batch=64 run.global_batch=256"
SMALL = (
    "run.micro_batch=2 run.global_batch=8 run.precision=fp32 data.num_workers=0 model.depth=2 model.width=48 "
    "model.image_px=64 views.tokenizer_px=32 model.patch_px=16 mask.count=6 mask.min_block=2 objective.num_codes=64"
)
STEPS, IMAGES = {False: 60, True: 30}, {False: 256, True: 16}
STOP_AFTER = 3  # steps
COMPARED = ("loss", "accuracy", "lr", "grad_norm")
WHOLE, STOPPED = "whole", "stopped"


def resume(part: Part) -> None:
    """Images, tokens, a run that is stopped and continued, and one that is not; what both come to."""
    from benchmarks.sets import make_root

    begun, took = time.monotonic(), {}
    own = (SMALL if part.small else GPU).split()
    settings = [*own, *make_root(part.work / "set", RECIPE, own, images=IMAGES[part.small])]
    took["images, packing, tokenizing"] = time.monotonic() - begun
    settings += [f"schedule.steps={STEPS[part.small]}", "schedule.warmup_steps=3"]
    runs = {name: part.work / name for name in (WHOLE, STOPPED)}
    commands = {name: command(out, settings) for name, out in runs.items()}
    env = without_ranks() | ({"DS_ACCELERATOR": "cpu"} if part.small else {})
    begun = time.monotonic()
    whole = part.processes.start(commands[WHOLE], part.logs / f"{part.name}_{WHOLE}.log", env)
    log = part.logs / f"{part.name}_{STOPPED}.log"
    stopped_at = stop(part, part.processes.start(commands[STOPPED], log, env), runs[STOPPED], log)
    expect(whole.wait(), 0, part.logs / f"{part.name}_{WHOLE}.log")
    took["both runs, side by side, until one was stopped"] = time.monotonic() - begun
    begun = time.monotonic()
    expect(part.processes.start(commands[STOPPED], log, env).wait(), 0, log)
    took["the stopped run, continued to its end"] = time.monotonic() - begun
    found = {"stopped_at": stopped_at, "steps": STEPS[part.small], "stages_s": took, **compared(runs)}
    part.keep("", said(found, runs[WHOLE]), **found)


def command(out: Path, settings: list[str]) -> list:
    config = REPOSITORY / "ds_configs" / "zero1.json"
    stage = [sys.executable, REPOSITORY / "peco_ds" / "pretrain.py", "--recipe", RECIPE]
    return [*stage, "--deepspeed_config", config, "--out", out, *settings]


def stop(part: Part, process, out: Path, log: Path) -> int:
    """Stop a run once a few steps stand in its metrics.

    Returns: its last step. Raises: RuntimeError if it ends otherwise.
    """
    from peco_ds.errors import EXIT_REQUEUE
    from peco_ds.runtime.timeline import METRICS_FILE, read_rows

    while len(rows := read_rows(out / METRICS_FILE)[0]) < STOP_AFTER and process.poll() is None:
        time.sleep(0.02)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    expect(process.wait(), EXIT_REQUEUE, log)
    rows = read_rows(out / METRICS_FILE)[0]
    return rows[-1]["step"]


def expect(code: int, wanted: int, log: Path) -> None:
    if code != wanted:
        last = " ".join(log.read_text(errors="replace").split())[-200:]
        raise RuntimeError(f"{log.stem} ended with {code}, not {wanted}; its log ends in: {last}")


def compared(runs: dict[str, Path]) -> dict:
    """Whether the two runs logged and saved the same bits; where not, from which step on and by how much."""
    import torch

    from peco_ds.runtime.checkpoint.consolidate import fp32_weights
    from peco_ds.runtime.checkpoint.files import newest_whole
    from peco_ds.runtime.metrics import read_metrics

    rows = [read_metrics(runs[name]) for name in (WHOLE, STOPPED)]
    apart = [one["step"] for one, other in zip(*rows) if any(one[name] != other[name] for name in ("step", *COMPARED))]
    weights, others = (fp32_weights(newest_whole(runs[name])) for name in (WHOLE, STOPPED))
    unlike = [name for name, tensor in weights.items() if not torch.equal(tensor, others[name])]
    largest = max(((weights[name] - others[name]).abs().max().item() for name in unlike), default=0.0)
    return {
        "same_bits": not apart and not unlike and len(rows[0]) == len(rows[1]) and weights.keys() == others.keys(),
        "first_step_apart": min(apart, default=None),
        "tensors_apart": len(unlike),
        "tensors": len(weights),
        "largest_difference": largest,
    }


def said(found: dict, whole: Path) -> str:
    from benchmarks.launch import phases_from
    from peco_ds.runtime.timeline import METRICS_FILE, STARTS_FILE, read_rows

    events = {row.get("event"): row for row in read_rows(whole / STARTS_FILE)[0]}
    second_s = read_rows(whole / METRICS_FILE)[0][1]["step_s"]
    phases = phases_from(events["start"], events["first_step"], second_s, launcher_s=0.0)
    rows = [*found["stages_s"].items(), *((f"start-up of the whole run: {name}", s) for name, s in phases.items())]
    if found["same_bits"]:
        end = f"all {found['tensors']} tensors and all logged figures have the same bits"
    else:
        end = (
            f"NOT the same bits: logged figures differ from step {found['first_step_apart']} on, "
            f"{found['tensors_apart']} of {found['tensors']} tensors by at most {found['largest_difference']:.2g}"
        )
    about = (
        f"{RECIPE}, {found['steps']} steps, stopped by SIGTERM after step {found['stopped_at']} and continued: {end}."
    )
    return f"{about}\n\n{markdown_table(['', 's'], [(name, f'{seconds:.1f}') for name, seconds in rows])}"


def tests(part: Part) -> None:
    """The tests with the marker `gpu`, in a process of their own."""
    files = marked_files()
    if not files:
        part.keep("", "No test has the marker `gpu`.", files=0)
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-q", "-p", "no:cacheprovider", "--no-header"]
    try:
        code = part.processes.run([*command, *files], part.log, part.left_s(), without_ranks())
    finally:
        lines = part.log.read_text(errors="replace").splitlines()
        counts = counts_of(lines)
        part.keep("", "\n".join(["```", *lines[-30:], "```"]), files=len(files), **counts)
    if code not in (0, 5):
        raise RuntimeError(f"pytest ended with {code}: {lines[-1] if lines else 'it said nothing'}")


def marked_files() -> list[str]:
    """Tests that are for a GPU; the others need not be read."""
    paths = sorted((REPOSITORY / "tests").glob("test_*.py"))
    return [str(path) for path in paths if re.search(r"mark\.gpu\b", path.read_text())]


def counts_of(lines: list[str]) -> dict[str, int]:
    """Of pytest's last line: 3 passed, 1 skipped in 2.1s."""
    last = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|skipped|error)", line)), "")
    names = ("passed", "failed", "skipped", "error")
    return {name: int(found.group(1)) if (found := re.search(rf"(\d+) {name}", last)) else 0 for name in names}
