"""What a plan rests on, in words, with the values that the code uses and where each comes from."""

from __future__ import annotations

from collections.abc import Sequence

from peco_ds.planner import compute, data_side, estimate, fitting, goodput, step_cost
from peco_ds.planner.hardware import Hardware

_SHOWN = (
    "peak_flops",
    "product_share",
    "attention_share",
    "memory_bytes",
    "memory_bytes_s",
    "memory_share",
    "link_bytes_s",
    "network_bytes_s",
    "cores_per_node",
    "storage_bytes_s",
)


def assumption_lines(machines: Sequence[Hardware]) -> list[str]:
    """One line a value: name, value, source."""
    lines: dict[str, list[str]] = {}  # line -> machines it holds for
    for name in _SHOWN:
        for hardware in {machine.name: machine for machine in machines}.values():
            lines.setdefault(
                f"{name}: {_shown(getattr(hardware, name))}: {hardware.sources.get(name, 'your own file')}", []
            ).append(hardware.name)
    return [*(f"  {', '.join(names)} {line}" for line, names in lines.items()), *(f"  {text}" for text in _common())]


def _common() -> list[str]:
    rates, restarts = goodput.FAILURES_PER_1000_NODE_DAYS, goodput.RESTART_S
    return [
        f"reserved on each GPU: {fitting.RESERVED_BYTES / 2**30:g} GiB for context, communicators and "
        f"workspaces, and {fitting.FRAGMENTATION - 1:.0%} of activations lost in the allocator; "
        f"{fitting.KEPT_FREE:.0%} of its memory is kept free: assumed",
        f"links: {estimate.LINK_SHARE['slow']:g}, {estimate.LINK_SHARE['typical']:g}, "
        f"{estimate.LINK_SHARE['fast']:g} of the typical rate: assumed (neighbours on the same "
        "switches); latencies and shares of the collectives: NCCL's own tuner and published "
        "nccl-tests (planner/network.py)",
        f"stragglers: passes of a rank vary by {step_cost.NOISE:.1%} (standard deviation): assumed; "
        "GPUs of one model were measured to differ by 8 % (arXiv 2208.11035)",
        f"a collective takes {step_cost.CONTENTION:.0%} of the multiprocessors from what is computed "
        "beside it: 24 of an H100's 132 as users of NCCL report; assumed for all",
        f"failures of 1000 nodes a day: {rates[0]:g}, {rates[1]:g}, {rates[2]:g}: Meta's clusters "
        "(arXiv 2410.21680) and Llama 3 405B (arXiv 2407.21783); from a failure to the next step "
        f"{restarts[0] / 60:g}, {restarts[1] / 60:g}, {restarts[2] / 60:g} minutes: assumed",
        "a save halts the loop while the state is copied to the host at "
        f"{goodput.HOST_COPY_BYTES_S / 1e9:g} GB/s a GPU and {goodput.SAVE_CALL_S:g} s more, and is "
        f"complete {goodput.WRITE_CALL_S:g} s after the file system has taken it: assumed; it is "
        "written beside the steps",
        f"an offloaded optimiser: {compute.HOST_MEMORY_BYTES_S / 1e9:g} GB/s of a node's memory, "
        f"{compute.HOST_LINK_BYTES_S / 1e9:g} GB/s between a GPU and its host: assumed",
        f"loaders: decoding {1e9 * data_side.DECODE_S_A_PIXEL:.1f} ns a pixel and core, ImageNet's "
        f"mean image {data_side.SOURCE_PIXELS:,} pixels and {data_side.SOURCE_BYTES / 1e3:.0f} kB; "
        f"measured on one AMD EPYC core (benchmarks/data.py), {data_side.LOADER_PACE['slow']:g} and "
        f"{data_side.LOADER_PACE['fast']:g} times that at a slow and a fast pace: assumed; after the "
        "first epoch images are taken to come from the node's memory or disk",
        f"without checkpoint.every_minutes a save every {estimate.NO_INTERVAL_MINUTES:g} minutes; "
        f"tokenizing redoes {estimate.SHARD_S:g} s of work after an interruption: assumed",
        "not in the hours: the queue, packing the images, conversion; and nothing here was "
        "compared with a GPU of ours yet (benchmarks/plan_step.py does it)",
    ]


def _shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part / 1e12:g} TFLOP/s" for key, part in value.items())
    if isinstance(value, tuple):
        return ", ".join(f"{part:g}" for part in value)
    return f"{value / 1e9:,.4g}e9" if value >= 1e9 else f"{value:g}"
