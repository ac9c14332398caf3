"""Write the log of one rank: a file that all starts of a run append to."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from peco_ds.errors import shown_command

FOLDER = "logs"

logger = logging.getLogger("peco_ds")

# Functions that undo what the last `log_to` of this process changed.
_undo: list[Callable[[], None]] = []


def log_path(run_folder: Path, rank: int) -> Path:
    return Path(run_folder) / FOLDER / f"rank_{rank:05d}.log"


def stacks_path(run_folder: Path, rank: int) -> Path:
    """The file for the stacks of a rank that hangs."""
    return Path(run_folder) / FOLDER / f"rank_{rank:05d}.stacks.txt"


def log_to(run_folder: Path, rank: int) -> Path:
    """From here on the logger "peco_ds" (every level), Python warnings and uncaught tracebacks also go to
    RUN/logs/rank_NNNNN.log.

    What stderr shows does not change. An existing file is continued, under a header line of this start. A second call
    in one process moves the log.

    Returns: the file.
    """
    close()
    path = log_path(run_folder, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _RankFile(path, _ends_cut_short(path))
    handler.setFormatter(_one_line_a_record(rank))
    # A logger drops records below its own level before any handler sees them, so the level moves to the existing
    # handlers.
    shown = logger.getEffectiveLevel()
    levels = [(other, other.level) for other in logger.handlers]
    level = logger.level
    for other in logger.handlers:
        other.setLevel(max(other.level, shown))
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)

    def undo() -> None:
        logger.removeHandler(handler)
        handler.close()
        logger.setLevel(level)
        for other, was in levels:
            other.setLevel(was)

    _undo.append(undo)
    _copy_hooks(handler)
    logger.debug(
        "==== start %s on %s pid %d: %s; %s",
        time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        socket.gethostname(),
        os.getpid(),
        _versions(),
        shown_command(),
    )
    return path


def close() -> None:
    """End the log; logger and hooks are as they were before `log_to`."""
    while _undo:
        _undo.pop()()


def _copy_hooks(handler: logging.Handler) -> None:
    """Warnings and uncaught tracebacks are shown as before, and also written to the handler."""

    def record(level: int, message: str, trace=None) -> None:
        handler.handle(logging.LogRecord("python", level, "", 0, message, None, trace))

    show, main_hook, thread_hook = warnings.showwarning, sys.excepthook, threading.excepthook

    def on_warning(message, category, filename, lineno, file=None, line=None):
        show(message, category, filename, lineno, file, line)
        record(logging.WARNING, f"{filename}:{lineno}: {category.__name__}: {message}")

    def on_error(kind, error, trace):
        main_hook(kind, error, trace)
        record(logging.ERROR, "uncaught", (kind, error, trace))

    def on_thread_error(args):
        thread_hook(args)
        if args.exc_value is not None:
            record(
                logging.ERROR,
                f"uncaught in thread {args.thread.name if args.thread else '?'}",
                (args.exc_type, args.exc_value, args.exc_traceback),
            )

    warnings.showwarning, sys.excepthook, threading.excepthook = on_warning, on_error, on_thread_error

    def undo() -> None:
        warnings.showwarning, sys.excepthook, threading.excepthook = show, main_hook, thread_hook

    _undo.append(undo)


class _RankFile(logging.FileHandler):
    """A log that cannot be written (a full disk) must not fill stderr with tracebacks of its own, nor end the run."""

    def __init__(self, path: Path, cut_short: bool) -> None:
        super().__init__(path, mode="a", encoding="utf-8", errors="backslashreplace")
        if cut_short:
            assert self.stream is not None, "opened by logging.FileHandler, whose delay is off"
            self.stream.write("\n")

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def _one_line_a_record(rank: int) -> logging.Formatter:
    return logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")


def _ends_cut_short(path: Path) -> bool:
    """Whether the last line has no end, as after a kill."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _versions() -> str:
    return ", ".join(
        [
            f"python {platform.python_version()}",
            *(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed")),
        ]
    )
