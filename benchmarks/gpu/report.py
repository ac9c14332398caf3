"""What a GPU run has found: four files, each written anew and whole after every part.

Nothing here needs more than Python's own library.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

RESULTS, FIGURES, SUMMARY, ARCHIVE = "results.md", "results.json", "summary.txt", "logs.tar.gz"
NOT_BEGUN, UNDER_WAY, DONE, FAILED, CUT_OFF = "not begun", "under way", "done", "failed", "cut off"
# Of a log's end; DeepSpeed's and a compiler's may be long.
LOG_BYTES = 2**18


class Verdict(NamedTuple):
    what: str
    bar: str
    found: str  # "" where it was not measured
    met: bool | None  # None: no figure, or none that the bar is meant for

    def line(self) -> str:
        word = {True: "met", False: "MISSED", None: "no verdict" if self.found else "not measured"}[self.met]
        return f"{word}: {self.what}: {self.found + ', ' if self.found else ''}bar {self.bar}"


@dataclass
class PartFound:
    """Of one part."""

    name: str
    title: str
    state: str = NOT_BEGUN
    seconds: float = 0.0
    reason: str = ""
    begun: float = 0.0
    texts: dict[str, str] = field(default_factory=dict)  # markdown by heading
    figures: dict[str, object] = field(default_factory=dict)

    def line(self) -> str:
        took = f" {'in' if self.state == DONE else 'after'} {self.seconds:.0f} s" if self.seconds else ""
        kept = ""
        if self.state == CUT_OFF:
            kept = "; what it had measured is kept" if self.figures else "; it had measured nothing"
        return f"{self.name}: {self.state}{took}{': ' + self.reason if self.reason else ''}{kept}"


class Report:
    """The parts in their order, and the files.

    Args:
        out: folder of the files.
        logs: folder that goes into the archive.
        command: as the user wrote it.
        judge: all figures by part -> verdicts.
    """

    def __init__(self, out: Path, logs: Path, command: str, judge: Callable[[dict], list[Verdict]]) -> None:
        self.out, self.logs, self.command, self._judge = out, logs, command, judge
        self.parts: dict[str, PartFound] = {}
        self.about: dict[str, str] = {}  # hardware, versions, date
        self.notes: list[str] = []
        self._begun = time.monotonic()
        # the deadline's thread writes too
        self._lock = threading.RLock()

    def begin(self, part: PartFound) -> None:
        with self._lock:
            part.state, part.begun = UNDER_WAY, time.monotonic()

    def end(self, part: PartFound, state: str, reason: str = "") -> None:
        with self._lock:
            part.state, part.seconds, part.reason = state, time.monotonic() - part.begun, reason
            self.write()

    def keep(self, part: PartFound, heading: str, text: str, figures: dict[str, object]) -> None:
        """Add to what a part has found, or take the place of what it said under that heading."""
        with self._lock:
            part.texts[heading] = text
            part.figures |= figures
            self.write()

    def cut_off(self, reason: str) -> None:
        """For the part under way, if there is one."""
        with self._lock:
            for part in self.parts.values():
                if part.state == UNDER_WAY:
                    self.end(part, CUT_OFF, reason)

    @property
    def failed(self) -> bool:
        return any(part.state == FAILED for part in self.parts.values())

    def verdicts(self) -> list[Verdict]:
        return self._judge({name: part.figures for name, part in self.parts.items()})

    def write(self) -> None:
        with self._lock:
            write_whole(self.out / SUMMARY, self._summary().encode())
            write_whole(self.out / RESULTS, self._results().encode())
            write_whole(self.out / FIGURES, self._figures().encode())
            write_whole(self.out / ARCHIVE, archive(self.logs))

    def _summary(self) -> str:
        lines = [*self.notes, *(part.line() for part in self.parts.values())]
        return "\n".join([*lines, "", *(verdict.line() for verdict in self.verdicts()), ""])

    def _results(self) -> str:
        parts = [f"# One GPU: what was measured\n\n`{self.command}`", "## Verdicts"]
        parts.append("\n".join(f"- {verdict.line()}" for verdict in self.verdicts()))
        lines = [f"- {text}" for text in (*self.notes, *(part.line() for part in self.parts.values()))]
        parts += ["## Parts", "\n".join(lines)]
        for part in self.parts.values():
            if part.texts:
                parts.append(f"## {part.title}")
                parts += [f"### {heading}\n\n{text}" if heading else text for heading, text in part.texts.items()]
        parts.append("; ".join(self.about.values()) + ".")
        return "\n\n".join(parts) + "\n"

    def _figures(self) -> str:
        parts = {
            name: {"state": part.state, "seconds": round(part.seconds, 1), "reason": part.reason, **part.figures}
            for name, part in self.parts.items()
        }
        found = {
            "command": self.command,
            **self.about,
            "seconds": round(time.monotonic() - self._begun, 1),
            "notes": self.notes,
            "parts": parts,
            "verdicts": [verdict._asdict() for verdict in self.verdicts()],
        }
        return json.dumps(found, indent=1) + "\n"


def write_whole(path: Path, data: bytes) -> None:
    """The old file or the new one, nothing between."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def archive(folder: Path) -> bytes:
    """A .tar.gz of the folder's files, of each text the end."""
    found = io.BytesIO()
    with tarfile.open(fileobj=found, mode="w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                if path.suffix == ".log":
                    data = data[-LOG_BYTES:]
                member = tarfile.TarInfo(str(path.relative_to(folder)))
                member.size, member.mtime = len(data), int(path.stat().st_mtime)
                tar.addfile(member, io.BytesIO(data))
    return found.getvalue()
