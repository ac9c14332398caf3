"""Seconds of an optimiser step, in closed form.

A pass of a segment takes what its products need at the share of the peak that they reach, and what else it reads and
writes at the memory's pace; a stream runs one kernel after another, so the times are added. A pass that is shorter than
what the host needs to launch its kernels takes that long.

A rank has two queues: what it computes (segments of the forward pass, then of the backward pass, of each micro-batch)
and its collectives, which NCCL runs one after another on one communicator, in the order in which they were posted.
DeepSpeed 0.19.8 posts and awaits them so:

  gather, overlapping         posted where the pass of the segment begins in which the host asks for it (the prefetch);
                              the segment it serves waits for it
  gather, not overlapping     posted where its own segment would begin: nothing hides it
  reduction, overlapping      posted when its segment's backward pass is over; awaited at the end of the micro-batch,
                              where DeepSpeed waits for all it has posted
  reduction, not overlapping  posted there too, and the next segment waits
  after the step              nothing hides it

The step is then the longest path through both queues. A path that leaves the computation at one point, runs through a
chain of collectives and comes back at a later point costs, beyond the computation, `sum of the chain - what is computed
between the two points`; the exposed time is the largest sum that chains which follow one another reach. Three simple
cases: all hidden but the first gather and what is left of the last reduction (compute-bound); all of the collectives
less all of the computation between the first call and the last (communication-bound); every collective (nothing
overlaps).

Contention: a running collective keeps `contention` of a GPU's multiprocessors busy, so what a pass computes beside it
takes longer by that share of the hidden time. The longest path is taken again with the pass so much longer, until the
hidden time no longer changes.

Stragglers: a synchronous step lasts as long as its slowest rank. Each rank's passes are taken to vary by `noise` about
their mean, independently; until a collective makes all ranks wait, the noise of several passes adds up as its square
root. The slowest of n ranks is `expected_maximum(n)` deviations slow, and the same longest path is taken with the
computation so much longer: where the links set the pace, a slow rank costs little.

A simulation that plays every rank's queues (tests/step_simulation.py) agrees within 1.8 % on 288 steps of 1 to 1024
GPUs (benchmarks/plan_simulate_202611.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from peco_ds.errors import UserError
from peco_ds.planner.hardware import Hardware
from peco_ds.planner.network import collective_seconds
from peco_ds.planner.traffic import Collective
from peco_ds.planner.work import Segment, Work

PACES = ("slow", "typical", "fast")

# Of what products reach. Assumed: a convolution of 128 to 512 channels is a product with a shared dimension of nine
# times that, but gathers its operand, and eager PyTorch keeps maps channels first, which cuDNN turns round; ResNet-50's
# published training rates on these cards are a quarter of their peak, with its norms.
CONVOLUTION_SHARE = {"slow": 0.45, "typical": 0.60, "fast": 0.80}
# In float32 attention's kernels and the products use the same units; assumed half of what products reach, for short
# rows.
FP32_ATTENTION_SHARE = 0.5
# Of what products reach. Assumed: products of a head's 64 to 80 columns, with an output of T x T.
BATCHED_SHARE = 0.5
# Of a machine's memory_share. Assumed: the share is that of long copies; sums over the rows of a batch and kernels of
# odd widths reach less.
MEMORY_PACE = {"slow": 0.85, "typical": 1.0, "fast": 1.08}
# Seconds the host needs for one kernel. Assumed: a CUDA launch costs about 4 microseconds, an operator of eager PyTorch
# with autograd and an engine's hooks up to twice that.
LAUNCH_S = {"slow": 10e-6, "typical": 6e-6, "fast": 4e-6}
# AdamW with float32 moments and weights, fused: gradient, weight and both moments read (16), the last three written
# (12), the 16-bit copy (2); before it the gradient's norm and its scaling (12).
OPTIMIZER_BYTES = 42
# An offloaded optimiser. Assumed: the CPU's AdamW reaches half of the 600 GB/s of two sockets with eight channels of
# DDR5 each; pinned copies between a GPU and its host reach 25 GB/s, all of PCIe 4 and half of PCIe 5. A gradient of 4 B
# goes down, a weight of 2 comes back.
HOST_MEMORY_BYTES_S, HOST_LINK_BYTES_S, OFFLOADED_BYTES = 300e9, 25e9, 4 + 2
# Standard deviation of a rank's pass over ranks and passes. Assumed: on five clusters the same program's time varied by
# 8% over GPUs of one model (at most 22%; Sinha et al., SC22, arXiv 2208.11035), taken for the span of some hundred
# GPUs, which is five to six deviations. Single GPUs were up to 1.5 times slower: slow_node.
NOISE = 0.015
# Assumed: an all-gather on an H100 was seen to hold 24 of its 132 multiprocessors (NVIDIA developer forum, topic
# 337991). A product that fills all of them exactly took nearly twice as long beside it there; blocks' products fill
# them many times over.
CONTENTION = 24 / 132
# Rounds of taking the longest path again; each leaves CONTENTION times the error of the one before.
_ROUNDS = 4


@dataclass(frozen=True)
class SegmentSeconds:
    """Seconds of one micro-batch in one segment, by pass."""

    forward: float
    backward: float


def segment_seconds(
    segment: Segment, images: int, hardware: Hardware, precision: str, pace: str = "typical"
) -> SegmentSeconds:
    """Seconds of one micro-batch in one segment, forward and backward.

    Args:
        images: of the micro-batch.
        precision: of the run; a segment that computes in another one says so itself.
        pace: one of PACES.
    Raises: UserError if the machine has no peak in that precision.
    """
    assert pace in PACES, pace
    used = segment.precision or precision
    return SegmentSeconds(
        *(work_seconds(work, images, hardware, used, pace) for work in (segment.forward, segment.backward))
    )


def work_seconds(work: Work, images: int, hardware: Hardware, precision: str, pace: str = "typical") -> float:
    """Seconds of one pass of `images`."""
    if precision not in hardware.peak_flops:
        raise UserError(f"{hardware.name} has no peak_flops in {precision}; known: {', '.join(hardware.peak_flops)}")
    place = PACES.index(pace)
    peak, share = hardware.peak_flops[precision], hardware.product_share[place]
    attention_share = FP32_ATTENTION_SHARE * share if precision == "fp32" else hardware.attention_share[place]
    computing = (
        (work.products - work.attention) / share
        + work.tiles / attention_share
        + work.batched / (BATCHED_SHARE * share)
        + work.convolutions / (CONVOLUTION_SHARE[pace] * share)
    )
    moving = (work.moved_bytes * images + work.pass_bytes) / (
        hardware.memory_bytes_s * hardware.memory_share * MEMORY_PACE[pace]
    )
    return max(images * computing / peak + moving, work.kernels * LAUNCH_S[pace])


def optimizer_seconds(num_parameters: float, hardware: Hardware) -> float:
    """Seconds of the optimiser's own work on this rank's `num_parameters` of the parameters: it only reads and
    writes.
    """
    return num_parameters * OPTIMIZER_BYTES / (hardware.memory_bytes_s * hardware.memory_share)


def offloaded_optimizer_seconds(num_parameters: float, ranks_per_node: int) -> float:
    """The same where optimiser and moments lie on the host: its memory is shared by the ranks of a node."""
    return num_parameters * (
        OPTIMIZER_BYTES * ranks_per_node / HOST_MEMORY_BYTES_S + OFFLOADED_BYTES / HOST_LINK_BYTES_S
    )


# ------------------------------------------------------------------------ the longest path of a step


@dataclass(frozen=True)
class StepInputs:
    """What the closed form starts from."""

    # One micro-batch, in running order.
    segments: tuple[SegmentSeconds, ...]
    # The whole optimiser step.
    collectives: tuple[Collective, ...]
    micro_steps: int
    # The optimiser's own work on this rank's partition.
    optimizer_s: float
    ranks: int
    hardware: Hardware
    # Spread between ranks. 0: all ranks are alike.
    noise: float = NOISE
    # 0: collectives take nothing from what is computed beside them.
    contention: float = CONTENTION
    # Factor on the bandwidths that collectives usually reach.
    link_share: float = 1.0
    # One node computes so many times as long as the others.
    slow_node: float = 1.0


@dataclass(frozen=True)
class StepCost:
    """Seconds of one optimiser step on the slowest rank.

    `seconds` is the sum of compute_s, optimizer_s, exposed_s, contention_s and straggler_s.
    """

    seconds: float
    # Forward and backward passes.
    compute_s: float
    optimizer_s: float
    # Sum over all collectives, overlapped or not.
    communication_s: float
    # The part of `communication_s` that no computation overlaps.
    exposed_s: float
    # Waiting for the slowest rank.
    straggler_s: float
    # Slower computing beside collectives.
    contention_s: float


def closed_form(inputs: StepInputs) -> StepCost:
    """One optimiser step as the module's docstring reckons it."""
    forward, backward = (
        sum(piece.forward for piece in inputs.segments),
        sum(piece.backward for piece in inputs.segments),
    )
    passes = forward + backward
    seconds = durations(inputs)
    after = sum(duration for collective, duration in zip(inputs.collectives, seconds) if collective.when == "after")
    queues: list[list[tuple[Collective, float]]] = [[] for _ in range(inputs.micro_steps)]
    for collective, duration in zip(inputs.collectives, seconds):
        if collective.when != "after":
            queues[collective.micro_step].append((replace(collective, micro_step=0), duration))
    # Results by queue are kept, because most micro-batches of a step are alike.
    known: dict[tuple, tuple[float, float]] = {}
    exposed, contended, slowest, waiting = after, 0.0, 0.0, 0

    def added(queue: list[tuple[Collective, float]], stretch: float) -> tuple[float, float]:
        key = (*queue, stretch)
        if key not in known:
            known[key] = _added(inputs, queue, stretch)
        return known[key]

    for micro_step, queue in enumerate(queues):
        # `waiting` counts the micro-batches since all ranks last waited for one another.
        waiting += 1
        late, lost = added(queue, 1.0)
        exposed, contended = exposed + late, contended + lost
        if queue or (inputs.collectives and micro_step == inputs.micro_steps - 1):
            together = _of_several(forward, backward, waiting)
            stretch = 1 + inputs.noise * expected_maximum(inputs.ranks) * together
            if inputs.slow_node > 1:
                # The slowest rank is one of the slow node's, if that is slower still.
                its_ranks = min(inputs.ranks, inputs.hardware.gpus_per_node)
                slowest_there = 1 + inputs.noise * expected_maximum(its_ranks) * together
                stretch = max(stretch, inputs.slow_node * slowest_there)
            slowest += waiting * stretch * passes + sum(added(queue, stretch))
            waiting = 0
    slowest += waiting * passes + after
    alike = inputs.micro_steps * passes + exposed + contended
    return StepCost(
        seconds=slowest + inputs.optimizer_s,
        compute_s=inputs.micro_steps * passes,
        optimizer_s=inputs.optimizer_s,
        communication_s=sum(seconds),
        exposed_s=exposed,
        straggler_s=slowest - alike,
        contention_s=contended,
    )


