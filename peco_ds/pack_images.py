"""Pack an image folder into indexed shards, or index WebDataset tars where they lie; either way one manifest.

Pictures are spread over the shards by a hash of seed and path, so that a shard of class-folder data holds all classes and reading a
few shards at a time still mixes them. Ordinary pictures are stored byte for byte; odd ones (CMYK, 16 bit, EXIF-rotated, transparent,
animated, other formats) are re-encoded as upright RGB, so that any WebDataset reader sees the right picture. A picture that cannot be
decoded is named in the manifest and left out. An interrupted run is continued by the same command.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # started by path: the package's parent, not its inside

import argparse
import csv
import glob
import hashlib
import io
import json
import multiprocessing
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass

from peco_ds.command_line import Parser, run
from peco_ds.data.indexed_tar import INDEX_SUFFIX, IndexedTar, index_name, write_index
from peco_ds.errors import UserError
from peco_ds.schema import IMAGE_EXTENSIONS, MANIFEST_NAME, ImageManifest, Shard, sha256_of_file, sha256_of_json, write_json, write_manifest

PICTURE_SUFFIXES = frozenset(".jpg .jpeg .jpe .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm".split())
RECORDS = ".pack"  # folder in --out: what each finished shard was made from, for a restart
PROGRESS_EVERY_S = 5.0
_WNID = re.compile(r"n\d{8}")
_FOLDER_ONLY = ("labels", "synsets", "short_side", "quality", "samples_per_shard", "shuffle_seed", "max_bad_share")


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    if args.images is not None:
        pictures, classes = list_pictures(args.images, args.labels, args.synsets, args.classes)
        jobs = plan_shards(pictures, args)
        names = ("short_side", "quality", "samples_per_shard", "shuffle_seed")
        options = {"source": str(args.images.resolve())} | {name: str(getattr(args, name)) for name in names}
    else:
        jobs, classes = plan_indexes(args.index_tars), None
        options = {"source": args.index_tars, "in_place": "True"}
    units = "pictures" if args.images is not None else "tars"
    total = sum(job.units for job in jobs)
    if args.dry_run:
        sys.stdout.write(f"would pack {total} {units} into {len(jobs)} shards in {args.out}\n")
        return
    done, todo = prepare_folder(args.out, jobs, options)
    done += make_shards(args.out, todo, args.workers, Progress(total, sum(record.units for record in done), units))
    records = sorted(done, key=lambda record: record.shard.name)
    rejected = [line for record in records for line in record.rejected]
    if args.images is None:
        classes = classes_of_tars(records, args.classes)
    elif len(rejected) > args.max_bad_share * total:
        raise UserError(
            f"{len(rejected)} of {total} pictures cannot be decoded, more than --max_bad_share {args.max_bad_share}: {'; '.join(rejected[:3])}"
            f"{'; ...' if len(rejected) > 3 else ''}; repair or remove them, or raise --max_bad_share"
        )
    samples = sum(record.shard.samples for record in records)
    if samples == 0:
        raise UserError(f"{args.images or args.index_tars}: holds no picture that can be decoded; correct the path")
    write_manifest(args.out, ImageManifest([record.shard for record in records], samples, classes, rejected, options))
    labels = "no labels" if classes is None else f"{len(classes)} classes"
    size_bytes = sum(record.shard.bytes for record in records)
    reencoded = sum(record.reencoded for record in records)
    sys.stdout.write(
        f"{samples} samples, {labels}, {len(records)} shards, {size_bytes} bytes, {reencoded} re-encoded, {len(rejected)} rejected: {args.out}\n"
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Pack an image folder into indexed shards, or index WebDataset tars in place.",
        epilog="exit codes: 0 done, 2 bad input (one line says what); the same command continues an interrupted run",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, metavar="DIR", help="class-folder tree, or pictures at any depth; dot files are passed over")
    source.add_argument("--index_tars", metavar="GLOB|DIR", help="WebDataset tars, indexed in place, not rewritten; their pictures are not decoded")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the shards and their manifest")
    parser.add_argument(
        "--labels",
        choices=("auto", "folders", "none"),
        default="auto",
        help="folders: one class a sub-folder; auto: that, where pictures lie in sub-folders and none beside them (default: %(default)s)",
    )
    parser.add_argument(
        "--synsets",
        type=Path,
        metavar="FILE",
        help="labels of a flat folder (ILSVRC val): LOC_val_solution.csv; 'name label' lines; one synset a line in picture-name order; "
        "or ILSVRC2012_validation_ground_truth.txt with --classes",
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="one class a line, its first word the name; with --synsets: all synsets, for numbers in the numbers' order; with tars: in label order",
    )
    parser.add_argument(
        "--short_side", type=int, default=0, metavar="PX", help="shrink pictures whose short side is longer (bicubic, antialiased); 0: keep (default)"
    )
    parser.add_argument("--quality", type=int, default=92, help="JPEG quality where a picture must be re-encoded (default: %(default)s)")
    parser.add_argument(
        "--samples_per_shard",
        type=int,
        default=5000,
        help="5000 ImageNet pictures are about 0.5 GB: few files for the filesystem, yet a lost shard is soon rebuilt (default: %(default)s)",
    )
    parser.add_argument("--shuffle_seed", type=int, default=0, help="seed of the spreading over shards (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=min(16, _num_cores()), help="processes, one shard each at a time (default here: %(default)s)")
    parser.add_argument("--max_bad_share", type=float, default=0.01, help="more undecodable pictures than this share are an error (default: %(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="list and check the source, write nothing")
    args = parser.parse_args(argv)
    for name, low, high in (("short_side", 0, 65535), ("quality", 1, 100), ("samples_per_shard", 1, 10**9), ("workers", 1, 4096), ("max_bad_share", 0, 1)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} {getattr(args, name)}: must lie between {low} and {high}")
    if args.index_tars is not None:
        for name in _FOLDER_ONLY:
            if getattr(args, name) != parser.get_default(name):
                raise UserError(f"--{name} has no effect on tars indexed in place; drop it, or unpack the tars and use --images")
    elif args.out.resolve().is_relative_to(args.images.resolve()):
        raise UserError(f"--out {args.out} lies inside --images {args.images}; give a folder outside it")
    if args.classes is not None and args.images is not None and args.synsets is None:
        raise UserError("--classes goes with --synsets or --index_tars; class folders name their classes themselves")
    return args


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------- pictures and labels


@dataclass(frozen=True)
class Picture:
    path: str  # relative to --images
    size_bytes: int  # -1: cannot be looked at
    key: str
    label: int  # -1: none


def list_pictures(folder: Path, labels: str, synsets: Path | None, classes_file: Path | None) -> tuple[list[Picture], list[str] | None]:
    """Every picture below a folder, by path, with its label; and the classes in label order.

    Raises: UserError if the folder is missing, holds no picture, has an empty class folder, or does not match its list of synsets.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder; correct the path")
    try:
        found = sorted(_walk(folder))
    except OSError as error:
        raise UserError(f"--images {folder}: {error.filename}: {error.strerror}; make every folder in it readable") from None
    if not found:
        raise UserError(f"--images {folder}: holds no picture ({' '.join(sorted(PICTURE_SUFFIXES))}); correct the path")
    paths = [path for path, _ in found]
    if synsets is not None:
        if labels != "auto":
            raise UserError(f"--labels {labels} and --synsets both say where labels come from; drop one")
        label_of, classes = labels_from_list(paths, synsets, classes_file)
    else:
        label_of, classes = _labels_from_folders(folder, paths, labels)
    keys = unique_keys(paths)
    return [Picture(path, size_bytes, key, label) for (path, size_bytes), key, label in zip(found, keys, label_of)], classes


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    """(relative path, bytes) of each picture; links are followed, a folder met a second time (a loop) is passed over."""
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        status = os.stat(folder / relative)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder / relative) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                path = f"{relative}/{entry.name}" if relative else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(path)
                elif Path(entry.name).suffix.lower() in PICTURE_SUFFIXES:
                    try:
                        yield path, entry.stat().st_size
                    except OSError:  # a link to nowhere: listed, so that the reader rejects it by name
                        yield path, -1


