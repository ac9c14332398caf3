"""The closed form of a step against steps short enough to add up by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from peco_ds.planner.hardware import Hardware
from peco_ds.planner.network import collective_seconds
from peco_ds.planner.step_cost import SegmentSeconds, StepInputs, closed_form, durations, expected_maximum
from peco_ds.planner.traffic import Collective

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
RANKS, BLOCKS, BYTES = 64, 4, 1e9
GATHER = collective_seconds("all_gather", BYTES, RANKS, MACHINE)
REDUCTION = collective_seconds("reduce_scatter", 2 * BYTES, RANKS, MACHINE)


def test_one_rank_only_computes():
    found = closed_form(step((), ranks=1, forward=0.01, micro_steps=3))
    assert found.seconds == pytest.approx(3 * BLOCKS * 0.03 + 0.5)
    assert (found.exposed_s, found.communication_s, found.straggler_s, found.contention_s) == (0, 0, 0, 0)


def test_where_nothing_overlaps_everything_adds_up():
    found = closed_form(step([*gathers(overlaps=False), *reductions(overlaps=False)]))
    assert found.exposed_s == pytest.approx(BLOCKS * (GATHER + REDUCTION))
    assert found.exposed_s == pytest.approx(found.communication_s)


def test_a_long_computation_hides_all_but_the_first_gather_and_the_last_reduction():
    found = closed_form(step([*gathers(), *reductions()], forward=1.0))
    assert found.exposed_s == pytest.approx(GATHER + REDUCTION)
    assert found.seconds == pytest.approx(BLOCKS * 3.0 + 0.5 + GATHER + REDUCTION)


def test_a_short_computation_is_hidden_behind_the_links():
    short = 1e-6
    found = closed_form(step([*gathers(), *reductions()], forward=short))
    # Behind the last gather comes its block, forward and backward, before the first reduction can begin.
    assert found.seconds - 0.5 == pytest.approx(BLOCKS * (GATHER + REDUCTION) + 3 * short)


def test_a_gather_that_is_asked_for_in_time_hides_and_one_asked_for_late_does_not():
    forward = 1.5 * GATHER
    in_time = closed_form(step(gathers(), forward=forward)).exposed_s
    late = closed_form(step(gathers(ahead=0), forward=forward)).exposed_s
    assert in_time == pytest.approx(GATHER)
    assert late == pytest.approx(BLOCKS * GATHER)


def test_a_queue_that_runs_far_ahead_hides_a_long_gather_behind_several_blocks():
    long = Collective("all_gather", 3 * BYTES, "forward", 3, 0, overlaps=True, asked=0)
    exposed = collective_seconds("all_gather", 3 * BYTES, RANKS, MACHINE) - 3 * GATHER
    assert closed_form(step([long], forward=GATHER)).exposed_s == pytest.approx(max(0.0, exposed), abs=1e-9)
    one_block_before = replace(long, asked=2)
    assert closed_form(step([one_block_before], forward=GATHER)).exposed_s == pytest.approx(exposed + 2 * GATHER)


def test_a_reduction_waits_for_a_gather_that_the_host_asked_for_before():
    gather = Collective("all_gather", BYTES, "backward", 0, 0, overlaps=True, asked=BLOCKS - 1)
    reduction = Collective("reduce_scatter", 2 * BYTES, "backward", 1, 0, overlaps=True, asked=1)
    alone = closed_form(step([reduction], forward=GATHER / 8)).exposed_s
    both = closed_form(step([gather, reduction], forward=GATHER / 8)).exposed_s
    backward = 2 * GATHER / 8
    assert alone == pytest.approx(REDUCTION - backward)
    # It starts when the gather is over, which is a quarter of a gather after its own block; so does the pass of the
    # last block.
    assert both == pytest.approx((GATHER - 3 * backward) + REDUCTION - backward)


def test_each_micro_batch_waits_for_its_own_reductions():
    once = closed_form(step(reductions(), forward=1.0))
    thrice = closed_form(
        step([each for micro_step in range(3) for each in reductions(micro_step)], forward=1.0, micro_steps=3)
    )
    assert thrice.exposed_s == pytest.approx(3 * once.exposed_s)
    at_the_end = closed_form(step(reductions(2), forward=1.0, micro_steps=3))
    assert at_the_end.exposed_s == pytest.approx(once.exposed_s)


def test_nothing_hides_what_comes_after_the_passes():
    after = [
        Collective("all_gather", BYTES, "after", 0, 0, overlaps=False),
        Collective("all_reduce", 4, "after", 0, 0, overlaps=False),
    ]
    found = closed_form(step(after, forward=1.0))
    assert found.exposed_s == pytest.approx(GATHER + collective_seconds("all_reduce", 4, RANKS, MACHINE))


def test_a_collective_slows_what_is_computed_beside_it_by_its_share():
    found = closed_form(replace(step([*gathers(), *reductions()], forward=1.0), contention=0.1))
    hidden = found.communication_s - found.exposed_s
    assert found.contention_s == pytest.approx(0.1 * hidden, rel=0.01)
    # the computation is beside the links all the time, and nobody waits for it
    bound = step([*gathers(), *reductions()], forward=1e-6)
    assert closed_form(replace(bound, contention=0.1)).seconds == pytest.approx(closed_form(bound).seconds, rel=1e-3)


def test_stragglers_cost_more_among_more_ranks_and_less_where_the_links_set_the_pace():
    def straggling(forward: float, ranks: int) -> float:
        found = closed_form(replace(step([*gathers(), *reductions()], forward=forward), noise=0.02, ranks=ranks))
        return found.straggler_s / found.compute_s

    assert 0 < straggling(1.0, 8) < straggling(1.0, 64) < straggling(1.0, 1024) < 4 * 0.02
    # A pass is a third and its backward pass two thirds of a micro-batch, so their sum varies by sqrt(5) / 3 of what
    # one varies by.
    assert straggling(1.0, 64) == pytest.approx(0.02 * expected_maximum(64) * 5**0.5 / 3, rel=1e-6)
    # all but one block hide behind the links
    assert straggling(GATHER / 100, 64) == pytest.approx(straggling(1.0, 64) / BLOCKS, rel=0.01)


def test_noise_of_micro_batches_that_do_not_wait_for_one_another_averages_out():
    every = closed_form(
        replace(
            step([each for micro_step in range(4) for each in reductions(micro_step)], forward=1.0, micro_steps=4),
            noise=0.02,
        )
    )
    at_the_end = closed_form(replace(step(reductions(3), forward=1.0, micro_steps=4), noise=0.02))
    assert at_the_end.straggler_s == pytest.approx(every.straggler_s / 2, rel=1e-6)


def test_the_parts_add_up_to_the_step():
    for forward in (1e-4, 3e-3, 0.1):
        found = closed_form(replace(step([*gathers(), *reductions()], forward=forward), noise=0.02, contention=0.12))
        parts = found.compute_s + found.optimizer_s + found.exposed_s + found.straggler_s + found.contention_s
        assert found.seconds == pytest.approx(parts)
        assert min(found.exposed_s, found.straggler_s, found.contention_s) >= 0


def test_better_links_never_make_a_step_longer():
    times = [
        closed_form(replace(step([*gathers(), *reductions()], forward=3e-3), link_share=share)).seconds
        for share in (0.1, 0.5, 1.0, 2.0)
    ]
    assert times == sorted(times, reverse=True) and times[0] > 1.5 * times[-1] - 0.5
    assert durations(replace(step(gathers()), link_share=0.5)) == pytest.approx(
        [collective_seconds("all_gather", BYTES, RANKS, MACHINE, share=0.5)] * BLOCKS
    )


@pytest.mark.parametrize("count", (1, 2, 8, 64, 1024))
def test_expected_maximum_is_that_of_drawn_numbers(count):
    drawn = np.random.default_rng(0).standard_normal((4000, count)).max(axis=1)
    assert expected_maximum(count) == pytest.approx(
        drawn.mean(), rel=0.006 if count >= 8 else 0.05, abs=3 * drawn.std() / 4000**0.5
    )


def step(collectives, *, forward: float = 1e-3, micro_steps: int = 1, ranks: int = RANKS) -> StepInputs:
    """Blocks that compute twice as long backward as forward, half a second of optimiser, ranks all alike."""
    return StepInputs(
        (SegmentSeconds(forward, 2 * forward),) * BLOCKS,
        tuple(collectives),
        micro_steps,
        0.5,
        ranks,
        MACHINE,
        noise=0.0,
        contention=0.0,
    )


def gathers(*, overlaps: bool = True, ahead: int = 1) -> list[Collective]:
    return [
        Collective("all_gather", BYTES, "forward", block, 0, overlaps, asked=max(0, block - ahead))
        for block in range(BLOCKS)
    ]


def reductions(micro_step: int = 0, *, overlaps: bool = True) -> list[Collective]:
    return [
        Collective("reduce_scatter", 2 * BYTES, "backward", block, micro_step, overlaps, asked=block)
        for block in reversed(range(BLOCKS))
    ]
