"""How fast is the pre-training step through DeepSpeed, and what memory does it take? Recipes x ZeRO stage x activation
checkpointing x torch.compile.

    python -m benchmarks.step [--gpu] [--record FILE.md] [--profile] [--budget_s 300] [key.sub=value ...]

One rank, in this process, with the engine that pretrain.py trains with; drawn images and codes, masks by the recipe,
no data loading. The first value of each list (--zero, --checkpointing, --compile, --drop_by) makes the base; every
other value is measured alone against it, or with --all every combination. On a CPU small models show that everything
runs; --gpu takes the recipes' own sizes. The record is written anew after every row, so a time limit loses nothing.

MFU: FLOPs of the model's forward and backward pass (the planner's count, recomputation not in it) x images/s,
over what this device reaches in large matrix products of the same dtype, measured here, and over what its data sheet
says. One process measures all rows in turn, each alone in memory.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from dataclasses import dataclass, field, replace

import torch

from benchmarks.engine_step import NOTHING_COMPILED, EngineTrainer, compiler_facts, fresh_compiler, join_alone
from benchmarks.guards import OUT_OF_MEMORY, free_memory, reason
from benchmarks.matmul_ceiling import data_sheet_flops, matmul_ceiling
from benchmarks.plots import Bar, ratio_bars
from benchmarks.profile_step import profile_step
from benchmarks.record import at_least, benchmark_parser, chosen, markdown_table, parse, publish
from benchmarks.step_time import (
    DTYPES,
    Turns,
    step_memory,
    this_device,
    training_flops,
)
from peco_ds.command_line import run
from peco_ds.config import PretrainRecipe
from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.recipe_files import load_recipe

# Recipe and settings of each size, most telling first. On a GPU: micro-batches that fit 80 GB without recomputation. On
# a CPU: a few blocks.
GPU_SIZES = {
    "H/14 at 224": ("peco_vith14", "run.micro_batch=128"),
    "L/16 at 224": ("peco_vitl16", "run.micro_batch=256"),
    "B/16 at 224": ("peco_vitb16", "run.micro_batch=512"),
    "H/14 at 448": ("peco_vith14", "run.micro_batch=32 model.image_px=448 views.tokenizer_px=512 mask.count=392"),
}
# subsets are of whole images: of 4 the recipes' rate would leave out none
FEW_BLOCKS = "run.micro_batch=4 run.precision=fp32 model.depth=3 model.drop_path=0.5"
CPU_SIZES = {
    "B/16 of 3 blocks": ("peco_vitb16", FEW_BLOCKS),
    "H/14 of 3 narrow blocks": ("peco_vith14", f"{FEW_BLOCKS} model.width=320 model.heads=4"),
}
# The first value of each is the base; most telling changes first.
AXES = {
    "compile": ["blocks", "none"],
    "checkpointing": ["none", "selective", "full"],
    "drop_by": ["image", "subset"],
    "zero": ["3", "1", "2", "0"],
}
PACKAGES = ("deepspeed", "timm")
CUT_OFF = "cut off"  # before it was measured
HEADS = (
    "size | ZeRO | checkpointing | compile | stochastic depth by | batch | images/s (slowest to fastest) | ratio | "
    "MFU, measured ceiling | MFU, data sheet | activations an image, MB | peak, GiB | start, s | "
    "graphs, breaks, recompiled"
).split(" | ")


@dataclass(frozen=True)
class Setting:
    """A row."""

    size: str
    zero: str
    checkpointing: str
    compile: str
    drop_by: str

    def overrides(self) -> list[str]:
        return [
            f"run.activation_checkpointing={self.checkpointing}",
            f"run.compile={self.compile}",
            f"model.drop_path_by={self.drop_by}",
        ]


@dataclass
class Row:
    """What was measured of a setting; times of a step in seconds, an entry a stretch."""

    setting: Setting
    batch: int = 0  # images of a pass
    passes: int = 1  # of a step
    flops_per_image: int = 0
    skips: bool = False  # some of those FLOPs are never done
    seconds: list[float] = field(default_factory=list)
    kept_bytes: int = 0  # by the forward pass for the backward pass
    # of all that is allocated on a GPU; 0 on a CPU
    peak_bytes: int = 0
    # what the first steps took beyond the time of later ones: compilation, first allocations
    start_s: float = 0.0
    graphs: int = 0
    breaks: int = 0
    recompiled: int = 0
    failure: str = ""

    @property
    def images_per_s(self) -> float:
        return self.batch * self.passes / statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Images/s of the slowest and of the fastest stretch."""
        return self.batch * self.passes / max(self.seconds), self.batch * self.passes / min(self.seconds)


