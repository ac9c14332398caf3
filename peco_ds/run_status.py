"""Show where runs stand, from their folders alone: no Slurm, no GPU, while the run writes or on a copy.

bash launchers/status.sh runs/peco_vith14 data/tokens/train
"""

from __future__ import annotations

import json
import os
import re
import socket
import statistics
import sys
import time
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python's path needs the package's parent, not the package's folder.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds.command_line import Parser, run, user_path
from peco_ds.errors import EXIT_DONE, EXIT_REQUEUE, UserError
from peco_ds.runtime.timeline import EVALUATION_FILE, METRICS_FILE, STARTS_FILE, Account, clock, read_rows
from peco_ds.schema import MANIFEST_NAME, sha256_of_file
from peco_ds.strict_yaml import NOT_YAML, read_yaml

SETTINGS = "settings.yaml"
CHECKPOINTS = "checkpoints"
# The folder of records in an unfinished token set.
PARTS = ".parts"
# The number of newest checkpoints that are shown.
SHOWN = 3
# A run is called stale when its last row is older than all of these: QUIET_ROWS times the usual gap between rows;
# QUIET_LONGEST times the longest gap, since it may evaluate or save; QUIET_S seconds, before and after the second row,
# since the first steps may compile.
QUIET_ROWS = 10
QUIET_LONGEST = 3
QUIET_S = (600.0, 120.0)
ENDS = {EXIT_DONE: "done", EXIT_REQUEUE: "stopped in good order"}
MEASURES = ("loss", "accuracy", "train_top1", "psnr")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        description=__doc__.splitlines()[0], epilog="exit codes: 0 done, 2 a folder is neither a run nor a token set"
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=user_path,
        metavar="RUN",
        help="--out folder of a training, or a folder of token shards, finished or not",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read the checkpoints and compare their hashes, not only their sizes"
    )
    args = parser.parse_args(argv)
    kinds = [_kind(folder) for folder in args.folders]
    for folder, kind in zip(args.folders, kinds):
        lines = run_lines(folder, verify=args.verify) if kind == "run" else token_lines(folder)
        sys.stdout.write("\n  ".join([str(folder), *lines]) + "\n")
    return EXIT_DONE


def _kind(folder: Path) -> str:
    """The kind of a folder: "run" or "tokens".

    Raises: UserError if it is neither.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the --out folder of a training, or a folder of token shards")
    if any((folder / name).exists() for name in (SETTINGS, STARTS_FILE, METRICS_FILE)):
        return "run"
    if (folder / PARTS).is_dir() or _object(folder / MANIFEST_NAME)[0].get("kind") == "tokens":
        return "tokens"
    raise UserError(
        f"{folder}: neither a run folder (no {SETTINGS}) nor a token set (no {MANIFEST_NAME} of one); "
        "give the --out folder of a training"
    )


def run_lines(folder: Path, *, verify: bool = False, now: float | None = None) -> list[str]:
    """Where a run stands, a line a topic. Only reads; damage is reported.

    Args:
        verify: compare the hashes of the checkpoints too.  now: unix time; None: the clock's.
    """
    now = time.time() if now is None else now
    settings, settings_fault = _settings(folder)
    rows, rows_fault = read_rows(folder / METRICS_FILE)
    events, events_fault = read_rows(folder / STARTS_FILE)
    evaluations, evaluation_fault = read_rows(folder / EVALUATION_FILE)
    account = Account()
    for event in events:
        account.event(event)
    for row in rows:
        account.row(row)
    starts = [event for event in events if event.get("event") == "start"]
    recipe = settings.get("recipe")
    name = recipe.get("name", "?") if isinstance(recipe, dict) else "?"
    lines = [f"{settings.get('stage', 'stage unknown')}, recipe {name}" + (_machine(starts[-1]) if starts else "")]
    lines += _progress(rows, starts, evaluations)
    lines += _state(rows, events, starts, now)
    lines += _start_up(events, starts)
    lines += _checkpoints(folder / CHECKPOINTS, verify)
    troubles = [
        f"{rows[-1][name]} {text}"
        for name, text in (("skipped_steps", "steps skipped"), ("bad_images", "bad images"))
        if rows and rows[-1].get(name)
    ]
    lines += [", ".join(troubles)] if troubles else []
    found = account.goodput()
    lines += [found.line()] if found.wall_s else []
    return lines + [f"note: {fault}" for fault in (settings_fault, rows_fault, events_fault, evaluation_fault) if fault]


def _settings(folder: Path) -> tuple[dict, str]:
    try:
        loaded = read_yaml(folder / SETTINGS)
    except (OSError, *NOT_YAML) as error:
        return {}, f"{SETTINGS} is not readable ({' '.join(str(error).split())[:100]})"
    return (loaded, "") if isinstance(loaded, dict) else ({}, f"{SETTINGS} is not what a run wrote there")


def _object(path: Path) -> tuple[dict, str]:
    """A JSON object, and why there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, f"{path.name} is missing"
    except (OSError, ValueError, RecursionError):
        return {}, f"{path.name} is not readable"
    return (value, "") if isinstance(value, dict) else ({}, f"{path.name} is no JSON object")


