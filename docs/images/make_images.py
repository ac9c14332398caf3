"""Draw the images of the front page, for light and dark backgrounds: the pipeline, and results of the records.

    python docs/images/make_images.py

Data: `cat_28px.png` (Chelsea the cat by Stefan van der Walt, CC0, cropped and shrunk) and the tables of two records.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
RECORDS = HERE.parents[1] / "benchmarks"
sys.path.insert(0, str(HERE.parents[1]))

from peco_ds.config import MaskSettings
from peco_ds.data.masking import block_mask

SANS = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
GRID = 14  # patches a side of a ViT/16 at 224 px
MASKED = 75  # of 196, PeCo's count
SIDE = 112  # of an image in the pipeline, in pixels: 8 a patch
CODES = ["#30336b", "#36548c", "#3a7ca5", "#3fa796", "#6cc17a", "#b4d35b", "#f2d64b", "#f6a23c"]


@dataclass(frozen=True)
class Theme:
    name: str
    text: str
    quiet: str
    card: str
    border: str
    accent: str
    second: str
    mask: str


THEMES = (
    Theme("light", "#1f2328", "#59636e", "#f6f8fa", "#d1d9e0", "#0969da", "#bc4c00", "#d1d9e0"),
    Theme("dark", "#f0f6fc", "#9198a1", "#151b23", "#3d444d", "#4493f8", "#f0883e", "#3d444d"),
)


class Drawing:
    """SVG elements in the order in which they are drawn; lengths in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img"><title>{escape(title)}</title>'
        )
        self.parts: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, fill: str, extra: str = "") -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{_space(extra)}/>'
        )

    def text(self, x: float, y: float, words: str, fill: str, size: float = 13, extra: str = "", font=SANS) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{fill}" font-size="{size:g}" font-family="{font}"{_space(extra)}>'
            f"{escape(words)}</text>"
        )

    def path(self, points: str, stroke: str, width: float = 2, extra: str = 'fill="none"') -> None:
        self.parts.append(f'<path d="{points}" stroke="{stroke}" stroke-width="{width:g}"{_space(extra)}/>')

    def dot(self, x: float, y: float, radius: float, fill: str, extra: str = "") -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{fill}"{_space(extra)}/>')

    def svg(self) -> str:
        return "\n".join([self.head, *self.parts, "</svg>\n"])


def _space(extra: str) -> str:
    return f" {extra}" if extra else ""


def mosaic(drawing: Drawing, x: float, y: float, cell: int, colours: list[list[str]]) -> None:
    """A square of equal cells of `cell` pixels; cells of one colour beside each other are one shape."""
    drawing.parts.append(f'<g transform="translate({x:g} {y:g})" shape-rendering="crispEdges">')
    for row, line in enumerate(colours):
        start = 0
        for column in range(1, len(line) + 1):
            if column == len(line) or line[column] != line[start]:
                across = (column - start) * cell
                if line[start]:
                    drawing.parts.append(
                        f'<path fill="{line[start]}" d="M{start * cell} {row * cell}h{across}v{cell}h-{across}z"/>'
                    )
                start = column
    drawing.parts.append("</g>")


def hex_colours(pixels: np.ndarray) -> list[list[str]]:
    """Colours of four bits a channel: "#a87"."""
    return [["#" + "".join(f"{round(int(value) / 17):x}" for value in pixel) for pixel in row] for row in pixels]


def arrow(drawing: Drawing, x: float, y: float, colour: str) -> None:
    drawing.path(f"M{x:g} {y:g}h16m-6 -6l6 6l-6 6", colour, 2, 'fill="none" stroke-linecap="round"')


