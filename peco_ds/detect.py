"""Train Mask R-CNN on images with COCO annotations, from a run, a release or a weights file, and measure its AP.

deepspeed peco_ds/detect.py --recipe detect_vitb16 init.weights=runs/peco_vitb16
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python looks beside the package, not inside it.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds import command_line
from peco_ds.config import DetectRecipe
from peco_ds.data_paths import data_path


def main(argv: list[str] | None = None) -> int:
    parser = command_line.stage_parser(__doc__.splitlines()[0], recipe="detect_vitb16", deepspeed_config="zero1.json")
    args, resolved = command_line.parse_stage(parser, DetectRecipe, argv)
    return dry_run(args, resolved) if args.dry_run else train(args, resolved)


def dry_run(args, resolved) -> int:
    from peco_ds.convert.initialize import check_sizes
    from peco_ds.convert.read import read_weights
    from peco_ds.data.objects import object_sets
    from peco_ds.runtime.dry_run import dry_run
    from peco_ds.runtime.start_weights import lines_of_start, read_start

    cfg = resolved.recipe

    def look(manifest) -> tuple[dict, list[str]]:
        sets = {name: data_path(cfg.data, getattr(cfg.data, name)) for name in ("images", "val_images")}
        there = all(path.exists() for path in sets.values())
        classes = object_sets(sets["images"], sets["val_images"])[0].classes if there else ()
        weights = read_start(read_weights, cfg.init) if cfg.init.weights else None
        if weights and not cfg.detector.resample_patch:
            check_sizes(weights, cfg.model)
        return {"num_classes": len(classes) or None}, lines_of_start(weights, sets)

    return dry_run(args, resolved, look)


def train(args, resolved) -> int:
    from peco_ds.convert.read import read_weights
    from peco_ds.data.objects import object_batches, object_sets
    from peco_ds.evaluation.detection import read_annotations
    from peco_ds.models.vit import TransformerBlock
    from peco_ds.planner.mfu import training_flops
    from peco_ds.runtime.optim import layer_scales
    from peco_ds.runtime.run import START_UP, Run
    from peco_ds.runtime.run_folder import refuse_foreign_folder
    from peco_ds.runtime.start_weights import origin_from, origin_of, read_start, tell_origin

    START_UP.ends("imports")
    cfg = resolved.recipe
    refuse_foreign_folder(args.out)
    images, held_out = object_sets(data_path(cfg.data, cfg.data.images), data_path(cfg.data, cfg.data.val_images))
    # A damaged file shows here, not after the first epoch.
    annotations = read_annotations(held_out.annotation_file)
    with Run.start(args, resolved, "detect", images, held_out) as run:
        weights = read_start(read_weights, cfg.init) if cfg.init.weights and not run.resumes else None
        run.record({"classes": list(images.classes), "category_ids": list(images.category_ids)})
        run.seed_weights()
        origin = origin_of(args.out) if run.resumes else origin_from(weights, ["pyramid", "heads"])
        model = build(cfg, len(images.classes), run.world, origin)
        if weights:
            start(model, weights, cfg)
        # Otherwise every rank of a node keeps a copy on the host for the whole run.
        del weights
        run.record(origin)
        tell_origin(origin, run)
        run.attach(
            model,
            training_flops=training_flops(cfg, len(images.classes)),
            leaf_modules=(TransformerBlock,),
            lr_scales=layer_scales(cfg.model.depth, cfg.detector.layer_decay, prefix="backbone."),
        )
        batches = object_batches(images, run.positions(), cfg, run.world.device, run.bad_images)
        # A run that was stopped between its save and its evaluation makes up for it here.
        behind = run.first_step > 0 and run.durations.evaluate_after(run.first_step)
        quality = evaluate(run, held_out, annotations, run.first_step) if behind else {}
        for step in run.steps():
            for batch in run.micro_batches(batches):
                losses = run.engine(batch.images_u8, batch.targets)
                run.backward(sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}, batch.keys)
            run.finish_step()
            # A stop has seconds, an evaluation may take minutes.
            if run.durations.evaluate_after(step + 1) and not run.stopping:
                quality = evaluate(run, held_out, annotations, step + 1)
    if run.world.is_main and quality and not run.stopping:
        found = "  ".join(f"{name} AP {quality.get(f'{name}_ap', 0):.1f}" for name in ("box", "mask"))
        sys.stdout.write(f"{found} on {quality['images']} images\n")
    return run.exit_code


def build(cfg: DetectRecipe, num_classes: int, world, origin: dict):
    """The detector of a recipe, for the image statistics of its start."""
    from peco_ds.models.mask_rcnn import build_detector

    return build_detector(
        cfg.model,
        cfg.detector,
        num_classes,
        # Images of one shape, so that a compiled block has one graph.
        square_px=cfg.augment.long_px if cfg.augment.kind == "scale_jitter" else 0,
        mean=tuple(origin["mean"]),
        std=tuple(origin["std"]),
        all_reduce=world.all_reduce,
        activation_checkpointing=cfg.run.activation_checkpointing,
    )


def start(model, weights, cfg: DetectRecipe) -> None:
    from peco_ds.convert.initialize import start_detector

    start_detector(model.backbone, weights, cfg.model, resample_patch=cfg.detector.resample_patch)


def evaluate(run, held_out, annotations, step: int) -> dict[str, float]:
    """Box and mask AP on the held-out images; a row of evaluation.jsonl, images of what was found. Collective."""
    from peco_ds.data.objects import detection_batches
    from peco_ds.evaluation.detection import detection_quality
    from peco_ds.evaluation.detection_images import detections_image
    from peco_ds.evaluation.reconstruction import save_png

    cfg, world = run.cfg, run.world
    with run.evaluating():
        run.engine.eval()
        batches = detection_batches(
            held_out, cfg.augment, world, batch=cfg.evaluation.batch, num_workers=cfg.data.num_workers
        )
        quality, rows = detection_quality(run.engine, batches, held_out, annotations, world)
        run.engine.train()
        if world.is_main and cfg.evaluation.grid_images:
            image = detections_image(held_out, rows, cfg.evaluation.grid_images)
            run.meter.image("annotated | found", image, step)
            save_png(run.out / "detections.png", image)
    run.meter.evaluation(step, quality)
    return quality


if __name__ == "__main__":
    command_line.run(main)
