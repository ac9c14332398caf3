"""Where the time of a training step goes: device kernels by kind on a GPU, operators by kind on a CPU, and which
attention kernels ran.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.record import markdown_table

# A name belongs to the first kind whose pattern it holds. Products of the token head are products like the others: no
# name tells them apart.
_ATTENTION = r"attention|fmha|flash|sdpa"
KINDS = (
    ("attention, backward", rf"^(?=.*({_ATTENTION}))(?=.*(backward|bwd|cutlassB|dgrad|dq_dk))"),
    ("attention, forward", _ATTENTION),
    ("communication", r"nccl|gloo|c10d|all_?gather|reduce_?scatter|all_?reduce"),
    ("optimiser", r"adam|multi_tensor|foreach"),
    ("matrix products", r"gemm|gemv|nvjet|xmma|cutlass|cublas|splitk|aten::(add|b|badd)?mm\b|mkldnn|onednn|conv"),
    ("softmax and loss over the codes", r"softmax|nll|cross_entropy|argmax"),
    ("copies and fills", r"memcpy|memset|copy_|aten::(fill_|zero_|empty|resize_|new_)|FillFunctor"),
    (
        "norms, elementwise, sums, gathers",
        r"triton_|cpp_fused|elementwise|layer_?norm|reduce|gelu|index|gather|scatter|embedding|aten::|CatArray"
        r"|vectorized|Compiled",
    ),
    ("other", ""),
)
_ATTENTION_NAMES = re.compile(r"attention|fmha|flash_|sdpa", re.IGNORECASE)


class Stretch(NamedTuple):
    """Something that ran, times in microseconds."""

    name: str
    start: float
    end: float


def profile_step(step: Callable[[], object], *, steps: int) -> str:
    """Markdown: a table of shares, and the attention operators and kernels that ran."""
    on_gpu, activity, device = torch.cuda.is_available(), torch.profiler.ProfilerActivity, torch.autograd.DeviceType
    step()
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if on_gpu else [])]) as profile:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    events = profile.events()
    operators = [event for event in events if event.device_type == device.CPU]
    kernels = [
        Stretch(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == device.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    if on_gpu:
        shares, total = shares_of_kernels(kernels)
        of = "of the time from the first kernel to the last, on the device"
    else:
        shares, total = shares_of_operators([(event.name, event.self_cpu_time_total) for event in operators])
        of = (
            "of operators' own time, on all threads that start them; attention that is made of products "
            "and softmax counts as those"
        )
    rows = [(kind, f"{time / total:.1%}", f"{time / 1000 / steps:.2f}") for kind, time in shares.items() if time]
    ran = Counter(
        event.name
        for event in [*operators, *kernels]
        if _ATTENTION_NAMES.search(event.name) and not event.name.startswith("autograd::")
    )
    named = "\n".join(f"- `{shortened(name)}` x {count / steps:g}" for name, count in sorted(ran.items()))
    about = (
        f"Shares {of}; {steps} steps under torch.profiler, which slows them. Attention that ran, and how often a step:"
    )
    return "\n\n".join([markdown_table(("part", "share", "ms a step"), rows), about, named or "- none by name"])


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def shares_of_kernels(kernels: list[Stretch]) -> tuple[dict[str, float], float]:
    """Microseconds by kind, with `idle` where no kernel ran, and from the first kernel's start to the last one's end.

    Kernels side by side count each.
    """
    times: dict[str, float] = defaultdict(float, {kind: 0.0 for kind, _ in KINDS})
    for kernel in kernels:
        times[kind_of(kernel.name)] += kernel.end - kernel.start
    busy, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        busy += max(0.0, kernel.end - max(until, kernel.start))
        until = max(until, kernel.end)
    total = until - min(kernel.start for kernel in kernels)
    return dict(times) | {"idle": total - busy}, total


def shares_of_operators(operators: list[tuple[str, float]]) -> tuple[dict[str, float], float]:
    """Microseconds by kind, and of all."""
    times: dict[str, float] = defaultdict(float, {kind: 0.0 for kind, _ in KINDS})
    for name, own in operators:
        times[kind_of(name)] += own
    return dict(times), sum(times.values())


def shortened(name: str) -> str:
    """A kernel's name without the arguments of its template."""
    return name if len(name) <= 100 else f"{name[:97]}..."
