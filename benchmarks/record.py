"""What the benchmarks share around their measurements: the command line, tables, and a record that says command,
versions, hardware and date.

What needs more than Python's own library is imported where it is used: tables and versions are there on a machine that
lacks packages.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from peco_ds.errors import UserError
from peco_ds.own_files import Own, own_png, refuse_foreign, written_whole
from peco_ds.user_paths import check_folder_takes_files

if TYPE_CHECKING:
    from peco_ds.command_line import Parser

T = TypeVar("T")


def _command_of(record: Path) -> str:
    """Of a record; "" of any other text."""
    lines = record.read_text(encoding="utf-8").splitlines()[:3]
    return lines[2].removeprefix("`") if len(lines) == 3 and lines[0].startswith("# ") else ""


def _lies_by_its_record(path: Path) -> bool:
    return _command_of(path.with_suffix(".md")).startswith(("python -m benchmarks.", "python benchmarks/"))


# Pictures of before they named their maker are known by the record of the same name beside them.
OWN_PICTURE = own_png("benchmarks", older=_lies_by_its_record)


def benchmark_parser(name: str, description: str, *, gpu: str = "", plot: str = "", overrides: str = "") -> Parser:
    """A parser with the options that most benchmarks have.

    Args:
        name: of the module.
        gpu, plot, overrides: the help of --gpu, --plot and key.sub=value; "": the benchmark has none.
    """
    from peco_ds.command_line import Parser

    parser = Parser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if gpu:
        parser.add_argument("--gpu", action="store_true", help=gpu)
    parser.add_argument("--record", type=Path, metavar="FILE.md", help="also write the tables to this file")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE.png", help=f"also draw {plot}")
    if overrides:
        parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help=overrides)
    return parser


def parse(parser: Parser, argv: list[str] | None, renamed: dict[str, str] | None = None) -> argparse.Namespace:
    """The arguments, and under `command` the whole command.

    Args:
        renamed: today's name of an option by its old one.
    Raises: UserError for --gpu where torch finds none.
    """
    words = sys.argv[1:] if argv is None else argv
    for old, new in (renamed or {}).items():
        if any(word.split("=")[0] == old for word in words):
            sys.stderr.write(f"{old} is called {new} now\n")
            words = [new + word.removeprefix(old) if word.split("=")[0] == old else word for word in words]
    args = parser.parse_intermixed_args(words)
    args.command = f"{parser.prog} {shlex.join(words)}".strip()
    if getattr(args, "gpu", False):
        require_gpu()
    check_outputs(args)
    return args


def check_outputs(args: argparse.Namespace) -> None:
    """Before anything is measured.

    Raises: UserError where --record or --plot name a file that this benchmark did not write, or that cannot be written.
    """
    kinds = {"record": own_record(args.command), "plot": OWN_PICTURE}
    for option, own in kinds.items():
        path = getattr(args, option, None)
        if path is not None:
            refuse_foreign(path, own)
            there = next(parent for parent in path.absolute().parents if parent.exists())
            check_folder_takes_files(there, f"--{option} {path}")


def own_record(command: str) -> Own:
    """Records of one benchmark, which name their command in the third line; as a file or as a module, as earlier ones.

    Args:
        command: of the benchmark that asks.
    """
    found = re.match(r"python (?:-m benchmarks\.|benchmarks/)(\w+)", command)
    name = found[1] if found else command

    def knows(path: Path) -> bool:
        lines = path.read_text(encoding="utf-8").splitlines()[:3]
        return len(lines) == 3 and lines[2].startswith(
            (f"`python -m benchmarks.{name}", f"`python benchmarks/{name}.py")
        )

    return Own(f"benchmarks.{name}", knows)


def at_least(low: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `low` on, for argparse."""

    def number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value}: give {low} or more")
        return value

    # argparse names the type of a text that is no number
    number.__name__ = "whole number"
    return number


def chosen(option: str, text: str, known: Iterable[str]) -> list[str]:
    """Values of a list on the command line, written with commas.

    Raises: UserError for one that is not known.
    """
    values = text.split(",")
    for value in values:
        if value not in known:
            raise UserError(f"--{option} {value}: not one of {', '.join(known)}; values are separated by commas")
    return values


def read_checked(kind: type[T], path: Path, example: str) -> T:
    """A YAML file as one of pydantic's dataclasses.

    Raises: UserError if there is no such file, or it holds something else; names the `example` to take.
    """
    from pydantic import TypeAdapter, ValidationError

    from peco_ds.strict_yaml import NOT_YAML, read_yaml

    try:
        return TypeAdapter(kind).validate_python(read_yaml(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file such as {example}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; correct the file") from None
    except NOT_YAML as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None


def require_gpu() -> None:
    """For --gpu. Raises: UserError where torch finds none."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("--gpu: torch finds no GPU here; drop --gpu, or start it where there is one")


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head, *lines = (f"| {' | '.join(map(str, cells))} |" for cells in (heads, *rows))
    return "\n".join([head, f"|{'---|' * len(heads)}", *lines])


def publish(args: argparse.Namespace, title: str, body: str, *packages: str) -> str:
    """The text for standard output: the record, where --record asks for one, else its body alone."""
    if not args.record:
        return f"{body.strip()}\n"
    try:
        return write_record(args.record, title, args.command, body, *packages)
    except (OSError, UserError):
        # What was measured is not lost to a disk that has filled meanwhile.
        sys.stdout.write(f"{body.strip()}\n")
        sys.stdout.flush()
        raise


def write_record(path: Path, title: str, command: str, body: str, *packages: str) -> str:
    """Write a markdown record whole, or over what an earlier call of the same run wrote.

    Args:
        body: markdown: what was done, tables.  packages: whose versions matter beside torch's.
    Returns: the text.
    Raises: UserError for a file there that is no record of this benchmark; OSError that names the file.
    """
    about = f"{hardware()}; {versions(*packages)}; {time.strftime('%d %B %Y')}."
    text = f"# {title}\n\n`{command}`\n\n{body.strip()}\n\n{about}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, own_record(command)) as temporary:
        temporary.write_text(text)
    return text


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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