def _labels_from_folders(folder: Path, paths: list[str], labels: str) -> tuple[list[int], list[str] | None]:
    at_top = next((path for path in paths if "/" not in path), None)
    if labels == "none" or (labels == "auto" and (at_top or not any(path.count("/") == 1 for path in paths))):
        return [-1] * len(paths), None
    if at_top:
        raise UserError(f"--labels folders: picture {at_top!r} lies in no class folder; move it into one, or use --labels none")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    of_path = [path.partition("/")[0] for path in paths]
    empty = sorted(set(classes) - set(of_path))
    if empty:
        raise UserError(f"class folder {str(folder / empty[0])!r} holds no picture ({len(empty)} such); fill or remove it, or use --labels none")
    number = {name: label for label, name in enumerate(classes)}
    return [number[name] for name in of_path], [_printable(name) for name in classes]


def labels_from_list(paths: list[str], synsets: Path, classes_file: Path | None) -> tuple[list[int], list[str]]:
    """Labels of a flat folder from a list, in any of the forms in which ILSVRC's validation labels go round.

    1. Kaggle's LOC_val_solution.csv: `name,synset box box...`.   2. `name synset` or `name number`, number counted from 0 (Caffe's
    val.txt).   3. One synset a line, in picture-name order.   4. One number a line in picture-name order, counted from 1
    (the devkit's ILSVRC2012_validation_ground_truth.txt). Numbers index the lines of `classes_file`. The label is always
    the place among sorted synsets, which for ILSVRC is the usual class index.

    Raises: UserError if list and pictures do not match one to one, or the order of the numbers is in doubt.
    """
    classes_listed = _first_words(classes_file, "--classes") if classes_file is not None else None
    rows = _rows(synsets)
    stems = [path.rpartition("/")[2].rpartition(".")[0] for path in paths]
    by_name = len(rows[0]) > 1
    if by_name:
        named = {row[0].rpartition(".")[0] if Path(row[0]).suffix.lower() in PICTURE_SUFFIXES else row[0]: row[1] for row in rows}
        for missing, where in ((sorted(set(stems) - set(named)), f"is not in {synsets}"), (sorted(set(named) - set(stems)), "is listed but not in the folder")):
            if missing:
                raise UserError(f"--synsets {synsets}: picture {missing[0]!r} {where} ({len(missing)} such); complete the folder or the list")
        names = [named[stem] for stem in stems]
    else:
        if len(rows) != len(paths):
            raise UserError(f"--synsets {synsets}: {len(rows)} lines for {len(paths)} pictures; complete the folder or the list")
        order = sorted(range(len(paths)), key=lambda i: stems[i])
        names = [""] * len(paths)
        for i, row in zip(order, rows):
            names[i] = row[0]
    if all(name.isdecimal() for name in names):
        names = _names_of_numbers(names, 0 if by_name else 1, synsets, classes_listed)
    classes = sorted(set(classes_listed or names))
    number = {name: label for label, name in enumerate(classes)}
    unknown = next((name for name in names if name not in number), None)
    if unknown is not None:
        raise UserError(f"--synsets {synsets}: {unknown!r} is not in {classes_file}; give the matching list of classes")
    return [number[name] for name in names], classes


