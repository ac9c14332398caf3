r"""Probe frozen weights: a linear classifier and nearest neighbours on the features after every block.

    python peco_ds/linear_probe.py --recipe probe_vitb16 init.weights=runs/peco_vitb16
    torchrun --nproc_per_node 8 peco_ds/linear_probe.py --recipe probe_vith14 init.weights=vith14_release \
        "probe.lrs=[1e-3,4e-3]"

Features are computed once and kept in OUT/features; a second start with other learning rates reads them. OUT/features
may be deleted afterwards. A probe that was stopped computes its features again, and keeps the layers that were done.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python's path needs the package's parent, not the package's folder.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds.command_line import parse_stage, run, stage_parser, user_path
from peco_ds.config import ProbeRecipe
from peco_ds.errors import EXIT_DONE, EXIT_REQUEUE, UserError, shown_command

logger = logging.getLogger("peco_ds")


def main(argv: list[str] | None = None) -> int:
    parser = stage_parser(__doc__.splitlines()[0], recipe="probe_vitb16", deepspeed_config=None)
    parser.add_argument("--out", type=user_path, default=None, help="folder of the results (default: runs/RECIPE_NAME)")
    args, resolved = parse_stage(parser, ProbeRecipe, argv)
    return dry_run(args, resolved.recipe) if args.dry_run else run_probe(args, resolved)


def dry_run(args, cfg: ProbeRecipe) -> int:
    """Check everything that needs no ranks, and say what the probe would cost."""
    from peco_ds.data_paths import data_path
    from peco_ds.evaluation.features import feature_bytes, feature_width
    from peco_ds.planner.shapes import FLOPS_PER_MAC, TRAINING_OVER_FORWARD, mim_macs
    from peco_ds.planner.stages import IMAGENET_1K_CLASSES, IMAGENET_1K_TRAIN, IMAGENET_1K_VAL

    weights = read(cfg)
    settings, blocks = cfg.probe, blocks_of(cfg, weights)
    assumed = not data_path(cfg.data, cfg.data.images).exists()
    if assumed:
        sizes, num_classes = (IMAGENET_1K_TRAIN, IMAGENET_1K_VAL), IMAGENET_1K_CLASSES
    else:
        train, val, classes = labelled_images(cfg)
        sizes, num_classes = (train.num_samples, val.num_samples), len(classes)
    width = feature_width(weights.model.width, settings.pooling)
    size = feature_bytes(weights.model.width, settings.pooling, num_blocks=len(blocks), num_images=sum(sizes))
    backbone = (
        FLOPS_PER_MAC
        * mim_macs(replace(weights.model, image_px=image_px_of(cfg, weights)), num_codes=0, masked=0).backbone
        * sum(sizes)
    )
    # No gradient goes back to the features, so a training step takes two products, not three.
    classifiers = (
        FLOPS_PER_MAC
        * (TRAINING_OVER_FORWARD - 1)
        * width
        * num_classes
        * len(settings.lrs)
        * len(blocks)
        * settings.epochs
        * sizes[0]
    )
    lines = [
        f"{cfg.name}: linear probe of {weights.source} ({weights.kind})",
        f"images            {sizes[0]:,} to train, {sizes[1]:,} to measure, {num_classes} classes"
        + (" (assumed: ImageNet-1K; no set was read)" if assumed else ""),
        f"features            {len(blocks)} blocks x {width} numbers an image ({settings.pooling}), "
        f"{size / 1e9:.4g} GB in {args.out / 'features'}",
        f"compute             backbone {backbone:.3g} FLOP, once; {len(blocks) * len(settings.lrs)} "
        f"classifiers x {settings.epochs} epochs {classifiers:.3g} FLOP",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_DONE


def run_probe(args, resolved) -> int:
    from peco_ds.evaluation.features import FEATURES, TRAIN, VAL, FeatureFiles, feature_width
    from peco_ds.evaluation.probe_results import LAYERS, LayerResults, check_places
    from peco_ds.evaluation.stopping import Stopped
    from peco_ds.runtime.distributed import start_world
    from peco_ds.runtime.set_check import check_shared
    from peco_ds.schema import sha256_of_json

    cfg: ProbeRecipe = resolved.recipe
    settings = cfg.probe
    # Bad input is refused before any rank joins another.
    check_places(args.out)
    train, val, classes = labelled_images(cfg)
    weights = read(cfg)
    blocks = blocks_of(cfg, weights)

    world = start_world()
    check_shared(world, train.shards, val.shards)
    made_from = features_made_from(cfg, weights, blocks, train, val)
    sizes = {TRAIN: train.num_samples, VAL: val.num_samples}
    files = FeatureFiles(
        args.out / FEATURES,
        made_from,
        blocks=blocks,
        sizes=sizes,
        width=feature_width(weights.model.width, settings.pooling),
    )
    try:
        make_features(cfg, files, weights, blocks, {TRAIN: train, VAL: val}, world)
    except Stopped:
        return EXIT_REQUEUE
    results = LayerResults(
        args.out / LAYERS, sha256_of_json([files.fingerprint, len(classes), asdict(settings)]), blocks
    )
    # All ranks use rank 0's list: a late rank would find other layers missing than an early one.
    missing = world.gather_objects(results.missing())[0]
    try:
        for block in missing[world.rank :: world.size]:
            results.write(block, probe_layer(files, block, settings, len(classes), world))
    except Stopped:
        return EXIT_REQUEUE
    # No collective from here on: layers end hours apart where they are many, and a process group gives up after
    # minutes.
    while world.is_main and results.missing():
        if world.stop_seen:
            return EXIT_REQUEUE
        time.sleep(0.5)
    if world.is_main:
        report(args.out, resolved, results.read(), made_from, weights, len(classes))
    return EXIT_DONE


# -------------------------------------------------------------------------------------- what is probed


def read(cfg: ProbeRecipe):
    from peco_ds.convert.read import read_weights
    from peco_ds.runtime.run_weights import read_run

    weights = read_weights(
        cfg.init.weights, average=cfg.init.average, statistics=cfg.init.statistics, read_run=read_run
    )
    if image_px_of(cfg, weights) % weights.model.patch_px:
        raise UserError(
            f"probe.image_px {cfg.probe.image_px}: not a multiple of the patch size "
            f"{weights.model.patch_px} of {weights.source}"
        )
    return weights


def image_px_of(cfg: ProbeRecipe, weights) -> int:
    return cfg.probe.image_px or weights.model.image_px


def blocks_of(cfg: ProbeRecipe, weights) -> tuple[int, ...]:
    """Block numbers from 1, increasing.

    Raises: UserError for one that the weights do not have.
    """
    depth = weights.model.depth
    wrong = [number for number in cfg.probe.blocks if not 1 <= number <= depth]
    if wrong:
        raise UserError(
            f"probe.blocks {list(cfg.probe.blocks)}: {weights.source} has blocks 1 to {depth}, not {wrong[0]}"
        )
    return tuple(sorted(set(cfg.probe.blocks))) or tuple(range(1, depth + 1))


def labelled_images(cfg: ProbeRecipe):
    """Training and held-out images, and the class names that both have."""
    from peco_ds.data.labelled import labelled_sets
    from peco_ds.data_paths import data_path

    return labelled_sets(data_path(cfg.data, cfg.data.images), data_path(cfg.data, cfg.data.val_images))


def features_made_from(cfg: ProbeRecipe, weights, blocks: tuple[int, ...], train, val) -> dict:
    """Everything that determines the features' values."""
    from peco_ds.models.weight_files import weights_fingerprint

    settings = cfg.probe
    return {
        "weights": weights_fingerprint(settings_of_model(weights.model), weights.tensors),
        "train_images": train.manifest.fingerprint(),
        "val_images": val.manifest.fingerprint(),
        "blocks": list(blocks),
        "pooling": settings.pooling,
        "image_px": image_px_of(cfg, weights),
        "crop": settings.crop,
        "precision": settings.precision,
        "mean": list(weights.mean),
        "std": list(weights.std),
    }


