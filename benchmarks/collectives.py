"""How many collectives an optimiser step makes under each DeepSpeed JSON, how many bytes they carry, and what state a
rank holds.

    python benchmarks/collectives.py [--gpu] [--ranks 2] [--rounds 6] [--deepspeed_config FILE ...] [--record FILE.md]
    [key.sub=value ...]

Two models: peco_vith14 at full width with 2 of its blocks, and peco_vittiny16 whole. Each JSON of ds_configs, and each
of them with one value changed, drives the same step through DeepSpeed; what the process group is asked for is counted
in the third step, when ZeRO-3 has learnt in which order it needs its weights. Counts and bytes are those of any
machine. The small model's engines also take steps by turns: those times are gloo's on one host and say little of a GPU.
--gpu: on every GPU of the machine, all 32 blocks, and times of both. Overrides go to both models; --deepspeed_config
adds rows.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from record import at_least, require_gpu

from peco_ds.command_line import Parser, run
from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.errors import UserError

# What is changed in which file; a key without a dot stands under zero_optimization, "leaves" is ours.
CHANGES = {
    "zero0": ("zero0.json", {}),
    "zero1": ("zero1.json", {}),
    "zero1, reduce bucket 5e8": ("zero1.json", {"reduce_bucket_size": 500_000_000}),
    "zero1, reduced to owners": ("zero1.json", {"use_multi_rank_bucket_allreduce": False}),
    "zero2": ("zero2.json", {}),
    "zero2, reduced to owners": ("zero2.json", {"use_multi_rank_bucket_allreduce": False}),
    "zero3": ("zero3.json", {}),
    "zero3, persistence 0": ("zero3.json", {"stage3_param_persistence_threshold": 0}),
    "zero3, persistence 1e5": ("zero3.json", {"stage3_param_persistence_threshold": 100_000}),
    "zero3, persistence 1e6": ("zero3.json", {"stage3_param_persistence_threshold": 1_000_000}),
    "zero3, blocks no leaves": ("zero3.json", {"leaves": False}),
    "zero3, no prefetch": ("zero3.json", {"stage3_prefetch_bucket_size": 0}),
    "zero3, reduce bucket 5e8": ("zero3.json", {"reduce_bucket_size": 500_000_000}),
    "zero3, reuse distance 0": ("zero3.json", {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}),
    "zero3, reduced in bf16": ("zero3.json", {"communication_data_type": "bf16"}),
}
MODELS = {"peco_vith14": ["run.micro_batch=1"], "peco_vittiny16": ["run.micro_batch=2"]}
CPU_BLOCKS = {"peco_vith14": ["model.depth=2"]}
# steps: in the first one ZeRO-3 records its order, in the second it first follows it
WARM_UP = 2


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="all blocks, on every GPU")
    parser.add_argument("--recipes", nargs="+", default=list(MODELS), help="(default: %(default)s)")
    parser.add_argument("--ranks", type=at_least(1), help="(default: the GPUs of the machine, 2 without one)")
    parser.add_argument(
        "--rounds",
        type=at_least(0),
        default=6,
        help="timed steps of each engine, by turns; 0: none (default: %(default)s)",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows, by their names")
    parser.add_argument("--deepspeed_config", type=Path, nargs="+", default=[], metavar="FILE", help="further rows")
    parser.add_argument("--record", type=Path, help="also write the tables to this file")
    parser.add_argument("--rows_to", type=Path, help=argparse.SUPPRESS)  # this process is a rank
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings of the recipes")
    args = parser.parse_intermixed_args(argv)
    unknown = [name for name in args.only if name not in CHANGES]
    if unknown:
        raise UserError(f"--only {unknown[0]!r}: no such row; there are {', '.join(CHANGES)}")
    if args.rows_to:
        return count(args)
    if args.gpu:
        require_gpu()
    from peco_ds.config import PretrainRecipe
    from peco_ds.deepspeed_json import read_deepspeed_json
    from peco_ds.recipe_files import load_recipe

    # before ranks are started, whose launcher would say much beside
    for name in args.recipes:
        load_recipe(PretrainRecipe, name, args.overrides)
    for file in args.deepspeed_config:
        read_deepspeed_json(file)
    with tempfile.TemporaryDirectory(prefix="peco_collectives_") as folder:
        rows = Path(folder) / "rows.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(args.ranks or _gpus() or 2),
            __file__,
            "--rows_to",
            str(rows),
        ]
        code = subprocess.run([*command, *(sys.argv[1:] if argv is None else argv)]).returncode
        if code:
            raise UserError(f"the ranks ended with {code}; what they said stands above")
        found = json.loads(rows.read_text())
    body = tables(found)
    sys.stdout.write(body + "\n")
    if args.record:
        from record import write_record

        shown = shlex.join(["python", "benchmarks/collectives.py", *(sys.argv[1:] if argv is None else argv)])
        write_record(args.record, "Collectives of an optimiser step", shown, body, "deepspeed", "timm")
    return 0


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def count(args: argparse.Namespace) -> int:
    """One rank: every row of every model; rank 0 writes them down."""
    from peco_ds.config import PretrainRecipe
    from peco_ds.recipe_files import load_recipe
    from peco_ds.runtime.distributed import start_world

    world = start_world()
    found: dict[str, dict] = {}
    for name in args.recipes:
        own = [
            *MODELS.get(name, ["run.micro_batch=1"]),
            *([] if args.gpu else CPU_BLOCKS.get(name, [])),
            *args.overrides,
        ]
        micro_batch = load_recipe(PretrainRecipe, name, own).recipe.run.micro_batch
        recipe = load_recipe(PretrainRecipe, name, [*own, f"run.global_batch={micro_batch * world.size}"]).recipe
        timed = args.rounds if args.gpu or name not in CPU_BLOCKS else 0
        found[name] = {
            "depth": recipe.model.depth,
            "width": recipe.model.width,
            "precision": recipe.run.precision,
            "ranks": world.size,
            "rows": count_recipe(recipe, world, args, timed),
        }
    if world.is_main:
        args.rows_to.write_text(json.dumps(found))
    return 0


def count_recipe(recipe, world, args: argparse.Namespace, rounds: int) -> dict[str, dict]:
    import copy

    from peco_ds.models.mim import build_mim

    model = build_mim(recipe.model, recipe.encoding, recipe.aggregation, recipe.objective.num_codes)
    changes = {name: change for name, change in CHANGES.items() if not args.only or name in args.only}
    changes |= {str(path): (path, {}) for path in args.deepspeed_config}
    rows, trainees = {}, {}
    for name, (file, changed) in changes.items():
        before = _held_bytes(world)
        trainee = _Trainee(copy.deepcopy(model), recipe, DS_CONFIGS / file, changed, world)
        for _ in range(WARM_UP):
            trainee.step()
        rows[name] = {
            "held_bytes": max(0, _held_bytes(world) - before),
            "seconds": [],
            "collectives": collectives_of(trainee.step),
        }
        if rounds:
            trainees[name] = trainee
        else:
            trainee.destroy()
    for number in range(rounds):
        for name in list(trainees)[:: 1 if number % 2 else -1]:
            rows[name]["seconds"].append(trainees[name].timed_step())
    return rows


def collectives_of(step) -> dict[str, list[int]]:
    """What a call asks the process group for: operation -> [calls, bytes, bytes of the largest call].

    Of a gather the whole result, of a reduction the whole input.

    Under READS: how often a value was read back to the host.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    found: dict[str, list[int]] = {}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation._schema.name == "aten::_local_scalar_dense":
                found.setdefault(READS, [0, 0, 0])[0] += 1
            if operation.namespace == "c10d":
                sides = [sum(leaf.nbytes for leaf in tree_leaves(side) if hasattr(leaf, "nbytes")) for side in args[:2]]
                entry = found.setdefault(operation._schema.name.split("::")[1].strip("_"), [0, 0, 0])
                entry[0] += 1
                entry[1] += max(sides)
                entry[2] = max(entry[2], *sides)
            return operation(*args, **(kwargs or {}))

    with Counting():
        step()
    return found