def _added(inputs: StepInputs, queue: Sequence[tuple[Collective, float]], stretch: float) -> tuple[float, float]:
    """What the collectives of one micro-batch add to passes that are `stretch` times as long: seconds exposed, seconds
    lost to contention.
    """
    computing = (
        stretch * sum(piece.forward for piece in inputs.segments),
        stretch * sum(piece.backward for piece in inputs.segments),
    )
    communicating = [
        sum(duration for collective, duration in queue if collective.when == direction)
        for direction in ("forward", "backward")
    ]
    lost, exposed = [0.0, 0.0], (0.0, 0.0)
    for _ in range(_ROUNDS if inputs.contention else 1):
        forward, backward = (
            stretch * (1 + slower / length) if length else 1.0 for slower, length in zip(lost, computing)
        )
        exposed = exposed_seconds(
            [SegmentSeconds(piece.forward * forward, piece.backward * backward) for piece in inputs.segments], queue
        )
        lost = [inputs.contention * (total - late) for total, late in zip(communicating, exposed)]
    return sum(exposed), sum(lost)


def durations(inputs: StepInputs) -> list[float]:
    """Seconds of each collective of `inputs`, in their order, with nothing else on the links."""
    known = {(each.operation, each.num_bytes) for each in inputs.collectives}
    seconds = {
        call: collective_seconds(*call, inputs.ranks, inputs.hardware, share=inputs.link_share) for call in known
    }
    return [seconds[each.operation, each.num_bytes] for each in inputs.collectives]


