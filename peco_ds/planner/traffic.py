"""Which collectives an optimiser step makes under a DeepSpeed JSON, and what they carry.

The rules are those of DeepSpeed 0.19.8, read in its source (`stage3.py`, `partitioned_param_coordinator.py`,
`stage_1_and_2.py`, `bf16_optimizer.py`, `engine.py`) and held against what its engine asks of the process group
(tests/test_traffic.py). In steady state, from the third step on:

  ZeRO-0, and ZeRO-1 in bf16 with     all-reduces at the end of the last backward pass, of 5e8 elements and more each;
  gradients summed in fp32            no key changes that
  ZeRO-1 else                         all-reduces of buckets in the last micro-step alone; without `overlap_comm` all of
                                      them at its end
  ZeRO-2                              the same in every micro-step; `use_multi_rank_bucket_allreduce` false: a reduce to
                                      each owner instead, before each of which the host waits for the device
  ZeRO-1 and 2, after the step        one gather a parameter group, however large (`allgather_bucket_size` has no say
                                      where the process group gathers into one tensor, as NCCL and gloo do); a norm a
                                      group (not in the first case), an overflow flag
  ZeRO-3                              weights gathered in every micro-step, gradients reduce-scattered in every
                                      micro-step; a norm a group

ZeRO-3 asks for a prefetch at every module it enters, so it runs ahead by one bucket a module and not by one bucket in
all, as far as `stage3_max_live_parameters` allows. A block's weights stay from its forward to its backward pass if what
lies behind it in the forward pass has fewer elements than `stage3_max_reuse_distance`. Quantised collectives and the
secondary partitions of ZeRO++ are not modelled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Literal, NamedTuple

from peco_ds.planner.memory import (
    DTYPE_BYTES,
    MAX_LIVE,
    MAX_REUSE_DISTANCE,
    PREFETCH_BUCKET,
    REDUCE_BUCKET,
    offloads,
    zero_number,
    zero_stage,
)
from peco_ds.planner.shapes import ELEMENT_BYTES
from peco_ds.planner.work import Segment

# DeepSpeed's default, in elements; others: memory.py
PERSISTENCE = 1e5
GROUP_ALIGNMENT = 2  # elements
# `MEMORY_OPT_ALLREDUCE_SIZE` of DeepSpeed's engine, in elements, which no key changes.
WHOLE_REDUCTION = 5e8
FLAG_BYTES, NORM_BYTES, DOUBLE_NORM_BYTES = 1, 4, 8

Operation = Literal["all_gather", "reduce_scatter", "all_reduce", "reduce"]


@dataclass(frozen=True)
class Collective:
    """One call of every rank."""

    operation: Operation
    # The whole result of a gather, the whole input of a reduction.
    num_bytes: float
    # `after` means beside the optimiser's own work, when no pass runs.
    when: Literal["forward", "backward", "after"]
    # A gather is over before the pass of this segment begins. A reduction begins when this segment's backward pass is
    # over.
    segment: int
    # Counted from 0.
    micro_step: int
    # It runs on a stream of its own, beside the computation.
    overlaps: bool
    # The segment at whose start the host asks for a gather. For a reduction it is its own segment.
    asked: int = 0


class TrainedTensor(NamedTuple):
    elements: int
    # Whether the tensor is in the parameter group with weight decay, and not in the other.
    decays: bool = True


# Of a segment, in running order: modules with the tensors they hold themselves. A transformer block is one module, all
# else is met module by module.
Modules = Sequence[Sequence[TrainedTensor]]


def step_collectives(
    segments: Sequence[Segment],
    *,
    ds_config: dict,
    precision: str,
    micro_steps: int,
    ranks: int | None = None,
    groups: Literal["whole", "segment"] = "whole",
    modules: Sequence[Modules] | None = None,
) -> tuple[Collective, ...]:
    """Every collective of one optimiser step: of each micro-step the gathers, then the reductions, each in the order in
    which the host asks for them; then what follows.

    What a training loop asks for beside its engine (whether all ranks go on) is not in it: a few bytes a step.

    Args:
        segments: of the trained network, in running order, blocks between an embedding and a head; frozen ones make no
            traffic.
        ds_config: DeepSpeed JSON, read or merged; a type of reduction that it leaves to the recipe is fp32, as
            `deepspeed_json.merge_deepspeed` has it.
        precision: "bf16", "fp16" or "fp32".
        micro_steps: forward and backward passes a step.
        ranks: that share the partitions; adds their padding and decides who owns what where gradients are reduced to
            owners. None: no padding, one owner a bucket.
        groups: parameter groups of the optimiser: "whole": one with weight decay and one without; "segment": two a
            segment (layer decay).
        modules: of each segment; None: estimated from the sizes of its tensors.
    Returns: empty for one rank, and where nothing is trained.
    """
    assert micro_steps >= 1 and precision in ELEMENT_BYTES, (micro_steps, precision)
    if ranks == 1:
        return ()
    held = (
        [list(found) for found in modules]
        if modules
        else [_estimated_modules(segment, place, len(segments)) for place, segment in enumerate(segments)]
    )
    assert len(held) == len(segments), (len(held), len(segments))
    network = _Network(held, groups)
    if not network.tensors:
        return ()
    step = _Step(network, ds_config, precision, micro_steps, ranks)
    return tuple(
        {0: step.without_zero, 1: step.stage_1_or_2, 2: step.stage_1_or_2, 3: step.stage_3}[zero_stage(ds_config)]()
    )


def sent_bytes(collective: Collective, ranks: int) -> float:
    """What a rank sends, on average over ranks, by the algorithms that send least (a ring): (n - 1) / n of a gather or
    a reduction to owners, twice that of an all-reduce.
    """
    return (2 if collective.operation == "all_reduce" else 1) * collective.num_bytes * (ranks - 1) / ranks


@dataclass(frozen=True)
class Traffic:
    """Traffic of one operation in one step."""

    calls: int
    num_bytes: float
    # Bytes that a rank sends.
    sent: float


def traffic_by_operation(collectives: Sequence[Collective], ranks: int) -> dict[Operation, Traffic]:
    """Sums by operation, largest sender first."""
    sums: dict[Operation, Traffic] = {}
    for collective in collectives:
        before = sums.get(collective.operation, Traffic(0, 0.0, 0.0))
        sums[collective.operation] = Traffic(
            before.calls + 1, before.num_bytes + collective.num_bytes, before.sent + sent_bytes(collective, ranks)
        )
    return dict(sorted(sums.items(), key=lambda item: -item[1].sent))


# ------------------------------------------------------------------- the network, as DeepSpeed sees it

# A segment with at least so many tensors is taken for a transformer block, which has 13 to 16.
BLOCK_TENSORS = 10
# Sizes in squares of the width: query, key and value; projection; both layers of the MLP at its usual ratio.
BLOCK_MATRICES = (3, 1, 4, 4)


def _estimated_modules(segment: Segment, place: int, segments: int) -> list[list[TrainedTensor]]:
    """Modules of a segment of which only the sizes of its tensors are known, or not even these."""
    if not segment.parameters:
        return []
    elements = segment.tensor_elements or _estimated_elements(segment)
    width, largest = min(elements), max(elements)
    tensors = [TrainedTensor(count, decays=count >= min(width**2, largest)) for count in elements]
    if len(tensors) >= BLOCK_TENSORS:
        return [tensors]
    vectors = [tensor for tensor in tensors if tensor.elements == width]
    others = [tensor for tensor in tensors if tensor.elements != width]
    if place == 0 and segments > 1 and others:
        # The model itself with its class and mask token; the patch embedding, its convolution, its norm (none); the
        # bias table, if it is here.
        return [vectors[1:], [], [others[0], vectors[0]], [], *([other] for other in others[1:])]
    if place == segments - 1 and others:
        return [vectors, others]  # final norm, head
    return [tensors]


def _estimated_elements(segment: Segment) -> list[int]:
    if segment.tensors < BLOCK_TENSORS:
        # A bias, however short, makes a parameter group, so one element stands for it.
        return [segment.parameters - 1, 1]
    square = isqrt(segment.parameters // sum(BLOCK_MATRICES)) ** 2
    vectors = segment.tensors - len(BLOCK_MATRICES)
    each, more = divmod(segment.parameters - sum(BLOCK_MATRICES) * square, vectors)
    return [share * square for share in BLOCK_MATRICES] + [each + (number < more) for number in range(vectors)]


class _Tensor(NamedTuple):
    number: int  # in forward order
    elements: int
    segment: int
    group: int


class _Module(NamedTuple):
    tensors: tuple[_Tensor, ...]
    segment: int
    # A unit is a transformer block: it is gathered as one, and its gradients are reduced together.
    unit: bool


class _Network:
    """All modules in forward order, and all tensors in it."""

    def __init__(self, held: Sequence[Modules], groups: str) -> None:
        self.modules: list[_Module] = []
        number = 0
        for segment, modules in enumerate(held):
            for module in modules:
                tensors = []
                for elements, decays in module:
                    group = (2 * segment if groups == "segment" else 0) + (not decays)
                    tensors.append(_Tensor(number, elements, segment, group))
                    number += 1
                self.modules.append(_Module(tuple(tensors), segment, unit=len(module) >= BLOCK_TENSORS))
        self.tensors = [tensor for module in self.modules for tensor in module.tensors]
        self.elements = sum(tensor.elements for tensor in self.tensors)
        by_group: dict[int, list[_Tensor]] = {}
        for tensor in self.tensors:
            by_group.setdefault(tensor.group, []).append(tensor)
        self.groups = [by_group[group] for group in sorted(by_group)]


class _Step:
    def __init__(self, network: _Network, ds_config: dict, precision: str, micro_steps: int, ranks: int | None) -> None:
        self.network, self.micro_steps, self.ranks = network, micro_steps, ranks
        self.zero = ds_config.get("zero_optimization", {})
        self.stage = zero_stage(ds_config)
        self.precision, self.element = precision, ELEMENT_BYTES[precision]
        self.reduced = DTYPE_BYTES.get(str(ds_config.get("communication_data_type")), 4)
        summed = ds_config.get("data_types", {}).get("grad_accum_dtype")
        self.summed = DTYPE_BYTES.get(str(summed), 4 if self.stage else self.element)
        self.flagged = precision == "fp16" or (
            precision == "bf16" and ds_config.get("bf16", {}).get("check_grad_overflow", self.stage in (1, 2))
        )
        self.clips = ds_config.get("gradient_clipping", 1.0) != 0
        self.bucket = zero_number(self.zero, "reduce_bucket_size", REDUCE_BUCKET)

    # ------------------------------------------------------------------------------------------ stages

    def without_zero(self) -> list[Collective]:
        found = self._after_backward(self._whole_reductions([tensor.elements for tensor in self.network.tensors]))
        return found + ([self._after("all_reduce", NORM_BYTES)] if self.precision == "fp32" and self.clips else [])

    def stage_1_or_2(self) -> list[Collective]:
        offloaded = offloads(self.zero, "offload_optimizer")
        if self.stage == 1 and self.precision == "bf16" and self.summed == 4 and not offloaded:
            found = self._after_backward(self._whole_reductions(self._group_elements()))
        else:
            found = self._bucket_reductions() + self._flag() + self._norms()
        return found + [self._after("all_gather", elements * self.element) for elements in self._group_elements()]

    def stage_3(self) -> list[Collective]:
        kept = zero_number(self.zero, "stage3_param_persistence_threshold", PERSISTENCE)
        persistent = [tensor for tensor in self.network.tensors if tensor.elements <= kept]
        kept_whole = {tensor.number for tensor in persistent}
        found = []
        for micro_step in range(self.micro_steps):
            found += _Gathers(self.network, self.zero, kept_whole, self._gathered, micro_step).run()
            found += self._scattered(micro_step)
        if self.precision == "fp16":
            found += self._flag()
        found += self._norms()
        return found + [self._after("all_gather", self._gathered([tensor])) for tensor in persistent]

    # ------------------------------------------------------------------------------------------ their parts

    def _group_elements(self) -> list[int]:
        """ZeRO-1 and 2 pad a group so that every rank's part begins at an even place."""
        aligned = GROUP_ALIGNMENT * (self.ranks or 1)
        return [-(-sum(tensor.elements for tensor in group) // aligned) * aligned for group in self.network.groups]

    def _after(self, operation: Operation, num_bytes: float) -> Collective:
        return Collective(operation, num_bytes, "after", 0, self.micro_steps - 1, overlaps=False)

    def _after_backward(self, elements: list[int]) -> list[Collective]:
        return [self._after("all_reduce", count * self.reduced) for count in elements]

    def _flag(self) -> list[Collective]:
        return [self._after("all_reduce", FLAG_BYTES)] if self.flagged else []

    def _norms(self) -> list[Collective]:
        double = self.stage == 3 and not offloads(self.zero, "offload_optimizer")
        return [self._after("all_reduce", DOUBLE_NORM_BYTES if double else NORM_BYTES) for _ in self.network.groups]

    def _gathered(self, tensors: Sequence[_Tensor]) -> float:
        return self.element * sum(self._padded(tensor.elements) for tensor in tensors)

    def _padded(self, elements: int) -> int:
        ranks = self.ranks or 1
        return -(-elements // ranks) * ranks

    @staticmethod
    def _whole_reductions(elements: list[int]) -> list[int]:
        """Tensors are collected until they are more than the limit, not up to it."""
        calls, waiting = [], 0
        for count in elements:
            waiting += count
            if waiting > WHOLE_REDUCTION:
                calls.append(waiting)
                waiting = 0
        return calls + ([waiting] if waiting else [])

    def _overlaps(self) -> bool:
        asked = self.zero.get("overlap_comm")
        return self.stage == 3 if asked is None else bool(asked)

    def _buckets(self, order: Sequence[_Tensor]) -> list[tuple[list[_Tensor], int]]:
        """Tensors that are reduced together, and the segment in whose backward pass the bucket was found full."""
        calls: list[tuple[list[_Tensor], int]] = []
        bucket: list[_Tensor] = []
        filled = 0
        for tensor in order:
            if bucket and filled + tensor.elements > self.bucket:
                calls.append((bucket, tensor.segment))
                bucket, filled = [], 0
            bucket.append(tensor)
            filled += tensor.elements
        return calls + ([(bucket, bucket[-1].segment)] if bucket else [])

    def _bucket_reductions(self) -> list[Collective]:
        """ZeRO-1 reduces in the last micro-step alone; without overlap it does so when the backward pass is over."""
        at_end = self.stage == 1 and not self._overlaps()
        order = [tensor for group in self.network.groups for tensor in group] if at_end else self.network.tensors[::-1]
        to_owners = (
            self.stage == 2
            and self.zero.get("reduce_scatter", True)
            and not self.zero.get("use_multi_rank_bucket_allreduce", True)
        )
        owned = self._owned() if to_owners else {}
        last, found = self.micro_steps - 1, []
        for micro_step in range(self.micro_steps) if self.stage == 2 else [last]:
            for bucket, segment in self._buckets(order):
                shares: dict[int, int] = {}
                for tensor in bucket:
                    for owner, elements in owned[tensor.number] if to_owners else [(0, tensor.elements)]:
                        shares[owner] = shares.get(owner, 0) + elements
                if at_end:
                    found += [self._after("all_reduce", elements * self.reduced) for elements in shares.values()]
                    continue
                operation: Operation = "reduce" if to_owners else "all_reduce"
                found += [self._reduction(operation, elements, segment, micro_step) for elements in shares.values()]
        return found

    def _owned(self) -> dict[int, list[tuple[int, int]]]:
        """Tensor -> (rank, elements of it that it owns): a group lies flat in forward order and is cut into equal
        parts.
        """
        found: dict[int, list[tuple[int, int]]] = {}
        for group, elements in zip(self.network.groups, self._group_elements()):
            part, begin = elements // (self.ranks or 1), 0
            for tensor in group:
                end, found[tensor.number] = begin + tensor.elements, []
                while begin < end:
                    owner = begin // part
                    cut = min(end, (owner + 1) * part)
                    found[tensor.number].append((owner, cut - begin))
                    begin = cut
        return found

    def _scattered(self, micro_step: int) -> list[Collective]:
        order: list[_Tensor] = []
        for module in reversed(self.network.modules):
            # A block's gradients are taken when its backward pass is over, group by group.
            by_group = sorted(module.tensors, key=lambda tensor: (tensor.group, tensor.number))
            order += by_group if module.unit else module.tensors[::-1]
        operation: Operation = "reduce_scatter" if self.zero.get("reduce_scatter", True) else "all_reduce"
        padded = self._padded if operation == "reduce_scatter" else int
        return [
            self._reduction(operation, sum(padded(tensor.elements) for tensor in bucket), segment, micro_step)
            for bucket, segment in self._buckets(order)
        ]

    def _reduction(self, operation: Operation, elements: int, segment: int, micro_step: int) -> Collective:
        num_bytes = self.reduced * elements
        return Collective(operation, num_bytes, "backward", segment, micro_step, self._overlaps(), segment)


class _Gathers:
    """ZeRO-3's gathers of one micro-step: a replay of its coordinator, module by module."""

    def __init__(self, network: _Network, zero: dict, persistent: set[int], gathered, micro_step: int) -> None:
        first, *rest = network.modules
        # The model itself opens the backward pass too; what it holds is released when both are over.
        self._order = [*network.modules, first, *reversed(rest)]
        self._forward = len(network.modules)
        self._elements = network.elements
        self._persistent, self._gathered, self._micro_step = persistent, gathered, micro_step
        self._prefetch = zero_number(zero, "stage3_prefetch_bucket_size", PREFETCH_BUCKET)
        self._max_live = zero_number(zero, "stage3_max_live_parameters", MAX_LIVE)
        self._reuse = zero_number(zero, "stage3_max_reuse_distance", MAX_REUSE_DISTANCE)
        self._available: dict[int, int] = {}
        # Maps each tensor to the latest place in the order that a prefetch took it for, present or not.
        self._fetched_for: dict[int, int] = {}
        self._queue = deque((tensor, place) for place, module in enumerate(self._order) for tensor in module.tensors)
        self._found: list[Collective] = []

    def run(self) -> list[Collective]:
        for place, module in enumerate(self._order):
            self._gather([tensor for tensor in module.tensors if not self._is_here(tensor)], place, place)
            self._pop(module, place)
            self._look_ahead(place)
            if place and place != self._forward:
                self._release(module, place + 1)
            # The forward pass of the last module ends that of the model.
            if place == self._forward - 1:
                self._release(self._order[0], place + 1)
        return self._found

    def _is_here(self, tensor: _Tensor) -> bool:
        return tensor.number in self._available or tensor.number in self._persistent

    def _gather(self, tensors: Sequence[_Tensor], asked: int, needed: int) -> None:
        if not tensors:
            return
        self._available |= {tensor.number: tensor.elements for tensor in tensors}
        when: Literal["forward", "backward"] = "forward" if needed < self._forward else "backward"
        segment = self._order[needed].segment
        asked_segment = self._order[asked].segment
        # The backward pass begins at the segment where the forward pass ended.
        if needed == self._forward or (when == "backward" and asked <= self._forward):
            asked_segment = self._order[self._forward - 1].segment
            segment = asked_segment if needed == self._forward else segment
        self._found.append(
            Collective("all_gather", self._gathered(tensors), when, segment, self._micro_step, True, asked_segment)
        )

    def _pop(self, module: _Module, place: int) -> None:
        waiting = sum(self._fetched_for.get(tensor.number, -1) < place for tensor in module.tensors)
        for _ in range(min(waiting, len(self._queue))):
            tensor, used = self._queue.popleft()
            self._fetched_for[tensor.number] = used

    def _look_ahead(self, place: int) -> None:
        limit = min(self._max_live - sum(self._available.values()), self._prefetch)
        wanted: dict[_Tensor, int] = {}
        elements = 0
        while self._queue and elements < limit:
            tensor, used = self._queue.popleft()
            self._fetched_for[tensor.number] = max(self._fetched_for.get(tensor.number, -1), used)
            if not self._is_here(tensor) and tensor not in wanted:
                wanted[tensor] = used
                elements += tensor.elements
        if wanted:
            self._gather(list(wanted), place, min(wanted.values()))

    def _release(self, module: _Module, place: int) -> None:
        """What no coming module within the reuse distance needs, as seen before `place`."""
        going = {tensor.number for tensor in module.tensors if self._fetched_for.get(tensor.number, -1) <= place}
        passed = 0
        for later_place in range(place, len(self._order)):
            if passed >= self._reuse or not going:
                break
            later = self._order[later_place]
            # As seen from a block, the model itself holds all tensors that are in the block.
            if later_place == self._forward and module.unit:
                going, passed = set(), passed + self._elements
            going -= {tensor.number for tensor in later.tensors}
            # What is no block sees of a block only what the block holds beside its parts: next to nothing.
            passed += sum(tensor.elements for tensor in later.tensors) if module.unit or not later.unit else 0
        for number in going:
            self._available.pop(number, None)