def _rows(synsets: Path) -> list[list[str]]:
    """[label] or [picture name, label] for each line."""
    text = _text(synsets, "--synsets")
    if text.startswith("ImageId,"):
        rows = [[row[0], (row[1].split() or [""])[0]] for row in csv.reader(text.splitlines()[1:]) if len(row) > 1]
    else:
        rows = [line.split()[:2] for line in text.splitlines() if line.strip()]
    if not rows or len({len(row) for row in rows}) != 1 or not all(all(row) for row in rows):
        raise UserError(f"--synsets {synsets}: wants one label a line, or a picture name and a label on every line")
    return rows


def _names_of_numbers(numbers: list[str], first: int, synsets: Path, classes_listed: list[str] | None) -> list[str]:
    if classes_listed is None:
        raise UserError(f"--synsets {synsets}: holds numbers; say what they mean with --classes FILE, one synset a line in the order of the numbers")
    if first == 1 and classes_listed == sorted(classes_listed) and all(_WNID.fullmatch(name) for name in classes_listed):
        # The devkit's numbers follow its own order (1 is n02119789), and a sorted list would give wrong labels without a sign of it.
        raise UserError(
            f"--synsets {synsets}: ILSVRC2012 numbers do not follow sorted synsets; give --classes in the order of ILSVRC2012_ID (meta.mat of the devkit), "
            "or use LOC_val_solution.csv, which needs no list"
        )
    outside = next((number for number in numbers if not first <= int(number) < first + len(classes_listed)), None)
    if outside is not None:
        raise UserError(f"--synsets {synsets}: number {outside} is outside {first}..{first + len(classes_listed) - 1}, the lines of --classes")
    return [classes_listed[int(number) - first] for number in numbers]


