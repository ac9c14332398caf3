r"""Measure a finished model: top-1 of a classifier, codes of a tokenizer, mIoU of a segmenter, AP of a detector.

    python peco_ds/evaluate.py runs/finetune_vith14 --images data/images/val
    python peco_ds/evaluate.py vit_base_patch16_224.augreg_in1k --images data/images/val
    python peco_ds/evaluate.py runs/finetune_vitb16 --images data/images/val --attack bim --epsilon 2/255 --steps 20
    python peco_ds/evaluate.py runs/segment_vitb16 --images data/ade20k/val
    python peco_ds/evaluate.py runs/detect_vitb16 --images data/coco/val
    torchrun --nproc_per_node 8 peco_ds/evaluate.py runs/peco_tokenizer --images data/images/val \
        --train_images data/images/train --lpips vgg16-397923af.pth --classifier deit_tiny_patch16_224.fb_in1k
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python's path needs the package's parent, not the package's folder.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds.command_line import Parser, run, user_path, user_place, user_text
from peco_ds.errors import EXIT_DONE, EXIT_REQUEUE, UserError, redact, shown_command
from peco_ds.own_files import ATLAS, check_output, own_json, write_own_json
from peco_ds.remote_paths import is_url
from peco_ds.user_paths import released_path

# Options that only a classifier has a use for, only a segmenter, only a tokenizer; all are None unless given.
OF_CLASSIFIERS = ("crop", "attack", "epsilon", "steps", "step_size")
OF_SEGMENTERS = ("windows", "stride_px", "scales", "flip")
OF_TOKENIZERS = ("train_images", "lpips", "classifier", "classifier_images", "atlas")
# PeCo's budget of an attack (arXiv 2111.12710, table 11).
EPSILON, STEPS = Fraction(2, 255), 20
RESULT = own_json("evaluate", "target", "kind", "settings", "command", "commit", "versions")


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    check(args)
    args.shown_target = redact(args.target)
    for name in ("target", "classifier"):
        if is_url(getattr(args, name) or ""):
            setattr(args, name, str(released_path(getattr(args, name))))
    tokenizer = find_tokenizer(Path(args.target))
    dense = None if tokenizer else find_dense(Path(args.target))
    if dense is None:
        check_kind(args, is_tokenizer=tokenizer is not None)
    else:
        check_dense(args, dense)

    from peco_ds.evaluation.stopping import Stopped
    from peco_ds.runtime.distributed import start_world

    # Bad input is refused before any rank joins another.
    measure, draw = (
        open_tokenizer(args, *tokenizer) if tokenizer else open_dense(args, dense) if dense else open_classifier(args)
    )
    world = start_world()
    try:
        result, line = measure(world)
    except Stopped:
        return EXIT_REQUEUE
    if world.is_main:
        tell(args, result, line)
        draw()
    return EXIT_DONE


# ---------------------------------------------------------------------------------------- command line


def arguments() -> Parser:
    parser = Parser(
        description=__doc__.splitlines()[0],
        epilog="exit codes: 0 done, 2 bad input (one line says what), 75 stopped, start again",
    )
    parser.add_argument(
        "target",
        type=user_text,
        metavar="TARGET",
        help="run folder of finetune.py, train_tokenizer.py, segment.py or detect.py, release folder (timm, Hugging "
        "Face, unilm, tokenizer), weights file, or name of a timm model",
    )
    parser.add_argument(
        "--images",
        type=user_place,
        required=True,
        metavar="FOLDER",
        help="image set (pack_images.py) to measure on; labelled for a classifier, with maps for a segmenter, with "
        "objects for a detector",
    )
    parser.add_argument(
        "--out",
        type=user_path,
        default=Path("evaluation.json"),
        metavar="FILE",
        help="all numbers and where they come from (default: %(default)s)",
    )
    parser.add_argument(
        "--image_px",
        type=int,
        help="side of the image (default: the model's own; of a tokenizer's release what gives 14 x 14 codes)",
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default: %(default)s")
    parser.add_argument(
        "--batch",
        type=int,
        help="images a forward pass, a rank, or a segmenter's windows (default: 64; of a segmenter 8, of a detector 1, "
        "since images that are filled up to one shape are seen a little differently)",
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="loader processes a rank (default: 8, or the number of cores)",
    )
    # The deepspeed launcher appends it.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)

    weights = parser.add_argument_group("weights of a classifier (TARGET, or --classifier of a tokenizer)")
    weights.add_argument(
        "--checkpoint", type=user_path, metavar="FILE", help="local weights for the name of a timm model"
    )
    weights.add_argument(
        "--weights",
        choices=["auto", "ema", "raw"],
        default="auto",
        help="moving average or last weights of a fine-tuning run (default: the average where the run kept one)",
    )
    weights.add_argument(
        "--statistics",
        choices=["auto", "imagenet", "half"],
        default="auto",
        help="mean and deviation of the images the weights know; half is 0.5 (default: as their config, the arguments "
        "in the file or the name of a release tell, else imagenet, with a warning)",
    )

    classifier = parser.add_argument_group("measures of a classifier")
    classifier.add_argument(
        "--crop",
        type=float,
        help="share of the resized short side that is seen (default: the model's own; at another "
        "--image_px 0.875 below 384 px, 1 from there on)",
    )
    classifier.add_argument(
        "--attack",
        choices=["bim", "mim"],
        help="measure top-1 under an attack too: basic or momentum iterative method, L-infinity, untargeted, white box",
    )
    classifier.add_argument(
        "--epsilon", type=fraction, help=f"the most that a pixel value in [0, 1] is changed by (default: {EPSILON})"
    )
    classifier.add_argument("--steps", type=int, help=f"iterations of the attack (default: {STEPS})")
    classifier.add_argument(
        "--step_size",
        type=fraction,
        help="change of a pixel value in one iteration (default: mim epsilon / steps, bim 2.5 epsilon / steps)",
    )

    segmenter = parser.add_argument_group("how a segmenter sees a scene (default: as its run did, or BEiT's configs)")
    segmenter.add_argument(
        "--windows",
        choices=["slide", "whole"],
        help="slide: windows of the crop's size, their logits averaged; whole: the resized image in one pass",
    )
    segmenter.add_argument("--stride_px", type=int, help="pixels from one window to the next")
    segmenter.add_argument(
        "--scales",
        type=factors,
        metavar="F,F,...",
        help="factors on the resized image's size, each a prediction; their probabilities are averaged",
    )
    segmenter.add_argument("--flip", action="store_true", default=None, help="each of them mirrored too")

    tokenizer = parser.add_argument_group("measures of a tokenizer")
    tokenizer.add_argument(
        "--train_images",
        type=user_path,
        metavar="FOLDER",
        help="labelled image set: probe a tokenizer's codes, trained on this set and measured on --images",
    )
    tokenizer.add_argument(
        "--lpips",
        type=user_path,
        metavar="FILE",
        help="torchvision's AlexNet or VGG16 weights, or import_judge.py's folder of one: measure LPIPS of a tokenizer "
        "as well",
    )
    tokenizer.add_argument(
        "--classifier",
        type=user_text,
        metavar="NAME_OR_PATH",
        help="timm model, weights file, release or run of finetune.py: its top-1 on the reconstructions of --images, "
        "which are labelled, beside that on the originals",
    )
    tokenizer.add_argument(
        "--classifier_images",
        type=int,
        metavar="N",
        help="as many of --images, spread over the set, are what --classifier sees (default: all)",
    )
    tokenizer.add_argument(
        "--atlas",
        type=user_path,
        metavar="FILE.png",
        help="draw a tokenizer's commonest, rarest and, where --images are labelled, purest codes with patches that "
        "carry them, and measure what a code tells of the class",
    )
    return parser


def fraction(text: str) -> Fraction:
    """2/255 or a decimal number."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; write it as 2/255 or 0.0078") from None


