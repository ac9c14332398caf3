"""Predict, then run: step time and activation memory of recipes as the planner expects them of this device, beside what
they are.

    python -m benchmarks.plan_step [--gpu] [--rows "ROW; ROW"] [--rounds 5] [--record FILE.md] [key.sub=value ...]

First the device is measured: what large matrix products of the run's precision reach, and how fast a long copy moves.
From these two, and shares of them that are the planner's own, every row is predicted; then it is trained as
benchmarks/step_time.py trains: forward pass, objective, backward pass, AdamW, no data, no ZeRO. A card of the planner's
catalogue is also predicted from its data sheet alone, as plan.py would. On a CPU small models in float32 on one thread,
timed by its own clock so that others on the machine disturb less: they test the form of the model. --gpu takes the
recipes' own sizes in bf16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.copies import copy_bytes_s
from benchmarks.guards import free_memory
from benchmarks.matmul_ceiling import matmul_ceiling
from benchmarks.record import at_least, benchmark_parser, markdown_table, parse, publish
from benchmarks.step_time import DTYPES, step_costs, this_device
from peco_ds.command_line import run
from peco_ds.config import PretrainRecipe
from peco_ds.errors import UserError
from peco_ds.planner.hardware import GIB, HARDWARE, Hardware, hardware_of_device
from peco_ds.planner.shapes import ELEMENT_BYTES, mim_activation_bytes
from peco_ds.planner.step_cost import PACES, segment_seconds
from peco_ds.planner.work import pretrain_segments
from peco_ds.recipe_files import load_recipe

# Recipe and settings.
GPU_ROWS = {
    "B/16": ("peco_vitb16", "run.micro_batch=256"),
    "B/16, eager": ("peco_vitb16", "run.micro_batch=256 run.compile=none"),
    "B/16, 32 images": ("peco_vitb16", "run.micro_batch=32"),
    "L/16": ("peco_vitl16", "run.micro_batch=128"),
    "L/16, eager": ("peco_vitl16", "run.micro_batch=128 run.compile=none"),
    "H/14": ("peco_vith14", "run.micro_batch=96"),
    "H/14, eager": ("peco_vith14", "run.micro_batch=96 run.compile=none"),
    "H/14, selective": ("peco_vith14", "run.micro_batch=96 run.activation_checkpointing=selective"),
    "H/14, full": ("peco_vith14", "run.micro_batch=96 run.activation_checkpointing=full"),
    "H/14, 16 images": ("peco_vith14", "run.micro_batch=16"),
    "H/14, subsets": ("peco_vith14", "run.micro_batch=96 model.drop_path=0.4 model.drop_path_by=subset"),
    "H/14, visible": ("peco_vith14_visible", "run.micro_batch=256"),
    "H/14 at 448": ("peco_vith14", "run.micro_batch=24 model.image_px=448 views.tokenizer_px=512 mask.count=392"),
    "BEiT v2 L/16": ("beitv2_vitl16", "run.micro_batch=128"),
}
_SMALL = "run.precision=fp32 run.compile=none model.depth=3 model.width=384 model.heads=6 run.micro_batch=8"
CPU_ROWS = {
    "width 384": ("peco_vitb16", _SMALL),
    "width 384, 2 images": ("peco_vitb16", f"{_SMALL} run.micro_batch=2"),
    "width 768": ("peco_vitb16", f"{_SMALL} model.width=768 model.heads=12 run.micro_batch=4"),
    "width 384, 6 blocks": ("peco_vitb16", f"{_SMALL} model.depth=6 run.micro_batch=4"),
    "width 384 at 384 px": (
        "peco_vitb16",
        f"{_SMALL} model.image_px=384 views.tokenizer_px=384 mask.count=230 run.micro_batch=2",
    ),
    "width 384, full": ("peco_vitb16", f"{_SMALL} run.activation_checkpointing=full"),
    "width 384, second branch": ("beitv2_vitb16", f"{_SMALL} aggregation.early_block=2 aggregation.blocks=1"),
    "width 384, visible": (
        "peco_vith14_visible",
        f"{_SMALL} encoding.decoder_width=192 encoding.decoder_depth=2 encoding.decoder_heads=6",
    ),
}
# Of what large products and long copies reach here. Assumed: on a GPU the catalogue's shares of data sheets stand so to
# its best products; one thread of a CPU fills up with smaller ones.
PRODUCT_SHARE = {"cuda": (0.55, 0.72, 0.90), "cpu": (0.75, 0.90, 1.0)}
COPY_SHARE = 0.92
# of the parameters' type: gradient read, parameter and both moments read and written
ADAMW_VALUES = 7


@dataclass(frozen=True)
class Row:
    """A prediction beside its measurement; seconds of a step, bytes of an image."""

    name: str
    batch: int
    # the device as it was measured before the row: others may use it too
    machine: Hardware
    precision: str
    predicted: dict[str, float]  # by pace
    # typical, from the data sheet; 0: not a card of the catalogue
    catalogue: float
    # the fastest step, as the device's rates are those of its fastest products and copies
    measured: float
    saved_predicted: float
    saved: float
    # of the whole step beyond weights, gradients and moments
    peak_predicted: float = 0.0
    peak: float = 0.0  # 0: not a GPU

    @property
    def error(self) -> float:
        return self.predicted["typical"] / self.measured - 1

    @property
    def inside(self) -> bool:
        return self.predicted["fast"] <= self.measured <= self.predicted["slow"]


def main(argv: list[str] | None = None) -> int:
    gpu = "the recipes' own sizes, bf16; without it small models in fp32"
    parser = benchmark_parser("plan_step", __doc__, gpu=gpu, overrides="settings over every row's recipe")
    names = f"of {'; '.join(GPU_ROWS)}; without --gpu of {'; '.join(CPU_ROWS)}; separated by semicolons (default: all)"
    parser.add_argument("--rows", metavar="ROW; ROW", help=names)
    parser.add_argument("--rounds", type=at_least(1), default=5, help="steps timed of each row (default: %(default)s)")
    args = parse(parser, argv)
    if not args.gpu:
        torch.set_num_threads(1)
    rows: list[Row] = []
    for name, recipe in chosen_recipes(args).items():
        rows.append(predict_then_run(name, recipe, rounds=args.rounds))
        text = publish(args, "The planner's step beside the real one", report(rows), "timm")
    sys.stdout.write(text)
    return 0


def chosen_recipes(args: argparse.Namespace) -> dict[str, PretrainRecipe]:
    """The rows' recipes. Raises: UserError for a row or a setting that is not known."""
    known = GPU_ROWS if args.gpu else CPU_ROWS
    names = [name.strip() for name in args.rows.split(";")] if args.rows else list(known)
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise UserError(f"--rows {unknown}: not one of {'; '.join(known)}; rows are separated by semicolons")
    return {
        name: load_recipe(PretrainRecipe, known[name][0], [*known[name][1].split(), *args.overrides]).recipe
        for name in names
    }


