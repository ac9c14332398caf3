"""Measure a finished model: top-1 and throughput of a classifier, or reconstructions and codes of a tokenizer.

python peco_ds/evaluate.py runs/finetune_vith14 --images data/images/val
python peco_ds/evaluate.py vit_base_patch16_224.augreg_in1k --images data/images/val
torchrun --nproc_per_node 8 peco_ds/evaluate.py runs/peco_tokenizer --images data/images/val --train_images
data/images/train --lpips vgg16-397923af.pth
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

if __package__ in (None, ""):
    # started by path: the package's parent, not its inside
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds.command_line import Parser, run
from peco_ds.errors import EXIT_DONE, EXIT_REQUEUE, UserError

# codes a side at which a tokenizer's release is measured: 224 px at stride 16, 112 px at stride 8; a run folder says
# its own size
TOKENIZER_GRID = 14


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
    # the deepspeed launcher appends it
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

    try:
        result, line, world = evaluate_classifier(args) if tokenizer is None else evaluate_tokenizer(args, *tokenizer)
    except Stopped:
        return EXIT_REQUEUE
    if world.is_main:
        write(args.out, result)
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


def write(path: Path, result: dict) -> None:
    from peco_ds.runtime.run_folder import commit, versions
    from peco_ds.schema import write_json

    write_json(path, {**result, "command": shlex.join(sys.argv), "commit": commit(), "versions": versions()})


# ----------------------------------------------------------------------------------------- classifiers


def evaluate_classifier(args):
    from peco_ds.data.image_set import ImageSet
    from peco_ds.data.labelled import check_labels, evaluation_batches
    from peco_ds.evaluation.classification import classification_quality
    from peco_ds.runtime.distributed import start_world

    images = ImageSet(args.images)
    classes = check_labels(images, "--images")
    model, settings, source = load_classifier(args, classes)

    world = start_world()
    model.to(world.device)
    forward = in_precision(model, args.precision, world.device)
    rate = throughput(forward, args.batch, settings["image_px"], world)
    batches = evaluation_batches(
        images,
        rank=world.rank,
        world_size=world.size,
        batch=args.batch,
        num_workers=args.num_workers,
        device=world.device,
        **settings,
    )
    begun = time.perf_counter()
    quality = classification_quality(
        forward, until_stopped(batches, world), num_classes=len(classes), device=world.device
    )
    elapsed_s = time.perf_counter() - begun
    speed = {"forward_images_per_s": rate, "end_to_end_images_per_s": quality["images"] / elapsed_s}
    result = {
        "target": args.target,
        "kind": "classifier",
        **source,
        "images": described(images),
        "settings": {**settings, **running(args, world)},
        "quality": quality,
        "throughput": speed,
    }
    line = (
        f"{source['source']}: top-1 {quality['top1']:.2f}, top-5 {quality['top5']:.2f} on "
        f"{quality['images']} images at {settings['image_px']} px, {rate:.1f} images/s "
        f"({speed['end_to_end_images_per_s']:.1f} with decoding)"
    )
    return result, line, world


def load_classifier(args, classes: tuple[str, ...]):
    """The model on the CPU, what its images have to be (as `evaluation_batches` takes it), and where it comes
    from.
    """
    from peco_ds.convert.initialize import check_classes
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
        source = {"source": weights.source, "facts": weights.facts}
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
        source = {"source": loaded.source, "facts": {}}
    check_classes(
        source["source"], num_classes, names, classes, what=str(args.images), remedy="or fine-tune it on these"
    )
    if args.crop is not None:
        crop = args.crop
    elif image_px != trained_px:
        crop = default_crop(image_px)
    return model, {"image_px": image_px, "crop": crop, "mean": tuple(mean), "std": tuple(std)}, source


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


def evaluate_tokenizer(args, release: Path, own_px: int | None):
    from peco_ds.data.central_squares import square_batches
    from peco_ds.data.image_set import ImageSet
    from peco_ds.data.labelled import labelled_sets
    from peco_ds.evaluation.perceptual_distance import load_lpips
    from peco_ds.evaluation.reconstruction import CodeSums, RoundTripSums, quality_line, round_trip_of
    from peco_ds.models.tokenizers import load_tokenizer
    from peco_ds.runtime.distributed import start_world

    train = None
    if args.train_images:
        train, images, _ = labelled_sets(args.train_images, args.images, ("--train_images", "--images"))
    else:
        images = ImageSet(args.images)
    tokenizer, card = load_tokenizer(release)
    only_px = card.settings.only_px
    image_px = args.image_px or only_px or own_px or TOKENIZER_GRID * card.stride_px
    if only_px not in (None, image_px):
        raise UserError(
            f"--image_px {image_px}: the tokenizer looks at images of {only_px} px alone; leave --image_px out"
        )
    if image_px % card.stride_px:
        raise UserError(f"--image_px {image_px}: not a multiple of the tokenizer's stride {card.stride_px}")
    if args.lpips and not tokenizer.makes_images:
        raise UserError(
            f"--lpips {args.lpips}: the tokenizer {release} makes no images, so there is nothing to "
            "compare; leave --lpips out"
        )
    distance = load_lpips(args.lpips) if args.lpips else None

    world = start_world()
    tokenizer.to(world.device)
    if distance is not None:
        distance.to(world.device)
    round_trip = in_precision(round_trip_of(tokenizer), args.precision, world.device)
    tokenize = in_precision(tokenizer.tokenize, args.precision, world.device)

    def squares(of: ImageSet):
        batches = square_batches(
            of,
            rank=world.rank,
            world_size=world.size,
            batch=args.batch,
            size_px=image_px,
            num_workers=args.num_workers,
            device=world.device,
        )
        return until_stopped(batches, world)

    rate = throughput(tokenize, args.batch, image_px, world)
    sums = (
        RoundTripSums(card.num_codes, world.device, distance)
        if tokenizer.makes_images
        else CodeSums(card.num_codes, world.device)
    )
    kept = []
    begun = time.perf_counter()
    for batch in squares(images):
        output = round_trip(batch.images_01 * 2 - 1)
        sums.add(batch.images_01, output, (batch.samples >= 0).to(world.device))
        kept.append((output.codes, batch.labels, batch.samples))
    quality = sums.result(world.all_reduce)
    speed = {
        "tokenize_images_per_s": rate,
        "end_to_end_images_per_s": images.num_samples / (time.perf_counter() - begun),
    }
    result = {
        "target": args.target,
        "kind": "tokenizer",
        "fingerprint": card.fingerprint,
        "facts": card.extra,
        "images": described(images),
    }
    result |= {
        "settings": {
            "image_px": image_px,
            "num_codes": card.num_codes,
            "lpips_network": distance.network if distance else None,
            **running(args, world),
        },
        "quality": quality,
        "throughput": speed,
    }
    line = (
        f"tokenizer {card.fingerprint[:12]}: {quality_line(quality, card.num_codes)} on "
        f"{images.num_samples} images at {image_px} px"
    )
    if train is not None:
        seen = gathered(
            ((tokenize(batch.images_01 * 2 - 1), batch.labels, batch.samples) for batch in squares(train)), world
        )
        result["code_probes"] = probe_codes(tokenizer, seen, gathered(kept, world), len(train.manifest.classes), world)
        result["train_images"] = described(train)
        line += "".join(
            f"; {name}: linear {found['best_linear']:.2f}, k-NN {found['best_knn']:.2f}"
            for name, found in result["code_probes"]["images_as"].items()
        )
    return result, line, world


def gathered(batches, world):
    """Codes int32 [n, N] and labels int64 [n] of the whole set in the order of its samples, on every rank's CPU.

    Collective.
    """
    import torch

    codes, labels, samples = (
        torch.cat(parts) for parts in zip(*((codes.int().cpu(), labels, samples) for codes, labels, samples in batches))
    )
    codes, labels, samples = (world.gather(part.to(world.device)).cpu() for part in (codes, labels, samples))
    order = samples.argsort()[int((samples < 0).sum()) :]
    return codes[order], labels[order]


def probe_codes(tokenizer, train, val, num_classes: int, world) -> dict:
    """What a linear classifier and nearest neighbours make of the codes alone, in percent.

    Collective; the two forms of an image are shared out.
    """
    from peco_ds.config import ProbeSettings
    from peco_ds.evaluation.code_probes import bag_of_codes, mean_code_vector
    from peco_ds.evaluation.linear_probes import probe

    settings, vectors, device = ProbeSettings(), tokenizer.code_vectors, world.device
    forms = {
        "bag of codes": lambda codes: bag_of_codes(codes, len(vectors), device),
        "mean code vector": lambda codes: mean_code_vector(codes, vectors, device),
    }
    found = {}
    for name in list(forms)[world.rank :: world.size]:
        accuracies = probe(
            *((forms[name](codes), labels) for codes, labels in (train, val)),
            settings,
            num_classes=num_classes,
            device=device,
        )
        best = {
            "best_linear": max(row["top1"] for row in accuracies["linear"]),
            "best_knn": max(accuracies["knn"].values()),
        }
        found[name] = {**best, **accuracies}
    everything = {name: value for part in world.gather_objects(found) for name, value in part.items()}
    used = {
        key: value
        for key, value in asdict(settings).items()
        if key in ("lrs", "epochs", "global_batch", "weight_decay", "knn_k", "knn_temperature", "seed")
    }
    return {"images_as": {name: everything[name] for name in forms}, "settings": used}


# ---------------------------------------------------------------------------------------------- common


def in_precision(forward, precision: str, device):
    """`forward` without gradients, under autocast where bf16 is asked for."""
    import torch

    @torch.no_grad()
    def run_forward(images: torch.Tensor):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            return forward(images)

    return run_forward


def throughput(forward, batch: int, image_px: int, world) -> float:
    """Images a second over all ranks at once. Collective."""
    import torch

    from peco_ds.evaluation.forward import forward_images_per_s

    images = (
        torch.randn(batch, 3, image_px, image_px, generator=torch.Generator().manual_seed(0))
        .clamp(-1, 1)
        .to(world.device)
    )
    world.barrier()
    return float(
        world.all_reduce(
            torch.tensor([forward_images_per_s(forward, images)], dtype=torch.float64, device=world.device)
        )
    )


def until_stopped(batches, world):
    """The batches, as long as no rank was asked to stop. Collective; every rank has equally many. Raises: Stopped."""
    from peco_ds.evaluation.stopping import Stopped

    for batch in batches:
        if world.stop_requested():
            raise Stopped
        yield batch


def described(images) -> dict:
    return {
        "folder": str(images.folder),
        "images": images.num_samples,
        "fingerprint": images.manifest.fingerprint(),
    }


def running(args, world) -> dict:
    return {"precision": args.precision, "batch": args.batch, "ranks": world.size, "weights": args.weights}


if __name__ == "__main__":
    run(main)
