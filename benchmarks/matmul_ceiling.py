"""How fast this device multiplies large matrices: what a training step is measured against, beside the number on the
data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
SIDES = {"cuda": (4096, 8192, 16384), "cpu": (512, 1024, 2048)}
STRETCHES, STRETCH_S = 5, {"cuda": 0.05, "cpu": 0.1}


def matmul_ceiling(
    dtype: torch.dtype,
    device: torch.device,
    sides: tuple[int, ...] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP a second of the best of several stretches of products of two square matrices, of the best of several sizes.

    Values are drawn: a card that multiplies zeros runs cooler, and faster, than one that trains.

    Args:
        sides: of the matrices; () for the device's own.
        clock: seconds; on a CPU with one thread its own time tells more where others use the cores too.
    """
    best = 0.0
    for side in sides or SIDES[device.type]:
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(left)
        seconds_of(left, right, out, 2, clock)
        products = max(1, round(STRETCH_S[device.type] / seconds_of(left, right, out, 1, clock)))
        quickest = min(seconds_of(left, right, out, products, clock) for _ in range(STRETCHES))
        best = max(best, 2 * side**3 * products / quickest)
    return best


def seconds_of(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, products: int, clock: Callable) -> float:
    wait = torch.cuda.synchronize if left.device.type == "cuda" else lambda: None
    wait()
    begun = clock()
    for _ in range(products):
        torch.mm(left, right, out=out)
    wait()
    return clock() - begun


def data_sheet_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """FLOP a second that the maker states for 16-bit products.

    None for another dtype or a device that the planner's catalogue does not know.
    """
    from peco_ds.planner.hardware import hardware_of_device

    hardware = hardware_of_device(device_name)
    return hardware.peak_flops[PRECISIONS[dtype]] if hardware and dtype in PRECISIONS else None
