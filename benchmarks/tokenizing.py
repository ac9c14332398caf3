"""How fast do images become tokens? The way tokenize_shards.py takes, against one view at a time, and the parts of the
work, each alone.

    python -m benchmarks.tokenizing [--gpu] [--images FOLDER] [--rounds 3] [--both_compiled] [--record FILE.md]
    [key.sub=value ...]

Ours: every image decoded once, its K views cut, many views a pass, the network in views.tokenizer_precision and
compiled as run.compile says, results fetched while the next batch runs. Against it, as a plain loop would do it: for
each view the image is decoded again and the network sees that view alone, eager, in float32. Both end with codes in
host memory and start from JPEG bytes in image shards. The parts: the network alone (eager or compiled, fp32 or bf16),
the search for the code alone, decoding and cutting alone on one core. All take turns in every round; what is reported
are medians over rounds and, of the two ways, their ratio.

Tokenizers have random weights, which does not matter to the time. On a CPU they are small ones; --gpu takes the
recipes' own sizes, views and batches. Overrides are of the pre-training recipe (views, run, data); those of tokenizer.
are of the tokenizer's. The record is written anew after every tokenizer.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import at_least, benchmark_parser, markdown_table, parse, publish
from benchmarks.sets import chosen_files, pack
from benchmarks.step_time import synchronize, this_device
from benchmarks.turns import measured, ratios, spread
from peco_ds.command_line import run
from peco_ds.config import PretrainRecipe, TokenizerRecipe, ViewSettings
from peco_ds.data.image_set import ImageSet
from peco_ds.data.loaders import view_batches
from peco_ds.data.views import cut, draw_view, jitter, to_tokenizer
from peco_ds.models.token_passes import TokenPasses, even_pass_size
from peco_ds.models.tokenizers import build_tokenizer
from peco_ds.recipe_files import load_recipe
from peco_ds.runtime.engine import compiles
from peco_ds.runtime.token_records import record_batches
from peco_ds.runtime.token_source import codes_function


@dataclass(frozen=True)
class Case:
    """A tokenizer and the recipe that its codes are made for."""

    name: str
    recipe: str
    tokenizer: str  # recipe
    # setting without which that recipe asks for a file that only training needs
    untrained: str
    small: str  # settings of both for a CPU


CASES = (
    Case(
        "PeCo, f16 VQGAN",
        "peco_vith14",
        "peco_tokenizer",
        "perceptual.weight=0",
        "tokenizer.channels=32 views.tokenizer_px=128 views.count=8 run.micro_batch=8 data.num_workers=0",
    ),
    Case(
        "BEiT v2, VQ-KD",
        "beitv2_vitb16",
        "beitv2_tokenizer",
        "teacher.weights=none",
        "tokenizer.vit.width=192 tokenizer.vit.depth=4 tokenizer.vit.heads=3 views.count=8 "
        "run.micro_batch=8 data.num_workers=0",
    ),
)
OURS, ONE_BY_ONE, SEARCH = "tokenize_shards.py's way", "one view at a time", "search alone"
DECODE_ONCE, DECODE_EACH = "decode once and cut K views, one core", "decode for each view and cut, one core"
DECODED_IMAGES = 2  # in a round


@dataclass
class Found:
    """Views a second of each way and part, an entry a round."""

    about: str
    views_per_image: int
    start_s: float = 0.0  # of the first call of our way
    rates: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.rates[name])

    def ratio(self, name: str, to: str) -> str:
        """Median over rounds, with its spread."""
        return spread(ratios(self.rates[name], self.rates[to]))


def main(argv: list[str] | None = None) -> int:
    args, text = arguments(argv), ""
    parts = [
        f"Random weights; ways and parts by turns; medians of {args.rounds} rounds, of ratios with smallest and "
        f"largest; {args.num_images} images through our way and {args.single_views} views through the other in a "
        "round. Results end in host memory as token records, which are not written."
    ]
    for name, found in found_cases(args):
        parts.append(f"## {name}\n\n{table(found)}")
        text = publish(args, "Tokenizing", "\n\n".join(parts), "torchvision", "timm")
        sys.stderr.write(f"{name}: measured\n")
    sys.stdout.write(text)
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(
        "tokenizing",
        __doc__,
        gpu="the recipes' own sizes; without it small ones for a CPU",
        overrides="settings of both recipes",
    )
    images = "folder of images at any depth, or of image shards (default: the images that the tests find)"
    parser.add_argument("--images", type=Path, metavar="FOLDER", help=images)
    ours = "images through our way in a round (default: 4; with --gpu 64)"
    parser.add_argument("--num_images", type=at_least(1), help=ours)
    single = "views through the other way in a round (default: 8; with --gpu 64)"
    parser.add_argument("--single_views", type=at_least(1), help=single)
    both = "compile the network alone in the other precision as well, which takes as long again"
    parser.add_argument("--both_compiled", action="store_true", help=both)
    parser.add_argument("--rounds", type=at_least(1), default=3, help="(default: %(default)s)")
    args = parse(parser, argv, renamed={"--pictures": "--num_images"})
    args.num_images = args.num_images or (64 if args.gpu else 4)
    args.single_views = args.single_views or (64 if args.gpu else 8)
    return args


def found_cases(args: argparse.Namespace) -> Iterator[tuple[str, Found]]:
    """Each tokenizer as it is measured."""
    with tempfile.TemporaryDirectory(prefix="peco_tokenizing_") as name:
        folder = Path(name)
        images = ImageSet(pack(chosen_files(args.images, 64, folder / "files"), folder / "images"))
        for case in CASES:
            yield case.name, measure(case, args, images)


def measure(case: Case, args: argparse.Namespace, images: ImageSet) -> Found:
    settings = [*([] if args.gpu else case.small.split()), *args.overrides]
    own = [text for text in settings if text.startswith("tokenizer.")]
    recipe = load_recipe(PretrainRecipe, case.recipe, [text for text in settings if text not in own]).recipe
    views, device = recipe.views, this_device()
    own = [case.untrained, f"views.tokenizer_px={views.tokenizer_px}", *own]
    network = load_recipe(TokenizerRecipe, case.tokenizer, own).recipe.tokenizer
    torch.manual_seed(0)
    eager = build_tokenizer(network).eval().to(device)
    # each keeps the memory order of its own weights
    compiled = copy.deepcopy(eager) if compiles(recipe.run) else None
    together = max(1, recipe.run.micro_batch // views.count)
    codes = codes_function(compiled or eager, recipe, together * views.count)
    a_pass = even_pass_size(together * views.count, recipe.run.micro_batch)
    networks = {f"network alone, {precision}, eager": (eager, precision, False) for precision in ("fp32", "bf16")}
    if compiled:
        precisions = ("fp32", "bf16") if args.both_compiled else (views.tokenizer_precision,)
        networks |= {f"network alone, {precision}, compiled": (compiled, precision, True) for precision in precisions}
    work = {
        OURS: lambda: our_way(codes, images, recipe, together, args.num_images),
        ONE_BY_ONE: lambda: one_by_one(eager, images, views, args.single_views),
        **parts(networks, recipe, a_pass),
        DECODE_ONCE: lambda: decoding(images, views, again=False),
        DECODE_EACH: lambda: decoding(images, views, again=True),
    }
    found = Found(
        f"{sum(p.numel() for p in eager.parameters()) / 1e6:.1f} M parameters with decoder, "
        f"{network.num_codes} codes of {network.code_dim}; {views.count} views of {views.tokenizer_px} px an image; "
        f"ours: {views.tokenizer_precision}, {'compiled' if compiled else 'not compiled'}, {a_pass} "
        f"views a pass, {recipe.data.num_workers} loader processes.",
        views.count,
    )
    begun = time.perf_counter()
    work[OURS]()
    found.start_s = time.perf_counter() - begun
    # the round that is not counted compiles and allocates
    found.rates = measured(work, args.rounds)
    return found


def our_way(codes: Callable, images: ImageSet, recipe: PretrainRecipe, together: int, number: int) -> float:
    """Views a second from image shards to records.

    The loader processes' start, and the batches they make ahead, are left out.

    Args:
        together: images a batch.  number: of images that are counted, filled up to whole batches.
    """
    views = recipe.views
    ahead, counted = 1 + 2 * recipe.data.num_workers, -(-number // together)
    # when a batch's records come, the next one is under way: the last one is not asked for
    samples = np.arange((ahead + counted + 1) * together) % images.num_samples
    batches = [samples[first : first + together] for first in range(0, len(samples), together)]
    made = record_batches(view_batches(images, batches, recipe, this_device()), codes)
    for _ in range(ahead):
        next(made)
    begun = time.perf_counter()
    for _ in range(counted):
        next(made)
    seconds = time.perf_counter() - begun
    made.close()
    return counted * together * views.count / seconds


def one_by_one(tokenizer: torch.nn.Module, images: ImageSet, views: ViewSettings, number: int) -> float:
    """Views a second, as a plain loop makes their codes."""
    begun = time.perf_counter()
    for count in range(number):
        sample, view = count // views.count % images.num_samples, count % views.count
        crop, row = cut_view(images.decode(sample)[1], views, sample, view)
        crop = jitter(crop[None].to(this_device()), torch.from_numpy(row)[None])
        tokenizer.tokenize(to_tokenizer(crop)).cpu()
    return number / (time.perf_counter() - begun)


def decoding(images: ImageSet, views: ViewSettings, *, again: bool) -> float:
    """Views a second out of image shards, in this thread alone.

    Args:
        again: whether the image is decoded for each of its views.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    for number in range(DECODED_IMAGES):
        sample = number % images.num_samples
        for view in range(views.count):
            if again or not view:
                image = images.decode(sample)[1]
            cut_view(image, views, sample, view)
    seconds = time.perf_counter() - begun
    torch.set_num_threads(threads)
    return DECODED_IMAGES * views.count / seconds