def _number(row: dict, name: str) -> float | None:
    value = row.get(name)
    return (
        float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15 else None
    )


def _machine(start: dict) -> str:
    return (
        f", {start.get('ranks', '?')} ranks, ZeRO-{start.get('zero_stage', '?')}, on "
        f"{start.get('host', '?')}, commit {str(start.get('commit', '?'))[:12]}"
    )


def _progress(rows: list[dict], starts: list[dict], evaluations: list[dict]) -> list[str]:
    """Step, measures, speed, time to go."""
    if not rows:
        return ["no step logged yet"]
    row, start = rows[-1], starts[-1] if starts else {}
    step, total, step_s = _number(row, "step") or 0.0, _number(start, "total_steps"), _number(row, "step_s")
    parts = [f"step {step:.0f}" + (f" of {total:.0f} ({100 * step / total:.1f} %)" if total else "")]
    parts += [f"{name} {value:.4g}" for name in MEASURES if (value := _number(row, name)) is not None]
    parts += [f"{value:.1f} images/s" for value in [_number(row, "images_per_s")] if value is not None]
    stop = _number(start, "stop_step") or total
    if stop and step_s is not None and step < stop:
        parts.append(f"{clock((stop - step) * step_s)} to go" + (f" to step {stop:.0f}" if stop != total else ""))
    lines = [", ".join(parts)]
    if evaluations:
        measured = [
            f"{name} {value:.4g}"
            for name in evaluations[-1]
            if name != "step" and (value := _number(evaluations[-1], name)) is not None
        ]
        lines.append(f"held-out at step {evaluations[-1].get('step', '?')}: {', '.join(measured)}")
    return lines


def _state(rows: list[dict], events: list[dict], starts: list[dict], now: float) -> list[str]:
    """The number of starts, and how the last one ended or how long it has been silent."""
    if not starts:
        return ["never started with this release, or starts.jsonl is lost"]
    number = _number(starts[-1], "start")
    ends = {_number(event, "start"): event for event in events if event.get("event") == "end"}
    counted = f"{len(starts)} starts" if len(starts) > 1 else "1 start"
    before = ends.get(_number(starts[-2], "start")) if len(starts) > 1 else None
    history = f"; the one before {_ending(before) if before else 'was killed'}" if len(starts) > 1 else ""
    job = f", Slurm job {starts[-1]['slurm_job']}" if starts[-1].get("slurm_job") else ""
    if number in ends:
        return [f"{counted}; the last {_ending(ends[number])}{job}"]
    times = [value for row in rows if _number(row, "start") == number and (value := _number(row, "time")) is not None]
    ready = (_number(starts[-1], "time") or 0.0) + (_number(starts[-1], "startup_s") or 0.0)
    # A copy may be read on a machine whose clock is behind.
    quiet = max(0.0, now - (times or [ready])[-1])
    gaps = [after - earlier for earlier, after in zip(times, times[1:]) if after > earlier]
    usual = statistics.median(gaps) if gaps else 0.0
    patience = max(QUIET_S[1], QUIET_ROWS * usual, QUIET_LONGEST * max(gaps)) if gaps else QUIET_S[0]
    word = (
        "killed: its process is gone"
        if _is_gone(starts[-1])
        else "STALE, killed or hung"
        if quiet > patience
        else "running"
    )
    return [
        f"{word}: last heard of {clock(quiet)} ago"
        + (f" (a row every {usual:.1f} s)" if gaps else "")
        + f"; {counted}{job}{history}"
    ]


def _start_up(events: list[dict], starts: list[dict]) -> list[str]:
    """How the last start spent its time until its first step was done."""
    startup_s = _number(starts[-1], "startup_s") if starts else None
    if startup_s is None:
        return []
    found = starts[-1].get("phases_s")
    phases = found if isinstance(found, dict) else {}
    parts = [
        f"{name} {spent:.1f} s" for name in phases if (spent := _number(phases, name)) is not None and spent >= 0.05
    ]
    line = f"start-up {startup_s:.1f} s" + (f" ({', '.join(parts)})" if parts else "")
    first = [
        event
        for event in events
        if event.get("event") == "first_step" and event.get("start") == starts[-1].get("start")
    ]
    known = [
        f"{words} {spent:.1f} s"
        for words, name in (("first batch", "batch_s"), ("first step", "step_s"))
        if first and (spent := _number(first[-1], name)) is not None
    ]
    return ["; ".join([line, ", ".join(known)]) if known else line]