def factors(text: str) -> tuple[float, ...]:
    """0.75,1,1.25"""
    try:
        found = tuple(map(float, text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(0 < factor <= 16 for factor in found):
        raise argparse.ArgumentTypeError(f"{text!r}: factors above 0 and at most 16, apart by commas, as 0.75,1,1.25")
    return found


def check(args) -> None:
    """What can be said of the options alone."""
    for name in ("image_px", "classifier_images", "steps", "batch", "stride_px"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.crop is not None and not 0 < args.crop <= 1:
        raise UserError(f"--crop {args.crop}: in (0, 1]")
    if args.num_workers < 0:
        raise UserError(f"--num_workers {args.num_workers}: must be at least 0")
    if args.epsilon is not None and not 0 <= args.epsilon <= 1:
        raise UserError(f"--epsilon {args.epsilon}: in [0, 1], as pixel values are; write it as 2/255")
    if args.step_size is not None and args.step_size <= 0:
        raise UserError(f"--step_size {args.step_size}: must be above 0")
    check_output(args.out, RESULT, "--out")
    if args.atlas is not None:
        if args.atlas.suffix.lower() != ".png":
            raise UserError(f"--atlas {args.atlas}: the picture is written as PNG; give a name that ends in .png")
        check_output(args.atlas, ATLAS, "--atlas")


def check_kind(args, *, is_tokenizer: bool) -> None:
    """Raises: UserError for an option that would be of no effect: of the other kind of model, of an attack that is not
    asked for, or of weights that nothing reads.
    """
    kind, other = ("tokenizer", "classifier") if is_tokenizer else ("classifier", "tokenizer")
    for name in (*(OF_CLASSIFIERS if is_tokenizer else OF_TOKENIZERS), *OF_SEGMENTERS):
        if getattr(args, name) is not None:
            other = "segmenter" if name in OF_SEGMENTERS else other
            remedy = " (linear_probe.py probes a backbone)" if name == "train_images" else ""
            raise UserError(f"--{name}: measures a {other}, and {args.target} is a {kind}; leave it out{remedy}")
    for name in ("epsilon", "steps", "step_size"):
        if args.attack is None and getattr(args, name) is not None:
            raise UserError(f"--{name}: goes with --attack; give that too, or leave it out")
    if args.classifier is None and args.classifier_images is not None:
        raise UserError("--classifier_images: goes with --classifier; give that too, or leave it out")
    classifier = args.classifier if is_tokenizer else args.target
    for name, default in (("checkpoint", None), ("weights", "auto"), ("statistics", "auto")):
        if getattr(args, name) == default:
            continue
        if classifier is None:
            raise UserError(
                f"--{name}: is about a classifier's weights, and {args.target} is a tokenizer; leave it "
                "out, or name a classifier with --classifier"
            )
        if name == "statistics" and args.checkpoint is not None:
            continue
        if name != "checkpoint" and not Path(classifier).exists():
            raise UserError(
                f"--{name} {getattr(args, name)}: goes with a run, a release or a weights file, and there is no "
                f"{classifier}; correct the path, or leave the option out for a timm model"
            )
    if args.checkpoint is not None and Path(classifier).exists():
        raise UserError(
            f"--checkpoint {args.checkpoint}: goes with the name of a timm model, and {classifier} is a "
            "path; give one of the two"
        )


def check_dense(args, kind: str) -> None:
    """Raises: UserError for an option that would be of no effect on a segmenter or detector."""
    options = [name for name in (*OF_CLASSIFIERS, *OF_TOKENIZERS, "image_px", "checkpoint") if getattr(args, name)]
    if kind == "detector":
        options += [name for name in OF_SEGMENTERS if getattr(args, name) is not None]
        options += [name for name in ("weights", "statistics") if getattr(args, name) != "auto"]
    elif args.windows == "whole" and args.stride_px is not None:
        raise UserError("--stride_px: whole images have no windows; leave it out, or set --windows slide")
    if options:
        raise UserError(f"--{options[0]}: has no meaning for a {kind}, and {args.target} is one; leave it out")


def tell(args, result: dict, line: str) -> None:
    """The figures, said before they are written, and all of them where they cannot be: an hour's work is not lost to a
    disk that has filled meanwhile.
    """
    from peco_ds.runtime.run_folder import commit, versions

    # The place of a copy says nothing.
    line = line.replace(args.target, args.shown_target)
    result |= {"source": result["source"].replace(args.target, args.shown_target)} if "source" in result else {}
    sys.stdout.write(line)
    sys.stdout.flush()
    result["settings"]["weights"] = args.weights
    provenance = {"command": shown_command(), "commit": commit(), "versions": versions()}
    record = {"target": args.shown_target, **result, **provenance}
    try:
        write_own_json(args.out, RESULT, record)
    except (OSError, UserError):
        sys.stdout.write(f"\nnot written to {args.out}: {json.dumps(record)}\n")
        sys.stdout.flush()
        raise
    sys.stdout.write(f"; {args.out}\n")


# ----------------------------------------------------------------------------------------- classifiers


def open_classifier(args):
    """The function world -> (result, line) that measures the classifier, and one that draws: nothing.

    Raises: UserError for images without labels, weights that cannot be read or have no classifier, or other classes.
    """
    from peco_ds.data.image_set import ImageSet
    from peco_ds.data.labelled import check_labels
    from peco_ds.evaluation.evaluate_classifier import evaluate_classifier
    from peco_ds.runtime.set_check import check_shared

    images = ImageSet(args.images)
    model, settings, source = load_classifier(
        args.target, args, check_labels(images, "--images"), image_px=args.image_px, crop=args.crop
    )
    how, attack = forward_settings(args), attack_settings(args)

    def measure(world):
        check_shared(world, images.shards)
        result, line = evaluate_classifier(model, images, settings, how, world, attack=attack)
        return {"kind": "classifier", **source, "images": images.facts(), **result}, f"{source['source']}: {line}"

    return measure, lambda: None


def load_classifier(
    target: str, args, classes: tuple[str, ...], *, image_px: int | None = None, crop: float | None = None
):
    """The model on the CPU, the images that it takes, and where it comes from.

    Args:
        target: path, or name of a timm model.
        args: its checkpoint, weights and statistics are of this classifier.
        classes: of the images.
        image_px, crop: of the images; None: the model's own.
    """
    from peco_ds.convert.initialize import check_classes
    from peco_ds.data.labelled import CropSettings
    from peco_ds.evaluation.imagenet_subset import NUM_CLASSES, OfSomeClasses, imagenet_columns
    from peco_ds.models.beit_weights import default_crop
    from peco_ds.models.timm_classifier import is_foreign_release, load_timm_classifier, load_timm_release

    if Path(target).exists() and not is_foreign_release(target):
        from peco_ds.convert.initialize import classifier_of
        from peco_ds.convert.read import read_weights
        from peco_ds.runtime.run_weights import read_run

        weights = read_weights(target, average=args.weights, statistics=args.statistics, read_run=read_run)
        trained_px, num_classes, names = weights.model.image_px, weights.num_classes, weights.classes
        own_crop, mean, std = weights.crop, weights.mean, weights.std
        side_px = image_px or trained_px
        if side_px % weights.model.patch_px:
            raise UserError(
                f"--image_px {side_px}: not a multiple of the patch size {weights.model.patch_px} of {weights.source}"
            )
        model = classifier_of(weights, side_px)
        source, facts = weights.source, weights.facts
    else:
        if Path(target).exists():
            for option in ("weights", "statistics"):
                if getattr(args, option) != "auto":
                    raise UserError(
                        f"--{option} {getattr(args, option)}: {target} is a release of timm's, whose config states "
                        "what it takes; leave it out"
                    )
            loaded = load_timm_release(Path(target), image_px=image_px)
        else:
            loaded = load_timm_classifier(target, args.checkpoint, image_px=image_px, statistics=args.statistics)
        model, num_classes, names, side_px, own_crop, mean, std = (
            loaded.model,
            loaded.num_classes,
            None,
            loaded.image_px,
            loaded.crop,
            loaded.mean,
            loaded.std,
        )
        trained_px = loaded.own_px
        source, facts = loaded.source, loaded.facts
    if names is None and num_classes == NUM_CLASSES != len(classes) and (columns := imagenet_columns(classes)):
        model, num_classes = OfSomeClasses(model, columns), len(classes)
        source = f"{source}, choosing among {num_classes} of ImageNet-1K's classes"
    check_classes(source, num_classes, names, classes, what=str(args.images), remedy="or fine-tune it on these")
    if crop is None:
        crop = own_crop if side_px == trained_px else default_crop(side_px)
    return model, CropSettings(side_px, crop, tuple(mean), tuple(std)), {"source": source, "facts": facts}


def attack_settings(args):
    """The attack of the command line; None where none is asked for."""
    if args.attack is None:
        return None
    from peco_ds.evaluation.attacks import AttackSettings, default_step_size

    epsilon = float(EPSILON if args.epsilon is None else args.epsilon)
    steps = STEPS if args.steps is None else args.steps
    step_size = default_step_size(args.attack, epsilon, steps) if args.step_size is None else float(args.step_size)
    return AttackSettings(args.attack, epsilon, steps, step_size)


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
    """The function world -> (result, line) that measures the tokenizer, and one that draws its atlas, if asked for.

    Raises: UserError for image sets that do not go together, images without labels or of other classes than the
        --classifier, or what `TokenizerEvaluation` refuses.
    """
    from peco_ds.data.image_set import ImageSet
    from peco_ds.data.labelled import check_labels, labelled_sets
    from peco_ds.evaluation.evaluate_tokenizer import TokenizerEvaluation
    from peco_ds.evaluation.pixel_classifier import PixelClassifier
    from peco_ds.runtime.set_check import check_shared

    train = None
    if args.train_images:
        train, images, _ = labelled_sets(args.train_images, args.images, ("--train_images", "--images"))
    else:
        images = ImageSet(args.images)
    evaluation = TokenizerEvaluation(release, image_px=args.image_px, own_px=own_px, lpips=args.lpips)
    classifier = None
    if args.classifier is not None:
        evaluation.check_makes_images("--classifier", args.classifier)
        model, crops, source = load_classifier(args.classifier, args, check_labels(images, "--images"))
        classifier = PixelClassifier(
            model, image_px=crops.image_px, mean=crops.mean, std=crops.std, source=source["source"]
        )
    card, how = evaluation.card, forward_settings(args)

    def measure(world):
        check_shared(world, *(opened.shards for opened in (images, train) if opened is not None))
        result, line = evaluation.measure(
            images,
            how,
            world,
            train=train,
            classifier=classifier,
            classifier_images=args.classifier_images,
            atlas=args.atlas,
        )
        source = {"kind": "tokenizer", "fingerprint": card.fingerprint, "facts": card.extra, "images": images.facts()}
        return {**source, **result}, f"tokenizer {card.fingerprint[:12]}: {line}"

    return measure, lambda: evaluation.draw_atlas(args.atlas, images) if args.atlas is not None else None


# --------------------------------------------------------------------------- segmenters and detectors


def find_dense(target: Path) -> str | None:
    """Whether the target is a segmenter's run, release or file ("segmenter") or a detector's run or release
    ("detector"); None for anything else.
    """
    from peco_ds.convert.read_detector import is_detector_release
    from peco_ds.convert.read_segmenter import is_segmenter
    from peco_ds.runtime.run_weights import stage_of

    stage = stage_of(target)
    if stage is None and is_detector_release(target):
        return "detector"
    if stage is None:
        return "segmenter" if is_segmenter(target) else None
    return {"segment": "segmenter", "detect": "detector"}.get(stage)


def open_dense(args, kind: str):
    """The function world -> (result, line) that measures a segmenter or a detector, and one that draws: nothing.

    Raises: UserError for images without maps or objects, weights that cannot be read, or other classes.
    """
    from peco_ds.evaluation.evaluate_dense import evaluate_detector, evaluate_segmenter, segmentation_settings

    weights, images = (load_segmenter if kind == "segmenter" else load_detector)(args)
    how = forward_settings(args, default_batch=8 if kind == "segmenter" else 1)
    evaluate: Callable = evaluate_detector
    if kind == "segmenter":
        asked = {name: getattr(args, name) for name in OF_SEGMENTERS if getattr(args, name) is not None}
        evaluate = partial(evaluate_segmenter, settings=segmentation_settings(weights, **asked))

    def measure(world):
        result, line = evaluate(weights, images, how, world)
        source = {"kind": kind, "source": weights.source, "facts": weights.facts, "images": images.facts()}
        return {**source, **result}, f"{weights.source}: {line}"

    return measure, lambda: None


def load_segmenter(args):
    from peco_ds.convert.initialize import check_classes
    from peco_ds.convert.read_segmenter import read_weights_or_segmenter
    from peco_ds.data.scenes import SceneSet
    from peco_ds.runtime.dense_weights import read_run_or_segmenter

    images = SceneSet(args.images, "--images")
    weights = read_weights_or_segmenter(
        args.target, average=args.weights, statistics=args.statistics, read_run=read_run_or_segmenter
    )
    classes = tuple(images.manifest.classes or ())
    remedy = "or train it on these with segment.py"
    check_classes(weights.source, weights.num_classes, weights.classes, classes, what=str(args.images), remedy=remedy)
    return weights, images


def load_detector(args):
    from peco_ds.convert.read_detector import is_detector_release, read_detector_release
    from peco_ds.data.objects import ObjectSet
    from peco_ds.runtime.run_weights import read_detector_run

    read = read_detector_release if is_detector_release(args.target) else read_detector_run
    images, weights = ObjectSet(args.images, "--images"), read(Path(args.target))
    if (images.category_ids, images.classes) != (weights.category_ids, weights.classes):
        raise UserError(
            f"{args.images}: its categories are not those that {weights.source} was trained for, or stand in another "
            "order; pack it from a file with the same categories"
        )
    return weights, images


# ---------------------------------------------------------------------------------------------- common


def forward_settings(args, default_batch: int = 64):
    from peco_ds.evaluation.forward import ForwardSettings

    return ForwardSettings(args.precision, args.batch or default_batch, args.num_workers)


if __name__ == "__main__":
    run(main)
