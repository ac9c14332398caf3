"""Predicted bytes of state against what DeepSpeed's engines hold on 1, 2 and 4 ranks, on the device and, where the JSON
offloads, on the host.
"""

from __future__ import annotations

import pytest
from engine_census import OFFLOADED, STATE, census, each

from benchmarks.plan_engine import predicted_memory, sizes_of, worst_moment
from peco_ds.planner.memory import (
    STAGES,
    checkpoint_bytes,
    ema_bytes,
    gpu_memory,
    host_bytes_per_node,
    optimizer_bytes,
    saved_bytes,
)

N = 10**9


@pytest.mark.parametrize(("ranks", "name"), each(STATE), ids=str)
def test_state_of_a_rank_is_what_deepspeed_holds(ranks, name):
    case, row = census(ranks)[name]
    # Worst case measured: 0.9 percent, whole gradients of the tensors at both ends of a partition (ZeRO-2 in fp32 on
    # four ranks).
    assert predicted_memory(case, row, ranks).state == pytest.approx(worst_moment(row)[1], rel=0.02)


@pytest.mark.parametrize("name", OFFLOADED)
def test_host_and_device_together_hold_what_deepspeed_does_when_it_offloads(name):
    case, row = census(2)[name]
    memory = predicted_memory(case, row, 2)
    assert memory.host > 0.5 * memory.state
    # Worst case measured: 1.0 percent, two tensors of the size of the model's largest one, which is 3 percent of this
    # small model.
    assert memory.state + memory.host == pytest.approx(worst_moment(row)[1], rel=0.02)


@pytest.mark.parametrize(("ranks", "name"), each(STATE), ids=str)
def test_the_copies_that_a_save_is_written_from_are_as_large_on_each_rank_as_said(ranks, name):
    case, row = census(ranks)[name]
    elements, sizes = sizes_of(case, row, ranks)
    said = [saved_bytes(elements, first_rank=rank == 0, **sizes) for rank in range(ranks)]
    assert row["saved"] == pytest.approx(said, rel=0.01, abs=1000)
    assert sum(row["saved"]) == pytest.approx(
        checkpoint_bytes(elements, stage=sizes["stage"], precision=case.precision), rel=0.01
    )


@pytest.mark.parametrize(("ranks", "name"), each(STATE), ids=str)
def test_a_moving_average_takes_what_the_planner_says(ranks, name):
    case, row = census(ranks)[name]
    elements, sizes = sizes_of(case, row, ranks)
    assert row["averaged"] == pytest.approx(ema_bytes(elements, stage=sizes["stage"], world_size=ranks), rel=0.01)


# --------------------------------------------------------------------------------------- of a real run


def state(stage: int, world_size: int, **zero) -> float:
    config = {
        "zero_optimization": {
            "reduce_bucket_size": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }
        | zero
    }
    return gpu_memory(N, stage=stage, world_size=world_size, precision="bf16", ds_config=config).state


def test_more_ranks_and_a_higher_stage_never_cost_more_state_in_sixteen_bits():
    for stage in STAGES:
        assert state(stage, 8) >= state(stage, 64)
    for low, high in zip(STAGES, STAGES[1:]):
        assert state(low, 64) > state(high, 64)
    assert state(3, 64) == pytest.approx(16 * N / 64)


def test_weights_stay_gathered_if_either_prefetch_or_reuse_keeps_them():
    least = state(3, 64)
    assert state(3, 64, stage3_max_reuse_distance=2 * N) == pytest.approx(least + 2 * N)
    assert state(3, 64, stage3_max_live_parameters=2 * N, stage3_prefetch_bucket_size=1000) == pytest.approx(
        least + 2 * N
    )
    assert state(3, 64, stage3_max_live_parameters=2 * N) == least, "nothing is fetched ahead"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimiser_leaves_the_device_and_takes_more_on_the_host(stage):
    sizes = dict(stage=stage, world_size=4, precision="bf16")
    sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    on_gpu = gpu_memory(N, ds_config=sums, **sizes)
    moved = gpu_memory(N, ds_config=sums | {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, **sizes)
    assert on_gpu.host == moved.optimizer == 0
    # a bucket of ZeRO-1 that was not there before
    assert moved.state <= on_gpu.state - on_gpu.optimizer + 4 * 5e8
    assert moved.host >= optimizer_bytes(stage, "bf16") * N / 4
    assert 0 < moved.pinned <= moved.host
    if stage == 3:
        weights_too = gpu_memory(
            N,
            ds_config=sums
            | {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}},
            **sizes,
        )
        assert weights_too.weights == 0 and weights_too.host == moved.host + 2 * N / 4


def test_a_node_keeps_the_copies_of_its_ranks_and_what_they_offload():
    config = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "data_types": {"grad_accum_dtype": "fp32"}}
    sizes = dict(stage=3, world_size=16, precision="bf16")
    plain, moved = (gpu_memory(N, ds_config=ds_config, **sizes) for ds_config in ({}, config))
    part = N / 16
    # the next power of two: page-locked memory of what is offloaded is given out so
    rounding = 2**26 / part
    hosts = {ranks: host_bytes_per_node(plain, N, ranks_per_node=ranks, **sizes) for ranks in (1, 8)}
    assert hosts[8] == pytest.approx(8 * hosts[1]) and hosts[1] == pytest.approx(12 * part)
    with_average = host_bytes_per_node(plain, N, ranks_per_node=8, average=True, **sizes)
    assert with_average == pytest.approx(hosts[8] * 16 / 12)
    offloaded = host_bytes_per_node(moved, N, ranks_per_node=8, **sizes)
    assert hosts[8] + 8 * moved.host < offloaded < hosts[8] + 8 * moved.host * rounding


def test_without_zero_one_rank_saves_for_all_and_its_node_keeps_the_copy_once():
    sizes = dict(stage=0, world_size=16, precision="bf16")
    hosts = [
        host_bytes_per_node(gpu_memory(N, ds_config={}, **sizes), N, ranks_per_node=ranks, **sizes) for ranks in (1, 8)
    ]
    assert hosts[0] == hosts[1] >= checkpoint_bytes(N, stage=0, precision="bf16")
