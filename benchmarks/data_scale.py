"""Time and memory of the data side against the number of samples and shards: manifests, order, position in a run, first
batch after a resume.

    python -m benchmarks.data_scale [--largest 1e8] [--record FILE.md] [--plot FILE.png]

Each case is a pair of manifests (images, tokens) of shards that are not there, and is measured in a fresh process:
what a rank does between `import` and the first sample. A resume is asked for at places all over a run of 800 epochs;
for one of them the shards of the first batch are put there, one small real tar under their names, and the batch's
members are read. Peak memory is what comes on top of the imports. "copied" is what a forked loader worker has of its
own after it has walked through the order and collected garbage, "sent" what it would be sent where workers are spawned.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import io
import json
import os
import pickle
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.plots import drawing, log_curves
from benchmarks.record import benchmark_parser, markdown_table, parse, publish
from benchmarks.stages import call
from peco_ds.command_line import run
from peco_ds.config import ViewSettings
from peco_ds.data.indexed_tar import IndexedTar, ShardSet, index_name, write_index
from peco_ds.data.order import Cursor, SampleOrder, view_at
from peco_ds.data.token_shards import TokenSet
from peco_ds.errors import UserError
from peco_ds.schema import (
    ImageManifest,
    Shard,
    TokenManifest,
    ViewRecipe,
    read_manifest,
    sha256_of_file,
    write_manifest,
)

EPOCHS, VIEWS, BATCH, MICRO_BATCH = 800, 100, 256, 4
GRID, NUM_CODES = 16, 8192
LOOK = dict(tokenizer_px=256, scale=(0.2, 1.0), ratio=(0.75, 1.33), flip=0.5, color_jitter=0.4, seed=0)
WALKED = 20_000  # positions, for the samples a second
# loader workers of all ranks together, 8 a GPU
WORKERS = {8: "1 GPU", 512: "64 GPUs", 4096: "512 GPUs"}
# a resume is tried, each with an order of its own; the quickest counts
TIMES = 3
LONGEST_S = 600.0


@dataclass(frozen=True)
class Case:
    shards: int
    shard_size: int
    giant: int = 0  # samples of one more shard
    window_shards: int = 16
    repeats: int = 1

    @property
    def samples(self) -> int:
        return self.shards * self.shard_size + self.giant

    @property
    def name(self) -> str:
        parts = [
            f"{self.shards} x {self.shard_size}" + (f" + {self.giant}" if self.giant else ""),
            f"window {self.window_shards}" if self.window_shards != 16 else "",
            f"repeats {self.repeats}" if self.repeats > 1 else "",
        ]
        return ", ".join(part for part in parts if part)


GROWTH = [Case(10 * 10**power, 1000) for power in range(5)]  # 1e4 to 1e8 samples
OTHERS = [
    Case(10_000, 10_000),
    Case(10_000, 10_000, window_shards=1000),
    Case(100_000, 1000, window_shards=1000),
    Case(100_000, 1000, repeats=3),
    Case(90_000, 1000, giant=10_000_000),
]


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser("data_scale", __doc__, plot="time and memory against samples")
    largest = "leave out cases of more samples (default: %(default)g)"
    parser.add_argument("--largest", type=float, default=1e8, help=largest)
    # the fresh process: a case and its folder, as JSON
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parse(parser, argv)
    if args.one:
        asked = json.loads(args.one)
        sys.stdout.write(json.dumps(measure(Case(**asked["case"]), Path(asked["folder"]))))
        return 0
    cases = [case for case in GROWTH + OTHERS if case.samples <= args.largest]
    if not cases:
        smallest = f"the smallest case has {GROWTH[0].samples} samples"
        raise UserError(f"--largest {args.largest:g}: {smallest}; give as many or more")
    found = {}
    for case in cases:
        found[case] = in_fresh_process(case)
        sys.stderr.write(f"{case.name}: {found[case]['resume_s']:.3f} s\n")
    text = tables(found)
    if args.plot:
        draw(args.plot, {case: row for case, row in found.items() if case in GROWTH})
        text += f"\n\n![time and memory against samples]({args.plot.name})"
    sys.stdout.write(publish(args, "The data side from 10^4 to 10^8 samples", text, "numpy", "pydantic"))
    return 0


def in_fresh_process(case: Case) -> dict:
    """What `measure` gives, of a process that has done nothing before."""
    with tempfile.TemporaryDirectory(prefix="peco_scale_") as folder:
        write_set(Path(folder), case)
        asked = json.dumps({"case": asdict(case), "folder": folder})
        return json.loads(call([sys.executable, "-m", "benchmarks.data_scale", "--one", asked], timeout_s=LONGEST_S))


# ---------------------------------------------------------------------- a set that is mostly not there


def write_set(folder: Path, case: Case) -> None:
    """`images/` and `tokens/` with a manifest each, and `real.tar` with its index: any shard of the usual size may be a
    link to it.
    """
    (folder / "images").mkdir()
    (folder / "tokens").mkdir()
    tar, index = folder / "real.tar", folder / "real.index.json"
    with tarfile.open(tar, "w") as file:
        for number in range(case.shard_size):
            for extension, content in (("jpg", b"%09d" % number * 20), ("cls", b"%d" % (number % 1000))):
                member = tarfile.TarInfo(f"n{number % 1000:08d}_{number}.{extension}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    _, index_sha256 = write_index(tar, index)
    own = (tar.stat().st_size, sha256_of_file(tar), index_sha256)
    names, size = [f"train-{number:06d}.tar" for number in range(case.shards)], case.shard_size
    images = [Shard(name, size, *own) for name in names]
    tokens = [Shard(name, size, 4096 * size, _sha256(f"t{name}"), _sha256(f"i{name}")) for name in names]
    if case.giant:
        images.insert(case.shards // 2, Shard("giant.tar", case.giant, 1, _sha256("a"), _sha256("b")))
        tokens.insert(case.shards // 2, Shard("giant.tar", case.giant, 1, _sha256("c"), _sha256("d")))
    manifest = ImageManifest(images, case.samples)
    write_manifest(folder / "images", manifest)
    of_tokens = TokenManifest(
        tokens,
        case.samples,
        images_fingerprint=manifest.fingerprint(),
        image_shards={shard.name: shard.sha256 for shard in images},
        tokenizer_fingerprint="f" * 64,
        num_codes=NUM_CODES,
        grid=(GRID, GRID),
        num_views=VIEWS,
        views=ViewRecipe(**LOOK),
    )
    write_manifest(folder / "tokens", of_tokens)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def place(folder: Path, names: list[str]) -> None:
    """Put the real tar under these names."""
    for name in names:
        for link, target in ((name, "real.tar"), (index_name(name), "real.index.json")):
            (folder / "images" / link).symlink_to(folder / target)


# -------------------------------------------------------------------------------------------- one case


def places_of(samples: int) -> dict[str, int]:
    last = EPOCHS - 1
    return {
        "first sample": 0,
        "middle of an epoch": samples // 2,
        "last sample of an epoch": samples - 1,
        f"epoch {last}": last * samples,
        f"middle of epoch {last}": last * samples + samples // 2,
        "last batch of the run": EPOCHS * samples - BATCH,
    }


def measure(case: Case, folder: Path) -> dict:
    """Seconds, bytes and rates of one case; to be called in a process of its own."""
    forget_peak()
    before, seconds = memory_mb("VmRSS"), {}

    def timed(name: str, work: Callable):
        begun = time.perf_counter()
        value = work()
        seconds[name] = time.perf_counter() - begun
        return value

    manifest = timed("read", lambda: read_manifest(folder / "images", ImageManifest))
    fingerprint = timed("fingerprint", manifest.fingerprint)
    shards = timed("shard set", lambda: ShardSet(folder / "images", manifest))
    views, form = ViewSettings(**LOOK, count=VIEWS, tokenizer_precision="fp32"), dict(num_codes=NUM_CODES, grid=GRID)
    tokens = timed("tokens", lambda: TokenSet(folder / "tokens", manifest, views=views, **form))
    start_s, start_mb = sum(seconds.values()), memory_mb("VmHWM") - before

    def first_batch(position: int) -> tuple[SampleOrder, list[int]]:
        """What a rank has to know before it can read: of each position the sample, its view, its shard and its place
        there.
        """
        Cursor(fingerprint, 0, position).check(fingerprint, 0)
        order = SampleOrder(shards.shard_sizes, 0, case.window_shards, case.repeats)
        samples = [order.sample_at(each) for each in range(position, position + BATCH)]
        for number, sample in enumerate(samples):
            view_at(0, order.epoch_of(position + number), sample, VIEWS)
            shards.locate(sample)
        return order, samples

    places = places_of(case.samples)
    if case.giant:
        starts = range(0, case.samples, case.giant // 4)
        inside = (p for p in starts if shards.locate(first_batch(p)[1][0])[0] == case.shards // 2)
        places["in the giant shard"] = next(inside)
    resumed = {name: least_of(TIMES, partial(first_batch, position)) for name, position in places.items()}
    peak_mb = memory_mb("VmHWM") - before

    order, samples = first_batch(places[f"middle of epoch {EPOCHS - 1}"])
    name_of = {sample: manifest.shards[shards.locate(sample)[0]].name for sample in samples}
    samples = [sample for sample in samples if name_of[sample] != "giant.tar"]
    place(folder, sorted({name_of[sample] for sample in samples}))
    opened = sorted({shards.locate(sample)[0] for sample in samples})
    timed("open", lambda: [shards.open_shard(number) for number in opened])
    timed("parse", lambda: IndexedTar(folder / "real.tar", folder / "real.index.json"))
    members = timed("read batch", lambda: [shards.read(sample) for sample in samples])
    assert all(set(found) == {"jpg", "cls"} for _, found in members)
    order.sample_at(0)
    # one process, as a loader worker is
    timed("walk", lambda: walk(order, shards))
    return {
        "manifest_mb": [(folder / kind / "manifest.json").stat().st_size / 1e6 for kind in ("images", "tokens")],
        "seconds": seconds,
        "start_s": start_s,
        "resumed_s": resumed,
        "resume_s": max(resumed.values()),
        "open_ms": 1e3 * seconds["open"] / len(opened),
        "parse_ms": 1e3 * seconds["parse"],
        "opens": {str(workers): opens_a_sample(order, shards, case, workers) for workers in WORKERS},
        "read_us": 1e6 * seconds["read batch"] / len(samples),
        "samples_a_second": WALKED / seconds["walk"],
        "start_mb": start_mb,
        "peak_mb": peak_mb,
        "sent_mb": len(pickle.dumps((shards, tokens, order))) / 1e6,
        "copied_mb": copied_by_a_worker(shards, tokens, order),
    }


def walk(order: SampleOrder, shards: ShardSet) -> None:
    for position in range(WALKED):
        sample = order.sample_at(position)
        view_at(0, 0, sample, VIEWS)
        shards.locate(sample)


def opens_a_sample(order: SampleOrder, shards: ShardSet, case: Case, workers: int) -> float:
    """How many shards a loader worker opens for each sample it reads, where so many share a window in passes of
    MICRO_BATCH; all shards of a window stay open.
    """
    length = min(case.window_shards * case.shard_size, case.samples) // MICRO_BATCH * MICRO_BATCH
    found = np.array([shards.locate(order.sample_at(position))[0] for position in range(length)])
    worker = np.arange(length) // MICRO_BATCH % workers
    return len(np.unique(np.stack([worker, found]), axis=1).T) / length


def least_of(times: int, work: Callable) -> float:
    """Seconds of the quickest of several calls: what others do on the machine only adds."""
    spent = []
    for _ in range(times):
        # an order is in a circle with its caches; a run makes one
        gc.collect()
        begun = time.perf_counter()
        work()
        spent.append(time.perf_counter() - begun)
    return min(spent)


def memory_mb(name: str) -> float:
    """Of this process: VmRSS now, VmHWM at its highest since the start or `forget_peak`."""
    return proc_kb("status", name) / 1024


def proc_kb(file: str, name: str) -> int:
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    # else the peak of the imports would hide what comes after
    Path("/proc/self/clear_refs").write_text("5")


def copied_by_a_worker(shards: ShardSet, tokens: TokenSet, order: SampleOrder) -> float:
    """MB of its own that a forked process has after it has looked at many shards: Python counts references inside the
    objects it reads.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        for position in range(2000):
            near = position < 50
            sample = order.sample_at(position * 4999 % order.num_samples) if near else position * 49999
            shard, _ = shards.locate(sample % order.num_samples)
            _ = shards.manifest.shards[shard].name, tokens.manifest.shards[shard].name
        gc.collect()
        os.write(write_end, b"%d" % sum(proc_kb("smaps_rollup", name) for name in ("Private_Clean", "Private_Dirty")))
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as answer:
        own_kb = int(answer.read())
    os.waitpid(child, 0)
    return own_kb / 1024


