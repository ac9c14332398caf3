"""How many images/s does one core make ready for masked pre-training, and how many cores feed a GPU? Our
loader against the BEiT transform, on the same JPEGs.

    python benchmarks/data.py [--images FOLDER] [--gpu] [--record FILE.md] [key.sub=value ...]

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
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from record import at_least, require_gpu

from peco_ds.command_line import Parser, run
from peco_ds.planner.hardware import HARDWARE

H100_FLOPS = HARDWARE["h100"].peak_flops["bf16"]  # also of an H200
STEP_PRODUCTS, STEP_ROUNDS = 100, 3  # of the made-up step
SHARES = (0.4, 0.5)  # of it that a training step may reach
MODELS = {"B/16": "peco_vitb16", "L/16": "peco_vitl16", "H/14": "peco_vith14"}
SHORT_SIDE_PX = 320
# how the names of images begin that are no real ones
DRAWN = "drawn_"
STORED, ONLINE, BEIT = "ours, stored tokens", "ours, online tokens (two crops)", "BEiT transform"
TOKENIZER_LOOK = dict(tokenizer_px=112, tokenizer_interpolation="lanczos")  # of BEiT's second crop


@dataclass(frozen=True)
class Sizes:
    """Of a run: images packed.

    Rounds of so many images a chunk; images of a batch on the device, and batches of it that are timed.
    """

    images: int
    rounds: int
    chunk: int
    batch: int
    batches: int


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
        return [theirs / ours for ours, theirs in zip(self.seconds[way], self.seconds[reference])]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="peco_vitb16", help="views, mask and image size (default: %(default)s)")
    parser.add_argument(
        "--images",
        type=Path,
        help="folder of images at any depth, or of image shards (default: the images that the tests find)",
    )
    parser.add_argument("--gpu", action="store_true", help="the device's share on the GPU, in larger batches")
    parser.add_argument(
        "--images",
        type=at_least(1),
        help=f"taken from --images, evenly spread (default: {CPU_SIZES.images}, with --gpu {GPU_SIZES.images})",
    )
    parser.add_argument(
        "--rounds",
        type=at_least(1),
        help=f"of each way that are counted (default: {CPU_SIZES.rounds}, with --gpu {GPU_SIZES.rounds})",
    )
    parser.add_argument(
        "--chunk",
        type=at_least(1),
        help=f"images of a way in a round (default: {CPU_SIZES.chunk}, with --gpu {GPU_SIZES.chunk})",
    )
    parser.add_argument("--record", type=Path, help="also write the tables to this file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings of the recipe")
    args = parser.parse_intermixed_args(argv)
    sizes = GPU_SIZES if args.gpu else CPU_SIZES
    sizes = replace(
        sizes, **{name: getattr(args, name) for name in ("images", "rounds", "chunk") if getattr(args, name)}
    )
    body = measure(args, sizes)
    title = "The data path: images/s of one core"
    if args.record:
        from record import write_record

        words = sys.argv[1:] if argv is None else argv
        body = write_record(
            args.record,
            title,
            " ".join(["python benchmarks/data.py", *map(shlex.quote, words)]),
            body,
            "torchvision",
            "pillow",
        )
    sys.stdout.write(body + "\n")
    return 0


def measure(args: argparse.Namespace, sizes: Sizes) -> str:
    """All tables, as markdown."""
    import torch

    from peco_ds.config import PretrainRecipe
    from peco_ds.recipe_files import load_recipe

    if args.gpu:
        require_gpu()
    recipe = load_recipe(PretrainRecipe, args.recipe, args.overrides).recipe
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if args.gpu else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="peco_data_") as folder:
        files = chosen_files(args.images, sizes.images, Path(folder) / "files")
        sets = {
            name: Bench(recipe, pack(files, Path(folder) / name, short_side), Path(folder) / f"{name}_tokens")
            for name, short_side in (("as_they_are", 0), ("short_side", SHORT_SIDE_PX))
        }
        as_they_are = sets["as_they_are"]
        timed = {
            "as_they_are": as_they_are.rounds(as_they_are.ways() | as_they_are.parts(), sizes),
            "short_side": sets["short_side"].rounds(sets["short_side"].ways(), sizes),
        }
        drawn = (
            " They were drawn, as no real ones were found: give --images."
            if any(path.name.startswith(DRAWN) for path in files.iterdir())
            else ""
        )
        on_device, steps = as_they_are.device_seconds(sizes, device), as_they_are.step_seconds(sizes, device)
    whole = timed["as_they_are"]
    return "\n\n".join(
        [
            f"One thread; images from {args.images or 'those that the tests find'}.{drawn}",
            rate_table(timed),
            part_table(whole),
            device_table(whole, on_device, sizes, device),
            step_table(steps, sizes),
            core_table(timed),
        ]
    )


# --------------------------------------------------------------------------------- images and tokens


def chosen_files(images: Path | None, count: int, folder: Path) -> Path:
    """A folder with at most `count` of the images, evenly spread, whatever they came in."""
    from peco_ds.errors import UserError
    from peco_ds.schema import IMAGE_EXTENSIONS, MANIFEST_NAME

    folder.mkdir()
    if images is not None and (images / MANIFEST_NAME).is_file():
        from peco_ds.data.image_set import ImageSet

        shards = ImageSet(images).shards
        for number in spread(shards.num_samples, count):
            _, members = shards.read(number, IMAGE_EXTENSIONS)
            extension, data = next(iter(members.items()))
            (folder / f"{number:08d}.{extension}").write_bytes(data)
        return folder
    if images is None:
        paths = images_of_the_tests()
        if not paths:
            draw_images(folder, count)
            return folder
    else:
        paths = sorted(path for path in images.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
    if not paths:
        raise UserError(f"--images {images}: no image and no image shard in it; name a folder that holds some")
    for number in spread(len(paths), count):
        (folder / f"{number:08d}{paths[number].suffix}").symlink_to(paths[number].resolve())
    return folder


def images_of_the_tests() -> list[Path]:
    """Real ones that the tests find; none where neither their packs nor the packages they take some from are there."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    try:
        from conftest import find_real_data

        return find_real_data().imagenet
    except ImportError:
        return []


