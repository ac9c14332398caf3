"""Bytes a GPU under ZeRO stages 0 to 3.

The paper's formula (ZeRO, arXiv 1910.02054): 16-bit weights and gradients, 2 B a parameter each, and 12 B of optimiser
state (32-bit master weights and two Adam moments); stage 1 divides the state by the ranks, stage 2 the gradients too,
stage 3 the weights too. DeepSpeed 0.19.8 keeps more, as a census of the tensors it holds after a backward pass shows
(test_engine_state.py repeats it):

  stage 1, bf16, gradients summed in 32 bits   32-bit gradients whole on every rank beside the 16-bit ones: 2 + 2 + 4
                                               B, not 2 + 2
  stage 1 to 3, fp32                           a master copy beside the weights: state is 12 B, not 8; stage 0 has none
  stage 1 and 2                                a flat bucket of `reduce_bucket_size` elements (not in the first case),
                                               two if it overlaps; in stage 2 for the time of the backward pass
  stage 3                                      one such bucket; weights gathered in the forward pass stay for the
                                               backward pass as far as `stage3_max_reuse_distance` reaches, and
                                               prefetches run as far ahead as `stage3_max_live_parameters` allows: by
                                               default that is all of them. A single rank gathers nothing

An offloaded optimiser takes more on the host than it leaves on the GPU: a 32-bit gradient of the partition to step
with, beside the one that is summed (stage 3) or a copy of the 16-bit weights on their way back (stages 1 and 2, whose
32-bit sums stay on the GPU).

Stage 0 sums gradients in the weights' own type: DeepSpeed refuses any other there. The census ran on CPUs, where host
and device are one: that their sum is right was measured, which of them holds what follows DeepSpeed's source, and so
does all of fp16. Left out: what lives during the optimiser's step alone, when no activation does, the CUDA context and
the communicator (about 1 GiB together), the padding of partitions (below 0.1 percent of ViT-H on 1024 ranks), a tensor
of the largest size here and there (stages 1 and 2 without 32-bit sums keep whole gradients of those that lie across a
partition's ends).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Any

from peco_ds.planner.shapes import ELEMENT_BYTES

STAGES = (0, 1, 2, 3)

# DeepSpeed's defaults of the keys that cost memory, in elements.
REDUCE_BUCKET = 5e8
PREFETCH_BUCKET = 5e7
MAX_LIVE = 1e9
MAX_REUSE_DISTANCE = 1e9

MASTER_BYTES = 4
MOMENTS_BYTES = 8
DTYPE_BYTES = {"fp32": 4, "float32": 4, "fp16": 2, "float16": 2, "bf16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on one GPU at the end of the forward pass, by part."""

    weights: float
    gradients: float
    # Master weights and moments.
    optimizer: float
    # Communication buckets and, at stage 3, gathered weights.
    buffers: float
    activations: float
    # Bytes that this rank keeps in host memory or on NVMe instead.
    host: float = 0.0
    # The part of `host` in page-locked memory, where the JSON leaves `pin_memory` at its default.
    pinned: float = 0.0

    @property
    def state(self) -> float:
        """All but activations: what the micro-batch does not change."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    @property
    def total(self) -> float:
        return self.state + self.activations


def zero_stage(ds_config: dict) -> int:
    """The stage a DeepSpeed JSON asks for."""
    return ds_config.get("zero_optimization", {}).get("stage", 0)


def gpu_memory(
    num_parameters: int, *, stage: int, world_size: int, precision: str, ds_config: dict, activations: float = 0.0
) -> GpuMemory:
    """Bytes of one rank.

    Args:
        num_parameters: trained parameters of the whole model.
        stage: ZeRO stage, 0..3; overrides the one in `ds_config`, from which buckets, offload and the type of summed
            gradients come.
        world_size: ranks that share the partitions.
        precision: "bf16", "fp16" or "fp32".
        activations: bytes of one micro-batch.
    """
    assert stage in STAGES and world_size >= 1, (stage, world_size)
    zero = ds_config.get("zero_optimization", {})
    element, summed, part = ELEMENT_BYTES[precision], gradient_bytes(ds_config, precision), num_parameters / world_size
    offloaded_state = stage >= 1 and offloads(zero, "offload_optimizer")
    offloaded_weights = stage == 3 and offloads(zero, "offload_param")
    summed_apart = precision == "bf16" and summed == 4 and stage == 1 and not offloaded_state

    weights = part * element if stage == 3 else num_parameters * element
    optimizer: float = optimizer_bytes(stage, precision) * (part if stage else num_parameters)
    gradients: float
    if stage <= 1:
        gradients = num_parameters * (element + summed if summed_apart else summed if stage else element)
    else:
        gradients = part * summed
    host = pinned = 0.0
    if offloaded_state:
        sums_on_host = stage == 3 or (stage == 2 and summed == element)
        keeps_sums = sums_on_host and (stage == 3 or ds_config.get("gradient_accumulation_steps") != 1)
        # Offloading moves the gradient to step with, the sums of gradients, and the weights on their way back.
        moved = part * (MASTER_BYTES + summed * keeps_sums + (0 if stage == 3 else element))
        host, pinned, optimizer = optimizer + moved, moved + (0 if stage == 3 else part * MASTER_BYTES), 0.0
        gradients = 0.0 if sums_on_host else gradients
    if offloaded_weights:
        host, pinned, weights = host + weights, pinned + weights, 0.0
    gathered = _gathered_elements(num_parameters, zero) * element if stage == 3 and world_size > 1 else 0.0
    bucket = 0.0
    if stage and not summed_apart:
        elements = zero_number(zero, "reduce_bucket_size", REDUCE_BUCKET)
        bucket = elements * _bucket_element_bytes(ds_config, stage, element, summed)
    return GpuMemory(weights, gradients, optimizer, bucket + gathered, activations, host, pinned)


def optimizer_bytes(stage: int, precision: str) -> int:
    """Bytes a parameter of AdamW's moments and, where the weights are not their own master copy, of the master copy."""
    return MOMENTS_BYTES if precision == "fp32" and stage == 0 else MOMENTS_BYTES + MASTER_BYTES


