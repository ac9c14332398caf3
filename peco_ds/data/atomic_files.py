"""Write files that are whole or absent, however many processes write into a folder and whenever one of them dies."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def temporary_file(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path`, open for writing under a temporary name (`file.name`) that no other process has, and locked
    for as long as its writer lives.

    The caller makes it durable (`flush_to_disk`) and renames it. A file that was not renamed is removed at the end.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(6)}.tmp")
        with open(temporary, "xb") as file:
            # Before it was locked, another process may have taken it for a leftover and removed it.
            if _lock(file, wait=False) is False or not temporary.exists():
                continue
            try:
                yield file
            finally:
                temporary.unlink(missing_ok=True)
            return


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that one process alone writes: on disk, whole, under a draft's name, and only then under its own.

    Raises: OSError; what stood there stays, and no draft is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove temporary files of these names whose writers have died.

    On a file system without locks nothing is removed.
    """
    for name in names:
        remove_abandoned(find_temporary_files(folder, name))


def find_temporary_files(folder: Path, name: str = "*") -> list[Path]:
    return list(folder.glob(f".{name}.*.tmp"))


def remove_abandoned(paths: Iterable[Path]) -> None:
    """Remove those of the temporary files whose writers have died, as `remove_leftovers` does."""
    for path in paths:
        try:
            # NFS locks only files that are open for writing.
            with open(path, "r+b") as file:
                if _lock(file, wait=False):
                    path.unlink(missing_ok=True)
        except FileNotFoundError:
            # Its writer has just renamed it.
            continue


@contextmanager
def lock_file(lock_path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock file; the system gives it back when its holder dies, so none is ever left behind.

    Args:
        wait: for another holder to finish.
    Yields: whether nobody else holds it. On a file system without locks: True.
    """
    # Appending, so that a file of that name which is nobody's lock keeps its content.
    with open(lock_path, "ab") as file:
        try:
            yield _lock(file, wait=wait) is not False
        finally:
            # A file system without locks raises an error here.
            with suppress(OSError):
                # To close the file is not enough where a process was forked meanwhile: it holds the lock too.
                fcntl.flock(file, fcntl.LOCK_UN)


def _lock(file, *, wait: bool) -> bool | None:
    """True: locked; False: another process holds it; None: the file system has no locks.

    Not POSIX locks (lockf): a process loses those when it closes any other handle of the file, as hashing it does.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