def measured_machine(precision: str) -> Hardware:
    """This device as the planner's hardware: peak and memory as measured, shares as assumed above.

    Attention's share of a known card is its catalogue's, over what products reach.
    """
    device = this_device()
    ceiling, known = matmul_ceiling(DTYPES[precision], device, clock=_clock(device)), _catalogued()
    start = known or HARDWARE["h100"]
    attention = start.attention_share
    if known:
        attention = tuple(min(1.0, share * known.peak_flops[precision] / ceiling) for share in attention)
    return replace(
        start,
        name="this device",
        title="this device, as measured",
        peak_flops={**start.peak_flops, precision: ceiling},
        memory_bytes_s=copy_bytes_s(device, _clock(device)),
        product_share=PRODUCT_SHARE[device.type],
        attention_share=attention,
        memory_share=COPY_SHARE,
        gpus_per_node=1,
    )


def _clock(device: torch.device) -> Callable[[], float]:
    return time.perf_counter if device.type == "cuda" else time.process_time


def _catalogued() -> Hardware | None:
    return hardware_of_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def predicted_seconds(recipe: PretrainRecipe, machine: Hardware, pace: str) -> float:
    """Of one optimiser step of one micro-batch, as step_time.py runs it: parameters and moments in the run's type."""
    precision, segments = recipe.run.precision, pretrain_segments(recipe)
    passes = [segment_seconds(segment, recipe.run.micro_batch, machine, precision, pace) for segment in segments]
    values = ADAMW_VALUES * sum(segment.parameters for segment in segments)
    optimizer = values * ELEMENT_BYTES[precision] / (machine.memory_bytes_s * machine.memory_share)
    return sum(one.forward + one.backward for one in passes) + optimizer


