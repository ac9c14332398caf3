"""Record and read how a run spent its time: rows of metrics and evaluation, starts and ends, goodput.

Needs no torch, so that reading answers at once.

Rank 0 only ever appends to `starts.jsonl`. Its rows:
    start       number from 1, unix time at which the process began, seconds until the first step and of each phase
                before it, host, ranks, step resumed at, Slurm's job, command
    first_step  the first optimiser step of this start is done: seconds waited for its images, seconds of the step
                itself, compilation included
    dropped     the last rows of a start were taken out of metrics.jsonl because their steps are done again; how long
                that start had been up by then
    continued   the last checkpoint of a start holds steps that were in no row yet; how long it had been up by then
    end         how a start ended by itself; a start without one was killed, or still runs
A row of metrics.jsonl carries the number of its start and `up_s`, seconds since that process began by a clock that
never jumps. The wall clock is used only for the time between two processes.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from peco_ds.data.atomic_files import write_whole
from peco_ds.errors import EXIT_DONE, UserError, shown_command
from peco_ds.old_spellings import current_record

METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.jsonl"
STARTS_FILE = "starts.jsonl"
SCRATCH = "scratch"


def read_metrics(run_folder: Path) -> list[dict]:
    """Rows of metrics.jsonl, in order; [] if there are none. Unreadable rows are left out."""
    return read_rows(Path(run_folder) / METRICS_FILE)[0]


def read_evaluation(run_folder: Path) -> list[dict]:
    """Rows of evaluation.jsonl, in order; [] if there are none. Unreadable rows are left out."""
    return read_rows(Path(run_folder) / EVALUATION_FILE)[0]


def read_rows(path: Path) -> tuple[list[dict], str]:
    """Rows of a file of one JSON object a line, with today's names.

    Returns: the readable rows in order, and what is wrong with the file ("" if nothing is).
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], f"{path.name} cannot be read ({error.strerror})"
    rows, bad = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = _row(line)
            rows.append(row) if row is not None else bad.append(number)
    if not bad:
        return rows, ""
    # The last line has no end.
    if bad == [len(lines)]:
        return rows, f"the last line of {path.name} is half written"
    return rows, f"{path.name}: {len(bad)} lines are damaged, first line {bad[0]}"


def _row(line: bytes) -> dict | None:
    try:
        row = current_record(json.loads(line))
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return row if isinstance(row, dict) else None


