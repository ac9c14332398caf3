"""A stage on so many GPUs: quantities that follow from one another, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from step_simulation import simulate_step

from peco_ds.errors import UserError
from peco_ds.planner.chain import read_chain
from peco_ds.planner.estimate import estimate, fits
from peco_ds.planner.fitting import DeepSpeedChoice, shipped
from peco_ds.planner.hardware import find_hardware

H100 = find_hardware("h100")
JSON = {choice.name: choice for choice in shipped()}
CHAIN = read_chain("peco_vith14", [])
PRETRAINING = CHAIN.main
TOKENIZING, FINETUNING = CHAIN.stages[1], CHAIN.stages[3]


def test_images_a_second_hours_and_mfu_follow_from_the_step():
    made = estimate(PRETRAINING, H100, 64, JSON["zero3.json"])
    step = made.costs["typical"].seconds
    batch = PRETRAINING.run.global_batch
    assert made.images_s() == pytest.approx(batch / step)
    assert made.training_hours() == pytest.approx(PRETRAINING.durations.total_steps * step / 3600)
    assert made.mfu() == pytest.approx(PRETRAINING.model_flops * batch / step / 64 / H100.peak_flops["bf16"])
    assert made.hours() == pytest.approx(made.training_hours() / made.goodput().share)
    assert made.gpu_hours() == pytest.approx(64 * made.hours())


@pytest.mark.parametrize("stage", CHAIN.stages, ids=lambda stage: stage.name)
def test_a_slow_pace_takes_longer_than_a_typical_one_and_a_fast_one_less(stage):
    made = estimate(stage, H100, 32, JSON["zero1.json"])
    assert made.hours("slow") > made.hours() > made.hours("fast")


@pytest.mark.parametrize("name", ["zero0.json", "zero1.json", "zero2.json", "zero3.json"])
def test_more_gpus_take_fewer_hours_and_more_gpu_hours(name):
    made = [estimate(PRETRAINING, H100, count, JSON[name]) for count in (8, 16, 32, 64, 128, 256)]
    for fewer, more in zip(made, made[1:]):
        assert more.hours() < fewer.hours()
        assert more.gpu_hours() > 0.98 * fewer.gpu_hours(), "a pass of fewer images may be quicker by a hair, no more"


@pytest.mark.parametrize("gpus", [8, 64, 512])
@pytest.mark.parametrize("name", ["zero1.json", "zero2.json", "zero3.json"])
def test_closed_form_and_simulation_agree_on_the_real_recipe(name, gpus):
    made = estimate(PRETRAINING, H100, gpus, JSON[name])
    assert simulate_step(made.inputs(), steps=30).mean_s == pytest.approx(made.costs["typical"].seconds, rel=0.05)


def test_few_cores_hold_the_gpus_up():
    made = estimate(FINETUNING, replace(H100, cores_per_node=2), 8, JSON["zero1.json"])
    assert made.loader_bound and made.images_s() == made.loader_images_s() < made.computed_images_s()
    assert made.loader_cores > 2
    assert not estimate(FINETUNING, H100, 8, JSON["zero1.json"]).loader_bound


def test_evaluations_add_forward_passes():
    with_average = estimate(FINETUNING, H100, 8, JSON["zero1.json"])
    assert 0 < with_average.evaluation_hours() < 0.02 * with_average.training_hours(), (
        "a million of sixty-four million images, forward alone"
    )


def test_tokenizing_scales_with_the_gpus_and_sends_nothing():
    few, many = (estimate(TOKENIZING, H100, count, JSON["zero0.json"]) for count in (8, 80))
    assert many.images_s() == pytest.approx(10 * few.images_s())
    assert many.collectives == ()


def test_the_recipes_micro_batch_is_made_smaller_where_it_does_not_divide_or_fit():
    assert estimate(PRETRAINING, H100, 512, JSON["zero1.json"]).micro_batch == 4
    assert estimate(PRETRAINING, H100, 8, JSON["zero1.json"]).micro_batch == 128
    small = estimate(PRETRAINING, replace(H100, memory_bytes=12e9), 8, JSON["zero3.json"])
    assert small.micro_batch < 128 and small.room.used_bytes(small.micro_batch) <= 12e9


def test_what_does_not_fit_is_refused_with_what_would():
    tiny = replace(H100, memory_bytes=9e9)
    with pytest.raises(
        UserError,
        match=r"zero0.json .* needs .* GiB a GPU, which has 8.4 and keeps 5% free; what fits there: "
        r"--deepspeed_config ds_configs/zero\d.json",
    ) as refused:
        estimate(PRETRAINING, tiny, 64, JSON["zero0.json"])
    named = str(refused.value).split("--deepspeed_config ")[1].split()
    stage = PRETRAINING.with_run(activation_checkpointing=named[2].split("=")[1])
    assert fits(stage, tiny, 64, JSON[named[0].removeprefix("ds_configs/")]), "what it names does fit"
    with pytest.raises(UserError, match=r"no setting fits there; \d+ h100 do with"):
        estimate(
            read_chain("peco_vith14", ["model.width=4096", "model.heads=64", "model.depth=64"]).main,
            replace(H100, host_memory_bytes=5e9),
            1,
            JSON["zero3.json"],
        )


def test_an_offloaded_optimiser_takes_longer():
    on_host, on_gpu = (
        estimate(PRETRAINING, H100, 8, JSON[name]).costs["typical"] for name in ("zero3_offload.json", "zero3.json")
    )
    assert on_host.optimizer_s > 5 * on_gpu.optimizer_s and on_host.compute_s == pytest.approx(on_gpu.compute_s)


def test_offloaded_weights_cost_their_way_up_and_leave_the_optimiser_where_it_is():
    only_weights = {
        **JSON["zero3.json"].raw,
        "zero_optimization": {**JSON["zero3.json"].raw["zero_optimization"], "offload_param": {"device": "cpu"}},
    }
    plain, moved = (
        estimate(PRETRAINING, H100, 8, choice).costs["typical"]
        for choice in (JSON["zero3.json"], DeepSpeedChoice("own.json", only_weights))
    )
    up = PRETRAINING.parameters / 8 * 2 * 2 / 25e9  # bf16, two passes
    assert moved.optimizer_s - plain.optimizer_s == pytest.approx(up, rel=0.01)


def test_offload_needs_the_hosts_memory():
    offload = JSON["zero3_offload.json"]
    assert estimate(PRETRAINING, H100, 8, offload).host_bytes > 12 * 0.6e9, "masters and moments"
    with pytest.raises(
        UserError, match="keeps .* GiB on the host of each node, h100 has 12 GiB there; what fits there"
    ):
        estimate(PRETRAINING, replace(H100, host_memory_bytes=12 * 2**30), 8, offload)