def cut_view(image: torch.Tensor, views: ViewSettings, sample: int, view: int) -> tuple[torch.Tensor, np.ndarray]:
    """A recorded view as the loader cuts it, and its row."""
    row = draw_view(views, *image.shape[1:], sample=sample, view=view)
    return cut(image, row, views.tokenizer_px, views.tokenizer_interpolation), row


def parts(networks: dict[str, tuple], recipe: PretrainRecipe, a_pass: int) -> dict[str, Callable[[], float]]:
    """The device's work by name: functions that do it once over a pass, or a few, and give views a second.

    Args:
        networks: name -> tokenizer, precision, whether it is compiled.
    """
    views, device = recipe.views, this_device()
    images_11 = torch.rand(a_pass, 3, views.tokenizer_px, views.tokenizer_px, device=device) * 2 - 1
    tokenizer = next(iter(networks.values()))[0]
    with torch.no_grad():
        outputs = tokenizer.trunk(images_11)

    def timed(go: Callable[[], object]) -> float:
        repeats = 8 if device.type == "cuda" else 1
        synchronize()
        begun = time.perf_counter()
        for _ in range(repeats):
            go()
        synchronize()
        return repeats * a_pass / (time.perf_counter() - begun)

    @torch.no_grad()
    def search() -> None:
        if views.topk:
            tokenizer.choose_soft(outputs, views.topk, temperature=views.topk_temperature)
        else:
            tokenizer.choose(outputs)

    work = {}
    for name, (network, precision, compiled) in networks.items():
        passes = TokenPasses(network, precision=precision, images=a_pass, compiled=compiled)
        work[name] = lambda passes=passes: timed(lambda: list(passes.outputs(images_11)))
    return work | {SEARCH: lambda: timed(search)}


def table(found: Found) -> str:
    rows = []
    networks = [name for name in found.rates if name.startswith("network")]
    for first, *others in ([ONE_BY_ONE, OURS], networks, [SEARCH], [DECODE_EACH, DECODE_ONCE]):
        for name in (first, *others):
            rate, ratio = found.median(name), "" if name == first else found.ratio(name, first)
            rows.append((name, f"{rate:.4g}", f"{rate / found.views_per_image:.3g}", ratio))
    about = f"{found.about} The first batches took {found.start_s:.0f} s, with what was compiled."
    return f"{about}\n\n{markdown_table(('', 'views/s', 'images/s', 'to the first of its kind'), rows)}"


if __name__ == "__main__":
    run(main)