def gradient_bytes(ds_config: dict, precision: str) -> int:
    """Bytes of one element of the summed gradient: `data_types.grad_accum_dtype`, by default the weights' type."""
    asked = ds_config.get("data_types", {}).get("grad_accum_dtype")
    return DTYPE_BYTES.get(str(asked), ELEMENT_BYTES[precision])


def checkpoint_bytes(num_parameters: int, *, stage: int, precision: str, average: bool = False) -> int:
    """Bytes on disk of one training checkpoint, over all ranks.

    Weights, optimiser state and, where training keeps one, the moving average of the weights; at stage 3 the master
    copy stands for the weights, which DeepSpeed then leaves out.
    """
    weights = 0 if stage == 3 else ELEMENT_BYTES[precision]
    return num_parameters * (weights + optimizer_bytes(stage, precision) + (MASTER_BYTES if average else 0))


def offload_device(zero: dict, key: str) -> str:
    """Where `offload_optimizer` or `offload_param` puts what it takes off the GPU: none, cpu or nvme."""
    block = zero.get(key)
    return block.get("device", "none") if isinstance(block, dict) else "none"


def offloads(zero: dict, key: str) -> bool:
    """Whether `offload_optimizer` or `offload_param` moves anything."""
    return offload_device(zero, key) != "none"


def _bucket_element_bytes(ds_config: dict, stage: int, element: int, summed: int) -> int:
    """Bytes an element of the bucket that gradients are copied into, or of both where it is doubled."""
    if stage == 3:
        return DTYPE_BYTES.get(str(ds_config.get("communication_data_type")), element)
    doubled = ds_config.get("zero_optimization", {}).get("overlap_comm")
    return (summed if stage == 1 else element) * (2 if doubled else 1)


def _gathered_elements(num_parameters: int, zero: dict) -> float:
    """Weights present at most: those that stay for their backward pass, or those that prefetches have run ahead for."""
    prefetch = zero_number(zero, "stage3_prefetch_bucket_size", PREFETCH_BUCKET)
    ahead = zero_number(zero, "stage3_max_live_parameters", MAX_LIVE) if prefetch else 0
    reused = zero_number(zero, "stage3_max_reuse_distance", MAX_REUSE_DISTANCE)
    return min(num_parameters, max(ahead, reused) + prefetch)


def zero_number(zero: dict, key: str, default: float) -> float:
    """A number under `zero_optimization`, or DeepSpeed's default."""
    value = zero.get(key)
    # "auto", or what DeepSpeed itself will refuse
    return value if isinstance(value, (int, float)) else default


def ema_bytes(num_parameters: int, *, stage: int, world_size: int) -> float:
    """Bytes a rank of a moving average of the weights in 32 bits: of its part of them; without ZeRO, of all.

    It lies where the optimiser's state does.
    """
    return MASTER_BYTES * num_parameters / (world_size if stage else 1)


def saved_bytes(
    num_parameters: int, *, stage: int, world_size: int, precision: str, first_rank: bool, average: bool = False
) -> float:
    """Bytes of one rank's part of a checkpoint, which a save in flight keeps in host memory, and every save after it.

    Args:
        first_rank: rank 0, which alone writes the weights, and without ZeRO all else too.
        average: the run keeps a moving average of the weights.
    """
    if stage == 0 and not first_rank:
        return 0.0
    weights = 0 if stage == 3 or not first_rank else ELEMENT_BYTES[precision] * num_parameters
    state = optimizer_bytes(stage, precision) + (MASTER_BYTES if average else 0)
    return weights + state * num_parameters / (world_size if stage else 1)


def host_bytes_per_node(
    state: GpuMemory,
    num_parameters: int,
    *,
    stage: int,
    world_size: int,
    ranks_per_node: int,
    precision: str,
    average: bool = False,
) -> float:
    """Bytes on the host of the node of rank 0: what its ranks have offloaded, and the copies that a save in flight
    writes from.

    Page-locked memory of offloading comes in powers of two (torch's allocator for it), that of saves as it is asked
    for (runtime/checkpoint/pinned.py).

    Args:
        state: `gpu_memory` of a rank.  average: as `saved_bytes`.
    """
    part = num_parameters / world_size if stage else 0.0
    rounded = 2 ** ceil(log2(part)) / part if part else 1.0
    offloaded = state.host + (rounded - 1) * state.pinned
    moved_average = ema_bytes(num_parameters, stage=stage, world_size=world_size) if average and state.host else 0.0
    sizes: dict[str, Any] = dict(stage=stage, world_size=world_size, precision=precision, average=average)
    first, other = (saved_bytes(num_parameters, first_rank=first_rank, **sizes) for first_rank in (True, False))
    # Rank 0 alone writes the weights.
    return ranks_per_node * (offloaded + moved_average + other) + first - other