def draw_images(folder: Path, count: int) -> None:
    """JPEGs of ImageNet's usual size: smooth colours under noise."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for number in range(count):
        smooth = Image.fromarray(draw.integers(256, size=(12, 16, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(smooth).astype(int) + draw.integers(-12, 13, size=(375, 500, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{DRAWN}{number:08d}.jpg", quality=92)


def spread(total: int, count: int) -> list[int]:
    """At most `count` of the numbers below `total`, evenly spread."""
    count = min(total, count)
    return [number * total // count for number in range(count)]


def pack(files: Path, out: Path, short_side: int) -> Path:
    command = [
        sys.executable,
        HERE.parent / "peco_ds" / "pack_images.py",
        "--images",
        files,
        "--out",
        out,
        "--short_side",
        short_side,
        "--samples_per_shard",
        500,
        "--workers",
        1,
    ]
    subprocess.run(
        list(map(str, command)),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return out


def write_tokens(images, recipe, folder: Path):
    """A token set of drawn codes: values do not matter to the time."""
    import numpy as np

    from peco_ds.data.loaders import draw_recorded_view
    from peco_ds.data.token_parts import TokenParts
    from peco_ds.data.token_shards import TokenRecord, TokenSet
    from peco_ds.schema import ViewRecipe

    views, grid, codes = recipe.views, recipe.model.grid, recipe.objective.num_codes
    drawn = np.random.default_rng(0)
    parts = TokenParts(
        folder,
        images.manifest,
        tokenizer_fingerprint="0" * 64,
        num_codes=codes,
        grid=grid,
        num_views=views.count,
        topk=views.topk,
        topk_temperature=views.topk_temperature,
        views=ViewRecipe(**{name: getattr(views, name) for name in ViewRecipe.__dataclass_fields__}),
    )

    def record(sample: int) -> TokenRecord:
        key, image = images.decode(sample)
        rows = np.stack([draw_recorded_view(image, views, sample, view) for view in range(views.count)])
        shape, soft = (views.count, grid * grid), ()
        # neighbouring codes: no code twice for one patch
        if views.topk:
            first = drawn.integers(codes - views.topk, size=(*shape, 1))
            soft = (
                (first + np.arange(views.topk)).astype(np.uint16),
                np.full((*shape, views.topk), 1 / views.topk, np.float16),
            )
        return TokenRecord(key, drawn.integers(codes, size=shape).astype(np.uint16), rows, *soft)

    ends = np.cumsum(images.shards.shard_sizes).tolist()
    for number, (start, end) in enumerate(zip([0, *ends], ends)):
        parts.write(number, map(record, range(start, end)))
    parts.finish()
    return TokenSet(folder, images.manifest, num_codes=codes, grid=grid, views=views)


# --------------------------------------------------------------------------------------- what is timed


class Bench:
    """One packed set and everything that is timed on it.

    A way takes sample numbers and works through their image_set.
    """

    def __init__(self, recipe, images: Path, tokens: Path) -> None:
        from peco_ds.data.decode import decode_rgb
        from peco_ds.data.image_set import ImageSet
        from peco_ds.data.loaders import MaskedMaker
        from peco_ds.data.order import SampleOrder
        from peco_ds.schema import IMAGE_EXTENSIONS

        self.recipe, self.image_set = recipe, ImageSet(images)
        self.tokens = write_tokens(self.image_set, recipe, tokens)
        sizes = self.image_set.shards.shard_sizes
        order = SampleOrder(sizes, recipe.run.seed, recipe.data.shuffle_window_shards)
        make = dict(
            image_set=self.image_set,
            order=order,
            views=recipe.views,
            mask=recipe.mask,
            image_px=recipe.model.image_px,
            grid=recipe.model.grid,
            seed=recipe.run.seed,
        )
        self.stored, self.online = (
            MaskedMaker(tokens=self.tokens, **make),
            MaskedMaker(tokens=None, **{**make, "views": replace(recipe.views, **TOKENIZER_LOOK)}),
        )
        self.sample_at = order.sample_at
        # also brings the tars into the page cache
        self.files = [
            next(iter(self.image_set.shards.read(sample, IMAGE_EXTENSIONS)[1].values()))
            for sample in range(self.image_set.num_samples)
        ]
        self.images = [decode_rgb(data) for data in self.files]
        self.rows = [self.tokens.read(sample, view=0).views[0] for sample in range(len(self.files))]

    def ways(self) -> dict[str, Callable]:
        """Whole paths; each takes an array of positions."""
        reference = Reference(self.recipe)
        return {
            STORED: self.stored,
            ONLINE: self.online,
            BEIT: lambda positions: [
                reference(self._read(sample), sample) for sample in map(self.sample_at, positions.tolist())
            ],
        }

    def parts(self) -> dict[str, Callable]:
        """Pieces of our path, of the reference, and the decoder that ours might have used."""
        from peco_ds.data.decode import decode_rgb
        from peco_ds.data.loaders import backbone_crop
        from peco_ds.data.views import cut

        mask, seed = self.recipe.mask, self.recipe.run.seed
        look = backbone_crop(self.recipe.model.image_px)
        reference = Reference(self.recipe)
        opened = [reference.decode(data) for data in self.files]
        crops = [reference.crops(image) for image in opened]

        def each(function: Callable) -> Callable:
            return lambda positions: [function(sample) for sample in map(self.sample_at, positions.tolist())]

        return {
            "tar read": each(self._read),
            "decode": each(lambda sample: decode_rgb(self.files[sample])),
            "box, resize, flip": each(lambda sample: cut(self.images[sample], self.rows[sample], *look)),
            "mask": each(lambda sample: draw_mask(mask, self.recipe.model.grid, seed, sample)),
            "token record": each(lambda sample: self.tokens.read(sample, view=0)),
            "BEiT: decode (Pillow)": each(lambda sample: reference.decode(self.files[sample])),
            "BEiT: jitter": each(lambda sample: reference.jitter(opened[sample])),
            "BEiT: flip, box, two resizes": each(lambda sample: reference.crops(opened[sample])),
            "BEiT: tensors, normalisation": each(lambda sample: reference.tensors(*crops[sample])),
        }

    def _read(self, sample: int) -> bytes:
        from peco_ds.schema import IMAGE_EXTENSIONS

        _, members = self.image_set.shards.read(sample, IMAGE_EXTENSIONS)
        return next(iter(members.values()))

    def rounds(self, ways: dict[str, Callable], sizes: Sizes) -> Timed:
        """Every way takes the same chunk by turns, in turning order; one round before the first is not counted."""
        import numpy as np

        count = len(self.files)
        timed = Timed(
            count,
            statistics.fmean(image.shape[1] * image.shape[2] for image in self.images),
            statistics.fmean(map(len, self.files)),
            {name: [] for name in ways},
        )
        for number in range(-1, sizes.rounds):
            positions = np.arange(sizes.chunk) + max(number, 0) * sizes.chunk
            for name, way in list(ways.items())[:: 1 if number % 2 else -1]:
                began = time.process_time()
                way(positions)
                if number >= 0:
                    timed.seconds[name].append((time.process_time() - began) / sizes.chunk)
        return timed

    def _pinned_batch(self, sizes: Sizes, device):
        import numpy as np

        raw = self.stored(np.arange(sizes.batch))
        return raw.pin_memory() if device.type == "cuda" else raw

    def device_seconds(self, sizes: Sizes, device) -> dict[str, list[float]]:
        """Seconds an image of the device's share, an entry a batch: wall time on a GPU, CPU time on a CPU."""
        from peco_ds.data.loaders import backbone_crop
        from peco_ds.data.views import jitter, to_backbone

        raw = self._pinned_batch(sizes, device)
        images = raw.cuts[backbone_crop(self.recipe.model.image_px)]
        there = images.to(device)
        jittered = jitter(there, raw.rows)
        work = {
            "copy to the device": lambda: images.to(device, non_blocking=True),
            "jitter": lambda: jitter(there, raw.rows),
            "normalisation": lambda: to_backbone(jittered),
        }
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for number in range(-1, sizes.batches):
            for name, function in work.items():
                took = seconds_of(function, device)
                if number >= 0:
                    seconds[name].append(took / sizes.batch)
        return seconds

    def step_seconds(self, sizes: Sizes, device) -> dict[str, list[float]]:
        """Seconds of a made-up step (matrix products) without batches, with batches that come in their turn, and on a
        GPU with batches one ahead; wall time of a stretch, an entry a round.
        """
        import torch

        from peco_ds.data.device_feed import SideStream, prepared_batches
        from peco_ds.data.loaders import backbone_crop
        from peco_ds.data.views import jitter, to_backbone

        on_gpu, look = device.type == "cuda", backbone_crop(self.recipe.model.image_px)
        raw = self._pinned_batch(sizes, device)
        matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) if on_gpu else torch.randn(256, 256)

        def step() -> None:
            for _ in range(STEP_PRODUCTS):
                matrix @ matrix

        def prepare(raw):
            return to_backbone(jitter(raw.cuts[look].to(device, non_blocking=True), raw.rows))

        def stretch(lane, *, with_batches: bool) -> float:
            batches = (
                prepared_batches((raw for _ in range(sizes.batches)), prepare, lambda images, _: images, lane=lane)
                if with_batches
                else iter([None] * sizes.batches)
            )
            began = time.perf_counter()
            for _ in batches:
                step()
                if on_gpu:
                    # as an optimiser step that looks at the norm of the gradients: the host is not ahead
                    torch.cuda.synchronize()
            return (time.perf_counter() - began) / sizes.batches

        ways = {
            "the step alone": lambda: stretch(None, with_batches=False),
            "batches in their turn": lambda: stretch(None, with_batches=True),
        }
        if on_gpu:
            ways["batches one ahead"] = lambda: stretch(SideStream(device), with_batches=True)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(-1, STEP_ROUNDS):
            for name, way in ways.items():
                took = way()
                if number >= 0:
                    seconds[name].append(took)
        return seconds


