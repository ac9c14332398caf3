"""What does it cost to read a set from a web server or an object store? Images/s, requests and bytes an epoch: from a
local disk, streamed, with an empty and with a full cache, at a stated delay of every answer.

    python -m benchmarks.remote_data [--images FOLDER] [--latency_ms 20] [--record FILE.md] [key.sub=value ...]

A web server on this machine serves the packed set and its token records, and waits before every answer. Each way reads
an epoch of batches as pre-training does (tar read, decode, crop, mask, token record), by loader processes, in a process
of its own that also tells its peak memory; the ways go by turns. The cold cache is empty at the start of every turn,
the warm one has been filled by an epoch before. Where streaming is slower than the disk, the delay is what is waited
for: loader processes and requests at a time (data.num_workers, data.store_requests) hide it. Server and readers share
the cores of one machine, so that at no delay streaming costs more here than it would from another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.record import at_least, benchmark_parser, markdown_table, parse, publish
from benchmarks.sets import DRAWN, chosen_files, pack, write_tokens
from benchmarks.stages import call
from benchmarks.turns import by_turns, ratios, spread
from benchmarks.web_server import WebServer
from peco_ds.command_line import run
from peco_ds.config import PretrainRecipe
from peco_ds.data.image_set import ImageSet
from peco_ds.planner.store_costs import requests_of, set_of
from peco_ds.recipe_files import load_recipe
from peco_ds.schema import ImageManifest, TokenManifest, read_manifest

DISK, STREAMED, COLD, WARM, WHOLE = "local disk", "streamed", "cold cache", "warm cache", "cold cache of whole shards"
WAYS = (DISK, STREAMED, COLD, WARM, WHOLE)
OWN = ["views.count=4", "data.images=images", "data.tokens=tokens", "data.shuffle_window_shards=4"]


@dataclass
class Epochs:
    """Of one way, an entry a counted round."""

    images_s: list[float] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser("remote_data", __doc__, overrides="settings of the recipe")
    parser.add_argument("--recipe", default="peco_vitb16", help="views, mask and image size (default: %(default)s)")
    images = "folder of images at any depth, or of image shards (default: the images that the tests find)"
    parser.add_argument("--images", type=Path, metavar="FOLDER", help=images)
    parser.add_argument("--num_images", type=at_least(8), default=2000, help="of an epoch (default: %(default)s)")
    parser.add_argument("--shard", type=at_least(2), default=125, help="images a shard (default: %(default)s)")
    parser.add_argument("--latency_ms", type=at_least(0), default=20, help="before each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="epochs of each way (default: %(default)s)")
    parser.add_argument("--epoch", nargs=2, metavar=("ROOT", "CACHE"), help=argparse.SUPPRESS)
    args = parse(parser, argv)
    if args.epoch:
        sys.stdout.write(json.dumps(one_epoch(*args.epoch, args.recipe, args.overrides)) + "\n")
        return 0
    sys.stdout.write(publish(args, "Data on an object store: images/s, requests and bytes", measure(args), "fsspec"))
    return 0


def one_epoch(root: str, cache: str, recipe: str, overrides: list[str]) -> dict:
    """Of this process: images/s from the first batch to the last, with the start of the loaders; peak memory, MiB."""
    import torch

    from peco_ds.data.loaders import masked_batches
    from peco_ds.data.order import rank_positions
    from peco_ds.data.token_shards import TokenSet
    from peco_ds.data_paths import data_path

    torch.set_num_threads(1)
    places = [f"data.root={root}", *([f"data.cache={cache}"] if cache else [])]
    cfg = load_recipe(PretrainRecipe, recipe, [*OWN, *overrides, *places]).recipe
    begun = time.perf_counter()
    images = ImageSet(data_path(cfg.data, cfg.data.images))
    codes, grid = cfg.objective.num_codes, cfg.model.grid
    tokens = TokenSet(
        data_path(cfg.data, cfg.data.tokens), images.manifest, num_codes=codes, grid=grid, views=cfg.views
    )
    steps = images.num_samples // cfg.run.global_batch
    positions = rank_positions(cfg.run, 0, 1, first_step=0, last_step=steps)
    seen = sum(len(batch.keys) for batch in masked_batches(images, tokens, positions, cfg, torch.device("cpu")))
    seconds = time.perf_counter() - begun
    # of the largest process: this one, or a loader
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    return {"images": seen, "seconds": seconds, "peak_mib": peak}


def measure(args: argparse.Namespace) -> str:
    """Tables, as markdown."""
    overrides = ["run.global_batch=64", "run.micro_batch=64", "data.num_workers=2", *args.overrides]
    cfg = load_recipe(PretrainRecipe, args.recipe, [*OWN, *overrides]).recipe
    with tempfile.TemporaryDirectory(prefix="peco_remote_") as name:
        folder = Path(name)
        files = chosen_files(args.images, args.num_images, folder / "files")
        drawn = any(path.name.startswith(DRAWN) for path in files.iterdir())
        images = ImageSet(pack(files, folder / "sets" / "images", samples_per_shard=args.shard))
        write_tokens(images, cfg, folder / "sets" / "tokens")
        server = WebServer(folder / "sets", args.latency_ms / 1e3)
        try:
            found = epochs(args, overrides, folder, server)
        finally:
            server.stop()
        sets = {
            "images": set_of("images", read_manifest(folder / "sets" / "images", ImageManifest)),
            "tokens": set_of("tokens", read_manifest(folder / "sets" / "tokens", TokenManifest)),
        }
    about = (
        f"{images.num_samples} images{' (drawn, as no real ones were found: give --images)' if drawn else ''} in "
        f"{sets['images'].shards} shards, {sets['images'].bytes / 1e6:.1f} MB, and their token records, "
        f"{sets['tokens'].bytes / 1e6:.1f} MB. Batches of {cfg.run.micro_batch}, {cfg.data.num_workers} loader "
        f"processes, {cfg.data.store_requests} requests at a time of each; {args.latency_ms} ms before every answer."
    )
    predicted = [requests_of(each, cfg.run.micro_batch, cfg.data.shuffle_window_shards) for each in sets.values()]
    requests, size = (sum(each) for each in zip(*predicted))
    after = (
        f"Streamed, `plan.py` predicts {requests:.0f} requests for members and {size / 1e6:.1f} MB an epoch; the rest "
        "is manifests, indexes and looks at the first bytes, which each loader process does for itself."
    )
    return "\n\n".join([about, table(found), after])


def epochs(args: argparse.Namespace, overrides: list[str], folder: Path, server: WebServer) -> dict[str, Epochs]:
    found = {way: Epochs() for way in WAYS}
    warm = folder / "warm"
    # The first epoch fills the warm cache, and brings the sets into the page cache.
    turns = [(False, WARM), *by_turns(WAYS, args.rounds, warm_up=0)]
    for number, (counted, way) in enumerate(turns):
        root = folder / "sets" if way == DISK else server.url
        cold = folder / f"cold_{number}"
        cache = {COLD: str(cold), WHOLE: str(cold), WARM: str(warm)}.get(way, "")
        own = [*overrides, *(["data.cache_whole_shards=true"] if way == WHOLE else [])]
        server.forget()
        command = [
            sys.executable,
            "-m",
            "benchmarks.remote_data",
            "--recipe",
            args.recipe,
            "--epoch",
            root,
            cache,
            *own,
        ]
        told = json.loads(call(command, dict(os.environ)).strip().splitlines()[-1])
        shutil.rmtree(cold, ignore_errors=True)
        if counted:
            one = found[way]
            one.images_s.append(told["images"] / told["seconds"])
            one.requests.append(server.requests)
            one.bytes.append(server.bytes)
            one.peak_mib.append(told["peak_mib"])
    return found


def table(found: dict[str, Epochs]) -> str:
    rows = [
        (
            way,
            f"{statistics.median(one.images_s):.0f}",
            spread(ratios(one.images_s, found[DISK].images_s)),
            f"{statistics.median(one.requests):.0f}",
            f"{statistics.median(one.bytes) / 1e6:.1f}",
            f"{max(one.peak_mib):.0f}",
        )
        for way, one in found.items()
    ]
    heads = (
        "way",
        "images/s",
        "times the local disk (smallest to largest round)",
        "requests an epoch",
        "MB an epoch",
        "MiB at most of a process",
    )
    return markdown_table(heads, rows)


if __name__ == "__main__":
    run(main)
