"""What each tokenizer of a table makes of the same held-out images."""

from __future__ import annotations

from pathlib import Path

import torch

from peco_ds.config import DataSettings
from peco_ds.data.image_set import ImageSet
from peco_ds.data.loaders import held_out_images
from peco_ds.evaluation.reconstruction import comparison_grid, round_trip_of, save_png, to_u8
from peco_ds.models.tokenizers import load_tokenizer

IMAGES = 8
AT_LEAST_PX = 128
ORIGINAL = "original"


@torch.no_grad()
def draw_reconstructions(path: Path, held_out: Path, releases: dict[str, Path], image_px: int) -> None:
    """A row an image, spread over the set; first the original, then a column a tokenizer. Written as PNG.

    Args:
        held_out: image set.
        releases: of tokenizers that make images, by the name above their column.
    """
    data = DataSettings(val_images=str(held_out.resolve()))
    originals = held_out_images(ImageSet(held_out), data, IMAGES, image_px).images_u8
    columns = [originals]
    for folder in releases.values():
        tokenizer, _ = load_tokenizer(folder)
        columns.append(to_u8(round_trip_of(tokenizer.eval())(originals.float() / 127.5 - 1).reconstruction))
    save_png(path, comparison_grid(columns, names=[ORIGINAL, *releases], at_least_px=AT_LEAST_PX))
