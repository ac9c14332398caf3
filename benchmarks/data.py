"""How many images/s does one core make ready for masked pre-training, and how many cores feed a GPU? Our
loader against the BEiT transform, on the same JPEGs.

    python -m benchmarks.data [--images FOLDER] [--gpu] [--record FILE.md] [key.sub=value ...]

Ours: what a loader process does for an image of the recipe: tar read, decode, one crop-resize to uint8, mask, token
record; with an online tokenizer a second crop, BEiT's, instead of the record. Jitter and normalisation run in batches
on the device and are timed apart. The reference: the two-view transform of BEiT (arXiv 2106.08254) on
Pillow and torchvision: decode, colour jitter of the whole image, flip, one box resized to 224 (bicubic) and 112
(Lanczos), two tensors, normalisation, pixel map, mask.

Both read the same bytes from the same tars, which are packed for this run and lie in the page cache, in one process on
one thread; a chunk of images each by turns. Times are CPU seconds of this process, so they are per core, and other
programs weigh less. Images are taken as they are, and packed with --short_side 320.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop, to_tensor

from benchmarks.record import at_least, benchmark_parser, markdown_table, parse, publish
from benchmarks.sets import DRAWN, chosen_files, pack, write_tokens
from benchmarks.step_time import mask_of, synchronize, training_flops
from benchmarks.turns import by_turns, measured, ratios, spread
from peco_ds.command_line import run
from peco_ds.config import PretrainRecipe
from peco_ds.data.decode import decode_rgb
from peco_ds.data.device_feed import SideStream, prepared_batches
from peco_ds.data.image_set import ImageSet
from peco_ds.data.loaders import MaskedMaker, backbone_crop
from peco_ds.data.order import SampleOrder
from peco_ds.data.views import cut, jitter, to_backbone
from peco_ds.planner.hardware import HARDWARE
from peco_ds.recipe_files import load_recipe
from peco_ds.schema import IMAGE_EXTENSIONS

H100_FLOPS = HARDWARE["h100"].peak_flops["bf16"]  # also of an H200
STEP_PRODUCTS, STEP_ROUNDS = 100, 3  # of the made-up step
SHARES = (0.4, 0.5)  # of it that a training step may reach
MODELS = {"B/16": "peco_vitb16", "L/16": "peco_vitl16", "H/14": "peco_vith14"}
SHORT_SIDE_PX = 320
STORED, ONLINE, BEIT = "ours, stored tokens", "ours, online tokens (two crops)", "BEiT transform"
TOKENIZER_LOOK = dict(tokenizer_px=112, tokenizer_interpolation="lanczos")  # of BEiT's second crop


@dataclass(frozen=True)
class Sizes:
    """Of a run."""

    images: int  # packed
    rounds: int
    chunk: int  # images of a way in a round
    batch: int  # images, on the device
    batches: int  # that are timed


CPU_SIZES = Sizes(images=400, rounds=8, chunk=50, batch=32, batches=5)
GPU_SIZES = Sizes(images=240, rounds=6, chunk=40, batch=256, batches=20)


@dataclass
class Timed:
    """CPU seconds an image of each way, an entry a round."""

    images: int
    mean_pixels: float
    mean_bytes: float
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, way: str) -> float:
        return statistics.median(self.seconds[way])

    def rate(self, way: str) -> float:
        return 1 / self.median(way)

    def ratios(self, way: str, reference: str) -> list[float]:
        """How many times as fast as the reference, round by round."""
        return ratios(self.seconds[reference], self.seconds[way])


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(
        "data", __doc__, gpu="the device's share on the GPU, in larger batches", overrides="settings of the recipe"
    )
    parser.add_argument("--recipe", default="peco_vitb16", help="views, mask and image size (default: %(default)s)")
    images = "folder of images at any depth, or of image shards (default: the images that the tests find)"
    parser.add_argument("--images", type=Path, metavar="FOLDER", help=images)
    for option, default, about in (
        ("num_images", "images", "taken from --images, evenly spread"),
        ("rounds", "rounds", "of each way that are counted"),
        ("chunk", "chunk", "images of a way in a round"),
    ):
        defaults = f"default: {getattr(CPU_SIZES, default)}, with --gpu {getattr(GPU_SIZES, default)}"
        parser.add_argument(f"--{option}", dest=f"size_{default}", type=at_least(1), help=f"{about} ({defaults})")
    args = parse(parser, argv, renamed={"--pictures": "--num_images"})
    given = {name: getattr(args, f"size_{name}") for name in ("images", "rounds", "chunk")}
    sizes = replace(
        GPU_SIZES if args.gpu else CPU_SIZES, **{name: value for name, value in given.items() if value is not None}
    )
    body = measure(args, sizes)
    sys.stdout.write(publish(args, "The data path: images/s of one core", body, "torchvision", "pillow"))
    return 0


def measure(args: argparse.Namespace, sizes: Sizes) -> str:
    """All tables, as markdown."""
    recipe = load_recipe(PretrainRecipe, args.recipe, args.overrides).recipe
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if args.gpu else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="peco_data_") as name:
        folder = Path(name)
        files = chosen_files(args.images, sizes.images, folder / "files")
        whole, short = (
            Bench(recipe, pack(files, folder / f"{px}", px), folder / f"{px}_tokens") for px in (0, SHORT_SIDE_PX)
        )
        timed = {
            "as_they_are": whole.rounds(whole.ways() | whole.parts(), sizes),
            "short_side": short.rounds(short.ways(), sizes),
        }
        drawn = any(path.name.startswith(DRAWN) for path in files.iterdir())
        on_device, steps = whole.device_seconds(sizes, device), whole.step_seconds(sizes, device)
    about = f"One thread; images from {args.images or 'those that the tests find'}."
    if drawn:
        about += " They were drawn, as no real ones were found: give --images."
    tables = [
        rate_table(timed),
        part_table(timed["as_they_are"]),
        device_table(timed["as_they_are"], on_device, sizes, device),
        step_table(steps, sizes),
        core_table(timed),
    ]
    return "\n\n".join([about, *tables])


class Bench:
    """One packed set and everything that is timed on it."""

    def __init__(self, recipe: PretrainRecipe, folder: Path, tokens: Path) -> None:
        self.recipe, self.image_set = recipe, ImageSet(folder)
        self.tokens = write_tokens(self.image_set, recipe, tokens)
        sizes, seed = self.image_set.shards.shard_sizes, recipe.run.seed
        order = SampleOrder(sizes, seed, recipe.data.shuffle_window_shards)
        self.sample_at, self.look = order.sample_at, backbone_crop(recipe.model.image_px)
        make = dict(
            images=self.image_set,
            order=order,
            mask=recipe.mask,
            image_px=recipe.model.image_px,
            grid=recipe.model.grid,
            seed=seed,
        )
        self.stored = MaskedMaker(tokens=self.tokens, views=recipe.views, **make)
        self.online = MaskedMaker(tokens=None, views=replace(recipe.views, **TOKENIZER_LOOK), **make)
        # also brings the tars into the page cache
        self.files = [self._read(sample) for sample in range(self.image_set.num_samples)]
        self.images = [decode_rgb(data) for data in self.files]
        self.rows = [self.tokens.read(sample, view=0).views[0] for sample in range(len(self.files))]

    def ways(self) -> dict[str, Callable]:
        """Whole paths; each takes an array of positions."""
        reference = Reference(self.recipe)
        beit = self._each(lambda sample: reference(self._read(sample), sample))
        return {STORED: self.stored, ONLINE: self.online, BEIT: beit}

    def parts(self) -> dict[str, Callable]:
        """Pieces of our path and of the reference."""
        mask, grid, seed = self.recipe.mask, self.recipe.model.grid, self.recipe.run.seed
        reference = Reference(self.recipe)
        opened = [reference.decode(data) for data in self.files]
        crops = [reference.crops(image) for image in opened]
        of_samples = {
            "tar read": self._read,
            "decode": lambda sample: decode_rgb(self.files[sample]),
            "box, resize, flip": lambda sample: cut(self.images[sample], self.rows[sample], *self.look),
            "mask": lambda sample: mask_of(mask, grid, sample, seed),
            "token record": lambda sample: self.tokens.read(sample, view=0),
            "BEiT: decode (Pillow)": lambda sample: reference.decode(self.files[sample]),
            "BEiT: jitter": lambda sample: reference.jitter(opened[sample]),
            "BEiT: flip, box, two resizes": lambda sample: reference.crops(opened[sample]),
            "BEiT: tensors, normalisation": lambda sample: reference.tensors(*crops[sample]),
        }
        return {name: self._each(function) for name, function in of_samples.items()}

    def _each(self, function: Callable[[int], object]) -> Callable:
        return lambda positions: [function(sample) for sample in map(self.sample_at, positions.tolist())]

    def _read(self, sample: int) -> bytes:
        _, members = self.image_set.shards.read(sample, IMAGE_EXTENSIONS)
        return next(iter(members.values()))

    def rounds(self, ways: dict[str, Callable], sizes: Sizes) -> Timed:
        """Every way takes the same chunk by turns; one round before the first is not counted."""
        pixels = statistics.fmean(image.shape[1] * image.shape[2] for image in self.images)
        mean_bytes = statistics.fmean(map(len, self.files))
        timed = Timed(len(self.files), pixels, mean_bytes, {name: [] for name in ways})
        for counted, name in by_turns(ways, sizes.rounds):
            positions = np.arange(sizes.chunk) + len(timed.seconds[name]) * sizes.chunk
            begun = time.process_time()
            ways[name](positions)
            if counted:
                timed.seconds[name].append((time.process_time() - begun) / sizes.chunk)
        return timed

    def _pinned_batch(self, sizes: Sizes, device: torch.device):
        raw = self.stored(np.arange(sizes.batch))
        return raw.pin_memory() if device.type == "cuda" else raw

    def device_seconds(self, sizes: Sizes, device: torch.device) -> dict[str, list[float]]:
        """Seconds an image of the device's share, an entry a batch: wall time on a GPU, CPU time on a CPU."""
        raw = self._pinned_batch(sizes, device)
        images = raw.cuts[self.look]
        there = images.to(device)
        jittered = jitter(there, raw.rows)

        def an_image(function: Callable) -> Callable[[], float]:
            return lambda: seconds_of(function, device) / sizes.batch

        work = {
            "copy to the device": an_image(lambda: images.to(device, non_blocking=True)),
            "jitter": an_image(lambda: jitter(there, raw.rows)),
            "normalisation": an_image(lambda: to_backbone(jittered)),
        }
        return measured(work, sizes.batches)

    def step_seconds(self, sizes: Sizes, device: torch.device) -> dict[str, list[float]]:
        """Seconds of a made-up step (matrix products) without batches, with batches that come in their turn, and on a
        GPU with batches one ahead; wall time of a stretch, an entry a round.
        """
        on_gpu = device.type == "cuda"
        raw = self._pinned_batch(sizes, device)
        matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) if on_gpu else torch.randn(256, 256)

        def prepare(raw):
            return to_backbone(jitter(raw.cuts[self.look].to(device, non_blocking=True), raw.rows))

        def fed(lane):
            return prepared_batches((raw for _ in range(sizes.batches)), prepare, lambda images, _: images, lane=lane)

        def stretch(batches: Iterable) -> float:
            begun = time.perf_counter()
            for _ in batches:
                for _ in range(STEP_PRODUCTS):
                    matrix @ matrix
                # as an optimiser step that looks at the norm of the gradients: the host is not ahead
                synchronize()
            return (time.perf_counter() - begun) / sizes.batches

        ways = {
            "the step alone": lambda: stretch(range(sizes.batches)),
            "batches in their turn": lambda: stretch(fed(None)),
        }
        if on_gpu:
            ways["batches one ahead"] = lambda: stretch(fed(SideStream(device)))
        return measured(ways, STEP_ROUNDS)


