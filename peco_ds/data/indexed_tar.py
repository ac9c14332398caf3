"""A WebDataset tar as a random-access list of samples, and a whole set of such tars; on a disk or in a store.

The index is a JSON file beside the tar (or beside the manifest, where the tar was indexed in place): byte offset, size
and CRC-32 of every member. With it any process reads any sample by one `pread` a member, in any order, and knows that
the bytes are those indexed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal, cast

from peco_ds.data.image_formats import HEAD_BYTES
from peco_ds.data.left_out import HIDDEN, file_of_a_system, folder_of_a_system
from peco_ds.data.remote_tar import ForwardReader, RemoteTar, Span, chunks_of, read_index
from peco_ds.errors import UserError
from peco_ds.remote_paths import Access, Place, RemotePath, RemoteStatus, is_url, place_of, usual_access
from peco_ds.schema import (
    FORMAT_VERSION,
    ImageManifest,
    Shard,
    TokenManifest,
    parse_json,
    sha256_of_file,
    short,
    stem_of,
    write_json,
)

INDEX_SUFFIX = ".index.json"
_CHUNK_BYTES = 1 << 20
# Shards that a process checks at once: on a shared file system a hundred thousand would otherwise take minutes.
_CHECKED_AT_ONCE = 8
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class DamagedRecord(UserError):
    """A member whose bytes are not those that were indexed; the message names tar, key and member."""


def index_name(tar_name: str) -> str:
    """`train-000007.tar` -> `train-000007.index.json`."""
    return stem_of(tar_name) + INDEX_SUFFIX


# ------------------------------------------------------------------------------------- making an index


class _TarFile(tarfile.TarFile):
    # Known to Python's tarfile, not to its type stubs.
    members: list[tarfile.TarInfo]


def build_index(
    tar_path: str | Place,
    left_out: list[tuple[str, str]] | None = None,
    *,
    stream: ForwardReader | None = None,
    heads: dict[int, bytes] | None = None,
) -> dict:
    """Read a tar from end to end and list its samples.

    Grouping is WebDataset's: the key is the path up to the first dot of the file name, the extension is the rest in
    lower case, and the members of a sample stand side by side. Folders, files without a dot and hidden files are not
    part of any sample.

    Args:
        left_out: for a tar that was not made here: (member, reason) of each file that is of no sample is added to it,
            and what systems keep (`__MACOSX/`, `@eaDir/`, `Thumbs.db`) is of none.
        stream: of a tar in a store; it is read once.
        heads: where given, the first `HEAD_BYTES` of each member are added to it, by the member's offset.
    Returns: {"format_version", "tar": file name, "tar_bytes", "samples": [{"key", "members": {extension: [offset, size,
        crc32]}}]}, samples in tar order.
    Raises: UserError naming tar and member if the tar is compressed, cut short or damaged, goes on after its end mark,
        holds a link, device, absolute path or `..`, repeats a member, or comes back to a key it had left.
    Source: WebDataset's format description (github.com/webdataset/webdataset, "The WebDataset Format").
    """
    tar_path = place_of(tar_path)
    samples: list[dict] = []
    end = 0
    if stream is None and tar_path.exists() and not tar_path.is_file():
        # To read a pipe would block for ever.
        raise UserError(f"{tar_path}: a folder, pipe or device, no tar; correct the path")
    try:
        tar_bytes = tar_path.stat().st_size
        with _opened(tar_path, stream) as (tar, file):
            add = _Samples(tar_path, samples).add
            for member in tar:
                # tarfile would keep every member in memory.
                tar.members.clear()
                end = member.offset_data + (
                    -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if member.isreg() else 0
                )
                _refuse_unsafe(tar_path, member)
                if member.isdir():
                    continue
                reason = _of_no_sample(member.name) or (left_out is not None and _of_a_system(member.name)) or ""
                if reason and left_out is not None:
                    left_out.append((member.name, reason))
                if not reason:
                    add(member, [member.offset_data, member.size, _crc32(tar_path, file, member, heads)])
            # tarfile takes a missing end mark and a damaged header alike for the end of the archive.
            file.seek(end)
            mark = file.read(tarfile.BLOCKSIZE)
            more = _first_byte_after(file) if mark == bytes(tarfile.BLOCKSIZE) else -1
    except FileNotFoundError:
        raise UserError(f"{tar_path}: no such tar; correct the path") from None
    except UserError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, LookupError, RecursionError, EOFError) as error:
        # Beside its own errors, tarfile lets through what a damaged header makes of its numbers.
        place = f"after member {samples[-1]['key']!r}" if samples else "at its start"
        raise UserError(
            f"{tar_path}: not a whole, uncompressed tar {place} ({error or type(error).__name__}); unpack "
            "it, or copy it again"
        ) from None
    _refuse_odd_end(tar_path, samples, end, mark, more)
    return {"format_version": FORMAT_VERSION, "tar": tar_path.name, "tar_bytes": tar_bytes, "samples": samples}


@contextmanager
def _opened(tar_path: Place, stream: ForwardReader | None) -> Iterator[tuple[_TarFile, BinaryIO]]:
    """The tar, for its headers, and a file, for its members; of a tar in a store both are the one stream."""
    if stream is not None:
        # All that tarfile asks of a file.
        file = cast(BinaryIO, stream)
        with _TarFile.open(tar_path.name, "r:", fileobj=file, encoding="utf-8") as tar:
            yield tar, file
        return
    assert isinstance(tar_path, Path)
    with _TarFile.open(tar_path, "r:", encoding="utf-8") as tar, open(tar_path, "rb") as file:
        yield tar, file


def _refuse_odd_end(tar_path: Place, samples: list[dict], end: int, mark: bytes, more: int) -> None:
    """Raises: UserError unless zeros follow the last member and nothing follows them.

    Args:
        end: byte behind the last member.  mark: the block that stands there.
        more: where the next byte that is not zero stands; -1: nowhere.
    """
    place = f"after sample {samples[-1]['key']!r}" if samples else "at its start"
    if mark != bytes(tarfile.BLOCKSIZE):
        fault = "is cut short" if len(mark) < tarfile.BLOCKSIZE else "has a damaged header"
        raise UserError(f"{tar_path}: {fault} {place}, at byte {end}; copy or make it again")
    if more >= 0:
        raise UserError(
            f"{tar_path}: has its end mark {place}, at byte {end}, and goes on at byte {more}, as tars do that were "
            "put one behind the other by cat; join them by tar --concatenate, or unpack them and make one"
        )


class _Samples:
    """Groups members into samples.

    Args:
        samples: where they are added.
    """

    def __init__(self, tar_path: Place, samples: list[dict]) -> None:
        self._tar_path, self._samples = tar_path, samples
        self._keys: set[str] = set()

    def add(self, member: tarfile.TarInfo, span: list[int]) -> None:
        """Raises: UserError for a key that comes back, or a member that stands twice."""
        folder, _, file_name = member.name.rpartition("/")
        stem, _, extension = file_name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        samples = self._samples
        if not samples or samples[-1]["key"] != key:
            if key in self._keys:
                raise UserError(
                    f"{self._tar_path}: member {member.name!r}: key {key!r} comes back after other keys; "
                    "make the tar again with the members of a sample side by side (tar --sort=name)"
                )
            self._keys.add(key)
            samples.append({"key": key, "members": {}})
        members = samples[-1]["members"]
        if extension.lower() in members:
            raise UserError(
                f"{self._tar_path}: member {member.name!r}: key {key!r} has two members .{extension.lower()}; keep one"
            )
        members[extension.lower()] = span


def _of_no_sample(member_name: str) -> str:
    """Why WebDataset makes a file part of no sample; "" where it is."""
    stem, dot, _ = member_name.rpartition("/")[2].partition(".")
    return "" if stem and dot else HIDDEN if dot else "file without a dot in its name, so of no sample"


def _of_a_system(member_name: str) -> str:
    """Why a file is none of the user's; "" where it is one."""
    *folders, file_name = member_name.split("/")
    # The tar of a folder begins with "."
    in_folder = any(folder_of_a_system(folder) for folder in folders if folder != ".")
    return "in a folder of a system" if in_folder else file_of_a_system(file_name)


