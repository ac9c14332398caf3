"""Parts that need torch alone: attention, right and fast or not; the products of a step; copies.

Attention is held against float64, and each way of computing it is timed forward and backward. The products are those
of the blocks of ViT-H, L and B, each forward, for the input's gradient and for the weights'.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.copies import copy_bytes_s, host_copies
from benchmarks.gpu.parts import Part
from benchmarks.guards import reason
from benchmarks.record import markdown_table

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Largest difference from float64 over the largest value.
TOLERANCE = {"bf16": 2e-2, "fp16": 3e-3, "fp32": 1e-4}
CHECKED_IMAGES = 4
# Values of model.attention, and PyTorch's own with a bias for every image, as the peers call it.
PYTORCH = "PyTorch's"
FORMS = ("triton", "unfused", "efficient", PYTORCH)
STRETCHES = 3


@dataclass(frozen=True)
class AttentionShape:
    """Of a layer of a model; the batch is a micro-batch."""

    name: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    depth: int


ATTENTION = {
    False: (
        AttentionShape("H/14 at 224", 128, 257, 16, 80, 32),
        AttentionShape("H/14 at 448", 32, 1025, 16, 80, 32),
        AttentionShape("L/16 at 224", 256, 197, 16, 64, 24),
        AttentionShape("B/16 at 224", 512, 197, 12, 64, 12),
    ),
    True: (AttentionShape("H/14, small", 3, 17, 2, 80, 2), AttentionShape("L/16, small", 2, 10, 2, 64, 2)),
}
# Images, tokens, width by size; a block's layers as multiples of the width: in, out.
PRODUCTS = {
    False: {"H/14": (128, 257, 1280), "L/16": (256, 197, 1024), "B/16": (512, 197, 768)},
    True: {"H/14": (2, 17, 80), "L/16": (2, 10, 64), "B/16": (2, 10, 48)},
}
LAYERS = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}
DIRECTIONS = ("forward", "input gradient", "weight gradient")


def attention(part: Part) -> None:
    device, rows = part.device(), []
    for shape in ATTENTION[part.small]:
        # the training's own type first; the others where the shape is the first
        others = ("fp32", "fp16") if shape is ATTENTION[part.small][0] and device.type == "cuda" else ()
        for dtype in ("fp32" if device.type == "cpu" else "bf16", *others):
            for form in FORMS:
                rows.append(attention_row(shape, form, dtype, device, part.stretch_s))
                part.keep("", attention_table(rows), rows=rows)


def attention_row(shape: AttentionShape, form: str, dtype: str, device: torch.device, stretch_s: float) -> dict:
    """Figures of one way at one shape; a way that fails has its reason in the place of them."""
    row: dict = {"shape": shape.name, "form": form, "dtype": dtype}
    try:
        attend = attention_of(form)
        row["errors"] = errors = attention_errors(shape, attend, DTYPES[dtype], device)
        row["worst_error"], row["tolerance"] = max(errors.values()), TOLERANCE[dtype]
        row |= attention_times(shape, attend, DTYPES[dtype], device, stretch_s)
    except Exception as error:
        row["failure"] = reason(error)
    return row


def attention_of(form: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(qkv [B, T, 3, H, D], bias [H, T, T]) -> [B, T, H * D].

    Raises: NotImplementedError where this version of the package has no such form.
    """
    if form == PYTORCH:
        return pytorchs_attention
    from peco_ds.models.attention import attend

    if "form" in inspect.signature(attend).parameters:
        return partial(attend, form=form)
    if form != "efficient":
        raise NotImplementedError(f"{form} is not in this version")
    return attend


