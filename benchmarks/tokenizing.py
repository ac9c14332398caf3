"""How fast do images become tokens? The way tokenize_shards.py takes, against one view at a time.

And the parts of the work, each alone.

    python benchmarks/tokenizing.py [--gpu] [--images DIR] [--rounds 3] [--both_compiled] [--record FILE.md]
    [key.sub=value ...]

Ours: every image decoded once, its K views cut, many views a pass, the network in views.tokenizer_precision and
compiled as run.compile says, results fetched
while the next batch runs. Against it, as a plain loop would do it: for each view the image is decoded again and the
network sees that view alone, eager, in
float32. Both end with codes in host memory and start from JPEG bytes in image shards. The parts: the network alone
(eager or compiled, fp32 or bf16), the search for the code alone, decoding and cutting alone on one core. All take turns
in every round; what is reported are medians over rounds and, of the two ways, their ratio.

Tokenizers have random weights, which does not matter to the time. On a CPU they are small ones; --gpu takes the
recipes' own sizes, views and batches. Overrides are of the pre-training recipe (views, run, data); those of tokenizer.
are of the tokenizer's. The record is written anew after every tokenizer.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from record import at_least, require_gpu

from peco_ds.command_line import Parser, run


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
        ratios = sorted(ours / theirs for ours, theirs in zip(self.rates[name], self.rates[to]))
        return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


OURS, ONE_BY_ONE = "tokenize_shards.py's way", "one view at a time"
DECODE_ONCE, DECODE_EACH, SEARCH = (
    "decode once and cut K views, one core",
    "decode for each view and cut, one core",
    "search alone",
)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the recipes' own sizes; without it small ones for a CPU")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of images at any depth, or of image shards (default: the images that the tests find)",
    )
    parser.add_argument("--images", type=at_least(1), help="through our way in a round (default: 4; with --gpu 64)")
    parser.add_argument(
        "--single_views", type=at_least(1), help="through the other way in a round (default: 8; with --gpu 64)"
    )
    parser.add_argument(
        "--both_compiled",
        action="store_true",
        help="compile the network alone in the other precision as well, which takes as long again",
    )
    parser.add_argument("--rounds", type=at_least(1), default=3, help="default: %(default)s")
    parser.add_argument("--record", type=Path, help="also write the tables to this file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_args(argv)
    args.images, args.single_views = (
        args.images or (64 if args.gpu else 4),
        args.single_views or (64 if args.gpu else 8),
    )
    if args.gpu:
        require_gpu()
    tables = []
    with tempfile.TemporaryDirectory(prefix="peco_tokenizing_") as folder:
        images = pack_images(args.images, Path(folder))
        for case in CASES:
            tables.append(table(case, measure(case, args, images)))
            sys.stdout.write(f"{tables[-1]}\n\n")
            sys.stdout.flush()
            if args.record:
                record(args, tables)
    return 0


def record(args: argparse.Namespace, tables: list[str]) -> None:
    """Written anew after every table, so that a time limit loses none."""
    from record import write_record

    flags = [name for name, given in (("--gpu", args.gpu), ("--both_compiled", args.both_compiled)) if given]
    command = " ".join(
        [
            "python benchmarks/tokenizing.py",
            *flags,
            f"--images {args.images} --single_views {args.single_views} --rounds {args.rounds}",
            *map(shlex.quote, args.overrides),
        ]
    )
    about = (
        f"Random weights; ways and parts by turns; medians of {args.rounds} rounds, of ratios with "
        "smallest and largest. Results end in host memory as token records, which are not written."
    )
    write_record(args.record, "Tokenizing", command, "\n\n".join([about, *tables]), "torchvision", "timm")


def pack_images(images: Path | None, folder: Path) -> Path:
    """Image shards of some of the images, as they are."""
    from data import chosen_files, pack

    return pack(chosen_files(images, 64, folder / "files"), folder / "images", 0)


def measure(case: Case, args: argparse.Namespace, images: Path) -> Found:
    import torch

    from peco_ds.config import PretrainRecipe, TokenizerRecipe
    from peco_ds.data.image_set import ImageSet
    from peco_ds.models.token_passes import even_pass_size
    from peco_ds.models.tokenizers import build_tokenizer
    from peco_ds.recipe_files import load_recipe
    from peco_ds.runtime.engine import compiles
    from peco_ds.runtime.token_source import codes_function

    settings = [*([] if args.gpu else case.small.split()), *args.overrides]
    recipe = load_recipe(
        PretrainRecipe, case.recipe, [text for text in settings if not text.startswith("tokenizer.")]
    ).recipe
    network = load_recipe(
        TokenizerRecipe,
        case.tokenizer,
        [
            case.untrained,
            f"views.tokenizer_px={recipe.views.tokenizer_px}",
            *(text for text in settings if text.startswith("tokenizer.")),
        ],
    ).recipe.tokenizer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    eager = build_tokenizer(network).eval().to(device)
    # each keeps the memory order of its own weights
    compiled = copy.deepcopy(eager) if compiles(recipe.run) else None
    image_set, views = ImageSet(images), recipe.views
    together = max(1, recipe.run.micro_batch // views.count)
    codes, a_pass = (
        codes_function(compiled or eager, recipe, together * views.count),
        even_pass_size(together * views.count, recipe.run.micro_batch),
    )
    about = (
        f"{sum(p.numel() for p in eager.parameters()) / 1e6:.1f} M parameters with decoder, "
        f"{network.num_codes} codes of {network.code_dim}; {views.count} views of "
        f"{views.tokenizer_px} px a pixels; "
        f"ours: {views.tokenizer_precision}, {'compiled' if compiled else 'not compiled'}, {a_pass} "
        f"views a pass, {recipe.data.num_workers} loader processes."
    )
    networks = {f"network alone, {precision}, eager": (eager, precision, False) for precision in ("fp32", "bf16")}
    if compiled:
        precisions = ("fp32", "bf16") if args.both_compiled else (views.tokenizer_precision,)
        networks |= {f"network alone, {precision}, compiled": (compiled, precision, True) for precision in precisions}
    work = {
        OURS: lambda: our_way(codes, image_set, recipe, together, device, args.image_set),
        ONE_BY_ONE: lambda: one_by_one(eager, image_set, views, device, args.single_views),
        **parts(networks, recipe, a_pass, device),
        DECODE_ONCE: lambda: decoding(image_set, views, again=False),
        DECODE_EACH: lambda: decoding(image_set, views, again=True),
    }
    found = Found(about, views.count)
    for name, go in work.items():
        begun = time.perf_counter()
        go()  # compilation, first allocations
        if name == OURS:
            found.start_s = time.perf_counter() - begun
    for _ in range(args.rounds):
        for name, go in work.items():
            found.rates.setdefault(name, []).append(go())
    return found


def our_way(codes, images, recipe, together: int, device, number: int) -> float:
    """Views a second from image shards to records.

    The loader processes' start, and the batches they make ahead, are left out.

    Args:
        together: images a batch.  number: of images that are counted, filled up to whole batches.
    """
    import numpy as np

    from peco_ds.data.loaders import view_batches
    from peco_ds.runtime.token_records import record_batches

    views = recipe.views
    ahead, counted = 1 + 2 * recipe.data.num_workers, -(-number // together)
    # when a batch's records come, the next one is under way: the last one is not asked for
    samples = np.arange((ahead + counted + 1) * together) % images.num_samples
    cut = [samples[first : first + together] for first in range(0, len(samples), together)]
    made = record_batches(view_batches(images, cut, data=recipe.data, views=views, device=device), codes)
    for _ in range(ahead):
        next(made)
    begun = time.perf_counter()
    for _ in range(counted):
        next(made)
    seconds = time.perf_counter() - begun
    made.close()
    return counted * together * views.count / seconds


def one_by_one(tokenizer, images, views, device, number: int) -> float:
    """Views a second, as a plain loop makes their codes."""
    import torch

    from peco_ds.data.views import jitter, to_tokenizer

    rows = Rows(images, views)
    begun = time.perf_counter()
    for count in range(number):
        image = rows.decoded(count // views.count)
        row = rows.drawn(image, count // views.count, count % views.count)
        crop = jitter(rows.crop(image, row)[None].to(device), torch.from_numpy(row)[None])
        tokenizer.tokenize(to_tokenizer(crop)).cpu()
    return number / (time.perf_counter() - begun)


class Rows:
    """The steps of the loader, each by itself."""

    def __init__(self, images, views) -> None:
        self._images, self._views = images, views

    def decoded(self, number: int):
        return self._images.decode(number % self._images.num_samples)[1]

    def drawn(self, image, number: int, view: int):
        from peco_ds.data.loaders import draw_recorded_view

        return draw_recorded_view(image, self._views, number % self._images.num_samples, view)

    def crop(self, image, row):
        from peco_ds.data.views import cut

        return cut(image, row, self._views.tokenizer_px, self._views.tokenizer_interpolation)


def decoding(images, views, *, again: bool, number: int = 2) -> float:
    """Views a second out of image shards, in this thread alone."""
    import torch

    rows, threads = Rows(images, views), torch.get_num_threads()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    for place in range(number):
        image = rows.decoded(place)
        for view in range(views.count):
            image = rows.decoded(place) if again and view else image
            rows.crop(image, rows.drawn(image, place, view))
    seconds = time.perf_counter() - begun
    torch.set_num_threads(threads)
    return number * views.count / seconds


def parts(networks: dict[str, tuple], recipe, a_pass: int, device) -> dict[str, Callable[[], float]]:
    """The device's work by name: functions that do it once over a pass, or a few, and give views a second.

    Args:
        networks: name -> tokenizer, precision, whether it is compiled.
    """
    import torch

    from peco_ds.models.token_passes import TokenPasses

    views = recipe.views
    images_11 = torch.rand(a_pass, 3, views.tokenizer_px, views.tokenizer_px, device=device) * 2 - 1
    tokenizer = next(iter(networks.values()))[0]
    with torch.no_grad():
        outputs = tokenizer.trunk(images_11)

    def timed(go: Callable[[], object]) -> float:
        finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        repeats = 8 if device.type == "cuda" else 1
        finish()
        begun = time.perf_counter()
        for _ in range(repeats):
            go()
        finish()
        return repeats * a_pass / (time.perf_counter() - begun)

    def search() -> None:
        with torch.no_grad():
            tokenizer.choose_soft(
                outputs, views.topk, temperature=views.topk_temperature
            ) if views.topk else tokenizer.choose(outputs)

    work = {}
    for name, (network, precision, compiled) in networks.items():
        passes = TokenPasses(network, precision=precision, images=a_pass, compiled=compiled)
        work[name] = lambda passes=passes: timed(lambda: list(passes.outputs(images_11)))
    return work | {SEARCH: lambda: timed(search)}


def table(case: Case, found: Found) -> str:
    lines = [
        f"## {case.name}",
        "",
        f"{found.about} The first batches took {found.start_s:.0f} s, with what was compiled.",
        "",
        "| | views/s | images/s | to the first of its kind |",
        "|---|---|---|---|",
    ]
    networks = [name for name in found.rates if name.startswith("network")]
    for group in ([ONE_BY_ONE, OURS], networks, [SEARCH], [DECODE_EACH, DECODE_ONCE]):
        for name in group:
            rate = found.median(name)
            lines.append(
                f"| {name} | {rate:.4g} | {rate / found.views_per_image:.3g} | "
                f"{found.ratio(name, group[0]) if name != group[0] else ''} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
