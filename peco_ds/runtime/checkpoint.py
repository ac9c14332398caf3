"""Save, restore, retention. A checkpoint is whole or absent.

Protocol: every rank writes into `checkpoints/.tmp-step_N`; all agree; every rank hashes and fsyncs its share of the files; rank 0 writes the manifest,
renames the folder, and only then moves `latest`. DeepSpeed's own `latest` is never written: it would name a tag
before other ranks have finished.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import random
import re
import shutil
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from deepspeed.utils import zero_to_fp32

from peco_ds.config import CheckpointSettings
from peco_ds.data.order import Cursor
from peco_ds.errors import UserError
from peco_ds.runtime.distributed import World
from peco_ds.runtime.ema import WeightEma
from peco_ds.runtime.run_folder import PROVENANCE, SETTINGS
from peco_ds.schema import sha256_of_file, write_json

logger = logging.getLogger("peco_ds")

FOLDER = "checkpoints"
LATEST = "latest"  # for people and scripts; resuming looks at what verifies
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
RECORDS = (SETTINGS, PROVENANCE)  # of the run folder; a checkpoint that is moved elsewhere still tells what it is


@dataclass(frozen=True)
class Progress:
    """What was done: `step` optimiser steps, up to `cursor` in the data."""

    step: int
    cursor: Cursor
    world_size: int
    zero_stage: int

    def at(self, step: int, global_batch: int) -> Progress:
        """The same run when `step` steps are done."""
        return replace(self, step=step, cursor=replace(self.cursor, samples=step * global_batch))


def tag_of(step: int) -> str:
    return f"step_{step:08d}"


def save(run_folder: Path, engine, progress: Progress, settings: CheckpointSettings, world: World, ema: WeightEma | None = None) -> Path:
    """Write one checkpoint whole, then apply retention. Collective.

    Args:
        run_folder: on a file system that all ranks share.  ema: the run's moving average, if it keeps one.
    Returns: the checkpoint's folder.
    """
    root = run_folder / FOLDER
    tag = tag_of(progress.step)
    temporary, final = root / f".tmp-{tag}", root / tag
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    engine.save_checkpoint(str(root), tag=temporary.name, save_latest=False)
    torch.save(_random_states(world.device), temporary / f"random_rank_{world.rank:05d}.pt")
    if ema is not None and (progress.zero_stage or world.is_main):  # without ZeRO every rank has the same whole average
        torch.save(ema.state(), temporary / ema_name(world.rank))
    if world.is_main:
        write_json(temporary / PROGRESS, {**asdict(progress), "cursor": asdict(progress.cursor)})
        for name in RECORDS:
            shutil.copy(run_folder / name, temporary / name)
    world.barrier()
    _seal(temporary, world)
    if world.is_main:
        shutil.rmtree(final, ignore_errors=True)  # the same step saved again after a resume from an older checkpoint
        os.rename(temporary, final)
        _fsync_folder(root)
        _write_text(root / LATEST, tag)
        _retain(root, settings)
    world.barrier()
    return final


def _seal(folder: Path, world: World) -> None:
    """Hash and fsync every file, shared by the ranks; rank 0 writes the manifest last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = world.gather_objects(files)[0]  # rank 0's list: another's view of a shared file system may lag behind
    mine = {}
    for path in files[world.rank :: world.size]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        mine[str(path.relative_to(folder))] = [path.stat().st_size, sha256_of_file(path)]
    parts = world.gather_objects(mine)
    if world.is_main:
        write_json(folder / MANIFEST, {"files": {name: entry for part in parts for name, entry in sorted(part.items())}})
        _fsync_folder(folder)


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
            if not path.is_file():
                fault = f"{name} is missing"
            elif path.stat().st_size != num_bytes:
                fault = f"{name} has {path.stat().st_size} bytes, {num_bytes} were written"
            elif sha256_of_file(path) != sha256:
                fault = f"{name} has changed since it was written"
            if fault:
                break
    except (OSError, ValueError, KeyError, TypeError) as error:
        fault = f"{MANIFEST} is not readable ({error})"
    faults = world.gather_objects(fault) if world else [fault]
    return next(filter(None, faults), "")


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Complete checkpoints, newest first: a folder counts once it has its final name and a manifest."""
    found = (run_folder / FOLDER).glob("step_*")
    return sorted((path for path in found if re.fullmatch(r"step_\d{8}", path.name) and (path / MANIFEST).is_file()), reverse=True)


def newest_whole(run_folder: Path, world: World | None = None) -> Path | None:
    """The newest checkpoint that verifies; says which newer ones do not. Collective when `world` is given."""
    folders = list_checkpoints(run_folder)
    if world:  # one rank's view of a shared file system may lag behind another's
        folders = world.gather_objects(folders)[0]
    for folder in folders:
        fault = verify(folder, world)
        if not fault:
            return folder
        logger.warning("checkpoint %s is damaged (%s); an older one is tried", folder.name, fault)
    return None


def read_progress(folder: Path) -> Progress:
    raw = json.loads((folder / PROGRESS).read_text())
    return Progress(**{**raw, "cursor": Cursor(**raw["cursor"])})


def restore(run_folder: Path, engine, settings: CheckpointSettings, world: World, *, fingerprint: str, seed: int, ema: WeightEma | None = None) -> Progress:
    """Continue the newest checkpoint of the run folder that verifies, or start at step 0. Collective.

    Args:
        fingerprint: of the image set that is read.  seed: of the run.  ema: the run's moving average, loaded along.
    Raises: UserError if checkpoints exist but none is whole, or it was written by another number of ranks, under another ZeRO stage, on
        another image set or with another seed.
    """
    start = Progress(0, Cursor(fingerprint, seed, 0), world.size, engine.zero_optimization_stage())
    folder = newest_whole(run_folder, world) if continues(settings) else None
    if folder is None:
        existing = world.gather_objects(len(list_checkpoints(run_folder)))[0]
        if existing and continues(settings):
            raise UserError(f"{run_folder}: {existing} checkpoints, none of them whole; set checkpoint.resume=never to start from scratch, or a new --out")
        _set_aside_after(run_folder, 0, world)
        return start
    progress = read_progress(folder)
    progress.cursor.check(fingerprint, seed)
    if (progress.world_size, progress.zero_stage) != (start.world_size, start.zero_stage):
        raise UserError(
            f"{folder.name} was written by {progress.world_size} ranks under ZeRO-{progress.zero_stage}, this run has {start.world_size} ranks under ZeRO-{start.zero_stage}; "
            "continue with the same, or start a new --out"
        )
    _set_aside_after(run_folder, progress.step, world)
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    assert loaded is not None, f"DeepSpeed found nothing in {folder}"
    # weights_only: the files are ours and verified, and hold only tensors, numbers and strings all the same
    if ema is not None:
        ema.load(torch.load(folder / ema_name(world.rank if progress.zero_stage else 0), map_location="cpu", weights_only=True))
    _set_random_states(torch.load(folder / f"random_rank_{world.rank:05d}.pt", weights_only=True), world.device)
    logger.info("continuing %s at step %d, %d samples", folder, progress.step, progress.cursor.samples)
    return progress


def continues(settings: CheckpointSettings) -> bool:
    """Whether a start continues what the run folder holds. A job that Slurm started again does, whatever its first start was told."""
    return settings.resume == "auto" or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def _set_aside_after(run_folder: Path, step: int, world: World) -> None:
    """Rename checkpoints beyond `step`, damaged or of a run that is started over: the newest of a folder must be the run's own."""
    if world.is_main:
        for folder in list_checkpoints(run_folder):
            if int(folder.name.removeprefix("step_")) > step:
                target = folder.with_name(f"set_aside_{folder.name}_{time.strftime('%Y%m%dT%H%M%S')}")
                os.rename(folder, target)
                logger.warning("checkpoint %s is set aside as %s", folder.name, target.name)
    world.barrier()


