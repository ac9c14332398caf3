"""Write the shards of an image set, or index existing tars in place: each is whole or absent, and a restart continues.

`pack_images.py --help` imports this file, so what needs torch (the decoder, webdataset) is imported where it is used.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass

from peco_ds.data.atomic_files import flush_folder, flush_to_disk, lock_file, remove_leftovers, temporary_file
from peco_ds.data.image_folders import Image, printable, reason_of_content
from peco_ds.data.image_formats import HEAD_BYTES, IMAGE_LIKE_SUFFIXES, contradicts, kind_of
from peco_ds.data.indexed_tar import INDEX_SUFFIX, build_index, index_name
from peco_ds.data.label_lists import read_classes
from peco_ds.data.left_out import Account
from peco_ds.data.own_shards import ShardWriterOf
from peco_ds.data.remote_tar import ForwardReader
from peco_ds.errors import StoreFault, UserError, describe_os_error
from peco_ds.own_files import TAR_OWNER, Own, refuse_foreign
from peco_ds.remote_paths import Place, RemotePath, RemoteStatus, is_url, place_of
from peco_ds.schema import (
    IMAGE_EXTENSIONS,
    MANIFEST_NAME,
    ImageManifest,
    Shard,
    json_text,
    read_json,
    sha256_of_file,
    sha256_of_json,
    short,
    write_json,
)

# At most a million classes: every class below the largest label gets a name.
_LABEL_DIGITS = 6
# A largest label above this, and above the number of samples, is taken for a slip where no file names the classes.
_USUAL_CLASSES = 1000
# The folder in --out that records what each finished shard was made from, for a restart.
RECORDS = ".pack"
RECORD_SUFFIX = ".record.json"
_WRITER = ShardWriterOf("pack_images.py", first_ends=tuple(f".{kind}" for kind in (*IMAGE_EXTENSIONS, "cls")))


def _is_manifest(path: Path) -> bool:
    try:
        raw = read_json(path)
    except ValueError:
        # A damaged one is made again, where the folder tells of packing.
        return (path.parent / RECORDS / "plan.json").is_file()
    return isinstance(raw, dict) and raw.get("kind") == ImageManifest.kind


_OWN_MANIFEST = Own("pack_images.py", _is_manifest)
# In that folder: what is not in the set, one name a line.
LEFT_OUT = f"{RECORDS}/left_out.txt"
# Of an image, in words that follow a number.
_MISNAMED = "of another format than the suffix says, taken by content"
# Extensions of members beside an image that are told apart.
_MOST_EXTENSIONS = 12


# The first bytes of a member (offset, size, CRC-32).
Heads = Callable[[list[int]], bytes]


class Members(NamedTuple):
    """A sample as it is stored."""

    # Extension -> bytes.
    files: dict[str, bytes]
    # As of `PackedImage`.
    changed: bool
    misnamed: bool


@dataclass(frozen=True)
class PackJob:
    """One shard to be written."""

    name: str
    folder: str
    images: list[Image]
    short_side_px: int
    quality: int

    @property
    def units(self) -> int:
        return len(self.images)

    def members(self, image: Image) -> Members:
        """What is stored of one sample, the image first.

        Raises: DecodeError (a ValueError) or OSError if the image cannot be read; UserError for what ends the packing.
        """
        packed = packed_bytes(Path(self.folder) / image.path, self.short_side_px, self.quality)
        label = {"cls": str(image.label).encode()} if image.label >= 0 else {}
        return Members({packed.extension: packed.data, **label}, packed.changed, packed.misnamed)

    def digest(self) -> str:
        return sha256_of_json(
            [self.name, self.short_side_px, self.quality, [list(asdict(image).values()) for image in self.images]]
        )


@dataclass(frozen=True)
class IndexJob:
    """One tar to be indexed where it lies.

    Attributes:
        tar_path: or its URL.
        status: of a tar in a store.
    """

    name: str
    tar_path: str
    status: RemoteStatus | None = None

    @property
    def units(self) -> int:
        return 1

    def digest(self) -> str:
        if self.status is not None:
            return sha256_of_json([self.name, self.tar_path, *self.status])
        status = os.stat(self.tar_path)
        return sha256_of_json([self.name, self.tar_path, status.st_size, status.st_mtime_ns])


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ShardRecord:
    """The result of a job, kept in `--out/.pack` so that a restart recognises a finished shard."""

    job_digest: str
    units: int
    shard: Shard
    # Each as "path: reason".
    rejected: list[str]
    reencoded: int = 0
    # Samples with a .cls.
    labelled: int = 0
    largest_label: int = -1
    # Of each rejected file its number in the job, and how it looked (`_look_of`); without a look it could not be read.
    rejected_looks: list[list[int]] = field(default_factory=list)
    # (member, reason) of each file of a tar that is in no sample.
    left_out: list[tuple[str, str]] = field(default_factory=list)
    # As `Account.as_json`: what is in the shard and is worth a word.
    remarks: dict[str, tuple[int, str]] = field(default_factory=dict)

    def as_json(self) -> dict:
        return asdict(self)


# --------------------------------------------------------------------------------------------- restart


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Hold `out` for one run of packing.

    Raises: UserError if another run is at work in it.
    """
    _make_folder(out, out / RECORDS)
    with lock_file(out / RECORDS / "lock", wait=False) as nobody_else:
        if not nobody_else:
            raise UserError(
                f"--out {out}: another pack_images.py is at work in it; wait for it to end, or give another folder"
            )
        yield


