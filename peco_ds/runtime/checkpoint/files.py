"""Checkpoints on disk, folders `checkpoints/step_N` with a manifest: committed, verified, listed, kept and removed."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from peco_ds.config import CheckpointSettings
from peco_ds.data.atomic_files import flush_folder, write_whole
from peco_ds.data.order import Cursor
from peco_ds.runtime.distributed import World
from peco_ds.runtime.run_folder import PROVENANCE, SETTINGS
from peco_ds.schema import sha256_of_file, write_json

logger = logging.getLogger("peco_ds")

FOLDER = "checkpoints"
# For people and scripts; a resume takes the newest checkpoint that verifies.
LATEST = "latest"
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
# Records copied from the run folder, so that a checkpoint that is moved elsewhere is still complete.
RECORDS = (SETTINGS, PROVENANCE)
# checkpoints/universal/step_N is the checkpoint in DeepSpeed's universal format, made when the number of ranks or the
# ZeRO stage changes.
UNIVERSAL = "universal"

_removals: list[threading.Thread] = []

# Name within the folder -> [bytes, sha256].
Files = dict[str, list]


@dataclass(frozen=True)
class Progress:
    """The progress of a run: `step` optimiser steps, up to `cursor` in the data."""

    step: int
    cursor: Cursor
    world_size: int
    zero_stage: int

    def at(self, step: int, global_batch: int) -> Progress:
        """The same run when `step` steps are done."""
        return replace(self, step=step, cursor=replace(self.cursor, samples=step * global_batch))


def tag_of(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def read_progress(folder: Path) -> Progress:
    raw = json.loads((folder / PROGRESS).read_text())
    return Progress(**{**raw, "cursor": Cursor(**raw["cursor"])})


def commit(temporary: Path, final: Path, files: Files) -> None:
    """Make a written folder a checkpoint: manifest, rename, and only then `latest`.

    Args:
        files: everything in it, already on disk (fsync); what is not listed is not part of the checkpoint.
    """
    write_json(temporary / MANIFEST, {"files": dict(sorted(files.items()))})
    flush_folder(temporary)
    # The same step is saved again after a resume from an older checkpoint.
    if _is_committed(final):
        _remove(final)
    elif final.exists():
        _set_aside(final)
    os.rename(temporary, final)
    flush_folder(final.parent)
    write_whole(final.parent / LATEST, final.name.encode())


def verify(folder: Path, world: World | None = None) -> str:
    """Compare a checkpoint with its manifest; the hashing is shared by the ranks. Collective when `world` is given.

    Returns: "" if it is whole, else what is wrong.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    fault = ""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, (num_bytes, sha256) in sorted(files.items())[rank::size]:
            path = folder / name
            if Path(name).name != name:
                fault = f"{MANIFEST} lists {name!r}, which is no file of this folder"
            elif not path.is_file():
                fault = f"{name} is missing"
            elif path.stat().st_size != num_bytes:
                fault = f"{name} has {path.stat().st_size} bytes, {num_bytes} were written"
            elif sha256_of_file(path) != sha256:
                fault = f"{name} has changed since it was written"
            if fault:
                break
        fault = fault or _missing_part(folder, files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fault = f"{MANIFEST} is not readable ({error})"
    faults = world.gather_objects(fault) if world else [fault]
    return next(filter(None, faults), "")


def _missing_part(folder: Path, files: Files) -> str:
    """A part that the checkpoint must have and its manifest does not list, in words; "" if there is none."""
    if PROGRESS not in files:
        return f"{MANIFEST} does not list {PROGRESS}"
    progress = json.loads((folder / PROGRESS).read_text())
    optimizer_parts = sum(name.endswith("_optim_states.pt") for name in files)
    if not any(name.endswith("_model_states.pt") for name in files):
        return f"{MANIFEST} lists no weights"
    if progress["zero_stage"] and optimizer_parts != progress["world_size"]:
        return f"{MANIFEST} lists {optimizer_parts} parts of the optimiser, {progress['world_size']} ranks wrote it"
    return next(
        (
            f"{MANIFEST} does not list {rank_name(rank)}"
            for rank in range(progress["world_size"])
            if rank_name(rank) not in files
        ),
        "",
    )


def rank_name(rank: int) -> str:
    """The file of a rank's own state beside DeepSpeed's files: random states, counters."""
    return f"rank_{rank:05d}.pt"


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Committed checkpoints, newest first: a folder counts once it has its final name.

    `verify` says whether it still is whole.
    """
    found = (run_folder / FOLDER).glob("step_*")
    return sorted((path for path in found if re.fullmatch(r"step_\d{8}", path.name) and path.is_dir()), reverse=True)


def newest_whole(run_folder: Path, world: World | None = None) -> Path | None:
    """The newest checkpoint that verifies; newer ones that do not are logged. Collective when `world` is given."""
    folders = list_checkpoints(run_folder)
    # One rank's view of a shared file system may lag behind another's.
    if world:
        folders = world.gather_objects(folders)[0]
    for folder in folders:
        fault = verify(folder, world)
        if not fault:
            return folder
        logger.warning("checkpoint %s is damaged (%s); an older one is tried", folder.name, fault)
    return None


def retain(root: Path, settings: CheckpointSettings) -> None:
    """Keep the newest `keep_last` and every multiple of `keep_every_steps`; remove the others and their copies."""
    kept = set()
    # A folder without a manifest is no checkpoint of ours, and stays.
    for number, folder in enumerate(filter(_is_committed, list_checkpoints(root.parent))):
        for_good = settings.keep_every_steps > 0 and step_of(folder) % settings.keep_every_steps == 0
        if number < settings.keep_last or for_good:
            kept.add(folder.name)
        else:
            _remove(folder)
    for copy in (root / UNIVERSAL).glob("step_*"):
        if copy.name not in kept:
            _remove(copy)


def remove_leftovers(root: Path) -> None:
    """Remove what interrupted writers and removals left behind. Only before the run's own first save."""
    for folder in (root, root / UNIVERSAL):
        for pattern in (".tmp-*", ".old-*"):
            for leftover in folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)


