"""How fast this device multiplies large matrices: what a training step is measured against, beside the number on the data sheet."""

from __future__ import annotations

import re
import time

import torch

# Dense, 16-bit, of one card, from NVIDIA's data sheets; the first pattern that the card's name holds. SXM unless the name says otherwise.
DATA_SHEET_FLOPS = (
    (r"H100 PCIe", 756e12),
    (r"H[12]00 NVL", 835e12),
    (r"GH200|H200|H100", 989e12),
    (r"A100", 312e12),
)
SIDES = {"cuda": (4096, 8192, 16384), "cpu": (512, 1024, 2048)}
STRETCHES, STRETCH_S = 5, {"cuda": 0.05, "cpu": 0.1}


def matmul_ceiling(dtype: torch.dtype, device: torch.device, sides: tuple[int, ...] = ()) -> float:
    """FLOP a second of the best of several stretches of products of two square matrices, of the best of several sizes. Values are drawn: a card that
    multiplies zeros runs cooler, and faster, than one that trains.

    Args:
        sides: of the matrices; () for the device's own.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = 0.0
    for side in sides or SIDES[device.type]:
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(left)

        def seconds(products: int) -> float:
            wait()
            begun = time.perf_counter()
            for _ in range(products):
                torch.mm(left, right, out=out)
            wait()
            return time.perf_counter() - begun

        seconds(2)
        products = max(1, round(STRETCH_S[device.type] / seconds(1)))
        best = max([best, *(2 * side**3 * products / seconds(products) for _ in range(STRETCHES))])
    return best


def data_sheet_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """FLOP a second that the maker states for 16-bit products; None for a device or a dtype that is not known here."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    return next((flops for pattern, flops in DATA_SHEET_FLOPS if re.search(pattern, device_name)), None)