def _is_gone(start: dict) -> bool:
    """Whether the start ran on this host and its process has ended."""
    pid = _number(start, "pid")
    return (
        start.get("host") == socket.gethostname()
        and pid is not None
        and os.path.isdir("/proc/self")
        and not os.path.isdir(f"/proc/{pid:.0f}")
    )


def _ending(end: dict) -> str:
    code, reason = end.get("code"), end.get("reason")
    text = ENDS[code] if code in (EXIT_DONE, EXIT_REQUEUE) else f"ended with code {code}"
    return f"{text} at step {end.get('step', '?')}" + (f" ({reason})" if reason else "")


def _checkpoints(root: Path, verify: bool) -> list[str]:
    found = sorted((path for path in _entries(root) if re.fullmatch(r"step_\d{8}", path.name)), reverse=True)
    names = [path.name for path in _entries(root)]
    lines = [
        f"checkpoint {path.name}: {_size(path)}, "
        f"{_fault(path, verify) or ('whole, hashes compared' if verify else 'whole by its sizes')}"
        for path in found[:SHOWN]
    ]
    more = [f"{len(found) - SHOWN} older"] if len(found) > SHOWN else []
    more += [
        f"{name.removeprefix('.tmp-')} being written, or left over"
        for name in sorted(names)
        if name.startswith(".tmp-")
    ]
    aside = sum(name.startswith("set_aside_") for name in names)
    more += [f"{aside} set aside"] if aside else []
    return (lines or ["no checkpoint yet"]) + ([f"further checkpoints: {', '.join(more)}"] if more else [])


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _size(folder: Path) -> str:
    """Bytes of a checkpoint's files, for people."""
    total = 0
    for path in _entries(folder):
        try:
            total += path.stat().st_size
        except OSError:
            # It was removed meanwhile.
            continue
    return f"{total / 2**30:.2f} GiB" if total >= 2**30 else f"{total / 2**20:.1f} MiB"


def _fault(folder: Path, verify: bool) -> str:
    """What is wrong with a checkpoint by its manifest; "" if nothing is."""
    manifest, fault = _object(folder / MANIFEST_NAME)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        return f"DAMAGED ({fault or f'{MANIFEST_NAME} lists no files'})"
    for name, entry in sorted(files.items()):
        try:
            num_bytes, sha256 = entry
            size = (folder / Path(name).name).stat().st_size
        except (TypeError, ValueError):
            return f"DAMAGED ({MANIFEST_NAME} is not what a run wrote there)"
        except OSError:
            return f"DAMAGED ({name} is missing)"
        if size != num_bytes:
            return f"DAMAGED ({name} has {size} bytes, {num_bytes} were written)"
        if verify and sha256_of_file(folder / Path(name).name) != sha256:
            return f"DAMAGED ({name} has changed since it was written)"
    return ""


def token_lines(folder: Path) -> list[str]:
    """How far a token set is."""
    manifest, fault = _object(folder / MANIFEST_NAME)
    if manifest.get("kind") == "tokens":
        shards = manifest.get("shards")
        count = len(shards) if isinstance(shards, list) else "?"
        return [
            f"token set, finished: {count} shards, {manifest.get('samples', '?')} images, "
            f"{manifest.get('num_views', '?')} views each"
        ]
    done, images, unreadable, totals, damaged = 0, 0, 0, set(), 0
    for path in _entries(folder / PARTS):
        if path.suffix == ".json":
            part, _ = _object(path)
            shard = part.get("shard")
            if isinstance(shard, dict) and _has_size(folder / Path(str(shard.get("name"))).name, shard.get("bytes")):
                done += 1
                images += int(_number(shard, "samples") or 0)
                unreadable += int(_number(part, "unreadable") or 0)
                totals |= {part["of"]} if isinstance(part.get("of"), int) else set()
            else:
                damaged += 1
    total = f" of {max(totals)}" if totals else ""
    lines = [
        f"unfinished token set: {done}{total} shards done, {images} images"
        + (f", {unreadable} of them unreadable" if unreadable else "")
    ]
    lines += [f"note: {damaged} shards are damaged or gone; they are made again"] if damaged else []
    return lines + (
        [] if fault.endswith("missing") else [f"note: {fault or f'{MANIFEST_NAME} is not one of a token set'}"]
    )


def _has_size(path: Path, num_bytes) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except OSError:
        return False


if __name__ == "__main__":
    run(main)