def _first_words(path: Path, option: str) -> list[str]:
    words = [line.split()[0] for line in _text(path, option).splitlines() if line.strip()]
    twice = [word for word, count in Counter(words).items() if count > 1]
    if not words or twice:
        raise UserError(f"{option} {path}: {f'{twice[0]!r} stands twice' if twice else 'is empty'}; wants one class a line, its first word being the name")
    return words


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path}: cannot be read as text ({error}); correct the path") from None


def unique_keys(paths: list[str]) -> list[str]:
    """A WebDataset key for each path: the file name without extension, or the whole path joined by `_` where that name is not alone.

    Dots would end a key and slashes would make folders, so neither is left in; nor are control and unpaired characters.
    """
    stems = [_key_text(path.rpartition("/")[2].rpartition(".")[0]) for path in paths]
    count = Counter(stems)
    used = {stem for stem in stems if count[stem] == 1}
    keys = []
    for path, stem in zip(paths, stems):
        if count[stem] > 1:
            joined = stem = _key_text(path.rpartition(".")[0])
            number = 1
            while stem in used:
                number += 1
                stem = f"{joined}_{number}"
            used.add(stem)
        keys.append(stem)
    return keys


def _key_text(text: str) -> str:
    return "".join(character if character.isprintable() and character not in "./\\" else "_" for character in text)


