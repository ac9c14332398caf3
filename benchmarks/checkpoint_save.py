"""What does a checkpoint of about 1 GB cost a run? Ours against DeepSpeed's plain `save_checkpoint`, of the same engine
in the same run, by turns.

    python benchmarks/checkpoint_save.py [--folder SCRATCH] [--ranks 2] [--rounds 7] [--record
    benchmarks/checkpoint_save_HARDWARE_YYYYMM.md]

The engine is masked pre-training of ViT-B/16 under ZeRO, on made-up images (values do not matter to a disk).
Measured, as the slowest rank sees it: how long the training loop stands still for a save, how long until the checkpoint
is complete (ours: hashed, fsynced and renamed; DeepSpeed's: handed to the system), how much longer the training steps
beside the writing take, and how long it takes to resume (ours verifies every byte first). Before each measurement the
system's dirty pages are written out. Each file is in the page cache when it is read back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where checkpoints lie while it runs: 4 times their size (default: the system's temporary folder)",
    )
    parser.add_argument("--recipe", default="peco_vitb16", help="of the model (default: %(default)s)")
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        default=HERE.parent / "ds_configs" / "zero3.json",
        help="(default: ds_configs/zero3.json)",
    )
    parser.add_argument("--ranks", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=7, help="measurements of each kind, 2 or more (default: %(default)s)"
    )
    parser.add_argument("--record", type=Path, help="also write the table to this file")
    parser.add_argument("--rank_work", type=Path, help=argparse.SUPPRESS)  # the ranks' own start
    args = parser.parse_args()
    if args.rank_work:
        measure(args.rank_work, args.recipe, args.deepspeed_config, args.rounds)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(args.ranks),
            __file__,
            "--rank_work",
            folder,
        ]
        subprocess.run(
            [
                *launch,
                "--recipe",
                args.recipe,
                "--deepspeed_config",
                str(args.deepspeed_config),
                "--rounds",
                str(args.rounds),
            ],
            check=True,
        )
        found = json.loads((Path(folder) / "found.json").read_text())
    text = record(args, found)
    sys.stdout.write(text)
    if args.record:
        args.record.write_text(text)
    return 0


class EveryTime:
    """In place of a run's durations: a checkpoint whenever `due` is set."""

    due = False

    def save_after(self, _step: int) -> bool:
        return self.due


class Unmetered:
    """In place of a run's meter."""

    @contextmanager
    def paused(self, _kind: str):
        yield

    def state(self) -> dict:
        return {}

    def load_state(self, states: list) -> None:
        pass


