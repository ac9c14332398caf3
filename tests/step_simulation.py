"""A discrete simulation of optimiser steps on up to thousands of ranks, and of a run of days with its saves and
failures.

Where the planner's closed forms add up the longest path, this plays every rank: a list of instructions (compute a
segment, post a collective, wait for one) made from the same collectives, run by all ranks with passes of their own
length. A collective starts when every rank has posted it and the one before it is over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from peco_ds.planner.goodput import failure_rate
from peco_ds.planner.step_cost import StepInputs, durations

_STEPS_TOGETHER = 64  # clocks of so many steps are held at once


@dataclass(frozen=True)
class Simulated:
    """Step times of a simulated stretch of training, in seconds."""

    mean_s: float
    p5_s: float
    p50_s: float
    p95_s: float
    # of a step that the mean rank neither computes nor steps its optimiser
    waiting_share: float
    busy_share: float  # of a step that the links are in use


@dataclass(frozen=True)
class SimulatedRun:
    """Of a whole run, means over its repetitions."""

    share: float  # of the wall clock that becomes kept work
    p5_share: float
    p95_share: float
    wall_s: float
    failures: float
    lost_s: float
    saving_s: float
    restarting_s: float


@dataclass(frozen=True)
class _Instruction:
    kind: str  # compute, post, wait
    # compute: of the micro-batch's pieces, forward ones first; else of the collective in the step's list
    index: int


def simulate_step(
    inputs: StepInputs,
    *,
    steps: int = 200,
    seed: int = 0,
    noise: float | None = None,
    slow_nodes: Mapping[int, float] | None = None,
    slow_network: float = 1.0,
) -> Simulated:
    """Play `steps` optimiser steps.

    Args:
        seed: the same seed gives the same numbers.
        noise: standard deviation of a rank's pass about its mean, drawn anew for each rank and pass; None: that of
            `inputs`.
        slow_nodes: node -> how much longer its GPUs compute, e.g. {3: 1.2}.
        slow_network: share of its rate that one node's network still reaches. Every ring crosses every node, so all
            wait for it; on a single node it changes nothing.
    """
    noise = inputs.noise if noise is None else noise
    assert steps >= 1 and noise >= 0 and 0 < slow_network <= 1, (steps, noise, slow_network)
    if inputs.ranks > inputs.hardware.gpus_per_node:
        inputs = replace(
            inputs, hardware=replace(inputs.hardware, network_bytes_s=inputs.hardware.network_bytes_s * slow_network)
        )
    seconds = durations(inputs)
    pieces = [piece.forward for piece in inputs.segments] + [piece.backward for piece in reversed(inputs.segments)]
    programs = [_program(inputs, micro_step) for micro_step in range(inputs.micro_steps)]
    after = sum(duration for collective, duration in zip(inputs.collectives, seconds) if collective.when == "after")
    pace = np.ones(inputs.ranks)
    for node, factor in (slow_nodes or {}).items():
        pace[node * inputs.hardware.gpus_per_node : (node + 1) * inputs.hardware.gpus_per_node] = factor
    draws = np.random.default_rng(seed)
    ended, computed = [], []
    for first in range(0, steps, _STEPS_TOGETHER):
        together = min(_STEPS_TOGETHER, steps - first)
        clocks, worked = np.zeros((together, inputs.ranks)), np.zeros(together)
        free = np.zeros(together)  # when the last posted collective is over
        for program in programs:
            lengths = pace * np.maximum(0.1, 1 + noise * draws.standard_normal((2, together, inputs.ranks)))
            over: dict[int, np.ndarray] = {}
            for instruction in program:
                if instruction.kind == "compute":
                    length = pieces[instruction.index] * lengths[int(instruction.index >= len(inputs.segments))]
                    # Slower until the queue is empty: by then it is either computed at that pace, or has lost that
                    # share of the queue's time.
                    beside = np.maximum(0.0, free[:, None] - clocks)
                    clocks += np.minimum(length / (1 - inputs.contention), length + inputs.contention * beside)
                elif instruction.kind == "post":
                    free = np.maximum(free, clocks.max(axis=1)) + seconds[instruction.index]
                    over[instruction.index] = free
                else:
                    np.maximum(clocks, over[instruction.index][:, None], out=clocks)
            worked += sum(pieces[: len(inputs.segments)]) * lengths[0].mean(axis=1) + sum(
                pieces[len(inputs.segments) :]
            ) * lengths[1].mean(axis=1)
        # without a collective nobody waits for the slowest
        last = clocks.max(axis=1) if inputs.collectives else clocks.mean(axis=1)
        ended.append(last + after + inputs.optimizer_s)
        computed.append(worked + inputs.optimizer_s)
    times, working = np.concatenate(ended), np.concatenate(computed)
    low, middle, high = np.percentile(times, (5, 50, 95))
    mean = float(times.mean())
    return Simulated(
        mean,
        float(low),
        float(middle),
        float(high),
        waiting_share=1 - float(working.mean()) / mean,
        busy_share=sum(seconds) / mean,
    )


def simulate_run(
    work_s: float,
    *,
    nodes: int,
    failures_per_1000_node_days: float,
    interval_s: float,
    stall_s: float,
    write_s: float,
    restart_s: float,
    step_s: float = 0.0,
    seed: int = 0,
    repetitions: int = 200,
) -> SimulatedRun:
    """Play a run until `work_s` seconds of steps are kept, again and again with other failures.

    Args:
        step_s: of one step; saves wait for its end.  interval_s, stall_s, write_s, restart_s: as `goodput` takes them.
    """
    rate = failure_rate(nodes, failures_per_1000_node_days)
    draws = np.random.default_rng(seed)
    runs = np.array(
        [
            _play(draws, rate, work_s, max(interval_s, write_s), stall_s, write_s, restart_s, step_s)
            for _ in range(repetitions)
        ]
    )
    shares = work_s / runs[:, 0]
    low, high = np.percentile(shares, (5, 95))
    wall, failures, lost, saving, restarting = runs.mean(axis=0).tolist()
    return SimulatedRun(work_s / wall, float(low), float(high), wall, failures, lost, saving, restarting)


def _play(
    draws: np.random.Generator,
    rate: float,
    work_s: float,
    interval_s: float,
    stall_s: float,
    write_s: float,
    restart_s: float,
    step_s: float,
) -> tuple[float, float, float, float, float]:
    """One run: wall clock, failures, seconds lost, saving and restarting."""

    def until_failure() -> float:
        return draws.exponential(1 / rate) if rate else math.inf

    work_an_interval = interval_s - stall_s
    if step_s:
        work_an_interval = math.ceil(work_an_interval / step_s) * step_s
    wall = lost = saving = restarting = 0.0
    failures = 0
    # writing: work of the checkpoint that is not complete yet
    done, kept, writing = 0.0, 0.0, 0.0
    failure = until_failure()  # wall clock of the next one
    while done < work_s:
        work = min(work_an_interval, work_s - done)
        stall = stall_s if done + work < work_s else 0.0
        begin, complete = wall, wall + write_s
        end = begin + work + stall
        if failure >= min(complete, end):
            kept = max(kept, writing)
        if failure >= end:
            wall, done, saving, writing = end, done + work, saving + stall, done + work
            continue
        failures += 1
        lost += done - kept + min(failure - begin, work)
        saving += max(0.0, failure - begin - work)
        wall, done, writing = failure, kept, kept
        failure = wall + until_failure()
        while failure < wall + restart_s:
            failures, restarting, wall = failures + 1, restarting + failure - wall, failure
            failure = wall + until_failure()
        restarting, wall = restarting + restart_s, wall + restart_s
    return wall, float(failures), lost, saving, restarting


def _program(inputs: StepInputs, micro_step: int) -> list[_Instruction]:
    """What every rank does in one micro-batch, in order."""
    of_step = [
        (index, each)
        for index, each in enumerate(inputs.collectives)
        if each.micro_step == micro_step and each.when != "after"
    ]
    program: list[_Instruction] = []
    for direction in ("forward", "backward"):
        order = list(range(len(inputs.segments)))[:: 1 if direction == "forward" else -1]
        gathers = [
            (index, each) for index, each in of_step if each.when == direction and each.operation == "all_gather"
        ]
        reductions = [
            (index, each) for index, each in of_step if each.when == direction and each.operation != "all_gather"
        ]
        posted: set[int] = set()
        for place, segment in enumerate(order):
            program += [
                _Instruction("wait", index) for index, each in gathers if each.segment == segment and index in posted
            ]
            for index, each in gathers:
                if index not in posted and (each.segment == segment or (each.overlaps and each.asked == segment)):
                    posted.add(index)
                    program.append(_Instruction("post", index))
                    if each.segment == segment:
                        program.append(_Instruction("wait", index))
            program.append(_Instruction("compute", place if direction == "forward" else len(order) + place))
            for index, each in reductions:
                if each.segment == segment:
                    program += [_Instruction("post", index)] + ([] if each.overlaps else [_Instruction("wait", index)])
    return program + [
        _Instruction("wait", index) for index, each in of_step if each.operation != "all_gather" and each.overlaps
    ]
