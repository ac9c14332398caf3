"""A finished model's forward pass: its precision, and its speed without decoding or copies, kernels warm."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class ForwardSettings:
    """How a finished model is run."""

    precision: Literal["fp32", "bf16"]
    # Images of a forward pass, a rank.
    batch: int
    # Loader processes, a rank.
    num_workers: int

    def facts(self, world) -> dict:
        """What is recorded of it."""
        return {"precision": self.precision, "batch": self.batch, "ranks": world.size}


def in_precision(
    forward: Callable, precision: Literal["fp32", "bf16"], device: torch.device, *, gradients: bool = False
) -> Callable:
    """`forward` under autocast where bf16 is asked for.

    Args:
        gradients: False: none are kept, whatever the caller's mode.
    """

    def run_forward(images: torch.Tensor):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            return forward(images)

    return run_forward if gradients else torch.no_grad()(run_forward)


@torch.no_grad()
def forward_images_per_s(forward: Callable, images: torch.Tensor, *, seconds: float = 1.0, warm_up: int = 2) -> float:
    """Images a second of one rank.

    Args:
        images: [B, 3, S, S] on the device; the same batch again and again.
        seconds: the measured stretch is at least so long.
        warm_up: passes before anything is measured.
    """

    def measure(passes: int) -> float:
        begun = time.perf_counter()
        for _ in range(passes):
            forward(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - begun

    measure(warm_up)
    passes = 1
    # The number of passes doubles, so that nothing waits for the device between two passes.
    while (elapsed := measure(passes)) < seconds:
        passes *= 2
    return passes * len(images) / elapsed


def world_images_per_s(forward: Callable, batch: int, image_px: int, world) -> float:
    """Images a second over all ranks at once. Collective.

    Args:
        batch: images a forward pass, a rank.  world: the ranks (`runtime.distributed.World`).
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, image_px, image_px, generator=generator).clamp(-1, 1).to(world.device)
    world.barrier()
    own = forward_images_per_s(forward, images)
    return float(world.all_reduce(torch.tensor([own], dtype=torch.float64, device=world.device)))
