"""Train a tokenizer on image shards, under DeepSpeed: PeCo's perceptual VQ, or BEiT v2's VQ-KD.

    deepspeed peco_ds/train_tokenizer.py --recipe peco_tokenizer perceptual.weights=vit-b-300ep.pth.tar
    deepspeed peco_ds/train_tokenizer.py --recipe beitv2_tokenizer teacher.weights=ViT-B-16.pt

The last act writes OUT/tokenizer, the release folder that tokenize_shards.py and pretrain.py read.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # started by path: the package's parent, not its inside
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds.command_line import parse_stage, run, stage_parser
from peco_ds.config import TokenizerRecipe
from peco_ds.errors import EXIT_DONE, EXIT_REQUEUE


def main(argv: list[str] | None = None) -> int:
    parser = stage_parser(__doc__.splitlines()[0], recipe="peco_tokenizer", deepspeed_config="zero1.json")
    args, resolved = parse_stage(parser, TokenizerRecipe, argv)
    return dry_run(args, resolved) if args.dry_run else train(args, resolved)


def dry_run(args, resolved) -> int:
    from peco_ds.data_paths import data_path
    from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
    from peco_ds.durations import resolve_durations
    from peco_ds.models.frozen_net import frozen_net_at_hand
    from peco_ds.planner.report import tokenizer_report
    from peco_ds.planner.stages import IMAGENET_1K_TRAIN
    from peco_ds.schema import ImageManifest, read_manifest

    cfg = resolved.recipe
    ds_config = read_deepspeed_json(args.deepspeed_config)
    merge_deepspeed(ds_config, args.deepspeed_config, cfg.run, cfg.optim, world_size=1)
    images = data_path(cfg.data, cfg.data.images)
    assumed = not images.exists()
    num_samples = IMAGENET_1K_TRAIN if assumed else read_manifest(images, ImageManifest).samples
    frozen = frozen_net_at_hand(cfg)
    report = tokenizer_report(
        cfg,
        num_samples=num_samples,
        durations=resolve_durations(cfg, num_samples),
        ds_config=ds_config,
        assumed=assumed,
    )
    sys.stdout.write(f"{report}\n\njudge or teacher    {frozen}\n")
    return EXIT_DONE


def train(args, resolved) -> int:
    from peco_ds.data.image_set import BadImages, ImageSet
    from peco_ds.data.loaders import crop_batches, held_out_images, training_order
    from peco_ds.data.order import rank_positions
    from peco_ds.data_paths import data_path
    from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
    from peco_ds.durations import micro_steps, resolve_durations
    from peco_ds.evaluation.reconstruction import HeldOut
    from peco_ds.models.critic import with_critic
    from peco_ds.models.frozen_net import load_frozen_net
    from peco_ds.models.tokenizers import build_tokenizer
    from peco_ds.models.vq import usage
    from peco_ds.objectives.tokenizer_losses import build_tokenizer_objective
    from peco_ds.planner.stages import training_flops
    from peco_ds.runtime.around_steps import around_steps
    from peco_ds.runtime.checkpoint.files import list_checkpoints
    from peco_ds.runtime.checkpoint.save_restore import continues, restore
    from peco_ds.runtime.codebook_init import init_codebook
    from peco_ds.runtime.distributed import seed_all, start_world
    from peco_ds.runtime.engine import set_lr, start_engine
    from peco_ds.runtime.optim import use_layer_norm
    from peco_ds.runtime.rank_log import log_to, stacks_path
    from peco_ds.runtime.run_folder import open_run_folder
    from peco_ds.runtime.timeline import START_UP
    from peco_ds.runtime.watchdog import LONG_S, Watchdog

    START_UP.ends("imports")
    cfg, run = resolved.recipe, resolved.recipe.run
    # bad input is refused before any rank joins another
    ds_config = read_deepspeed_json(args.deepspeed_config)
    use_layer_norm(run)
    images = ImageSet(data_path(cfg.data, cfg.data.images))
    fingerprint = images.manifest.fingerprint()
    order = training_order(images, cfg.data, run.seed)
    durations = resolve_durations(cfg, order.num_samples)
    frozen = load_frozen_net(cfg)
    held_out = held_out_images(images, cfg.data, cfg.evaluation.max_images, cfg.views.tokenizer_px)

    START_UP.ends("data")
    world = start_world()
    START_UP.ends("ranks")
    ds_config = merge_deepspeed(ds_config, args.deepspeed_config, run, cfg.optim, world.size)
    judged = {"judge": frozen.description, "judge_licence": frozen.licence} if frozen else {"judge": "none"}
    provenance = {"images_fingerprint": fingerprint, "num_samples": order.num_samples, **judged}
    open_run_folder(args.out, "train_tokenizer", resolved, ds_config, provenance, world)
    log_to(args.out, world.rank)
    watchdog = Watchdog(run.hang_timeout_s, stacks_path(args.out, world.rank), rank=world.rank)

    def crops(first_step: int, last_step: int, bad: BadImages | None = None):
        positions = rank_positions(run, world.rank, world.size, first_step=first_step, last_step=last_step)
        return crop_batches(images, order, positions, data=cfg.data, views=cfg.views, device=world.device, bad=bad)

    START_UP.ends("records")
    # initial weights follow from the seed alone, whatever was drawn while the data were opened
    seed_all(run.seed)
    tokenizer = build_tokenizer(cfg.tokenizer, seed=run.seed).to(world.device)
    resumed = continues(cfg.checkpoint) and any(world.gather_objects(bool(list_checkpoints(args.out))))
    if cfg.tokenizer.kmeans_iters and not resumed:
        init_codebook(tokenizer, (batch.images_11 for batch in crops(0, sys.maxsize)), cfg.tokenizer, run.seed, world)
    model = with_critic(tokenizer, cfg.adversarial).to(world.device)
    START_UP.ends("model")
    engine = start_engine(
        model,
        ds_config,
        source=args.deepspeed_config,
        run=run,
        optim=cfg.optim,
        lr_scales={"critic.": cfg.adversarial.lr / cfg.optim.lr},
    )
    START_UP.ends("engine")
    seed_all(run.seed + 1 + world.rank)
    restored = restore(args.out, engine, cfg.checkpoint, world, fingerprint=fingerprint, seed=run.seed)
    START_UP.ends("checkpoint")
    first_step = restored.progress.step

    frozen = frozen.to(world.device) if frozen else None
    objective = build_tokenizer_objective(cfg, frozen)
    bad = BadImages(cfg.data.max_bad_share)
    guard, meter, saver = around_steps(
        args.out,
        engine,
        restored,
        run=run,
        checkpoint=cfg.checkpoint,
        durations=durations,
        num_samples=order.num_samples,
        training_flops=training_flops(cfg),
        bad=bad,
        world=world,
    )
    evaluation = HeldOut(
        held_out,
        cfg.evaluation,
        tokenizer=tokenizer,
        frozen=frozen,
        batch=run.micro_batch,
        out=args.out,
        world=world,
        meter=meter,
    )

    def evaluate(step: int) -> None:
        with meter.paused("evaluation"), watchdog.during("evaluation", LONG_S):
            evaluation(engine, step)

    with meter, watchdog:
        evaluate(first_step)
        batches = crops(first_step, durations.stop_step, bad)
        for step in range(first_step, durations.stop_step):
            lr = set_lr(engine, cfg.optim, cfg.schedule, durations, step)
            for _ in range(micro_steps(run, world.size)):
                batch = meter.next(batches)
                outputs = engine(batch.images_11)
                loss, stats = objective(outputs, batch.images_11, step)
                meter.add(loss, stats)
                # accumulation, loss scale, clipping: the engine's
                engine.backward(guard.watch(loss, batch.keys))
                engine.step()
            applied = guard.close_step(step + 1)
            counts = tokenizer.codebook.update(world.all_reduce, applied=applied)
            meter.close_step(
                step + 1,
                engine,
                lr,
                lambda counts=counts, applied=applied: usage(counts) if applied else {},
                applied=applied,
                skipped=guard.total_skipped,
            )
            with watchdog.during("saving", LONG_S):
                stopping = saver.close_step(step + 1)
            last = step + 1 == durations.stop_step
            # a stop has seconds; the next start makes up for it
            if last or (evaluation.due(step + 1) and not stopping):
                evaluate(step + 1)
            watchdog.beat(step + 1)
            if stopping and not last:
                meter.close(EXIT_REQUEUE)
                return EXIT_REQUEUE
        with watchdog.during("saving", LONG_S):
            saver.finish()
        meter.close()
    if durations.stop_step == durations.total_steps and world.is_main:
        release(args.out, cfg, evaluation.last, judged)
    world.barrier()
    return EXIT_DONE


def release(out: Path, cfg: TokenizerRecipe, quality: dict[str, float], judged: dict[str, str]) -> None:
    """Write OUT/tokenizer from the newest checkpoint."""
    from peco_ds.evaluation.reconstruction import quality_line
    from peco_ds.models.tokenizers import save_tokenizer
    from peco_ds.runtime.checkpoint.consolidate import fp32_weights
    from peco_ds.runtime.checkpoint.files import newest_whole, read_progress

    checkpoint = newest_whole(out)
    progress = read_progress(checkpoint)
    weights = {
        name.removeprefix("tokenizer."): tensor
        for name, tensor in fp32_weights(checkpoint).items()
        if not name.startswith("critic.")
    }
    facts = {"recipe": cfg.name, "steps": progress.step, "images_seen": progress.cursor.samples, **judged, **quality}
    fingerprint = save_tokenizer(out / "tokenizer", weights, cfg.tokenizer, facts)
    sys.stdout.write(
        f"tokenizer {fingerprint[:12]}: {quality_line(quality, cfg.tokenizer.num_codes)}, in {out / 'tokenizer'}\n"
    )


if __name__ == "__main__":
    run(main)