def _make_folder(out: Path, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); give a folder that can be written") from None


def prepare_folder(out: Path, jobs: list, options: dict[str, str]) -> tuple[list[ShardRecord], list]:
    """Prepare the folder for a run: finished shards are kept, those of another plan are removed.

    Returns: records of finished shards, jobs still to be done.
    Raises: UserError if the folder holds a finished set made with other options, or tars of unknown origin.
    """
    records = out / RECORDS
    refuse_foreign(out / MANIFEST_NAME, _OWN_MANIFEST, remedy="give another folder, or move it away")
    plan_path = records / "plan.json"
    plan = _json_or_none(plan_path)
    if (out / MANIFEST_NAME).exists() and plan != options:
        refuse_other_options(out, plan, options)
    _make_folder(out, records)
    recorded = {
        path.name.removesuffix(RECORD_SUFFIX): _read_record(path) for path in sorted(records.glob(f"*{RECORD_SUFFIX}"))
    }
    for job in jobs:
        _refuse_foreign(out, job, recorded)
    if plan != options:
        write_json(plan_path, options)
    remove_leftovers(out, ("shard-*", f"*{INDEX_SUFFIX}", MANIFEST_NAME))
    remove_leftovers(records, ("*",))
    kept: dict[str, ShardRecord] = {}
    job_of = {job.name: job for job in jobs}
    digest_of = {job.name: job.digest() for job in jobs}
    for name, record in recorded.items():
        if (
            record is not None
            and digest_of.get(record.shard.name) == record.job_digest
            and _is_whole(out, record.shard, _record_path(out, name))
            and not to_be_judged_again(job_of[record.shard.name], record)
        ):
            kept[record.shard.name] = record
        elif name not in digest_of:
            _remove_shard(out, name, record)
            (records / f"{name}{RECORD_SUFFIX}").unlink()
    todo = [job for job in jobs if job.name not in kept]
    if todo:
        # A manifest never stands beside a shard that it does not describe.
        (out / MANIFEST_NAME).unlink(missing_ok=True)
    return list(kept.values()), todo


def refuse_other_options(out: Place, plan: dict[str, str] | None, options: dict[str, str]) -> NoReturn:
    """Args: plan: options that the finished set in `out` was made with; None: not known."""
    names = sorted(name for name in options | (plan or {}) if plan is not None and plan.get(name) != options.get(name))
    changed = [f"{name} was {(plan or {}).get(name)!r}, is {options.get(name)!r}" for name in names]
    raise UserError(
        f"--out {out}: already holds a finished set ({'; '.join(changed or ['made elsewhere'])}); give another folder, "
        "or remove this one to make it again"
    )


def _refuse_foreign(out: Path, job: PackJob | IndexJob, recorded: dict[str, ShardRecord | None]) -> None:
    """Raises: UserError if the job would replace a tar or an index that no record of this folder names."""
    sha256 = _recorded_sha256(recorded[job.name], job.name) if job.name in recorded else None
    _WRITER.refuse_foreign(out, job.name, sha256, index_only=isinstance(job, IndexJob))


def _recorded_sha256(record: ShardRecord | None, name: str) -> str | None:
    """sha256 of a shard's tar by its record, "" where that is damaged; None for one that was indexed in place: the tar
    is the user's.
    """
    if record is None:
        return ""
    return None if record.shard.path or record.shard.name != name else record.shard.sha256


