"""What fits: how GPUs divide a global batch, and how the memory of one is divided."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from peco_ds.deepspeed_json import DS_CONFIGS, merge_deepspeed, read_deepspeed_json
from peco_ds.durations import micro_batches
from peco_ds.errors import UserError
from peco_ds.planner.hardware import GIB, Hardware
from peco_ds.planner.memory import GpuMemory, gpu_memory, offload_device, zero_stage
from peco_ds.planner.stages import Stage

# CUDA context, communicators, cuBLAS workspaces (assumed).
RESERVED_BYTES = 1.5 * GIB
# Share of a GPU's memory that no micro-batch is to fill (assumed).
KEPT_FREE = 0.05
# Bytes that the caching allocator takes for a byte of activations (assumed).
FRAGMENTATION = 1.08
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
    def path(self) -> str:
        """The JSON as a command line names it."""
        return f"ds_configs/{self.name}" if self in shipped() else self.name

    @property
    def offloads(self) -> bool:
        return any(self.offload_device(what) != "none" for what in ("optimizer", "param"))

    def offload_device(self, what: Literal["optimizer", "param"]) -> str:
        """Where optimiser or weights are kept: none (the GPU), cpu or nvme.

        Weights leave the GPU at stage 3 alone, the optimiser's state from stage 1 on.
        """
        asked = offload_device(self.raw.get("zero_optimization", {}), f"offload_{what}")
        return asked if self.stage >= (1 if what == "optimizer" else 3) else "none"


@lru_cache(maxsize=1)
def shipped() -> tuple[DeepSpeedChoice, ...]:
    """The JSONs of ds_configs, by stage; what is offloaded last."""
    found = [DeepSpeedChoice(path.name, read_deepspeed_json(path)) for path in sorted(DS_CONFIGS.glob("*.json"))]
    if not found:
        raise UserError(
            f"{DS_CONFIGS}: no DeepSpeed JSON; run from the repository, or install it with pip install -e ."
        )
    return tuple(sorted(found, key=lambda choice: (choice.offloads, choice.stage)))


@dataclass(frozen=True)
class Room:
    """How the memory of a GPU is divided."""

    # Everything but activations.
    state: GpuMemory
    # Frozen networks, codebooks and moving average, which ZeRO does not divide.
    fixed_bytes: float
    # Activations, with the allocator's loss.
    bytes_per_image: float
    # Memory of the GPU without what is reserved or kept free.
    available_bytes: float

    @property
    def largest_micro_batch(self) -> int:
        """Images of a pass that fit; 0 or less: not even the state does."""
        return int((self.available_bytes - self.state.state - self.fixed_bytes) // self.bytes_per_image)

    def used_bytes(self, micro_batch: int) -> float:
        """Bytes used on one GPU, with what is reserved."""
        return RESERVED_BYTES + self.state.state + self.fixed_bytes + micro_batch * self.bytes_per_image


def check_gpus(gpus: int, hardware: Hardware, stage: Stage) -> None:
    """Check a number of GPUs.

    Raises: UserError if there are none, too many, no whole nodes of them, or they do not divide the stage's global
        batch; it names the nearest counts that would do.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: at least 1")
    if gpus > MOST_GPUS:
        raise UserError(
            f"--gpus {gpus}: plans go up to {MOST_GPUS}, beyond which nothing here was compared with "
            f"anything; give at most {MOST_GPUS}"
        )
    node = hardware.gpus_per_node
    if gpus > node and gpus % node:
        raise UserError(
            f"--gpus {gpus}: {hardware.name} stands in nodes of {node}, and {gpus} are {gpus / node:.2f} "
            f"nodes; use {nearest_counts(stage, gpus, hardware)}, or a YAML of your own with gpus_per_node"
        )
    require_divides(stage, gpus, hardware)


def nearest_counts(stage: Stage, gpus: int, hardware: Hardware) -> str:
    """The GPU counts next to `gpus`, below and above, that are whole nodes and divide the stage's batch, in words."""
    usable = _usable_counts(stage, hardware)
    below, above = [count for count in usable if count < gpus], [count for count in usable if count > gpus]
    return " or ".join(str(count) for count in below[-1:] + above[:1])


