"""Paths as people write them, in options, settings and recipes alike: `~`, `~name` and $VARIABLES stand for folders.

A shell replaces them only where a word begins with them or has no quotes: neither in `--out=~/run` nor in a recipe.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from peco_ds.errors import UserError, describe_os_error
from peco_ds.remote_paths import is_url, local_release, parse_url

# Enough to show that a disk is full, of the small files that a measurement ends in.
_PROBE_BYTES = 1 << 16
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def expand(text: str) -> str:
    """The text with `~` and variables replaced. A `$` stays where that exists: a folder may be named `$RECYCLE.BIN`.

    Raises: UserError for a user or a variable that is not known.
    """
    if "\0" in text:
        raise UserError(f"path {text}: holds a character that no path may hold; correct it")
    if "~" not in text[:1] and "$" not in text:
        return text
    if "~" not in text[:1] and os.path.lexists(text):
        return text
    unknown = next((found for found in _VARIABLE.finditer(text) if (found[1] or found[2]) not in os.environ), None)
    if unknown is not None:
        raise UserError(f"path {text}: {unknown[0]} is not set in the environment; set it, or write the path out")
    found = os.path.expanduser(os.path.expandvars(text))
    if text.startswith("~") and found.startswith("~"):
        raise UserError(f"path {text}: no user {text.partition('/')[0]}; write the path out")
    return found


def expand_path(text: str | Path) -> Path:
    """As `expand`, for what has to lie on a file system.

    Raises: UserError for a URL too: `Path` would make another path of it.
    """
    text = expand(str(text))
    if is_url(text):
        raise UserError(
            f"{text}: is a URL, where a path of this machine is needed; only data (data.*, pack_images.py) and "
            "releases may lie in a store: runs, checkpoints and results lie on a file system"
        )
    return Path(text)


def released_path(text: str | Path) -> Path:
    """Of weights or a release, which may lie in a store: as `remote_paths.local_release`."""
    text = expand(str(text))
    return local_release(parse_url(text)) if is_url(text) else Path(text)


def check_can_write(option: str, path: Path) -> None:
    """Found out before the work, not when its result is to be written.

    Args:
        option: that names the file, for the error; "": none does.
        path: of a file, in a folder that exists.
    Raises: UserError if the file could not be written.
    """
    place = f"{option} {path}".strip()
    if path.is_dir():
        raise UserError(f"{place}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{place}: no folder {path.parent}; make it, or give another file")
    check_folder_takes_files(path.parent, place)


def check_can_make(option: str, folder: Path) -> None:
    """As `check_can_write`, for a folder that may have to be made first."""
    above = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), Path("."))
    if not above.is_dir():
        raise UserError(f"{option} {folder}: {above} is a file; give a folder")
    check_folder_takes_files(above, f"{option} {folder}")


def check_folder_takes_files(folder: Path, place: object = "") -> None:
    """By a file without a name: permissions tell nothing of a file system that is full or read-only.

    Args:
        place: what could not be written, for the error; "": the folder.
    Raises: UserError if a file of some kilobytes cannot be written into the folder.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            # Some file systems say only here that they are full.
            os.fsync(file.fileno())
    except OSError as error:
        told = describe_os_error(error, folder)
        raise UserError(f"{place or folder}: cannot be written ({told}); give another place, or make room") from None
