"""What failures and checkpoints take from a long run.

Failures come by chance, at one rate for every node (exponential intervals). The run saves every `interval_s`, standing
still for `stall_s` of it; the rest of the writing runs beside the steps, and the checkpoint counts `write_s` after the
save began. A failure takes the run back to the newest complete checkpoint and costs `restart_s` before steps run again;
a failure during a restart begins it anew. With failures at rate L of the whole machine, an interval of length t gets
through with probability exp(-L t), so per second of running (t - stall) L exp(-L write) / (exp(L t) - 1) seconds of
work are kept, and the wall clock is exp(L restart) times the running. No approximation beyond these rules; for few
failures it is the familiar half interval lost each time. Runs that are played failure by failure agree within 0.2 %
(benchmarks/plan_simulate_202611.md).

The best interval is the one of Young (CACM 17(9), 1974) in Daly's higher-order form (FGCS 22(3), 2006): about sqrt(2
stall / L).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from peco_ds.errors import UserError

SECONDS_A_DAY = 86400.0
# Failures of 1000 nodes a day: low, typical, high. Meta's two research clusters: 2.3 and 6.5 (arXiv 2410.21680, section
# on reliability, from a report of it); Llama 3 405B: 419 unexpected interruptions in 54 days on 2048 nodes of 8 (arXiv
# 2407.21783), 3.8.
FAILURES_PER_1000_NODE_DAYS = (2.3, 3.8, 6.5)
# From a failure to the next step: fast, typical, slow. Assumed, no record of a GPU cluster of ours: noticing it (a dead
# rank at once, a hang after run.hang_timeout_s), Slurm's requeue, imports, process groups, reading the checkpoint,
# compiling the blocks.
RESTART_S = (180.0, 420.0, 1200.0)
# Device to host memory, a GPU: pageable copies of 8 GPUs at a time, PCIe 4 or 5. Assumed: a tenth to a quarter of the
# 25 to 50 GB/s of pinned copies.
HOST_COPY_BYTES_S = 5e9
# Beside bytes: ranks that wait for one another and gather what they save; then files opened, synced, listed and
# renamed. Assumed; on two CPU ranks the halt is 0.2 s in all (benchmarks/checkpoint_save_cpu_202611.md).
SAVE_CALL_S, WRITE_CALL_S = 0.5, 5.0


@dataclass(frozen=True)
class Goodput:
    """Expected values for a whole run."""

    # Share of the wall clock that becomes kept work.
    share: float
    wall_s: float
    expected_failures: float
    # Work done again.
    lost_s: float
    # The loop stands still for saves.
    saving_s: float
    restarting_s: float
    # Best time between saves for this stall and these failures; inf where nothing fails.
    best_interval_s: float


def goodput(
    work_s: float,
    *,
    nodes: int,
    interval_s: float,
    stall_s: float,
    write_s: float,
    restart_s: float = RESTART_S[1],
    failures_per_1000_node_days: float = FAILURES_PER_1000_NODE_DAYS[1],
) -> Goodput:
    """The bill of failures for `work_s` seconds of steps.

    Args:
        interval_s: from the beginning of a save to the beginning of the next.  stall_s: of it, the loop stands still.
        write_s: from the beginning of a save until the checkpoint is complete; where it is longer than `interval_s`,
            saves wait for it.
    Raises: UserError: the run stands still all the time between two saves, or fails too often to make progress.
    """
    interval_s = max(interval_s, write_s)
    if stall_s >= interval_s:
        raise UserError(
            f"checkpoints every {interval_s:.3g} s, and each halts the run for {stall_s:.3g} s; save less often"
        )
    rate = failure_rate(nodes, failures_per_1000_node_days)
    per_interval = math.expm1(min(rate * interval_s, 700.0))
    kept = (interval_s - stall_s) / interval_s
    if rate:
        kept = (interval_s - stall_s) * rate * math.exp(-rate * write_s) / per_interval
    if kept < 1e-3 or rate * restart_s > 7:
        remedy = "save more often, or take fewer nodes"
        if write_s > 600:
            remedy = f"a checkpoint takes {write_s:.3g} s to write, a faster file system is what helps"
        raise UserError(
            f"{nodes} nodes fail every {1 / rate:.3g} s, with checkpoints every {interval_s:.3g} s and restarts of "
            f"{restart_s:.3g} s: no progress; {remedy}"
        )
    running = work_s / kept
    wall = running * math.exp(rate * restart_s)
    saves = running * rate / per_interval if rate else running / interval_s
    return Goodput(
        share=work_s / wall,
        wall_s=wall,
        expected_failures=rate * wall,
        lost_s=running - work_s - saves * stall_s,
        saving_s=saves * stall_s,
        restarting_s=wall - running,
        best_interval_s=best_interval_s(stall_s, rate),
    )


def failure_rate(nodes: int, failures_per_1000_node_days: float) -> float:
    """Failures a second of all nodes together."""
    return nodes * failures_per_1000_node_days / 1000 / SECONDS_A_DAY


def best_interval_s(stall_s: float, rate: float) -> float:
    """Interval from one save to the next by Daly's formula, the stall counted in; inf where nothing fails."""
    if rate == 0:
        return math.inf
    if stall_s >= 2 / rate:
        return 1 / rate + stall_s
    part = stall_s * rate / 2
    return math.sqrt(2 * stall_s / rate) * (1 + math.sqrt(part) / 3 + part / 9)


def stall_seconds(bytes_a_gpu: float) -> float:
    """Seconds that the loop stands still while all ranks copy their parts of the state to host memory at once."""
    return SAVE_CALL_S + bytes_a_gpu / HOST_COPY_BYTES_S


def write_seconds(checkpoint_bytes: float, nodes: int, storage_bytes_s: float) -> float:
    """Seconds of a write: every node writes its share at `storage_bytes_s`, which hides hashing and renaming."""
    return WRITE_CALL_S + checkpoint_bytes / nodes / storage_bytes_s