def settings_of_model(model) -> dict:
    """The model's settings as they stood when the first features were recorded: a default that was added since changes
    no fingerprint.
    """
    return {name: value for name, value in asdict(model).items() if name != "absolute_positions" or value}


# -------------------------------------------------------------------------------------- the two halves


def make_features(cfg: ProbeRecipe, files, weights, blocks: tuple[int, ...], images: dict, world) -> None:
    """Compute the features unless the folder holds them. Collective.

    Raises: Stopped.
    """
    from peco_ds.convert.initialize import feature_backbone
    from peco_ds.data.labelled import CropSettings, evaluation_batches
    from peco_ds.evaluation.features import compute_features

    settings = cfg.probe
    state = world.gather_objects(files.state())[0]
    if state == "whole":
        logger.info("features of these images and weights lie in %s and are read", files.folder)
        return
    logger.info(
        "taking features into %s%s",
        files.folder,
        "; the existing ones are of other images, weights or settings" if state == "other" else "",
    )
    fault = ""
    if world.is_main:
        try:
            files.create()
        except UserError as error:
            fault = str(error)
    world.agree(fault)
    backbone = feature_backbone(weights, image_px_of(cfg, weights)).to(world.device)
    crops = CropSettings(image_px_of(cfg, weights), settings.crop, weights.mean, weights.std)
    for split, whole_set in images.items():
        batches = evaluation_batches(
            whole_set, crops, world, batch=settings.feature_batch, num_workers=cfg.data.num_workers
        )
        rows = compute_features(backbone, batches, settings, blocks=blocks, world=world)
        files.write(split, rows)
    world.barrier()
    if world.is_main:
        files.finish()
    world.barrier()


