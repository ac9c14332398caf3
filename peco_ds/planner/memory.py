"""Bytes a GPU under ZeRO stages 0 to 3.

The paper's formula (ZeRO, arXiv 1910.02054): 16-bit weights and gradients, 2 B a parameter each, and 12 B of optimiser state (32-bit
master weights and two Adam moments); stage 1 divides the state by the ranks, stage 2 the gradients too, stage 3 the weights
too. DeepSpeed 0.19.8 keeps more, as a census of the tensors it holds after a backward pass shows (test_planner.py repeats it):

  stage 1, bf16, gradients summed in 32 bits   32-bit gradients whole on every rank beside the 16-bit ones: 2 + 2 + 4 B, not 2 + 2
  stage 1 to 3, fp32                           a master copy beside the weights: state is 12 B, not 8; stage 0 has none
  stage 1 and 2                                a flat bucket of `reduce_bucket_size` elements (not in the first case), two if it overlaps
  stage 3                                      one such bucket; weights gathered in the forward pass stay for the backward pass as far
                                               as `stage3_max_live_parameters` and `stage3_max_reuse_distance` allow: by default all of them

Stage 0 sums gradients in the weights' own type: DeepSpeed refuses any other there. What is offloaded follows DeepSpeed's
documentation and was not measured, nor was fp16. Left out: what lives during the optimiser's step alone, when no activation does,
the CUDA context and the communicator (about 1 GiB together), and the padding of partitions.
"""

from __future__ import annotations

from dataclasses import dataclass

from peco_ds.planner.shapes import ELEMENT_BYTES

STAGES = (0, 1, 2, 3)

# DeepSpeed's defaults of the keys that cost memory, in elements.
REDUCE_BUCKET = 5e8
PREFETCH_BUCKET = 5e7
MAX_LIVE = 1e9
MAX_REUSE_DISTANCE = 1e9

MASTER_BYTES = 4
MOMENTS_BYTES = 8
_DTYPE_BYTES = {"fp32": 4, "float32": 4, "fp16": 2, "float16": 2, "bf16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on one GPU at the end of the forward pass, by part."""

    weights: float
    gradients: float
    optimizer: float  # master weights and moments
    buffers: float  # communication buckets and, at stage 3, gathered weights
    activations: float
    host: float = 0.0  # what this rank keeps in host memory or on NVMe instead

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


def gpu_memory(num_parameters: int, *, stage: int, world_size: int, precision: str, ds_config: dict, activations: float = 0.0) -> GpuMemory:
    """Bytes of one rank.

    Args:
        num_parameters: trained parameters of the whole model.
        stage: ZeRO stage, 0..3; overrides the one in `ds_config`, from which buckets, offload and the type of summed gradients come.
        world_size: ranks that share the partitions.
        precision: "bf16", "fp16" or "fp32".
        activations: bytes of one micro-batch.
    """
    assert stage in STAGES and world_size >= 1, (stage, world_size)
    zero = ds_config.get("zero_optimization", {})
    element = ELEMENT_BYTES[precision]
    summed = gradient_bytes(ds_config, precision)
    offloaded_state = stage >= 1 and _offloaded(zero, "offload_optimizer")
    offloaded_weights = stage == 3 and _offloaded(zero, "offload_param")

    weights = num_parameters * element / (world_size if stage == 3 else 1)
    if stage == 0:
        gradients = num_parameters * element
        optimizer = num_parameters * optimizer_bytes(stage, precision)
    else:
        optimizer = num_parameters * optimizer_bytes(stage, precision) / world_size
        if stage == 1:
            gradients = num_parameters * (element if summed == element or offloaded_state else element + summed)
        else:
            gradients = num_parameters * summed / world_size
    buffers = _buffer_bytes(num_parameters, zero, stage=stage, element=element, summed=summed, offloaded_state=offloaded_state, ds_config=ds_config)

    host = 0.0
    if offloaded_state:
        host, optimizer = host + optimizer, 0.0
        if stage >= 2:  # the partition's gradients are summed where the optimiser steps
            host, gradients = host + gradients, 0.0
    if offloaded_weights:
        host, weights = host + weights, 0.0
    return GpuMemory(weights, gradients, optimizer, buffers, activations, host)


def optimizer_bytes(stage: int, precision: str) -> int:
    """Bytes a parameter of AdamW's moments and, where the weights are not their own master copy, of the master copy."""
    return MOMENTS_BYTES if precision == "fp32" and stage == 0 else MOMENTS_BYTES + MASTER_BYTES


def gradient_bytes(ds_config: dict, precision: str) -> int:
    """Bytes of one element of the summed gradient: `data_types.grad_accum_dtype`, by default the weights' type."""
    return _DTYPE_BYTES.get(ds_config.get("data_types", {}).get("grad_accum_dtype"), ELEMENT_BYTES[precision])


def checkpoint_bytes(num_parameters: int, *, stage: int, precision: str) -> int:
    """Bytes on disk of one training checkpoint, over all ranks.

    Weights and optimiser state; at stage 3 the master copy stands for the weights, which DeepSpeed then leaves out.
    """
    weights = 0 if stage == 3 else ELEMENT_BYTES[precision]
    return num_parameters * (weights + optimizer_bytes(stage, precision))


def _offloaded(zero: dict, key: str) -> bool:
    block = zero.get(key)
    return isinstance(block, dict) and block.get("device", "none") != "none"


def _buffer_bytes(num_parameters: int, zero: dict, *, stage: int, element: int, summed: int, offloaded_state: bool, ds_config: dict) -> float:
    bucket = _number(zero, "reduce_bucket_size", REDUCE_BUCKET)
    if stage == 0 or (stage == 1 and summed != element and not offloaded_state):
        return 0.0
    if stage < 3:
        return bucket * element * (2 if zero.get("overlap_comm") else 1)
    communicated = _DTYPE_BYTES.get(ds_config.get("communication_data_type"), element)
    kept = min(_number(zero, "stage3_max_live_parameters", MAX_LIVE), _number(zero, "stage3_max_reuse_distance", MAX_REUSE_DISTANCE))
    gathered = min(num_parameters, kept + _number(zero, "stage3_prefetch_bucket_size", PREFETCH_BUCKET))
    return bucket * communicated + gathered * element


def _number(zero: dict, key: str, default: float) -> float:
    value = zero.get(key)
    return value if isinstance(value, (int, float)) else default  # "auto", or what DeepSpeed itself will refuse