# --------------------------------------------------------------------------------------- what is shown


def tables(found: dict[Case, dict]) -> str:
    """Markdown: what a start costs, where a run may be continued, and how often workers open shards."""
    places = list(dict.fromkeys(name for row in found.values() for name in row["resumed_s"]))
    start, resume, workers = [], [], {}
    for case, row in found.items():
        named, seconds, manifests = (case.name, f"{case.samples:.0e}"), row["seconds"], row["manifest_mb"]
        spent = [seconds["read"], seconds["fingerprint"], seconds["tokens"], row["start_s"]]
        start.append(
            (
                *named,
                f"{manifests[0]:.1f} + {manifests[1]:.1f}",
                *(f"{one:.3f}" for one in spent),
                f"{row['open_ms']:.2f}",
                f"{row['parse_ms']:.1f}",
                f"{row['read_us']:.0f}",
                f"{row['start_mb']:.0f}",
                f"{row['sent_mb']:.1f}",
                f"{row['copied_mb']:.0f}",
            )
        )
        resumed = (f"{row['resumed_s'][name]:.4f}" if name in row["resumed_s"] else "" for name in places)
        resume.append((*named, *resumed, f"{row['samples_a_second']:.0f}", f"{row['peak_mb']:.0f}"))
        if case in GROWTH + OTHERS[:1]:
            opens = [row["opens"][str(count)] for count in WORKERS]
            pairs = [cell for share in opens for cell in (f"{share:.3f}", f"{share * row['open_ms']:.2f}")]
            # of each size of shard the largest case
            workers[case.shard_size] = (case.name, *pairs)
    of_start = (
        "shards x samples | samples | manifests MB | images s | fingerprint s | tokens and ties s | start s | "
        "open a shard ms | parse its index ms | read a sample us | memory MB | sent MB | copied MB"
    )
    of_workers = [head for name in WORKERS.values() for head in (f"{name}: opens", "ms")]
    parts = [
        "A start, by parts: both manifests read and compared with each other, one shard opened, one "
        "sample's two members read by a process that has its shard open.",
        markdown_table(of_start.split(" | "), start),
        f"A resume: seconds from a cursor to sample, view and shard of the first {BATCH} positions, "
        "and how many a process goes through in a second. A window is shuffled whole "
        "when a batch first touches it, so a resume takes as long as its window is large, twice "
        "where a batch lies in two. Peak memory holds the start too.",
        markdown_table(["shards x samples", "samples", *places, "samples/s", "peak MB"], resume),
        "What opening shards costs a worker, of images and again of tokens: shards it opens for "
        "each sample it reads, and the milliseconds a sample that come of it.",
        markdown_table(["shards x samples", *of_workers], workers.values()),
    ]
    return "\n\n".join(parts)


def draw(path: Path, found: dict[Case, dict]) -> None:
    """Seconds and MB against samples, both axes logarithmic, with a line that grows as the samples do."""
    samples, rows = [case.samples for case in found], list(found.values())
    curves = {
        "seconds": {
            "start: both manifests, fingerprint, ties": [row["start_s"] for row in rows],
            "resume at the dearest place": [row["resume_s"] for row in rows],
            "open one shard": [row["open_ms"] / 1e3 for row in rows],
        },
        "MB": {
            "peak beyond the imports": [row["peak_mb"] for row in rows],
            "manifest of the images": [row["manifest_mb"][0] for row in rows],
        },
    }
    with drawing(path, 1, 2, size=(11, 4.5)) as drawn:
        for axes, (unit, lines) in zip(drawn[0], curves.items()):
            first = max(values[-1] for values in lines.values())
            linear = [first * each / samples[-1] for each in samples]
            axes.loglog(samples, linear, color="0.7", linestyle="--", label="linear")
            log_curves(axes, samples, lines, "samples, in shards of 1000", unit)
            axes.axhline(1.0 if unit == "seconds" else 1024.0, color="0.4", linewidth=0.8)


if __name__ == "__main__":
    run(main)
