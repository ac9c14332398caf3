"""Seconds of segments: which resource of the machine binds, and that no answer leaves what the machine can do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peco_ds.config import PretrainRecipe
from peco_ds.errors import UserError
from peco_ds.planner.hardware import HARDWARE, Hardware
from peco_ds.planner.step_cost import (
    BATCHED_SHARE,
    LAUNCH_S,
    MEMORY_PACE,
    PACES,
    optimizer_seconds,
    segment_seconds,
    work_seconds,
)
from peco_ds.planner.work import Segment, Work, model_flops, pretrain_segments
from peco_ds.recipe_files import load_recipe

MACHINE = Hardware(
    name="plain",
    title="round numbers",
    memory_bytes=1e10,
    peak_flops={"bf16": 1e12, "fp16": 1e12, "fp32": 1e11},
    memory_bytes_s=1e10,
    gpus_per_node=8,
    link_bytes_s=1e9,
    network_bytes_s=1e9,
    host_memory_bytes=1e11,
    cores_per_node=8,
    storage_bytes_s=1e9,
    product_share=(0.4, 0.5, 0.8),
    attention_share=(0.1, 0.2, 0.4),
    memory_share=0.5,
)


def seconds(recipe: str, hardware: Hardware, pace: str = "typical", *overrides: str) -> tuple[float, float]:
    """Of one image in a micro-batch of the recipe's, and its model FLOP."""
    cfg = load_recipe(PretrainRecipe, recipe, list(overrides)).recipe
    segments = pretrain_segments(cfg)
    found = [segment_seconds(segment, cfg.run.micro_batch, hardware, cfg.run.precision, pace) for segment in segments]
    return sum(one.forward + one.backward for one in found) / cfg.run.micro_batch, model_flops(segments)


def test_products_take_their_share_of_the_peak_and_attention_its_own():
    work = Work(products=3e9, attention=1e9, tiles=1.5e9)
    assert work_seconds(work, 10, MACHINE, "bf16") == pytest.approx(10 * (2e9 / (0.5 * 1e12) + 1.5e9 / (0.2 * 1e12)))
    batched = Work(products=3e9, attention=1e9, batched=1.1e9)
    assert work_seconds(batched, 10, MACHINE, "bf16") == pytest.approx(
        10 * (2e9 / (0.5 * 1e12) + 1.1e9 / (BATCHED_SHARE * 0.5 * 1e12))
    )


def test_moved_bytes_take_the_memorys_share_and_what_is_moved_once_a_pass_does_not_grow_with_the_images():
    work = Work(moved_bytes=1e6, pass_bytes=5e6)
    assert work_seconds(work, 10, MACHINE, "bf16") == pytest.approx(1.5e7 / (0.5 * 1e10))
    assert work_seconds(work, 20, MACHINE, "bf16") - work_seconds(work, 10, MACHINE, "bf16") == pytest.approx(
        1e7 / (0.5 * 1e10)
    )


def test_convolutions_reach_less_than_products():
    assert work_seconds(Work(convolutions=1e9), 1, MACHINE, "bf16") > work_seconds(
        Work(products=1e9), 1, MACHINE, "bf16"
    )


def test_a_pass_too_short_for_its_kernels_takes_what_the_host_needs_to_launch_them():
    work = Work(products=1e3, kernels=100)
    assert [work_seconds(work, 1, MACHINE, "bf16", pace) for pace in PACES] == [100 * LAUNCH_S[pace] for pace in PACES]
    assert work_seconds(work, 10**7, MACHINE, "bf16") > 100 * LAUNCH_S["typical"]


def test_a_segment_computes_in_its_own_precision_where_it_has_one():
    segment = Segment("judge", 0, 0, Work(products=1e12), Work(), precision="fp32")
    plain = replace(segment, precision="")
    assert (
        segment_seconds(segment, 1, MACHINE, "bf16").forward
        == segment_seconds(plain, 1, MACHINE, "fp32").forward
        > segment_seconds(plain, 1, MACHINE, "bf16").forward
    )


def test_a_precision_without_a_peak_is_refused_by_name():
    machine = replace(MACHINE, peak_flops={"bf16": 1e12})
    with pytest.raises(UserError, match="plain has no peak_flops in fp16; known: bf16"):
        work_seconds(Work(products=1.0), 1, machine, "fp16")


@pytest.mark.parametrize("machine", ["h100", "h200", "a100-40", "a100-80", "b200", "l40s"])
@pytest.mark.parametrize("recipe", ["peco_vitb16", "peco_vitl16", "peco_vith14", "peco_vith14_visible"])
def test_paces_are_in_order_and_none_uses_more_than_its_share_of_the_peak(recipe, machine):
    hardware = HARDWARE[machine]
    used = []
    for place, pace in enumerate(PACES):
        took, flops = seconds(recipe, hardware, pace)
        used.append(flops / took / hardware.peak_flops["bf16"])
        assert used[-1] < hardware.product_share[place]
    assert used[0] < used[1] < used[2]


def test_more_memory_bandwidth_is_faster_and_a_higher_peak_too():
    slower, _ = seconds("peco_vith14", HARDWARE["h100"])
    assert seconds("peco_vith14", HARDWARE["h200"])[0] < slower
    assert seconds("peco_vith14", HARDWARE["b200"])[0] < seconds("peco_vith14", HARDWARE["h200"])[0]


def test_recomputation_costs_about_a_third_more_and_selective_little():
    none, selective, full = (
        seconds("peco_vith14", HARDWARE["h100"], "typical", f"run.activation_checkpointing={kind}")[0]
        for kind in ("none", "selective", "full")
    )
    assert 1 < selective / none < 1.15
    assert 1.25 < full / none < 1.4


def test_compiling_saves_time_and_subsets_save_what_they_skip():
    base = seconds("peco_vith14", HARDWARE["h100"])[0]
    assert seconds("peco_vith14", HARDWARE["h100"], "typical", "run.compile=none")[0] > base
    subset = seconds(
        "peco_vith14",
        HARDWARE["h100"],
        "typical",
        "model.drop_path=0.4",
        "model.drop_path_by=subset",
        "run.micro_batch=64",
    )[0]
    assert (
        0.75
        < subset / seconds("peco_vith14", HARDWARE["h100"], "typical", "model.drop_path=0.4", "run.micro_batch=64")[0]
        < 0.95
    )


def test_the_optimisers_step_is_the_time_of_its_bytes_and_falls_with_the_partition():
    assert optimizer_seconds(1e6, MACHINE) == pytest.approx(8 * optimizer_seconds(1e6 / 8, MACHINE))
    # 632 million parameters read and written some ten times in float32, at 2.8 TB/s.
    assert 0.005 < optimizer_seconds(632e6, HARDWARE["h100"]) < 0.02


def test_the_memorys_pace_is_never_above_its_data_sheet():
    for hardware in HARDWARE.values():
        assert max(MEMORY_PACE.values()) * hardware.memory_share < 1
