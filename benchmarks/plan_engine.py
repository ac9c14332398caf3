"""The planner's figures beside what torch and DeepSpeed count: FLOPs, bytes of state a rank, traffic of an optimiser
step.

    python -m benchmarks.plan_engine [--ranks 1 2 4] [--only flops state traffic] [--gpu] [--record FILE.md]

FLOPs: torch's counter on the pre-training model, at a toy size and at full width with few blocks. State and traffic:
one launch for each number of ranks, in which real models of a small width train three optimiser steps through DeepSpeed
under the files of ds_configs and changes of them, buckets scaled down so that there are many. Traffic is what
DeepSpeed's own comms logger says of the third step; state is every storage that Python knows of (--gpu: what the
device's allocator holds) at the end of a forward and of a backward pass. Counts and bytes are those of any machine.
What a rank does: plan_engine_rank.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.record import at_least, benchmark_parser, markdown_table, parse, publish
from peco_ds.command_line import run
from peco_ds.config import FinetuneRecipe, PretrainRecipe
from peco_ds.errors import UserError
from peco_ds.planner.memory import GpuMemory, gpu_memory, saved_bytes
from peco_ds.planner.shapes import FLOPS_PER_MAC, mim_macs
from peco_ds.planner.traffic import Collective, TrainedTensor, step_collectives
from peco_ds.planner.work import Segment, finetune_segments, pretrain_segments
from peco_ds.recipe_files import load_recipe

PARTS = ("flops", "state", "traffic")
ROOT = Path(__file__).resolve().parent.parent


# ----------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One engine. `changed`: a key without a dot stands under zero_optimization."""

    name: str
    file: str
    changed: dict = field(default_factory=dict)
    micro_steps: int = 1
    precision: str = "bf16"
    model: str = "mim"  # a key of MODELS
    weighed: bool = False  # its state too, which takes longer

    def recipe(self, ranks: int = 1) -> PretrainRecipe | FinetuneRecipe:
        name, sizes = MODELS[self.model]
        settings = f"run.global_batch={ranks * self.micro_steps} run.precision={self.precision} {sizes}"
        kind = FinetuneRecipe if self.model == "classifier" else PretrainRecipe
        return load_recipe(kind, name, settings.split(), environ={}).recipe


_RUN = "run.micro_batch=1 run.compile=none model.image_px=64"
_MIM = f"{_RUN} views.tokenizer_px=64 mask.count=6 mask.min_block=2 objective.num_codes=256"
MODELS = {
    "mim": ("peco_vittiny16", f"{_MIM} model.depth=6 model.width=64 model.heads=4"),
    "classifier": ("finetune_vittiny16", f"{_RUN} model.depth=4 model.width=64 model.heads=4 augment.mixup=0"),
    # For bytes of state: wider, so that paddings and scalars are as small beside the rest as in a real model.
    "wide mim": ("peco_vittiny16", f"{_MIM} model.depth=12 model.width=192 model.heads=3"),
}
NUM_CLASSES = 10

# Scaled down as the models are: a bucket holds one to two blocks, as ds_configs have it for ViT-H.
FLAT = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
SCATTERED = {"reduce_bucket_size": 60_000, "stage3_prefetch_bucket_size": 60_000}
BF16_SUMS = {"data_types.grad_accum_dtype": "bf16"}

