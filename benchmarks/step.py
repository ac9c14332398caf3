"""How fast is the pre-training step through DeepSpeed, and what memory does it take? Recipes x ZeRO stage x activation
checkpointing x torch.compile.

    python benchmarks/step.py [--gpu] [--record FILE.md] [--profile] [--budget_s 300] [key.sub=value ...]

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
import contextlib
import functools
import gc
import itertools
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from record import at_least, require_gpu

from peco_ds.command_line import Parser, run

# Recipe and settings of each size, most telling first. On a GPU: micro-batches that fit 80 GB without recomputation. On
# a CPU: a few blocks.
GPU_SIZES = {
    "H/14 at 224": ("peco_vith14", "run.micro_batch=128"),
    "L/16 at 224": ("peco_vitl16", "run.micro_batch=256"),
    "B/16 at 224": ("peco_vitb16", "run.micro_batch=512"),
    "H/14 at 448": ("peco_vith14", "run.micro_batch=32 model.image_px=448 views.tokenizer_px=512 mask.count=392"),
}
CPU_SIZES = {
    # Subsets are of whole images: of 4 the recipes' rate would leave out none.
    "B/16 of 3 blocks": ("peco_vitb16", "run.micro_batch=4 run.precision=fp32 model.depth=3 model.drop_path=0.5"),
    "H/14 of 3 narrow blocks": (
        "peco_vith14",
        "run.micro_batch=4 run.precision=fp32 model.depth=3 model.width=320 model.heads=4 model.drop_path=0.5",
    ),
}
# The first value of each is the base; most telling changes first.
AXES = {
    "compile": ["blocks", "none"],
    "checkpointing": ["none", "selective", "full"],
    "drop_by": ["image", "subset"],
    "zero": ["3", "1", "2", "0"],
}
PACKAGES = ("deepspeed", "timm")
# TORCHDYNAMO_DISABLE switches it off without a word
NOTHING_COMPILED = "torch.compile was asked for and compiled nothing"


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
    batch: int = 0
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
        return self.batch / statistics.median(self.seconds)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpu", action="store_true", help="the recipes' own sizes, bf16; without it small models in fp32"
    )
    parser.add_argument(
        "--sizes",
        metavar="SIZE,SIZE",
        help=f"of {', '.join(GPU_SIZES)}; without --gpu of {', '.join(CPU_SIZES)} (default: all)",
    )
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}", metavar="BASE,OTHER", default=",".join(values), help="(default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="every combination, not one change at a time")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="stretches that are timed (default: %(default)s)")
    parser.add_argument("--steps", type=at_least(1), help="of a stretch (default: 5 with --gpu, else 1)")
    parser.add_argument(
        "--budget_s", type=float, default=float("inf"), help="no row is begun later than this (default: no limit)"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also say where the time of each size's base goes, and which attention kernels ran",
    )
    parser.add_argument("--record", type=Path, help="also write the tables to this file, anew after every row")
    parser.add_argument("--plot", type=Path, help="also draw images/s against each size's base into this PNG")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings over every size's recipe")
    args = parser.parse_intermixed_args(argv)
    command = shlex.join(["python", "benchmarks/step.py", *(sys.argv[1:] if argv is None else argv)])
    report = Measurement(args, command).measure()
    sys.stdout.write(report.text())
    return 1 if report.broken() else 0


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Rows in the order in which they are measured: the base of every size, then what else was asked for, size by size.

    Raises: UserError for a size that is not known.
    """
    from step_time import chosen

    sizes = GPU_SIZES if args.gpu else CPU_SIZES
    sizes = chosen("sizes", args.sizes, sizes) if args.sizes else list(sizes)
    axes = [chosen(axis, getattr(args, axis), known) for axis, known in AXES.items()]
    base = tuple(values[0] for values in axes)
    changed = [
        tuple(other if n == number else value for n, value in enumerate(base))
        for number, values in enumerate(axes)
        for other in values[1:]
    ]
    rest = [combination for combination in itertools.product(*axes) if combination != base] if args.all else changed
    return [
        Setting(size, **dict(zip(AXES, values)))
        for size, values in [*((size, base) for size in sizes), *((size, other) for size in sizes for other in rest)]
    ]