def measure(folder: Path, recipe_name: str, deepspeed_config: Path, rounds: int) -> None:
    """One rank of the run; rank 0 writes folder/found.json."""
    import torch

    from peco_ds.command_line import leave
    from peco_ds.config import PretrainRecipe
    from peco_ds.data.loaders import MaskedTargets
    from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
    from peco_ds.models.mim import MaskedImageModel
    from peco_ds.models.vit import TransformerBlock
    from peco_ds.objectives import build_objective
    from peco_ds.recipe_files import load_recipe
    from peco_ds.runtime.checkpoint.save_restore import Saver, restore
    from peco_ds.runtime.distributed import seed_all, start_world
    from peco_ds.runtime.engine import start_engine
    from peco_ds.runtime.run_folder import open_run_folder

    world = start_world()
    overrides = [
        f"data.root={folder}",
        f"run.global_batch={world.size}",
        "run.micro_batch=1",
        "checkpoint.every_minutes=0",
        "checkpoint.keep_last=1",
    ]
    resolved = load_recipe(PretrainRecipe, recipe_name, overrides)
    cfg, run = resolved.recipe, resolved.recipe.run
    ds_config = merge_deepspeed(read_deepspeed_json(deepspeed_config), deepspeed_config, run, cfg.optim, world.size)
    out, plain_out = folder / "run", folder / "plain"
    open_run_folder(out, "pretrain", resolved, ds_config, {}, world)
    seed_all(run.seed)
    model = MaskedImageModel(cfg.model, cfg.objective.num_codes)
    engine = start_engine(
        model, ds_config, source=deepspeed_config, run=run, optim=cfg.optim, leaf_modules=(TransformerBlock,)
    )
    plain, plain_copy = engine.checkpoint_engine, engine._copy_recovery_script
    restored = restore(out, engine, cfg.checkpoint, world, fingerprint="0" * 64, seed=run.seed)
    due = EveryTime()
    saver = Saver(
        out,
        engine,
        restored,
        settings=cfg.checkpoint,
        durations=due,
        global_batch=run.global_batch,
        world=world,
        parts={"meter": Unmetered()},
        shared={},
    )
    ours, ours_copy = engine.checkpoint_engine, engine._copy_recovery_script

    images = torch.randn(1, 3, cfg.model.image_px, cfg.model.image_px, device=world.device)
    masked = torch.arange(cfg.mask.count, device=world.device)[None]
    objective, targets = build_objective(cfg.objective), MaskedTargets(torch.zeros_like(masked), masked, None, None)

    def train_one() -> None:
        loss, _ = objective(engine(images, masked), targets)
        engine.backward(loss)
        engine.step()

    def timed(work) -> float:
        """Seconds until the slowest rank is done."""
        if world.is_main:
            os.sync()
        world.barrier()
        began = time.perf_counter()
        work()
        return slowest(time.perf_counter() - began)

    def slowest(seconds: float) -> float:
        return max(world.gather_objects(seconds))

    step = 0

    def save_ours(found: dict, train_beside: bool) -> None:
        """Either how long a training step takes beside the writing, or how long the writing takes alone."""
        nonlocal step
        engine.checkpoint_engine, engine._copy_recovery_script = ours, ours_copy
        step, due.due = step + 1, True
        found["blocks_s"].append(timed(lambda: saver.close_step(step)))
        due.due = False
        before = time.perf_counter()
        if train_beside:
            train_one()
            found["step_beside_s"].append(slowest(time.perf_counter() - before))
        saver.finish()
        if not train_beside:
            found["complete_s"].append(found["blocks_s"][-1] + slowest(time.perf_counter() - before))

    def save_plain(found: dict, train_beside: bool) -> None:
        engine.checkpoint_engine, engine._copy_recovery_script = plain, plain_copy
        if world.is_main:
            shutil.rmtree(plain_out, ignore_errors=True)
        world.barrier()
        found["blocks_s"].append(timed(lambda: engine.save_checkpoint(str(plain_out), tag="plain")))
        found["complete_s"].append(found["blocks_s"][-1])
        if train_beside:
            before = time.perf_counter()
            train_one()
            found["step_alone_s"].append(slowest(time.perf_counter() - before))

    def resume_ours(found: dict) -> None:
        engine.checkpoint_engine = ours
        found["resumes_s"].append(
            timed(lambda: restore(out, engine, cfg.checkpoint, world, fingerprint="0" * 64, seed=run.seed))
        )

    def resume_plain(found: dict) -> None:
        engine.checkpoint_engine = plain
        found["resumes_s"].append(timed(lambda: engine.load_checkpoint(str(plain_out), tag="plain")))

    names = ("blocks_s", "complete_s", "step_beside_s", "step_alone_s", "resumes_s")
    found = {kind: {name: [] for name in names} for kind in ("ours", "plain")}
    # the optimiser's state exists after the first step
    train_one()
    # host memory for the copies is taken at the first save, once
    save_ours({name: [] for name in names}, train_beside=False)
    save_plain({name: [] for name in names}, train_beside=False)
    kinds = [("ours", save_ours, resume_ours), ("plain", save_plain, resume_plain)]
    for round_ in range(rounds):
        for kind, save, _ in kinds[:: 1 if round_ % 2 else -1]:
            save(found[kind], train_beside=bool(round_ % 2))
        for kind, _, resume in kinds[:: 1 if round_ % 2 else -1]:
            resume(found[kind])
    if world.is_main:
        size = {
            kind: sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
            for kind, root in (("ours", out / "checkpoints"), ("plain", plain_out))
        }
        versions = {
            "torch": torch.__version__,
            "deepspeed": sys.modules["deepspeed"].__version__,
            "zero_stage": engine.zero_optimization_stage(),
            "ranks": world.size,
            "device": str(world.device),
        }
        (folder / "found.json").write_text(json.dumps({"seconds": found, "bytes": size, **versions}))
    world.barrier()
    leave(0)


def record(args: argparse.Namespace, found: dict) -> str:
    """The table, as markdown."""
    ours, plain = (
        {name: statistics.median(values) for name, values in found["seconds"][kind].items() if values}
        for kind in ("ours", "plain")
    )
    rows = [
        ("the loop stands still", "blocks_s"),
        ("until the checkpoint is complete", "complete_s"),
        ("resume", "resumes_s"),
    ]

    def spread(kind: str, name: str) -> str:
        seconds = found["seconds"][kind][name]
        return f"{min(seconds):.2f} to {max(seconds):.2f}"

    lines = [
        f"# Saving and resuming a checkpoint of {found['bytes']['ours'] / 1e9:.2f} GB",
        "",
        f"`python benchmarks/checkpoint_save.py --recipe {args.recipe} --ranks {args.ranks} --rounds "
        f"{args.rounds}`: masked pre-training under ZeRO-{found['zero_stage']}, "
        f"{found['ranks']} ranks on {found['device']}, files of {found['bytes']['plain'] / 1e9:.2f} "
        "GB by DeepSpeed's `save_checkpoint`. Both save and resume the same engine by turns; "
        "medians over the rounds, of the slowest rank, in seconds (smallest to largest).",
        "",
        "| | ours | DeepSpeed's plain `save_checkpoint` | ratio |",
        "|---|---|---|---|",
        *(
            f"| {what} | {ours[name]:.2f} ({spread('ours', name)}) | {plain[name]:.2f} "
            f"({spread('plain', name)}) | {ours[name] / plain[name]:.2f} |"
            for what, name in rows
        ),
        "",
        f"Complete means: ours hashed, fsynced, sealed and renamed; "
        "DeepSpeed's handed to the system, neither fsynced nor hashed. A training step beside our "
        f"writing took {ours['step_beside_s']:.2f} s, one after DeepSpeed's save "
        f"{plain['step_alone_s']:.2f} s. Ours verifies every file's sha256 before it resumes; "
        "DeepSpeed's load trusts what it finds.",
        "",
        f"{os.cpu_count()} CPU cores; torch {found['torch']}, deepspeed {found['deepspeed']}; "
        f"{time.strftime('%B %Y')}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
