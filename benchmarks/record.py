"""What every benchmark's record says beside its figures: command, versions, hardware, date."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path


def at_least(low: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `low` on, for argparse."""

    def number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value}: give {low} or more")
        return value

    number.__name__ = "whole number"  # argparse says so of a text that is none
    return number


def require_gpu() -> None:
    """For --gpu. Raises: UserError where torch finds none."""
    import torch

    from peco_ds.errors import UserError

    if not torch.cuda.is_available():
        raise UserError("--gpu: torch finds no GPU here; drop --gpu, or start it where there is one")


def hardware() -> str:
    """The GPU by name, memory and driver's CUDA.

    On a machine without one the processor, its cores, and how many of them torch uses.
    """
    import torch

    cores = os.cpu_count() or 1
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {cores} CPU cores, CUDA {torch.version.cuda}"
    return f"{_processor()}, {cores} cores, {torch.get_num_threads()} of them used by torch, no GPU"


def versions(*packages: str) -> str:
    """Installed versions of Python, torch and what else a benchmark names.

    One that is not installed is said to be absent.
    """
    found = [f"python {platform.python_version()}"]
    for package in ("torch", *packages):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(dict.fromkeys(found))


def write_record(path: Path, title: str, command: str, body: str, *packages: str) -> str:
    """Write a markdown record whole, or over what an earlier call of the same run wrote.

    Args:
        body: markdown: what was done, tables.  packages: whose versions matter beside torch's.
    Returns: the text.
    """
    text = (
        f"# {title}\n\n`{command}`\n\n{body.strip()}\n\n{hardware()}; {versions(*packages)}; "
        f"{time.strftime('%d %B %Y')}.\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)
    return text


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