def _held_bytes(world) -> int:
    """Bytes in use: of the device, or of the tensors that Python knows of, each storage once."""
    import gc

    import torch

    gc.collect()
    if world.device.type == "cuda":
        return torch.cuda.memory_allocated()
    storages = (
        thing.untyped_storage()
        for thing in gc.get_objects()
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu"
    )
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class _Trainee:
    """An engine of a recipe, and one batch."""

    def __init__(self, model, recipe, config: Path, changed: dict, world) -> None:
        import torch

        from peco_ds.data.loaders import Codes, masked_targets
        from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
        from peco_ds.models.vit import TransformerBlock
        from peco_ds.objectives import build_objective
        from peco_ds.runtime.engine import start_engine

        merged = merge_deepspeed(read_deepspeed_json(config), config, recipe.run, recipe.optim, world.size)
        leaves = changed.get("leaves", True)
        for key, value in changed.items():
            if key == "communication_data_type":
                merged[key] = value
            elif key != "leaves":
                merged["zero_optimization"][key] = value
        self._world, self._objective = world, build_objective(recipe.objective)
        self._engine = start_engine(
            model,
            merged,
            source=config,
            run=recipe.run,
            optim=recipe.optim,
            leaf_modules=(TransformerBlock,) if leaves else (),
        )
        batch, size, patches = recipe.run.micro_batch, recipe.model.image_px, recipe.model.grid**2
        self._images = torch.randn(batch, 3, size, size, device=world.device)
        self._masked = torch.arange(recipe.mask.count, device=world.device).expand(batch, -1)
        self._targets = masked_targets(
            Codes(torch.randint(recipe.objective.num_codes, (batch, patches), device=world.device)), self._masked
        )

    def step(self) -> None:
        loss = self._objective(self._engine(self._images, self._masked), self._targets)[0]
        self._engine.backward(loss)
        self._engine.step()

    def destroy(self) -> None:
        """Give back the engine's memory: hooks of DeepSpeed's keep it otherwise."""
        self._engine.destroy()
        for owner in (self._engine.optimizer, self._engine.basic_optimizer, self._engine.module, self._engine):
            vars(owner).clear()
        self._engine = None

    def timed_step(self) -> float:
        self._world.barrier()
        begun = time.perf_counter()
        self.step()
        self._world.barrier()  # on a GPU it waits for the device too
        return time.perf_counter() - begun