def main(argv: list[str] | None = None) -> int:
    measurement = Measurement(arguments(argv))
    measurement.measure()
    sys.stdout.write(measurement.publish())
    return 1 if measurement.broken() else 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(
        "step",
        __doc__,
        gpu="the recipes' own sizes, bf16; without it small models in fp32",
        plot="images/s against each size's base",
        overrides="settings over every size's recipe",
    )
    sizes = f"of {', '.join(GPU_SIZES)}; without --gpu of {', '.join(CPU_SIZES)} (default: all)"
    parser.add_argument("--sizes", metavar="SIZE,SIZE", help=sizes)
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}", metavar="BASE,OTHER", default=",".join(values), help="(default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="every combination, not one change at a time")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="stretches that are timed (default: %(default)s)")
    parser.add_argument("--steps", type=at_least(1), help="of a stretch (default: 2 with --gpu, else 1)")
    passes = "forward and backward, of an optimiser step (default: 4 with --gpu, as a run of few GPUs has, else 1)"
    parser.add_argument("--passes", type=at_least(1), help=passes)
    parser.add_argument(
        "--budget_s", type=float, default=float("inf"), help="no row is begun later (default: no limit)"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also say where the time of each size's base goes, and which attention kernels ran",
    )
    return parse(parser, argv)


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Rows in the order in which they are measured: the base of every size, then what else was asked for, size by size.

    Raises: UserError for a size that is not known.
    """
    known = GPU_SIZES if args.gpu else CPU_SIZES
    sizes = chosen("sizes", args.sizes, known) if args.sizes else list(known)
    axes = [chosen(axis, getattr(args, axis), values) for axis, values in AXES.items()]
    base = tuple(values[0] for values in axes)
    others = [combination for combination in itertools.product(*axes) if combination != base]
    if not args.all:
        others = [
            (*base[:number], other, *base[number + 1 :]) for number, values in enumerate(axes) for other in values[1:]
        ]
    rows = [*((size, base) for size in sizes), *((size, other) for size in sizes for other in others)]
    return [Setting(size, **dict(zip(AXES, values))) for size, values in rows]


class Measurement:
    """The rows, one after another, and the record as it grows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.settings = settings_of(args)
        self.steps = args.steps or (2 if args.gpu else 1)
        self.passes = args.passes or (4 if args.gpu else 1)
        self.rows: list[Row] = []
        self.profiles: dict[str, str] = {}
        self.ceilings: dict[torch.dtype, float] = {}  # FLOP a second

    def measure(self) -> None:
        # a misspelt override is refused before anything is measured
        recipes = [self.recipe(setting) for setting in self.settings]
        begun = time.monotonic()
        join_alone()
        for number, (setting, recipe) in enumerate(zip(self.settings, recipes)):
            if time.monotonic() - begun > self.args.budget_s:
                break
            row = Row(setting, failure=CUT_OFF)
            self.rows.append(row)
            try:
                self.measure_row(row, recipe, profiled=self.args.profile and setting.size not in self.profiles)
            except Exception as error:
                # one setting that this machine cannot do must not cost the others
                row.failure = reason(error)
                del error
            free_memory()
            self.publish()
            sys.stderr.write(f"{number + 1} of {len(self.settings)}: {' | '.join(cells(row, self.ceilings))}\n")

    def recipe(self, setting: Setting) -> PretrainRecipe:
        name, own = (GPU_SIZES if self.args.gpu else CPU_SIZES)[setting.size]
        recipe = load_recipe(PretrainRecipe, name, [*own.split(), *setting.overrides(), *self.args.overrides]).recipe
        return replace(recipe, run=replace(recipe.run, global_batch=recipe.run.micro_batch * self.passes))

    def measure_row(self, row: Row, recipe: PretrainRecipe, *, profiled: bool) -> None:
        device, dtype = this_device(), DTYPES[recipe.run.precision]
        # anew for every row: others may have used the machine
        self.ceilings[dtype] = max(self.ceilings.get(dtype, 0.0), matmul_ceiling(dtype, device))
        row.batch, row.passes, row.flops_per_image = recipe.run.micro_batch, self.passes, training_flops(recipe)
        row.skips = recipe.model.drop_path_by == "subset" and recipe.model.drop_path > 0
        fresh_compiler()
        trainer = EngineTrainer(recipe, DS_CONFIGS / f"zero{row.setting.zero}.json", device)
        try:
            turns = Turns({"": trainer.step}, steps_a_turn=self.steps).run(self.args.rounds)
            if turns.failed:
                row.failure = turns.failed[""]
                return
            row.seconds, row.failure = turns.seconds[""], ""
            row.start_s = max(0.0, turns.first_s[""] - statistics.median(row.seconds))
            state = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            # the last pass is the one at whose end the optimiser moves
            trainer.earlier_passes()
            row.kept_bytes, beyond = step_memory(trainer.forward, trainer.learn)
            row.peak_bytes = state + beyond
            row.graphs, row.breaks, row.recompiled = compiler_facts()
            if row.setting.compile != "none" and not row.graphs:
                row.failure = NOTHING_COMPILED
            elif profiled:
                self.profiles[row.setting.size] = profile_step(trainer.step, steps=max(1, 3 // self.passes))
        finally:
            trainer.close()

    def broken(self) -> list[Row]:
        """Rows that failed, but for those that are known to be too large for the device."""
        return [row for row in self.rows if row.failure and row.failure != OUT_OF_MEMORY]

    def publish(self) -> str:
        if self.args.plot:
            ratio_bars(self.args.plot, "images/s, against the base of each size", plotted(self.rows))
        return publish(self.args, "The pre-training step through DeepSpeed", self.body(), *PACKAGES)

    def body(self) -> str:
        ceilings = []
        for dtype, flops in self.ceilings.items():
            sheet = data_sheet_flops(device_name(), dtype)
            stated = f" ({sheet / 1e12:.0f} on the data sheet)" if sheet else ""
            name = str(dtype).removeprefix("torch.")
            ceilings.append(f"{name} matrix products reach {flops / 1e12:.3g} TFLOP/s here{stated}")
        parts = [
            f"Medians of {self.args.rounds} stretches of {self.steps} steps, {self.passes} passes each; one rank; "
            f"{'; '.join(ceilings)}. The base of a size is its first row; `ratio` is images/s "
            "against it, measured one after the other.",
            "Activations: what a forward pass leaves for the backward pass. `start` is what the first "
            "step took beyond later ones (compilation; a warm cache on disk makes it "
            "shorter). graphs, breaks, recompiled: torch.compile's own counts.",
        ]
        if any(row.skips for row in self.rows):
            parts.append("No MFU where stochastic depth leaves branches undone: the planner counts them.")
        if left := len(self.settings) - len(self.rows):
            parts.append(f"{left} rows were not begun within {self.args.budget_s:g} s.")
        parts.append(table(self.rows, self.ceilings))
        parts += [f"## Where the time goes: {size}, base\n\n{profile}" for size, profile in self.profiles.items()]
        return "\n\n".join(parts)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def table(rows: list[Row], ceilings: dict[torch.dtype, float]) -> str:
    bases = base_rows(rows)
    return markdown_table(HEADS, [cells(row, ceilings, bases.get(row.setting.size)) for row in rows])


def base_rows(rows: list[Row]) -> dict[str, Row]:
    """The first row of each size, where it was measured."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.setting.size, row)
    return {size: row for size, row in first.items() if not row.failure}


def cells(row: Row, ceilings: dict[torch.dtype, float], base: Row | None = None) -> list[str]:
    setting = row.setting
    asked = [setting.size, setting.zero, setting.checkpointing, setting.compile, setting.drop_by]
    if row.failure:
        return [*asked, str(row.batch or ""), row.failure, *[""] * (len(HEADS) - len(asked) - 2)]
    slowest, fastest = row.spread
    return [
        *asked,
        str(row.batch) if row.passes == 1 else f"{row.passes} x {row.batch}",
        f"{row.images_per_s:.4g} ({slowest:.4g} to {fastest:.4g})",
        f"{row.images_per_s / base.images_per_s:.2f}" if base else "",
        *(f"{value:.1%}" if value else "" for value in utilisation(row, ceilings)),
        f"{row.kept_bytes / row.batch / 1e6:.1f}",
        f"{row.peak_bytes / 2**30:.1f}" if row.peak_bytes else "",
        f"{row.start_s:.1f}",
        f"{row.graphs}, {row.breaks}, {row.recompiled}" if setting.compile != "none" else "",
    ]


def utilisation(row: Row, ceilings: dict[torch.dtype, float]) -> tuple[float | None, float | None]:
    """MFU over the measured ceiling and over the data sheet's; None where a figure would mislead or is not known."""
    if row.skips:
        return None, None
    (dtype, ceiling), *others = ceilings.items()
    assert not others, "one precision a run"
    sheet = data_sheet_flops(device_name(), dtype)
    rate = row.flops_per_image * row.images_per_s
    return rate / ceiling, rate / sheet if sheet else None


def plotted(rows: list[Row]) -> dict[str, list[Bar]]:
    """Bars by size: images/s against the base."""
    found: dict[str, list[Bar]] = {}
    for size, base in base_rows(rows).items():
        for row in rows:
            if row.setting.size == size and not row.failure:
                setting = row.setting
                label = f"ZeRO-{setting.zero}, {setting.checkpointing}, compile {setting.compile}, {setting.drop_by}"
                rates = (row.images_per_s, *row.spread)
                found.setdefault(size, []).append((label, *(rate / base.images_per_s for rate in rates)))
    return found


if __name__ == "__main__":
    run(main)
