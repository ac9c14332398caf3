"""Tiny packed sets: images that were found or drawn, in shards, with token records that mean nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.stages import STAGES, call
from peco_ds.config import PretrainRecipe, TokenizerSettings
from peco_ds.data.image_folders import image_files
from peco_ds.data.image_set import ImageSet
from peco_ds.data.token_parts import TokenParts
from peco_ds.data.token_shards import TokenRecord, TokenSet
from peco_ds.data.views import draw_view
from peco_ds.errors import UserError
from peco_ds.models.tokenizers import build_tokenizer, save_tokenizer
from peco_ds.recipe_files import load_recipe
from peco_ds.schema import IMAGE_EXTENSIONS, MANIFEST_NAME, ViewRecipe

# how the names of images begin that are no real ones
DRAWN = "drawn_"


def chosen_files(images: Path | None, count: int, folder: Path) -> Path:
    """A folder with at most `count` of the images, evenly spread, whatever they came in.

    Args:
        images: folder of images at any depth, or of image shards; None: those that the tests find, or drawn ones.
    """
    folder.mkdir()
    if images is not None and (images / MANIFEST_NAME).is_file():
        shards = ImageSet(images).shards
        for number in evenly_spread(shards.num_samples, count):
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
        paths = [images / path for path in image_files(images)]
    if not paths:
        raise UserError(f"--images {images}: no image and no image shard in it; name a folder that holds some")
    for number in evenly_spread(len(paths), count):
        (folder / f"{number:08d}{paths[number].suffix}").symlink_to(paths[number].resolve())
    return folder


def images_of_the_tests() -> list[Path]:
    """Real ones that the tests find; none where neither their packs nor the packages they take some from are there."""
    try:
        from tests.conftest import find_real_data

        return find_real_data().imagenet
    except ImportError:
        return []


def draw_images(folder: Path, count: int, width: int = 500, height: int = 375) -> None:
    """JPEGs of ImageNet's usual size: smooth colours under noise."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        colours = Image.fromarray(draw.integers(256, size=(12, 16, 3), dtype=np.uint8))
        smooth = colours.resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth).astype(int) + draw.integers(-12, 13, size=(height, width, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{DRAWN}{number:08d}.jpg", quality=92)


def evenly_spread(total: int, count: int) -> list[int]:
    """At most `count` of the numbers below `total`."""
    count = min(total, count)
    return [number * total // count for number in range(count)]


def pack(files: Path, out: Path, short_side: int = 0, *, samples_per_shard: int = 500) -> Path:
    """Image shards of a folder of images."""
    size = ["--short_side", short_side, "--samples_per_shard", samples_per_shard, "--workers", 1]
    command = [sys.executable, STAGES / "pack_images.py", "--images", files, "--out", out, *size]
    call(command, {**os.environ, "OMP_NUM_THREADS": "1"})
    return out


def write_tokens(images: ImageSet, recipe: PretrainRecipe, folder: Path) -> TokenSet:
    """A token set of drawn codes: values do not matter to the time."""
    views, grid, codes = recipe.views, recipe.model.grid, recipe.objective.num_codes
    shape, drawn = (views.count, grid * grid), np.random.default_rng(0)
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
        rows = np.stack([draw_view(views, *image.shape[1:], sample=sample, view=view) for view in range(views.count)])
        soft = ()
        if views.topk:
            # neighbouring codes: no code twice for one patch
            first = drawn.integers(codes - views.topk, size=(*shape, 1))
            probs = np.full((*shape, views.topk), 1 / views.topk, np.float16)
            soft = (first + np.arange(views.topk)).astype(np.uint16), probs
        return TokenRecord(key, drawn.integers(codes, size=shape).astype(np.uint16), rows, *soft)

    ends = np.cumsum(images.shards.shard_sizes).tolist()
    for number, (start, end) in enumerate(zip([0, *ends], ends)):
        parts.write(number, map(record, range(start, end)))
    parts.finish()
    return TokenSet(folder, images.manifest, num_codes=codes, grid=grid, views=views)


def make_root(root: Path, recipe: str, settings: list[str], *, images: int) -> list[str]:
    """Draw images, pack them, and tokenize them with a tokenizer of random weights: what a start of pre-training reads.

    Returns: the settings that make the recipe read them, for steps without end and without a save.
    """
    cfg = load_recipe(PretrainRecipe, recipe, settings).recipe
    # stride 2 ** (levels - 1)
    levels = (cfg.views.tokenizer_px // cfg.model.grid).bit_length()
    tokenizer = TokenizerSettings(
        channels=16,
        channel_mults=(1,) * levels,
        blocks_per_level=1,
        attention=False,
        z_channels=16,
        num_codes=cfg.objective.num_codes,
        code_dim=8,
        l2_normalized=True,
    )
    torch.manual_seed(0)
    save_tokenizer(root / "tokenizer", build_tokenizer(tokenizer).state_dict(), tokenizer, {"judge": "none"})
    draw_images(root / "raw", images, 320, 256)
    pack(root / "raw", root / "images" / "train")
    own = [f"data.root={root}"]
    own += (
        "data.tokens=tokens/train views.count=1 run.log_every_steps=1 schedule.epochs=null schedule.steps=1000000 "
        "schedule.warmup_epochs=null schedule.warmup_steps=10 checkpoint.every_epochs=null"
    ).split()
    call([sys.executable, STAGES / "tokenize_shards.py", "--recipe", recipe, *settings, *own, "run.compile=none"])
    return own
