"""When a Slurm job ends, from its environment or from a stand-in squeue; test_slurm.py asks a real one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from peco_ds.runtime import time_limit
from peco_ds.runtime.time_limit import TimeLimit, parse_time_left, seconds_left

DAY = 86400.0


class Slurm:
    """Answers in turn, the last one for good; counts how often it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), 0

    def __call__(self, environ):
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("0:07\n", 7),
        ("59:59", 3599),
        ("2:00:01", 7201),
        ("1-00:00:00", DAY),
        ("10-23:59:59", 11 * DAY - 1),
        ("UNLIMITED", float("inf")),
    ],
)
def test_what_squeue_says_is_understood(text, seconds):
    assert parse_time_left(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "INVALID", "NOT_SET", "N/A", "1:2:3:4", "-1:00", "slurm_load_jobs error: Invalid job id specified"]
)
def test_what_is_no_time_is_no_answer(text):
    assert parse_time_left(text) is None


def test_outside_of_slurm_no_end_is_near_and_nobody_is_asked():
    slurm = Slurm(0.0)
    limit = TimeLimit({}, slurm)
    assert limit.left_s is None and not limit.is_near(DAY) and slurm.asked == 0


def test_the_environment_answers_first_and_slurm_before_the_run_is_told_to_stop():
    slurm = Slurm(100.0)
    limit = TimeLimit({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 1000)}, slurm)
    assert 910 < limit.left_s <= 1000
    assert not any(limit.is_near(800) for _ in range(1000)) and slurm.asked == 0, "asked within the loop"
    assert limit.is_near(1100) and slurm.asked == 1
    assert all(limit.is_near(1100) for _ in range(10)) and slurm.asked == 1


def test_a_rank_that_is_never_asked_asks_nobody():
    slurm = Slurm(100.0)
    limit = TimeLimit({"SLURM_JOB_ID": "7"}, slurm)
    assert slurm.asked == 0
    assert not limit.is_near(10) and not limit.is_near(10) and slurm.asked == 1


def test_a_limit_that_was_put_off_is_believed_and_one_that_was_lifted_too():
    slurm = Slurm(100.0, 5000.0, 50.0, float("inf"))
    limit = TimeLimit({"SLURM_JOB_ID": "7"}, slurm)
    assert not limit.is_near(200) and 4910 < limit.left_s <= 5000
    assert limit.is_near(6000) and slurm.asked == 3
    lifted = TimeLimit({"SLURM_JOB_ID": "7"}, Slurm(100.0, float("inf")))
    assert not lifted.is_near(200) and lifted.left_s is None


def test_a_slurm_that_does_not_answer_leaves_what_was_known():
    known = TimeLimit({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 100)}, Slurm(None))
    assert not known.is_near(50) and known.is_near(200)
    unknown = TimeLimit({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "soon"}, Slurm(None))
    assert unknown.left_s is None and not unknown.is_near(DAY)


def test_a_wall_clock_that_jumps_moves_no_end(monkeypatch):
    limit = TimeLimit({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 1000)}, Slurm(None))
    assert limit.left_s > 910
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 910 < limit.left_s <= 1000


def squeue(folder: Path, script: str) -> dict[str, str]:
    path = folder / "squeue"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {"SLURM_JOB_ID": "7", "PATH": f"{folder}:{os.environ['PATH']}"}


def test_squeue_is_asked_for_this_job(tmp_path, monkeypatch):
    environ = squeue(tmp_path, f'echo "$@" > {tmp_path}/asked; echo 1:00:00')
    monkeypatch.setenv("PATH", environ["PATH"])
    assert seconds_left(environ) == 3600
    assert "--jobs=7" in (tmp_path / "asked").read_text().split()


def test_squeue_is_asked_for_the_task_of_an_array_and_not_for_the_array(tmp_path, monkeypatch):
    environ = squeue(tmp_path, f'echo "$@" > {tmp_path}/asked; echo 1:00:00')
    monkeypatch.setenv("PATH", environ["PATH"])
    seconds_left(environ | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"})
    assert "--jobs=7_3" in (tmp_path / "asked").read_text().split()


@pytest.mark.parametrize("script", ["exit 1", "echo error >&2; exit 1", "sleep 30", "kill -9 $$"])
def test_a_squeue_that_fails_or_hangs_is_no_answer(tmp_path, monkeypatch, script):
    monkeypatch.setattr(time_limit, "ANSWER_S", 0.5)
    environ = squeue(tmp_path, script)
    monkeypatch.setenv("PATH", environ["PATH"])
    assert seconds_left(environ) is None


def test_a_missing_squeue_is_no_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert seconds_left({"SLURM_JOB_ID": "7", "PATH": str(tmp_path)}) is None