class Measurement:
    """The rows, one after another, and the record as it grows."""

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        self.args, self.command = args, command
        self.settings = settings_of(args)
        self.steps = args.steps or (5 if args.gpu else 1)
        self.rows: list[Row] = []
        self.profiles: dict[str, str] = {}
        self.ceilings: dict = {}  # dtype -> FLOP a second

    def measure(self) -> Measurement:
        from step_time import free_memory, reason

        from peco_ds.runtime.distributed import start_world

        if self.args.gpu:
            require_gpu()
        # a misspelt override is refused before anything is measured
        recipes = [self.recipe(setting) for setting in self.settings]
        begun = time.monotonic()
        own_signals(start_world)
        for number, (setting, recipe) in enumerate(zip(self.settings, recipes)):
            if time.monotonic() - begun > self.args.budget_s:
                break
            row = Row(setting)
            self.rows.append(row)
            try:
                self.measure_row(row, recipe, profiled=self.args.profile and setting.size not in self.profiles)
            except Exception as error:
                # one setting that this machine cannot do must not cost the others
                row.failure = reason(error)
                del error
            free_memory()
            self.flush()
            sys.stderr.write(f"{number + 1} of {len(self.settings)}: {' | '.join(cells(row, self.ceilings))}\n")
        return self

    def recipe(self, setting: Setting):
        from peco_ds.config import PretrainRecipe
        from peco_ds.recipe_files import load_recipe

        name, own = (GPU_SIZES if self.args.gpu else CPU_SIZES)[setting.size]
        recipe = load_recipe(PretrainRecipe, name, [*own.split(), *setting.overrides(), *self.args.overrides]).recipe
        # one forward pass an optimiser step
        return replace(recipe, run=replace(recipe.run, global_batch=recipe.run.micro_batch))

    def measure_row(self, row: Row, recipe, *, profiled: bool) -> None:
        import torch
        from matmul_ceiling import matmul_ceiling
        from step_time import DTYPES, Turns, step_memory, this_device, training_flops

        device, dtype = this_device(), DTYPES[recipe.run.precision]
        # anew for every row: others may have used the machine
        self.ceilings[dtype] = max(self.ceilings.get(dtype, 0.0), matmul_ceiling(dtype, device))
        row.batch, row.flops_per_image, row.skips = (
            recipe.run.micro_batch,
            training_flops(recipe),
            recipe.model.drop_path_by == "subset" and recipe.model.drop_path > 0,
        )
        fresh_compiler()
        trainer = EngineTrainer(recipe, row.setting.zero, device)
        try:
            turns = Turns({"": trainer.step}, steps_a_turn=self.steps).run(self.args.rounds)
            if turns.failed:
                raise MeasuredError(turns.failed[""])
            row.seconds = turns.seconds[""]
            row.start_s = max(0.0, turns.first_s[""] - statistics.median(row.seconds))
            state = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            row.kept_bytes, beyond = step_memory(trainer.forward, trainer.learn)
            row.peak_bytes = state + beyond
            row.graphs, row.breaks, row.recompiled = compiler_facts()
            if row.setting.compile != "none" and not row.graphs:
                raise MeasuredError(NOTHING_COMPILED)
            if profiled:
                from profile_step import profile_step

                self.profiles[row.setting.size] = profile_step(trainer.step, steps=3)
        finally:
            trainer.close()

    def broken(self) -> list[Row]:
        """Rows that failed, but for those that are known to be too large for the device."""
        from step_time import OUT_OF_MEMORY

        return [row for row in self.rows if row.failure and row.failure != OUT_OF_MEMORY]

    def flush(self) -> None:
        if self.args.record:
            from record import write_record

            write_record(
                self.args.record, "The pre-training step through DeepSpeed", self.command, self.body(), *PACKAGES
            )
        if self.args.plot:
            from plots import ratio_bars

            ratio_bars(self.args.plot, "images/s, against the base of each size", plotted(self.rows))

    def text(self) -> str:
        return f"{self.body()}\n"

    def body(self) -> str:
        import torch
        from matmul_ceiling import data_sheet_flops

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        ceilings = []
        for dtype, flops in self.ceilings.items():
            sheet = data_sheet_flops(name, dtype)
            stated = f" ({sheet / 1e12:.0f} on the data sheet)" if sheet else ""
            ceilings.append(
                f"{str(dtype).removeprefix('torch.')} matrix products reach {flops / 1e12:.3g} TFLOP/s here{stated}"
            )
        left = len(self.settings) - len(self.rows)
        notes = [
            f"Medians of {self.args.rounds} stretches of {self.steps} steps; one rank; "
            f"{'; '.join(ceilings)}. The base of a size is its first row; `ratio` is images/s "
            "against it, measured one after the other.",
            "Activations: what a forward pass leaves for the backward pass. `start` is what the first "
            "step took beyond later ones (compilation; a warm cache on disk makes it "
            "shorter). graphs, breaks, recompiled: torch.compile's own counts.",
        ]
        if any(row.skips for row in self.rows):
            notes.append("No MFU where stochastic depth leaves branches undone: the planner counts them.")
        if left:
            notes.append(f"{left} rows were not begun within {self.args.budget_s:g} s.")
        return "\n\n".join(
            [
                *notes,
                table(self.rows, self.ceilings),
                *(f"## Where the time goes: {size}, base\n\n{profile}" for size, profile in self.profiles.items()),
            ]
        )