def pipeline(theme: Theme) -> str:
    """Six stages in two rows, each with what it makes of one image."""
    width, height, card_width, card_height, gap = 900, 322, 280, 146, 30
    drawing = Drawing(width, height, "From images to released weights in six stages")
    photo = np.asarray(Image.open(HERE / "cat_28px.png").convert("RGB"))
    mean = photo.reshape(GRID, 2, GRID, 2, 3).mean(axis=(1, 3))
    light = mean @ [0.299, 0.587, 0.114]
    edges = np.quantile(light, np.linspace(0, 1, len(CODES) + 1)[1:-1])
    codes = [[CODES[code] for code in row] for row in np.digitize(light, edges)]
    masked = block_mask(np.random.default_rng(3), MaskSettings(count=MASKED, min_block=16, min_aspect=0.3), GRID)
    hidden = [[theme.mask if hide else "" for hide in row] for row in masked]
    drawing.parts.append('<defs><g id="cat">')
    mosaic(drawing, 0, 0, SIDE // len(photo), hex_colours(photo))
    drawing.parts.append("</g></defs>")

    stages = [
        ("Image shards", ("Folders or tars", "become indexed", "WebDataset shards"), "pack_images.py", ""),
        ("Tokenizer", ("Learns its codes,", "judged by a frozen", "network"), "train_tokenizer.py", "ZeRO"),
        ("Token shards", ("K views an image,", "encoded once and", "read ever after"), "tokenize_shards.py", ""),
        ("Pre-training", ("A ViT predicts", "the codes of", "masked patches"), "pretrain.py", "ZeRO"),
        ("Fine-tuning", ("224 px, then 448;", "or linear and k-NN", "probes instead"), "finetune.py", "ZeRO"),
        ("Release", ("Weights, checked", "in the library that", "will load them"), "convert_checkpoint.py", ""),
    ]
    for number, (title, lines, command, pill) in enumerate(stages):
        x = number % 3 * (card_width + gap) + 1
        y = number // 3 * (card_height + gap) + 1
        drawing.rect(x, y, card_width - 2, card_height - 2, theme.card, f'rx="10" stroke="{theme.border}"')
        left, top, side = x + 15, y + 16, SIDE
        if number in (0, 3, 4):
            drawing.parts.append(f'<use href="#cat" x="{left:g}" y="{top:g}"/>')
        if number == 1:
            codebook(drawing, theme, left, top, side)
        elif number == 2:
            mosaic(drawing, left, top, side // GRID, codes)
        elif number == 3:
            mosaic(drawing, left, top, side // GRID, hidden)
        elif number == 4:
            drawing.rect(left + 8, top + side - 30, 74, 22, theme.card, f'rx="11" stroke="{theme.border}"')
            drawing.text(left + 45, top + side - 15, "tabby cat", theme.text, 12, 'text-anchor="middle"')
        elif number == 5:
            libraries(drawing, theme, left, top, side)
        words = left + side + 14
        drawing.text(words, y + 31, f"{number + 1}", theme.accent, 15, 'font-weight="600"')
        drawing.text(words + 15, y + 31, title, theme.text, 15, 'font-weight="600"')
        for line, text in enumerate(lines):
            drawing.text(words, y + 53 + 18 * line, text, theme.quiet, 13)
        drawing.text(words, y + 126, command, theme.accent, 10, font=MONO)
        if pill:
            drawing.text(words, y + 110, "DeepSpeed, ZeRO 0 to 3", theme.second, 10.5)
        if number % 3 < 2:
            arrow(drawing, x + card_width + 5, y + card_height / 2, theme.quiet)
    # from the end of the first row to the beginning of the second
    middle = card_height + gap / 2
    drawing.path(
        f"M{width - card_width / 2:g} {card_height + 2}V{middle:g}H{card_width / 2:g}V{card_height + gap - 3}"
        "m-5 -6l5 6l5 -6",
        theme.quiet,
        2,
        'fill="none" stroke-linecap="round" stroke-linejoin="round"',
    )
    return drawing.svg()


def codebook(drawing: Drawing, theme: Theme, x: float, y: float, side: float) -> None:
    """Encoder, codes, decoder."""
    for outer, inner in ((x + 2, x + 36), (x + side - 2, x + side - 36)):
        outline = f"M{outer:g} {y + 8:g}L{inner:g} {y + 30:g}V{y + side - 30:g}L{outer:g} {y + side - 8:g}Z"
        drawing.path(outline, theme.accent, 2, 'fill="none" stroke-linejoin="round"')
    cell = 11
    for code, colour in enumerate(CODES):
        column, row = code % 2, code // 2
        drawing.rect(x + side / 2 - 12 + column * 13, y + side / 2 - 25 + row * 13, cell, cell, colour, 'rx="2"')


def libraries(drawing: Drawing, theme: Theme, x: float, y: float, side: float) -> None:
    for row, name in enumerate(("timm", "Hugging Face", "unilm")):
        top = y + 4 + row * 37
        drawing.rect(x + 1, top, side - 2, 31, "none", f'rx="6" stroke="{theme.accent}" stroke-width="1.5"')
        drawing.text(x + side / 2, top + 20, name, theme.text, 12.5, 'text-anchor="middle"')


# what a row of a record is called on the front page
CODES_OF = {
    "PeCo without a perceptual loss": "no judge",
    "PeCo": "judge, weight 1",
    "PeCo, normalize channel, weight 10": "judge, weight 10",
}
FAMILY = {
    "from scratch": "no pre-training",
    "BEiT:": "BEiT",
    "PeCo: codes": "PeCo",
    "mc-BEiT:": "mc-BEiT",
    "BEiT v2:": "BEiT v2",
    "PeCo, visible": "PeCo, visible patches",
}
STANDARD_ERROR = 0.8  # of one measurement, from the 3,925 validation images
READING_ERROR = 1.6  # likewise, from 500 images


def table_rows(record: str) -> list[list[str]]:
    text = (RECORDS / record).read_text()
    return [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in text.splitlines() if line[:2] == "| "]


def reconstructions() -> dict[str, list[float]]:
    """Top-1 of a classifier on what each tokenizer gives back, each seed."""
    names, *rows = table_rows("perceptual_codes_cpu_202611.md")
    column = names.index("top-1 on reconstructions")
    # "13.10 (13.20, 13.00)": the mean, and every seed
    values = {row[0]: [float(value) for value in re.findall(r"[\d.]+", row[column])] for row in rows}
    return {name: values[key][1:] or values[key] for key, name in CODES_OF.items()}


def family() -> dict[str, list[float | None]]:
    """Fine-tuned top-1, linear probe, training speed in images/s."""
    rows = table_rows("compare_imagenette_cpu_202611.md")
    found = {}
    for key, name in FAMILY.items():
        row = next(row for row in rows if row[0].startswith(key))
        found[name] = [float(row[at]) if re.match(r"\d", row[at]) else None for at in (1, 2, 6)]
    return found


@dataclass(frozen=True)
class Panel:
    """A horizontal axis from `low` to `high`, drawn from `left` to `right`."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return round(self.left + (value - self.low) / (self.high - self.low) * (self.right - self.left), 1)


def axis(drawing: Drawing, theme: Theme, panel: Panel, top: float, bottom: float, ticks: tuple[int, ...]) -> None:
    for tick in ticks:
        drawing.path(f"M{panel.x(tick):g} {top:g}V{bottom:g}", theme.border, 1)
        drawing.text(panel.x(tick), bottom + 17, f"{tick}", theme.quiet, 11.5, 'text-anchor="middle"')


def results(theme: Theme) -> str:
    """Left: what a classifier reads in reconstructions, seeds and means. Right: the family at equal compute."""
    width, height = 900, 352
    drawing = Drawing(width, height, "Two experiments on two CPU cores, Imagenette at 64 px")
    bold, end = 'font-weight="600"', 'text-anchor="end"'
    drawing.text(0, 18, "What is left of an image in its codes?", theme.text, 16, bold)
    drawing.text(0, 39, "a classifier reads reconstructions; two seeds, 400 steps", theme.quiet, 12.5)
    panel, top, bottom = Panel(150, 385, 10, 25), 66, 272
    axis(drawing, theme, panel, top, bottom, (10, 15, 20, 25))
    drawing.text((panel.left + panel.right) / 2, bottom + 38, "top-1, %", theme.quiet, 12, 'text-anchor="middle"')
    for row, (name, seeds) in enumerate(reconstructions().items()):
        y, mean = top + 34 + row * 68, sum(seeds) / len(seeds)
        colour = theme.accent if row else theme.quiet
        drawing.text(panel.left - 14, y + 4.5, name, theme.text, 13, end)
        spread = READING_ERROR / len(seeds) ** 0.5
        left, right = panel.x(mean - spread), panel.x(mean + spread)
        drawing.rect(left, y - 8, round(right - left, 1), 16, colour, 'opacity="0.22" rx="3"')
        drawing.path(f"M{panel.x(mean):g} {y - 12:g}v24", colour, 3)
        for seed in seeds:
            drawing.dot(panel.x(seed), y, 5, colour)
        drawing.text(panel.x(mean), y - 18, f"{mean:.1f}", theme.text, 12.5, f'text-anchor="middle" {bold}')

    drawing.text(450, 18, "The family at equal compute", theme.text, 16, bold)
    drawing.text(450, 39, "each pre-trained with the FLOP of 5 epochs of BEiT; one seed", theme.quiet, 12.5)
    panel = Panel(600, 810, 35, 50)
    axis(drawing, theme, panel, top, bottom, (35, 40, 45, 50))
    drawing.text((panel.left + panel.right) / 2, bottom + 38, "top-1, %", theme.quiet, 12, 'text-anchor="middle"')
    drawing.text(898, 56, "images/s", theme.quiet, 12, end)
    for row, (name, (tuned, probe, speed)) in enumerate(family().items()):
        y = top + 17 + row * 34.4
        colour = theme.accent if row else theme.quiet
        drawing.text(panel.left - 14, round(y + 4.5, 1), name, theme.text, 13, end)
        left, right = panel.x(tuned - STANDARD_ERROR), panel.x(tuned + STANDARD_ERROR)
        drawing.rect(left, round(y - 8, 1), round(right - left, 1), 16, colour, 'opacity="0.22" rx="3"')
        drawing.dot(panel.x(tuned), round(y, 1), 5.5, colour)
        if probe is not None:
            drawing.dot(panel.x(probe), round(y, 1), 4.5, "none", f'stroke="{theme.second}" stroke-width="2"')
        drawing.text(898, round(y + 4.5, 1), "" if speed is None else f"{speed:.0f}", theme.text, 13, end)
    y = height - 6
    drawing.text(0, y, "Imagenette at 64 px, two CPU cores; right: 1.2 M parameters", theme.quiet, 12)
    drawing.dot(456, y - 4, 5.5, theme.accent)
    drawing.text(468, y, "fine-tuned", theme.quiet, 12)
    drawing.dot(556, y - 4, 4.5, "none", f'stroke="{theme.second}" stroke-width="2"')
    drawing.text(567, y, "linear probe", theme.quiet, 12)
    drawing.rect(662, y - 11, 26, 14, theme.accent, 'opacity="0.22" rx="3"')
    drawing.text(695, y, "one standard error either way", theme.quiet, 12)
    return drawing.svg()


def render() -> dict[str, str]:
    """File name and SVG text of every image."""
    return {f"{draw.__name__}_{theme.name}.svg": draw(theme) for draw in (pipeline, results) for theme in THEMES}


if __name__ == "__main__":
    for name, svg in render().items():
        (HERE / name).write_text(svg)
        sys.stdout.write(f"{HERE / name}: {len(svg)} bytes\n")
