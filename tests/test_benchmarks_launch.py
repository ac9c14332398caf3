"""The measure of a start: what it makes of a run's own record, and that it ends what it began."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import psutil
import pytest
from benchmark_runs import run_benchmark

from benchmarks import launch

SMALL = (
    "model.depth=1 model.width=48 model.heads=3 model.image_px=64 views.tokenizer_px=64 "
    "mask.count=6 mask.min_block=2 objective.num_codes=64 run.micro_batch=2 data.num_workers=1"
).split()


def test_the_phases_of_a_start_add_up_to_its_total():
    start, first = (
        {"phases_s": {"imports": 5.0, "data": 1.0, "model": 2.0}},
        {"batch_s": 0.5, "step_s": 1.5, "up_s": 10.0},
    )
    spent = launch.phases_from(start, first, 0.25, launcher_s=3.0)
    assert (spent.pop("total"), spent.pop("second step")) == (13.0, 0.25)
    assert sum(spent.values()) == 13.0


def test_a_total_is_a_multiple_of_the_bare_imports_of_its_own_round():
    starts = [{"imports": 4.0, "total": 10.0, "second step": 1.0}, {"imports": 8.0, "total": 40.0, "second step": 1.0}]
    text = launch.table({"bare": [{"total": 5.0}, {"total": 10.0}], "first": [{"total": 90.0}], "python": starts})
    assert "| imports | 6.00 (4.00 to 8.00) | 0.00 |" in text
    assert "| total, in bare imports | 3.00 (2.00 to 4.00) | 12.00 |" in text


def test_what_a_command_started_ends_with_it():
    child = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; "
        "time.sleep(600)']); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", child])
    deadline = time.monotonic() + 600
    while not (children := psutil.Process(process.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    launch.end_tree(process)
    assert process.poll() is not None and not any(
        one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in children
    )


def test_a_start_is_measured_to_its_second_step(tmp_path):
    record = tmp_path / "record.md"
    run_benchmark(
        "launch",
        "--launchers",
        "python",
        "--starts",
        "1",
        "--work",
        tmp_path / "work",
        "--record",
        record,
        *SMALL,
    )
    median = {
        line.split("|")[1].strip(): float(re.search(r"[\d.]+", line.split("|")[2])[0])
        for line in record.read_text().splitlines()
        if re.match(r"\| [a-z ,]+ \| \d", line)
    }
    assert set(launch.PHASES) <= set(median)
    assert min(median["imports"], median["engine"], median["first step"], median["second step"]) > 0
    assert sum(median[phase] for phase in launch.PHASES) == pytest.approx(median["total"], rel=0.1)