def _first_byte_after(file) -> int:
    """Where the first byte that is not zero follows; -1 where none does."""
    while chunk := file.read(_CHUNK_BYTES):
        rest = chunk.lstrip(b"\0")
        if rest:
            return file.tell() - len(rest)
    return -1


def _refuse_unsafe(tar_path: Place, member: tarfile.TarInfo) -> None:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise UserError(
            f"{tar_path}: member {member.name!r} points outside the archive; make the tar again with relative paths"
        )
    if _CONTROL.search(member.name):
        raise UserError(
            f"{tar_path}: member {short(member.name)} has control characters in its name; make the tar "
            "again with names that can be printed"
        )
    if not member.isdir() and (not member.isreg() or member.issparse()):
        raise UserError(
            f"{tar_path}: member {member.name!r} is a link, device or sparse file; make the tar again of "
            "plain files (tar --dereference)"
        )


def _crc32(tar_path: Place, file, member: tarfile.TarInfo, heads: dict[int, bytes] | None) -> int:
    file.seek(member.offset_data)
    crc, left = 0, member.size
    while left:
        chunk = file.read(min(left, _CHUNK_BYTES))
        if not chunk:
            raise UserError(f"{tar_path}: is cut short inside member {member.name!r}; copy or make it again")
        if heads is not None and left == member.size:
            heads[member.offset_data] = chunk[:HEAD_BYTES]
        crc = zlib.crc32(chunk, crc)
        left -= len(chunk)
    return crc


