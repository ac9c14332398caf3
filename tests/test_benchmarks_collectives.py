"""The count of collectives, and what it makes of them."""

from __future__ import annotations

import json
import re

import pytest
from benchmark_runs import run_benchmark

from benchmarks import collectives

SMALL = (
    "model.depth=2 model.width=48 model.heads=3 model.image_px=64 views.tokenizer_px=64 "
    "mask.count=6 mask.min_block=2 objective.num_codes=64"
).split()


def test_an_all_reduce_is_sent_twice_and_a_read_is_no_traffic():
    counted = {
        "allreduce": [2, 100, 60],
        "reduce_scatter_base": [1, 30, 30],
        "allgather_into_tensor_coalesced": [3, 7, 5],
        "reads": [9, 0, 0],
    }
    assert collectives.traffic_bytes(counted) == 237
    assert [collectives.group_of(name) for name in counted] == ["reductions", "reductions", "gathers", "reads"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, list[str]]:
    """Cells by row of the table that the command writes."""
    record = tmp_path_factory.mktemp("collectives") / "record.md"
    only = ["zero0", "zero1", "zero3, persistence 0", "zero3, persistence 1e6", "zero3, reduced in bf16"]
    run_benchmark(
        "collectives",
        "--recipes",
        "peco_vittiny16",
        "--rounds",
        "0",
        "--only",
        *only,
        "--record",
        record,
        *SMALL,
    )
    lines = [line.strip("|").split("|") for line in record.read_text().splitlines() if line.startswith("| zero")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def mib(cell: str) -> float:
    return float(re.match(r"[\d.]+", cell)[0])


def test_every_stage_reduces_each_gradient_once_in_the_type_of_the_json(rows):
    weights_mib = mib(rows["zero0"][3]) / 4 * 2  # in bf16; gradients are reduced in fp32
    assert weights_mib > 0
    for name in ("zero1", "zero3, persistence 0", "zero3, persistence 1e6"):
        assert mib(rows[name][3]) == pytest.approx(2 * weights_mib, rel=0.1, abs=0.1)
    assert mib(rows["zero3, reduced in bf16"][3]) == pytest.approx(weights_mib, rel=0.1, abs=0.1)


def test_weights_that_stay_gathered_are_gathered_tensor_by_tensor(rows):
    assert 0 < int(rows["zero3, persistence 0"][0]) < int(rows["zero3, persistence 1e6"][0])
    assert mib(rows["zero0"][1]) == 0 and int(rows["zero0"][0]) == 0


def test_a_row_that_does_not_exist_is_refused_before_any_rank_starts():
    done = run_benchmark("collectives", "--only", "zero9", check=False)
    assert done.returncode == 2 and "no such row" in done.stderr and json.dumps("zero9").strip('"') in done.stderr
