"""The planner against the world: predicted beside published throughputs of vision transformers, with the error of each,
good or bad.

    python benchmarks/plan_world.py [--record FILE.md]

Pure arithmetic: nothing is run. Every row names where its figure was published, what the planner was told of it (model,
precision, how kernels ran, micro-batch), and whether a constant was set by it (calibration) or not (held out). `inside`
says whether the published figure lies between the planner's slow and fast pace.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from record import write_record

from peco_ds.command_line import Parser, run
from peco_ds.config import ModelSettings, TokenizerSettings, ViewSettings
from peco_ds.planner.step_cost import PACES, SegmentSeconds, optimizer_seconds, segment_seconds, work_seconds
from peco_ds.planner.hardware import Hardware, find_hardware
from peco_ds.planner.shapes import FLOPS_PER_MAC, IMAGE_CHANNELS
from peco_ds.planner.step_cost import StepInputs, closed_form
from peco_ds.planner.traffic import Collective
from peco_ds.planner.work import BlockShape, Kernels, Work, block_work, tokenizing_segments

IMAGENET = 1_281_167
# of the release of autumn 2021; with all classes it is 8 % more
IMAGENET_21K = 13_153_500
CODES = 8192
# in which gradients are summed; their size moves no row by a per cent
BUCKETS = 20


@dataclass(frozen=True)
class Vit:
    """A plain or a BEiT transformer as far as its cost goes."""

    model: ModelSettings
    bias: bool = False  # relative positions, a table a block
    tokens: int = 0  # in place of the image's own
    # numbers an image that the head gives, over all of its tokens
    head: int = 1000

    @property
    def num_tokens(self) -> int:
        return self.tokens or self.model.grid**2 + 1

    @property
    def parameters(self) -> int:
        width = self.model.width
        return (
            self.model.depth * (4 * width**2 + 2 * width * int(width * self.model.mlp_ratio))
            + IMAGE_CHANNELS * self.model.patch_px**2 * width
            + width * 1000
        )


@dataclass(frozen=True)
class Passes:
    """How a network's passes ran."""

    kernels: Kernels
    # the T x T weights in device memory, as before fused kernels
    stored_attention: bool = False
    trained: bool = True  # False: forward alone


def vit_passes(vit: Vit, how: Passes, element: int = 2) -> list[Work]:
    """Forward and backward, or forward alone, of one image."""
    model, tokens = vit.model, vit.num_tokens
    block = BlockShape(
        tokens,
        model.width,
        int(model.width * model.mlp_ratio),
        model.heads,
        element,
        how.kernels,
        scaled=bool(model.layer_scale),
        dropped=how.trained and model.drop_path > 0,
        bias="own" if vit.bias and not how.stored_attention else "none",
    )
    passes = list(block_work(block)[:2])
    if how.stored_attention:
        passes = [work + moves for work, moves in zip(passes, stored_attention(block, bias=vit.bias))]
    patches = FLOPS_PER_MAC * model.grid**2 * IMAGE_CHANNELS * model.patch_px**2 * model.width
    head = FLOPS_PER_MAC * model.width * vit.head
    row = tokens * model.width * element
    ends = [
        Work(products=head, convolutions=patches, moved_bytes=8 * row + 16 * vit.head, kernels=30),
        Work(products=2 * head, convolutions=patches, moved_bytes=12 * row + 24 * vit.head, kernels=40),
    ]
    return [work.times(model.depth) + end for work, end in zip(passes, ends)][: 2 if how.trained else 1]


def stored_attention(block: BlockShape, *, bias: bool) -> tuple[Work, Work]:
    """Moved by attention written as products, softmax and sums, forward and backward: query, key and value copied for
    the batched products, the query scaled, the output copied;
    of T x T values the scores, the bias's sum, softmax (under autocast in float32, with casts), and the same way back,
    beside the gradients' copy that every block makes.
    """
    E, row, square = block.element, block.tokens * block.width, block.scores
    if block.kernels == "autocast":
        forward, backward = 16 + 4 * E, 20 + 6 * E + (4 if bias else 0)
    else:
        forward, backward = (6 if bias else 4) * E, (8 if bias else 7) * E
    return (
        Work(moved_bytes=10 * E * row + forward * square, kernels=10),
        Work(moved_bytes=8 * E * row + backward * square, kernels=18),
    )


def sized(
    width: int,
    depth: int,
    heads: int,
    *,
    px: int = 224,
    patch: int = 16,
    scale: float = 0.0,
    drop: float = 0.0,
    mlp_ratio: float = 4.0,
) -> ModelSettings:
    return ModelSettings(
        image_px=px,
        patch_px=patch,
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio,
        layer_scale=scale,
        drop_path=drop,
    )


