"""Small scenes for tests: real photographs, with maps whose classes follow from brightness and place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from peco_ds import pack_images

CLASSES = ("dark low", "bright low", "dark high", "bright high")
# In the maps: 0 is no class, k is class k - 1, as in ADE20K.
RECIPE = (
    "model.image_px=32 model.patch_px=8 model.width=48 model.depth=4 model.heads=3 model.drop_path=0 "
    "model.init_std=0.1 model.layer_scale=1 segmenter.taps=[0,1,2,3] segmenter.head_width=16 "
    "segmenter.auxiliary_width=8 segmenter.dropout=0 segmenter.layer_decay=0.7 augment.long_px=128 augment.short_px=40 "
    "data.num_workers=0 data.shuffle_window_shards=2 data.images=images/train data.val_images=images/val "
    "evaluation.long_px=128 evaluation.short_px=36 evaluation.stride_px=20 evaluation.every_steps=0 optim.lr=1e-2 "
    "schedule.steps=6 schedule.warmup_steps=2 run.precision=fp32 run.global_batch=4 run.micro_batch=2 "
    "run.log_every_steps=1 checkpoint.every_steps=null"
).split()


def write_scene(folder: Path, split: str, name: str, image: Image.Image) -> None:
    """images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png below a folder."""
    for part in ("images", "annotations"):
        (folder / part / split).mkdir(parents=True, exist_ok=True)
    image.save(folder / "images" / split / f"{name}.jpg", quality=92)
    Image.fromarray(class_map(image)).save(folder / "annotations" / split / f"{name}.png")


def class_map(image: Image.Image) -> np.ndarray:
    bright = np.asarray(image.convert("L")) > 127
    low = np.arange(image.height)[:, None] >= image.height // 2
    numbers = 1 + bright + np.where(low, 0, 2)
    # A frame without a class.
    numbers[:2] = 0
    return numbers.astype(np.uint8)


def photographs(real_data, count: int, short_px: int = 48) -> list[Image.Image]:
    """Small ones, of several aspects."""
    images = [Image.open(path).convert("RGB") for path in real_data.imagenet[:count]]
    sizes = [(short_px + 7 * (number % 3), short_px + 5 * (number % 2)) for number in range(count)]
    return [image.resize(size) for image, size in zip(images, sizes)]


def make_scenes(real_data, root: Path, *, train: int = 10, val: int = 7) -> list[str]:
    """Packed sets of scenes in `root`; the overrides that make segment_vitb16 fit them."""
    images = photographs(real_data, train + val)
    for number, image in enumerate(images):
        write_scene(root / "raw", "train" if number < train else "val", f"scene_{number}", image)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for split in ("train", "val"):
        pack(root / "raw", split, root / "images" / split, classes=root / "classes.txt")
    return [f"data.root={root}", *RECIPE]


def pack(raw: Path, split: str, out: Path, *more: str, classes: Path) -> None:
    pack_images.main(
        [
            *("--images", str(raw / "images" / split), "--labels", "scenes", "--reduce_zero_label"),
            *("--classes", str(classes), "--out", str(out), "--samples_per_shard", "6", "--workers", "1"),
            *more,
        ]
    )
