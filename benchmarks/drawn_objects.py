"""Does the detector learn what is there to be learned? Mask R-CNN from scratch on drawn rectangles and discs.

    python -m benchmarks.drawn_objects --out drawn_objects_out

400 images to train on, 100 to measure on, 1 to 3 objects each, drawn here. Ends in OUT/results.md with AP of boxes and
masks over the steps, their plot, and held-out images with what was found. Start the same command again to continue. The
recipe is benchmarks/drawn_objects/detector.yaml; settings at the end of the command go over it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from PIL import Image, PngImagePlugin

from benchmarks.drawing import draw_objects
from benchmarks.plots import drawing
from benchmarks.record import OWN_PICTURE, benchmark_parser, markdown_table, own_record, parse, publish
from benchmarks.stages import Stages
from peco_ds.command_line import run
from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.errors import EXIT_DONE
from peco_ds.own_files import png_text, refuse_foreign, written_whole

RECIPE = Path(__file__).with_name("drawn_objects") / "detector.yaml"
# Split -> images, seed of the drawing, numbers of images without an object.
SPLITS = {"train": (400, 0, ()), "val": (100, 1, (3, 4))}
MEASURES = {"box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP", "mask_ap50": "mask AP50"}


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser("drawn_objects", __doc__, overrides="settings over the recipe")
    out = "sets, run, log and results (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("drawn_objects_out"), metavar="FOLDER", help=out)
    parser.add_argument("--deepspeed_config", default=str(DS_CONFIGS / "zero1.json"))
    args = parse(parser, argv)
    args.record = args.record or args.out / "results.md"
    refuse_foreign(args.record, own_record(args.command))
    for picture in pictures(args.record):
        refuse_foreign(picture, OWN_PICTURE)
    out = args.out.resolve()
    stages = Stages(out, ranks=1, deepspeed_config=args.deepspeed_config)
    for split, (count, seed, empty) in SPLITS.items():
        pack(stages, out, split, count, seed, empty)
    stages.train("detect", "detect.py", RECIPE, out / "run", *args.overrides)
    sys.stdout.write(write_results(args, out, stages))
    return EXIT_DONE


def pack(stages: Stages, out: Path, split: str, count: int, seed: int, empty: tuple[int, ...]) -> None:
    """Draw a split and pack it, once."""
    drawn = out / "drawn"
    if not (drawn / f"{split}.json").is_file():
        shutil.rmtree(drawn / split, ignore_errors=True)
        draw_objects(drawn, split, count, seed=seed, empty=empty)
    words = ["--images", drawn / split, "--labels", "instances", "--annotations", drawn / f"{split}.json"]
    stages.python(f"pack_{split}", "pack_images.py", *words, "--out", out / "images" / split, "--workers", 1)


def pictures(record: Path) -> tuple[Path, Path]:
    """Where the plot goes, and the images with what was found."""
    return record.with_suffix(".png"), record.with_name(f"{record.stem}_images.png")


def write_results(args, out: Path, stages: Stages) -> str:
    """Table, plot and images. Returns: the table."""
    rows = [json.loads(line) for line in (out / "run" / "evaluation.jsonl").read_text().splitlines()]
    origin = json.loads((out / "run" / "provenance.json").read_text())
    curve, images = pictures(args.record)
    plot(curve, rows)
    named = PngImagePlugin.PngInfo()
    for key, value in png_text(OWN_PICTURE).items():
        named.add_text(key, value)
    with Image.open(out / "run" / "detections.png") as found, written_whole(images, OWN_PICTURE) as temporary:
        # Noise hardly compresses, and outlines are as plain at half the size.
        found.reduce(2).save(temporary, "PNG", pnginfo=named)
    seconds = stages.records()["detect"]["seconds"]
    cells = [[str(row["step"]), *(f"{row[name]:.1f}" for name in MEASURES)] for row in rows]
    body = (
        f"{rows[-1]['images']} held-out images; {seconds / 60:.0f} minutes of training and measuring, from scratch; "
        f"commit {origin['commit'][:12]}.\n\n{markdown_table(['step', *MEASURES.values()], cells)}\n\n"
        f"![AP over the steps]({curve.name})\n\n![held-out images with what was found]({images.name})"
    )
    return publish(args, "Drawn objects: a detector from scratch", body, "deepspeed", "torchvision")


def plot(path: Path, rows: list[dict]) -> None:
    """AP over the steps, a line a measure."""
    with drawing(path, 1, 1, size=(6.5, 4.2)) as drawn:
        axes = drawn[0, 0]
        for name, label in MEASURES.items():
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], marker=".", label=label)
        axes.set(xlabel="step", ylabel="AP on held-out images")
        axes.grid(alpha=0.3)
        axes.legend()


if __name__ == "__main__":
    run(main)