TRAFFIC = (
    Case("zero0", "zero0.json"),
    Case("zero0, 3 micro-steps", "zero0.json", micro_steps=3),
    Case("zero0, fp32", "zero0.json", precision="fp32"),
    Case("zero1", "zero1.json", FLAT),
    Case("zero1, 3 micro-steps", "zero1.json", FLAT, micro_steps=3),
    Case("zero1, summed in bf16", "zero1.json", FLAT | BF16_SUMS, micro_steps=3),
    Case("zero1, summed in bf16, no overlap", "zero1.json", FLAT | BF16_SUMS | {"overlap_comm": False}),
    Case("zero1, fp32", "zero1.json", FLAT, precision="fp32"),
    Case("zero1, classifier", "zero1.json", FLAT, model="classifier"),
    Case("zero2", "zero2.json", FLAT),
    Case("zero2, 3 micro-steps", "zero2.json", FLAT, micro_steps=3),
    Case("zero2, no overlap", "zero2.json", FLAT | {"overlap_comm": False}),
    Case("zero2, reduce_scatter false", "zero2.json", FLAT | {"reduce_scatter": False}),
    Case("zero2, reduced to owners", "zero2.json", FLAT | {"use_multi_rank_bucket_allreduce": False}),
    Case("zero2, reduced in bf16", "zero2.json", FLAT | {"communication_data_type": "bf16"}),
    Case("zero2, classifier", "zero2.json", FLAT, model="classifier"),
    Case("zero3", "zero3.json", SCATTERED),
    Case("zero3, 3 micro-steps", "zero3.json", SCATTERED, micro_steps=3),
    Case("zero3, fp32", "zero3.json", SCATTERED, precision="fp32"),
    Case("zero3, shipped buckets", "zero3.json"),
    Case("zero3, no prefetch", "zero3.json", SCATTERED | {"stage3_prefetch_bucket_size": 0}),
    Case("zero3, short prefetch", "zero3.json", SCATTERED | {"stage3_prefetch_bucket_size": 10_000}),
    Case("zero3, reuse distance 0", "zero3.json", SCATTERED | {"stage3_max_reuse_distance": 0}),
    Case(
        "zero3, reuse distance of three blocks",
        "zero3.json",
        SCATTERED | {"stage3_prefetch_bucket_size": 10_000, "stage3_max_reuse_distance": 150_000},
    ),
    Case("zero3, live parameters of three blocks", "zero3.json", SCATTERED | {"stage3_max_live_parameters": 150_000}),
    Case(
        "zero3, neither live nor reused",
        "zero3.json",
        SCATTERED | {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0},
    ),
    Case("zero3, persistence 1000", "zero3.json", SCATTERED | {"stage3_param_persistence_threshold": 1000}),
    Case("zero3, reduce bucket of a third block", "zero3.json", SCATTERED | {"reduce_bucket_size": 17_000}),
    Case("zero3, reduce_scatter false", "zero3.json", SCATTERED | {"reduce_scatter": False}),
    Case("zero3, reduced in bf16", "zero3.json", SCATTERED | {"communication_data_type": "bf16"}),
    Case("zero3, no overlap", "zero3.json", SCATTERED | {"overlap_comm": False}),
    Case("zero3, clipping off", "zero3.json", SCATTERED | {"gradient_clipping": 0.0}),
    Case("zero3, classifier", "zero3.json", SCATTERED, model="classifier"),
    Case("zero3_offload", "zero3_offload.json", SCATTERED),
)


def _weighed(name: str, stage: int, changed: dict, *, summed: str = "fp32", **more) -> Case:
    buckets = {"reduce_bucket_size": 300_000} if stage else {}
    buckets |= {"stage3_prefetch_bucket_size": 300_000} if stage == 3 else {}
    changed = {"data_types.grad_accum_dtype": summed} | buckets | changed
    return Case(name, f"zero{stage}.json", changed, **{"micro_steps": 2} | more, model="wide mim", weighed=True)


