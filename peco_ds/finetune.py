"""Fine-tune a classifier on labelled images, from a run, a release or a weights file, and measure its top-1.

deepspeed peco_ds/finetune.py --recipe finetune_vith14 init.weights=runs/peco_vith14
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python looks beside the package, not inside it.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds import command_line
from peco_ds.config import FinetuneRecipe
from peco_ds.data_paths import data_path


def main(argv: list[str] | None = None) -> int:
    parser = command_line.stage_parser(__doc__.splitlines()[0], recipe="finetune_vith14", deepspeed_config="zero1.json")
    args, resolved = command_line.parse_stage(parser, FinetuneRecipe, argv)
    return dry_run(args, resolved) if args.dry_run else train(args, resolved)


def dry_run(args, resolved) -> int:
    from peco_ds.convert.initialize import check_head, check_sizes
    from peco_ds.convert.read import read_weights
    from peco_ds.data.augment import TrainCrop
    from peco_ds.data.labelled import labelled_sets
    from peco_ds.runtime.dry_run import dry_run
    from peco_ds.runtime.start_weights import lines_of_start, read_start

    cfg = resolved.recipe

    def look(manifest) -> tuple[dict, list[str]]:
        TrainCrop(cfg.augment, cfg.model.image_px)
        sets = {name: data_path(cfg.data, getattr(cfg.data, name)) for name in ("images", "val_images")}
        classes = labelled_sets(sets["images"], sets["val_images"])[2] if manifest else ()
        weights = read_start(read_weights, cfg.init) if cfg.init.weights else None
        if weights:
            check_sizes(weights, cfg.model)
            if classes and weights.kind == "classifier" and cfg.init.head == "auto":
                check_head(weights, classes)
        return {"num_classes": len(classes) or None}, lines_of_start(weights, sets)

    return dry_run(args, resolved, look)


def train(args, resolved) -> int:
    from peco_ds.convert.initialize import start_classifier
    from peco_ds.convert.read import read_weights
    from peco_ds.data.augment import TrainCrop
    from peco_ds.data.labelled import labelled_sets, training_batches
    from peco_ds.models.classifier import build_classifier
    from peco_ds.models.vit import TransformerBlock
    from peco_ds.objectives.soft_labels import soft_label_cross_entropy
    from peco_ds.planner.mfu import training_flops
    from peco_ds.runtime.optim import layer_scales
    from peco_ds.runtime.run import START_UP, Run
    from peco_ds.runtime.run_folder import refuse_foreign_folder
    from peco_ds.runtime.start_weights import origin_from, origin_of, read_start, tell_origin

    START_UP.ends("imports")
    cfg = resolved.recipe
    refuse_foreign_folder(args.out)
    images, held_out, classes = labelled_sets(
        data_path(cfg.data, cfg.data.images), data_path(cfg.data, cfg.data.val_images)
    )
    # A misspelt augment.auto_augment shows here.
    TrainCrop(cfg.augment, cfg.model.image_px)
    with Run.start(args, resolved, "finetune", images, held_out) as run:
        weights = read_start(read_weights, cfg.init) if cfg.init.weights and not run.resumes else None
        run.record({"classes": list(classes)})
        run.seed_weights()
        model = build_classifier(
            cfg.model, cfg.classifier, len(classes), activation_checkpointing=cfg.run.activation_checkpointing
        )
        fresh = start_classifier(model, weights, cfg.model, classes=classes, head=cfg.init.head) if weights else []
        origin = origin_of(args.out) if run.resumes else origin_from(weights, fresh)
        # Otherwise every rank of a node keeps a copy on the host for the whole run.
        del weights
        run.record(origin)
        tell_origin(origin, run)
        statistics = {name: tuple(origin[name]) for name in ("mean", "std")}
        run.attach(
            model,
            training_flops=training_flops(cfg, len(classes)),
            leaf_modules=(TransformerBlock,),
            lr_scales=layer_scales(cfg.model.depth, cfg.classifier.layer_decay),
            ema_decay=cfg.ema.decay,
        )
        batches = training_batches(images, run.positions(), cfg, run.world.device, run.bad_images, **statistics)
        # A run that was stopped between its save and its evaluation makes up for it here.
        behind = run.first_step > 0 and run.durations.evaluate_after(run.first_step)
        quality = evaluate(run, held_out, run.first_step, statistics) if behind else {}
        for step in run.steps():
            for batch in run.micro_batches(batches):
                outputs = run.engine(batch.images_norm)
                run.backward(*soft_label_cross_entropy(outputs, batch.targets), batch.keys)
            if run.step_applied() and run.ema:
                run.ema.update(step + 1)
            run.finish_step()
            # A stop has seconds, an evaluation may take minutes.
            if run.durations.evaluate_after(step + 1) and not run.stopping:
                quality = evaluate(run, held_out, step + 1, statistics)
    if run.world.is_main and quality and not run.stopping:
        average = f", moving average {quality['ema_top1']:.2f}" if run.ema else ""
        sys.stdout.write(f"top-1 {quality['top1']:.2f}{average} on {quality['images']} images\n")
    return run.exit_code


def evaluate(run, held_out, step: int, statistics: dict) -> dict[str, float]:
    """Top-1, top-5 and loss on the held-out images, of the weights as the engine holds them and of their moving
    average (`ema_...`); a row of evaluation.jsonl. Collective.
    """
    from peco_ds.data.labelled import CropSettings, evaluation_batches
    from peco_ds.evaluation.classification import classification_quality

    cfg, world = run.cfg, run.world
    crops = CropSettings(cfg.model.image_px, cfg.evaluation.crop, **statistics)

    def accuracy() -> dict[str, float]:
        batches = evaluation_batches(
            held_out, crops, world, batch=cfg.evaluation.batch or cfg.run.micro_batch, num_workers=cfg.data.num_workers
        )
        run.engine.eval()
        quality = classification_quality(
            run.engine, batches, num_classes=len(held_out.manifest.classes), device=world.device
        )
        run.engine.train()
        return quality

    with run.evaluating():
        quality = accuracy()
        if run.ema:
            with run.ema.applied():
                quality |= {f"ema_{name}": value for name, value in accuracy().items() if name != "images"}
    run.meter.evaluation(step, quality)
    return quality


if __name__ == "__main__":
    command_line.run(main)