def append_row(path: Path, row: dict) -> None:
    """Append one line, which is on disk when this returns; after a line that was cut short it begins a new one.

    Raises: UserError if the disk does not take it.
    """
    try:
        with open(path, "ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            write_row(file, row)
            os.fsync(file.fileno())
    except OSError as error:
        raise _not_written(path, error.strerror) from None


def write_row(file: BinaryIO, row: dict) -> None:
    """Write one line to an unbuffered file. NaN and infinities, which JSON does not have, become null.

    Raises: UserError if the disk does not take it, or not all of it.
    """
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    line = json.dumps(plain, allow_nan=False).encode() + b"\n"
    try:
        if file.write(line) != len(line):
            raise _not_written(Path(file.name), "no room for the whole line")
    except OSError as error:
        raise _not_written(Path(file.name), error.strerror) from None


def sync_rows(file: BinaryIO) -> None:
    """Return when all rows are on disk. Raises: UserError if they do not get there."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        raise _not_written(Path(file.name), error.strerror) from None


def _not_written(path: Path, reason: str | None) -> UserError:
    return UserError(
        f"{path}: cannot be written ({reason}); the newest checkpoint stands: mend that, then start again to go on"
    )


def drop_rows_after(path: Path, step: int) -> list[dict]:
    """Keep the rows up to `step`, each step once and in order; the file is replaced whole.

    Returns: the rows that were taken out.
    Raises: UserError if the disk does not take the new file; the old one stands.
    """
    if not path.is_file():
        return []
    kept, dropped, last = [], [], -1
    for line in path.read_bytes().split(b"\n"):
        row = _row(line)
        if row is None or not isinstance(row.get("step"), int):
            # A line that was cut short. Its step is done again, since it was not in the checkpoint.
            continue
        number = row["step"]
        if last < number <= step:
            kept.append(line)
            last = number
        else:
            dropped.append(row)
    text = b"".join(line + b"\n" for line in kept)
    if text != path.read_bytes():
        try:
            write_whole(path, text)
        except OSError as error:
            raise _not_written(path, error.strerror) from None
    return dropped


def drop_redone_steps(run_folder: Path, step: int) -> None:
    """Take rows after `step` out of metrics.jsonl, and record how long the starts that wrote them had been up."""
    path = run_folder / METRICS_FILE
    up_s: dict[int, float] = {}
    for row in read_rows(path)[0]:
        if isinstance(row.get("step"), int) and row["step"] > step:
            number = _count(row, "start")
            up_s[number] = max(up_s.get(number, 0.0), _seconds(row, "up_s"))
    # Written before the rows go: a kill in between loses nothing, and counting a start twice changes nothing.
    for number, seconds in up_s.items():
        append_row(run_folder / STARTS_FILE, {"event": "dropped", "start": number, "after_step": step, "up_s": seconds})
    drop_rows_after(path, step)


def process_age_s() -> float:
    """Seconds since this process began, by a clock that does not jump; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


class StartUp:
    """Seconds of a process by phase, from its beginning to its first step, in the order in which the phases came."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        # Age of the process at the end of the last phase.
        self._until_s = 0.0

    def ends(self, phase: str) -> None:
        """The time since the last phase ended counts as `phase`; times of the same name are added up."""
        now_s = process_age_s()
        self._spent[phase] = self._spent.get(phase, 0.0) + max(0.0, now_s - self._until_s)
        self._until_s = now_s

    def seconds(self) -> dict[str, float]:
        return {phase: round(spent, 2) for phase, spent in self._spent.items()}


# One for the process, which starts once.
START_UP = StartUp()


def record_start(run_folder: Path, *, ranks: int, step: int, total_steps: int, stop_step: int) -> int:
    """Append the row of a start that is about to make its first step.

    Args:
        step: resumed at; 0 for a start from scratch.
    Returns: the number of the start.
    """
    starts = [row for row in read_rows(run_folder / STARTS_FILE)[0] if row.get("event") == "start"]
    number = 1 + max((_count(row, "start") for row in starts), default=0)
    START_UP.ends("records")
    startup_s = process_age_s()
    zero = _read_object(run_folder / "deepspeed.json").get("zero_optimization")
    row = {
        "event": "start",
        "start": number,
        "time": round(time.time() - startup_s, 3),
        "startup_s": round(startup_s, 3),
        "phases_s": START_UP.seconds(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ranks": ranks,
        "zero_stage": zero.get("stage", 0) if isinstance(zero, dict) else 0,
        "step": step,
        "checkpoint": f"step_{step:08d}" if step else SCRATCH,
        "total_steps": total_steps,
        "stop_step": stop_step,
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT", ""),
        "commit": _read_object(run_folder / "provenance.json").get("commit", "unknown"),
        "command": shown_command(),
    }
    append_row(run_folder / STARTS_FILE, row)
    return number


def _read_object(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Goodput:
    """Where the wall time since a run's first start went, seconds; they add up to `wall_s`."""

    # Time in steps that are rows of metrics.jsonl, without waiting for images.
    useful_s: float
    # Time in those steps spent waiting for images.
    data_wait_s: float
    save_s: float
    evaluation_s: float
    # Start-up of the first start: imports, opening the data, building the model.
    startup_s: float
    # Steps done again, and everything else that a process did beside its steps.
    lost_s: float
    # Time between a process and the next, and start-up of every start after the first.
    restart_s: float
    restarts: int

    @property
    def wall_s(self) -> float:
        return (
            self.useful_s
            + self.data_wait_s
            + self.save_s
            + self.evaluation_s
            + self.startup_s
            + self.lost_s
            + self.restart_s
        )

    def shares(self) -> dict[str, float]:
        """Name -> share of the wall time, in [0, 1]; their sum is 1."""
        names = ("useful", "data_wait", "save", "evaluation", "startup", "lost", "restart")
        return {name: getattr(self, f"{name}_s") / self.wall_s if self.wall_s else 0.0 for name in names}

    def line(self) -> str:
        """For people: "goodput 93.1 %: data wait 2.0 %, saves 0.8 %, ... over 3:12:07"."""
        share = {name: f"{100 * value:.1f} %" for name, value in self.shares().items()}
        parts = [
            f"data wait {share['data_wait']}",
            f"saves {share['save']}",
            f"evaluation {share['evaluation']}",
            f"start-up {share['startup']}",
        ]
        parts += [f"lost work {share['lost']}", f"restarts {share['restart']} ({self.restarts})"]
        return f"goodput {share['useful']}: {', '.join(parts)} over {clock(self.wall_s)}"


class Account:
    """Adds up starts and rows to a goodput.

    Rows may be damaged and clocks may have jumped: values out of range count as 0.
    """

    def __init__(self) -> None:
        # Start -> unix time.
        self._began: dict[int, float] = {}
        self._startup: dict[int, float] = {}
        # Start -> longest time that it is known to have been up.
        self._up: dict[int, float] = {}
        # Starts that reached their last step: the time until the next start is not lost.
        self._done: set[int] = set()
        self._spent = dict.fromkeys(("useful", "data_wait", "save", "evaluation"), 0.0)
        self._last_step = 0
        # The last end, with the steps since its last row.
        self._open: dict | None = None

    def event(self, row: dict) -> None:
        """One row of starts.jsonl."""
        number = _count(row, "start")
        if row.get("event") == "start":
            self._began[number], self._startup[number] = _seconds(row, "time"), _seconds(row, "startup_s")
            self._is_up(number, self._startup[number])
        elif row.get("event") in ("dropped", "continued", "first_step", "end"):
            self._is_up(number, _seconds(row, "up_s"))
        if row.get("event") == "end":
            self._open = row
            if row.get("code") == EXIT_DONE:
                self._done.add(number)
            for name in ("save", "evaluation"):
                self._spent[name] += _seconds(row, f"{name}_s")

    def row(self, row: dict) -> None:
        """One row of metrics.jsonl, in order."""
        step = _count(row, "step")
        steps, self._last_step = max(0, step - self._last_step), max(step, self._last_step)
        waited = min(_seconds(row, "data_wait_s"), _seconds(row, "step_s"))
        self._spent["useful"] += steps * (_seconds(row, "step_s") - waited)
        self._spent["data_wait"] += steps * waited
        for name in ("save", "evaluation"):
            self._spent[name] += _seconds(row, f"{name}_s")
        self._is_up(_count(row, "start"), _seconds(row, "up_s"))

    def _is_up(self, number: int, seconds: float) -> None:
        self._up[number] = max(self._up.get(number, 0.0), seconds)

    def goodput(self) -> Goodput:
        spent = dict(self._spent)
        # Steps that are done and saved, but not yet in a row.
        if self._open is not None and _count(self._open, "step") > self._last_step:
            waited = min(_seconds(self._open, "open_wait_s"), _seconds(self._open, "open_s"))
            spent["useful"] += _seconds(self._open, "open_s") - waited
            spent["data_wait"] += waited
        numbers = sorted(self._began)
        first = self._startup[numbers[0]] if numbers else 0.0
        later = sum(self._startup[number] for number in numbers[1:])
        down = sum(
            max(0.0, self._began[after] - self._began[before] - self._up[before])
            for before, after in zip(numbers, numbers[1:])
            if before not in self._done
        )
        lost = max(0.0, sum(self._up.values()) - sum(spent.values()) - first - later)
        return Goodput(
            useful_s=spent["useful"],
            data_wait_s=spent["data_wait"],
            save_s=spent["save"],
            evaluation_s=spent["evaluation"],
            startup_s=first,
            lost_s=lost,
            restart_s=later + down,
            restarts=max(0, len(numbers) - 1),
        )


def account_of(run_folder: Path) -> Account:
    """The account of what a run folder holds so far."""
    account = Account()
    for row in read_rows(Path(run_folder) / STARTS_FILE)[0]:
        account.event(row)
    for row in read_metrics(run_folder):
        account.row(row)
    return account


def goodput(run_folder: Path) -> Goodput:
    """Where the wall time since the first start went, from the folder alone."""
    return account_of(run_folder).goodput()


def clock(seconds: float) -> str:
    """h:mm:ss"""
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _seconds(row: dict, name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e12:
        return 0.0
    return float(value)


def _count(row: dict, name: str) -> int:
    value = row.get(name)
    return value if isinstance(value, int) and 0 <= value < 10**12 else 0
