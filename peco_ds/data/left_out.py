"""The account of what is left out of an image set, and what systems leave among the files of their users."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from peco_ds.data.atomic_files import temporary_file

# In lower case. Folders of NAS systems (thumbnails, waste, snapshots), Windows, macOS, Linux and editors. Those that
# begin with a dot are hidden anyway.
SYSTEM_FOLDERS = frozenset(
    {
        *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "@__thumb", "@transcode", "@sharesnap", "@synoresource"),
        *("#recycle", "#snapshot", "~snapshot", "$recycle.bin", "recycler", "recycled", "$extend", "$winreagent"),
        *("system volume information", "config.msi", "lost+found", "__macosx", "network trash folder"),
        *("temporary items", "thevolumesettingsfolder", "__pycache__", "_vti_cnf", "_vti_pvt", "lost.dir"),
    }
)
_FOUND_BY_CHKDSK = re.compile(r"found\.\d{3}")
_SYSTEM_FILES = frozenset(
    {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "picasa.ini", "autorun.inf"}
)

# The reasons, in words that follow a number.
HIDDEN = "hidden"
SYSTEM_FILE = "file of a system"
SYSTEM_FOLDER = "folder of a system, with all in it"
HIDDEN_FOLDER = "hidden folder, with all in it"
SEEN_BEFORE = "link to a folder that is there already"
UPWARDS = "link to a folder that this one lies in"
DANGLING = "link to nothing"
NOT_REGULAR = "no regular file"
EMPTY = "empty file"
NO_IMAGE = "no image"
NOT_DECODED = ", not decoded"
RAW = f"camera raw{NOT_DECODED}"

# Remarks on what is taken.
LINKED = "reached by a link"
LINKED_TWICE = "linked a second time, so in the set twice"
CASE_APART = "named as another but for capitals"

# In a line for people: the reasons that are told, and the characters of a name.
_MOST_REASONS, _LONGEST_NAME = 6, 80


def folder_of_a_system(name: str) -> str:
    """The reason for which a folder of this name is not entered; "" where it is."""
    if name.startswith("."):
        return HIDDEN_FOLDER
    plain = name.lower()
    return SYSTEM_FOLDER if plain in SYSTEM_FOLDERS or _FOUND_BY_CHKDSK.fullmatch(plain) else ""


def file_of_a_system(name: str) -> str:
    """The reason for which a file of this name is left out; "" where its content decides."""
    if name.startswith("."):
        return HIDDEN
    return SYSTEM_FILE if name.lower() in _SYSTEM_FILES else ""


class Account:
    """How many of each reason, and the first of each by name.

    Args:
        counts: reason -> [number, example], as `as_json` gave it.
    """

    def __init__(self, counts: dict[str, tuple[int, str]] | None = None) -> None:
        self._counts: dict[str, tuple[int, str]] = {}
        self.merge(counts or {})

    def __len__(self) -> int:
        return len(self._counts)

    def __contains__(self, reason: str) -> bool:
        return reason in self._counts

    def add(self, reason: str, name: str, number: int = 1) -> None:
        before, example = self._counts.get(reason, (0, name))
        self._counts[reason] = before + number, example

    def merge(self, counts: dict[str, tuple[int, str]]) -> None:
        for reason, (number, example) in counts.items():
            self.add(reason, example, number)

    def as_json(self) -> dict[str, tuple[int, str]]:
        return dict(self._counts)

    def numbers(self) -> dict[str, int]:
        """Reason -> number, as a manifest keeps it."""
        return {reason: number for reason, (number, _) in sorted(self._counts.items())}

    def total(self) -> int:
        return sum(number for number, _ in self._counts.values())

    def text(self) -> str:
        """`3 hidden, e.g. '.DS_Store'; 1 AVIF image, e.g. 'f.avif'`, commonest first; "" where there is none.

        With the remedy for images that are not decoded.
        """
        ranked = sorted(self._counts.items(), key=lambda item: (-item[1][0], item[0]))
        told = [f"{number} {reason}, e.g. {_shown(example)}" for reason, (number, example) in ranked[:_MOST_REASONS]]
        rest = sum(number for _, (number, _) in ranked[_MOST_REASONS:])
        if rest:
            told.append(f"{rest} for other reasons")
        if any(reason.endswith(NOT_DECODED) for reason in self._counts):
            told.append("what is not decoded can be converted to JPEG or PNG")
        return "; ".join(told)


def _shown(name: str) -> str:
    return repr(name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}")


def write_list(path: Path, entries: Iterable[tuple[str, str]]) -> None:
    """Write one line `reason<TAB>name` for each (name, reason), whole or not at all."""
    with temporary_file(path) as file:
        for name, reason in entries:
            file.write(f"{reason}\t{visible(name)}\n".encode())
        file.flush()
        Path(file.name).replace(path)


def visible(name: str) -> str:
    """A file name on one line: line breaks and other control characters as escapes, bytes that are no UTF-8 marked."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
