"""Draw a code atlas: beside each code its share and classes, and patches that carry it in their surroundings."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import ImageNetInfo

from peco_ds.evaluation.code_atlas import EXAMPLES, SHOWN, AtlasCode, CodeAtlas, Example

# Lengths in px. A tile shows so many patches a side; their number divides its side, so that outlines lie on patches.
AROUND, TILE = 3, 96
MARGIN, GAP, BETWEEN = 28, 4, 36
TEXT = 232
COLUMNS = 2
WIDTH = 2 * MARGIN + COLUMNS * (TEXT + EXAMPLES * (TILE + GAP)) + (COLUMNS - 1) * BETWEEN
INK, PALE, RULE, OUTLINE = "#1b1f24", "#5d6670", "#d5dae0", "#ffd60a"

HEADINGS = {"commonest": "Commonest codes", "rarest": "Rarest codes", "purest": "Purest codes"}


def atlas_picture(
    atlas: CodeAtlas,
    square_of: Callable[[int], torch.Tensor],
    *,
    title: str,
    images: str,
    num_codes: int,
    grid: int,
) -> torch.Tensor:
    """The picture of an atlas, WIDTH px wide.

    Args:
        square_of: sample -> uint8 [3, S, S], the image that the tokenizer saw.
        title: names the tokenizer.
        images: names the images and their number.
        num_codes: of the codebook.
        grid: patches a side.
    Returns: uint8 [3, H, WIDTH].
    """
    page = _Page()
    page.text(title, size=24, bold=True)
    shown = {example.sample: square_of(example.sample) for example in atlas.examples()}
    image_px = next(iter(shown.values())).shape[-1]
    found = atlas.summary
    page.text(
        f"{images}, {image_px} px, {grid} x {grid} patches of {image_px // grid} px; {found['codes_used']:,} of "
        f"{num_codes:,} codes used, perplexity {found['perplexity']:,.1f}",
        size=14,
    )
    for line in _classes_lines(atlas):
        page.text(line, size=14)
    page.text(
        f"A tile is a patch (outlined) in its surroundings. The {EXAMPLES} tiles of a code are chosen at random, each "
        "from another image."
        + " Purity ≥: lower end of the 95 % interval of the first class's share."
        * atlas.labelled,
        size=14,
        colour=PALE,
    )
    for name, codes in atlas.sections.items():
        page.heading(HEADINGS[name], _caption(name, atlas))
        if not codes:
            page.text(f"None: no code is in {EXAMPLES} images.", size=14)
        for start in range(0, len(codes), COLUMNS):
            page.row(codes[start : start + COLUMNS], lambda example: _tile(shown[example.sample], example, grid))
    return page.finish()


def _classes_lines(atlas: CodeAtlas) -> list[str]:
    if not atlas.labelled:
        return ["The set has no labels: classes are not known, and there are no purest codes."]
    found = atlas.summary
    return [
        f"A code tells {found['held_out_information_bits']:.3f} of the {found['class_bits']:.2f} bits of its image's "
        f"class ({found['information_bits']:.3f} on the images that were counted).",
        f"Purity, the share of a code's commonest class weighted by use: {_percent(found['held_out_purity'])} "
        f"({_percent(found['purity'])} on the images that were counted; {_percent(found['commonest_class'])} if codes "
        "told nothing).",
    ]


def _caption(name: str, atlas: CodeAtlas) -> str:
    if name == "commonest":
        return "by number of patches"
    if name == "rarest":
        few = atlas.summary["codes_in_few_images"]
        return f"the fewest patches among codes in at least {EXAMPLES} images ({few:,} used codes are in fewer)"
    return (
        "by the lower end of the 95 % interval of the commonest class's share (Wilson's, of as many trials as images "
        f"carry the code; at least {EXAMPLES})"
    )


def _tile(square_u8: torch.Tensor, example: Example, grid: int) -> Image.Image:
    """A patch and its neighbours, TILE px a side; at the rim of the image the patch is not in the middle."""
    patch_px = square_u8.shape[-1] // grid
    shown = min(AROUND, grid)
    top, left = (min(max(place - shown // 2, 0), grid - shown) for place in (example.row, example.column))
    crop = square_u8[:, top * patch_px : (top + shown) * patch_px, left * patch_px : (left + shown) * patch_px]
    tile = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy()).resize((TILE, TILE), Image.Resampling.BICUBIC)
    side = TILE / shown
    x, y = round((example.column - left) * side), round((example.row - top) * side)
    draw = ImageDraw.Draw(tile)
    # A white tile would have no end on the white page.
    draw.rectangle([0, 0, TILE - 1, TILE - 1], outline=RULE)
    # Around the patch, not over it, except at the rim of the tile.
    for inside, colour in enumerate((INK, OUTLINE, OUTLINE)):
        box = [max(start - 3 + inside, inside) for start in (x, y)]
        box += [min(round(start + side) + 2 - inside, TILE - 1 - inside) for start in (x, y)]
        draw.rectangle(box, outline=colour)
    return tile


class _Page:
    """A white page that is filled from above."""

    def __init__(self) -> None:
        # As high as the largest atlas; cut where it ends.
        rows = len(HEADINGS) * -(-SHOWN // COLUMNS)
        self._image = Image.new("RGB", (WIDTH, 600 + rows * (TILE + 4 * GAP)), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._y = MARGIN - 4

    def text(self, line: str, *, size: int, bold: bool = False, colour: str = INK) -> None:
        self._write(MARGIN, self._y, line, WIDTH - 2 * MARGIN, size=size, bold=bold, colour=colour)
        self._y += round(1.5 * size)

    def heading(self, name: str, caption: str) -> None:
        self._y += 14
        self._draw.line([(MARGIN, self._y), (WIDTH - MARGIN, self._y)], fill=RULE)
        self._y += 12
        width = self._write(MARGIN, self._y, name, WIDTH, size=18, bold=True)
        start = MARGIN + width + 12
        self._write(start, self._y + 4, caption, WIDTH - MARGIN - start, size=13, colour=PALE)
        self._y += 36

    def row(self, codes: list[AtlasCode], tile_of: Callable[[Example], Image.Image]) -> None:
        for place, code in enumerate(codes):
            left = MARGIN + place * (TEXT + EXAMPLES * (TILE + GAP) + BETWEEN)
            self._describe(left, code)
            for number, example in enumerate(code.examples):
                self._image.paste(tile_of(example), (left + TEXT + number * (TILE + GAP), self._y))
        self._y += TILE + 4 * GAP

    def _describe(self, left: int, code: AtlasCode) -> None:
        width, y = TEXT - 12, self._y - 2
        named = self._write(left, y, f"code {code.code}", width, size=15, bold=True) + 8
        if code.purity_bound is not None:
            bound = f"purity ≥ {_percent(code.purity_bound)}"
            self._write(left + named, y + 2, bound, width - named, size=13, colour=PALE)
        lines = [f"{_percent(code.share)} of patches, {code.images:,} image{'s' * (code.images != 1)}"]
        lines += [f"{_percent(share)} {readable_class(name)}" for name, share in code.classes]
        for number, line in enumerate(lines):
            self._write(left, y + 22 + 19 * number, line, width, size=13, colour=PALE if number == 0 else INK)

    def _write(self, x: int, y: int, line: str, width: int, *, size: int, bold: bool = False, colour: str = INK) -> int:
        """One line, shortened to a width.

        Returns: its width.
        """
        font = _font(size, bold)
        shown = line
        while font.getlength(shown) > width and len(line) > 1:
            line = line[:-1]
            shown = f"{line.rstrip()}…"
        self._draw.text((x, y), shown, font=font, fill=colour)
        return round(font.getlength(shown))

    def finish(self) -> torch.Tensor:
        cut = self._image.crop((0, 0, WIDTH, self._y + MARGIN - 4 * GAP))
        return torch.from_numpy(np.array(cut)).permute(2, 0, 1)


def readable_class(name: str) -> str:
    """A class name for people: of a WordNet number, as ImageNet names its classes, the first of its words."""
    return _words().get(name, name).split(",")[0] if re.fullmatch(r"n\d{8}", name) else name


@cache
def _words() -> dict[str, str]:
    return ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    # Imported where a picture is drawn: every start of a training would wait for it.
    import matplotlib

    # The font that comes with matplotlib knows Latin, Greek and Cyrillic letters; Pillow's own has Latin ones only.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _percent(share: float) -> str:
    """Two digits that say something: 42 %, 0.83 %, 0.0061 %."""
    value = 100 * share
    if value >= 9.95 or value == 0:
        return f"{value:.0f} %"
    digits = max(1, 1 - int(np.floor(np.log10(value))))
    return f"{value:.{digits}f} %"