def exposed_seconds(
    segments: Sequence[SegmentSeconds], queue: Sequence[tuple[Collective, float]]
) -> tuple[float, float]:
    """What the collectives of one micro-batch, with their seconds, add to its forward and to its backward pass: the
    heaviest chains of the module's docstring.

    Points of the computation are counted from 0, before the forward pass of the first segment, to twice the number of
    segments.
    """
    pieces = [piece.forward for piece in segments] + [piece.backward for piece in reversed(segments)]
    computed = [0.0]
    for piece in pieces:
        computed.append(computed[-1] + piece)
    # Delay that chains which have ended add before each point.
    delays = [0.0] * len(computed)
    sent, opened = 0.0, -math.inf
    for post, need, duration in posted_in_order(queue, len(segments)):
        # Either the best chain runs on, or a new one starts here.
        opened = max(opened, delays[post] + computed[post] - sent)
        sent += duration
        late = opened + sent - computed[need]
        for point in range(need, len(delays)):
            # Delays never fall from one point to the next, so every later one is large enough too.
            if delays[point] >= late:
                break
            delays[point] = late
    last_forward = delays[len(segments) - 1]
    return last_forward, delays[-1] - last_forward


def posted_in_order(queue: Sequence[tuple[Collective, float]], num_segments: int) -> list[tuple[int, int, float]]:
    """(point where it is posted, point where it is awaited, seconds) of each collective of a micro-batch, first posted
    first.
    """
    end, rows = 2 * num_segments, []
    for collective, duration in queue:
        begin, asked = (
            place if collective.when == "forward" else end - 1 - place
            for place in (collective.segment, collective.asked)
        )
        gathers = collective.operation == "all_gather"
        if gathers:
            post, need = min(asked, begin) if collective.overlaps else begin, begin
        else:
            post, need = begin + 1, end if collective.overlaps else begin + 1
        rows.append((post, gathers, need, duration))
    # Where two begin at the same point, the one for the previous segment comes first.
    rows.sort(key=lambda row: row[:2])
    return [(post, need, duration) for post, _, need, duration in rows]


def expected_maximum(count: int) -> float:
    """Expected maximum of `count` independent standard normal numbers.

    Blom's approximation is within 5% (0.6% from 8 on).
    """
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def _of_several(forward: float, backward: float, micro_batches: int) -> float:
    """Deviation of the sum of independent passes over the sum, in deviations of one pass."""
    total = micro_batches * (forward + backward)
    return math.sqrt(micro_batches * (forward**2 + backward**2)) / total if total else 0.0