def _printable(path: str) -> str:
    """File names are bytes; what is not UTF-8 in them cannot stand in a manifest."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# ---------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class PackJob:
    """One shard to be written."""

    name: str
    folder: str
    pictures: list[Picture]
    short_side_px: int
    quality: int

    @property
    def units(self) -> int:
        return len(self.pictures)

    def digest(self) -> str:
        return sha256_of_json([self.name, self.short_side_px, self.quality, [list(asdict(picture).values()) for picture in self.pictures]])


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
    """What came of a job; kept in `--out/.pack` so that a restart can tell a finished shard."""

    job_digest: str
    units: int
    shard: Shard
    rejected: list[str]  # "path: reason"
    reencoded: int = 0
    labelled: int = 0  # samples with a .cls
    largest_label: int = -1


def plan_shards(pictures: list[Picture], args: argparse.Namespace) -> list[PackJob]:
    """Spread the pictures over shards, in an order that holds for every version of Python and of its random generators."""

    def place(picture: Picture) -> bytes:
        return hashlib.blake2b(os.fsencode(f"{args.shuffle_seed}:{picture.path}"), digest_size=16).digest()

    shuffled = sorted(pictures, key=place)
    size = args.samples_per_shard
    return [
        PackJob(f"shard-{number:06d}.tar", str(args.images.resolve()), shuffled[start : start + size], args.short_side, args.quality)
        for number, start in enumerate(range(0, len(shuffled), size))
    ]


def plan_indexes(source: str) -> list[IndexJob]:
    """One job for each tar of a folder or glob, by path.

    Raises: UserError if there is none.
    """
    folder = Path(source)
    found = folder.glob("*.tar") if folder.is_dir() else glob.glob(source, recursive=True)
    paths = sorted(Path(os.path.abspath(path)) for path in found)  # links are kept: in a hub's cache only they carry the name
    if not paths:
        raise UserError(f"--index_tars {source}: no tar there; give a folder of .tar files or a quoted glob")
    # Where two folders have tars of one name, as in train/0.tar and val/0.tar, the folder becomes part of the shard's name.
    count = Counter(path.name for path in paths)
    jobs = [IndexJob(_printable(path.name if count[path.name] == 1 else "_".join(path.parts[1:])), str(path)) for path in paths]
    same = [name for name, number in Counter(index_name(job.name) for job in jobs).items() if number > 1]
    if same:
        raise UserError(f"--index_tars {source}: two tars would share the index {same[0]!r}; rename one")
    return jobs


def prepare_folder(out: Path, jobs: list, options: dict[str, str]) -> tuple[list[ShardRecord], list]:
    """Make ready for the run: what is finished is kept, what belongs to another plan is removed.

    Returns: records of finished shards, jobs still to be done.
    Raises: UserError if the folder holds a finished set made with other options, or tars of unknown origin.
    """
    records = out / RECORDS
    plan_path = records / "plan.json"
    plan = _json_or_none(plan_path)
    if (out / MANIFEST_NAME).exists() and plan != options:
        names = sorted(name for name in options | (plan or {}) if plan is not None and plan.get(name) != options.get(name))
        changed = [f"{name} was {plan.get(name)!r}, is {options.get(name)!r}" for name in names] or ["made elsewhere"]
        raise UserError(f"--out {out}: already holds a finished set ({'; '.join(changed)}); give another folder, or remove this one to make it again")
    try:
        records.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); give a folder that can be written") from None
    if plan is None:
        foreign = next((job.name for job in jobs if isinstance(job, PackJob) and (out / job.name).exists()), None)
        if foreign is not None:
            raise UserError(f"--out {out}: holds {foreign!r}, which was not made here; give another folder")
    if plan != options:
        write_json(plan_path, options)
    for leftover in (*out.glob(".shard-*.tmp"), *out.glob(f".*{INDEX_SUFFIX}.*.tmp")):
        leftover.unlink()
    kept: dict[str, ShardRecord] = {}
    digest_of = {job.name: job.digest() for job in jobs}
    for path in sorted(records.glob("*.record.json")):
        record = _read_record(path)
        if record is not None and digest_of.get(record.shard.name) == record.job_digest and _is_whole(out, record.shard):
            kept[record.shard.name] = record
        elif record is None or record.shard.name not in digest_of:
            path.unlink()
            if record is not None and not record.shard.path:  # a tar indexed in place is the user's, never ours to remove
                (out / record.shard.name).unlink(missing_ok=True)
                (out / index_name(record.shard.name)).unlink(missing_ok=True)
    todo = [job for job in jobs if job.name not in kept]
    if todo:
        (out / MANIFEST_NAME).unlink(missing_ok=True)  # a manifest never stands beside a shard it does not describe
    return list(kept.values()), todo


def _read_record(path: Path) -> ShardRecord | None:
    raw = _json_or_none(path)
    try:
        return ShardRecord(**{**raw, "shard": Shard(**raw["shard"])})
    except (TypeError, KeyError, ValueError):
        return None


def _json_or_none(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _is_whole(out: Path, shard: Shard) -> bool:
    tar_path, index_path = out / (shard.path or shard.name), out / index_name(shard.name)
    if not tar_path.is_file() or not index_path.is_file() or tar_path.stat().st_size != shard.bytes:
        return False
    return sha256_of_file(index_path) == shard.index_sha256


# ---------------------------------------------------------------------------------------------- making shards


class Progress:
    """A bar on a terminal, else a line every few seconds."""

    def __init__(self, total: int, done_before: int, units: str) -> None:
        self._total, self._before, self._units = total, done_before, units
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done_before, unit=f" {units}", dynamic_ncols=True)

    def show(self, done_now: int) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._before + done_now - self._bar.n)
        elif now - self._last_line >= PROGRESS_EVERY_S and done_now:
            self._last_line = now
            rate = done_now / (now - self._start)
            left_s = (self._total - self._before - done_now) / rate
            sys.stderr.write(f"{self._before + done_now} of {self._total} {self._units}, {rate:.1f}/s, {left_s:.0f} s left\n")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


_counter = None  # units done by all workers; set in each of them before its first job


def _start_worker(counter) -> None:
    global _counter
    _counter = counter


def _count_one() -> None:
    with _counter.get_lock():
        _counter.value += 1


def make_shards(out: Path, jobs: list, workers: int, progress: Progress) -> list[ShardRecord]:
    """Do the jobs, one process each at a time.

    Raises: UserError where a shard cannot be written or a worker was killed; finished shards are kept.
    """
    # Spawned, not forked: the decoders start threads, which a fork would copy in an unknown state.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    workers = min(workers, len(jobs))
    executor: Executor
    if workers > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited: each worker is one busy core already
        executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(counter,))
    else:
        executor = ThreadPoolExecutor(1, initializer=_start_worker, initargs=(counter,))
    records = []
    try:
        waiting = {executor.submit(_make_shard, str(out), job) for job in jobs}
        while waiting:
            finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            records += [future.result() for future in finished]
            progress.show(counter.value)
    except BrokenProcessPool:
        raise UserError(f"a worker process was killed, most often for want of memory; use fewer than --workers {workers} and start again to continue") from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        progress.close()
    return records


def _make_shard(out: str, job: PackJob | IndexJob) -> ShardRecord:
    out_folder = Path(out)
    try:
        record = _write_shard(out_folder, job) if isinstance(job, PackJob) else _index_in_place(out_folder, job)
        write_json(out_folder / RECORDS / f"{job.name}.record.json", asdict(record))
    except OSError as error:
        place, reason = error.filename or out_folder / job.name, error.strerror or error
        raise UserError(f"{place}: {reason}; make room or correct the path, and start again to continue") from None
    return record


def _write_shard(out: Path, job: PackJob) -> ShardRecord:
    from webdataset import TarWriter

    tar_path = out / job.name
    temporary = out / f".{job.name}.{os.getpid()}.tmp"
    rejected, reencoded = [], 0
    with open(temporary, "wb") as file:
        # Fixed owner and time: the same folder gives the same bytes. PAX, since USTAR refuses long or accented keys.
        with TarWriter(file, user="peco", group="peco", mtime=0, encoder=False, format="PAX_FORMAT") as writer:
            for picture in job.pictures:
                try:
                    extension, data, changed = packed_bytes(Path(job.folder) / picture.path, job.short_side_px, job.quality)
                except (ValueError, OSError) as error:
                    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                    rejected.append(f"{_printable(picture.path)}: {reason}")
                else:
                    label = {"cls": str(picture.label).encode()} if picture.label >= 0 else {}
                    writer.write({"__key__": picture.key, extension: data, **label})
                    reencoded += changed
                _count_one()
        file.flush()
        os.fsync(file.fileno())
        sha256 = sha256_of_file(temporary)
    os.replace(temporary, tar_path)
    samples, index_sha256 = write_index(tar_path, out / index_name(job.name))
    shard = Shard(job.name, samples, tar_path.stat().st_size, sha256, index_sha256)
    return ShardRecord(job.digest(), job.units, shard, rejected, reencoded)


def packed_bytes(path: Path, short_side_px: int, quality: int) -> tuple[str, bytes, bool]:
    """What is stored for a picture file.

    Returns: extension, bytes, whether they differ from the file's.
    Raises: DecodeError (a ValueError) or OSError if the picture cannot be read to its end.
    """
    from PIL import Image

    from peco_ds.data.decode import DecodeError, decode_rgb, picture_kind

    if path.exists() and not path.is_file():
        raise DecodeError("not a regular file")
    data = path.read_bytes()
    kind = picture_kind(data)
    pixels = decode_rgb(data)  # also where the bytes are kept: a damaged body shows only here
    height_px, width_px = pixels.shape[1:]
    shrink = short_side_px / min(height_px, width_px) if short_side_px else 1.0
    if kind.plain and shrink >= 1:
        return kind.extension, data, False
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if shrink < 1:
        # Rounding may not take the long side of a very thin picture below the short one.
        size = [max(short_side_px, round(side * shrink)) for side in (width_px, height_px)]
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if kind.lossless:
        image.save(buffer, "PNG")
        return "png", buffer.getvalue(), True
    image.save(buffer, "JPEG", quality=quality, subsampling=0)  # full chroma: halving it a second time blurs coloured edges
    return "jpg", buffer.getvalue(), True


def _index_in_place(out: Path, job: IndexJob) -> ShardRecord:
    digest = job.digest()  # before reading: a tar that changes meanwhile is then done again
    index_path = out / index_name(job.name)
    samples, index_sha256 = write_index(job.tar_path, index_path)
    tar = IndexedTar(job.tar_path, index_path, index_sha256)
    labelled, largest = 0, -1
    for i in range(len(tar)):
        if not any(extension in IMAGE_EXTENSIONS for extension in tar.extensions(i)):
            known = " .".join(IMAGE_EXTENSIONS)
            raise UserError(f"{job.tar_path}: key {tar.key(i)!r} has no picture (.{known}); leave this tar out, or unpack it and use --images")
        text = tar.read(i, ("cls",)).get("cls")
        if text is not None:
            if not text.strip().isdigit():
                raise UserError(f"{job.tar_path}: key {tar.key(i)!r}: .cls holds {text[:20]!r}, not a class number; correct it or leave the .cls out")
            labelled, largest = labelled + 1, max(largest, int(text))
    tar.close()
    shard = Shard(job.name, samples, os.path.getsize(job.tar_path), sha256_of_file(job.tar_path), index_sha256, path=job.tar_path)
    _count_one()
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
        raise UserError(f"{partly.shard.path}: {labelled} of {samples} samples of the set have a .cls; index labelled and unlabelled tars apart")
    most = max(records, key=lambda record: record.largest_label)
    if classes_file is None:
        return [str(label) for label in range(most.largest_label + 1)]
    classes = _first_words(classes_file, "--classes")
    if most.largest_label >= len(classes):
        raise UserError(
            f"--classes {classes_file}: {len(classes)} classes, but {most.shard.path} holds label {most.largest_label}; "
            "give the list these tars were made with"
        )
    return classes


if __name__ == "__main__":
    run(main)