class MeasuredError(Exception):
    """What a step failed with, in one line."""

    def __str__(self) -> str:
        return self.args[0]


class EngineTrainer:
    """pretrain.py's step over one batch that is there already.

    Args:
        zero: stage, a file of ds_configs.  weights: of the model; None: fresh ones.
    """

    def __init__(self, recipe, zero: str, device, weights: dict | None = None) -> None:
        import torch
        from step_time import build_model, drawn_batch

        from peco_ds.deepspeed_json import DS_CONFIGS, merge_deepspeed, read_deepspeed_json
        from peco_ds.models.vit import TransformerBlock
        from peco_ds.objectives import build_objective
        from peco_ds.runtime.engine import start_engine

        source = DS_CONFIGS / f"zero{zero}.json"
        ds_config = merge_deepspeed(read_deepspeed_json(source), source, recipe.run, recipe.optim, world_size=1)
        model = build_model(recipe, device)
        if weights is not None:
            model.load_state_dict(weights)
        linear = torch.nn.functional.linear
        self.engine = start_engine(
            model, ds_config, source=source, run=recipe.run, optim=recipe.optim, leaf_modules=(TransformerBlock,)
        )
        # ZeRO-3 puts a function of its own in the place of torch's for the rest of the process: what else is measured
        # there must not run it.
        self._linear, torch.nn.functional.linear = torch.nn.functional.linear, linear
        self.objective, self.batch = build_objective(recipe.objective), drawn_batch(recipe, device)

    def forward(self):
        """Returns: the loss, on the device."""
        with self._with_linear():
            return self.objective(self.engine(self.batch.images_norm, self.batch.masked), self.batch.targets)[0]

    def learn(self, loss) -> None:
        with self._with_linear():
            self.engine.backward(loss)
            self.engine.step()

    def step(self):
        """Returns: the loss before the step, on the device."""
        loss = self.forward()
        self.learn(loss)
        return loss.detach()

    def close(self) -> None:
        from deepspeed.runtime.zero import parameter_offload

        self.engine.destroy()
        self.engine = self.batch = None
        # ZeRO-3 keeps its model, and with it all of the optimiser, in two places of the process.
        parameter_offload.FWD_MODULE_STACK.clear()
        for thing in gc.get_objects():
            if type(thing) is functools._lru_cache_wrapper and str(thing.__module__).startswith("deepspeed."):
                thing.cache_clear()

    @contextlib.contextmanager
    def _with_linear(self):
        import torch

        torchs, torch.nn.functional.linear = torch.nn.functional.linear, self._linear
        try:
            yield
        finally:
            torch.nn.functional.linear = torchs


def own_signals(start_world) -> None:
    """Join a group of one rank; a training run answers stop signals at the end of its step, a benchmark at once."""
    import signal

    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    start_world()
    for number, handler in kept.items():
        signal.signal(number, handler)