def _remove_shard(out: Path, name: str, record: ShardRecord | None) -> None:
    """Remove a shard of another plan, as far as it still is what its record says."""
    sha256 = _recorded_sha256(record, name)
    if record is not None and _WRITER.owns_tar(out / name, sha256):
        (out / name).unlink()
        (out / index_name(name)).unlink(missing_ok=True)


def _read_record(path: Path) -> ShardRecord | None:
    return read_record(_json_or_none(path))


def read_record(raw) -> ShardRecord | None:
    """A record by its JSON value; None where that is none."""
    try:
        return ShardRecord(**raw)
    except (TypeError, KeyError, ValueError):
        return None


def _json_or_none(path: Path):
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _is_whole(out: Path, shard: Shard, record_path: Path) -> bool:
    """Whether tar and index are those of the record."""
    tar_path, index_path = out / (shard.path or shard.name), out / index_name(shard.name)
    if is_url(shard.path):
        # Its size and mark in the store are in its job's digest.
        return index_path.is_file() and sha256_of_file(index_path) == shard.index_sha256
    if not tar_path.is_file() or not index_path.is_file() or tar_path.stat().st_size != shard.bytes:
        return False
    if sha256_of_file(index_path) != shard.index_sha256:
        return False
    # A tar that was written to after its record. (The time of a tar indexed in place is in its job's digest.)
    is_younger = not shard.path and tar_path.stat().st_mtime_ns > record_path.stat().st_mtime_ns
    return not is_younger or sha256_of_file(tar_path) == shard.sha256


def to_be_judged_again(job: PackJob | IndexJob, record: ShardRecord) -> bool:
    """Whether a file that was rejected has changed since, in content, permissions or place, or can be read now."""
    if isinstance(job, IndexJob):
        return False
    for number, *look in record.rejected_looks:
        path = Path(job.folder) / job.images[number].path
        if look != _look_of(path) if look else _opens(path):
            return True
    return False


