"""The simulation against the closed forms, which reckon the same steps and runs in another way, and what only it can
say.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from step_simulation import simulate_run, simulate_step

from peco_ds.planner.goodput import goodput
from peco_ds.planner.hardware import Hardware
from peco_ds.planner.step_cost import SegmentSeconds, StepInputs, closed_form
from peco_ds.planner.traffic import Collective, step_collectives
from peco_ds.planner.work import Segment, Work

CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
MACHINE = Hardware(
    name="h100-like",
    title="",
    memory_bytes=80e9,
    peak_flops={"bf16": 989e12},
    memory_bytes_s=3.35e12,
    gpus_per_node=8,
    link_bytes_s=450e9,
    network_bytes_s=400e9,
    host_memory_bytes=2e12,
    cores_per_node=112,
    storage_bytes_s=4e9,
)
RUN = dict(nodes=64, interval_s=1200.0, stall_s=2.0, write_s=60.0, restart_s=420.0)
DAY = 86400.0


@pytest.mark.parametrize("contention", (0.0, 0.12))
def test_any_step_of_equal_ranks_lasts_as_long_as_the_closed_form_says(contention):
    draws = random.Random(0)
    for _ in range(200):
        inputs = replace(any_step(draws), noise=0.0, contention=contention)
        simulated, reckoned = simulate_step(inputs, steps=1), closed_form(inputs)
        assert simulated.mean_s == pytest.approx(reckoned.seconds, rel=0.02 if contention else 1e-9)


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
@pytest.mark.parametrize("gpus", (1, 8, 64, 1024))
def test_steps_of_the_shipped_configs_agree_with_the_closed_form(stage, gpus):
    # from the links setting the pace to computing
    for micro_batch in (1, 16, 128):
        for network in (25e9, 400e9):
            for micro_steps in (1, 3):
                inputs = vit_huge(stage, gpus, micro_batch, network, micro_steps)
                reckoned = closed_form(inputs).seconds
                assert simulate_step(inputs, steps=40).mean_s == pytest.approx(reckoned, rel=0.02), (
                    micro_batch,
                    network,
                    micro_steps,
                )
                alike = closed_form(replace(inputs, noise=0.0)).seconds
                assert simulate_step(inputs, steps=1, noise=0.0).mean_s == pytest.approx(alike, rel=0.02), (
                    micro_batch,
                    network,
                    micro_steps,
                )


def test_the_grid_has_steps_bound_by_the_links_and_steps_bound_by_computing():
    slow, fast = vit_huge(3, 1024, 1, 25e9, 1), vit_huge(3, 64, 128, 400e9, 1)
    assert closed_form(slow).exposed_s > 10 * closed_form(slow).compute_s
    assert closed_form(fast).exposed_s < 0.1 * closed_form(fast).compute_s


def test_the_same_seed_gives_the_same_steps_and_another_seed_others():
    inputs = vit_huge(3, 64, 16, 400e9, 1)
    assert simulate_step(inputs, steps=70, seed=3) == simulate_step(inputs, steps=70, seed=3)
    assert simulate_step(inputs, steps=70, seed=3) != simulate_step(inputs, steps=70, seed=4)
    assert simulate_run(30 * DAY, **RUN, failures_per_1000_node_days=6.5, seed=3) == simulate_run(
        30 * DAY, **RUN, failures_per_1000_node_days=6.5, seed=3
    )


def test_step_times_spread_with_noise_alone():
    inputs = vit_huge(3, 64, 64, 400e9, 1)
    still = simulate_step(inputs, steps=30, noise=0.0)
    assert still.p5_s == pytest.approx(still.p95_s)
    noisy = simulate_step(inputs, steps=200, noise=0.02)
    assert still.mean_s < noisy.p5_s < noisy.p50_s < noisy.p95_s
    assert noisy.waiting_share > still.waiting_share


def test_one_slow_node_slows_all_nodes_by_what_it_computes_longer():
    inputs = replace(vit_huge(3, 64, 128, 400e9, 1), contention=0.0)
    plain, slowed = (simulate_step(inputs, steps=1, noise=0.0, slow_nodes=slow).mean_s for slow in (None, {5: 1.2}))
    assert slowed - plain == pytest.approx(0.2 * closed_form(inputs).compute_s, rel=0.05)
    assert simulate_step(inputs, steps=1, noise=0.0, slow_nodes={5: 1.2}).waiting_share > 0.1


def test_one_node_behind_a_slow_network_slows_a_step_that_the_links_bind_and_hardly_another():
    bound, free = vit_huge(3, 64, 4, 400e9, 1), vit_huge(3, 64, 128, 400e9, 1)
    for inputs, low, high in ((bound, 1.5, 4.0), (free, 1.0, 1.1)):
        ratio = (
            simulate_step(inputs, steps=1, noise=0.0, slow_network=0.25).mean_s
            / simulate_step(inputs, steps=1, noise=0.0).mean_s
        )
        assert low < ratio < high
    inside = vit_huge(3, 8, 4, 400e9, 1)
    assert simulate_step(inside, steps=2, slow_network=0.25) == simulate_step(inside, steps=2)


def test_ranks_without_a_collective_do_not_wait_for_one_another():
    inputs = StepInputs((SegmentSeconds(0.1, 0.0),), (), 1, 0.0, 512, MACHINE, noise=0.05)
    assert simulate_step(inputs, steps=50).mean_s == pytest.approx(0.1, rel=0.01)
    assert closed_form(inputs).seconds == pytest.approx(0.1)


def test_a_run_without_failures_stands_still_for_its_saves_alone():
    played = simulate_run(DAY, **RUN, failures_per_1000_node_days=0.0, repetitions=1)
    assert (played.failures, played.lost_s, played.restarting_s) == (0, 0, 0)
    assert played.wall_s == pytest.approx(DAY + 2.0 * (DAY // (1200 - 2)))


@pytest.mark.parametrize("nodes", (1, 32, 128, 2048))
@pytest.mark.parametrize(
    "interval_s, stall_s, write_s", [(1200.0, 1.0, 30.0), (300.0, 20.0, 250.0), (7200.0, 60.0, 600.0)]
)
def test_goodput_of_played_runs_is_that_of_the_closed_form(nodes, interval_s, stall_s, write_s):
    settings = dict(
        nodes=nodes,
        interval_s=interval_s,
        stall_s=stall_s,
        write_s=write_s,
        restart_s=600.0,
        failures_per_1000_node_days=6.5,
    )
    played, reckoned = simulate_run(20 * DAY, **settings, repetitions=40, step_s=0.3), goodput(20 * DAY, **settings)
    assert played.share == pytest.approx(reckoned.share, rel=0.02)
    assert played.failures * reckoned.wall_s / played.wall_s == pytest.approx(
        reckoned.expected_failures, abs=4 * (reckoned.expected_failures / 40) ** 0.5 + 0.01
    )
    assert played.wall_s == pytest.approx(20 * DAY + played.lost_s + played.saving_s + played.restarting_s)
    assert played.p5_share <= played.share * 1.0001 and played.share <= played.p95_share * 1.0001


def test_a_failure_before_a_checkpoint_is_complete_takes_the_run_back_to_the_one_before():
    often = dict(RUN, failures_per_1000_node_days=60.0)
    lost = [simulate_run(20 * DAY, **{**often, "write_s": write_s}, repetitions=60) for write_s in (0.0, 900.0)]
    assert lost[1].lost_s / lost[1].failures - lost[0].lost_s / lost[0].failures == pytest.approx(900, rel=0.25)


def any_step(draws: random.Random) -> StepInputs:
    """Segments and collectives of all lengths, asked for anywhere before they are needed."""
    blocks, micro_steps = draws.randint(1, 8), draws.randint(1, 3)
    size = 10 ** draws.uniform(6, 9)
    found = []
    for micro_step in range(micro_steps):
        for block in range(blocks):
            if draws.random() < 0.7:
                found.append(
                    Collective(
                        "all_gather",
                        draws.random() * size,
                        "forward",
                        block,
                        micro_step,
                        draws.random() < 0.8,
                        draws.randint(0, block),
                    )
                )
        for block in reversed(range(blocks)):
            if draws.random() < 0.4:
                found.append(
                    Collective(
                        "all_gather",
                        draws.random() * size,
                        "backward",
                        block,
                        micro_step,
                        draws.random() < 0.8,
                        draws.randint(block, blocks - 1),
                    )
                )
            if draws.random() < 0.6:
                found.append(
                    Collective(
                        "reduce_scatter",
                        2 * draws.random() * size,
                        "backward",
                        block,
                        micro_step,
                        draws.random() < 0.8,
                        block,
                    )
                )
    found.append(Collective("all_gather", size, "after", 0, micro_steps - 1, overlaps=False))
    segments = tuple(SegmentSeconds(draws.random() * 1e-3, draws.random() * 2e-3) for _ in range(blocks))
    return StepInputs(segments, tuple(found), micro_steps, 1e-3, draws.choice((2, 8, 16, 100)), MACHINE)


def vit_huge(stage: int, gpus: int, micro_batch: int, network_bytes_s: float, micro_steps: int) -> StepInputs:
    """A ViT-H of 32 blocks under the shipped config of a ZeRO stage, its pass at half of the peak."""
    sizes = [(800_000, 5, 0.1), *[(19_700_000, 14, 1.0)] * 32, (10_500_000, 4, 0.3)]
    segments = [
        Segment(f"{place}", elements, tensors, Work(), Work()) for place, (elements, tensors, _) in enumerate(sizes)
    ]
    ds_config = json.loads((CONFIGS / f"zero{stage}.json").read_text())
    collectives = step_collectives(segments, ds_config=ds_config, precision="bf16", micro_steps=micro_steps, ranks=gpus)
    block = micro_batch * 335e9 / 32 / (0.5 * 989e12)
    passes = tuple(SegmentSeconds(block * share, 2 * block * share) for _, _, share in sizes)
    return StepInputs(passes, collectives, micro_steps, 0.005, gpus, replace(MACHINE, network_bytes_s=network_bytes_s))
