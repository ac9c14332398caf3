"""Write the shards of an image set, or index existing tars in place: each is whole or absent, and a restart continues.

`pack_images.py --help` imports this file, so what needs torch (the decoder, webdataset) is imported where it is used.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from peco_ds.data.atomic_files import flush_folder, flush_to_disk, lock_file, remove_leftovers, temporary_file
from peco_ds.data.image_folders import Image, printable, read_classes
from peco_ds.data.indexed_tar import INDEX_SUFFIX, IndexedTar, index_name, write_index
from peco_ds.errors import UserError, describe_os_error
from peco_ds.schema import IMAGE_EXTENSIONS, MANIFEST_NAME, Shard, read_json, sha256_of_file, sha256_of_json, write_json

# At most a million classes: every class below the largest label gets a name.
_LABEL_DIGITS = 6
# The folder in --out that records what each finished shard was made from, for a restart.
_RECORDS = ".pack"


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

    def members(self, image: Image) -> tuple[dict[str, bytes], bool]:
        """Extension -> bytes of one sample, and whether the image's differ from its file's.

        Raises: DecodeError (a ValueError) or OSError if the image cannot be read; UserError for what ends the packing.
        """
        extension, data, changed = packed_bytes(Path(self.folder) / image.path, self.short_side_px, self.quality)
        label = {"cls": str(image.label).encode()} if image.label >= 0 else {}
        return {extension: data, **label}, changed

    def digest(self) -> str:
        return sha256_of_json(
            [self.name, self.short_side_px, self.quality, [list(asdict(image).values()) for image in self.images]]
        )


@dataclass(frozen=True)
class IndexJob:
    """One tar to be indexed where it lies."""

    name: str
    tar_path: str

    @property
    def units(self) -> int:
        return 1

    def digest(self) -> str:
        status = os.stat(self.tar_path)
        return sha256_of_json([self.name, self.tar_path, status.st_size, status.st_mtime_ns])


@dataclass(frozen=True)
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


# --------------------------------------------------------------------------------------------- restart


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Hold `out` for one run of packing.

    Raises: UserError if another run is at work in it.
    """
    _make_folder(out, out / _RECORDS)
    with lock_file(out / _RECORDS / "lock", wait=False) as nobody_else:
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
    records = out / _RECORDS
    plan_path = records / "plan.json"
    plan = _json_or_none(plan_path)
    if (out / MANIFEST_NAME).exists() and plan != options:
        names = sorted(
            name for name in options | (plan or {}) if plan is not None and plan.get(name) != options.get(name)
        )
        changed = [f"{name} was {plan.get(name)!r}, is {options.get(name)!r}" for name in names] or ["made elsewhere"]
        raise UserError(
            f"--out {out}: already holds a finished set ({'; '.join(changed)}); give another folder, or "
            "remove this one to make it again"
        )
    _make_folder(out, records)
    if plan is None:
        foreign = next((job.name for job in jobs if isinstance(job, PackJob) and (out / job.name).exists()), None)
        if foreign is not None:
            raise UserError(f"--out {out}: holds {foreign!r}, which was not made here; give another folder")
    if plan != options:
        write_json(plan_path, options)
    remove_leftovers(out, ("shard-*", f"*{INDEX_SUFFIX}", MANIFEST_NAME))
    remove_leftovers(records, ("*",))
    kept: dict[str, ShardRecord] = {}
    digest_of = {job.name: job.digest() for job in jobs}
    for path in sorted(records.glob("*.record.json")):
        record = _read_record(path)
        if (
            record is not None
            and digest_of.get(record.shard.name) == record.job_digest
            and _is_whole(out, record.shard)
        ):
            kept[record.shard.name] = record
        elif record is None or record.shard.name not in digest_of:
            path.unlink()
            # A tar that was indexed in place belongs to the user and is never removed.
            if record is not None and not record.shard.path:
                (out / record.shard.name).unlink(missing_ok=True)
                (out / index_name(record.shard.name)).unlink(missing_ok=True)
    todo = [job for job in jobs if job.name not in kept]
    if todo:
        # A manifest never stands beside a shard that it does not describe.
        (out / MANIFEST_NAME).unlink(missing_ok=True)
    return list(kept.values()), todo


def _read_record(path: Path) -> ShardRecord | None:
    raw = _json_or_none(path)
    try:
        return ShardRecord(**{**raw, "shard": Shard(**raw["shard"])})
    except (TypeError, KeyError, ValueError):
        return None


def _json_or_none(path: Path):
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _is_whole(out: Path, shard: Shard) -> bool:
    tar_path, index_path = out / (shard.path or shard.name), out / index_name(shard.name)
    if not tar_path.is_file() or not index_path.is_file() or tar_path.stat().st_size != shard.bytes:
        return False
    return sha256_of_file(index_path) == shard.index_sha256


