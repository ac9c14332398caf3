"""Seconds that a GPU computes for a segment: products at the share of the peak that they reach, what else is read and
written at the memory's pace.

A stream runs one kernel after another, so the times are added; a pass that is shorter than what the host needs to
launch its kernels takes that long.
"""

from __future__ import annotations

from dataclasses import dataclass

from peco_ds.errors import UserError
from peco_ds.planner.hardware import Hardware
from peco_ds.planner.work import Segment, Work

PACES = ("slow", "typical", "fast")

# Of what products reach. Assumed: a convolution of 128 to 512 channels is a product with a shared dimension of nine
# times that, but gathers its operand, and eager
# PyTorch keeps maps channels first, which cuDNN turns round; ResNet-50's published training rates on these cards are a
# quarter of their peak, with its norms.
CONVOLUTION_SHARE = {"slow": 0.45, "typical": 0.60, "fast": 0.80}
# In float32 attention's kernels and the products use the same units; assumed half of what products reach, for short
# rows.
FP32_ATTENTION_SHARE = 0.5
# Of a machine's memory_share. Assumed: the share is that of long copies; sums over the rows of a batch and kernels of
# odd widths reach less.
MEMORY_PACE = {"slow": 0.85, "typical": 1.0, "fast": 1.08}
# Seconds the host needs for one kernel. Assumed: a CUDA launch costs about 4 microseconds, an operator of eager PyTorch
# with autograd and an engine's hooks up to twice that.
LAUNCH_S = {"slow": 10e-6, "typical": 6e-6, "fast": 4e-6}
# AdamW with float32 moments and weights, fused: gradient, weight and both moments read (16), the last three written
# (12), the 16-bit copy (2); before it the gradient's norm and its scaling (12).
OPTIMIZER_BYTES = 42
# An offloaded optimiser. Assumed: the CPU's AdamW reaches half of the 600 GB/s of two sockets with eight channels of
# DDR5 each; pinned copies between a GPU and its host reach 25 GB/s, all of PCIe 4 and half of PCIe 5. A gradient of 4 B
# goes down, a weight of 2 comes back.
HOST_MEMORY_BYTES_S, HOST_LINK_BYTES_S, OFFLOADED_BYTES = 300e9, 25e9, 4 + 2


@dataclass(frozen=True)
class SegmentSeconds:
    """Of one micro-batch in one segment."""

    forward: float
    backward: float


def segment_seconds(
    segment: Segment, images: int, hardware: Hardware, precision: str, pace: str = "typical"
) -> SegmentSeconds:
    """Seconds of one micro-batch in one segment, forward and backward.

    Args:
        images: of the micro-batch.
        precision: of the run; a segment that computes in another one says so itself.
        pace: one of PACES.
    Raises: UserError if the machine has no peak in that precision.
    """
    assert pace in PACES, pace
    used = segment.precision or precision
    return SegmentSeconds(
        *(work_seconds(work, images, hardware, used, pace) for work in (segment.forward, segment.backward))
    )


def work_seconds(work: Work, images: int, hardware: Hardware, precision: str, pace: str = "typical") -> float:
    """Of one pass of `images`."""
    if precision not in hardware.peak_flops:
        raise UserError(f"{hardware.name} has no peak_flops in {precision}; known: {', '.join(hardware.peak_flops)}")
    place = PACES.index(pace)
    peak, share = hardware.peak_flops[precision], hardware.product_share[place]
    attention_share = FP32_ATTENTION_SHARE * share if precision == "fp32" else hardware.attention_share[place]
    computing = (
        (work.products - work.attention) / share
        + work.attention / attention_share
        + work.convolutions / (CONVOLUTION_SHARE[pace] * share)
    )
    moving = (work.moved_bytes * images + work.pass_bytes) / (
        hardware.memory_bytes_s * hardware.memory_share * MEMORY_PACE[pace]
    )
    return max(images * computing / peak + moving, work.kernels * LAUNCH_S[pace])


def optimizer_seconds(num_parameters: float, hardware: Hardware) -> float:
    """Seconds of the optimiser's own work on this rank's `num_parameters` of the parameters: it only reads and
    writes.
    """
    return num_parameters * OPTIMIZER_BYTES / (hardware.memory_bytes_s * hardware.memory_share)


def offloaded_optimizer_seconds(num_parameters: float, ranks_per_node: int) -> float:
    """The same where optimiser and moments lie on the host: its memory is shared by the ranks of a node."""
    return num_parameters * (
        OPTIMIZER_BYTES * ranks_per_node / HOST_MEMORY_BYTES_S + OFFLOADED_BYTES / HOST_LINK_BYTES_S
    )
