"""benchmarks/plan_world.py: its arithmetic, and that its rows are told what was published."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from conftest import REPOSITORY, run_stage

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from plan_world import (
    BASE,
    GIANT,
    HUGE,
    LARGE,
    Passes,
    Published,
    Vit,
    mae,
    published,
    report,
    run_hours,
    sized,
    vit_passes,
)

from peco_ds.planner.shapes import FLOPS_PER_MAC
from peco_ds.planner.step_cost import PACES


def flops(networks) -> float:
    """Of one image, forward alone."""
    return sum(vit_passes(vit, how)[0].flops for vit, how in networks)


@pytest.mark.parametrize(
    "size, patch, mlp_ratio, gmac",
    [(BASE, 16, 4.0, 17.6), (LARGE, 16, 4.0, 61.6), (HUGE, 14, 4.0, 167.4), (GIANT, 14, 48 / 11, 267.2)],
)
def test_transformers_have_the_macs_that_timm_publishes(size, patch, mlp_ratio, gmac):
    network = (Vit(sized(*size, patch=patch, mlp_ratio=mlp_ratio)), Passes("eager"))
    assert flops([network]) == pytest.approx(FLOPS_PER_MAC * gmac * 1e9, rel=0.01)


def test_mae_sees_a_quarter_of_the_patches_so_that_it_costs_a_third():
    whole = flops([(Vit(sized(*LARGE)), Passes("eager"))])
    assert 0.25 < flops(mae(LARGE, 16)) / whole < 0.4


def test_inference_has_no_backward_pass_and_stored_attention_moves_more():
    vit = Vit(sized(*BASE))
    assert len(vit_passes(vit, Passes("compiled", trained=False))) == 1
    fused, stored = (
        sum(work.moved_bytes for work in vit_passes(vit, Passes("autocast", stored_attention=kept)))
        for kept in (False, True)
    )
    assert stored > 1.3 * fused


def test_a_run_of_so_many_hours_is_so_many_images_a_second():
    assert run_hours(100, 10, 4, images=36_000) == 100 * 36_000 / 36_000 / 4


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
        "one",
        "h100",
        100.0,
        ((Vit(sized(*BASE)), Passes("compiled")),),
        64,
        "somewhere",
        precision="bf16",
        group="group",
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
    answer = run_stage("benchmarks/plan_world.py", "--record", record).stdout
    assert answer.strip() in record.read_text()
