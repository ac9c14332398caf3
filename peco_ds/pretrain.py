"""Masked pre-training: token shards -> checkpoints, under ZeRO 0..3 as the DeepSpeed JSON says.

deepspeed peco_ds/pretrain.py --deepspeed_config ds_configs/zero3.json
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # started by path: the package's parent, not its inside
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds.command_line import parse_stage, run, stage_parser
from peco_ds.config import ONLINE, PretrainRecipe
from peco_ds.errors import EXIT_DONE, EXIT_REQUEUE


def main(argv: list[str] | None = None) -> int:
    parser = stage_parser(__doc__.splitlines()[0], recipe="peco_vith14", deepspeed_config="zero3.json")
    args, resolved = parse_stage(parser, PretrainRecipe, argv)
    return dry_run(args, resolved) if args.dry_run else train(args, resolved)


def dry_run(args, resolved) -> int:
    """Check everything that needs no ranks, and say what the run would be and cost."""
    from peco_ds.data_paths import data_path
    from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
    from peco_ds.durations import resolve_durations
    from peco_ds.planner.report import pretrain_report
    from peco_ds.planner.stages import IMAGENET_1K_TRAIN
    from peco_ds.schema import ImageManifest, read_manifest

    cfg = resolved.recipe
    ds_config = read_deepspeed_json(args.deepspeed_config)
    merge_deepspeed(ds_config, args.deepspeed_config, cfg.run, cfg.optim, world_size=1)
    images = data_path(cfg.data, cfg.data.images)
    assumed = not images.exists()
    num_samples = IMAGENET_1K_TRAIN if assumed else read_manifest(images, ImageManifest).samples
    tokens, tokenizer = data_path(cfg.data, cfg.data.tokens), data_path(cfg.data, cfg.data.tokenizer)
    found = "not there yet" if cfg.data.tokens != ONLINE else "computed online"
    fingerprint = None
    if tokenizer.exists():
        from peco_ds.models.tokenizers import read_card
        from peco_ds.runtime.token_source import check_pair

        card = read_card(tokenizer)
        check_pair(card, cfg, str(tokenizer))
        fingerprint = card.fingerprint
    if not assumed and cfg.data.tokens != ONLINE and tokens.exists():
        from peco_ds.data.token_shards import TokenSet

        TokenSet(
            tokens,
            read_manifest(images, ImageManifest),
            num_codes=cfg.objective.num_codes,
            grid=cfg.model.grid,
            views=cfg.views,
            tokenizer_fingerprint=fingerprint,
        )
        found = "fit images and recipe" + ("" if fingerprint else "; the tokenizer is not at hand to compare")
    durations = resolve_durations(cfg, num_samples)
    report = pretrain_report(
        cfg,
        num_samples=num_samples,
        num_views=cfg.views.count,
        durations=durations,
        ds_config=ds_config,
        assumed=assumed,
    )
    sys.stdout.write(f"{report}\n\ntokens              {found} ({cfg.data.tokens})\n")
    return EXIT_DONE


def train(args, resolved) -> int:
    from peco_ds.data.image_set import BadImages, ImageSet
    from peco_ds.data.loaders import masked_batches
    from peco_ds.data.order import rank_positions
    from peco_ds.data_paths import data_path
    from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
    from peco_ds.durations import micro_steps, resolve_durations
    from peco_ds.models.mim import build_mim
    from peco_ds.models.vit import TransformerBlock
    from peco_ds.objectives import build_objective
    from peco_ds.planner.stages import training_flops
    from peco_ds.runtime.around_steps import around_steps
    from peco_ds.runtime.checkpoint.save_restore import restore
    from peco_ds.runtime.distributed import seed_all, start_world
    from peco_ds.runtime.engine import set_lr, start_engine
    from peco_ds.runtime.optim import use_layer_norm
    from peco_ds.runtime.rank_log import log_to, stacks_path
    from peco_ds.runtime.run_folder import open_run_folder
    from peco_ds.runtime.timeline import START_UP
    from peco_ds.runtime.token_source import open_tokens, token_provenance
    from peco_ds.runtime.watchdog import LONG_S, Watchdog

    START_UP.ends("imports")
    cfg, run = resolved.recipe, resolved.recipe.run
    objective = build_objective(cfg.objective)
    # bad input is refused before any rank joins another
    ds_config = read_deepspeed_json(args.deepspeed_config)
    use_layer_norm(run)
    images = ImageSet(data_path(cfg.data, cfg.data.images))
    fingerprint = images.manifest.fingerprint()
    durations = resolve_durations(cfg, images.num_samples)

    START_UP.ends("data")
    world = start_world()
    START_UP.ends("ranks")
    ds_config = merge_deepspeed(ds_config, args.deepspeed_config, run, cfg.optim, world.size)
    tokens = open_tokens(cfg, images, world, tokenizer_named="data.tokenizer" in resolved.sources)
    START_UP.ends("data")
    provenance = {
        "images_fingerprint": fingerprint,
        "num_samples": images.num_samples,
        **token_provenance(cfg, tokens),
    }
    open_run_folder(args.out, "pretrain", resolved, ds_config, provenance, world)
    log_to(args.out, world.rank)
    watchdog = Watchdog(run.hang_timeout_s, stacks_path(args.out, world.rank), rank=world.rank)
    START_UP.ends("records")

    # initial weights follow from the seed alone, whatever was drawn while the data were opened
    seed_all(run.seed)
    model = build_mim(
        cfg.model,
        cfg.encoding,
        cfg.aggregation,
        cfg.objective.num_codes,
        activation_checkpointing=run.activation_checkpointing,
    )
    START_UP.ends("model")
    engine = start_engine(
        model, ds_config, source=args.deepspeed_config, run=run, optim=cfg.optim, leaf_modules=(TransformerBlock,)
    )
    START_UP.ends("engine")
    # stochastic depth differs between ranks; weights did not
    seed_all(run.seed + 1 + world.rank)
    restored = restore(args.out, engine, cfg.checkpoint, world, fingerprint=fingerprint, seed=run.seed)
    START_UP.ends("checkpoint")
    first_step = restored.progress.step

    positions = rank_positions(run, world.rank, world.size, first_step=first_step, last_step=durations.stop_step)
    bad = BadImages(cfg.data.max_bad_share)
    batches = masked_batches(
        images,
        tokens,
        positions,
        data=cfg.data,
        views=cfg.views,
        mask=cfg.mask,
        image_px=cfg.model.image_px,
        grid=cfg.model.grid,
        seed=run.seed,
        device=world.device,
        bad=bad,
    )
    guard, meter, saver = around_steps(
        args.out,
        engine,
        restored,
        run=run,
        checkpoint=cfg.checkpoint,
        durations=durations,
        num_samples=images.num_samples,
        training_flops=training_flops(cfg),
        bad=bad,
        world=world,
    )
    with meter, watchdog:
        for step in range(first_step, durations.stop_step):
            lr = set_lr(engine, cfg.optim, cfg.schedule, durations, step)
            for _ in range(micro_steps(run, world.size)):
                batch = meter.next(batches)
                outputs = engine(batch.images_norm, batch.masked)
                loss, stats = objective(outputs, batch.targets)
                meter.add(loss, stats)
                # accumulation, loss scale, clipping: the engine's
                engine.backward(guard.watch(loss, batch.keys))
                engine.step()
            applied = guard.close_step(step + 1)
            meter.close_step(step + 1, engine, lr, applied=applied, skipped=guard.total_skipped)
            with watchdog.during("saving", LONG_S):
                stopping = saver.close_step(step + 1)
            watchdog.beat(step + 1)
            if stopping and step + 1 < durations.stop_step:
                meter.close(EXIT_REQUEUE)
                return EXIT_REQUEUE
        with watchdog.during("saving", LONG_S):
            saver.finish()
        meter.close()
    if world.is_main:
        sys.stdout.write(
            f"{durations.stop_step} of {durations.total_steps} steps done, checkpoints in {args.out / 'checkpoints'}\n"
        )
    return EXIT_DONE


if __name__ == "__main__":
    run(main)