def _look_of(path: Path) -> list[int]:
    """What changes when a file is written to, replaced, moved or given other permissions; [] where there is none."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode]


def _opens(path: Path) -> bool:
    try:
        # To open a pipe would block for ever.
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            file.read(1)
    except OSError:
        return False
    return True


# ------------------------------------------------------------------------------------------- one shard


def make_shard(out: Path, job: PackJob | IndexJob, count_one: Callable[[], None]) -> ShardRecord:
    """Do one job and leave its record in `out`.

    Args:
        count_one: called after each image, or once for a tar.
    Raises: UserError if something cannot be written, or a tar cannot serve.
    """
    try:
        if isinstance(job, PackJob):
            record = _write_shard(out, job, count_one)
        else:
            record = _index_in_place(out, job, count_one)
            _keep_record(out, record)
        flush_folder(out)
    except OSError as error:
        reason = describe_os_error(error, out / job.name)
        raise UserError(f"{reason}; make room or correct the path, and start again to continue") from None
    return record


def _record_path(out: Path, name: str) -> Path:
    return out / RECORDS / f"{name}{RECORD_SUFFIX}"


def _keep_record(out: Path, record: ShardRecord) -> None:
    write_json(_record_path(out, record.shard.name), record.as_json())


def _write_shard(out: Path, job: PackJob, count_one: Callable[[], None]) -> ShardRecord:
    from webdataset import TarWriter

    tar_path, index_path = out / job.name, out / index_name(job.name)
    rejected, looks, reencoded, remarks = [], [], 0, Account()
    with temporary_file(tar_path) as file:
        # Fixed owner and time: the same folder gives the same bytes. PAX, since USTAR refuses long or accented keys.
        with TarWriter(file, user=TAR_OWNER, group=TAR_OWNER, mtime=0, encoder=False, format="PAX_FORMAT") as writer:
            for number, image in enumerate(job.images):
                path = Path(job.folder) / image.path
                # Taken before reading, so that a file that changes meanwhile is judged again.
                look = _look_of(path)
                try:
                    stored = job.members(image)
                except UserError:
                    # Of a map or of annotations: it ends the packing.
                    raise
                except (ValueError, OSError) as error:
                    unread = isinstance(error, OSError)
                    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                    rejected.append(f"{printable(image.path)}: {reason}")
                    looks.append([number] if unread else [number, *look])
                else:
                    writer.write({"__key__": image.key, **stored.files})
                    reencoded += stored.changed
                    if stored.misnamed:
                        remarks.add(_MISNAMED, printable(image.path))
                count_one()
        flush_to_disk(file)
        index = {**build_index(file.name), "tar": job.name}
        shard = Shard(
            job.name,
            len(index["samples"]),
            os.path.getsize(file.name),
            sha256_of_file(file.name),
            hashlib.sha256(json_text(index).encode()).hexdigest(),
        )
        record = ShardRecord(
            job.digest(), job.units, shard, rejected, reencoded, rejected_looks=looks, remarks=remarks.as_json()
        )
        record_path = _record_path(out, job.name)
        _refuse_foreign(out, job, {job.name: _read_record(record_path)} if record_path.is_file() else {})
        # What is replaced goes while its record still names it, and what comes is recorded before it is there.
        index_path.unlink(missing_ok=True)
        tar_path.unlink(missing_ok=True)
        _keep_record(out, record)
        os.replace(file.name, tar_path)
    write_json(index_path, index)
    return record


class PackedImage(NamedTuple):
    """What is stored for an image file."""

    extension: str
    data: bytes
    # Whether the bytes differ from the file's.
    changed: bool
    # The content is of another format than the file's suffix says.
    misnamed: bool


def packed_bytes(path: Path, short_side_px: int, quality: int) -> PackedImage:
    """The bytes that are stored for an image file.

    Raises: DecodeError (a ValueError) or OSError if the image cannot be read to its end.
    """
    from PIL import Image

    from peco_ds.data.decode import DecodeError, decode_rgb, image_kind

    if path.exists() and not path.is_file():
        raise DecodeError("not a regular file")
    data = path.read_bytes()
    kind = image_kind(data)
    # Decoded also where the bytes are kept: a damaged body shows only here.
    pixels = decode_rgb(data)
    misnamed = contradicts(path.name, kind_of(data[:HEAD_BYTES]))
    height_px, width_px = pixels.shape[1:]
    shrink = short_side_px / min(height_px, width_px) if short_side_px else 1.0
    if kind.plain and shrink >= 1:
        return PackedImage(kind.extension, data, False, misnamed)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if shrink < 1:
        # Rounding must not take the long side of a very thin image below the short one.
        size = [max(short_side_px, round(side * shrink)) for side in (width_px, height_px)]
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if kind.lossless:
        image.save(buffer, "PNG")
        return PackedImage("png", buffer.getvalue(), True, misnamed)
    # Chroma is kept whole: to halve it a second time blurs coloured edges.
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return PackedImage("jpg", buffer.getvalue(), True, misnamed)


# ------------------------------------------------------------------------------------------ one tar in place


def _index_in_place(out: Path, job: IndexJob, count_one: Callable[[], None]) -> ShardRecord:
    # Taken before reading, so that a tar that changes meanwhile is indexed again.
    digest = job.digest()
    path = _record_path(out, job.name)
    _refuse_foreign(out, job, {job.name: _read_record(path)} if path.is_file() else {})
    left_out: list[tuple[str, str]] = []
    with _read_tar(job, left_out) as (index, head_of, facts):
        samples, rejected, remarks, labelled, largest = [], [], Account(), 0, -1
        for sample in index["samples"]:
            key, members = sample["key"], sample["members"]
            extension = _image_of(job.tar_path, key, members)
            label = _label_of(job.tar_path, key, members, head_of)
            head = head_of(members[extension])
            reason = reason_of_content(f"k.{extension}", head)
            if reason:
                rejected.append(f"{job.name}: {key}.{extension}: {reason}")
                continue
            samples.append(sample)
            labelled, largest = labelled + (label >= 0), max(largest, label)
            if contradicts(f"k.{extension}", kind_of(head)):
                remarks.add(_MISNAMED, f"{key}.{extension}")
            _remark_others(remarks, key, [other for other in members if other not in (extension, "cls")])
    written = write_json(out / index_name(job.name), {**index, "samples": samples})
    shard = Shard(
        job.name,
        len(samples),
        index["tar_bytes"],
        index_sha256=sha256_of_file(written),
        path=job.tar_path,
        **facts(),
    )
    count_one()
    printed = [(f"{job.name}: {printable(name)}", reason) for name, reason in left_out]
    return ShardRecord(
        digest,
        job.units,
        shard,
        list(map(printable, rejected)),
        0,
        labelled,
        largest,
        left_out=printed,
        remarks=remarks.as_json(),
    )


@contextmanager
def _read_tar(job: IndexJob, left_out: list[tuple[str, str]]) -> Iterator[tuple[dict, Heads, Callable[[], dict]]]:
    """The index of a tar; what reads the beginnings of its members; and what a manifest says of the tar's content."""
    if job.status is None:
        status = os.stat(job.tar_path)
        index = build_index(job.tar_path, left_out)
        with open(job.tar_path, "rb") as file:

            def head(span: list[int]) -> bytes:
                file.seek(span[0])
                return file.read(min(span[1], HEAD_BYTES))

            yield (
                index,
                head,
                lambda: {"sha256": sha256_of_file(job.tar_path), "modified_ns": status.st_mtime_ns},
            )
        return
    tar = place_of(job.tar_path)
    assert isinstance(tar, RemotePath)
    stream, heads = ForwardReader(tar, job.status.st_size), dict[int, bytes]()
    index = build_index(tar, left_out, stream=stream, heads=heads)
    if tar.status() != job.status:
        raise StoreFault(f"{tar}: was changed while it was indexed; start again when nobody writes to it")
    yield (
        index,
        lambda span: heads.get(span[0], b""),
        lambda: {"sha256": stream.digest.hexdigest(), "etag": job.status.etag if job.status else ""},
    )