def write_index(
    tar_path: str | Path, index_path: str | Path, left_out: list[tuple[str, str]] | None = None
) -> tuple[int, str]:
    """Index a tar on disk, whole or not at all.

    Args:
        left_out: as `build_index`.
    Returns: number of samples, sha256 of the index file.
    Raises: UserError as `build_index`.
    """
    index = build_index(tar_path, left_out)
    written = write_json(Path(index_path), index)
    return len(index["samples"]), sha256_of_file(written)


# ------------------------------------------------------------------------------------ reading by index


class IndexedTar:
    """Random access to the samples of one tar.

    The tar is opened at the first read of a process and read by `pread`, which has no file position: an instance may be
    pickled, inherited over a fork, or shared by threads.

    Args:
        index_sha256: of the index file, as a manifest holds it; empty to trust the file.
        tar_sha256: of the tar, by which the cache of a store knows it; empty: it is not kept there.
    Raises: UserError if tar or index is missing, the index is not the one expected or damaged, or the tar has another
        size than was indexed.
    """

    # -1: the tar is not open.
    _file_descriptor = -1

    def __init__(
        self, tar_path: str | Place, index_path: str | Place, index_sha256: str = "", tar_sha256: str = ""
    ) -> None:
        self.tar_path, self.index_path = place_of(tar_path), place_of(index_path)
        text = _index_text(self.index_path, index_sha256)
        if index_sha256 and hashlib.sha256(text).hexdigest() != index_sha256:
            raise UserError(
                f"{self.index_path}: is not the index its manifest names (sha256 differs); make the set again "
                "or copy it whole"
            )
        # Among hundreds of ranks a worker reads a few samples of every shard it opens: to parse and check all the
        # others would take as long as decoding those few images. One that the manifest vouches for is cut at the line
        # breaks we wrote, and a sample is parsed when it is read.
        self._tar_bytes, self._samples = (_cut(text) if index_sha256 else None) or self._checked(text)
        # The sample that was read last.
        self._parsed: tuple[int, dict] | None = None
        self.remote = None
        if isinstance(self.tar_path, RemotePath):
            self.remote = RemoteTar(self.tar_path, self._tar_bytes, tar_sha256)
            if index_sha256:
                # Its size was compared at the start, and every member is compared with its CRC.
                return
        tar_bytes = _existing_bytes(self.tar_path, "tar")
        if tar_bytes != self._tar_bytes:
            raise UserError(
                f"{self.tar_path}: holds {tar_bytes} bytes, {self._tar_bytes} were indexed; copy it again, or "
                "index it again if replaced"
            )

    def _checked(self, text: bytes) -> tuple[int, list[bytes]]:
        """As `_cut`, of an index of any layout, looked at from end to end.

        Raises: UserError if it is none.
        """
        try:
            index = parse_json(text.decode("utf-8"))
        except ValueError as error:
            raise UserError(f"{self.index_path}: not JSON ({error}); make the set again or copy it whole") from None
        if not isinstance(index, dict) or index.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{self.index_path}: is no index of format version {FORMAT_VERSION}; make the set again with "
                "this release"
            )
        fault = _fault_of_index(index)
        if fault:
            raise UserError(f"{self.index_path}: {fault}; make the set again or copy it whole")
        return index["tar_bytes"], [
            f'{json.dumps(sample["key"])}, "members": {json.dumps(sample["members"])}'.encode()
            for sample in index["samples"]
        ]

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, i: int) -> str:
        return self._sample(i)["key"]

    def extensions(self, i: int) -> list[str]:
        """Extensions of the members of sample `i`, in tar order."""
        return list(self._sample(i)["members"])

    def _sample(self, i: int) -> dict:
        """Raises: UserError if the index is damaged here."""
        last = self._parsed
        if last is not None and last[0] == i:
            return last[1]
        try:
            sample = parse_json('{"key":' + self._samples[i].decode("utf-8") + "}")
            fault = _fault_of_sample(i, sample, self._tar_bytes)
        except ValueError as error:
            fault = f"sample {i} is not JSON ({error})"
        if fault:
            raise UserError(f"{self.index_path}: {fault}; make the set again or copy it whole")
        self._parsed = i, sample
        return sample

    def read(self, i: int, extensions: Iterable[str] | None = None) -> dict[str, bytes]:
        """Members of sample `i`, in tar order; only those named, where `extensions` is given.

        One that it has not is left out.

        Raises: DamagedRecord if a member ends early or its CRC-32 differs from the indexed one.
        """
        assert 0 <= i < len(self), f"sample {i} of {len(self)}"
        wanted = None if extensions is None else frozenset(extensions)
        return {
            extension: self._read_member(i, extension, *span)
            for extension, span in self._sample(i)["members"].items()
            if wanted is None or extension in wanted
        }

    def prefetch(self, samples: Iterable[int], extensions: Iterable[str] | None = None) -> None:
        """Ask a store for samples that will be read next. Of a tar on a disk: nothing."""
        if self.remote is None:
            return
        wanted = None if extensions is None else frozenset(extensions)
        self.remote.prefetch(
            Span(*span)
            for i in samples
            for extension, span in self._sample(i)["members"].items()
            if wanted is None or extension in wanted
        )

    def _read_member(self, i: int, extension: str, offset: int, size: int, crc32: int) -> bytes:
        if self.remote is not None:
            return self.remote.read(Span(offset, size, crc32))
        if self._file_descriptor < 0:
            assert isinstance(self.tar_path, Path)
            self._file_descriptor = os.open(_existing(self.tar_path, "tar"), os.O_RDONLY | os.O_CLOEXEC)
        # One call reads at most about 2 GiB, and a network filesystem may answer with less.
        parts, left = [], size
        while left:
            part = os.pread(self._file_descriptor, left, offset + size - left)
            if not part:
                raise DamagedRecord(
                    f"{self.tar_path}: key {self.key(i)!r}, member .{extension}: ends {left} bytes early; copy "
                    "the tar again"
                )
            parts.append(part)
            left -= len(part)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if zlib.crc32(data) != crc32:
            raise DamagedRecord(
                f"{self.tar_path}: key {self.key(i)!r}, member .{extension}: CRC-32 differs from the index; "
                "copy the tar again"
            )
        return data

    def close(self) -> None:
        """Give the file descriptor back; the next read opens the tar again."""
        descriptor, self._file_descriptor = self._file_descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
        # Absent where the tar was refused.
        remote = getattr(self, "remote", None)
        if remote is not None:
            remote.close()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict:
        state = {**self.__dict__, "_file_descriptor": -1}
        if self.remote is not None:
            state["remote"] = self.remote.unopened()
        return state


