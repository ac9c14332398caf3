"""The bytes of a tar in a store: members by range, neighbours in one request, behind the cache of the node."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from peco_ds.data.range_cache import RangeCache, cache_of, warn_of
from peco_ds.errors import StoreFault
from peco_ds.remote_paths import GAP_BYTES, REQUEST_BYTES, RemotePath


class Span(NamedTuple):
    """A member of a tar, as an index has it."""

    offset: int
    size: int
    crc32: int


class RemoteTar:
    """Args: path: of the tar.  tar_bytes: its size.  sha256: of its content, by the manifest; "": not known, nothing is
    kept in the cache.
    """

    def __init__(self, path: RemotePath, tar_bytes: int, sha256: str = "") -> None:
        self._path, self._tar_bytes, self._sha256 = path, tar_bytes, sha256
        self._cache = cache_of(path.access) if sha256 else None
        self._descriptor = -1
        # Offset of a member -> where its bytes come, and the offset that those begin at.
        self._asked: dict[int, tuple[Future[bytes], int]] = {}

    # ---------------------------------------------------------------------------------------- reading

    def prefetch(self, spans: Iterable[Span]) -> None:
        """Ask for members that will be read next; earlier ones that nobody read are forgotten."""
        self.forget()
        missing = []
        for span in spans:
            kept = self._kept(span)
            if kept is None:
                missing.append(span)
            else:
                done: Future[bytes] = Future()
                done.set_result(kept)
                self._asked[span.offset] = done, span.offset
        pool = pool_of(os.getpid(), self._path.access.requests)
        for start, size, members in joined(missing):
            future = pool.submit(self._path.read_range, start, size)
            for span in members:
                self._asked[span.offset] = future, start

    def forget(self) -> None:
        for future, _ in self._asked.values():
            future.cancel()
        self._asked.clear()

    def read(self, span: Span) -> bytes:
        """The bytes of a member, those that were indexed and no others.

        Raises: StoreFault.
        """
        asked = self._asked.pop(span.offset, None)
        if asked is not None:
            future, start = asked
            data = future.result()[span.offset - start :][: span.size]
            if zlib.crc32(data) == span.crc32:
                self._keep(span, data)
                return data
        kept = self._kept(span)
        if kept is not None:
            return kept
        data = self._path.read_range(span.offset, span.size, lambda data: _fault_of(span, data))
        self._keep(span, data)
        return data

    def stage(self) -> None:
        """Bring the whole tar into the cache. Raises: StoreFault; OSError of the disk."""
        if self._cache is not None:
            self._cache.whole(self._name, self._tar_bytes, self._download)

    def unopened(self) -> RemoteTar:
        """For another process."""
        return RemoteTar(self._path, self._tar_bytes, self._sha256)

    def close(self) -> None:
        self.forget()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    # ------------------------------------------------------------------------------------- the cache

    def _kept(self, span: Span) -> bytes | None:
        """The bytes of a member by the cache; None where it has not these."""
        if self._cache is None:
            return None
        try:
            if self._descriptor < 0:
                self._descriptor = self._open(self._cache)
            data = os.pread(self._descriptor, span.size, span.offset)
            self._cache.used(self._name)
        except OSError as error:
            self._give_up(error)
            return None
        return data if len(data) == span.size and zlib.crc32(data) == span.crc32 else None

    def _open(self, cache: RangeCache) -> int:
        if not self._path.access.whole_shards:
            return cache.open(self._name)
        path = cache.whole(self._name, self._tar_bytes, self._download)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    @property
    def _name(self) -> str:
        return self._sha256 + (".tar" if self._path.access.whole_shards else ".ranges")

    def _keep(self, span: Span, data: bytes) -> None:
        if self._cache is None:
            return
        try:
            # Removed by another process for want of room: what is written to it now would be lost, and take room.
            if self._descriptor >= 0 and os.fstat(self._descriptor).st_nlink == 0:
                os.close(self._descriptor)
                self._descriptor = -1
            if self._descriptor < 0:
                self._descriptor = self._open(self._cache)
            os.pwrite(self._descriptor, data, span.offset)
            self._cache.wrote(span.size)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        warn_of(error, self._path.access.cache)
        self._cache = None

    def _download(self, path: Path) -> None:
        """Raises: StoreFault where the shard has changed; OSError of the disk."""
        digest = hashlib.sha256()
        with open(path, "r+b") as file:
            for chunk in chunks_of(self._path, self._tar_bytes):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != self._sha256:
            raise StoreFault(
                f"{self._path}: changed since the set was made (sha256 differs from the manifest's); put the old one "
                "back, or make the set again"
            )


def _fault_of(span: Span, data: bytes) -> str:
    if zlib.crc32(data) == span.crc32:
        return ""
    return "their CRC-32 differs from the index, as it does where the shard was replaced"


def joined(spans: Iterable[Span]) -> Iterator[tuple[int, int, list[Span]]]:
    """(first byte, number of bytes, members) of each request: members with small gaps between them go together."""
    members: list[Span] = []
    start = end = 0
    for span in sorted(spans):
        if members and (span.offset - end > GAP_BYTES or span.offset + span.size - start > REQUEST_BYTES):
            yield start, end - start, members
            members = []
        if not members:
            start = end = span.offset
        members.append(span)
        end = max(end, span.offset + span.size)
    if members:
        yield start, end - start, members


def chunks_of(path: RemotePath, size: int, see: Callable[[int], None] = lambda _size: None) -> Iterator[bytes]:
    """A file from end to end, a few requests ahead of its reader.

    Args:
        see: called with the bytes of each chunk as it comes.
    """
    pool, starts = pool_of(os.getpid(), path.access.requests), range(0, size, REQUEST_BYTES)
    ahead: list[Future[bytes]] = []
    for start in starts:
        ahead.append(pool.submit(path.read_range, start, min(REQUEST_BYTES, size - start)))
        if len(ahead) >= max(2, path.access.requests // 2):
            chunk = ahead.pop(0).result()
            see(len(chunk))
            yield chunk
    for future in ahead:
        chunk = future.result()
        see(len(chunk))
        yield chunk


class ForwardReader:
    """A file of a store, read once from its start to its end; `tarfile` looks back by one block at most.

    Attributes:
        digest: sha256 of what was read.
    """

    _LOOKBACK_BYTES = 1 << 16

    def __init__(self, path: RemotePath, size: int) -> None:
        self._chunks, self._size = chunks_of(path, size), size
        self._start, self._buffer, self._position = 0, bytearray(), 0
        self.digest = hashlib.sha256()

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        assert position >= self._start, "read once, from start to end"
        self._position = position
        return position

    def read(self, size: int) -> bytes:
        end = min(self._position + size, self._size)
        while self._start + len(self._buffer) < end:
            self._drop_read()
            chunk = next(self._chunks)
            self.digest.update(chunk)
            self._buffer += chunk
        data = bytes(self._buffer[self._position - self._start : max(end, self._position) - self._start])
        self._position += len(data)
        return data

    def _drop_read(self) -> None:
        done = min(self._position - self._LOOKBACK_BYTES - self._start, len(self._buffer))
        if done > 0:
            del self._buffer[:done]
            self._start += done


@lru_cache(maxsize=4)
def pool_of(_process: int, requests: int) -> ThreadPoolExecutor:
    """The threads of this process that wait for answers. Those of a parent are not inherited over a fork."""
    return ThreadPoolExecutor(requests, thread_name_prefix="store")


def read_index(path: RemotePath, sha256: str) -> bytes:
    """An index file, from the cache where it is there.

    Args:
        sha256: by the manifest; "": any.
    Raises: FileNotFoundError; StoreFault.
    """
    cache = cache_of(path.access) if sha256 else None
    if cache is None:
        return path.read_bytes()
    name = f"{sha256}.json"

    def write(draft: Path) -> None:
        text = path.read_bytes()
        # Another file is not kept: the reader says what is wrong with it.
        if hashlib.sha256(text).hexdigest() != sha256:
            raise _Another(text)
        draft.write_bytes(text)

    try:
        text = cache.whole(name, 1 << 20, write).read_bytes()
        if hashlib.sha256(text).hexdigest() == sha256:
            return text
        # A disk's fault.
        cache.path(name).unlink(missing_ok=True)
    except _Another as another:
        return another.text
    except FileNotFoundError:
        # Of the store, or removed between its making and its reading; asked for once more, that shows.
        pass
    except OSError as error:
        warn_of(error, path.access.cache)
    return path.read_bytes()


class _Another(Exception):
    def __init__(self, text: bytes) -> None:
        self.text = text
