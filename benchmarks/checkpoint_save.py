"""What does a checkpoint of about 1 GB cost a run? Ours against DeepSpeed's plain `save_checkpoint`, of the same engine
in the same run, by turns.

    python -m benchmarks.checkpoint_save [--folder SCRATCH] [--ranks 2] [--rounds 7] [--record FILE.md]

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
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from benchmarks.engine_step import EngineTrainer
from benchmarks.record import at_least, benchmark_parser, markdown_table, parse, publish
from benchmarks.stages import launcher
from benchmarks.turns import spread
from peco_ds.command_line import leave, run
from peco_ds.config import PretrainRecipe
from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.errors import UserError
from peco_ds.recipe_files import load_recipe
from peco_ds.runtime.checkpoint.save_restore import Saver, restore
from peco_ds.runtime.distributed import World, seed_all, start_world
from peco_ds.runtime.run_folder import open_run_folder

KINDS = ("ours", "plain")
TIMES = ("blocks_s", "complete_s", "step_beside_s", "step_alone_s", "resumes_s")
SETTINGS = "run.micro_batch=1 checkpoint.every_minutes=0 checkpoint.keep_last=1".split()
FINGERPRINT = "0" * 64


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = benchmark_parser("checkpoint_save", __doc__)
    folder = "where checkpoints lie while it runs: 4 times their size (default: the system's temporary folder)"
    parser.add_argument("--folder", type=Path, help=folder)
    parser.add_argument("--recipe", default="peco_vitb16", help="of the model (default: %(default)s)")
    parser.add_argument("--deepspeed_config", type=Path, default=DS_CONFIGS / "zero3.json")
    parser.add_argument("--ranks", type=at_least(1), default=2, help="(default: %(default)s)")
    rounds = "measurements of each kind, 2 or more (default: %(default)s)"
    parser.add_argument("--rounds", type=at_least(2), default=7, help=rounds)
    parser.add_argument("--rank_work", type=Path, help=argparse.SUPPRESS)  # this process is a rank
    args = parse(parser, words)
    if args.rank_work:
        measure(args, args.rank_work)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        command = [*launcher("torchrun", args.ranks), "-m", "benchmarks.checkpoint_save", "--rank_work", folder, *words]
        if code := subprocess.run(command).returncode:
            raise UserError(f"the ranks ended with {code}; what they said stands above")
        found = json.loads((Path(folder) / "found.json").read_text())
    title = f"Saving and resuming a checkpoint of {found['bytes']['ours'] / 1e9:.2f} GB"
    sys.stdout.write(publish(args, title, body(found), "deepspeed"))
    return 0


def measure(args: argparse.Namespace, folder: Path) -> None:
    """One rank of the run, to its end; rank 0 writes folder/found.json."""
    world = start_world()
    savers = Savers(args, folder, world)
    found = {kind: {name: [] for name in TIMES} for kind in KINDS}
    # the optimiser's state exists after the first step
    savers.train_one()
    # host memory for the copies is taken at the first save, once
    for kind in KINDS:
        savers.save(kind, {name: [] for name in TIMES}, train_beside=False)
    for number in range(args.rounds):
        for action in (savers.save, savers.resume):
            for kind in KINDS[:: 1 if number % 2 else -1]:
                action(kind, found[kind], train_beside=bool(number % 2))
    if world.is_main:
        about = {
            "zero_stage": savers.engine.zero_optimization_stage(),
            "ranks": world.size,
            "device": str(world.device),
        }
        text = json.dumps({"seconds": found, "bytes": savers.sizes(), **about})
        (folder / "found.json").write_text(text)
    world.barrier()
    leave(0)


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


class Savers:
    """One engine, our saver of it and DeepSpeed's."""

    def __init__(self, args: argparse.Namespace, folder: Path, world: World) -> None:
        overrides = [f"data.root={folder}", f"run.global_batch={world.size}", *SETTINGS]
        resolved = load_recipe(PretrainRecipe, args.recipe, overrides)
        self.cfg, self.world, self.step = resolved.recipe, world, 0
        self.out, self.plain_out = folder / "run", folder / "plain"
        seed_all(self.cfg.run.seed)
        trainer = EngineTrainer(self.cfg, args.deepspeed_config, world.device, world_size=world.size)
        self.train_one, self.engine = trainer.step, trainer.engine
        open_run_folder(self.out, "pretrain", resolved, trainer.ds_config, {}, world)
        self._writers = {"plain": self._writer()}
        restored = self._restore()
        self.due = EveryTime()
        self.saver = Saver(
            self.out,
            self.engine,
            restored,
            settings=self.cfg.checkpoint,
            durations=self.due,
            global_batch=self.cfg.run.global_batch,
            world=world,
            parts={"meter": Unmetered()},
            shared={},
        )
        self._writers["ours"] = self._writer()

    def _writer(self) -> tuple:
        """What our saver puts into the engine in the place of DeepSpeed's own."""
        return self.engine.checkpoint_engine, self.engine._copy_recovery_script

    def _restore(self):
        cfg = self.cfg
        return restore(self.out, self.engine, cfg.checkpoint, self.world, fingerprint=FINGERPRINT, seed=cfg.run.seed)

    def save(self, kind: str, found: dict[str, list[float]], *, train_beside: bool) -> None:
        """Of ours either how long a training step takes beside the writing, or how long the writing takes alone; of
        DeepSpeed's the save, and a step after it.
        """
        self.engine.checkpoint_engine, self.engine._copy_recovery_script = self._writers[kind]
        if kind == "plain":
            if self.world.is_main:
                shutil.rmtree(self.plain_out, ignore_errors=True)
            self.world.barrier()
            found["blocks_s"].append(self._timed(lambda: self.engine.save_checkpoint(str(self.plain_out), tag="plain")))
            found["complete_s"].append(found["blocks_s"][-1])
            if train_beside:
                found["step_alone_s"].append(self._slowest(self.train_one))
            return
        self.step += 1
        self.due.due = True
        found["blocks_s"].append(self._timed(lambda: self.saver.close_step(self.step)))
        self.due.due = False
        if train_beside:
            found["step_beside_s"].append(self._slowest(self.train_one))
            self.saver.finish()
        else:
            found["complete_s"].append(found["blocks_s"][-1] + self._slowest(self.saver.finish))

    def resume(self, kind: str, found: dict[str, list[float]], *, train_beside: bool) -> None:
        self.engine.checkpoint_engine, _ = self._writers[kind]
        load = (
            self._restore if kind == "ours" else lambda: self.engine.load_checkpoint(str(self.plain_out), tag="plain")
        )
        found["resumes_s"].append(self._timed(load))

    def _timed(self, work: Callable[[], object]) -> float:
        """Seconds until the slowest rank is done, from where nothing is left to be written to the disk."""
        if self.world.is_main:
            os.sync()
        self.world.barrier()
        return self._slowest(work)

    def _slowest(self, work: Callable[[], object]) -> float:
        begun = time.perf_counter()
        work()
        return max(self.world.gather_objects(time.perf_counter() - begun))

    def sizes(self) -> dict[str, int]:
        """Bytes of a checkpoint."""
        roots = {"ours": self.out / "checkpoints", "plain": self.plain_out}
        return {
            kind: sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) for kind, root in roots.items()
        }


