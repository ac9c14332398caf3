"""benchmarks/plan_step.py: that it predicts, runs and records at toy size; never how fast anything is."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

import pytest
from benchmark_runs import run_benchmark

from benchmarks.plan_step import CPU_ROWS, GPU_ROWS, Row, chosen_recipes, predicted_seconds, report
from peco_ds.errors import UserError
from peco_ds.planner.hardware import HARDWARE
from peco_ds.planner.step_cost import PACES

TOY = (
    "model.depth=2 model.width=48 model.heads=3 model.image_px=64 views.tokenizer_px=64 "
    "mask.count=6 mask.min_block=2 objective.num_codes=64 run.micro_batch=2"
).split()


def arguments(rows: str = "", *, gpu: bool = False, overrides: list[str] | None = None) -> argparse.Namespace:
    return argparse.Namespace(gpu=gpu, rows=rows, overrides=overrides or [])


def test_rows_are_predicted_run_and_recorded(tmp_path):
    record = tmp_path / "step.md"
    answer = run_benchmark(
        "plan_step", "--rows", "width 384; width 384, full", "--rounds", 1, "--record", record, *TOY
    ).stdout
    rows = [re.split(r" *\| *", line.strip("| ")) for line in answer.splitlines() if line.startswith("| width")]
    assert [row[0] for row in rows] == ["width 384", "width 384, full"]
    assert all(float(row[2].split()[0]) > 0 and float(row[3]) > 0 and row[5] in ("yes", "no") for row in rows)
    assert float(rows[1][7]) < float(rows[0][7]), "blocks that are recomputed keep less"
    assert answer.strip() in record.read_text() and "python -m benchmarks.plan_step --rows" in record.read_text()


@pytest.mark.parametrize("gpu", [False, True])
def test_every_row_is_a_recipe_that_is_accepted(gpu):
    recipes = chosen_recipes(arguments(gpu=gpu))
    assert list(recipes) == list(GPU_ROWS if gpu else CPU_ROWS)
    for recipe in recipes.values():
        slow, typical, fast = (predicted_seconds(recipe, HARDWARE["h100"], pace) for pace in PACES)
        assert slow > typical > fast > 0


def test_a_row_that_is_not_known_is_refused_by_name():
    with pytest.raises(UserError, match="--rows H/15: not one of .*H/14"):
        chosen_recipes(arguments("H/15", gpu=True))


def test_the_error_is_the_predictions_against_the_measured_step():
    row = Row(
        "one",
        8,
        replace(HARDWARE["h100"], name="this device"),
        "bf16",
        {"slow": 0.3, "typical": 0.2, "fast": 0.1},
        0.5,
        0.25,
        2e6,
        1e6,
        2**31,
        2**30,
    )
    text = report([row])
    assert "-20%" in text and "+100%" in text and "1 of 1 lie between" in text
    assert "| one | 8 | 200 (100 to 300) | 500 (+100%) | 250 | -20% | yes | 2 | 1 | 2.0 | 1.0 |" in text
    assert "0 of 1 lie between" in report([replace(row, measured=0.4)])