def predict_then_run(name: str, recipe: PretrainRecipe, *, rounds: int) -> Row:
    settings, known, machine = recipe.run, _catalogued(), measured_machine(recipe.run.precision)
    kept = mim_activation_bytes(
        recipe.model,
        num_codes=recipe.objective.num_codes,
        masked=recipe.mask.count,
        checkpointing=settings.activation_checkpointing,
        precision=settings.precision,
        encoding=recipe.encoding,
        aggregation=recipe.aggregation,
    )
    predicted = {pace: predicted_seconds(recipe, machine, pace) for pace in PACES}
    cost = step_costs({name: recipe}, rounds=rounds)[name]
    free_memory()
    return Row(
        name,
        settings.micro_batch,
        machine,
        settings.precision,
        predicted,
        predicted_seconds(recipe, known, "typical") if known else 0.0,
        min(cost.seconds if cost.peak_bytes else cost.cpu_seconds),
        kept.saved,
        cost.saved_bytes_per_image,
        kept.total * settings.micro_batch,
        cost.peak_bytes,
    )


def report(rows: list[Row]) -> str:
    """Markdown: the device, the table, and how far off it is."""
    best = {row.precision: row.machine for row in sorted(rows, key=lambda row: row.machine.peak_flops[row.precision])}
    device = "; ".join(
        f"{precision} products reach {machine.peak_flops[precision] / 1e12:.3g} TFLOP/s here, copies "
        f"{machine.memory_bytes_s / 1e9:.3g} GB/s"
        for precision, machine in best.items()
    )
    errors = [row.error for row in rows]
    notes = [
        f"{device}, at best; both are measured anew before every row.",
        f"Typical pace off by {statistics.median(errors):+.0%} in the median, at worst {max(errors, key=abs):+.0%}; "
        f"{sum(row.inside for row in rows)} of {len(rows)} lie between fast and slow.",
    ]
    sheet, on_gpu = any(row.catalogue for row in rows), any(row.peak for row in rows)
    if not on_gpu:
        notes.append(
            "Saved: a CPU's attention keeps its T x T weights, which a GPU's kernel does not and the planner does not "
            "count; what full recomputation keeps hides from the counter."
        )
    heads = ["row", "images", "predicted, ms (fast to slow)", *["from the data sheet, ms"] * sheet, "fastest step, ms"]
    heads += ["error", "inside", "saved an image, MB: predicted", "measured"]
    heads += ["peak, GiB: predicted", "measured"] * on_gpu
    return f"{' '.join(notes)}\n\n{markdown_table(heads, [_cells(row, sheet, on_gpu) for row in rows])}"


def _cells(row: Row, sheet: bool, on_gpu: bool) -> list[str]:
    slow, typical, fast = (row.predicted[pace] * 1e3 for pace in PACES)
    cells = [row.name, str(row.batch), f"{typical:.4g} ({fast:.4g} to {slow:.4g})"]
    if sheet:
        known = f"{row.catalogue * 1e3:.4g} ({row.catalogue / row.measured - 1:+.0%})"
        cells.append(known if row.catalogue else "")
    cells += [f"{row.measured * 1e3:.4g}", f"{row.error:+.0%}", "yes" if row.inside else "no"]
    cells += [f"{row.saved_predicted / 1e6:.3g}", f"{row.saved / 1e6:.3g}"]
    return cells + [f"{row.peak_predicted / GIB:.1f}", f"{row.peak / GIB:.1f}"] * on_gpu


if __name__ == "__main__":
    run(main)