TINY, SMALL, BASE, LARGE, HUGE, GIANT = (
    (192, 12, 3),
    (384, 12, 6),
    (768, 12, 12),
    (1024, 24, 16),
    (1280, 32, 16),
    (1408, 40, 16),
)


@dataclass(frozen=True)
class Published:
    """A figure of the world."""

    what: str
    hardware: str
    images_s: float  # of a GPU
    networks: tuple[tuple[Vit, Passes], ...]
    micro_batch: int
    source: str
    precision: str = "fp16"
    calibration: bool = False
    # seconds of what else the pass does
    extra: Callable[[Hardware, str, int, str], float] | None = None
    gpus: int = 1  # over which gradients are summed
    group: str = ""

    def predicted(self, pace: str) -> float:
        """Images a second of a GPU."""
        hardware = find_hardware(self.hardware)
        passes = [
            [work_seconds(work, self.micro_batch, hardware, self.precision, pace) for work in vit_passes(vit, how)]
            for vit, how in self.networks
        ]
        trained = sum(vit.parameters for vit, how in self.networks if how.trained)
        forward = sum(found[0] for found in passes) + (
            self.extra(hardware, self.precision, self.micro_batch, pace) if self.extra else 0.0
        )
        backward = sum(sum(found[1:]) for found in passes)
        return self.micro_batch / step_seconds(
            forward, backward, optimizer_seconds(trained, hardware), trained, self.gpus, hardware
        )


def step_seconds(
    forward: float, backward: float, optimizer: float, parameters: int, gpus: int, hardware: Hardware
) -> float:
    """Of one step of data parallel training: 16-bit gradients summed bucket by bucket while the backward pass goes on,
    as PyTorch and Megatron do.
    """
    segments = (SegmentSeconds(forward / BUCKETS, backward / BUCKETS),) * BUCKETS
    sums = (
        tuple(
            Collective("all_reduce", 2.0 * parameters / BUCKETS, "backward", segment, 0, True)
            for segment in reversed(range(BUCKETS))
        )
        if gpus > 1 and parameters
        else ()
    )
    return closed_form(StepInputs(segments, sums, 1, optimizer, gpus, hardware)).seconds


TIMM_TRAIN = "timm, results/benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv"
TIMM_INFER = "timm, results of PyTorch 2.9.1"
AMP_2022, AMP, COMPILED = Passes("autocast", stored_attention=True), Passes("autocast"), Passes("compiled")


def timm_row(
    name: str, images_s: float, micro_batch: int, model: ModelSettings, *, bias: bool = False, calibration: bool = False
) -> Published:
    return Published(
        f"{name}, training",
        "rtx3090",
        images_s,
        ((Vit(model, bias=bias), AMP_2022),),
        micro_batch,
        TIMM_TRAIN,
        calibration=calibration,
        group="timm training, RTX 3090",
    )


def inference_row(
    name: str,
    hardware: str,
    images_s: float,
    model: ModelSettings,
    *,
    kernels: Kernels,
    bias: bool = False,
    precision: str = "fp16",
) -> Published:
    networks = ((Vit(model, bias=bias), Passes(kernels, trained=False)),)
    words = {"compiled": "compiled", "autocast": "eager"}[kernels]
    return Published(
        f"{name}, inference, {words}",
        hardware,
        images_s,
        networks,
        1024,
        TIMM_INFER,
        precision=precision,
        group="timm inference",
    )


def dalle_tokens(hardware: Hardware, precision: str, micro_batch: int, pace: str) -> float:
    """BEiT's released loop asks DALL-E's encoder for codes of an image of 112 px.

    That network casts its convolutions to fp16 by itself.
    """
    settings = TokenizerSettings(
        kind="dvae", channels=256, channel_mults=(1, 2, 4, 8), blocks_per_level=2, num_codes=CODES, decoder=False
    )
    return tokens_s(settings, ViewSettings(tokenizer_px=112), hardware, precision, micro_batch, pace)


def vqkd_tokens(hardware: Hardware, precision: str, micro_batch: int, pace: str) -> float:
    """BEiT v2's asks its tokenizer under autocast."""
    return tokens_s(TokenizerSettings(kind="vqkd", code_dim=32), ViewSettings(), hardware, precision, micro_batch, pace)


def tokens_s(
    settings: TokenizerSettings, views: ViewSettings, hardware: Hardware, precision: str, micro_batch: int, pace: str
) -> float:
    return sum(
        segment_seconds(segment, micro_batch, hardware, precision, pace).forward
        for segment in tokenizing_segments(settings, views)
    )


