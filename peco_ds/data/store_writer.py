"""Write an image set into a store: each shard is made on a disk of this machine, sent whole, and removed there.

A store takes a file whole or not at all. The record of a shard is sent before its tar, the index after it, and the
manifest after all, so an interrupted run is continued by the same command, as in a folder. A store has no locks: two
runs into one place write the same bytes twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from peco_ds.data.image_shards import (
    RECORD_SUFFIX,
    RECORDS,
    IndexJob,
    PackJob,
    ShardRecord,
    make_shard,
    read_record,
    refuse_other_options,
    to_be_judged_again,
)
from peco_ds.data.indexed_tar import index_name
from peco_ds.errors import UserError
from peco_ds.remote_paths import RemotePath, RemoteStatus
from peco_ds.schema import MANIFEST_NAME, ImageManifest, json_text, parse_json, read_manifest

_SENT_AT_ONCE = 16
_PLAN = "plan.json"


def prepare_store(
    out: RemotePath, jobs: list, options: dict[str, str]
) -> tuple[list[ShardRecord], list[PackJob | IndexJob]]:
    """As `image_shards.prepare_folder`.

    Raises: UserError if the place holds a finished set made with other options, or tars of unknown origin; StoreFault.
    """
    listing = out.listing()
    if listing is None:
        raise UserError(f"--out {out}: a web server takes no files; give an object store (s3://...) or a folder")
    recorded = _records(out)
    plan = _json_or_none(out / RECORDS / _PLAN)
    if MANIFEST_NAME in listing:
        # One of another kind or maker is refused here.
        read_manifest(out, ImageManifest)
        if plan != options:
            refuse_other_options(out, plan, options)
    for job in jobs:
        _refuse_foreign(out, job, listing, recorded)
    if plan != options:
        (out / RECORDS / _PLAN).write_bytes(json_text(options).encode())
    job_of = {job.name: job for job in jobs}
    digest_of = {job.name: job.digest() for job in jobs}
    kept = {
        name: record
        for name, record in recorded.items()
        if record is not None
        and digest_of.get(name) == record.job_digest
        and _is_whole(record, listing)
        and not to_be_judged_again(job_of[name], record)
    }
    todo = [job for job in jobs if job.name not in kept]
    if todo or recorded.keys() - digest_of.keys():
        # A manifest never stands beside a shard that it does not describe.
        (out / MANIFEST_NAME).unlink(missing_ok=True)
    for name in recorded.keys() - digest_of.keys():
        _remove(out, name, recorded[name])
    return list(kept.values()), todo


def make_shard_in_store(out: RemotePath, job: PackJob | IndexJob, count_one: Callable[[], None]) -> ShardRecord:
    """As `image_shards.make_shard`. Raises: UserError as that; StoreFault."""
    with tempfile.TemporaryDirectory(prefix="peco_ds_") as name:
        folder = Path(name)
        (folder / RECORDS).mkdir()
        record = make_shard(folder, job, count_one)
        # What is replaced goes while its record still names it, and what comes is recorded before it is there.
        (out / index_name(job.name)).unlink(missing_ok=True)
        _send_record(out, record)
        for file in (job.name, index_name(job.name)):
            if (folder / file).exists():
                (out / file).upload(folder / file)
    return record


def finish_in_store(out: RemotePath, write: Callable[[Path], None]) -> None:
    """Send what `write` leaves in a folder, the manifest last."""
    with tempfile.TemporaryDirectory(prefix="peco_ds_") as name:
        folder = Path(name)
        (folder / RECORDS).mkdir()
        write(folder)
        files = sorted(
            (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name == MANIFEST_NAME
        )
        for path in files:
            (out / path.relative_to(folder).as_posix()).upload(path)


def _send_record(out: RemotePath, record: ShardRecord) -> None:
    text = json_text(record.as_json()).encode()
    (out / RECORDS / f"{record.shard.name}{RECORD_SUFFIX}").write_bytes(text)


def _records(out: RemotePath) -> dict[str, ShardRecord | None]:
    names = [name for name in (out / RECORDS).listing() or {} if name.endswith(RECORD_SUFFIX)]
    with ThreadPoolExecutor(_SENT_AT_ONCE) as pool:
        found = list(pool.map(lambda name: read_record(_json_or_none(out / RECORDS / name)), names))
    return {name.removesuffix(RECORD_SUFFIX): record for name, record in zip(names, found)}


def _json_or_none(path: RemotePath):
    try:
        return parse_json(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _is_whole(record: ShardRecord, listing: dict[str, RemoteStatus]) -> bool:
    shard = record.shard
    tar = listing.get(shard.name)
    return index_name(shard.name) in listing and (bool(shard.path) or (tar is not None and tar.st_size == shard.bytes))


def _refuse_foreign(
    out: RemotePath, job: PackJob | IndexJob, listing: dict[str, RemoteStatus], recorded: dict[str, ShardRecord | None]
) -> None:
    """Raises: UserError if the job would replace a tar or an index that no record of this place names."""
    written = (index_name(job.name),) if isinstance(job, IndexJob) else (index_name(job.name), job.name)
    stands = next((name for name in written if name in listing), None)
    if stands is not None and job.name not in recorded:
        raise UserError(
            f"{out / stands}: stands there already and was not made by pack_images.py in this place; give another one, "
            "or move it away"
        )


def _remove(out: RemotePath, name: str, record: ShardRecord | None) -> None:
    """Remove a shard of another plan; of a tar that was indexed in place only the index."""
    if record is None:
        return
    if not record.shard.path:
        (out / name).unlink(missing_ok=True)
    (out / index_name(name)).unlink(missing_ok=True)
    (out / RECORDS / f"{name}{RECORD_SUFFIX}").unlink(missing_ok=True)