def seconds_of(function: Callable, device) -> float:
    if device.type != "cuda":
        began = time.process_time()
        function()
        return time.process_time() - began
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def draw_mask(mask, grid: int, seed: int, sample: int):
    from peco_ds.data.masking import draw_masked

    return draw_masked(
        seed=seed,
        epoch=0,
        sample=sample,
        grid=grid,
        kind=mask.kind,
        count=mask.count,
        min_block=mask.min_block,
        min_aspect=mask.min_aspect,
        exact=mask.exact,
    )


class Reference:
    """BEiT's transform as its paper and its released settings describe it, on Pillow and torchvision: two tensors and a
    mask of one image.

    Its mask is drawn by our generator, so that the two differ in images alone.
    """

    def __init__(self, recipe) -> None:
        from torchvision import transforms

        views = recipe.views
        self._recipe, self._views = recipe, views
        self._jitter = transforms.ColorJitter(*[views.color_jitter] * 3)
        self._normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self._box = transforms.RandomResizedCrop.get_params

    def __call__(self, data: bytes, sample: int) -> tuple:
        recipe = self._recipe
        return (
            *self.tensors(*self.crops(self.jitter(self.decode(data)))),
            draw_mask(recipe.mask, recipe.model.grid, recipe.run.seed, sample),
        )

    def decode(self, data: bytes):
        from PIL import Image

        return Image.open(io.BytesIO(data)).convert("RGB")

    def jitter(self, image):
        return self._jitter(image)

    def crops(self, image) -> tuple:
        from PIL import Image
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.functional import resized_crop

        if random.random() < self._views.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        box = self._box(image, self._views.scale, self._views.ratio)
        backbone_px = self._recipe.model.image_px
        return resized_crop(image, *box, (backbone_px, backbone_px), InterpolationMode.BICUBIC), resized_crop(
            image, *box, (112, 112), InterpolationMode.LANCZOS
        )

    def tensors(self, backbone, tokenizer) -> tuple:
        from torchvision.transforms.functional import to_tensor

        return self._normalize(to_tensor(backbone)), 0.8 * to_tensor(tokenizer) + 0.1