def run_hours(epochs: float, hours: float, gpus: int, images: int = IMAGENET) -> float:
    """Images a second of a GPU."""
    return epochs * images / (hours * 3600 * gpus)


def mae(size: tuple[int, int, int], patch: int) -> tuple[tuple[Vit, Passes], ...]:
    """Encoder of the shown quarter, decoder of 8 blocks of width 512 for all patches."""
    model = sized(*size, patch=patch)
    patches = model.grid**2
    return (
        (Vit(model, tokens=patches // 4 + 1, head=0), AMP_2022),
        (Vit(sized(512, 8, 16, patch=patch), tokens=patches + 1, head=patches * IMAGE_CHANNELS * patch**2), AMP_2022),
    )


def vit_of(*size: int, **settings) -> tuple[tuple[Vit, Passes], ...]:
    """One plain network, as AMP of its years trained it."""
    return ((Vit(sized(*size, **settings)), AMP_2022),)


def wall(
    what: str,
    images_s: float,
    networks: tuple[tuple[Vit, Passes], ...],
    micro_batch: int,
    gpus: int,
    source: str,
    **more,
) -> Published:
    return Published(
        f"{what}, {gpus} GPUs",
        "v100",
        images_s,
        networks,
        micro_batch,
        source,
        gpus=gpus,
        group="walls of whole runs, V100",
        **more,
    )


def published() -> list[Published]:
    """Every row, in the order of the table."""
    beit = dict(scale=0.1)
    rows = [
        timm_row("ViT-Ti/16", 2293.54, 512, sized(*TINY)),
        timm_row("ViT-S/16", 1052.92, 384, sized(*SMALL)),
        timm_row("ViT-B/16", 390.86, 192, sized(*BASE), calibration=True),
        timm_row("BEiT-B/16", 358.29, 192, sized(*BASE, **beit), bias=True),
        timm_row("DeiT III-B/16", 371.73, 192, sized(*BASE, scale=1e-6)),
        timm_row("ViT-L/16", 117.08, 64, sized(*LARGE), calibration=True),
        timm_row("BEiT-L/16", 107.8, 64, sized(*LARGE, **beit), bias=True),
        timm_row("DeiT III-L/16", 113.17, 64, sized(*LARGE, scale=1e-6)),
        timm_row("ViT-L/14", 85.27, 48, sized(*LARGE, patch=14)),
        timm_row("ViT-H/14", 39.94, 16, sized(*HUGE, patch=14)),
        timm_row("DeiT III-H/14", 38.33, 16, sized(*HUGE, patch=14, scale=1e-6)),
        timm_row("ViT-g/14", 22.29, 8, sized(*GIANT, patch=14, mlp_ratio=48 / 11)),
        timm_row("ViT-B/8", 63.42, 24, sized(*BASE, patch=8)),
        timm_row("ViT-B/16 at 384", 96.96, 32, sized(*BASE, px=384)),
        timm_row("BEiT-B/16 at 384", 83.67, 32, sized(*BASE, px=384, **beit), bias=True),
        timm_row("ViT-L/16 at 384", 29.07, 12, sized(*LARGE, px=384)),
        timm_row("BEiT-L/16 at 384", 25.12, 12, sized(*LARGE, px=384, **beit), bias=True),
        timm_row("BEiT-L/16 at 512", 9.42, 4, sized(*LARGE, px=512, **beit), bias=True),
        inference_row("ViT-L/16", "rtx5090", 1108, sized(*LARGE), kernels="autocast"),
        inference_row("BEiT-L/16", "rtx5090", 1030, sized(*LARGE, **beit), bias=True, kernels="autocast"),
        inference_row("ViT-H/14", "rtx5090", 421, sized(*HUGE, patch=14), kernels="autocast"),
        inference_row("ViT-L/16", "rtx5090", 1339, sized(*LARGE), kernels="compiled"),
        inference_row("BEiT-L/16", "rtx5090", 1287, sized(*LARGE, **beit), bias=True, kernels="compiled"),
        inference_row("ViT-H/14", "rtx5090", 505, sized(*HUGE, patch=14), kernels="compiled"),
        inference_row("ViT-L/14", "rtx5090", 997.81, sized(*LARGE, patch=14), kernels="compiled"),
        inference_row("ViT-g/14", "rtx5090", 329.91, sized(*GIANT, patch=14, mlp_ratio=48 / 11), kernels="compiled"),
        inference_row(
            "ViT-G/14", "rtx5090", 182.65, sized(1664, 48, 16, patch=14, mlp_ratio=64 / 13), kernels="compiled"
        ),
        inference_row("ViT-B/8", "rtx5090", 1026.96, sized(*BASE, patch=8), kernels="compiled"),
        inference_row("ViT-L/16 at 384", "rtx5090", 433.32, sized(*LARGE, px=384), kernels="compiled"),
        inference_row(
            "BEiT-L/16 at 384", "rtx5090", 395.46, sized(*LARGE, px=384, **beit), bias=True, kernels="compiled"
        ),
        inference_row(
            "BEiT-L/16 at 512", "rtx5090", 198.24, sized(*LARGE, px=512, **beit), bias=True, kernels="compiled"
        ),
        inference_row(
            "BEiT-L/16", "rtx-pro-6000", 1469, sized(*LARGE, **beit), bias=True, kernels="compiled", precision="bf16"
        ),
        inference_row("ViT-H/14", "rtx-pro-6000", 584, sized(*HUGE, patch=14), kernels="compiled", precision="bf16"),
    ]
    nemo = dict(
        micro_batch=64, precision="bf16", source="NeMo Framework user guide, ViT performance", group="NeMo, ViT-g/14"
    )
    giant = ((Vit(sized(*GIANT, patch=14, mlp_ratio=48 / 11)), Passes("eager", stored_attention=True)),)
    for hardware, one, sixteen in (("a100-80", 693, 10644), ("h100", 1428, 21561)):
        rows += [
            Published("ViT-g/14, training, 8 GPUs", hardware, one / 8, giant, gpus=8, calibration=True, **nemo),
            Published("ViT-g/14, training, 128 GPUs", hardware, sixteen / 128, giant, gpus=128, **nemo),
        ]
    rotary = "nvSubquadratic documentation, benchmarks; a ViT-S with rotary positions, counted as a plain one"
    small = dict(hardware="h100", micro_batch=256, precision="bf16", group="H100, small", source=rotary)
    rows += [
        Published("ViT-5-S/16, training, eager", images_s=2305, networks=((Vit(sized(*SMALL)), AMP),), **small),
        Published("ViT-5-S/16, training, compiled", images_s=7716, networks=((Vit(sized(*SMALL)), COMPILED),), **small),
    ]
    deit = "DeiT (arXiv 2012.12877), section 5.6: 53 hours on one node"
    deit3 = (
        "github.com/facebookresearch/deit, issue 198: seconds an epoch of ImageNet-21k; the card is "
        "not named, the question is of V100"
    )
    released = "MAE's released code, PRETRAIN.md and FINETUNE.md: wall time, data and evaluation in it"
    rows += [
        wall("DeiT-B/16, 300 epochs", run_hours(300, 53, 8), vit_of(*BASE, drop=0.1), 128, 8, deit, calibration=True),
        wall(
            "DeiT III-S/16, an epoch",
            run_hours(1, 1548.6 / 3600, 32, IMAGENET_21K),
            vit_of(*SMALL, scale=1e-6),
            64,
            32,
            deit3,
        ),
        wall(
            "DeiT III-B/16, an epoch",
            run_hours(1, 2231.5 / 3600, 32, IMAGENET_21K),
            vit_of(*BASE, scale=1e-6, drop=0.1),
            64,
            32,
            deit3,
        ),
        wall(
            "DeiT III-L/16, an epoch",
            run_hours(1, 5976.1 / 3600, 32, IMAGENET_21K),
            vit_of(*LARGE, scale=1e-6, drop=0.3),
            64,
            32,
            deit3,
        ),
        wall(
            "DeiT III-H/14, an epoch",
            run_hours(1, 8319.3 / 3600, 64, IMAGENET_21K),
            vit_of(*HUGE, patch=14, scale=1e-6, drop=0.5),
            32,
            64,
            deit3,
        ),
        wall("MAE-L/16, 800 epochs", run_hours(800, 42, 64), mae(LARGE, 16), 64, 64, released),
        wall(
            "MAE-B/16 fine-tuned, 100 epochs",
            run_hours(100, 7 + 11 / 60, 32),
            vit_of(*BASE, drop=0.1),
            32,
            32,
            released,
        ),
        wall(
            "MAE-L/16 fine-tuned, 50 epochs", run_hours(50, 8 + 52 / 60, 32), vit_of(*LARGE, drop=0.2), 32, 32, released
        ),
        wall(
            "MAE-H/14 fine-tuned, 50 epochs",
            run_hours(50, 13 + 9 / 60, 64),
            vit_of(*HUGE, patch=14, drop=0.3),
            16,
            64,
            released,
        ),
        wall(
            "BEiT-B/16, 800 epochs, with its tokenizer",
            run_hours(800, 5 * 24, 16),
            ((Vit(sized(*BASE, scale=0.1, drop=0.1), bias=True, head=75 * CODES), AMP_2022),),
            128,
            16,
            "BEiT (arXiv 2106.08254): about five days",
            extra=dalle_tokens,
        ),
        wall(
            "BEiT v2-B/16, an epoch, with its tokenizer",
            run_hours(1, 5 / 60, 16),
            # 12 blocks and 2 of the second branch
            ((Vit(sized(768, 14, 12, scale=0.1, drop=0.1), bias=True, head=2 * 75 * CODES), AMP_2022),),
            128,
            16,
            "github.com/microsoft/unilm, issue 1368: about five minutes an epoch",
            extra=vqkd_tokens,
        ),
    ]
    dino = Vit(sized(*LARGE, scale=1e-5), head=0)
    # 2 crops of 224 px, 8 of 112, each with class token and four registers
    crops = tuple((replace(dino, tokens=tokens), COMPILED) for tokens in [202] * 2 + [54] * 8)
    teacher = ((replace(dino, tokens=202), Passes("compiled", trained=False)),) * 2
    rows.append(
        Published(
            "DINOv3-L/16, 100 epochs, 32 GPUs, multi-crop",
            "h100",
            run_hours(100, 14, 32),
            crops + teacher,
            64,
            "DINOv3 README: 14 hours; crops and teacher counted, the heads' prototypes and the data are not",
            precision="bf16",
            gpus=32,
            group="H100, self-distillation",
        )
    )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="also write the tables to this file")
    args = parser.parse_args(argv)
    body = report(published())
    if args.record:
        command = shlex.join(["python", "benchmarks/plan_world.py", *(sys.argv[1:] if argv is None else argv)])
        write_record(args.record, "The planner against the world", command, body)
    sys.stdout.write(f"{body}\n")
    return 0


READING = """What the errors say. Where kernels alone were timed (timm's rows), the count of products and moved bytes
holds over sizes, patch sizes, resolutions and position biases with one share of the peak a card: it is the form of
the model that these rows test. GeForce cards clock above the data sheet, so compiled inference there is faster than
predicted; images of 512 px with a micro-batch of 4 are slower, for a batch so small fills the card badly, which the
model does not know.

The three published runs on H100 (NeMo, ViT-5-S compiled, DINOv3) all lie below the typical pace and two of them at
the slow end or below it: no published figure was found of a vision transformer that trains there as fast as its
products could. NeMo's is the A100's configuration out of the box; whether it stored the attention weights is not
said, and is assumed. Until a run of our own is measured there, a bill for H100 or H200 is to be read from typical to
slow.

Walls of whole runs on V100 are 2020 to 2022's code, with loading, augmentation and evaluation in them, and the
planner's rows hold computing alone. For DeiT III the loader shows: S and M, whose cost differs by half, took 1,549
and 1,578 s an epoch, so data set their pace. MAE's and the fine-tunings' are not explained by anything counted here.
ViT-5-S eager runs its rotary positions and norms in many small kernels; the row counts a plain ViT. DINOv3's heads
over its prototypes are not counted."""


def report(rows: list[Published]) -> str:
    """Markdown: the table, of every group how far off the typical pace is, and what that says."""
    lines = [
        "| published | GPU | images/s a GPU | predicted (slow to fast) | error | inside | role |",
        "|---|---|---|---|---|---|---|",
    ]
    errors: dict[str, list[tuple[float, bool]]] = {}
    for row in rows:
        slow, typical, fast = (row.predicted(pace) for pace in PACES)
        error, inside = typical / row.images_s - 1, slow <= row.images_s <= fast
        role = "calibration" if row.calibration else "held out"
        lines.append(
            f"| {row.what} | {row.hardware} | {row.images_s:.4g} | {typical:.4g} ({slow:.4g} to "
            f"{fast:.4g}) | {error:+.0%} | {'yes' if inside else 'no'} | {role} |"
        )
        if not row.calibration:
            errors.setdefault(row.group, []).append((error, inside))
    summary = ["| held-out rows | number | median error | worst | inside |", "|---|---|---|---|---|"]
    for group, found in errors.items():
        values = [error for error, _ in found]
        summary.append(
            f"| {group} | {len(found)} | {statistics.median(values):+.0%} | {max(values, key=abs):+.0%} | "
            f"{sum(inside for _, inside in found)} |"
        )
    sources = [f"- {source}" for source in dict.fromkeys(row.source for row in rows)]
    return "\n\n".join(["\n".join(lines), "\n".join(summary), READING, "Sources:\n\n" + "\n".join(sources)])


if __name__ == "__main__":
    run(main)