def body(found: dict) -> str:
    """The table, as markdown."""
    ours, plain = (found["seconds"][kind] for kind in KINDS)
    rows = [
        (
            what,
            spread(ours[name]),
            spread(plain[name]),
            f"{statistics.median(ours[name]) / statistics.median(plain[name]):.2f}",
        )
        for what, name in (
            ("the loop stands still", "blocks_s"),
            ("until the checkpoint is complete", "complete_s"),
            ("resume", "resumes_s"),
        )
    ]
    about = (
        f"Masked pre-training under ZeRO-{found['zero_stage']}, {found['ranks']} ranks on {found['device']}, files of "
        f"{found['bytes']['plain'] / 1e9:.2f} GB by DeepSpeed's `save_checkpoint`. Both save and resume the same "
        "engine by turns; medians over the rounds, of the slowest rank, in seconds (smallest to largest)."
    )
    beside, alone = statistics.median(ours["step_beside_s"]), statistics.median(plain["step_alone_s"])
    meaning = (
        "Complete means: ours hashed, fsynced, sealed and renamed; DeepSpeed's handed to the system, neither fsynced "
        f"nor hashed. A training step beside our writing took {beside:.2f} s, one after DeepSpeed's save {alone:.2f} "
        "s. Ours verifies every file's sha256 before it resumes; DeepSpeed's load trusts what it finds."
    )
    return "\n\n".join(
        [about, markdown_table(("", "ours", "DeepSpeed's plain `save_checkpoint`", "ratio"), rows), meaning]
    )


if __name__ == "__main__":
    run(main)