# ---------------------------------------------------------------------------------------------- tables


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(header: tuple, rows: list[tuple]) -> str:
    return "\n".join([row(*header), row("---", *["---:"] * (len(header) - 1)), *(row(*cells) for cells in rows)])


def rate_table(timed: dict[str, Timed]) -> str:
    """Images a second of a core, and how many times the reference's."""
    rows = []
    for name, result in timed.items():
        what = {"as_they_are": "as they are", "short_side": f"packed with --short_side {SHORT_SIDE_PX}"}[name]
        what += (
            f": {result.images} images of {result.mean_pixels / 1e3:.0f} thousand pixels and "
            f"{result.mean_bytes / 1e3:.0f} kB in the mean"
        )
        for way in (STORED, ONLINE, BEIT):
            ratios = result.ratios(way, BEIT)
            rows.append(
                (
                    what,
                    way,
                    f"{result.rate(way):.0f}",
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                )
            )
    return table(("images", "way", "images/s and core", "times the BEiT transform (smallest to largest round)"), rows)


def part_table(timed: Timed) -> str:
    """Where the time goes, in microseconds an image."""
    names = [name for name in timed.seconds if name not in (STORED, ONLINE, BEIT)]
    ours = [name for name in names if not name.startswith("BEiT: ")]
    rest = {
        "the rest: order, view, batch, colder caches": timed.median(STORED) - sum(timed.median(name) for name in ours),
        f"**{STORED}**": timed.median(STORED),
    }
    theirs = {name: timed.median(name) for name in names if name not in ours} | {
        f"**{BEIT}**, with its read and mask": timed.median(BEIT)
    }
    seconds = {name: timed.median(name) for name in ours} | rest | theirs
    return table(
        ("part, images as they are", "microseconds an image"),
        [(name, f"{value * 1e6:.0f}") for name, value in seconds.items()],
    )