def has_ema(checkpoint: Path) -> bool:
    return (checkpoint / ema_name(0)).is_file()


def ema_name(rank: int) -> str:
    return f"ema_rank_{rank:05d}.pt"


def fp32_weights(checkpoint: Path, *, average: bool = False) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a checkpoint in float32, whatever the ZeRO stage and number of ranks that wrote it.

    The ranks' files are mapped, not read: what is held in memory is the result.

    Args:
        checkpoint: a complete checkpoint folder that was verified (`newest_whole`, `verify`).
        average: the moving average of the weights (`has_ema`) instead of the weights.
    """
    load = lambda path, **options: torch.load(path, map_location="cpu", mmap=True, **options)  # noqa: E731
    optimizer_files = zero_to_fp32.get_optim_files(str(checkpoint)) if list(checkpoint.glob("*_optim_states.pt")) else []
    averages = [load(path, weights_only=True) for path in sorted(checkpoint.glob("ema_rank_*.pt"))] if average else []
    if not optimizer_files:
        if average:
            return _unflatten(averages[0])
        # ZeRO-0 writes whole modules and no partitioned optimiser; deepspeed pickles classes of its own beside the tensors.
        module = load(checkpoint / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in module.items()}
    # Read here and not by zero_to_fp32's own entry: it refuses ZeRO-1 in bf16, whose `BF16_Optimizer` keeps the same flat partitions but does not
    # write which stage they are of, and it knows nothing of averages, which lie in memory as the weights do.
    partitions = [load(path, weights_only=False)["optimizer_state_dict"] for path in optimizer_files]
    stage_3 = "fp32_flat_groups" in partitions[0]
    groups = [part["shards"] for part in averages] or [part["fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"] for part in partitions]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # its progress bars are no news to whoever converts
        states = zero_to_fp32.parse_model_states(zero_to_fp32.get_model_state_files(str(checkpoint)))
        if stage_3:
            merged = zero_to_fp32._get_fp32_state_dict_from_zero3_checkpoint(len(groups), groups, states, False)
        else:
            paddings = partitions[0].get("param_alignment_paddings")
            merged = zero_to_fp32._get_fp32_state_dict_from_zero2_checkpoint(len(groups), groups, states, False, paddings)
        return zero_to_fp32.to_torch_tensor(merged)


def _unflatten(state: dict) -> dict[str, torch.Tensor]:
    """An average that was kept without ZeRO, by name."""
    weights = {}
    for shard, parameters in zip(state["shards"], state["names"], strict=True):
        parts = shard.flatten().split([math.prod(shape) for _, shape in parameters])
        weights |= {name: part.view(shape) for (name, shape), part in zip(parameters, parts)}
    return weights


def _retain(root: Path, settings: CheckpointSettings) -> None:
    """Keep the newest `keep_last` and every multiple of `keep_every_steps`; remove the rest and left-over temporary folders."""
    for number, folder in enumerate(list_checkpoints(root.parent)):
        step = int(folder.name.removeprefix("step_"))
        for_good = settings.keep_every_steps > 0 and step % settings.keep_every_steps == 0
        if number >= settings.keep_last and not for_good:
            # Renamed first: a removal that is cut short must not leave half a checkpoint under a good name.
            doomed = root / f".old-{folder.name}"
            os.rename(folder, doomed)
            shutil.rmtree(doomed)
    for pattern in (".tmp-*", ".old-*"):
        for leftover in root.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _random_states(device: torch.device) -> dict:
    python = random.getstate()
    kind, keys, *rest = np.random.get_state()
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


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
