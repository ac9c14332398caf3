"""Packages that a machine without network lacks, from a folder of wheels (benchmarks/gather_wheels.sh).

Nothing here needs more than Python's own library.
"""

from __future__ import annotations

import os
import re
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from peco_ds.errors import UserError

REQUIREMENTS = Path(__file__).resolve().parent.parent.parent / "requirements.txt"


def add_wheels(folder: Path, to: Path) -> list[str]:
    """Unpack the wheels that this Python needs, put them first on the path, its own and that of processes it starts.

    A wheel is needed where its package is absent, older, or another version than the one that requirements.txt pins.

    Args:
        to: an empty folder.
    Returns: what was added, name and version, and what does not fit this Python, a line each.
    Raises: UserError where the folder has no wheel, or a file that is none.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise UserError(f"--wheels {folder}: no wheel in it; benchmarks/gather_wheels.sh gathers them")
    pinned, added, unfit = pinned_packages(), [], []
    for wheel in wheels:
        name, version, *_, tags, _, _ = wheel.stem.split("-")
        if not needed(name, version, pinned):
            continue
        if not fits(tags):
            unfit.append(f"{wheel.name} is not for Python {sys.version_info[0]}.{sys.version_info[1]}: left out")
            continue
        try:
            with zipfile.ZipFile(wheel) as file:
                file.extractall(to)
        except zipfile.BadZipFile:
            raise UserError(f"{wheel}: not a wheel, or cut off; gather it again") from None
        added.append(f"{name} {version}")
    if added:
        sys.path.insert(0, str(to))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(to), *filter(None, [os.environ.get("PYTHONPATH")])])
    return [f"from wheels: {', '.join(added) or 'nothing, all is installed'}", *unfit]


def missing_packages() -> list[str]:
    """Lines for packages of requirements.txt that are absent or too old."""
    found = []
    for name, sign, version in requirements():
        installed = version_of(name)
        if installed is None:
            found.append(f"{name} is not installed")
        elif older(installed, version) or (sign == "==" and installed != version):
            found.append(f"{name} {installed} is installed, requirements.txt has {sign}{version}")
    return found


def needed(name: str, version: str, pinned: dict[str, str]) -> bool:
    installed = version_of(name)
    return installed is None or older(installed, version) or pinned.get(plain(name), installed) != installed


def fits(tags: str) -> bool:
    """Whether a wheel's Python tags, such as py2.py3 or cp312, have this Python."""
    return bool({"py3", f"cp{sys.version_info[0]}{sys.version_info[1]}"} & set(tags.split(".")))


def requirements() -> list[tuple[str, str, str]]:
    """(name, sign, version) of each line of requirements.txt; of a range the lower end."""
    return re.findall(r"^([\w-]+)(>=|==)([\w.]+)", REQUIREMENTS.read_text(), re.MULTILINE)


def pinned_packages() -> dict[str, str]:
    return {plain(name): version for name, sign, version in requirements() if sign == "=="}


def version_of(name: str) -> str | None:
    """None: not installed."""
    try:
        return metadata.version(plain(name)).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


def older(version: str, other: str) -> bool:
    return numbers(version) < numbers(other)


def numbers(version: str) -> list[int]:
    """2.15.0rc1 -> 2, 15, 0."""
    return [int(number) for number in re.findall(r"\d+", re.split(r"[a-z+]", version, maxsplit=1)[0])]


def plain(name: str) -> str:
    """One spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()
