"""Save and restore.

A checkpoint is whole or absent, and the loop waits for no more than a copy of its state to host memory.

Protocol: every rank copies its part and goes on training, while a thread of its own writes it into
`checkpoints/.tmp-step_N`, fsyncs and hashes it. At the end of the first step by which all ranks have written, sizes and
hashes are gathered, and rank 0 writes the manifest, renames the folder, and only then moves `latest`. DeepSpeed's own
`latest` is never written: it would name a tag before other ranks have finished.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from deepspeed.utils import zero_to_fp32

from peco_ds.config import CheckpointSettings
from peco_ds.data.order import Cursor
from peco_ds.durations import Durations
from peco_ds.errors import UserError, describe_os_error
from peco_ds.runtime.checkpoint.consolidate import ema_name
from peco_ds.runtime.checkpoint.elastic import load_elastic
from peco_ds.runtime.checkpoint.files import (
    FOLDER,
    PROGRESS,
    RECORDS,
    Files,
    Progress,
    commit,
    list_checkpoints,
    newest_whole,
    rank_name,
    read_progress,
    remove_leftovers,
    retain,
    set_aside_after,
    tag_of,
    wait_for_removals,
)
from peco_ds.runtime.checkpoint.pickles import load_known, refuse_foreign_classes
from peco_ds.runtime.checkpoint.writer import BackgroundWriter, HostCopies
from peco_ds.runtime.distributed import World, seed_all
from peco_ds.runtime.ema import WeightEma, clear_padding, local_masters
from peco_ds.runtime.finite_state import part_not_finite
from peco_ds.runtime.metrics import Meter
from peco_ds.runtime.run_folder import check_same_run
from peco_ds.runtime.time_limit import TimeLimit
from peco_ds.schema import sha256_of_file, write_json

logger = logging.getLogger("peco_ds")

# Names of parts in checkpoints of earlier releases -> today's.
_RENAMED = {"bad_pictures": "bad_images"}
# A run saves so long before its job's time limit, beside what the last save took.
LEAST_MARGIN_S = 60.0


@dataclass(frozen=True)
class Restored:
    """Where a run stands.

    `states`: name of a part -> the states that this rank's part goes on from; `shared` ones are the same on all ranks.
    """

    progress: Progress
    states: dict[str, list] = field(default_factory=dict)
    shared: dict[str, list] = field(default_factory=dict)


class Saver:
    """Saves a run when it is time to, without making it wait.

    Args:
        run_folder: on a file system that all ranks share.
        restored: as `restore` gave it; the parts go on from its states.
        meter: counts saves as pauses; saved as a part.
        parts: objects with state() and load_state(list of states) that belong to each rank.
        shared: the same, for what is equal on all ranks.
        ema: the run's moving average, if it keeps one.
    """

    def __init__(
        self,
        run_folder: Path,
        engine,
        restored: Restored,
        *,
        settings: CheckpointSettings,
        durations: Durations,
        global_batch: int,
        world: World,
        meter: Meter,
        parts: dict,
        shared: dict,
        ema: WeightEma | None = None,
    ) -> None:
        self._run_folder, self._root = run_folder, run_folder / FOLDER
        self._engine, self._progress, self._world, self._ema = engine, restored.progress, world, ema
        self._settings, self._durations, self._global_batch = settings, durations, global_batch
        self._meter, self._parts, self._shared = meter, {"meter": meter, **parts}, shared
        for of_run, states in ((self._parts, restored.states), (shared, restored.shared)):
            for name, part in of_run.items():
                part.load_state(states.get(name, []))
        self._copies = engine.checkpoint_engine = HostCopies()
        # DeepSpeed copies its zero_to_fp32.py beside the files; on a full disk that would fail on one rank while the
        # others wait for it.
        engine._copy_recovery_script = lambda _folder: None
        self._writer: BackgroundWriter | None = None
        self._writing: Progress | None = None
        self._begun = self._stepped = time.monotonic()
        self._save_s = self._longest_s = 0.0
        self._limit = TimeLimit(os.environ)

    def close_step(self, done: int) -> bool:
        """After optimiser step number `done` (from 1): commit what all ranks have written, save if it is time to.

        Collective.

        Returns: whether the run was asked to stop, by a signal or by its job's time limit; it is saved then, on disk.
        Raises: UserError if a checkpoint could not be written, or is not finite; the older ones stand.
        """
        world, now = self._world, time.monotonic()
        # The longest time between two steps includes evaluations.
        self._longest_s, self._stepped = max(self._longest_s, now - self._stepped), now
        if world.is_main and self._limit.is_near(LEAST_MARGIN_S + 2 * self._save_s + self._longest_s):
            world.stop_seen = True
        late = self._settings.every_minutes > 0 and now - self._begun > 60 * self._settings.every_minutes
        agreed = world.agree_on(busy=self._writer is not None and self._writer.busy, due=world.is_main and late)
        if self._writer is not None and not agreed.busy:
            self._commit()
        if agreed.stop or agreed.due or self._durations.save_after(done):
            self._begin(done)
        if agreed.stop:
            self.finish()
            logger.info("asked to stop: step %d is saved; start the same command again to go on", done)
        return agreed.stop

    def finish_save(self) -> None:
        """Wait until the checkpoint in hand, if there is one, is on disk. Collective.

        Raises: UserError as `close_step`.
        """
        if self._writer is not None:
            self._commit()

    def finish(self) -> None:
        """As `finish_save`, at the end of a run. Collective."""
        self.finish_save()
        wait_for_removals()
        # All ranks go on when rank 0 has renamed the folder.
        self._world.barrier()

    def _begin(self, done: int) -> None:
        """Copy this rank's part, and leave the writing to a thread."""
        # Saves are due faster than the disk takes them: wait for the one in hand.
        if self._writer is not None:
            self._commit()
        with self._meter.paused("save"):
            self._begun = time.monotonic()
            progress = self._progress.at(done, self._global_batch)
            temporary = self._root / f".tmp-{tag_of(done)}"
            self._world.agree(self._not_finite(done) or (self._make(temporary) if self._world.is_main else ""))
            self._engine.save_checkpoint(str(self._root), tag=temporary.name, save_latest=False)
            states = {"parts": _states(self._parts), "shared": _states(self._shared)}
            self._copies.save({"random": _random_states(self._world.device), **states}, rank_name(self._world.rank))
            # Without ZeRO every rank has the same whole average, and rank 0 saves it.
            if self._ema is not None and (progress.zero_stage or self._world.is_main):
                self._copies.save(self._ema.state(), ema_name(self._world.rank))
            records = (lambda: self._write_records(temporary, progress)) if self._world.is_main else dict
            self._writing, self._writer = progress, BackgroundWriter(temporary, self._copies.take(), records)
            # Answers under way know nothing of this write.
            self._world.forget_answers()

    def _not_finite(self, done: int) -> str:
        """Why what would be saved is not worth it: a later start could not leave it again."""
        part = part_not_finite(self._engine, self._ema)
        return part and (
            f"step {done}: {part} of rank {self._world.rank} hold values that are not finite, so it is not saved; "
            f"{self._what_stands()}: go on from it with a lower optim.lr, or run.precision=fp32"
        )

    def _make(self, temporary: Path) -> str:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            return self._cannot_save(describe_os_error(error))
        return ""

    def _write_records(self, temporary: Path, progress: Progress) -> Files:
        """What stands beside the ranks' parts; rank 0's thread writes it."""
        write_json(temporary / PROGRESS, {**asdict(progress), "cursor": asdict(progress.cursor)})
        for source in (*(self._run_folder / name for name in RECORDS), Path(zero_to_fp32.__file__)):
            shutil.copy(source, temporary / source.name)
        names = (PROGRESS, *RECORDS, Path(zero_to_fp32.__file__).name)
        for name in names:
            with open(temporary / name, "rb") as file:
                os.fsync(file.fileno())
        return {name: [(temporary / name).stat().st_size, sha256_of_file(temporary / name)] for name in names}

    def _commit(self) -> None:
        """Once all ranks have written, or failed to: make it a checkpoint, or leave no trace of it. Collective."""
        with self._meter.paused("save"):
            writer, progress = self._writer, self._writing
            assert writer is not None and progress is not None, "no checkpoint is in hand"
            self._writer = self._writing = None
            writer.wait()
            temporary, final = self._root / f".tmp-{tag_of(progress.step)}", self._root / tag_of(progress.step)
            ranks = self._world.gather_objects((writer.written, writer.fault))
            fault = next((f"rank {rank}: {found}" for rank, (_, found) in enumerate(ranks) if found), "")
            if self._world.is_main:
                try:
                    if not fault:
                        commit(
                            temporary, final, {name: entry for written, _ in ranks for name, entry in written.items()}
                        )
                        retain(self._root, self._settings)
                except OSError as error:
                    fault = describe_os_error(error)
                if fault:
                    shutil.rmtree(temporary, ignore_errors=True)
            self._world.agree(self._cannot_save(fault) if fault else "")
            self._save_s = time.monotonic() - self._begun

    def _cannot_save(self, fault: str) -> str:
        return (
            f"a checkpoint could not be written ({fault}); {self._what_stands()}: make room, or mend the disk, and "
            "start again to go on from it"
        )

    def _what_stands(self) -> str:
        whole = list_checkpoints(self._run_folder)
        return f"{whole[0].name} stands" if whole else "there is none yet"


