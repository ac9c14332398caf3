"""The command that holds the planner against torch and DeepSpeed.

What it counts: test_traffic.py and test_engine_state.py, which share its launches.
"""

from __future__ import annotations

import pytest
from benchmark_runs import run_benchmark

from benchmarks import plan_engine
from benchmarks.plan_engine import (
    Case,
    counted_flops,
    flops_recipes,
    measure,
    plain_name,
    predicted_flops,
    predicted_memory,
    state_table,
    traffic_table,
)
from peco_ds.errors import UserError


@pytest.mark.parametrize("name", ["toy", "peco_vitb16"])
def test_flops_at_a_toy_size_and_at_full_width_are_those_of_torchs_counter(name):
    recipe = flops_recipes()[name]
    said, seen = predicted_flops(recipe), counted_flops(recipe)
    assert said.forward == pytest.approx(seen.forward, rel=0.01)
    # Three times the forward pass counts a gradient for the image that nobody asks for: 0.8 percent of three blocks,
    # less of more.
    assert said.training == pytest.approx(seen.training, rel=0.01)


def row_of(case: Case, **counted) -> dict:
    modules = [[[(64, True), (64, False)]], [[(4096, True), (64, False)]], [[(1000, True)]]]
    return {
        "device": "cpu",
        "modules": modules,
        "ds_config": {"zero_optimization": {"stage": 1}},
        "groups": "whole",
    } | counted


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_states_shows_the_worst_moment_and_how_far_off_the_prediction_was():
    case = Case("ZeRO-1", "zero1.json", weighed=True)
    row = row_of(case)
    predicted = predicted_memory(case, row, 2).state
    row |= {
        "held": {"end of forward": round(predicted / 2), "end of backward": round(predicted / 1.25)},
        "saved": [1000, 500],
    }
    line = cells(state_table({2: [(case, row)]}).splitlines()[-1])
    assert line[0] == "ZeRO-1" and line[1] == "2"
    assert line[4] == "+25.00%" and line[5] == "end of backward"
    assert line[7] == "1.0"


def test_the_table_of_traffic_names_what_only_one_side_has():
    case = plan_engine.TRAFFIC[0]  # without ZeRO: one all-reduce
    row = row_of(case, logged={"all_gather_into_tensor": [3, 500]}) | {"ds_config": {"zero_optimization": {"stage": 0}}}
    rows = {line[2]: line for line in map(cells, traffic_table({2: [(case, row)]}).splitlines()[4:])}
    assert rows["all_gather"][3:5] == ["0", "3"] and rows["all_gather"][6] == "1.00", (
        "a rank's own part of a gather, twice"
    )
    assert rows["all_reduce"][3:5] == ["1", "0"] and rows["all_reduce"][7] == "none counted"


def test_the_process_groups_names_become_the_planners():
    plain = {
        "all_gather": ["all_gather_into_tensor", "_allgather_base_", "allgather_into_tensor_coalesced_"],
        "reduce_scatter": ["reduce_scatter_tensor", "_reduce_scatter_base_"],
        "all_reduce": ["allreduce_", "all_reduce"],
        "reduce": ["reduce", "reduce_"],
    }
    assert {plain_name(name): names for names in plain.values() for name in names} == plain


def test_ranks_that_fail_are_an_error_with_what_they_said(tmp_path):
    with pytest.raises(UserError, match=r"1 ranks ended with 1.*zero9\.json.*no such file"):
        measure([Case("nowhere", "zero9.json")], 1, tmp_path)


@pytest.mark.parametrize(("arguments", "told"), [(["--only", "speed"], "speed"), (["--ranks", "0"], "1 or more")])
def test_what_cannot_be_counted_is_refused_before_any_rank_starts(arguments, told):
    done = run_benchmark("plan_engine", *arguments, check=False)
    assert done.returncode == 2 and told in done.stderr
