"""Pack an image folder into indexed shards, or index WebDataset tars where they lie; either way one manifest.

Images are spread over the shards by a hash of seed and path, so that a shard of class-folder data holds all classes
and reading a few shards at a time still mixes them. Ordinary images are stored byte for byte; odd ones (CMYK, 16 bit,
EXIF-rotated, transparent, animated, other formats) are re-encoded as upright RGB, so that any WebDataset reader sees
the right image. An image that cannot be decoded is named in the manifest and left out. An interrupted run is
continued by the same command.
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
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from peco_ds.command_line import Parser, run
from peco_ds.data.image_folders import Image, list_images, printable
from peco_ds.data.image_shards import (
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
from peco_ds.data.scene_packing import (
    SCENE_OPTIONS,
    SceneJob,
    Scenes,
    add_scene_options,
    check_scene_options,
    list_scenes,
)
from peco_ds.errors import EXIT_INTERRUPTED, UserError
from peco_ds.schema import ImageManifest, SceneMaps, write_manifest

PROGRESS_EVERY_S = 5.0
_FOLDER_ONLY = (
    *("labels", "synsets", "short_side", "quality", "samples_per_shard", "shuffle_seed", "max_bad_share"),
    *(*SCENE_OPTIONS, "annotations", "only_with_objects"),
)


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    jobs: list[PackJob] | list[IndexJob]
    scenes = instances = None
    classes: list[str] | None
    if args.images is not None:
        names = ("short_side", "quality", "samples_per_shard", "shuffle_seed")
        options = {"source": str(args.images.resolve())} | {name: str(getattr(args, name)) for name in names}
        if args.labels == "scenes":
            images, scenes = list_scenes(
                args.images, args.maps, args.classes, reduce_zero_label=args.reduce_zero_label, ignored=args.ignored
            )
            classes = scenes.classes
            options |= {"maps": str(scenes.folder), "numbers": str(scenes.maps)}
        elif args.labels == "instances":
            images, classes = list_images(args.images, "none", None, None)
            instances = find_instances(images, args.images, args.annotations, only_with_objects=args.only_with_objects)
            images, options = instances.images, options | instances.options()
        else:
            images, classes = list_images(args.images, args.labels, args.synsets, args.classes)
        jobs = plan_shards(images, args, scenes)
        jobs = instances.jobs(jobs) if instances else jobs
    else:
        jobs, classes = plan_indexes(args.index_tars), None
        options = {"source": args.index_tars, "in_place": "True"}
    units = "images" if args.images is not None else "tars"
    total = sum(job.units for job in jobs)
    if args.dry_run:
        sys.stdout.write(f"would pack {total} {units} into {len(jobs)} shards in {args.out}\n")
        return
    with sole_writer(args.out):
        _pack(args, jobs, classes, options, total, units, maps=scenes.maps if scenes else None, instances=instances)


def _pack(
    args: argparse.Namespace,
    jobs: list,
    classes: list[str] | None,
    options: dict[str, str],
    total: int,
    units: str,
    *,
    maps: SceneMaps | None,
    instances: Instances | None,
) -> None:
    done, todo = prepare_folder(args.out, jobs, options)
    done += make_shards(args.out, todo, args.workers, Progress(total, sum(record.units for record in done), units))
    records = sorted(done, key=lambda record: record.shard.name)
    rejected = [line for record in records for line in record.rejected]
    if args.images is None:
        classes = classes_of_tars(records, args.classes)
    elif len(rejected) > args.max_bad_share * total:
        raise UserError(
            f"{len(rejected)} of {total} images cannot be decoded, more than --max_bad_share "
            f"{args.max_bad_share}: {'; '.join(rejected[:3])}"
            f"{'; ...' if len(rejected) > 3 else ''}; repair or remove them, or raise --max_bad_share"
        )
    samples = sum(record.shard.samples for record in records)
    if samples == 0:
        raise UserError(f"{args.images or args.index_tars}: holds no image that can be decoded; correct the path")
    if instances is not None:
        instances.write_beside(args.out)
    write_manifest(
        args.out, ImageManifest([record.shard for record in records], samples, classes, rejected, options, maps)
    )
    labels = "no labels" if classes is None else f"{len(classes)} classes"
    labels = labels if instances is None else instances.told()
    size_bytes = sum(record.shard.bytes for record in records)
    reencoded = sum(record.reencoded for record in records)
    sys.stdout.write(
        f"{samples} samples, {labels}, {len(records)} shards, {size_bytes} bytes, {reencoded} "
        f"re-encoded, {len(rejected)} rejected: {args.out}\n"
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Pack an image folder into indexed shards, or index WebDataset tars in place.",
        epilog="exit codes: 0 done, 2 bad input (one line says what); the same command continues an interrupted run",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="class-folder tree, or images at any depth; dot files are passed over",
    )
    source.add_argument(
        "--index_tars",
        metavar="GLOB|DIR",
        help="WebDataset tars, indexed in place, not rewritten; their images are not decoded",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the shards and their manifest"
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
        type=Path,
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
        type=Path,
        metavar="FILE",
        help="labels of a flat folder (ILSVRC val): LOC_val_solution.csv; 'name label' lines; one synset "
        "a line in image-name order; "
        "or ILSVRC2012_validation_ground_truth.txt with --classes",
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="one class a line, its first word the name; with --synsets: all synsets, for numbers in the "
        "numbers' order; with tars: in label order; with scenes: one class of pixels a line, the whole line its name",
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
    elif args.out.resolve().is_relative_to(args.images.resolve()):
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


def plan_indexes(source: str) -> list[IndexJob]:
    """One job for each tar of a folder or glob, by path.

    Raises: UserError if there is none.
    """
    folder = Path(source)
    found = folder.glob("*.tar") if folder.is_dir() else glob.glob(source, recursive=True)
    # Links are not resolved: in a hub's cache only they carry the name.
    paths = sorted(Path(os.path.abspath(path)) for path in found)
    if not paths:
        raise UserError(f"--index_tars {source}: no tar there; give a folder of .tar files or a quoted glob")
    # Where two folders have tars of one name, as train/0.tar and val/0.tar, the folder becomes part of the shard's
    # name.
    count = Counter(path.name for path in paths)
    jobs = [
        IndexJob(printable(path.name if count[path.name] == 1 else "_".join(path.parts[1:])), str(path))
        for path in paths
    ]
    same = [name for name, number in Counter(index_name(job.name) for job in jobs).items() if number > 1]
    if same:
        raise UserError(f"--index_tars {source}: two tars would share the index {same[0]!r}; rename one")
    return jobs


# --------------------------------------------------------------------------------------- making shards


class Progress:
    """Shows a bar on a terminal, else a line every few seconds."""

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
            sys.stderr.write(
                f"{self._before + done_now} of {self._total} {self._units}, {rate:.1f}/s, {left_s:.0f} s left\n"
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


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
        # The workers inherit this: each of them keeps one core busy already.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(counter,))
    else:
        executor = ThreadPoolExecutor(1, initializer=_start_worker, initargs=(counter,))
    records = []
    try:
        waiting = {executor.submit(make_shard, out, job, _count_one) for job in jobs}
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