def _fault_of_index(index: dict) -> str:
    """What is wrong with an index of the right version; "" if nothing is."""
    tar_bytes, samples = index.get("tar_bytes"), index.get("samples")
    if type(tar_bytes) is not int or not isinstance(samples, list):
        return "tar_bytes is no number" if isinstance(samples, list) else "samples is no list"
    return next(
        filter(None, (_fault_of_sample(number, sample, tar_bytes) for number, sample in enumerate(samples))), ""
    )


def _fault_of_sample(number: int, sample, tar_bytes: int) -> str:
    members = sample.get("members") if isinstance(sample, dict) else None
    if not isinstance(members, dict) or not isinstance(sample.get("key"), str):
        return f"sample {number} has no key and members"
    for extension, span in members.items():
        if (
            not isinstance(span, list)
            or len(span) != 3
            or not all(type(value) is int and 0 <= value < 1 << 62 for value in span)
        ):
            return f"key {short(sample['key'])}, member .{extension[:40]}: is not offset, size and CRC-32"
        if span[0] + span[1] > tar_bytes:
            return (
                f"key {short(sample['key'])}, member .{extension[:40]}: ends at byte {span[0] + span[1]} of a "
                f"tar of {tar_bytes}"
            )
    return ""


# What `write_json` puts around the samples of an index. A line break inside a JSON text is never part of a string, so
# these are found nowhere else.
_BEFORE, _AFTER = b'\n  {\n   "key":', b"\n  }"


