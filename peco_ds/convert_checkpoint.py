"""Convert a run, release or weights file into a release for timm, Hugging Face transformers, unilm or torchvision.

The library loads the release with its own loader; a detector's for torchvision holds the module that does.

    python -m peco_ds.convert_checkpoint SRC --to timm|hf|unilm|torchvision --out RELEASE_DIR

SRC is a run folder of pretrain.py, finetune.py, segment.py or detect.py (its newest whole checkpoint is taken; any ZeRO
stage, any number of ranks), one of its checkpoints/step_N folders, a release folder of one of the first three
libraries, or a weights file. Segmenters are for hf and unilm, detectors for torchvision.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python's path needs the package's parent, not the package's folder.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds.command_line import Parser, run, user_path
from peco_ds.errors import EXIT_DONE, UserError

# Kind of model -> the libraries that have it.
TARGETS = {"backbone": ("timm", "hf", "unilm"), "segmenter": ("hf", "unilm"), "detector": ("torchvision",)}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0], epilog="exit codes: 0 done, 2 bad input (one line says what)")
    parser.add_argument(
        "source",
        type=user_path,
        metavar="SRC",
        help="run folder, one checkpoint of it, release folder or weights file",
    )
    parser.add_argument(
        "--to",
        choices=["timm", "hf", "unilm", "torchvision"],
        required=True,
        help="library that shall load the release",
    )
    parser.add_argument("--out", type=user_path, required=True, metavar="RELEASE_DIR", help="folder to write")
    parser.add_argument(
        "--from",
        dest="layout",
        choices=["auto", "run", "timm", "hf", "unilm"],
        default="auto",
        help="what SRC must be (default: what it is)",
    )
    parser.add_argument(
        "--weights",
        choices=["auto", "ema", "raw"],
        default="auto",
        help="moving average of the weights, or the last ones (default: the average where there is one)",
    )
    parser.add_argument(
        "--statistics",
        choices=["auto", "imagenet", "half"],
        default="auto",
        help="mean and standard deviation of the images, where SRC does not tell them or wrongly; half is 0.5 "
        "(default: what SRC, the arguments in it or its name tell, else imagenet, with a warning)",
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load the release by its library in a fresh process and compare outputs (default: on)",
    )
    args = parser.parse_args(argv)
    check_out(args)
    if args.verify and args.to == "hf" and importlib.util.find_spec("transformers") is None:
        raise UserError(
            "transformers is not installed, so the release cannot be verified in it; pip install "
            "transformers, or give --no-verify"
        )
    return convert(args)


def check_out(args: argparse.Namespace) -> None:
    """Raises: UserError for an --out that is SRC, holds it, holds what no conversion wrote, or cannot be written."""
    from peco_ds.own_files import is_same_file
    from peco_ds.user_paths import check_folder_takes_files

    out, source = args.out, args.source
    if is_same_file(out, source) or (source.is_file() and is_same_file(out, source.resolve().parent)):
        raise UserError(f"--out {out}: is SRC itself, or the folder that it lies in; give another folder")
    if os.path.lexists(out) and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    there = next(parent for parent in (out, *out.absolute().parents) if parent.is_dir())
    check_folder_takes_files(there, f"--out {out}")


def convert(args: argparse.Namespace) -> int:
    from peco_ds.convert.read import read_weights
    from peco_ds.convert.release import CARD, CONFIG, WEIGHTS, refuse_foreign_files, write_release
    from peco_ds.convert.to_hf import to_hf
    from peco_ds.convert.to_timm import to_timm
    from peco_ds.convert.to_unilm import FILE, to_unilm
    from peco_ds.convert.verify import COMPARED, LOADERS, compare, model_outputs
    from peco_ds.runtime.run_weights import read_run

    kind = kind_of_source(args.source)
    check_target(args, kind)
    if kind == "segmenter":
        return convert_segmenter(args)
    if kind == "detector":
        return convert_detector(args)
    refuse_foreign_files(args.out, (CARD, CONFIG, FILE if args.to == "unilm" else WEIGHTS))
    weights = read_weights(
        args.source, layout=args.layout, average=args.weights, statistics=args.statistics, read_run=read_run
    )
    release = {"timm": to_timm, "hf": to_hf, "unilm": to_unilm}[args.to](weights)
    expected = model_outputs(weights) if args.verify else None
    write_release(args.out, release, weights)
    parameters = sum(tensor.numel() for tensor in weights.tensors.values())
    line, library = f"{args.out}: {weights.source}, {parameters / 1e6:.1f} M parameters", release.library
    # Dropped, so that a large model is not in memory twice while its library loads it.
    del weights, release
    compared = "not verified"
    if expected is not None:
        compared = (
            f"{COMPARED[expected.kind]} in {LOADERS[library]} equal our own model's to "
            f"{compare(args.out, library, expected):.1e}"
        )
    sys.stdout.write(f"{line}; {compared}\n")
    return EXIT_DONE


def kind_of_source(source: Path) -> str:
    """What is to be converted: "segmenter", "detector", or "backbone" with or without a head of its own."""
    from peco_ds.convert.read_segmenter import is_segmenter
    from peco_ds.runtime.run_weights import stage_of

    stage = stage_of(source)
    if stage == "detect":
        return "detector"
    return "segmenter" if stage == "segment" or (stage is None and is_segmenter(source)) else "backbone"


def check_target(args: argparse.Namespace, kind: str) -> None:
    """Raises: UserError if the library has no model of this kind."""
    if args.to in TARGETS[kind]:
        return
    theirs = " or ".join(f"--to {target}" for target in TARGETS[kind])
    raise UserError(f"{args.source}: a {kind}, and {args.to} has none as it is made here; give {theirs}")


def convert_segmenter(args: argparse.Namespace) -> int:
    """The same of a run of segment.py, or of a segmenter's release or file. In unilm's layout nothing installed can
    load it: the written file is read again, and holds the same tensors.
    """
    from peco_ds.convert.read_segmenter import read_stated, read_weights_or_segmenter
    from peco_ds.convert.release import CARD, CONFIG, WEIGHTS, refuse_foreign_files, write_files
    from peco_ds.convert.segmenter_layouts import segmenter_card, segmenter_release
    from peco_ds.convert.to_unilm import FILE
    from peco_ds.convert.verify import compare, refuse_other_tensors, segmenter_outputs
    from peco_ds.models.segmenter_weights import SegmenterWeights
    from peco_ds.runtime.dense_weights import read_run_or_segmenter

    refuse_foreign_files(args.out, (CARD, CONFIG, FILE if args.to == "unilm" else WEIGHTS))
    weights = read_weights_or_segmenter(
        args.source,
        layout=args.layout,
        average=args.weights,
        statistics=args.statistics,
        read_run=read_run_or_segmenter,
    )
    assert isinstance(weights, SegmenterWeights), args.source
    release = segmenter_release(weights, args.to)
    expected = segmenter_outputs(weights) if args.verify else None
    write_files(args.out, release, segmenter_card(release, weights))
    compared = "not verified"
    if expected is not None and args.to == "hf":
        difference = compare(args.out, release.library, expected)
        compared = f"logits in transformers equal our own model's to {difference:.1e}"
    elif args.verify:
        refuse_other_tensors(args.out, read_stated(args.out)[0], weights)
        compared = f"{FILE} read again holds the same {len(weights.tensors)} tensors"
    sys.stdout.write(f"{args.out}: {weights.source}; {compared}\n")
    return EXIT_DONE


def convert_detector(args: argparse.Namespace) -> int:
    """The same of a run of detect.py, for torchvision by a module that lies in the release."""
    from peco_ds.convert.release import CARD, CONFIG, WEIGHTS, refuse_foreign_files, write_files
    from peco_ds.convert.to_torchvision import MODULE, detector_card, detector_release
    from peco_ds.convert.verify import compare_detector, detector_outputs
    from peco_ds.runtime.run_weights import read_detector_run

    for option in ("weights", "statistics"):
        if getattr(args, option) not in ("auto", "raw"):
            raise UserError(
                f"--{option} {getattr(args, option)}: {args.source} is a run of detect.py, which keeps one set of "
                "weights and records their statistics; leave it out"
            )
    if args.layout not in ("auto", "run"):
        raise UserError(f"{args.source}: is of layout run, not {args.layout}; leave the layout to auto")
    refuse_foreign_files(args.out, (CARD, CONFIG, WEIGHTS, MODULE))
    weights = read_detector_run(args.source)
    release = detector_release(weights)
    expected = detector_outputs(weights) if args.verify else None
    write_files(args.out, release, detector_card(release, weights))
    compared = "not verified"
    if expected is not None:
        difference, share = compare_detector(args.out, *expected)
        compared = (
            f"maps and heads in torchvision equal our own detector's to {difference:.1e}, {share:.1%} of its boxes, "
            "scores and masks too"
        )
    sys.stdout.write(f"{args.out}: {weights.source}; {compared}\n")
    return EXIT_DONE


if __name__ == "__main__":
    run(main)
