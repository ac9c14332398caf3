"""The planner against the world: predicted beside published throughputs of vision transformers, with the error of each,
good or bad.

    python -m benchmarks.plan_world [--record FILE.md]

Pure arithmetic: nothing is run. Every row of plan_world.yaml names where its figure was published, what the planner was
told of it (model, precision, how kernels ran, micro-batch), and whether a constant was set by it (calibration) or not
(held out). `inside` says whether the published figure lies between the planner's slow and fast pace.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.record import benchmark_parser, markdown_table, parse, publish
from peco_ds.command_line import run
from peco_ds.config import ModelSettings, TokenizerSettings, ViewSettings
from peco_ds.planner.hardware import Hardware, find_hardware
from peco_ds.planner.shapes import FLOPS_PER_MAC, IMAGE_CHANNELS
from peco_ds.planner.step_cost import (
    PACES,
    SegmentSeconds,
    StepInputs,
    closed_form,
    optimizer_seconds,
    segment_seconds,
    work_seconds,
)
from peco_ds.planner.traffic import Collective
from peco_ds.planner.work import BlockShape, Kernels, Work, block_work, tokenizing_segments
from peco_ds.strict_yaml import read_yaml

PUBLISHED = read_yaml(Path(__file__).with_name("plan_world.yaml"))
IMAGENET = 1_281_167
# in which gradients are summed; their size moves no row by a per cent
BUCKETS = 20
# Tokenizers that are asked in the pass. BEiT's released loop asks DALL-E's encoder, which casts its convolutions to
# fp16 by itself, for codes of an image of 112 px; BEiT v2's asks its own under autocast.
TOKENIZERS = {
    "dalle": (
        TokenizerSettings(
            kind="dvae", channels=256, channel_mults=(1, 2, 4, 8), blocks_per_level=2, num_codes=8192, decoder=False
        ),
        ViewSettings(tokenizer_px=112),
    ),
    "vqkd": (TokenizerSettings(kind="vqkd", code_dim=32), ViewSettings()),
}


@dataclass(frozen=True)
class Network:
    """A plain or a BEiT transformer as far as its cost goes, and how its passes ran; fields as in plan_world.yaml."""

    size: str | tuple[int, int, int]
    kernels: Kernels
    px: int = 224
    patch: int = 16
    scale: float = 0.0
    drop: float = 0.0
    mlp_ratio: float = 4.0
    bias: bool = False
    tokens: int = 0
    head: int = 1000
    stored_attention: bool = False
    trained: bool = True
    times: int = 1

    @property
    def model(self) -> ModelSettings:
        width, depth, heads = PUBLISHED["sizes"][self.size] if isinstance(self.size, str) else self.size
        return ModelSettings(
            image_px=self.px, patch_px=self.patch, width=width, depth=depth, heads=heads, mlp_ratio=self.mlp_ratio
        )

    @property
    def patch_weights(self) -> int:
        return IMAGE_CHANNELS * self.patch**2 * self.model.width

    @property
    def parameters(self) -> int:
        width, hidden = self.model.width, int(self.model.width * self.mlp_ratio)
        return self.model.depth * (4 * width**2 + 2 * width * hidden) + self.patch_weights + width * 1000

    def passes(self, element: int = 2) -> list[Work]:
        """Forward and backward, or forward alone, of one image."""
        model, tokens = self.model, self.tokens or self.model.grid**2 + 1
        block = BlockShape(
            tokens,
            model.width,
            int(model.width * model.mlp_ratio),
            model.heads,
            element,
            self.kernels,
            scaled=bool(self.scale),
            dropped=self.trained and self.drop > 0,
            bias="own" if self.bias and not self.stored_attention else "none",
            # Of PyTorch's kernels these alone take a bias that learns; without a gradient others do too.
            attention="efficient" if self.bias and self.trained and not self.stored_attention else "fused",
        )
        passes = list(block_work(block)[:2])
        if self.stored_attention:
            passes = [work + moves for work, moves in zip(passes, stored_attention(block, bias=self.bias))]
        patches, head = FLOPS_PER_MAC * model.grid**2 * self.patch_weights, FLOPS_PER_MAC * model.width * self.head
        row = tokens * model.width * element
        ends = [
            Work(products=head, convolutions=patches, moved_bytes=8 * row + 16 * self.head, kernels=30),
            Work(products=2 * head, convolutions=patches, moved_bytes=12 * row + 24 * self.head, kernels=40),
        ]
        return [work.times(model.depth) + end for work, end in zip(passes, ends)][: 2 if self.trained else 1]


def stored_attention(block: BlockShape, *, bias: bool) -> tuple[Work, Work]:
    """Moved by attention written as products, softmax and sums, forward and backward: query, key and value copied for
    the batched products, the query scaled, the output copied; of T x T values the scores, the bias's sum, softmax
    (under autocast in float32, with casts), and the same way back, beside the gradients' copy that every block makes.
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