def _cut(text: bytes) -> tuple[int, list[bytes]] | None:
    """tar_bytes, and of each sample the JSON between `{"key":` and `}`.

    None for an index of another layout, or one that needs a closer look.
    """
    head, _, samples = text.partition(_BEFORE)
    end = _AFTER + b"\n ]\n}\n"
    try:
        found = parse_json(head.decode("utf-8") + "]}")
    except ValueError:
        return None
    if (
        not samples.endswith(end)
        or not isinstance(found, dict)
        or found.get("samples") != []
        or found.get("format_version") != FORMAT_VERSION
        or type(found.get("tar_bytes")) is not int
    ):
        return None
    return found["tar_bytes"], samples[: -len(end)].split(_AFTER + b"," + _BEFORE)


class ShardSet:
    """Random access to the samples of a whole set: global sample number = position in manifest order.

    Nothing but the manifest is needed at construction; an index is read when its shard is first touched.

    Args:
        folder: where the manifest lies.  manifest: as `schema.read_manifest` gives it.
        max_open: shards kept open, least recently used first out; each holds a file descriptor and its index in memory,
            270 bytes a sample of three members.
    """

    def __init__(self, folder: str | Place, manifest: ImageManifest | TokenManifest, *, max_open: int = 64) -> None:
        # Not needed to index a tar, and a fifth of what `pack_images.py --help` would wait for.
        import numpy as np

        self.folder, self.manifest, self._max_open = place_of(folder), manifest, max_open
        self.shard_sizes = np.array([shard.samples for shard in manifest.shards], dtype=np.int64)
        self._ends = np.cumsum(self.shard_sizes).tolist()
        self.num_samples = self._ends[-1] if self._ends else 0
        # Only then is there anything to ask for ahead.
        self.is_remote = isinstance(self.folder, RemotePath) or any(is_url(shard.path) for shard in manifest.shards)
        # An evicted shard is closed by its last reference, so a thread that still reads from it is not cut off.
        self._open_shard = lru_cache(maxsize=max_open)(self._load_shard)
        # Shards of which samples were asked for ahead.
        self._asked: set[int] = set()

    @property
    def access(self) -> Access:
        """How its files of stores are read."""
        return self.folder.access if isinstance(self.folder, RemotePath) else usual_access()

    # Open shards are not sent to loader processes.
    def __reduce__(self):
        return _shard_set, (self.folder, self.manifest, self._max_open)

    def locate(self, sample: int) -> tuple[int, int]:
        """Global sample number -> (shard number, index in that shard)."""
        assert 0 <= sample < self.num_samples, f"sample {sample} of {self.num_samples}"
        shard_number = bisect_right(self._ends, sample)
        return shard_number, int(sample - (self._ends[shard_number - 1] if shard_number else 0))

    def read(self, sample: int, extensions: Iterable[str] | None = None) -> tuple[str, dict[str, bytes]]:
        """Key and members of a sample.

        Raises: DamagedRecord as `IndexedTar.read`; UserError if its shard is missing or not the one of the manifest.
        """
        shard_number, index = self.locate(sample)
        shard = self._open_shard(shard_number)
        return shard.key(index), shard.read(index, extensions)

    def prefetch(self, samples: Iterable[int], extensions: Iterable[str] | None = None) -> None:
        """Ask a store for samples that will be read next, neighbours in one request. Of a set on a disk: nothing.

        What one call asked for is forgotten by the next one.
        """
        if not self.is_remote:
            return
        wanted: dict[int, list[int]] = {}
        for sample in samples:
            shard_number, index = self.locate(sample)
            wanted.setdefault(shard_number, []).append(index)
        for shard_number in self._asked - wanted.keys():
            self._open_shard(shard_number).prefetch(())
        self._asked = set(wanted)
        for shard_number, indices in wanted.items():
            self._open_shard(shard_number).prefetch(indices, extensions)

    def key(self, sample: int) -> str:
        """Key of a sample; no member is read."""
        shard_number, index = self.locate(sample)
        return self._open_shard(shard_number).key(index)

    def open_shard(self, shard_number: int) -> IndexedTar:
        """One shard as a list of samples; from the cache of open ones.

        Raises: UserError if it is missing or not the one of the manifest.
        """
        return self._open_shard(shard_number)

    def stage(self, shard_number: int) -> None:
        """Bring a shard of a store into the cache of the node, whole, with its index.

        Raises: StoreFault, UserError as `read`; OSError of the disk.
        """
        tar = self._load_shard(shard_number)
        if tar.remote is not None:
            tar.remote.stage()

    def check(self, verify: Literal["size", "all"]) -> None:
        """`check_shards` over the whole set."""
        self.check_shards(range(len(self.manifest.shards)), verify)

    def check_shards(self, shard_numbers: Iterable[int], verify: Literal["size", "all"]) -> None:
        """Check some shards, so that ranks may share the hashing: tar and index exist and the tar has its size.

        With "all" both sha256; without, those of tars that were indexed in place and have another time since.

        Raises: UserError naming the first shard that is missing, cut short or changed.
        """
        assert verify in ("size", "all"), verify
        numbers = list(shard_numbers)
        if isinstance(self.folder, RemotePath) and numbers:
            # A server that has no ranges shows here, and not by sending a whole shard for a sample.
            (self.folder / index_name(self.manifest.shards[numbers[0]].name)).read_range(0, 1)
        # One request for the whole folder, where the store answers that.
        listing = self.folder.listing() if isinstance(self.folder, RemotePath) and len(numbers) > 1 else None
        # To hand them over one by one would take longer than a local disk's answer.
        few = min(32, max(1, len(numbers) // (8 * _CHECKED_AT_ONCE)))

        def check_few(first: int) -> None:
            for number in numbers[first : first + few]:
                self._check_shard(self.manifest.shards[number], verify, listing)

        pool = ThreadPoolExecutor(_CHECKED_AT_ONCE)
        try:
            # Results come in the order of the shards, so the first fault is named.
            for _ in pool.map(check_few, range(0, len(numbers), few)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)

    def _check_shard(
        self, shard: Shard, verify: Literal["size", "all"], listing: dict[str, RemoteStatus] | None
    ) -> None:
        tar_path, index_path = self._paths(shard)
        listed = None if listing is None or shard.path else listing.get(shard.name)
        found = listed or _existing_status(tar_path, "shard")
        found_bytes = found.st_size
        if found_bytes != shard.bytes:
            fault = "cut short" if found_bytes < shard.bytes else "changed"
            raise UserError(
                f"{tar_path}: shard is {fault}: {found_bytes} bytes, the manifest says {shard.bytes}; {_remedy(shard)}"
            )
        if listing is None or index_path.name not in listing:
            _existing_status(index_path, "index")
        # Its owner may have made it anew, of the same size. (A set of our own may be a copy, of any time.)
        is_suspect = _is_suspect(shard, found)
        if verify == "all" or is_suspect:
            for path, sha256 in ((index_path, shard.index_sha256), (tar_path, shard.sha256)):
                if sha256_of_place(path) != sha256:
                    raise UserError(
                        f"{path}: changed since the set was made (sha256 differs from the manifest's); {_remedy(shard)}"
                    )

    def _paths(self, shard: Shard) -> tuple[Place, Place]:
        return tar_path_of(self.folder, shard), self.folder / index_name(shard.name)

    def _load_shard(self, shard_number: int) -> IndexedTar:
        shard = self.manifest.shards[shard_number]
        tar_path, index_path = self._paths(shard)
        tar = IndexedTar(tar_path, index_path, shard.index_sha256, shard.sha256)
        if len(tar) != shard.samples:
            raise UserError(
                f"{tar_path}: its index lists {len(tar)} samples, the manifest {shard.samples}; make the set "
                "again or copy it whole"
            )
        return tar


def tar_path_of(folder: Place, shard: Shard) -> Place:
    """Where the tar of a shard lies.

    Raises: UserError for one of this machine that a manifest of a store names: whoever wrote that may mean any file.
    """
    if is_url(shard.path):
        return place_of(shard.path, folder.access if isinstance(folder, RemotePath) else None)
    if shard.path and isinstance(folder, RemotePath):
        raise UserError(
            f"{folder}: its manifest names {short(shard.path)}, a file of this machine, which no store may; index the "
            "tars where they lie (pack_images.py --index_tars)"
        )
    # An absolute path replaces the folder.
    return folder / (shard.path or shard.name)


def _is_suspect(shard: Shard, found: os.stat_result | RemoteStatus) -> bool:
    if isinstance(found, RemoteStatus):
        # Of a set of our own it tells nothing: a copy in another store has another one.
        return bool(shard.path and shard.etag) and shard.etag != found.etag
    return shard.modified_ns not in (0, found.st_mtime_ns)


def sha256_of_place(path: Place) -> str:
    """As `sha256_of_file`, of a file of a store too."""
    if isinstance(path, Path):
        return sha256_of_file(path)
    digest = hashlib.sha256()
    for chunk in chunks_of(path, path.status().st_size):
        digest.update(chunk)
    return digest.hexdigest()


def _index_text(path: Place, sha256: str) -> bytes:
    if isinstance(path, Path):
        return _existing(path, "index").read_bytes()
    try:
        return read_index(path, sha256)
    except FileNotFoundError:
        raise UserError(f"{path}: no such index; copy the set whole or make it again") from None


def _remedy(shard: Shard) -> str:
    if not shard.path:
        return "copy or make it again"
    return "put the old one back, or index the tars again (pack_images.py --index_tars)"


def _shard_set(folder: Place, manifest: ImageManifest | TokenManifest, max_open: int) -> ShardSet:
    return ShardSet(folder, manifest, max_open=max_open)


def _existing(path: Path, what: str) -> Path:
    _existing_bytes(path, what)
    return path


def _existing_bytes(path: Place, what: str) -> int:
    return _existing_status(path, what).st_size


def _existing_status(path: Place, what: str) -> os.stat_result | RemoteStatus:
    """Size and time of a file, asked for once: a shared file system takes a millisecond to answer."""
    if isinstance(path, RemotePath):
        try:
            return path.status()
        except FileNotFoundError:
            raise UserError(f"{path}: no such {what}; copy the set whole or make it again") from None
    try:
        found = path.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: no such {what}; copy the set whole or make it again")
    return found