# ------------------------------------------------------------------------------------------- one shard


def make_shard(out: Path, job: PackJob | IndexJob, count_one: Callable[[], None]) -> ShardRecord:
    """Do one job and leave its record in `out`.

    Args:
        count_one: called after each image, or once for a tar.
    Raises: UserError if something cannot be written, or a tar cannot serve.
    """
    record_path = out / _RECORDS / f"{job.name}.record.json"
    try:
        # A record that outlived its shard must not vouch for half of the next one.
        record_path.unlink(missing_ok=True)
        record = _write_shard(out, job, count_one) if isinstance(job, PackJob) else _index_in_place(out, job, count_one)
        flush_folder(out)
        write_json(record_path, asdict(record))
    except OSError as error:
        reason = describe_os_error(error, out / job.name)
        raise UserError(f"{reason}; make room or correct the path, and start again to continue") from None
    return record


def _write_shard(out: Path, job: PackJob, count_one: Callable[[], None]) -> ShardRecord:
    from webdataset import TarWriter

    tar_path = out / job.name
    rejected, reencoded = [], 0
    with temporary_file(tar_path) as file:
        # Fixed owner and time: the same folder gives the same bytes. PAX, since USTAR refuses long or accented keys.
        with TarWriter(file, user="peco", group="peco", mtime=0, encoder=False, format="PAX_FORMAT") as writer:
            for image in job.images:
                try:
                    members, changed = job.members(image)
                except UserError:
                    raise
                except (ValueError, OSError) as error:
                    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                    rejected.append(f"{printable(image.path)}: {reason}")
                else:
                    writer.write({"__key__": image.key, **members})
                    reencoded += changed
                count_one()
        flush_to_disk(file)
        sha256 = sha256_of_file(file.name)
        (out / index_name(job.name)).unlink(missing_ok=True)
        os.replace(file.name, tar_path)
    samples, index_sha256 = write_index(tar_path, out / index_name(job.name))
    shard = Shard(job.name, samples, tar_path.stat().st_size, sha256, index_sha256)
    return ShardRecord(job.digest(), job.units, shard, rejected, reencoded)


def packed_bytes(path: Path, short_side_px: int, quality: int) -> tuple[str, bytes, bool]:
    """The bytes that are stored for an image file.

    Returns: extension, bytes, whether they differ from the file's.
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
    height_px, width_px = pixels.shape[1:]
    shrink = short_side_px / min(height_px, width_px) if short_side_px else 1.0
    if kind.plain and shrink >= 1:
        return kind.extension, data, False
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if shrink < 1:
        # Rounding must not take the long side of a very thin image below the short one.
        size = [max(short_side_px, round(side * shrink)) for side in (width_px, height_px)]
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if kind.lossless:
        image.save(buffer, "PNG")
        return "png", buffer.getvalue(), True
    # Chroma is kept whole: to halve it a second time blurs coloured edges.
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return "jpg", buffer.getvalue(), True


def _index_in_place(out: Path, job: IndexJob, count_one: Callable[[], None]) -> ShardRecord:
    # Taken before reading, so that a tar that changes meanwhile is indexed again.
    digest = job.digest()
    index_path = out / index_name(job.name)
    samples, index_sha256 = write_index(job.tar_path, index_path)
    tar = IndexedTar(job.tar_path, index_path, index_sha256)
    labelled, largest = 0, -1
    for i in range(len(tar)):
        if not any(extension in IMAGE_EXTENSIONS for extension in tar.extensions(i)):
            known = " .".join(IMAGE_EXTENSIONS)
            raise UserError(
                f"{job.tar_path}: key {tar.key(i)!r} has no image (.{known}); leave this tar out, or unpack "
                "it and use --images"
            )
        text = tar.read(i, ("cls",)).get("cls")
        if text is not None:
            if not text.strip().isdigit() or len(text.strip()) > _LABEL_DIGITS:
                raise UserError(
                    f"{job.tar_path}: key {tar.key(i)!r}: .cls holds {text[:20]!r}, not a class number; correct "
                    "it or leave the .cls out"
                )
            labelled, largest = labelled + 1, max(largest, int(text))
    tar.close()
    shard = Shard(
        job.name, samples, os.path.getsize(job.tar_path), sha256_of_file(job.tar_path), index_sha256, path=job.tar_path
    )
    count_one()
    return ShardRecord(digest, job.units, shard, [], 0, labelled, largest)


def classes_of_tars(records: list[ShardRecord], classes_file: Path | None) -> list[str] | None:
    """Classes of tars indexed in place: from a file, else their numbers; None where no sample has a .cls.

    Raises: UserError if only some samples are labelled, or a label has no line in the file.
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
