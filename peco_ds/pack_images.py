"""Pack an image folder into indexed shards, or index WebDataset tars where they lie; either way one manifest.

Images are spread over the shards by a hash of seed and path, so that a shard of class-folder data holds all classes
and reading a few shards at a time still mixes them. Ordinary images are stored byte for byte; odd ones (CMYK, 16 bit,
EXIF-rotated, transparent, animated, other formats) are re-encoded as upright RGB, so that any WebDataset reader sees
the right image. An image that cannot be decoded is named in the manifest and left out. Any other file is counted there
with the reason for which it is left out, and named in `.pack/left_out.txt`. An interrupted run is continued by the same
command; what has changed since is packed, indexed or judged again.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python's path needs the package's parent, not the package's folder.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import glob
import hashlib
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial

from peco_ds.command_line import Parser, run, user_path, user_place, user_text
from peco_ds.data.image_folders import Image, list_images, printable
from peco_ds.data.image_formats import HEAD_BYTES, kind_of, suffix_of
from peco_ds.data.image_shards import (
    LEFT_OUT,
    IndexJob,
    PackJob,
    ShardRecord,
    classes_of_tars,
    make_shard,
    prepare_folder,
    sole_writer,
)
from peco_ds.data.indexed_tar import index_name
from peco_ds.data.instance_packing import Instances, find_instances
from peco_ds.data.left_out import Account, file_of_a_system, folder_of_a_system, write_list
from peco_ds.data.scene_packing import (
    SCENE_OPTIONS,
    SceneJob,
    Scenes,
    add_scene_options,
    check_scene_options,
    list_scenes,
)
from peco_ds.data.store_tars import COMPRESSED_TAR, tars_of_store
from peco_ds.data.store_writer import finish_in_store, make_shard_in_store, prepare_store
from peco_ds.errors import EXIT_INTERRUPTED, UserError, describe_os_error
from peco_ds.progress_bar import Progress
from peco_ds.remote_paths import Place, RemotePath, is_url
from peco_ds.schema import ImageManifest, SceneMaps, write_manifest

_FOLDER_ONLY = (
    *("labels", "synsets", "short_side", "quality", "samples_per_shard", "shuffle_seed"),
    *(*SCENE_OPTIONS, "annotations", "only_with_objects"),
)


@dataclass
class Plan:
    """What is to be done, and what is left out of it."""

    jobs: list[PackJob] | list[IndexJob]
    # Of the packing, kept in the manifest.
    options: dict[str, str]
    # What the jobs count: "images" or "tars".
    units: str
    classes: list[str] | None = None
    labels_from: str = ""
    # (name, reason)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    # What is taken and is worth a word.
    remarks: Account = field(default_factory=Account)
    # Of --labels scenes, and of instances.
    maps: SceneMaps | None = None
    instances: Instances | None = None

    @property
    def total(self) -> int:
        return sum(job.units for job in self.jobs)


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    plan = plan_folder(args) if args.images is not None else plan_indexes(args.index_tars)
    if args.dry_run:
        others = _account_of(plan.left_out)
        sys.stdout.write(
            f"would pack {plan.total} {plan.units} into {len(plan.jobs)} shards in {args.out}"
            f"{_told('left out', others)}{_told('remarks', plan.remarks)}\n"
        )
        return
    if isinstance(args.out, RemotePath):
        _pack(args, plan)
        return
    with sole_writer(args.out):
        _pack(args, plan)


def _pack(args: argparse.Namespace, plan: Plan) -> None:
    prepare = prepare_store if isinstance(args.out, RemotePath) else prepare_folder
    done, todo = prepare(args.out, plan.jobs, plan.options)
    units_done = sum(record.units for record in done)
    done += make_shards(args.out, todo, args.workers, Progress(plan.total, units_done, plan.units))
    records = sorted(done, key=lambda record: record.shard.name)
    rejected = [line for record in records for line in record.rejected]
    samples = sum(record.shard.samples for record in records)
    classes = plan.classes if args.images is not None else classes_of_tars(records, args.classes)
    if len(rejected) > args.max_bad_share * (samples + len(rejected)):
        raise UserError(
            f"{len(rejected)} of {samples + len(rejected)} images cannot be decoded, more than --max_bad_share "
            f"{args.max_bad_share}: {'; '.join(rejected[:3])}"
            f"{'; ...' if len(rejected) > 3 else ''}; repair or remove them, or raise --max_bad_share"
        )
    if samples == 0:
        raise UserError(f"{args.images or args.index_tars}: holds no image that can be decoded; correct the path")
    left_out = [*plan.left_out, *(entry for record in records for entry in record.left_out)]
    for record in records:
        plan.remarks.merge(record.remarks)
    account = _account_of(left_out)
    shards = [record.shard for record in records]
    manifest = ImageManifest(
        shards,
        samples,
        classes,
        rejected,
        left_out=account.numbers(),
        remarks=plan.remarks.numbers(),
        packed_as=plan.options,
        maps=plan.maps,
    )

    def write(folder: Path) -> None:
        if plan.instances is not None:
            plan.instances.write_beside(folder)
        write_list(folder / LEFT_OUT, left_out)
        write_manifest(folder, manifest)

    if isinstance(args.out, RemotePath):
        finish_in_store(args.out, write)
    else:
        write(args.out)
    labels = "no labels" if classes is None else f"{len(classes)} classes"
    labels = labels if plan.instances is None else plan.instances.told()
    size_bytes, reencoded = sum(shard.bytes for shard in shards), sum(record.reencoded for record in records)
    sys.stdout.write(
        f"{samples} samples, {labels}{f' ({plan.labels_from})' if plan.labels_from else ''}, {len(records)} shards, "
        f"{size_bytes} bytes, {reencoded} re-encoded, {len(rejected)} rejected"
        f"{f' (e.g. {rejected[0]})' if rejected else ''}{_told('left out', account, args.out / LEFT_OUT)}"
        f"{_told('remarks', plan.remarks)}: {args.out}\n"
    )


def _account_of(left_out: list[tuple[str, str]]) -> Account:
    account = Account()
    for name, reason in left_out:
        account.add(reason, printable(name))
    return account


def _told(what: str, account: Account, file: Path | None = None) -> str:
    """A part of the summary; "" where there is nothing to tell."""
    if not account.total():
        return ""
    return f", {account.total()} {what} ({account.text()}{f'; names in {file}' if file else ''})"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Pack an image folder into indexed shards, or index WebDataset tars in place.",
        epilog="exit codes: 0 done, 2 bad input (one line says what); the same command continues an interrupted run",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--images",
        type=user_path,
        metavar="DIR",
        help="class-folder tree, or images at any depth; every file that is left out is counted with its reason",
    )
    source.add_argument(
        "--index_tars",
        type=user_text,
        metavar="GLOB|DIR|URL",
        help="WebDataset tars, indexed in place, not rewritten; their images are not decoded; a URL may hold a glob, "
        "or names in braces (https://host/train-{0000..0099}.tar)",
    )
    parser.add_argument(
        "--out",
        type=user_place,
        required=True,
        metavar="DIR|URL",
        help="folder of the shards and their manifest, or a place in an object store (s3://bucket/folder)",
    )
    parser.add_argument(
        "--labels",
        choices=("auto", "folders", "none", "scenes", "instances"),
        default="auto",
        help="folders: one class a sub-folder; auto: that, where images lie in sub-folders and none "
        "beside them; scenes: a class map beside each image; instances: boxes and masks of --annotations "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--annotations",
        type=user_path,
        metavar="FILE",
        help="with --labels instances: COCO's instances_train2017.json or a file like it; images it does not list "
        "are left out",
    )
    parser.add_argument(
        "--only_with_objects",
        action="store_true",
        help="with --labels instances: leave out images without an object to train on, for a set to train on",
    )
    add_scene_options(parser)
    parser.add_argument(
        "--synsets",
        type=user_path,
        metavar="FILE",
        help="labels of a flat folder (ILSVRC val): LOC_val_solution.csv; lines of name and label, apart by a tab, a "
        "comma, or a space where neither has one; one synset a line in image-name order; or "
        "ILSVRC2012_validation_ground_truth.txt with --classes",
    )
    parser.add_argument(
        "--classes",
        type=user_path,
        metavar="FILE",
        help="one class a line (of a line that begins with a synset, that), or JSON; with --synsets: all classes, for "
        "numbers in the numbers' order; with tars: in label order; with scenes: one class of pixels a line, the whole "
        "line its name",
    )
    parser.add_argument(
        "--short_side",
        type=int,
        default=0,
        metavar="PX",
        help="shrink images whose short side is longer (bicubic, antialiased); 0: keep (default)",
    )
    parser.add_argument(
        "--quality", type=int, default=92, help="JPEG quality where an image must be re-encoded (default: %(default)s)"
    )
    parser.add_argument(
        "--samples_per_shard",
        type=int,
        default=5000,
        help="5000 ImageNet images are about 0.5 GB: few files for the filesystem, yet a lost shard is "
        "soon rebuilt (default: %(default)s)",
    )
    parser.add_argument(
        "--shuffle_seed", type=int, default=0, help="seed of the spreading over shards (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(16, _num_cores()),
        help="processes, one shard each at a time (default here: %(default)s)",
    )
    parser.add_argument(
        "--max_bad_share",
        type=float,
        default=0.01,
        help="more undecodable images than this share are an error (default: %(default)s)",
    )
    parser.add_argument("--dry_run", action="store_true", help="list and check the source, write nothing")
    args = parser.parse_args(argv)
    for name, low, high in (
        ("short_side", 0, 65535),
        ("quality", 1, 100),
        ("samples_per_shard", 1, 10**9),
        ("workers", 1, 4096),
        ("max_bad_share", 0, 1),
    ):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} {getattr(args, name)}: must lie between {low} and {high}")
    if args.index_tars is not None:
        for name in _FOLDER_ONLY:
            if getattr(args, name) != parser.get_default(name):
                raise UserError(
                    f"--{name} has no effect on tars indexed in place; drop it, or unpack the tars and use --images"
                )
    elif isinstance(args.out, Path) and args.out.resolve().is_relative_to(args.images.resolve()):
        raise UserError(f"--out {args.out} lies inside --images {args.images}; give a folder outside it")
    check_scene_options(args)
    if args.classes is not None and args.images is not None and args.synsets is None and args.labels != "scenes":
        raise UserError("--classes goes with --synsets or --index_tars; class folders name their classes themselves")
    _check_instances(args)
    return args


def _check_instances(args: argparse.Namespace) -> None:
    if (args.labels == "instances") != (args.annotations is not None):
        raise UserError("--labels instances and --annotations FILE go together; give both or neither")
    if args.only_with_objects and args.annotations is None:
        raise UserError("--only_with_objects goes with --labels instances; drop it")
    if args.annotations is not None and args.short_side:
        raise UserError(
            f"--short_side {args.short_side}: annotations are of the images' own pixels; drop it, detect.py resizes"
        )


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -------------------------------------------------------------------------------------------- the plan


def plan_shards(images: list[Image], args: argparse.Namespace, scenes: Scenes | None = None) -> list[PackJob]:
    """Spread the images over shards, in an order that is the same for every version of Python."""

    def place(image: Image) -> bytes:
        return hashlib.blake2b(os.fsencode(f"{args.shuffle_seed}:{image.path}"), digest_size=16).digest()

    shuffled = sorted(images, key=place)
    size = args.samples_per_shard
    make = partial(SceneJob, scenes=scenes) if scenes else PackJob
    return [
        make(
            f"shard-{number:06d}.tar",
            str(args.images.resolve()),
            shuffled[start : start + size],
            args.short_side,
            args.quality,
        )
        for number, start in enumerate(range(0, len(shuffled), size))
    ]


def plan_folder(args: argparse.Namespace) -> Plan:
    """Raises: UserError as `list_images`, `list_scenes` and `find_instances`."""
    names = ("short_side", "quality", "samples_per_shard", "shuffle_seed")
    options = {"source": str(args.images.resolve())} | {name: str(getattr(args, name)) for name in names}
    if args.labels == "scenes":
        return _plan_scenes(args, options)
    if args.labels == "instances":
        return _plan_instances(args, options)
    found = list_images(args.images, args.labels, args.synsets, args.classes)
    return Plan(
        plan_shards(found.images, args),
        options,
        "images",
        found.classes,
        found.labels_from,
        found.left_out,
        found.remarks,
    )


def _plan_scenes(args: argparse.Namespace, options: dict[str, str]) -> Plan:
    found, scenes = list_scenes(
        args.images, args.maps, args.classes, reduce_zero_label=args.reduce_zero_label, ignored=args.ignored
    )
    return Plan(
        plan_shards(found.images, args, scenes),
        options | {"maps": str(scenes.folder), "numbers": str(scenes.maps)},
        "images",
        scenes.classes,
        left_out=found.left_out,
        remarks=found.remarks,
        maps=scenes.maps,
    )


def _plan_instances(args: argparse.Namespace, options: dict[str, str]) -> Plan:
    found = list_images(args.images, "none", None, None)
    instances = find_instances(found.images, args.images, args.annotations, only_with_objects=args.only_with_objects)
    return Plan(
        instances.jobs(plan_shards(instances.images, args)),
        options | instances.options(),
        "images",
        left_out=[*found.left_out, *instances.left_out],
        remarks=found.remarks,
        instances=instances,
    )


def plan_indexes(source: str) -> Plan:
    """One job for each tar of a folder or glob, by path.

    Raises: UserError if there is none, one is compressed, cannot be reached, or stands there twice.
    """
    if is_url(source):
        return _plan_store(source)
    folder, left_out = Path(source), list[tuple[str, str]]()
    found = _tars_in(folder, left_out) if folder.is_dir() else glob.glob(source, recursive=True)
    # Links are not resolved: in a hub's cache only they carry the name.
    paths = sorted(Path(os.path.abspath(path)) for path in found)
    if not paths:
        others = _told("left out", _account_of(left_out)).lstrip(", ")
        raise UserError(
            f"--index_tars {source}: no tar there{f', {others}' if others else ''}; give a folder of .tar files or a "
            "quoted glob"
        )
    _refuse_one_tar_twice(source, paths)
    names = _names_of_shards(source, paths)
    jobs = [IndexJob(name, str(path)) for name, path in zip(names, paths)]
    return Plan(jobs, {"source": source, "in_place": "True"}, "tars", left_out=left_out)


def _names_of_shards(source: str, paths: Sequence[Place]) -> list[str]:
    """Raises: UserError for two that a file system may not tell apart."""
    # Where two folders have tars of one name, as train/0.tar and val/0.tar, the folder becomes part of the shard's
    # name.
    count = Counter(path.name for path in paths)
    names = [printable(path.name if count[path.name] == 1 else "_".join(path.parts[1:])) for path in paths]
    # A file system may not tell small letters from capitals.
    same = [name for name, number in Counter(index_name(name).casefold() for name in names).items() if number > 1]
    if same:
        raise UserError(
            f"--index_tars {source}: two tars would share the index {same[0]!r}, but for capitals; rename one"
        )
    return names


def _plan_store(source: str) -> Plan:
    """As `plan_indexes`, for tars in a store; they are read once, in one pass, and not kept.

    Raises: UserError for an address that holds credentials, since the manifest names the tars; StoreFault.
    """
    tars, left_out = tars_of_store(source)
    names = _names_of_shards(source, [tar for tar, _ in tars])
    jobs = [IndexJob(name, tar.url, status) for name, (tar, status) in zip(names, tars)]
    return Plan(jobs, {"source": source, "in_place": "True"}, "tars", left_out=left_out)


def _tars_in(folder: Path, left_out: list[tuple[str, str]]) -> list[Path]:
    """The tars of a folder, by suffix or content; everything else in it is added to `left_out`.

    Raises: UserError for a compressed tar, which cannot be read in any order, and a folder that cannot be read.
    """
    found = []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        for entry in entries:
            if entry.is_dir():
                reason = folder_of_a_system(entry.name) or "folder, not entered"
                left_out.append((f"{entry.name}/", reason))
            elif reason := file_of_a_system(entry.name):
                left_out.append((entry.name, reason))
            elif COMPRESSED_TAR.search(entry.name):
                raise UserError(
                    f"--index_tars {folder}: {entry.name!r} is a compressed tar, which has no places to read from; "
                    "unpack it to a .tar, or give a quoted glob of the tars that are meant"
                )
            elif suffix_of(entry.name) == ".tar" or (entry.is_file() and _holds_a_tar(entry.path)):
                found.append(Path(entry.path))
            else:
                left_out.append((entry.name, "no tar"))
    except OSError as error:
        raise UserError(f"--index_tars {describe_os_error(error, folder)}; make it readable") from None
    return found


def _holds_a_tar(path: str) -> bool:
    with open(path, "rb") as file:
        return kind_of(file.read(HEAD_BYTES)) == "tar"


def _refuse_one_tar_twice(source: str, paths: list[Path]) -> None:
    """Two names of one file, as links make them, would double its samples."""
    first: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"--index_tars {describe_os_error(error, path)}; correct or remove it") from None
        before = first.setdefault((status.st_dev, status.st_ino), path)
        if before != path:
            raise UserError(
                f"--index_tars {source}: {str(before)!r} and {str(path)!r} are one file; give a quoted glob of one"
            )


# --------------------------------------------------------------------------------------- making shards


# The counter of units done by all workers, set in each of them before its first job.
_counter = None


def _start_worker(counter) -> None:
    global _counter
    _counter = counter
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent) -> None:
    """End a worker whose parent was killed: it would finish its shard beside the workers of the next start, and then
    wait for work for ever.
    """
    parent.join()
    os._exit(EXIT_INTERRUPTED)


def _count_one() -> None:
    assert _counter is not None
    with _counter.get_lock():
        _counter.value += 1


def make_shards(out: Place, jobs: list, workers: int, progress: Progress) -> list[ShardRecord]:
    """Do the jobs, one process each at a time.

    Raises: UserError where a shard cannot be written or a worker was killed; finished shards are kept.
    """
    # Spawned, not forked: the decoders start threads, which a fork would copy in an unknown state.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    workers = min(workers, len(jobs))
    executor: Executor
    if workers > 1:
        # The workers inherit this: each of them keeps one core busy already.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(counter,))
    else:
        executor = ThreadPoolExecutor(1, initializer=_start_worker, initargs=(counter,))
    records = []
    try:
        make: Callable[..., ShardRecord] = make_shard_in_store if isinstance(out, RemotePath) else make_shard
        waiting = {executor.submit(make, out, job, _count_one) for job in jobs}
        while waiting:
            finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            records += [future.result() for future in finished]
            progress.show(counter.value)
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most often for want of memory; use fewer than --workers "
            f"{workers} and start again to continue"
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        progress.close()
    return records


if __name__ == "__main__":
    run(main)
