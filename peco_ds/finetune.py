"""Fine-tune a classifier on labelled images, from a run, a release or a weights file, and measure its top-1.

deepspeed peco_ds/finetune.py --recipe finetune_vith14 init.weights=runs/peco_vith14
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # started by path: the package's parent, not its inside
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds.command_line import parse_stage, run, stage_parser
from peco_ds.config import FinetuneRecipe
from peco_ds.errors import EXIT_DONE, EXIT_REQUEUE


def main(argv: list[str] | None = None) -> int:
    parser = stage_parser(__doc__.splitlines()[0], recipe="finetune_vith14", deepspeed_config="zero1.json")
    args, resolved = parse_stage(parser, FinetuneRecipe, argv)
    return dry_run(args, resolved) if args.dry_run else train(args, resolved)


def dry_run(args, resolved) -> int:
    """Check everything that needs no ranks, and say what the run would be and cost."""
    from peco_ds.convert.initialize import check_head, check_sizes
    from peco_ds.convert.read import read_weights
    from peco_ds.data.augment import TrainCrop
    from peco_ds.data.labelled import labelled_sets
    from peco_ds.data_paths import data_path
    from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
    from peco_ds.durations import resolve_durations
    from peco_ds.planner.report import finetune_report
    from peco_ds.planner.stages import IMAGENET_1K_CLASSES, IMAGENET_1K_TRAIN
    from peco_ds.runtime.run_weights import read_run

    cfg = resolved.recipe
    ds_config = read_deepspeed_json(args.deepspeed_config)
    merge_deepspeed(ds_config, args.deepspeed_config, cfg.run, cfg.optim, world_size=1)
    TrainCrop(cfg.augment, cfg.model.image_px)
    sets = {name: data_path(cfg.data, getattr(cfg.data, name)) for name in ("images", "val_images")}
    assumed = not sets["images"].exists()
    if assumed:
        num_samples, num_classes, classes = IMAGENET_1K_TRAIN, IMAGENET_1K_CLASSES, None
    else:
        images, _, classes = labelled_sets(sets["images"], sets["val_images"])
        num_samples, num_classes = images.num_samples, len(classes)
    start = "scratch: init.weights is empty"
    if cfg.init.weights:
        weights = read_weights(
            cfg.init.weights, average=cfg.init.average, statistics=cfg.init.statistics, read_run=read_run
        )
        check_sizes(weights, cfg.model)
        if classes and weights.kind == "classifier" and cfg.init.head == "auto":
            check_head(weights, classes)
        start = f"{weights.source} ({weights.kind})"
    durations = resolve_durations(cfg, num_samples)
    report = finetune_report(
        cfg, num_samples=num_samples, num_classes=num_classes, durations=durations, ds_config=ds_config, assumed=assumed
    )
    missing = [f"{name} {path}: no such folder yet" for name, path in sets.items() if not path.exists()]
    sys.stdout.write("\n".join([report, "", f"starts from         {start}", *missing]) + "\n")
    return EXIT_DONE


def train(args, resolved) -> int:
    from peco_ds.convert.initialize import start_classifier
    from peco_ds.convert.read import read_weights
    from peco_ds.data.augment import TrainCrop
    from peco_ds.data.image_set import BadImages
    from peco_ds.data.labelled import evaluation_batches, labelled_sets, training_batches
    from peco_ds.data.order import rank_positions
    from peco_ds.data_paths import data_path
    from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
    from peco_ds.durations import micro_steps, resolve_durations
    from peco_ds.evaluation.classification import classification_quality
    from peco_ds.models.classifier import build_classifier
    from peco_ds.models.vit import TransformerBlock
    from peco_ds.objectives.soft_labels import soft_label_cross_entropy
    from peco_ds.planner.stages import training_flops
    from peco_ds.runtime.around_steps import around_steps
    from peco_ds.runtime.checkpoint.files import list_checkpoints
    from peco_ds.runtime.checkpoint.save_restore import continues, restore
    from peco_ds.runtime.distributed import seed_all, start_world
    from peco_ds.runtime.ema import WeightEma
    from peco_ds.runtime.engine import set_lr, start_engine
    from peco_ds.runtime.optim import layer_scales, use_layer_norm
    from peco_ds.runtime.rank_log import log_to, stacks_path
    from peco_ds.runtime.run_folder import open_run_folder
    from peco_ds.runtime.run_weights import read_run
    from peco_ds.runtime.timeline import START_UP
    from peco_ds.runtime.watchdog import LONG_S, Watchdog

    START_UP.ends("imports")
    cfg, run = resolved.recipe, resolved.recipe.run
    # bad input is refused before any rank joins another
    ds_config = read_deepspeed_json(args.deepspeed_config)
    use_layer_norm(run)
    images, held_out, classes = labelled_sets(
        data_path(cfg.data, cfg.data.images), data_path(cfg.data, cfg.data.val_images)
    )
    TrainCrop(cfg.augment, cfg.model.image_px)  # a misspelt augment.auto_augment shows here
    durations = resolve_durations(cfg, images.num_samples)
    fingerprint = images.manifest.fingerprint()
    resumed = continues(cfg.checkpoint) and bool(list_checkpoints(args.out))
    weights = (
        read_weights(cfg.init.weights, average=cfg.init.average, statistics=cfg.init.statistics, read_run=read_run)
        if cfg.init.weights and not resumed
        else None
    )
    seed_all(run.seed)  # initial weights follow from the seed alone
    model = build_classifier(
        cfg.model, cfg.classifier, len(classes), activation_checkpointing=run.activation_checkpointing
    )
    fresh = start_classifier(model, weights, cfg.model, classes=classes, head=cfg.init.head) if weights else []

    START_UP.ends("data")
    world = start_world()
    START_UP.ends("ranks")
    # one rank's view of a shared file system may lag behind another's
    first_sees = world.gather_objects(resumed)[0]
    world.agree(
        ""
        if resumed == first_sees
        else f"{args.out}: rank {world.rank} does not see the checkpoints that rank 0 sees; start again in a minute"
    )
    ds_config = merge_deepspeed(ds_config, args.deepspeed_config, run, cfg.optim, world.size)
    provenance = {"images_fingerprint": fingerprint, "num_samples": images.num_samples, "classes": list(classes)}
    origin = origin_of(args.out) if resumed else origin_from(weights, fresh)
    if world.is_main:
        afresh = f"; afresh: {', '.join(origin['fresh'])}" if origin["fresh"] else ""
        sys.stdout.write(
            f"starts from {origin['init']}{afresh}\n"
            if not resumed
            else f"continues a run that started from {origin['init']}\n"
        )
    # else every rank of a node keeps a copy on the host for the whole run
    del weights
    statistics = {name: tuple(origin[name]) for name in ("mean", "std")}
    provenance |= origin
    open_run_folder(args.out, "finetune", resolved, ds_config, provenance, world)
    log_to(args.out, world.rank)
    watchdog = Watchdog(run.hang_timeout_s, stacks_path(args.out, world.rank), rank=world.rank)
    START_UP.ends("records")
    engine = start_engine(
        model,
        ds_config,
        source=args.deepspeed_config,
        run=run,
        optim=cfg.optim,
        leaf_modules=(TransformerBlock,),
        lr_scales=layer_scales(cfg.model.depth, cfg.classifier.layer_decay),
    )
    START_UP.ends("engine")
    ema = WeightEma(engine, cfg.ema.decay) if cfg.ema.decay else None
    # stochastic depth differs between ranks; weights did not
    seed_all(run.seed + 1 + world.rank)
    restored = restore(args.out, engine, cfg.checkpoint, world, fingerprint=fingerprint, seed=run.seed, ema=ema)
    START_UP.ends("checkpoint")
    first_step = restored.progress.step

    positions = rank_positions(run, world.rank, world.size, first_step=first_step, last_step=durations.stop_step)
    bad = BadImages(cfg.data.max_bad_share)
    batches = training_batches(
        images,
        positions,
        data=cfg.data,
        augment=cfg.augment,
        smoothing=cfg.classifier.smoothing,
        num_classes=len(classes),
        image_px=cfg.model.image_px,
        seed=run.seed,
        device=world.device,
        bad=bad,
        **statistics,
    )

    def accuracy() -> dict[str, float]:
        """Top-1, top-5 and loss on the held-out images, with the weights as the engine holds them now. Collective."""
        batches = evaluation_batches(
            held_out,
            rank=world.rank,
            world_size=world.size,
            batch=cfg.evaluation.batch or run.micro_batch,
            image_px=cfg.model.image_px,
            crop=cfg.evaluation.crop,
            **statistics,
            num_workers=cfg.data.num_workers,
            device=world.device,
        )
        engine.eval()
        quality = classification_quality(engine, batches, num_classes=len(classes), device=world.device)
        engine.train()
        return quality

    def evaluate(step: int) -> dict[str, float]:
        with meter.paused("evaluation"), watchdog.during("evaluation", LONG_S):
            quality = accuracy()
            if ema:
                with ema.applied():
                    quality |= {f"ema_{name}": value for name, value in accuracy().items() if name != "images"}
        meter.evaluation(step, quality)
        return quality

    guard, meter, saver = around_steps(
        args.out,
        engine,
        restored,
        run=run,
        checkpoint=cfg.checkpoint,
        durations=durations,
        num_samples=images.num_samples,
        training_flops=training_flops(cfg, len(classes)),
        bad=bad,
        world=world,
        ema=ema,
    )
    with meter, watchdog:
        # A run that was stopped between its save and its evaluation makes up for it here.
        quality = evaluate(first_step) if first_step and durations.evaluate_after(first_step) else {}
        for step in range(first_step, durations.stop_step):
            lr = set_lr(engine, cfg.optim, cfg.schedule, durations, step)
            for _ in range(micro_steps(run, world.size)):
                batch = meter.next(batches)
                loss, stats = soft_label_cross_entropy(engine(batch.images_norm), batch.targets)
                meter.add(loss, stats)
                # accumulation, loss scale, clipping: the engine's
                engine.backward(guard.watch(loss, batch.keys))
                engine.step()
            applied = guard.close_step(step + 1)
            if ema and applied:
                ema.update(step + 1)
            meter.close_step(step + 1, engine, lr, applied=applied, skipped=guard.total_skipped)
            with watchdog.during("saving", LONG_S):
                stopping = saver.close_step(step + 1)
            # a stop has seconds, an evaluation may take minutes
            if durations.evaluate_after(step + 1) and not stopping:
                quality = evaluate(step + 1)
            watchdog.beat(step + 1)
            if stopping:
                meter.close(EXIT_REQUEUE)
                return EXIT_REQUEUE
        with watchdog.during("saving", LONG_S):
            saver.finish()
        meter.close()
    if world.is_main:
        sys.stdout.write(
            f"{durations.stop_step} of {durations.total_steps} steps done, checkpoints in {args.out / 'checkpoints'}\n"
        )
        if quality:
            average = f", moving average {quality['ema_top1']:.2f}" if ema else ""
            sys.stdout.write(f"top-1 {quality['top1']:.2f}{average} on {quality['images']} images\n")
    return EXIT_DONE


def origin_from(weights, fresh: list[str]) -> dict:
    """What a run folder records of its start."""
    from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD

    if weights is None:
        return {"init": "scratch", "init_facts": {}, "fresh": [], "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    # Images go on as the weights know them: the BEiT files that timm and Hugging Face host have seen 0.5, 0.5, not
    # ImageNet's statistics.
    return {
        "init": weights.source,
        "init_facts": weights.facts,
        "fresh": fresh,
        "mean": weights.mean,
        "std": weights.std,
    }


def origin_of(run_folder: Path) -> dict:
    """The same of a run that goes on; what it started from may have been removed since."""
    from peco_ds.runtime.run_folder import read_provenance

    recorded = read_provenance(run_folder)
    fresh = origin_from(None, [])
    # the folder may be another stage's, which open_run_folder refuses
    return {name: recorded.get(name, fresh[name]) for name in fresh}


if __name__ == "__main__":
    run(main)
