r"""Measure a finished model: top-1 and throughput of a classifier, or reconstructions and codes of a tokenizer.

    python peco_ds/evaluate.py runs/finetune_vith14 --images data/images/val
    python peco_ds/evaluate.py vit_base_patch16_224.augreg_in1k --images data/images/val
    torchrun --nproc_per_node 8 peco_ds/evaluate.py runs/peco_tokenizer --images data/images/val \
        --train_images data/images/train --lpips vgg16-397923af.pth
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python's path needs the package's parent, not the package's folder.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds.command_line import Parser, run
from peco_ds.errors import EXIT_DONE, EXIT_REQUEUE, UserError


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        description=__doc__.splitlines()[0],
        epilog="exit codes: 0 done, 2 bad input (one line says what), 75 stopped, start again",
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="run folder of finetune.py or train_tokenizer.py, release folder (timm, Hugging Face, unilm, "
        "tokenizer), weights file, or name of a timm model",
    )
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="image set (pack_images.py) to measure on; labelled for a classifier",
    )
    parser.add_argument(
        "--train_images",
        type=Path,
        metavar="FOLDER",
        help="labelled image set: probe a tokenizer's codes, trained on this set and measured on --images",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("evaluation.json"),
        metavar="FILE",
        help="all numbers and where they come from (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="local weights for TARGET, the name of a timm model"
    )
    parser.add_argument(
        "--weights",
        choices=["auto", "ema", "raw"],
        default="auto",
        help="moving average or last weights of a fine-tuning run (default: the average where the run kept one)",
    )
    parser.add_argument(
        "--statistics",
        choices=["auto", "imagenet", "half"],
        default="auto",
        help="mean and deviation of the images the weights know; half is 0.5 (default: as their config "
        "says, else imagenet)",
    )
    parser.add_argument(
        "--image_px",
        type=int,
        help="side of the image (default: the model's own; of a tokenizer's release what gives 14 x 14 codes)",
    )
    parser.add_argument(
        "--crop",
        type=float,
        help="share of the resized short side that is seen (default: the model's own; at another "
        "--image_px 0.875 below 384 px, 1 from there on)",
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="images a forward pass, a rank (default: %(default)s)")
    parser.add_argument(
        "--num_workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="loader processes a rank (default: 8, or the number of cores)",
    )
    parser.add_argument(
        "--lpips",
        type=Path,
        metavar="FILE",
        help="torchvision's AlexNet or VGG16 weights: measure LPIPS of a tokenizer as well",
    )
    # The deepspeed launcher appends it.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    check(args)

    tokenizer = find_tokenizer(Path(args.target))
    if tokenizer is None and (args.lpips or args.train_images):
        raise UserError(
            f"{args.target}: no tokenizer; --lpips and --train_images are for tokenizers (linear_probe.py "
            "probes a backbone)"
        )
    from peco_ds.evaluation.stopping import Stopped
    from peco_ds.runtime.distributed import start_world

    # Bad input is refused before any rank joins another.
    measure = open_classifier(args) if tokenizer is None else open_tokenizer(args, *tokenizer)
    world = start_world()
    try:
        result, line = measure(world)
    except Stopped:
        return EXIT_REQUEUE
    if world.is_main:
        write(args, result)
        sys.stdout.write(f"{line}; {args.out}\n")
    return EXIT_DONE


def check(args) -> None:
    if args.image_px is not None and args.image_px < 1:
        raise UserError(f"--image_px {args.image_px}: must be at least 1")
    if args.crop is not None and not 0 < args.crop <= 1:
        raise UserError(f"--crop {args.crop}: in (0, 1]")
    if args.batch < 1 or args.num_workers < 0:
        raise UserError(f"--batch {args.batch} --num_workers {args.num_workers}: at least 1 and 0")
    if args.checkpoint is not None and Path(args.target).exists():
        raise UserError(
            f"--checkpoint {args.checkpoint}: goes with the name of a timm model, and {args.target} is a "
            "path; give one of the two"
        )
    if not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: no folder {args.out.parent}; make it, or give another file")


def write(args, result: dict) -> None:
    from peco_ds.runtime.run_folder import commit, versions
    from peco_ds.schema import write_json

    result["settings"]["weights"] = args.weights
    provenance = {"command": shlex.join(sys.argv), "commit": commit(), "versions": versions()}
    write_json(args.out, {"target": args.target, **result, **provenance})


# ----------------------------------------------------------------------------------------- classifiers


def open_classifier(args):
    """The function world -> (result, line) that measures the classifier.

    Raises: UserError for images without labels, weights that cannot be read or have no classifier, or other classes.
    """
    from peco_ds.data.image_set import ImageSet
    from peco_ds.data.labelled import check_labels
    from peco_ds.evaluation.evaluate_classifier import evaluate_classifier

    images = ImageSet(args.images)
    model, settings, source = load_classifier(args, check_labels(images, "--images"))
    how = forward_settings(args)

    def measure(world):
        result, line = evaluate_classifier(model, images, settings, how, world)
        return {"kind": "classifier", **source, "images": images.facts(), **result}, f"{source['source']}: {line}"

    return measure


def load_classifier(args, classes: tuple[str, ...]):
    """The model on the CPU, the images that it takes, and where it comes from."""
    from peco_ds.convert.initialize import check_classes
    from peco_ds.data.labelled import CropSettings
    from peco_ds.models.beit_weights import default_crop

    if Path(args.target).exists():
        from peco_ds.convert.initialize import classifier_of
        from peco_ds.convert.read import read_weights
        from peco_ds.runtime.run_weights import read_run

        weights = read_weights(args.target, average=args.weights, statistics=args.statistics, read_run=read_run)
        trained_px, num_classes, names = weights.model.image_px, weights.num_classes, weights.classes
        image_px, crop, mean, std = args.image_px or trained_px, weights.crop, weights.mean, weights.std
        if image_px % weights.model.patch_px:
            raise UserError(
                f"--image_px {image_px}: not a multiple of the patch size {weights.model.patch_px} of {weights.source}"
            )
        model = classifier_of(weights, image_px)
        source, facts = weights.source, weights.facts
    else:
        from peco_ds.models.timm_classifier import load_timm_classifier

        loaded = load_timm_classifier(args.target, args.checkpoint, image_px=args.image_px)
        model, num_classes, names, image_px, crop, mean, std = (
            loaded.model,
            loaded.num_classes,
            None,
            loaded.image_px,
            loaded.crop,
            loaded.mean,
            loaded.std,
        )
        trained_px = loaded.own_px
        source, facts = loaded.source, {}
    check_classes(source, num_classes, names, classes, what=str(args.images), remedy="or fine-tune it on these")
    if args.crop is not None:
        crop = args.crop
    elif image_px != trained_px:
        crop = default_crop(image_px)
    return model, CropSettings(image_px, crop, tuple(mean), tuple(std)), {"source": source, "facts": facts}


# ------------------------------------------------------------------------------------------ tokenizers


def find_tokenizer(target: Path) -> tuple[Path, int | None] | None:
    """(release folder, side of the images where a run tells it) where the target is a tokenizer's release or training
    run; None for anything else.

    Raises: UserError for a run that has written no release yet.
    """
    from peco_ds.models.tokenizers import CARD_NAME
    from peco_ds.runtime.run_folder import SETTINGS, read_settings

    if (target / CARD_NAME).is_file():
        return target, None
    if not (target / SETTINGS).is_file():
        return None
    recorded = read_settings(target)
    if recorded["stage"] != "train_tokenizer":
        return None
    if not (target / "tokenizer" / CARD_NAME).is_file():
        raise UserError(f"{target}: a tokenizer run without a release yet; let it reach its last step")
    size = recorded["recipe"].get("views", {})
    size = size.get("tokenizer_px") if isinstance(size, dict) else None
    if not isinstance(size, int) or size < 1:
        raise UserError(
            f"{target / SETTINGS}: does not tell views.tokenizer_px; restore it, or give {target / 'tokenizer'}"
        )
    return target / "tokenizer", size


def open_tokenizer(args, release: Path, own_px: int | None):
    """The function world -> (result, line) that measures the tokenizer.

    Raises: UserError for image sets that do not go together, or what `TokenizerEvaluation` refuses.
    """
    from peco_ds.data.image_set import ImageSet
    from peco_ds.data.labelled import labelled_sets
    from peco_ds.evaluation.evaluate_tokenizer import TokenizerEvaluation

    train = None
    if args.train_images:
        train, images, _ = labelled_sets(args.train_images, args.images, ("--train_images", "--images"))
    else:
        images = ImageSet(args.images)
    evaluation = TokenizerEvaluation(release, image_px=args.image_px, own_px=own_px, lpips=args.lpips)
    card, how = evaluation.card, forward_settings(args)

    def measure(world):
        result, line = evaluation.measure(images, train, how, world)
        source = {"kind": "tokenizer", "fingerprint": card.fingerprint, "facts": card.extra, "images": images.facts()}
        return {**source, **result}, f"tokenizer {card.fingerprint[:12]}: {line}"

    return measure


# ---------------------------------------------------------------------------------------------- common


def forward_settings(args):
    from peco_ds.evaluation.forward import ForwardSettings

    return ForwardSettings(args.precision, args.batch, args.num_workers)


if __name__ == "__main__":
    run(main)
