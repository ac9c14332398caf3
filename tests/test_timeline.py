"""Rows, starts and goodput of a run folder; what is damaged or makes no sense never stops a reader."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peco_ds.errors import UserError
from peco_ds.runtime.timeline import (
    METRICS_FILE,
    STARTS_FILE,
    StartUp,
    append_row,
    drop_redone_steps,
    drop_rows_after,
    goodput,
    process_age_s,
    read_metrics,
    read_rows,
    record_start,
)


def write(path: Path, *rows: dict | str) -> None:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def start(number: int, time: float, startup_s: float = 10.0) -> dict:
    return {"event": "start", "start": number, "time": time, "startup_s": startup_s}


def row(step: int, up_s: float, start: int = 1, step_s: float = 1.0, data_wait_s: float = 0.25, **more) -> dict:
    return {"step": step, "start": start, "up_s": up_s, "step_s": step_s, "data_wait_s": data_wait_s, **more}


def test_steps_are_in_order_and_there_once_after_a_start_from_an_older_checkpoint(tmp_path):
    path = tmp_path / METRICS_FILE
    write(path, row(10, 20), row(20, 30), row(20, 31), row(30, 40), row(40, 50))
    dropped = drop_rows_after(path, 25)
    assert [found["step"] for found in read_metrics(tmp_path)] == [10, 20]
    assert [found["step"] for found in dropped] == [20, 30, 40]


def test_a_line_cut_short_by_a_kill_is_neither_read_nor_kept_nor_glued_to_the_next(tmp_path):
    path = tmp_path / METRICS_FILE
    write(path, row(10, 20), '{"step": 20, "lo')
    rows, fault = read_rows(path)
    assert [found["step"] for found in rows] == [10] and "half written" in fault
    append_row(path, row(20, 30))
    rows, fault = read_rows(path)
    assert [found["step"] for found in rows] == [10, 20] and "line 2" in fault
    drop_rows_after(path, 20)
    assert read_rows(path) == (rows, "")


def test_a_file_of_other_things_is_read_without_a_traceback(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'\xff\xfe\n[1, 2]\n"x"\n{"step": "ten"}\n{"step": 3}\n' + b"[" * 100_000)
    rows, fault = read_rows(path)
    assert rows == [{"step": "ten"}, {"step": 3}] and "4 lines" in fault
    drop_rows_after(path, 5)
    assert read_metrics(tmp_path) == [{"step": 3}]
    path.unlink()
    path.mkdir()
    assert read_rows(path)[0] == [] and METRICS_FILE in read_rows(path)[1]


def test_a_full_disk_is_said_in_one_line_with_the_file():
    with pytest.raises(UserError, match="/dev/full: cannot be written .No space left"):
        append_row(Path("/dev/full"), {"step": 1})


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    append_row(tmp_path / METRICS_FILE, {"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    assert (tmp_path / METRICS_FILE).read_text() == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.5}\n'


def test_wall_time_is_shared_out_over_a_run_of_three_starts(tmp_path):
    # 1: 10 s start-up, 40 steps of 1 s, 4 s of saves, 6 s of evaluation, killed. 20 s nothing. 2: 15 s start-up, goes
    # on at step 20, killed after 10 steps, all of them lost; 30 s nothing. 3: 5 s start-up, goes on at step 20 to step
    # 40, ends in order after a last save of 3 s.
    write(tmp_path / METRICS_FILE, row(20, 36, save_s=4, evaluation_s=2), row(40, 60, evaluation_s=4))
    write(tmp_path / STARTS_FILE, start(1, 1000))
    drop_redone_steps(tmp_path, 20)
    append_row(tmp_path / STARTS_FILE, start(2, 1080, 15))
    append_row(tmp_path / METRICS_FILE, row(30, 25, start=2))
    drop_redone_steps(tmp_path, 20)
    append_row(tmp_path / STARTS_FILE, start(3, 1135, 5))
    append_row(tmp_path / METRICS_FILE, row(40, 25, start=3))
    append_row(
        tmp_path / STARTS_FILE,
        {"event": "end", "start": 3, "up_s": 28, "code": 0, "step": 40, "open_steps": 0, "save_s": 3},
    )
    found = goodput(tmp_path)
    assert found.useful_s == pytest.approx(40 * 0.75) and found.data_wait_s == pytest.approx(40 * 0.25)
    assert (found.save_s, found.evaluation_s, found.startup_s, found.restarts) == (7, 2, 10, 2)
    assert found.lost_s == pytest.approx(20 + 4 + 10), (
        "the second half of the first start with its evaluation, and all steps of the second"
    )
    assert found.restart_s == pytest.approx(15 + 5 + 20 + 30)
    assert found.wall_s == pytest.approx(1135 + 28 - 1000)
    assert sum(found.shares().values()) == pytest.approx(1)
    assert found.line() == (
        "goodput 18.4 %: data wait 6.1 %, saves 4.3 %, evaluation 1.2 %, start-up 6.1 %, lost work "
        "20.9 %, restarts 42.9 % (2) over 0:02:43"
    )


def test_steps_since_the_last_row_of_a_run_that_stopped_in_good_order_are_not_lost(tmp_path):
    write(tmp_path / METRICS_FILE, row(20, 30))
    end = {
        "event": "end",
        "start": 1,
        "up_s": 40,
        "code": 75,
        "step": 30,
        "open_steps": 10,
        "open_s": 10,
        "open_wait_s": 4,
    }
    write(tmp_path / STARTS_FILE, start(1, 1000), end)
    assert (goodput(tmp_path).useful_s, goodput(tmp_path).data_wait_s, goodput(tmp_path).lost_s) == (21, 9, 0)
    append_row(tmp_path / STARTS_FILE, start(2, 1040, 0))
    # the row's 20 s are those of both starts
    append_row(tmp_path / METRICS_FILE, row(40, 10, start=2))
    assert goodput(tmp_path).useful_s + goodput(tmp_path).data_wait_s == 40, (
        "steps of a window that a restart divides count once"
    )
    assert goodput(tmp_path).lost_s == 0


@pytest.mark.parametrize("jump_s", [-3600, -50, 0, 3600])
def test_a_clock_that_jumps_during_or_between_starts_makes_no_time_negative(tmp_path, jump_s):
    write(
        tmp_path / METRICS_FILE,
        row(20, 30, time=1030),
        row(40, 50, time=1050 + jump_s),
        row(60, 30, start=2, time=1085 + jump_s),
    )
    write(tmp_path / STARTS_FILE, start(1, 1000), start(2, 1055 + jump_s))
    found = goodput(tmp_path)
    assert found.useful_s == 45 and found.data_wait_s == 15 and found.lost_s == 0
    assert found.restart_s == 10 + max(0, 5 + jump_s)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)
)
NAMES = (
    "event",
    "start",
    "time",
    "startup_s",
    "up_s",
    "step",
    "step_s",
    "data_wait_s",
    "save_s",
    "evaluation_s",
    "open_s",
    "open_wait_s",
    "open_steps",
)
EVENTS = st.sampled_from(["start", "end", "dropped", "continued", "first_step"])


@given(
    st.lists(st.dictionaries(st.sampled_from(NAMES), JUNK | EVENTS, max_size=8), max_size=6),
    st.lists(st.dictionaries(st.sampled_from(NAMES), JUNK, max_size=8), max_size=6),
)
def test_no_row_whatever_it_holds_breaks_the_account(tmp_path_factory, events, rows):
    folder = tmp_path_factory.mktemp("junk")
    write(folder / STARTS_FILE, *events)
    write(folder / METRICS_FILE, *rows)
    found = goodput(folder)
    assert all(value >= 0 for value in asdict(found).values())
    assert sum(found.shares().values()) == pytest.approx(1 if found.wall_s else 0)
    assert found.line().startswith("goodput ")


def test_starts_are_numbered_on_and_say_what_started_where(tmp_path, monkeypatch):
    (tmp_path / "deepspeed.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "provenance.json").write_text('{"commit": "abc"}')
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--out", "my run"])
    assert record_start(tmp_path, ranks=2, step=0, total_steps=100, stop_step=50) == 1
    with open(tmp_path / STARTS_FILE, "a") as file:
        file.write('{"event": "end", "sta')  # killed as it wrote
    (tmp_path / "deepspeed.json").write_text("{")
    assert record_start(tmp_path, ranks=4, step=30, total_steps=100, stop_step=50) == 2
    first, second = read_rows(tmp_path / STARTS_FILE)[0]
    assert (first["ranks"], first["zero_stage"], first["checkpoint"], first["slurm_job"], first["commit"]) == (
        2,
        3,
        "scratch",
        "77",
        "abc",
    )
    assert first["command"] == "pretrain.py --out 'my run'"
    assert (second["ranks"], second["zero_stage"], second["checkpoint"], second["step"]) == (4, 0, "step_00000030", 30)
    assert 0 < first["startup_s"] < 3600 and process_age_s() > 0


def test_the_phases_of_a_start_add_up_to_the_age_of_its_process_and_a_phase_that_comes_twice_is_one(monkeypatch):
    ages = iter([3.0, 5.0, 9.5, 10.0])
    monkeypatch.setattr("peco_ds.runtime.timeline.process_age_s", lambda: next(ages))
    start_up = StartUp()
    for phase in ("imports", "data", "model", "data"):
        start_up.ends(phase)
    assert start_up.seconds() == {"imports": 3.0, "data": 2.5, "model": 4.5}


def test_a_start_killed_after_its_first_step_is_known_to_have_been_up_until_then(tmp_path):
    write(
        tmp_path / STARTS_FILE,
        start(1, 1000),
        {"event": "first_step", "start": 1, "up_s": 25.0, "batch_s": 1.0, "step_s": 14.0},
        start(2, 1030),
    )
    found = goodput(tmp_path)
    assert (found.startup_s, found.lost_s, found.restart_s) == (10, 15, 15)


def test_reading_a_run_folder_imports_no_torch():
    code = "import sys, peco_ds.runtime.timeline; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[1]).returncode == 0
