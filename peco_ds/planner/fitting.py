"""What fits: how GPUs divide a global batch, and how the memory of one is divided."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from peco_ds.config import DS_CONFIGS
from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
from peco_ds.errors import UserError
from peco_ds.planner.hardware import Hardware
from peco_ds.planner.memory import GpuMemory, gpu_memory, zero_stage
from peco_ds.planner.stages import Stage

GIB = 2**30
RESERVED_BYTES = 1.5 * GIB  # CUDA context, communicators, cuBLAS workspaces; assumed
FRAGMENTATION = 1.08  # of activations in the caching allocator; assumed
MOST_GPUS = 1024


@dataclass(frozen=True)
class DeepSpeedChoice:
    """A DeepSpeed JSON and the name it is shown by."""

    name: str
    raw: dict

    @property
    def stage(self) -> int:
        return zero_stage(self.raw)

    @property
    def offloads(self) -> bool:
        zero = self.raw.get("zero_optimization", {})
        return any((zero.get(key) or {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param"))


@lru_cache(maxsize=1)
def shipped() -> tuple[DeepSpeedChoice, ...]:
    """The JSONs of ds_configs, by stage; what is offloaded last."""
    found = [DeepSpeedChoice(path.name, read_deepspeed_json(path)) for path in sorted(DS_CONFIGS.glob("*.json"))]
    return tuple(sorted(found, key=lambda choice: (choice.offloads, choice.stage)))


@dataclass(frozen=True)
class Room:
    """How the memory of a GPU is divided."""

    state: GpuMemory  # without activations
    fixed_bytes: float  # beside ZeRO's state: frozen networks, codebooks, moving average
    a_picture_bytes: float  # activations, with the allocator's loss
    available_bytes: float  # of the GPU, without what is reserved

    @property
    def largest_micro_batch(self) -> int:
        """Pictures of a pass that fit; 0 or less: not even the state does."""
        return int((self.available_bytes - self.state.state - self.fixed_bytes) // self.a_picture_bytes)

    def used_bytes(self, micro_batch: int) -> float:
        """Of one GPU, with what is reserved."""
        return RESERVED_BYTES + self.state.state + self.fixed_bytes + micro_batch * self.a_picture_bytes


def check_gpus(gpus: int, hardware: Hardware) -> None:
    """Raises: UserError if there are none, too many, or no whole nodes of them."""
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: at least 1")
    if gpus > MOST_GPUS:
        raise UserError(f"--gpus {gpus}: plans go up to {MOST_GPUS}, beyond which nothing here was compared with anything; give at most {MOST_GPUS}")
    node = hardware.gpus_per_node
    if gpus > node and gpus % node:
        low = gpus // node * node
        raise UserError(f"--gpus {gpus}: {hardware.name} stands in nodes of {node}, and {gpus} are {gpus / node:.2f} nodes; use {low} or {low + node}, or a YAML of your own with gpus_per_node")


def shares(stage: Stage, gpus: int) -> list[int]:
    """Micro-batches that divide each GPU's part of the global batch, smallest first; [] if the GPUs do not divide it."""
    batch = stage.run.global_batch
    if batch % gpus:
        return []
    part = batch // gpus
    return [size for size in range(1, part + 1) if part % size == 0 and not (stage.mixes and size % 2)]


def gpus_that_divide(stage: Stage, gpus: int, hardware: Hardware) -> int:
    """The most GPUs up to `gpus` that divide the stage's global batch: all of them, as a rule."""
    if not stage.trains:
        return gpus
    whole = range(gpus, 0, -1) if gpus <= hardware.gpus_per_node else [*range(gpus - gpus % hardware.gpus_per_node, 0, -hardware.gpus_per_node), *range(hardware.gpus_per_node, 0, -1)]
    return next(count for count in whole if shares(stage, count))


def require_divides(stage: Stage, gpus: int, hardware: Hardware) -> None:
    """Raises: UserError naming what would divide."""
    if stage.trains and not shares(stage, gpus):
        batch, low = stage.run.global_batch, gpus_that_divide(stage, gpus, hardware)
        reason = f"run.global_batch {batch} is not a multiple of it" if batch % gpus else f"run.global_batch {batch} leaves an odd {batch // gpus} pictures a GPU, and mixup pairs them"
        raise UserError(f"--gpus {gpus}: {stage.name}: {reason}; use {low}, or change run.global_batch")


def room(stage: Stage, hardware: Hardware, gpus: int, choice: DeepSpeedChoice) -> Room:
    """How a GPU's memory is divided, whether or not it suffices."""
    available = hardware.memory_bytes - RESERVED_BYTES
    a_picture = FRAGMENTATION * stage.activation_bytes
    if not stage.trains:
        return Room(GpuMemory(0.0, 0.0, 0.0, 0.0, 0.0), stage.fixed_bytes, a_picture, available)
    state = gpu_memory(stage.parameters, stage=choice.stage, world_size=gpus, precision=stage.run.precision, ds_config=merged(stage, choice))
    average = 0.0 if state.host else stage.average_bytes(stage=choice.stage, world_size=gpus)  # it lies where the optimiser's state does
    fixed = stage.fixed_bytes + average
    return Room(state, fixed, a_picture, available)


def merged(stage: Stage, choice: DeepSpeedChoice) -> dict:
    """The JSON with what the recipe owns filled in. The batch, which a plan varies, is left to the recipe."""
    run, batch = replace(stage.run, global_batch=stage.run.micro_batch), ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    raw = {key: value for key, value in choice.raw.items() if key not in batch}
    return merge_deepspeed(raw, choice.name, run, stage.recipe.optim, world_size=1)
