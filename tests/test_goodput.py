"""What failures and saves take from a run, against sums that one can do by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peco_ds.errors import UserError
from peco_ds.planner.goodput import (
    FAILURES_PER_1000_NODE_DAYS,
    HOST_COPY_BYTES_S,
    RESTART_S,
    best_interval_s,
    failure_rate,
    goodput,
    stall_seconds,
    write_seconds,
)

DAY = 86400.0
USUAL = dict(nodes=32, interval_s=1200.0, stall_s=1.0, write_s=0.0, restart_s=420.0, failures_per_1000_node_days=6.5)


def test_32_nodes_fail_every_five_days_and_lose_half_an_interval_and_a_restart():
    found = goodput(96 * DAY, **USUAL)
    assert found.expected_failures == pytest.approx(20, rel=0.01)  # 6.5 / 1000 * 32 * 96
    assert found.lost_s / found.expected_failures == pytest.approx(600, rel=0.01)
    assert found.restarting_s / found.expected_failures == pytest.approx(420, rel=0.01)
    assert found.saving_s == pytest.approx(96 * DAY / 1200, rel=0.01)
    assert found.wall_s == pytest.approx(96 * DAY + found.lost_s + found.saving_s + found.restarting_s)
    assert found.share == pytest.approx(96 * DAY / found.wall_s)


def test_llama_3s_failures_a_node_day_give_its_419_interruptions():
    nodes, days = 2048, 54
    assert failure_rate(nodes, FAILURES_PER_1000_NODE_DAYS[1]) * days * DAY == pytest.approx(419, rel=0.01)


def test_a_checkpoint_that_is_written_late_costs_that_much_more_a_failure():
    late = goodput(96 * DAY, **{**USUAL, "write_s": 300.0})
    assert late.lost_s / late.expected_failures == pytest.approx(900, rel=0.01)


def test_without_failures_only_saves_cost():
    found = goodput(10 * DAY, **{**USUAL, "failures_per_1000_node_days": 0.0, "stall_s": 12.0})
    assert (found.expected_failures, found.lost_s, found.restarting_s, found.best_interval_s) == (
        0,
        pytest.approx(0, abs=1e-6),
        0,
        math.inf,
    )
    assert found.share == pytest.approx(0.99)


@pytest.mark.parametrize(
    "more",
    [
        {"nodes": 64},
        {"stall_s": 10.0},
        {"write_s": 600.0},
        {"restart_s": 1200.0},
        {"failures_per_1000_node_days": 20.0},
    ],
    ids=str,
)
def test_more_of_anything_bad_leaves_less(more):
    assert goodput(DAY, **{**USUAL, **more}).share < goodput(DAY, **USUAL).share


def test_no_other_interval_is_better_than_the_best_one():
    settings = dict(USUAL, nodes=256, stall_s=20.0)
    best = goodput(DAY, **settings).best_interval_s
    shares = {
        factor: goodput(DAY, **{**settings, "interval_s": best * factor}).share
        for factor in np.geomspace(0.2, 5, 41).tolist()
    }
    assert max(shares, key=shares.get) == pytest.approx(1, rel=0.1)
    assert best == pytest.approx(math.sqrt(2 * 20 / failure_rate(256, 6.5)), rel=0.05)  # Young's


def test_best_interval_where_saves_take_longer_than_the_machine_holds_is_finite():
    assert best_interval_s(100.0, 1 / 40) == pytest.approx(140)


def test_saves_closer_together_than_their_writing_wait_for_it():
    close = goodput(DAY, **{**USUAL, "interval_s": 10.0, "write_s": 300.0})
    assert close == goodput(DAY, **{**USUAL, "interval_s": 300.0, "write_s": 300.0})


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"interval_s": 10.0, "stall_s": 12.0}, "save less often"),
        ({"nodes": 1_000_000, "failures_per_1000_node_days": 100.0}, "no progress"),
        ({"nodes": 100_000, "restart_s": 5000.0, "failures_per_1000_node_days": 300.0}, "no progress"),
    ],
)
def test_a_run_that_cannot_make_progress_is_refused_in_one_line(settings, words):
    with pytest.raises(UserError, match=words) as refused:
        goodput(DAY, **{**USUAL, **settings})
    assert "\n" not in str(refused.value)


def test_a_state_is_copied_by_all_gpus_at_once_and_written_by_all_nodes():
    assert stall_seconds(20e9) - stall_seconds(10e9) == pytest.approx(10e9 / HOST_COPY_BYTES_S)
    assert write_seconds(10e9, 1, 2e9) - write_seconds(10e9, 5, 2e9) == pytest.approx(4.0)
    # however little there is to save
    assert stall_seconds(1.0) > 0 and write_seconds(1.0, 128, 4e9) > 0


def test_assumptions_run_from_low_to_high():
    assert list(FAILURES_PER_1000_NODE_DAYS) == sorted(FAILURES_PER_1000_NODE_DAYS) and list(RESTART_S) == sorted(
        RESTART_S
    )