def fresh_compiler() -> None:
    """Forget compiled graphs and counts of an earlier row."""
    import torch
    from torch._dynamo.utils import clear_compilation_metrics, counters

    torch._dynamo.reset()
    counters.clear()
    clear_compilation_metrics()


def compiler_facts() -> tuple[int, int, int]:
    """Since `fresh_compiler`: graphs, graph breaks, and how often something was compiled again for other shapes or
    values.
    """
    from torch._dynamo.utils import counters, get_compilation_metrics

    again = {
        str(metrics.compile_id)
        for metrics in get_compilation_metrics()
        if metrics.compile_id and recompilation(str(metrics.compile_id))
    }
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), len(again)


def recompilation(compile_id: str) -> bool:
    """Of an id of torch.compile: FRAME/TIMES_COMPILED_BEFORE, with an ending that counts attempts."""
    return compile_id.split("/")[-1].split("_")[0] != "0"


HEADS = (
    "size",
    "ZeRO",
    "checkpointing",
    "compile",
    "stochastic depth by",
    "batch",
    "images/s (slowest to fastest)",
    "ratio",
    "MFU, measured ceiling",
    "MFU, data sheet",
)
HEADS += ("activations an image, MB", "peak, GiB", "start, s", "graphs, breaks, recompiled")


def table(rows: list[Row], ceilings: dict) -> str:
    bases = base_rows(rows)
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    return "\n".join(
        [*lines, *(f"| {' | '.join(cells(row, ceilings, bases.get(row.setting.size)))} |" for row in rows)]
    )


def base_rows(rows: list[Row]) -> dict[str, Row]:
    """The first row of each size, where it was measured."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.setting.size, row)
    return {size: row for size, row in first.items() if not row.failure}


def cells(row: Row, ceilings: dict, base: Row | None = None) -> list[str]:
    setting = row.setting
    asked = [setting.size, setting.zero, setting.checkpointing, setting.compile, setting.drop_by]
    if row.failure:
        return [*asked, str(row.batch or ""), row.failure, *[""] * (len(HEADS) - len(asked) - 2)]
    slowest, fastest = row.batch / max(row.seconds), row.batch / min(row.seconds)
    return [
        *asked,
        str(row.batch),
        f"{row.images_per_s:.4g} ({slowest:.4g} to {fastest:.4g})",
        f"{row.images_per_s / base.images_per_s:.2f}" if base else "",
        *(f"{value:.1%}" if value else "" for value in utilisation(row, ceilings)),
        f"{row.kept_bytes / row.batch / 1e6:.1f}",
        f"{row.peak_bytes / 2**30:.1f}" if row.peak_bytes else "",
        f"{row.start_s:.1f}",
        f"{row.graphs}, {row.breaks}, {row.recompiled}" if setting.compile != "none" else "",
    ]


def utilisation(row: Row, ceilings: dict) -> tuple[float | None, float | None]:
    """MFU over the measured ceiling and over the data sheet's; None where a figure would mislead or is not known."""
    import torch
    from matmul_ceiling import data_sheet_flops

    if row.skips:
        return None, None
    (dtype, ceiling), *others = ceilings.items()
    assert not others, "one precision a run"
    sheet = data_sheet_flops(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", dtype)
    rate = row.flops_per_image * row.images_per_s
    return rate / ceiling, rate / sheet if sheet else None


def plotted(rows: list[Row]) -> dict[str, list[tuple[str, float, float, float]]]:
    """For the plot, by size: label, ratio to the base, its smallest and largest."""
    found: dict[str, list] = {}
    for size, base in base_rows(rows).items():
        for row in rows:
            if row.setting.size == size and not row.failure:
                setting, ratio = row.setting, row.images_per_s / base.images_per_s
                middle = statistics.median(row.seconds)
                label = f"ZeRO-{setting.zero}, {setting.checkpointing}, compile {setting.compile}, {setting.drop_by}"
                found.setdefault(size, []).append(
                    (label, ratio, ratio * middle / max(row.seconds), ratio * middle / min(row.seconds))
                )
    return found


if __name__ == "__main__":
    run(main)