STATE = (
    _weighed("ZeRO-0, bf16", 0, {}, summed="auto"),
    _weighed("ZeRO-1, bf16", 1, {}),
    _weighed("ZeRO-1, bf16, summed in bf16", 1, {}, summed="bf16"),
    _weighed("ZeRO-2, bf16", 2, {}),
    _weighed("ZeRO-2, bf16, one bucket", 2, {"overlap_comm": False}),
    _weighed("ZeRO-2, bf16, summed in bf16", 2, {}, summed="bf16"),
    _weighed("ZeRO-3, bf16", 3, {}),
    _weighed("ZeRO-3, bf16, summed in bf16", 3, {}, summed="bf16"),
    _weighed("ZeRO-3, bf16, live parameters 0", 3, {"stage3_max_live_parameters": 0}),
    _weighed("ZeRO-0, fp32", 0, {}, precision="fp32", summed="auto"),
    _weighed("ZeRO-1, fp32", 1, {}, precision="fp32"),
    _weighed("ZeRO-2, fp32", 2, {}, precision="fp32"),
    _weighed("ZeRO-3, fp32", 3, {}, precision="fp32"),
)
_OPTIMIZER, _WEIGHTS = {"offload_optimizer": {"device": "cpu"}}, {"offload_param": {"device": "cpu"}}
OFFLOADED = (
    _weighed("ZeRO-1, optimiser offloaded", 1, _OPTIMIZER),
    _weighed("ZeRO-1, optimiser offloaded, summed in bf16", 1, _OPTIMIZER, summed="bf16"),
    _weighed("ZeRO-2, optimiser offloaded", 2, _OPTIMIZER),
    _weighed("ZeRO-2, optimiser offloaded, summed in bf16", 2, _OPTIMIZER, summed="bf16"),
    _weighed(
        "ZeRO-2, optimiser offloaded, summed in bf16, one micro-step", 2, _OPTIMIZER, summed="bf16", micro_steps=1
    ),
    _weighed("ZeRO-3, optimiser offloaded", 3, _OPTIMIZER),
    _weighed("ZeRO-3, optimiser offloaded, summed in bf16", 3, _OPTIMIZER, summed="bf16"),
    _weighed("ZeRO-3, optimiser and weights offloaded", 3, _OPTIMIZER | _WEIGHTS),
)


# -------------------------------------------------------------------------------- what the engine does


def measure(cases: Iterable[Case], ranks: int, folder: Path, *, gpu: bool = False) -> list[dict]:
    """One launch: what rank 0 of `ranks` counted for each case, as `plan_engine_rank.count_case` gives it.

    Args:
        gpu: a rank on each of the first GPUs of this machine, and not on its processors.
    Raises: UserError if the ranks fail.
    """
    asked, rows = folder / f"cases_{ranks}.json", folder / f"rows_{ranks}.json"
    asked.write_text(json.dumps([asdict(case) for case in cases]))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *launch, "-m", "benchmarks.plan_engine_rank", str(asked), str(rows)]
    environ = os.environ | ({} if gpu else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=ROOT)
    if done.returncode:
        # then the launcher's own words
        said = " ".join(done.stderr.split("torch/distributed/run.py")[0][-1000:].split())
        raise UserError(f"{ranks} ranks ended with {done.returncode}; the last they said: {said}")
    return json.loads(rows.read_text())


def plain_name(operation: str) -> str:
    """A name of the process group's, as the planner calls it."""
    name = operation.strip("_")
    return next((plain for start, plain in _NAMES.items() if name.startswith(start)), name)


_NAMES = {
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "reduce": "reduce",
}


def logged_sums(row: dict, ranks: int) -> dict[str, list[float]]:
    """Operation -> [calls, bytes]. DeepSpeed's logger counts what a rank puts in: of a gather its own part."""
    found: dict[str, list[float]] = {}
    for operation, (calls, num_bytes) in row["logged"].items():
        entry = found.setdefault(plain_name(operation), [0, 0])
        entry[0] += calls
        entry[1] += num_bytes * (ranks if plain_name(operation) == "all_gather" else 1)
    return found


def worst_moment(row: dict) -> tuple[str, int]:
    """When the most is held, and how much."""
    return max(row["held"].items(), key=lambda item: item[1])


# ------------------------------------------------------------------------------- what the planner says


def segments_of(case: Case) -> tuple[Segment, ...]:
    """As a plan has them: from the recipe alone."""
    recipe = case.recipe()
    return finetune_segments(recipe, NUM_CLASSES) if case.model == "classifier" else pretrain_segments(recipe)