def set_aside_after(run_folder: Path, step: int, world: World) -> None:
    """Rename checkpoints beyond `step`, which are damaged or of a run that is started over: the newest of a folder must
    be the run's own. Collective.
    """
    fault = ""
    if world.is_main:
        try:
            for folder in list_checkpoints(run_folder):
                if step_of(folder) > step:
                    _set_aside(folder)
        except OSError as error:
            fault = f"{run_folder / FOLDER}: {error.strerror}; its checkpoints beyond step {step} cannot be set aside"
    world.agree(fault)


def _is_committed(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _set_aside(folder: Path) -> None:
    target = folder.with_name(f"set_aside_{folder.name}_{time.strftime('%Y%m%dT%H%M%S')}_{os.getpid()}")
    os.rename(folder, target)
    logger.warning("checkpoint %s is set aside as %s", folder.name, target.name)


def _remove(folder: Path) -> None:
    # Renamed first, because a removal that is cut short must not leave half a checkpoint under a valid name. A parallel
    # file system takes long to remove gigabytes, so a thread does it.
    doomed = folder.with_name(f".old-{folder.name}-{os.getpid()}-{time.monotonic_ns()}")
    os.rename(folder, doomed)
    thread = threading.Thread(
        target=shutil.rmtree, args=(doomed,), kwargs={"ignore_errors": True}, name="remove checkpoint", daemon=True
    )
    _removals.append(thread)
    thread.start()


def wait_for_removals(within_s: float = 60.0) -> None:
    """Wait at the end of a run; what is not removed by then is removed at its next start."""
    deadline = time.monotonic() + within_s
    while _removals:
        _removals.pop().join(max(0.0, deadline - time.monotonic()))
