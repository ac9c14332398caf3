"""Train a segmenter on images with class maps, from a run, a release or a weights file, and measure its mIoU.

deepspeed peco_ds/segment.py --recipe segment_vitb16 init.weights=runs/peco_vitb16
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python looks beside the package, not inside it.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds import command_line
from peco_ds.config import SegmentRecipe
from peco_ds.data_paths import data_path
from peco_ds.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = command_line.stage_parser(__doc__.splitlines()[0], recipe="segment_vitb16", deepspeed_config="zero1.json")
    args, resolved = command_line.parse_stage(parser, SegmentRecipe, argv)
    return dry_run(args, resolved) if args.dry_run else train(args, resolved)


def dry_run(args, resolved) -> int:
    from peco_ds.convert.initialize import check_sizes
    from peco_ds.convert.read_segmenter import read_weights_or_segmenter
    from peco_ds.data.scenes import scene_sets
    from peco_ds.runtime.dense_weights import read_segmenter_start
    from peco_ds.runtime.dry_run import dry_run
    from peco_ds.runtime.start_weights import lines_of_start

    cfg = resolved.recipe

    def look(manifest) -> tuple[dict, list[str]]:
        sets = {name: data_path(cfg.data, getattr(cfg.data, name)) for name in ("images", "val_images")}
        classes = scene_sets(*sets.values())[2] if all(path.exists() for path in sets.values()) else ()
        weights = read_segmenter_start(read_weights_or_segmenter, cfg.init) if cfg.init.weights else None
        if weights:
            check_sizes(weights, cfg.model)
        return {"num_classes": len(classes) or None}, lines_of_start(weights, sets)

    return dry_run(args, resolved, look)


def train(args, resolved) -> int:
    from peco_ds.convert.read_segmenter import read_weights_or_segmenter
    from peco_ds.convert.start_segmenter import BRANCHES, HEADS, start_segmenter
    from peco_ds.data.scenes import scene_batches, scene_sets
    from peco_ds.models.dense_backbone import DenseBlock
    from peco_ds.models.segmenter import build_segmenter
    from peco_ds.objectives.pixel_loss import segmentation_loss
    from peco_ds.planner.mfu import training_flops
    from peco_ds.runtime.dense_weights import read_segmenter_start
    from peco_ds.runtime.optim import layer_scales
    from peco_ds.runtime.run import START_UP, Run
    from peco_ds.runtime.run_folder import refuse_foreign_folder
    from peco_ds.runtime.start_weights import origin_from, origin_of, tell_origin

    START_UP.ends("imports")
    cfg, settings = resolved.recipe, resolved.recipe.segmenter
    refuse_foreign_folder(args.out)
    images, held_out, classes = scene_sets(
        *(data_path(cfg.data, path) for path in (cfg.data.images, cfg.data.val_images))
    )
    with Run.start(args, resolved, "segment", images, held_out) as run:
        check_statistics_batch(run.cfg.run.micro_batch, run.world.size)
        starts = cfg.init.weights and not run.resumes
        weights = read_segmenter_start(read_weights_or_segmenter, cfg.init) if starts else None
        run.record({"classes": list(classes)})
        run.seed_weights()
        model = build_segmenter(
            cfg.model,
            settings,
            len(classes),
            activation_checkpointing=cfg.run.activation_checkpointing,
            all_reduce=run.world.all_reduce,
        )
        fresh = start_segmenter(model, weights, cfg, classes) if weights else [BRANCHES, HEADS]
        origin = origin_of(args.out) if run.resumes else origin_from(weights, fresh)
        # Otherwise every rank of a node keeps a copy on the host for the whole run.
        del weights
        run.record(origin)
        tell_origin(origin, run)
        statistics = {name: tuple(origin[name]) for name in ("mean", "std")}
        run.attach(
            model,
            training_flops=training_flops(cfg, len(classes)),
            leaf_modules=(DenseBlock,),
            lr_scales=layer_scales(cfg.model.depth, settings.layer_decay, prefix="backbone."),
        )
        batches = scene_batches(images, run.positions(), cfg, run.world.device, run.bad_images, **statistics)
        # A run that was stopped between its save and its evaluation makes up for it here.
        behind = run.first_step > 0 and run.durations.evaluate_after(run.first_step)
        quality = evaluate(run, held_out, run.first_step, statistics) if behind else {}
        for step in run.steps():
            for batch in run.micro_batches(batches):
                outputs = run.engine(batch.images_norm)
                loss, stats = segmentation_loss(
                    outputs, batch.labels, over=settings.loss_over, auxiliary_weight=settings.auxiliary_weight
                )
                run.backward(loss, stats, batch.keys)
            run.finish_step()
            # A stop has seconds, an evaluation may take minutes.
            if run.durations.evaluate_after(step + 1) and not run.stopping:
                quality = evaluate(run, held_out, step + 1, statistics)
    if run.world.is_main and quality and not run.stopping:
        sys.stdout.write(f"mIoU {quality['miou']:.2f}, aAcc {quality['aacc']:.2f}, on {quality['images']} images\n")
    return run.exit_code


def check_statistics_batch(micro_batch: int, world_size: int) -> None:
    """Raises: UserError if batch norm would see one image a pass: where a map is pooled to one place, that is one
    value.
    """
    if micro_batch * world_size < 2:
        raise UserError(
            f"run.micro_batch {micro_batch} x {world_size} rank: batch norm needs two images a pass over all "
            "ranks; set run.micro_batch=2, or start more ranks"
        )


def evaluate(run, held_out, step: int, statistics: dict) -> dict[str, float]:
    """mIoU, aAcc and mAcc on the held-out scenes; a row of evaluation.jsonl, segmentation.png. Collective."""
    from peco_ds.data.scenes import evaluation_scenes
    from peco_ds.evaluation.reconstruction import save_png
    from peco_ds.evaluation.scene_picture import scene_grid
    from peco_ds.evaluation.segmentation import ScenePredictor, segmentation_quality

    cfg, world = run.cfg, run.world
    predict = ScenePredictor(
        lambda images_norm: run.engine(images_norm).logits,
        cfg.evaluation,
        cfg.model,
        batch=cfg.evaluation.batch or cfg.run.micro_batch,
        most_passes=lambda passes: max(world.gather_objects(passes)),
        **statistics,
    )
    num_classes, shown = len(held_out.manifest.classes), cfg.evaluation.shown_images if world.is_main else 0
    with run.evaluating():
        run.engine.eval()
        scenes = evaluation_scenes(held_out, world, num_workers=cfg.data.num_workers)
        quality, kept = segmentation_quality(predict, scenes, num_classes, world, shown=shown)
        run.engine.train()
    run.meter.evaluation(step, quality)
    if world.is_main:
        grid = scene_grid(kept)
        run.meter.image("image | labels | prediction", grid, step)
        save_png(run.out / "segmentation.png", grid)
    return quality


if __name__ == "__main__":
    command_line.run(main)