def device_table(timed: Timed, seconds: dict[str, list[float]], sizes: Sizes, device) -> str:
    """The device's share in batches; on a CPU also what is left of the ratio where the same core has to do it."""
    clock = "wall" if device.type == "cuda" else "CPU"
    rows = [(name, f"{statistics.median(values) * 1e6:.1f}") for name, values in seconds.items()]
    text = table((f"on the device ({device.type}), batches of {sizes.batch}", f"{clock} microseconds an image"), rows)
    whole = sum(statistics.median(values) for values in seconds.values())
    text += f"\n\nTogether {1 / whole:.0f} images/s."
    if device.type != "cuda":
        both = timed.median(STORED) + whole
        text += (
            f" Where the core that loads has to do this too: {1 / both:.0f} images/s, "
            f"{timed.median(BEIT) / both:.2f} times the BEiT transform."
        )
    return text


def step_table(seconds: dict[str, list[float]], sizes: Sizes) -> str:
    """What copy and preparation of a batch cost the step."""
    rows = [(name, f"{statistics.median(values) * 1e3:.2f}") for name, values in seconds.items()]
    return table((f"a made-up step of {STEP_PRODUCTS} matrix products, batches of {sizes.batch}", "milliseconds"), rows)


def training_rates(recipe_name: str) -> tuple[float, ...]:
    """Images a second that a step takes at each of SHARES of an H100's peak, without recomputation."""
    from peco_ds.config import PretrainRecipe
    from peco_ds.planner.shapes import mim_macs
    from peco_ds.recipe_files import load_recipe

    recipe = load_recipe(PretrainRecipe, recipe_name, []).recipe
    flops = mim_macs(
        recipe.model,
        num_codes=recipe.objective.num_codes,
        masked=recipe.mask.count,
        encoding=recipe.encoding,
        aggregation=recipe.aggregation,
    ).training_flops
    return tuple(share * H100_FLOPS / flops for share in SHARES)


def core_table(timed: dict[str, Timed]) -> str:
    """Cores that feed one GPU: images/s of a step over those of a core."""
    header = (
        "ViT at 224, one H100 or H200",
        "images/s",
        "cores, as they are",
        f"cores, --short_side {SHORT_SIDE_PX}",
        "cores, BEiT transform as they are",
    )
    rows = []
    for name, recipe in MODELS.items():
        for share, rate in zip(SHARES, training_rates(recipe)):
            cores = (
                rate / timed["as_they_are"].rate(STORED),
                rate / timed["short_side"].rate(STORED),
                rate / timed["as_they_are"].rate(BEIT),
            )
            rows.append(
                (
                    f"{name} at {share:.0%} of {H100_FLOPS / 1e12:.0f} TFLOP/s",
                    f"{rate:.0f}",
                    *(f"{count:.1f}" for count in cores),
                )
            )
    return table(header, rows)


if __name__ == "__main__":
    run(main)
