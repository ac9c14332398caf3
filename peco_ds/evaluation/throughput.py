"""Images a second of a forward pass alone: no decoding, no copies, kernels warm."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


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
    # stretches double, so that nothing waits for the device between two passes of one
    while (elapsed := measure(passes)) < seconds:
        passes *= 2
    return passes * len(images) / elapsed