def _states(parts: dict) -> dict:
    return {name: part.state() for name, part in parts.items()}


def restore(
    run_folder: Path,
    engine,
    settings: CheckpointSettings,
    world: World,
    *,
    fingerprint: str,
    seed: int,
    ema: WeightEma | None = None,
) -> Restored:
    """Continue the newest checkpoint of the run folder that verifies, or start at step 0. Collective.

    The same number of ranks under the same ZeRO stage goes on bit for bit. Another goes on with the same global
    batches, through DeepSpeed's universal format; what each rank draws at random (stochastic depth) starts anew there,
    seeded by run, step and rank.

    Args:
        fingerprint: of the image set that is read.  seed: of the run.  ema: the run's moving average, loaded along.
    Raises: UserError if checkpoints exist but none is whole, or it was written on another image set or with another
        seed, or one of the two runs is without ZeRO, or what it holds is not finite.
    """
    zero_stage = engine.zero_optimization_stage()
    start = Progress(0, Cursor(fingerprint, seed, 0), world.size, zero_stage)
    if world.is_main:
        remove_leftovers(run_folder / FOLDER)
    folder = newest_whole(run_folder, world) if continues(settings) else None
    if folder is None:
        existing = world.gather_objects(len(list_checkpoints(run_folder)))[0]
        if existing and continues(settings):
            raise UserError(
                f"{run_folder}: {existing} checkpoints, none of them whole; set checkpoint.resume=never to "
                "start from scratch, or a new --out"
            )
        set_aside_after(run_folder, 0, world)
        return Restored(start)
    world.agree(_foreign(folder, world))
    saved = read_progress(folder)
    check_same_run(folder, run_folder)
    saved.cursor.check(fingerprint, seed)
    set_aside_after(run_folder, saved.step, world)
    progress = Progress(saved.step, saved.cursor, world.size, zero_stage)
    # Without ZeRO every rank holds the same state, so any rank's file will do.
    if saved == progress or saved.zero_stage == zero_stage == 0:
        loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
        assert loaded is not None, f"DeepSpeed found nothing in {folder}"
        if ema is not None:
            ema.load(load_known(folder / ema_name(world.rank if zero_stage else 0)))
    else:
        load_elastic(engine, folder, saved, world, ema)
    clear_padding(engine, local_masters(engine))
    if ema is not None:
        clear_padding(engine, ema.shards)
    if part := part_not_finite(engine, ema):
        part = (
            f"{folder}: {part} of rank {world.rank} hold values that are not finite, so no run goes on from it; remove "
            "this checkpoint to go on from the one before it, with a lower optim.lr"
        )
    world.agree(part)

    def read(rank: int) -> dict:
        return load_known(folder / rank_name(rank))

    if saved.world_size == world.size:
        mine = [read(world.rank)]
        _set_random_states(mine[0]["random"], world.device)
    else:
        mine = [read(rank) for rank in range(world.rank, saved.world_size, world.size)]
        seed_all(seed + 1 + world.rank + 1_000_003 * saved.step)
    written_by = (
        ""
        if saved == progress
        else f", written by {saved.world_size} ranks under ZeRO-{saved.zero_stage}, with {world.size} "
        f"under ZeRO-{zero_stage}"
    )
    logger.info("continuing %s at step %d, %d samples%s", folder, saved.step, saved.cursor.samples, written_by)
    first = read(0)
    states = {_RENAMED.get(name, name): [state["parts"][name] for state in mine] for name in first["parts"]}
    return Restored(progress, states, {name: [state] for name, state in first["shared"].items()})


def _foreign(folder: Path, world: World) -> str:
    try:
        refuse_foreign_classes(folder, world.rank, world.size)
    except UserError as error:
        return str(error)
    return ""


def continues(settings: CheckpointSettings) -> bool:
    """Whether a start continues what the run folder holds.

    A job that Slurm started again does, whatever its first start was told.
    """
    return settings.resume == "auto" or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def _random_states(device: torch.device) -> dict:
    python = random.getstate()
    numpy = np.random.get_state()
    assert isinstance(numpy, tuple), "only a generator other than MT19937 has a dict"
    kind, keys, *rest = numpy
    states = {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict, device: torch.device) -> None:
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
