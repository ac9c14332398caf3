"""A rank that hangs ends by itself, says where it hung, and one that was only stopped for a while does not."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peco_ds.errors import EXIT_INTERRUPTED
from peco_ds.runtime.watchdog import Watchdog

REPOSITORY = Path(__file__).resolve().parents[1]
# Thirty times the pause between two beats: a machine that is busy delays a thread by less.
LIMIT_S = 3.0


def start(tmp_path, body: str, timeout_s: float = LIMIT_S) -> subprocess.Popen:
    """A process with a watchdog, its dump at tmp_path/logs/stacks.txt; `body` is its main thread."""
    lines = [
        "import socket, sys, time",
        "from pathlib import Path",
        "from peco_ds.runtime.watchdog import Watchdog",
        f"watchdog = Watchdog({timeout_s}, Path({str(tmp_path)!r}) / 'logs' / 'stacks.txt', rank=3)",
        "ours, theirs = socket.socketpair()",
        "def stuck_in_a_collective():",
        "    ours.recv(1)  # as a collective does: in C, the interpreter lock given back",
        "print('ready', flush=True)",
        body,
    ]
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_rank_stuck_in_c_code_ends_with_the_stacks_of_all_its_threads(tmp_path):
    body = (
        "import threading\ndef loads_batches(): "
        "time.sleep(3600)\nthreading.Thread(target=loads_batches, "
        "daemon=True).start()\nwatchdog.beat(41)\nstuck_in_a_collective()"
    )
    process = start(tmp_path, body)
    _, error = process.communicate(timeout=600)
    assert process.returncode == EXIT_INTERRUPTED
    assert re.search(r"^error: rank 3: nothing has moved for \d+ s in training after step 41; .*stacks\.txt", error), (
        error
    )
    dump = (tmp_path / "logs" / "stacks.txt").read_text()
    assert "stuck_in_a_collective" in dump and "loads_batches" in dump


def test_beats_keep_a_rank_alive_and_a_dump_is_added_to_those_of_earlier_starts(tmp_path):
    for _ in range(2):
        process = start(
            tmp_path,
            "for step in range(40):\n    watchdog.beat(step)\n    time.sleep(0.1)\nprint('lived', "
            "flush=True)\nstuck_in_a_collective()",
        )
        out, error = process.communicate(timeout=600)
        assert process.returncode == EXIT_INTERRUPTED and "lived" in out and "after step 39" in error
    assert (tmp_path / "logs" / "stacks.txt").read_text().count("==== ") == 2


def test_what_comes_before_the_first_step_may_take_longer_than_a_step(tmp_path):
    process = start(tmp_path, "time.sleep(4)\nprint('started', flush=True)\nwatchdog.beat(1)\nstuck_in_a_collective()")
    out, error = process.communicate(timeout=600)
    assert process.returncode == EXIT_INTERRUPTED and "started" in out and "in training after step 1" in error


def test_a_phase_has_its_own_limit_and_its_name_in_the_message(tmp_path):
    body = (
        "with watchdog.during('evaluation', 600):\n    time.sleep(4)\nprint('longer than a step may "
        "be', flush=True)\nwatchdog.beat(7)\nwith watchdog.during('saving', 0.3):\n    time.sleep(3600)"
    )
    process = start(tmp_path, body)
    out, error = process.communicate(timeout=600)
    assert process.returncode == EXIT_INTERRUPTED and "longer than a step" in out
    assert "in saving after step 7" in error


def test_a_rank_that_was_stopped_and_continued_goes_on_and_is_still_watched(tmp_path):
    process = start(
        tmp_path,
        "for step in range(40):\n    watchdog.beat(step)\n    time.sleep(0.1)\nprint('lived', "
        "flush=True)\nstuck_in_a_collective()",
    )
    process.stdout.readline()
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(process.pid, signal.SIGCONT)
    out, error = process.communicate(timeout=600)
    assert "lived" in out, error
    assert process.returncode == EXIT_INTERRUPTED


def test_a_report_that_cannot_be_written_goes_to_stderr_and_the_rank_ends_all_the_same(tmp_path):
    (tmp_path / "logs").write_text("a file where the folder should be")
    process = start(tmp_path, "watchdog.beat(1)\nstuck_in_a_collective()")
    _, error = process.communicate(timeout=600)
    assert process.returncode == EXIT_INTERRUPTED and "stuck_in_a_collective" in error


@pytest.mark.parametrize("quiet", ["off", "closed", "unlimited phase"])
def test_nothing_fires_where_nothing_is_watched(tmp_path, quiet):
    fired = []
    watchdog = Watchdog(0 if quiet == "off" else 0.2, tmp_path / "stacks.txt", on_hang=fired.append)
    if quiet != "closed":
        watchdog.beat(1)
    if quiet == "unlimited phase":
        with watchdog.during("a first step that compiles", 0):
            time.sleep(1.0)
        watchdog.close()
    elif quiet == "closed":
        watchdog.close()
    watchdog.beat(2)
    time.sleep(0.8)
    assert not fired and not (tmp_path / "stacks.txt").exists()
