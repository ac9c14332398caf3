"""How many collectives an optimiser step makes under each DeepSpeed JSON, how many bytes they carry, and what state a
rank holds.

    python -m benchmarks.collectives [--gpu] [--ranks 2] [--rounds 6] [--deepspeed_config FILE ...] [--record FILE.md]
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
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.engine_step import EngineTrainer
from benchmarks.record import at_least, benchmark_parser, markdown_table, parse, publish
from benchmarks.stages import launcher
from benchmarks.turns import measured, ratios, spread
from peco_ds.command_line import run
from peco_ds.config import PretrainRecipe
from peco_ds.deepspeed_json import DS_CONFIGS, read_deepspeed_json
from peco_ds.errors import UserError
from peco_ds.recipe_files import load_recipe
from peco_ds.runtime.distributed import World, start_world

# What is changed in which file; see EngineTrainer. "leaves" is ours.
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
READS = "reads"
GROUPS = {"gathers": ("allgather",), "reductions": ("reduce_scatter", "allreduce", "reduce"), READS: (READS,)}
MIB = 2**20


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = benchmark_parser(
        "collectives", __doc__, gpu="all blocks, on every GPU", overrides="settings of the recipes"
    )
    parser.add_argument("--recipes", nargs="+", default=list(MODELS), help="(default: %(default)s)")
    parser.add_argument("--ranks", type=at_least(1), help="(default: the GPUs of the machine, 2 without one)")
    rounds = "timed steps of each engine, by turns; 0: none (default: %(default)s)"
    parser.add_argument("--rounds", type=at_least(0), default=6, help=rounds)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows, by their names")
    parser.add_argument("--deepspeed_config", type=Path, nargs="+", default=[], metavar="FILE", help="further rows")
    parser.add_argument("--rows_to", type=Path, help=argparse.SUPPRESS)  # this process is a rank
    args = parse(parser, words)
    for name in args.only:
        if name not in CHANGES:
            raise UserError(f"--only {name!r}: no such row; there are {', '.join(CHANGES)}")
    if args.rows_to:
        return count(args)
    # before ranks are started, whose launcher would say much beside
    for name in args.recipes:
        load_recipe(PretrainRecipe, name, args.overrides)
    for file in args.deepspeed_config:
        read_deepspeed_json(file)
    with tempfile.TemporaryDirectory(prefix="peco_collectives_") as folder:
        rows = Path(folder) / "rows.json"
        command = launcher("torchrun", args.ranks or torch.cuda.device_count() or 2)
        command += ["-m", "benchmarks.collectives", "--rows_to", str(rows), *words]
        if code := subprocess.run(command).returncode:
            raise UserError(f"the ranks ended with {code}; what they said stands above")
        found = json.loads(rows.read_text())
    sys.stdout.write(publish(args, "Collectives of an optimiser step", tables(found), "deepspeed", "timm"))
    return 0


def count(args: argparse.Namespace) -> int:
    """One rank: every row of every model; rank 0 writes them down."""
    world = start_world()
    found: dict[str, dict] = {}
    for name in args.recipes:
        own = [*MODELS.get(name, ["run.micro_batch=1"]), *([] if args.gpu else CPU_BLOCKS.get(name, []))]
        own += args.overrides
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


def count_recipe(recipe: PretrainRecipe, world: World, args: argparse.Namespace, rounds: int) -> dict[str, dict]:
    """By name of the row: bytes held, collectives of a step, seconds of timed ones."""
    changes = {name: change for name, change in CHANGES.items() if not args.only or name in args.only}
    changes |= {str(path): (path, {}) for path in args.deepspeed_config}
    rows, trainers = {}, {}
    for name, (file, changed) in changes.items():
        before = held_bytes(world)
        values = {key: value for key, value in changed.items() if key != "leaves"}
        trainer = EngineTrainer(
            recipe,
            DS_CONFIGS / file,
            world.device,
            world_size=world.size,
            changed=values,
            leaves=changed.get("leaves", True),
        )
        for _ in range(WARM_UP):
            trainer.step()
        held = max(0, held_bytes(world) - before)
        rows[name] = {"held_bytes": held, "seconds": [], "collectives": collectives_of(trainer.step)}
        if rounds:
            trainers[name] = trainer
        else:
            trainer.close()
    timed = measured(
        {name: partial(timed_step, trainer, world) for name, trainer in trainers.items()}, rounds, warm_up=0
    )
    for name, seconds in timed.items():
        rows[name]["seconds"] = seconds
    return rows


def timed_step(trainer: EngineTrainer, world: World) -> float:
    world.barrier()
    begun = time.perf_counter()
    trainer.step()
    world.barrier()  # on a GPU it waits for the device too
    return time.perf_counter() - begun


def collectives_of(step: Callable[[], object]) -> dict[str, list[int]]:
    """What a call asks the process group for: operation -> [calls, bytes, bytes of the largest call].

    Of a gather the whole result, of a reduction the whole input.

    Under READS: how often a value was read back to the host.
    """
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


def held_bytes(world: World) -> int:
    """Bytes in use: of the device, or of the tensors that Python knows of, each storage once."""
    gc.collect()
    if world.device.type == "cuda":
        return torch.cuda.memory_allocated()
    storages = (
        thing.untyped_storage()
        for thing in gc.get_objects()
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu"
    )
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


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
        base = next(iter(rows))
        seconds = rows[base]["seconds"]
        about = (
            f"{name}, width {model['width']}, {model['depth']} blocks, {model['precision']}, "
            f"{model['ranks']} ranks. Of the third step; MiB with the largest call in brackets; `sent`: "
            "by a rank, on many ranks; `reads`: values read back to the host; "
            "`held`: state of a rank between two steps"
        )
        heads = ["", "gathers", "MiB", "reductions", "MiB", "others", "sent, MiB", "reads", "held, MiB"]
        if seconds:
            about += f"; time as a ratio to {base}, medians of {len(seconds)} steps by turns (smallest to largest)"
            heads.append("time")
        parts += [f"{about}.", markdown_table(heads, [(name, *cells(row, seconds)) for name, row in rows.items()])]
    return "\n\n".join(parts)


def cells(row: dict, base_seconds: list[float]) -> list[str]:
    calls = {group: [0, 0, 0] for group in (*GROUPS, "others")}
    for operation, (number, num_bytes, largest) in row["collectives"].items():
        total = calls[group_of(operation)]
        total[:] = total[0] + number, total[1] + num_bytes, max(total[2], largest)
    carried = [
        cell
        for number, num_bytes, largest in (calls["gathers"], calls["reductions"])
        for cell in (f"{number}", f"{num_bytes / MIB:.1f} ({largest / MIB:.1f})")
    ]
    sent, held = traffic_bytes(row["collectives"]) / MIB, row["held_bytes"] / MIB
    numbers = [f"{calls['others'][0]}", f"{sent:.1f}", f"{calls[READS][0]}", f"{held:.0f}"]
    return [*carried, *numbers, *([spread(ratios(row["seconds"], base_seconds))] if base_seconds else [])]


if __name__ == "__main__":
    run(main)