def _usable_counts(stage: Stage, hardware: Hardware) -> list[int]:
    """GPUs of one node or of whole nodes that divide the stage's batch, fewest first."""
    node = hardware.gpus_per_node
    counts = [*range(1, node), *range(node, MOST_GPUS + 1, node)]
    return [count for count in counts if not stage.trains or shares(stage, count)]


def shares(stage: Stage, gpus: int) -> list[int]:
    """Micro-batches that divide each GPU's part of the global batch, smallest first.

    [] if the GPUs do not divide it.
    """
    return micro_batches(stage.run, gpus, pairs=stage.mixes)


def gpus_that_divide(stage: Stage, gpus: int, hardware: Hardware) -> int:
    """The most GPUs up to `gpus` that divide the stage's global batch: all of them, as a rule."""
    if not stage.trains:
        return gpus
    usable = [count for count in _usable_counts(stage, hardware) if count <= gpus]
    # One GPU divides every batch, unless its images are mixed in pairs.
    if not usable:
        raise UserError(
            f"{stage.name}: run.global_batch {stage.run.global_batch} is odd, and mixup pairs the images of a pass; "
            "make it even, or set augment.mixup=0 augment.cutmix=0"
        )
    return usable[-1]


def require_divides(stage: Stage, gpus: int, hardware: Hardware) -> None:
    """Check that the GPUs divide the global batch. Raises: UserError naming what would divide."""
    if stage.trains and not shares(stage, gpus):
        batch = stage.run.global_batch
        # This call refuses a batch that no count of GPUs divides.
        gpus_that_divide(stage, gpus, hardware)
        reason = (
            f"run.global_batch {batch} is not a multiple of it"
            if batch % gpus
            else f"run.global_batch {batch} leaves an odd {batch // gpus} images a GPU, and mixup pairs them"
        )
        raise UserError(
            f"--gpus {gpus}: {stage.name}: {reason}; use {nearest_counts(stage, gpus, hardware)}, or "
            "change run.global_batch"
        )


def require_known(choice: DeepSpeedChoice) -> None:
    """Check that a plan has rates for the JSON. Raises: UserError for what it has none of."""
    for what in ("optimizer", "param"):
        if choice.offload_device(what) not in ("none", "cpu"):
            raise UserError(
                f"{choice.name}: zero_optimization.offload_{what}.device {choice.offload_device(what)!r}: a "
                "plan knows offload to the host alone; set it to cpu, or take the block out"
            )


def room(stage: Stage, hardware: Hardware, gpus: int, choice: DeepSpeedChoice) -> Room:
    """How a GPU's memory is divided, whether or not it suffices."""
    available = (1 - KEPT_FREE) * hardware.memory_bytes - RESERVED_BYTES
    a_image = FRAGMENTATION * stage.activation_bytes
    if not stage.trains:
        return Room(GpuMemory(0.0, 0.0, 0.0, 0.0, 0.0), stage.fixed_bytes, a_image, available)
    state = gpu_memory(
        stage.parameters,
        stage=choice.stage,
        world_size=gpus,
        precision=stage.run.precision,
        ds_config=merged(stage, choice),
    )
    fixed = stage.fixed_bytes
    # The moving average lies where the optimiser's state does.
    if choice.offload_device("optimizer") == "none":
        fixed += stage.average_bytes(stage=choice.stage, world_size=gpus)
    return Room(state, fixed, a_image, available)


def merged(stage: Stage, choice: DeepSpeedChoice) -> dict:
    """The JSON with what the recipe owns filled in. The batch, which a plan varies, is left to the recipe."""
    run = replace(stage.run, global_batch=stage.run.micro_batch)
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    raw = {key: value for key, value in choice.raw.items() if key not in batch}
    made = merge_deepspeed(raw, choice.name, run, stage.recipe.optim, world_size=1)
    return {key: value for key, value in made.items() if key not in batch}
