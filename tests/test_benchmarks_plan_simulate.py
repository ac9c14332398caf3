"""benchmarks/plan_simulate.py: that it runs on a few ranks, and that what it prints agrees as it claims."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

SMALL = "model.depth=3 model.width=192 model.heads=3 run.global_batch=256 run.micro_batch=16".split()


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("plan_simulate") / "record.md"
    done = start(
        "--gpus", "1", "8", "16", "--steps", "8", "--record", str(path), "--plot", str(path.with_suffix(".png")), *SMALL
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert path.with_suffix(".png").stat().st_size > 1000
    assert all(line in path.read_text() for line in done.stdout.splitlines())
    return path.read_text()


def test_closed_form_and_simulation_agree_in_every_row(record):
    rows = [cells(line) for line in record.splitlines() if re.match(r"\| (1|8|16) \| \d+ x \d+ \|", line)]
    assert [row[0] for row in rows] == ["1", "8", "16"]
    for row in rows:
        assert abs(percent(row[4])) < 5
        steps = row[1].split(" x ")
        assert int(row[0]) * int(steps[0]) * int(steps[1]) == 256
    assert percent(rows[0][5]) == 0 and percent(rows[2][5]) > 0  # one GPU has no links to wait for


def test_the_grid_names_its_largest_disagreement(record):
    found = re.search(r"(\d+) cases: .* by at most ([\d.]+)%; all ranks alike, by at most ([\d.]+)%", record)
    assert int(found[1]) == 4 * 3 * 2 * 3 and float(found[2]) < 5 and float(found[3]) < 2
    worst = [cells(line) for line in record.splitlines() if "micro-batch" in line and line.startswith("| zero")]
    assert len(worst) == 5 and abs(abs(percent(worst[0][3])) - float(found[2])) < 0.01


def test_bad_nodes_and_a_month_of_failures_are_in_it(record):
    (bad,) = [cells(line) for line in record.splitlines() if re.match(r"\| 16 \| \+", line)]
    assert percent(bad[2]) > percent(bad[1]) > 0 and percent(bad[4]) > percent(bad[3]) > 0
    months = [cells(line) for line in record.splitlines() if re.match(r"\| \d+ \| [\d.]+ \| [\d.]+% \|", line)]
    assert len(months) == 15 and all(abs(percent(row[4])) < 2 for row in months)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--gpus", "0"], "give 1 or more"),
        (["--gpus", "13"], "divides run.global_batch"),
        (["--gpus", "7"], "divides run.global_batch"),
        (["--hardware", "h1000"], "h100"),
    ],
)
def test_what_cannot_be_played_is_refused(arguments, words):
    done = start(*arguments, *SMALL)
    assert done.returncode == 2 and re.search(words, done.stderr) and "Traceback" not in done.stderr


def start(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "benchmarks/plan_simulate.py", *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def percent(text: str) -> float:
    return float(text.rstrip("%"))