def seconds_of(function: Callable, device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.process_time()
        function()
        return time.process_time() - begun
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class Reference:
    """BEiT's transform as its paper and its released settings describe it, on Pillow and torchvision: two tensors and a
    mask of one image.

    Its mask is drawn by our generator, so that the two differ in images alone.
    """

    def __init__(self, recipe: PretrainRecipe) -> None:
        self._recipe, self._views = recipe, recipe.views
        self.jitter = transforms.ColorJitter(*[recipe.views.color_jitter] * 3)
        self._normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def __call__(self, data: bytes, sample: int) -> tuple:
        recipe = self._recipe
        mask = mask_of(recipe.mask, recipe.model.grid, sample, recipe.run.seed)
        return *self.tensors(*self.crops(self.jitter(self.decode(data)))), mask

    def decode(self, data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    def crops(self, image: Image.Image) -> tuple[Image.Image, Image.Image]:
        if random.random() < self._views.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        box = transforms.RandomResizedCrop.get_params(image, self._views.scale, self._views.ratio)
        size = self._recipe.model.image_px
        backbone = resized_crop(image, *box, (size, size), InterpolationMode.BICUBIC)
        return backbone, resized_crop(image, *box, (112, 112), InterpolationMode.LANCZOS)

    def tensors(self, backbone: Image.Image, tokenizer: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        return self._normalize(to_tensor(backbone)), 0.8 * to_tensor(tokenizer) + 0.1


# ---------------------------------------------------------------------------------------------- tables


def rate_table(timed: dict[str, Timed]) -> str:
    """Images a second of a core, and how many times the reference's."""
    rows = []
    for name, result in timed.items():
        what = {"as_they_are": "as they are", "short_side": f"packed with --short_side {SHORT_SIDE_PX}"}[name]
        what += f": {result.images} images of {result.mean_pixels / 1e3:.0f} thousand pixels and "
        what += f"{result.mean_bytes / 1e3:.0f} kB in the mean"
        rows += [
            (what, way, f"{result.rate(way):.0f}", spread(result.ratios(way, BEIT))) for way in (STORED, ONLINE, BEIT)
        ]
    heads = ("images", "way", "images/s and core", "times the BEiT transform (smallest to largest round)")
    return markdown_table(heads, rows)


def part_table(timed: Timed) -> str:
    """Where the time goes, in microseconds an image."""
    parts = {name: timed.median(name) for name in timed.seconds if name not in (STORED, ONLINE, BEIT)}
    ours = {name: seconds for name, seconds in parts.items() if not name.startswith("BEiT: ")}
    theirs = {name: seconds for name, seconds in parts.items() if name not in ours}
    seconds = {
        **ours,
        "the rest: order, view, batch, colder caches": timed.median(STORED) - sum(ours.values()),
        f"**{STORED}**": timed.median(STORED),
        **theirs,
        f"**{BEIT}**, with its read and mask": timed.median(BEIT),
    }
    heads = ("part, images as they are", "microseconds an image")
    return markdown_table(heads, [(name, f"{value * 1e6:.0f}") for name, value in seconds.items()])


def device_table(timed: Timed, seconds: dict[str, list[float]], sizes: Sizes, device: torch.device) -> str:
    """The device's share in batches; on a CPU also what is left of the ratio where the same core has to do it."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    clock = "wall" if device.type == "cuda" else "CPU"
    heads = (f"on the device ({device.type}), batches of {sizes.batch}", f"{clock} microseconds an image")
    text = markdown_table(heads, [(name, f"{value * 1e6:.1f}") for name, value in medians.items()])
    whole = sum(medians.values())
    text += f"\n\nTogether {1 / whole:.0f} images/s."
    if device.type != "cuda":
        both = timed.median(STORED) + whole
        text += f" Where the core that loads has to do this too: {1 / both:.0f} images/s, "
        text += f"{timed.median(BEIT) / both:.2f} times the BEiT transform."
    return text


def step_table(seconds: dict[str, list[float]], sizes: Sizes) -> str:
    """What copy and preparation of a batch cost the step."""
    heads = (f"a made-up step of {STEP_PRODUCTS} matrix products, batches of {sizes.batch}", "milliseconds")
    rows = [(name, f"{statistics.median(values) * 1e3:.2f}") for name, values in seconds.items()]
    return markdown_table(heads, rows)


def core_table(timed: dict[str, Timed]) -> str:
    """Cores that feed one GPU: images/s of a step, at SHARES of an H100's peak, over those of a core."""
    heads = (
        "ViT at 224, one H100 or H200",
        "images/s",
        "cores, as they are",
        f"cores, --short_side {SHORT_SIDE_PX}",
        "cores, BEiT transform as they are",
    )
    whole, short = timed["as_they_are"], timed["short_side"]
    a_core = (whole.rate(STORED), short.rate(STORED), whole.rate(BEIT))
    rows = []
    for name, recipe in MODELS.items():
        flops = training_flops(load_recipe(PretrainRecipe, recipe, []).recipe)
        for share in SHARES:
            rate = share * H100_FLOPS / flops
            what = f"{name} at {share:.0%} of {H100_FLOPS / 1e12:.0f} TFLOP/s"
            rows.append((what, f"{rate:.0f}", *(f"{rate / own:.1f}" for own in a_core)))
    return markdown_table(heads, rows)


if __name__ == "__main__":
    run(main)