def pytorchs_attention(qkv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mask = bias.to(qkv.dtype).expand(len(qkv), -1, -1, -1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def in_float64(qkv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    weights = torch.softmax(query @ key.transpose(-1, -2) * qkv.shape[-1] ** -0.5 + bias, dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def drawn_inputs(shape: AttentionShape, batch: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """qkv and the output's gradient in the type, the bias in float32."""
    draw = torch.Generator(device=device).manual_seed(0)
    sizes = (batch, shape.tokens, 3, shape.heads, shape.head_dim), (shape.heads, shape.tokens, shape.tokens)
    qkv, bias = (torch.randn(size, generator=draw, device=device) for size in sizes)
    grad = torch.randn(batch, shape.tokens, shape.heads * shape.head_dim, generator=draw, device=device)
    return [qkv.to(dtype).requires_grad_(), bias.requires_grad_(), grad.to(dtype)]


def attention_errors(shape: AttentionShape, attend: Callable, dtype: torch.dtype, device: torch.device) -> dict:
    """Of the output and the four gradients, as TOLERANCE measures them."""
    qkv, bias, grad = drawn_inputs(shape, min(CHECKED_IMAGES, shape.batch), dtype, device)
    found = outputs_of(attend, qkv, bias, grad)
    expected = outputs_of(in_float64, *(one.detach().double() for one in (qkv, bias, grad)))
    names = ("output", "query's gradient", "key's gradient", "value's gradient", "bias's gradient")
    return {
        name: ((one.double() - other).abs().max() / other.abs().max()).item()
        for name, one, other in zip(names, found, expected)
    }


def outputs_of(attend: Callable, qkv: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients of query, key, value and bias."""
    out = attend(qkv.requires_grad_(), bias.requires_grad_())
    grad_qkv, grad_bias = torch.autograd.grad(out, (qkv, bias), grad)
    return [out.detach(), *grad_qkv.unbind(2), grad_bias]


def attention_times(
    shape: AttentionShape, attend: Callable, dtype: torch.dtype, device: torch.device, stretch_s: float
) -> dict:
    """Milliseconds an image through all layers, and whether two passes give the same bits."""
    qkv, bias, grad = drawn_inputs(shape, shape.batch, dtype, device)
    once, again = (outputs_of(attend, qkv, bias, grad) for _ in range(2))
    same = all(torch.equal(one, other) for one, other in zip(once, again))
    del once, again

    def both() -> None:
        torch.autograd.grad(attend(qkv, bias), (qkv, bias), grad)

    an_image = 1e3 * shape.depth / shape.batch
    return {
        "same_twice": same,
        "forward_ms": seconds_a_call(lambda: attend(qkv, bias), device, stretch_s) * an_image,
        "both_ms": seconds_a_call(both, device, stretch_s) * an_image,
    }


def attention_table(rows: list[dict]) -> str:
    heads = "shape | attention | type | worst error | of | same bits twice | forward, ms an image | and backward"
    cells = []
    for row in rows:
        asked = [row["shape"], row["form"], row["dtype"]]
        if "failure" in row:
            cells.append([*asked, row["failure"], *[""] * 4])
            continue
        worst = max(row["errors"], key=row["errors"].get)
        right = "" if row["worst_error"] <= row["tolerance"] else f" (WRONG: more than {row['tolerance']:g})"
        same, times = "yes" if row["same_twice"] else "no", (row["forward_ms"], row["both_ms"])
        cells.append([*asked, f"{row['worst_error']:.1e}{right}", worst, same, *(f"{one:.3g}" for one in times)])
    about = (
        "Error: largest difference from float64 over the largest value. Times: all layers of the model, bias "
        "gradient summed over the images."
    )
    return f"{markdown_table(heads.split(' | '), cells)}\n\n{about}"


def products(part: Part) -> None:
    device, rows, overall = part.device(), [], {}
    dtype = torch.float32 if part.small else torch.bfloat16
    sheet = sheet_flops(device, dtype)
    for size, (images, tokens, width) in PRODUCTS[part.small].items():
        flops, seconds = 0, 0.0
        for layer, (inner, outer) in LAYERS.items():
            shape = images * tokens, inner * width, outer * width
            found = product_seconds(*shape, dtype, device, part.stretch_s)
            flops_once = 2 * shape[0] * shape[1] * shape[2]
            rows.append({"size": size, "layer": layer, "shape": shape})
            rows[-1] |= {direction: flops_once / one / 1e12 for direction, one in zip(DIRECTIONS, found)}
            flops, seconds = flops + 3 * flops_once, seconds + sum(found)
            part.keep("", products_table(rows, overall, sheet), rows=rows, overall_tflops=overall)
        overall[size] = flops / seconds / 1e12
        part.keep("", products_table(rows, overall, sheet), rows=rows, overall_tflops=overall)


def product_seconds(
    rows: int, inner: int, outer: int, dtype: torch.dtype, device: torch.device, stretch_s: float
) -> list[float]:
    """Seconds of x w^T, of dy w and of dy^T x."""
    x, w, dy = (torch.randn(size, device=device).to(dtype) for size in ((rows, inner), (outer, inner), (rows, outer)))
    calls = (lambda: x @ w.t(), lambda: dy @ w, lambda: dy.t() @ x)
    return [seconds_a_call(call, device, stretch_s) for call in calls]


def sheet_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP a second of the data sheet; None where it is not known, or packages that its catalogue needs are missing."""
    try:
        from benchmarks.matmul_ceiling import data_sheet_flops

        return data_sheet_flops(torch.cuda.get_device_name(), dtype) if device.type == "cuda" else None
    except ImportError:
        return None


def products_table(rows: list[dict], overall: dict[str, float], sheet: float | None) -> str:
    cells = [
        [row["size"], row["layer"], " x ".join(map(str, row["shape"])), *(f"{row[one]:.3g}" for one in DIRECTIONS)]
        for row in rows
    ]
    heads = ["size", "layer", "rows x in x out", *(f"{direction}, TFLOP/s" for direction in DIRECTIONS)]
    share = {size: f" ({rate * 1e12 / sheet:.0%} of the data sheet)" if sheet else "" for size, rate in overall.items()}
    lines = [f"- {size}, all together: {rate:.3g} TFLOP/s{share[size]}" for size, rate in overall.items()]
    return "\n\n".join([markdown_table(heads, cells), *(["\n".join(lines)] if lines else [])])


def copies(part: Part) -> None:
    device = part.device()
    rates = {"within the device, read and written": copy_bytes_s(device), **host_copies(device)}
    table = markdown_table(["copy", "GB/s"], [(name, f"{rate / 1e9:.4g}") for name, rate in rates.items()])
    part.keep("", table, bytes_s=rates)


def seconds_a_call(call: Callable[[], object], device: torch.device, stretch_s: float) -> float:
    """The best of several stretches of about so many seconds."""
    for _ in range(2):
        call()
    calls = max(1, round(stretch_s / stretch(call, 1, device)))
    return min(stretch(call, calls, device) for _ in range(STRETCHES)) / calls


def stretch(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds of so many calls."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return time.perf_counter() - begun