@dataclass(frozen=True)
class Published:
    """A figure of the world."""

    what: str
    group: str
    source: str
    hardware: str
    images_s: float  # of a GPU
    networks: tuple[Network, ...]
    micro_batch: int
    precision: str = "fp16"
    calibration: bool = False
    tokens_of: str = ""  # of TOKENIZERS
    gpus: int = 1  # over which gradients are summed

    def predicted(self, pace: str) -> float:
        """Images a second of a GPU."""
        machine, batch = find_hardware(self.hardware), self.micro_batch
        networks = [network for network in self.networks for _ in range(network.times)]
        passes = [
            [work_seconds(work, batch, machine, self.precision, pace) for work in network.passes()]
            for network in networks
        ]
        trained = sum(network.parameters for network in networks if network.trained)
        asked = 0.0
        if self.tokens_of:
            asked = sum(
                segment_seconds(segment, batch, machine, self.precision, pace).forward
                for segment in tokenizing_segments(*TOKENIZERS[self.tokens_of])
            )
        forward, backward = sum(found[0] for found in passes) + asked, sum(sum(found[1:]) for found in passes)
        return batch / step_seconds(forward, backward, trained, self.gpus, machine)


def step_seconds(forward: float, backward: float, parameters: int, gpus: int, machine: Hardware) -> float:
    """Of one step of data parallel training: 16-bit gradients summed bucket by bucket while the backward pass goes on,
    as PyTorch and Megatron do.
    """
    sums = [
        Collective("all_reduce", 2.0 * parameters / BUCKETS, "backward", segment, 0, True)
        for segment in reversed(range(BUCKETS if gpus > 1 and parameters else 0))
    ]
    segments = (SegmentSeconds(forward / BUCKETS, backward / BUCKETS),) * BUCKETS
    optimizer = optimizer_seconds(parameters, machine)
    return closed_form(StepInputs(segments, tuple(sums), 1, optimizer, gpus, machine)).seconds


def run_images_s(epochs: float, hours: float, gpus: int, images: int = IMAGENET) -> float:
    """Images a second of a GPU, in a whole run."""
    return epochs * images / (hours * 3600 * gpus)


def published() -> list[Published]:
    """Every row, in the order of the table."""
    return [_row(group | row) for group in PUBLISHED["groups"] for row in group["rows"]]


def _row(said: dict) -> Published:
    """What is said of a row and of its group, as its networks and the rest."""
    said = {key: _number(value) for key, value in said.items()}
    own = {item.name for item in fields(Published)}
    of_network = {key: value for key, value in said.items() if key in {item.name for item in fields(Network)}}
    networks = [Network(**of_network | network) for network in said.pop("networks", [{}])]
    if "run" in said:
        took = {key: _number(value) for key, value in said["run"].items()}
        said["images_s"] = run_images_s(**took, gpus=said["gpus"], images=said.get("images", IMAGENET))
    said["what"] = said["title"].format(said["what"], gpus=said.get("gpus"))
    return Published(networks=tuple(networks), **{key: value for key, value in said.items() if key in own})


def _number(value):
    """A fraction of two numbers as a number, all else as it is."""
    above, slash, below = str(value).partition("/")
    try:
        return float(above) / float(below) if slash else value
    except ValueError:
        return value


def main(argv: list[str] | None = None) -> int:
    args = parse(benchmark_parser("plan_world", __doc__), argv)
    sys.stdout.write(publish(args, "The planner against the world", report(published())))
    return 0


def report(rows: list[Published]) -> str:
    """Markdown: the table, of every group how far off the typical pace is, and what that says."""
    lines, errors = [], {}
    for row in rows:
        slow, typical, fast = (row.predicted(pace) for pace in PACES)
        error, inside = typical / row.images_s - 1, slow <= row.images_s <= fast
        predicted = f"{typical:.4g} ({slow:.4g} to {fast:.4g})"
        words = ("yes" if inside else "no", "calibration" if row.calibration else "held out")
        lines.append((row.what, row.hardware, f"{row.images_s:.4g}", predicted, f"{error:+.0%}", *words))
        if not row.calibration:
            errors.setdefault(row.group, []).append((error, inside))
    summary = []
    for group, found in errors.items():
        values, inside = zip(*found)
        worst = max(values, key=abs)
        summary.append((group, len(found), f"{statistics.median(values):+.0%}", f"{worst:+.0%}", sum(inside)))
    heads = ("published", "GPU", "images/s a GPU", "predicted (slow to fast)", "error", "inside", "role")
    sources = "\n".join(f"- {source}" for source in dict.fromkeys(row.source for row in rows))
    tables = (
        markdown_table(heads, lines),
        markdown_table(("held-out rows", "number", "median error", "worst", "inside"), summary),
    )
    return "\n\n".join([*tables, PUBLISHED["reading"].strip(), f"Sources:\n\n{sources}"])


if __name__ == "__main__":
    run(main)