def _image_of(tar_path: str, key: str, members: dict) -> str:
    """The extension of the one image of a sample.

    Raises: UserError if it has none, or two: which one a reader took would hang on their order in the tar.
    """
    images = [extension for extension in members if f".{extension}" in IMAGE_LIKE_SUFFIXES]
    if not any(extension in IMAGE_EXTENSIONS for extension in images):
        known, has = " .".join(IMAGE_EXTENSIONS), " .".join(members)
        remedy = "convert what it has to JPEG or PNG" if images else "unpack it and use --images"
        raise UserError(
            f"{tar_path}: key {key!r} has no image (.{known}), but .{short(has)[1:-1]}; leave this tar out, or {remedy}"
        )
    if len(images) > 1:
        raise UserError(
            f"{tar_path}: key {key!r} has two images, {key}.{images[0]} and {key}.{images[1]}; make the tar again with "
            f"one, the other under an extension that tells what it is ({key}.mask.{images[1]})"
        )
    return images[0]


def _label_of(tar_path: str, key: str, members: dict, head: Heads) -> int:
    """The class number of a sample; -1 where it has none.

    Raises: UserError if its .cls holds anything else.
    """
    if "cls" not in members:
        return -1
    text = head(members["cls"])
    if not text.strip().isdigit() or len(text.strip()) > _LABEL_DIGITS:
        raise UserError(
            f"{tar_path}: key {key!r}: .cls holds {text[:20]!r}, not a class number; correct it or leave the .cls out"
        )
    return int(text)


def _remark_others(remarks: Account, key: str, extensions: list[str]) -> None:
    for extension in extensions:
        remark = f"member beside an image, not read (.{extension})"
        if remark not in remarks and len(remarks) >= _MOST_EXTENSIONS:
            remark = "member beside an image, not read"
        remarks.add(remark, f"{key}.{extension}")


def classes_of_tars(records: list[ShardRecord], classes_file: Path | None) -> list[str] | None:
    """Classes of tars indexed in place: from a file, else their numbers; None where no sample has a .cls.

    Raises: UserError if only some samples are labelled, a label has no line in the file, or there is no file and there
        would be more classes than samples, and than are usual.
    """
    labelled, samples = sum(record.labelled for record in records), sum(record.shard.samples for record in records)
    if labelled == 0:
        return None
    if labelled < samples:
        partly = next(record for record in records if record.labelled < record.shard.samples)
        raise UserError(
            f"{partly.shard.path}: {labelled} of {samples} samples of the set have a .cls; index labelled "
            "and unlabelled tars apart"
        )
    most = max(records, key=lambda record: record.largest_label)
    # A part of a larger set may have fewer samples than classes.
    if classes_file is None and most.largest_label >= max(samples, _USUAL_CLASSES):
        raise UserError(
            f"{most.shard.path}: holds label {most.largest_label}, which makes {most.largest_label + 1} classes of "
            f"{samples} samples; correct the .cls, or name all classes with --classes FILE"
        )
    if classes_file is None:
        return [str(label) for label in range(most.largest_label + 1)]
    classes = read_classes(classes_file)
    if most.largest_label >= len(classes):
        raise UserError(
            f"--classes {classes_file}: {len(classes)} classes, but {most.shard.path} holds label "
            f"{most.largest_label}; "
            "give the list these tars were made with"
        )
    return classes
