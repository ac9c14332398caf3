"""How fast this device copies: within its memory, and between it and the host."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
COPIES = 10


def copy_bytes_s(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes read and written in a second by a long copy within the device, the best of several."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    return 2 * COPY_BYTES[device.type] / seconds_of_copy(source, torch.empty_like(source), clock)


def host_copies(device: torch.device) -> dict[str, float]:
    """Bytes a second between host and device, the best of several; nothing where they are one."""
    if device.type == "cpu":
        return {}
    there = torch.randn(COPY_BYTES["cpu"] // 4, device=device)
    here = there.cpu()
    pinned, size = here.pin_memory(), COPY_BYTES["cpu"]
    return {
        "pinned host memory to device": size / seconds_of_copy(pinned, there),
        "device to pinned host memory": size / seconds_of_copy(there, pinned),
        "host memory to device": size / seconds_of_copy(here, there),
        "device to host memory": size / seconds_of_copy(there, here),
    }


def seconds_of_copy(
    source: torch.Tensor, target: torch.Tensor, clock: Callable[[], float] = time.perf_counter
) -> float:
    wait = torch.cuda.synchronize if "cuda" in (source.device.type, target.device.type) else lambda: None
    best = float("inf")
    for _ in range(COPIES):
        wait()
        begun = clock()
        target.copy_(source)
        wait()
        best = min(best, clock() - begun)
    return best
