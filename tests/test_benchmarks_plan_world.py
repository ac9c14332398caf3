"""benchmarks/plan_world.py: its arithmetic, and that its rows are told what was published."""

from __future__ import annotations

from dataclasses import replace

import pytest
from benchmark_runs import run_benchmark

from benchmarks.plan_world import Network, Published, published, report, run_images_s
from peco_ds.planner.shapes import FLOPS_PER_MAC
from peco_ds.planner.step_cost import PACES


def flops(networks) -> float:
    """Of one image, forward alone."""
    return sum(network.passes()[0].flops for network in networks)


@pytest.mark.parametrize(
    "size, patch, mlp_ratio, gmac",
    [("B", 16, 4.0, 17.6), ("L", 16, 4.0, 61.6), ("H", 14, 4.0, 167.4), ("g", 14, 48 / 11, 267.2)],
)
def test_transformers_have_the_macs_that_timm_publishes(size, patch, mlp_ratio, gmac):
    network = Network(size, "eager", patch=patch, mlp_ratio=mlp_ratio)
    assert flops([network]) == pytest.approx(FLOPS_PER_MAC * gmac * 1e9, rel=0.01)


def test_mae_sees_a_quarter_of_the_patches_so_that_it_costs_a_third():
    mae = next(row.networks for row in published() if row.what == "MAE-L/16, 800 epochs, 64 GPUs")
    assert 0.25 < flops(mae) / flops([Network("L", "eager")]) < 0.4


def test_inference_has_no_backward_pass_and_stored_attention_moves_more():
    assert len(Network("B", "compiled", trained=False).passes()) == 1
    fused, stored = (
        sum(work.moved_bytes for work in Network("B", "autocast", stored_attention=kept).passes())
        for kept in (False, True)
    )
    assert stored > 1.3 * fused


def test_a_run_of_so_many_hours_is_so_many_images_a_second():
    assert run_images_s(100, 10, 4, images=36_000) == 100 * 36_000 / 36_000 / 4


def test_every_row_is_predicted_in_order_of_pace_and_names_its_source():
    rows = published()
    assert len({row.what + row.hardware for row in rows}) == len(rows)
    for row in rows:
        slow, typical, fast = (row.predicted(pace) for pace in PACES)
        assert 0 < slow < typical < fast
        assert row.source and row.group and row.images_s > 0
    assert 0 < sum(row.calibration for row in rows) < len(rows) / 4, "most rows are held out"


def test_more_gpus_never_give_more_images_a_gpu():
    row = next(row for row in published() if row.what == "ViT-g/14, training, 8 GPUs" and row.hardware == "h100")
    assert (
        replace(row, gpus=128).predicted("typical")
        <= row.predicted("typical")
        <= replace(row, gpus=1).predicted("typical")
    )


def test_the_report_says_error_range_and_role_of_every_row():
    row = Published(
        "one", "group", "somewhere", "h100", 100.0, (Network("B", "compiled"),), micro_batch=64, precision="bf16"
    )
    typical = row.predicted("typical")
    exact, half = replace(row, images_s=typical), replace(row, what="two", images_s=2 * typical)
    text = report([exact, half, replace(exact, what="three", calibration=True)])
    assert (
        "| +0% | yes | held out |" in text
        and "| -50% | no | held out |" in text
        and "| +0% | yes | calibration |" in text
    )
    assert "| group | 2 | -25% | -50% | 1 |" in text and "- somewhere" in text


def test_the_table_is_written_where_it_is_asked_for(tmp_path):
    record = tmp_path / "world.md"
    answer = run_benchmark("plan_world", "--record", record).stdout
    assert answer.strip() in record.read_text()