READS = "reads"
GROUPS = {"gathers": ("allgather",), "reductions": ("reduce_scatter", "allreduce", "reduce"), READS: (READS,)}


def group_of(operation: str) -> str:
    return next((group for group, starts in GROUPS.items() if operation.startswith(starts)), "others")


def traffic_bytes(collectives: dict[str, list[int]]) -> int:
    """What a rank sends a step on many ranks: once the whole of a gather or a reduce-scatter, twice that of an
    all-reduce.
    """
    return sum(
        num_bytes * (2 if operation.startswith("allreduce") else 1)
        for operation, (_, num_bytes, _) in collectives.items()
    )


def tables(found: dict[str, dict]) -> str:
    """A table a model, as markdown."""
    parts = []
    for name, model in found.items():
        rows = model["rows"]
        first = next(iter(rows.values()))
        timed = bool(first["seconds"])
        parts += [
            f"{name}, width {model['width']}, {model['depth']} blocks, {model['precision']}, "
            f"{model['ranks']} ranks. Of the third step; MiB with the largest call in brackets; `sent`: "
            "by a rank, on many ranks; `reads`: values read back to the host; "
            "`held`: state of a rank between two steps"
            + (
                f"; time as a ratio to {next(iter(rows))}, medians of {len(first['seconds'])} steps by turns "
                "(smallest to largest)."
                if timed
                else "."
            ),
            "",
            "| | gathers | MiB | reductions | MiB | others | sent, MiB | reads | held, MiB |"
            + (" time |" if timed else ""),
            "|---|---|---|---|---|---|---|---|---|" + ("---|" if timed else ""),
        ]
        for row_name, row in rows.items():
            cells = []
            for group in ("gathers", "reductions"):
                entries = [entry for operation, entry in row["collectives"].items() if group_of(operation) == group]
                calls, num_bytes, largest = (
                    sum(entry[0] for entry in entries),
                    sum(entry[1] for entry in entries),
                    max((entry[2] for entry in entries), default=0),
                )
                cells += [str(calls), f"{num_bytes / 2**20:.1f} ({largest / 2**20:.1f})"]
            cells += [
                str(sum(entry[0] for operation, entry in row["collectives"].items() if group_of(operation) == "others"))
            ]
            cells += [
                f"{traffic_bytes(row['collectives']) / 2**20:.1f}",
                str(row["collectives"].get(READS, [0])[0]),
                f"{row['held_bytes'] / 2**20:.0f}",
            ]
            if timed:
                ratios = [ours / theirs for ours, theirs in zip(row["seconds"], first["seconds"])]
                cells += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
            parts.append(f"| {row_name} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    run(main)