def predicted_calls(case: Case, row: dict, ranks: int, *, by_module: bool) -> tuple[Collective, ...]:
    """`by_module`: told which tensors the modules of the real model hold, or with a plan's own segments."""
    held = [[[TrainedTensor(*tensor) for tensor in module] for module in segment] for segment in row["modules"]]
    return step_collectives(
        segments_of(case),
        ds_config=row["ds_config"],
        precision=case.precision,
        micro_steps=case.micro_steps,
        ranks=ranks,
        groups=row["groups"],
        modules=held if by_module else None,
    )


def sums(collectives: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    """(operation, bytes) pairs -> operation -> [calls, bytes]."""
    found: dict[str, list[float]] = {}
    for operation, num_bytes in collectives:
        entry = found.setdefault(operation, [0, 0])
        entry[0] += 1
        entry[1] += num_bytes
    return found


def sizes_of(case: Case, row: dict, ranks: int) -> tuple[int, dict]:
    """Trained parameters, and what else the planner's formulas of memory take."""
    elements = sum(elements for segment in row["modules"] for module in segment for elements, _ in module)
    stage = row["ds_config"]["zero_optimization"]["stage"]
    return elements, dict(stage=stage, world_size=ranks, precision=case.precision)


def predicted_memory(case: Case, row: dict, ranks: int) -> GpuMemory:
    elements, sizes = sizes_of(case, row, ranks)
    return gpu_memory(elements, ds_config=row["ds_config"], **sizes)


# ----------------------------------------------------------------------------------------------- FLOPs

FULL_WIDTH = {
    "peco_vitb16": "model.depth=3",
    "peco_vith14": "model.depth=2",
    "beitv2_vitl16": "model.depth=3 aggregation.early_block=2 aggregation.blocks=1",
    "peco_vith14_visible": "model.depth=4",
}


@dataclass(frozen=True)
class Flops:
    """Of one image."""

    forward: float
    training: float


def counted_flops(recipe: PretrainRecipe) -> Flops:
    """What torch's counter sees in the kernels.

    The plain attention kernel, because the counter does not know a CPU's fused one.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from peco_ds.models.mim import build_mim

    side = recipe.model.image_px
    model = build_mim(recipe.model, recipe.encoding, recipe.aggregation, recipe.objective.num_codes)
    images, masked = torch.randn(1, 3, side, side), torch.arange(recipe.mask.count).expand(1, -1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        output = model(images, masked)
        loss = sum(logits.sum() for logits in (output.logits, output.aggregated_logits) if logits is not None)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        loss.backward()
    return Flops(forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops())


def predicted_flops(recipe: PretrainRecipe) -> Flops:
    macs = mim_macs(
        recipe.model,
        num_codes=recipe.objective.num_codes,
        masked=recipe.mask.count,
        encoding=recipe.encoding,
        aggregation=recipe.aggregation,
    )
    return Flops(FLOPS_PER_MAC * macs.total, macs.training_flops)


def flops_recipes() -> dict[str, PretrainRecipe]:
    asked = {"toy": MODELS["wide mim"]} | {name: (name, changes) for name, changes in FULL_WIDTH.items()}
    return {
        name: load_recipe(PretrainRecipe, source, ["run.compile=none", *changes.split()], environ={}).recipe
        for name, (source, changes) in asked.items()
    }


# ---------------------------------------------------------------------------------------------- tables

Counted = dict[int, list[tuple[Case, dict]]]  # by ranks


def flops_table() -> str:
    heads = ("", "blocks x width", "forward", "counted", "error", "forward and backward", "counted", "error")
    rows = []
    for name, recipe in flops_recipes().items():
        said, seen = predicted_flops(recipe), counted_flops(recipe)
        cells = [name, f"{recipe.model.depth} x {recipe.model.width}"]
        for one, other in ((said.forward, seen.forward), (said.training, seen.training)):
            cells += [f"{one / 1e6:,.1f}", f"{other / 1e6:,.1f}", f"{one / other - 1:+.2%}"]
        rows.append(cells)
    return f"FLOP of one image, in millions.\n\n{markdown_table(heads, rows)}\n"


def state_table(found: Counted) -> str:
    heads = ("", "ranks", "state", "counted", "error", "when", "copies", "counted")
    rows = []
    for ranks, case, row in _flat(found):
        memory, (moment, held) = predicted_memory(case, row, ranks), worst_moment(row)
        elements, sizes = sizes_of(case, row, ranks)
        total = memory.state + (memory.host if row["device"] == "cpu" else 0)
        cells = [case.name, ranks, f"{total / 1e3:,.1f}", f"{held / 1e3:,.1f}", f"{total / held - 1:+.2%}", moment]
        copies = (saved_bytes(elements, first_rank=True, **sizes), row["saved"][0])
        rows.append([*cells, *(f"{num_bytes / 1e3:,.1f}" for num_bytes in copies)])
    return (
        "State of a rank at its worst moment, kB; on CPUs what is offloaded counts too. Beside it the copies that "
        f"rank 0 saves from.\n\n{markdown_table(heads, rows)}\n"
    )


def traffic_table(found: Counted) -> str:
    heads = ("", "ranks", "operation", "calls", "counted", "kB", "counted", "error")
    rows = []
    for ranks, case, row in _flat(found):
        said = sums((call.operation, call.num_bytes) for call in predicted_calls(case, row, ranks, by_module=False))
        seen = logged_sums(row, ranks)
        for operation in sorted(said.keys() | seen.keys()):
            (calls, num_bytes), (seen_calls, seen_bytes) = said.get(operation, (0, 0)), seen.get(operation, (0, 0))
            error = f"{num_bytes / seen_bytes - 1:+.2%}" if seen_bytes else "none counted"
            sizes = (f"{num_bytes / 1e3:,.2f}", f"{seen_bytes / 1e3:,.2f}")
            rows.append([case.name, ranks, operation, calls, seen_calls, *sizes, error])
    return (
        "Collectives of one optimiser step: calls and kB (of a gather the whole result, of a reduction the whole "
        "input), as the planner has them from the recipe, and in DeepSpeed's comms logger.\n\n"
        f"{markdown_table(heads, rows)}\n"
    )


def _flat(found: Counted) -> list[tuple[int, Case, dict]]:
    return [(ranks, case, row) for ranks, cases in found.items() for case, row in cases]


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser("plan_engine", __doc__, gpu="the ranks on the GPUs of this machine")
    launches = "a launch each (default: %(default)s)"
    parser.add_argument("--ranks", type=at_least(1), nargs="+", default=[1, 2, 4], help=launches)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    args = parse(parser, argv)
    if args.gpu:
        _require_gpus(max(args.ranks))
    asked: dict[str, Sequence[Case]] = {"state": (*STATE, *OFFLOADED), "traffic": TRAFFIC}
    found: dict[str, Counted] = {part: {} for part in asked if part in args.only}
    tables = [flops_table()] if "flops" in args.only else []
    with tempfile.TemporaryDirectory(prefix="peco_plan_engine_") as folder:
        for ranks in args.ranks if found else []:
            # One rank has no traffic.
            cases = [(part, case) for part in found for case in asked[part] if part == "state" or ranks > 1]
            rows = measure([case for _, case in cases], ranks, Path(folder), gpu=args.gpu) if cases else []
            for (part, case), row in zip(cases, rows):
                found[part].setdefault(ranks, []).append((case, row))
    tables += [{"state": state_table, "traffic": traffic_table}[part](counted) for part, counted in found.items()]
    title = "The planner beside what torch and DeepSpeed count"
    sys.stdout.write(publish(args, title, "\n".join(tables), "deepspeed", "timm"))
    return 0


def _require_gpus(ranks: int) -> None:
    import torch

    if ranks > torch.cuda.device_count():
        raise UserError(
            f"--ranks {ranks} with --gpu: this machine has {torch.cuda.device_count()} GPUs, a rank takes one; give "
            "fewer"
        )


if __name__ == "__main__":
    run(main)
