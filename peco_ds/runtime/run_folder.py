"""Write and read the records of a run folder: settings, DeepSpeed JSON, command, commit, versions."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import yaml

from peco_ds.config import Recipe, TrainingRecipe
from peco_ds.data.atomic_files import lock_file
from peco_ds.errors import UserError, shown_command
from peco_ds.field_marks import FreeOnResume, keys_with, values_before
from peco_ds.old_spellings import current_settings
from peco_ds.own_files import written_whole
from peco_ds.recipe_files import SETTINGS, Resolved, flatten
from peco_ds.registry import load_extensions
from peco_ds.runtime.distributed import World
from peco_ds.runtime.timeline import EVALUATION_FILE, METRICS_FILE, STARTS_FILE
from peco_ds.schema import read_json, sha256_of_file, write_json
from peco_ds.strict_yaml import NOT_YAML, read_yaml

logger = logging.getLogger("peco_ds")

LOCK_PATIENCE_S = 180
# Run folders that this process has locked.
_held: dict[Path, ExitStack] = {}

DEEPSPEED = "deepspeed.json"
PROVENANCE = "provenance.json"
COMMANDS = "commands.txt"
# What runs write into their folders, beside the settings and a tokenizer's release.
_WRITTEN = (
    *(DEEPSPEED, PROVENANCE, COMMANDS, METRICS_FILE, EVALUATION_FILE, STARTS_FILE),
    *("checkpoints", "logs", "tensorboard", "reconstructions.png", "code_atlas.png"),
)


def open_run_folder(
    folder: Path, stage: str, resolved: Resolved[TrainingRecipe], ds_config: dict, world: World
) -> None:
    """Create the folder and record what the run is. Collective; rank 0 writes, a refusal is raised by all.

    Args:
        ds_config: merged.
    Raises: UserError if the folder holds another run, naming the first setting that differs.
    """
    _on_main(world, folder, lambda: _write(folder, stage, resolved, ds_config))
    # In a folder that only rank 0 sees, checkpoints would miss the other ranks' parts, which would show only on a
    # resume.
    world.agree(
        ""
        if (folder / SETTINGS).is_file()
        else f"{folder}: rank {world.rank} does not see it; --out must lie on a file system that all nodes share"
    )


def record_provenance(folder: Path, facts: dict, world: World) -> None:
    """Add to what the folder tells of the run's origins. Collective, as `open_run_folder`.

    Args:
        facts: among them fingerprints of what the run reads; they end in the model card of its release.
    Raises: UserError if the run that is continued was trained from others.
    """

    def write() -> None:
        _refuse_other_origins(folder, facts)
        write_json(folder / PROVENANCE, {**read_provenance(folder), **facts})

    _on_main(world, folder, write)


def _on_main(world: World, folder: Path, write: Callable[[], None]) -> None:
    """Let rank 0 write; what it refuses, or its disk, is raised by all ranks. Collective."""
    fault = ""
    if world.is_main:
        try:
            write()
        except UserError as error:
            fault = str(error)
        except OSError as error:
            fault = f"{folder}: cannot be written ({error.strerror}); give another --out"
    world.agree(fault)


def _write(folder: Path, stage: str, resolved: Resolved[TrainingRecipe], ds_config: dict) -> None:
    refuse_foreign_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _hold(folder)
    # Tuples become lists, as YAML reads them back.
    settings = json.loads(json.dumps(resolved.as_dict()["recipe"]))
    # A start that failed before its first checkpoint imposes nothing on later ones.
    continued = any((folder / "checkpoints").glob("step_*")) and resolved.recipe.checkpoint.resume == "auto"
    if continued:
        _refuse_other_settings(folder, stage, settings)
    origins = read_provenance(folder) if continued else {}
    text = yaml.safe_dump({"stage": stage, "recipe": settings, "sources": resolved.sources}, sort_keys=False)
    # First of all records: it says whose folder this is.
    with written_whole(folder / SETTINGS) as temporary:
        temporary.write_text(
            f"# every setting of this run; `sources` names where each value that is no default came from\n{text}"
        )
    write_json(folder / DEEPSPEED, ds_config)
    with open(folder / COMMANDS, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(shown_command() + "\n")
    write_json(folder / PROVENANCE, {**origins, "commit": commit(), "versions": versions()})


def refuse_foreign_folder(folder: Path) -> None:
    """Check a run folder before anything is written into it.

    Raises: UserError if it holds a file that a run would replace or add to, and no settings of a run.
    """
    if os.path.lexists(folder / SETTINGS):
        # Refuses what is not a run's.
        read_settings(folder)
        return
    for name in _WRITTEN:
        path = folder / name
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(
                f"{path}: stands there already, and no {SETTINGS} says that a run wrote it; choose another --out, or "
                "move it away"
            )


def _hold(folder: Path) -> None:
    """Keep other starts out of the folder for as long as this process lives: two would remove each other's half-written
    checkpoints.

    Where a node was lost, its lock stays until the server notices; so a start waits for a while.
    """
    if folder.resolve() in _held:
        return
    for attempt in range(LOCK_PATIENCE_S):
        stack = ExitStack()
        if stack.enter_context(lock_file(folder / ".lock", wait=False)):
            _held[folder.resolve()] = stack
            return
        stack.close()
        if not attempt:
            logger.warning("%s: another start is at work in it; waiting for it to end", folder)
        time.sleep(1.0)
    raise UserError(f"{folder}: another start is at work in it; end that one, or choose another --out")


def check_same_run(checkpoint: Path, run_folder: Path) -> None:
    """Compare the settings that a checkpoint was trained with to those of the run folder.

    They differ where a run was started over and interrupted before its first save.

    Raises: UserError if the checkpoint belongs to another run.
    """
    now = read_settings(run_folder)
    _refuse_other_settings(checkpoint, now["stage"], now["recipe"])
    _refuse_other_origins(checkpoint, read_provenance(run_folder))


def _refuse_other_settings(folder: Path, stage: str, settings: dict) -> None:
    recorded = read_settings(folder)
    if recorded["stage"] != stage:
        raise UserError(f"{folder}: holds a run of {recorded['stage']}; choose another --out")

    before = values_before(Recipe, stage) | dict(flatten(recorded["recipe"]))
    free = keys_with(Recipe, FreeOnResume)
    for key, value in flatten(settings):
        if before.get(key, value) != value and key not in free:
            raise UserError(
                f"{folder}: holds a run with {key} = {before[key]!r}, this one has {value!r}; continue it with its own "
                f"settings (--recipe {folder}), choose another --out, or set checkpoint.resume=never to start over"
            )


def _refuse_other_origins(folder: Path, provenance: dict) -> None:
    was = read_provenance(folder)
    for name in ("images_fingerprint", "tokenizer_fingerprint", "judge", "judge_statistics"):
        if name in provenance and was.get(name) not in (None, provenance[name]):
            raise UserError(
                f"{folder}: was trained with {name} {was[name][:40]}, this start reads "
                f"{provenance[name][:40]}; continue with the same, or choose another --out"
            )


def read_settings(folder: Path) -> dict:
    """The recorded settings of a run: {"stage", "recipe", "sources"}, in today's spelling.

    Raises: UserError if the folder is no run folder, or the record is damaged.
    """
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise UserError(f"{folder}: no {SETTINGS} there; give the --out folder of a training run")
    try:
        recorded = read_yaml(path)
    except (*NOT_YAML, OSError):
        recorded = None
    if (
        not isinstance(recorded, dict)
        or not isinstance(recorded.get("stage"), str)
        or not isinstance(recorded.get("recipe"), dict)
    ):
        raise UserError(f"{path}: is not what a run wrote there; restore it, or start a new --out")
    return recorded | {"recipe": current_settings(Recipe, recorded["recipe"])}


def read_provenance(folder: Path) -> dict:
    """What a run recorded of its origins; {} where it recorded nothing.

    Raises: UserError if the record is damaged.
    """
    path = Path(folder) / PROVENANCE
    try:
        recorded = read_json(path) if path.is_file() else {}
    except (ValueError, OSError):
        recorded = None
    texts = ("commit", "images_fingerprint", "tokenizer_fingerprint", "judge", "judge_statistics", "init", "attention")
    sections = ("tokenizer", "init_facts", "versions")
    if (
        not isinstance(recorded, dict)
        or not all(isinstance(recorded.get(name, ""), str) for name in texts)
        or not all(isinstance(recorded.get(name, {}), dict) for name in sections)
        or not all(_are_texts(recorded.get(name, [])) for name in ("classes", "fresh"))
        or not all(_are_statistics(recorded.get(name, [1, 1, 1])) for name in ("mean", "std"))
    ):
        raise UserError(f"{path}: is not what a run wrote there; restore it, or start a new --out")
    return recorded


def _are_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_statistics(value) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(item, (int, float)) for item in value)


def commit() -> str:
    """Commit of this checkout, with "+changes" if it is not clean; "unknown" outside of git."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout.strip()
        return head + ("+changes" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "deepspeed", "timm", "webdataset", "numpy")
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {platform.processor() or platform.machine()}"
    )
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        **{
            f"extension {entry}": f"sha256 {sha256_of_file(path)}"
            for entry, path in load_extensions().items()
            if path.is_file()
        },
        "device": device,
    }