def probe_layer(files, block: int, settings, num_classes: int, world) -> dict:
    """One layer's accuracies, as `probe_results` keeps them.

    Raises: Stopped.
    """
    from peco_ds.evaluation.features import TRAIN, VAL, feature_rows
    from peco_ds.evaluation.linear_probes import probe
    from peco_ds.evaluation.stopping import Stopped

    def stop() -> None:
        if world.stop_seen:
            raise Stopped

    train, val = (
        (feature_rows(files.features(split, block), world.device), files.labels(split)) for split in (TRAIN, VAL)
    )
    return {"block": block, **probe(train, val, settings, num_classes=num_classes, device=world.device, stop=stop)}


# ------------------------------------------------------------------------------------- what is written


def report(out: Path, resolved, layers: list[dict], made_from: dict, weights, num_classes: int) -> None:
    """One line, probe.json, probe.md and layers.png."""
    from peco_ds.evaluation.probe_results import OWN_RECORD, OWN_TABLE, PLOT, RECORD, TABLE, plot, table
    from peco_ds.own_files import write_own_json, written_whole
    from peco_ds.runtime.run_folder import commit, versions

    def best_linear(layer: dict) -> dict:
        return max(layer["linear"], key=lambda row: row["top1"])

    best = max(layers, key=lambda layer: best_linear(layer)["top1"])
    found = best_linear(best)
    summary = {
        "block": best["block"],
        "lr": found["lr"],
        "top1": found["top1"],
        "top5": found["top5"],
        "knn": best["knn"],
    }
    record = {
        "best": summary,
        "layers": layers,
        "num_classes": num_classes,
        "weights": {"source": weights.source, "kind": weights.kind, "facts": weights.facts},
        "made_from": made_from,
        "settings": json.loads(json.dumps(resolved.as_dict())),
        "command": shown_command(),
        "commit": commit(),
        "versions": versions(),
    }
    neighbours = "".join(f", {k}-NN {top1:.2f}" for k, top1 in best["knn"].items())
    # Said first: a disk that has filled meanwhile takes no figure back.
    sys.stdout.write(
        f"best block {summary['block']} of {weights.model.depth}: linear top-1 {summary['top1']:.2f} "
        f"(lr {summary['lr']:g}), top-5 {summary['top5']:.2f}{neighbours}; all blocks in "
        f"{out / TABLE}\n"
    )
    sys.stdout.flush()
    write_own_json(out / RECORD, OWN_RECORD, record)
    with written_whole(out / TABLE, OWN_TABLE) as temporary:
        text = table(resolved.recipe, layers, weights.source, made_from["image_px"])
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    plot(out / PLOT, layers, weights.source)


if __name__ == "__main__":
    run(main)
