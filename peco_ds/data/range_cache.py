"""A folder that keeps what was read from a store, on a disk of the node, for all processes of it.

One file a shard, named by the shard's sha256: whole, or with holes where nothing was read yet. Who reads a range
compares it with its CRC-32, which the index has: a hole, a write that was cut off and a disk's fault all show there, so
readers and writers need no lock. Above its bound the files that were used longest ago go.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from peco_ds.data.atomic_files import lock_file, temporary_file
from peco_ds.errors import UserError, describe_os_error
from peco_ds.remote_paths import Access
from peco_ds.user_paths import check_can_make, check_folder_takes_files, expand_path

logger = logging.getLogger("peco_ds")

# Inside data.cache, so that nothing else in that folder is ever removed.
_FOLDER = "peco_ds_cache"
_LOCKS = 64
# A file's time of use is written down so often at most.
_USED_EVERY_S = 30.0
# What is freed beside what is needed, so that not every write has to look for room.
_SPARE_SHARE = 0.1
_warned: set[str] = set()


class RangeCache:
    """Args: folder: data.cache.  max_bytes: of all files in it; a process looks after every 64th part of it that it
    has written.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self._max_bytes = folder / _FOLDER, max_bytes
        self._unseen_bytes = 0
        self._used_at: dict[str, float] = {}
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self.folder / name

    def used(self, name: str) -> None:
        """Write down that a file is in use."""
        now = time.monotonic()
        if now - self._used_at.get(name, -_USED_EVERY_S) >= _USED_EVERY_S:
            self._used_at[name] = now
            with suppress(OSError):
                os.utime(self.path(name))

    # ----------------------------------------------------------------------------------- whole files

    def whole(self, name: str, size: int, write: Callable[[Path], None]) -> Path:
        """A whole file: the one that stands there, or what `write` makes under a temporary name.

        The processes of a node wait for the one that makes it.

        Raises: what `write` raises; OSError of the disk.
        """
        path = self.path(name)
        if not path.is_file():
            lock = self.folder / f"lock-{hash_of(name) % _LOCKS:02d}"
            with lock_file(lock, wait=True):
                if not path.is_file():
                    self.make_room(size)
                    with temporary_file(path) as file:
                        write(Path(file.name))
                        os.replace(file.name, path)
        self.used(name)
        return path

    # ---------------------------------------------------------------------------------------- ranges

    def open(self, name: str) -> int:
        """File descriptor of a file of ranges, made where there is none."""
        descriptor = os.open(self.path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.used(name)
        return descriptor

    def wrote(self, size: int) -> None:
        """Tell of bytes that were written; looks for room where they have become many."""
        self._unseen_bytes += size
        if self._unseen_bytes > self._max_bytes // 64:
            self.make_room(0)

    def make_room(self, size: int) -> None:
        """Remove the files that were used longest ago, until `size` more bytes fit."""
        self._unseen_bytes = 0
        found = []
        for entry in os.scandir(self.folder):
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                # st_blocks: holes take no room.
                found.append((status.st_mtime, status.st_blocks * 512, entry.path))
        excess = sum(taken for _, taken, _ in found) + size - self._max_bytes
        if excess <= 0:
            return
        excess += int(self._max_bytes * _SPARE_SHARE)
        for _, taken, path in sorted(found):
            if excess <= 0:
                break
            # Drafts and locks are others', who may be at work.
            if Path(path).suffix in (".tar", ".ranges", ".json"):
                with suppress(OSError):
                    os.unlink(path)
                    excess -= taken


def hash_of(name: str) -> int:
    """The same number in all processes, of a name that begins with a sha256."""
    return int(name[:8], 16)


def cache_of(access: Access) -> RangeCache | None:
    """The cache that the settings name, or None. A folder that cannot be written is told of once: reading goes on."""
    if not access.cache:
        return None
    try:
        return RangeCache(Path(access.cache), access.cache_bytes)
    except OSError as error:
        warn_of(error, access.cache)
        return None


def warn_of(error: OSError, folder: object) -> None:
    """One line for each kind of failure: what is not kept is read again, so a full disk ends no run."""
    line = f"data.cache {describe_os_error(error, folder)}; what is read is not kept"
    if line not in _warned:
        _warned.add(line)
        logger.warning("%s", line)


def check_cache(access: Access) -> None:
    """Found out at the start.

    Raises: UserError for a cache that cannot be written.
    """
    if not access.cache:
        return
    folder = expand_path(access.cache)
    check_can_make("data.cache", folder)
    try:
        RangeCache(folder, access.cache_bytes)
    except OSError as error:
        raise UserError(f"data.cache {describe_os_error(error, folder)}; give a folder that can be written") from None
    check_folder_takes_files(folder / _FOLDER, f"data.cache {folder}")
