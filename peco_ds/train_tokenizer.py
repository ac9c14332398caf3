"""Train the perceptual VQ tokenizer on image shards, under DeepSpeed.

    deepspeed peco_ds/train_tokenizer.py --recipe peco_tokenizer perceptual.weights=vit-b-300ep.pth.tar

The last act writes OUT/tokenizer, the release folder that tokenize_shards.py and pretrain.py read.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # started by path: the package's parent, not its inside

from peco_ds.command_line import parse_stage, run, stage_parser
from peco_ds.config import TokenizerRecipe
from peco_ds.errors import EXIT_DONE, EXIT_REQUEUE


def main(argv: list[str] | None = None) -> int:
    parser = stage_parser(__doc__.splitlines()[0], recipe="peco_tokenizer", deepspeed_config="zero1.json")
    args, resolved = parse_stage(parser, TokenizerRecipe, argv)
    return dry_run(args, resolved) if args.dry_run else train(args, resolved)


def dry_run(args, resolved) -> int:
    from peco_ds.config import data_path, read_deepspeed_json, resolve_durations
    from peco_ds.planner.report import IMAGENET_1K_TRAIN, tokenizer_report
    from peco_ds.schema import ImageManifest, read_manifest

    cfg = resolved.recipe
    ds_config = read_deepspeed_json(args.deepspeed_config)
    images = data_path(cfg.data, cfg.data.images)
    assumed = not images.exists()
    num_samples = IMAGENET_1K_TRAIN if assumed else read_manifest(images, ImageManifest).samples
    sys.stdout.write(tokenizer_report(cfg, num_samples=num_samples, durations=resolve_durations(cfg, num_samples), ds_config=ds_config, assumed=assumed) + "\n")
    return EXIT_DONE


def train(args, resolved) -> int:
    import time

    import torch

    from peco_ds.config import data_path, merge_deepspeed, micro_steps, read_deepspeed_json, resolve_durations
    from peco_ds.data.loaders import Pictures, crop_batches, held_out_pictures, training_order
    from peco_ds.data.order import Cursor, rank_positions
    from peco_ds.evaluation.reconstruction import comparison_grid, reconstruction_quality, save_png, to_u8
    from peco_ds.models.critic import PatchCritic, TokenizerWithCritic
    from peco_ds.models.feature_nets import load_feature_net
    from peco_ds.models.peco_tokenizer import build_tokenizer, save_tokenizer
    from peco_ds.models.vq import usage
    from peco_ds.objectives.tokenizer_losses import tokenizer_loss
    from peco_ds.runtime.checkpoint import Progress, fp32_weights, list_checkpoints, restore, save
    from peco_ds.runtime.codebook_init import init_codebook
    from peco_ds.runtime.distributed import seed_all, start_world
    from peco_ds.runtime.engine import grad_norm, memory_gib, set_rate, start_engine
    from peco_ds.runtime.metrics import Meter
    from peco_ds.runtime.run_folder import open_run_folder

    cfg = resolved.recipe
    raw_config = read_deepspeed_json(args.deepspeed_config)  # bad input is refused before any rank joins another
    pictures = Pictures(data_path(cfg.data, cfg.data.images))
    fingerprint = pictures.manifest.fingerprint()
    order = training_order(pictures, cfg.data, cfg.run.seed)
    durations = resolve_durations(cfg, order.num_samples)
    judge = load_feature_net(cfg.perceptual.weights, cfg.perceptual.architecture, image_px=cfg.perceptual.image_px) if cfg.perceptual.weight else None
    if judge is not None:
        judge.check_blocks(cfg.perceptual.blocks)
    held_out = held_out_pictures(pictures, cfg.data, cfg.evaluation.max_images, cfg.views.tokenizer_px)

    world = start_world()
    merged = merge_deepspeed(raw_config, args.deepspeed_config, cfg.run, cfg.optim, world.size)
    if world.is_main:
        provenance = {"images_fingerprint": fingerprint, "num_samples": order.num_samples, "judge": judge.description if judge is not None else "none"}
        open_run_folder(args.out, "train_tokenizer", resolved, merged, resume=cfg.checkpoint.resume == "auto", provenance=provenance)
    world.barrier()

    def crops(first_step: int, last_step: int):
        positions = rank_positions(
            global_batch=cfg.run.global_batch, micro_batch=cfg.run.micro_batch, rank=world.rank, world_size=world.size, first_step=first_step, last_step=last_step
        )
        return crop_batches(pictures, order, positions, data=cfg.data, views=cfg.views, device=world.device)

    seed_all(cfg.run.seed)  # initial weights follow from the seed alone, whatever was drawn while the data were opened
    tokenizer = build_tokenizer(cfg.tokenizer, seed=cfg.run.seed).to(world.device)
    continuing = cfg.checkpoint.resume == "auto" and list_checkpoints(args.out)
    if cfg.tokenizer.kmeans_iters and not continuing:
        init_codebook(tokenizer, crops(0, sys.maxsize), cfg.tokenizer, cfg.run.seed, world)
    adversarial = cfg.adversarial if cfg.adversarial.weight else None
    model = TokenizerWithCritic(tokenizer, PatchCritic(adversarial.channels, adversarial.layers).to(world.device)) if adversarial else tokenizer
    engine = start_engine(
        model,
        deepspeed_config=args.deepspeed_config,
        run=cfg.run,
        optim=cfg.optim,
        world=world,
        lr_scales={"critic.": adversarial.lr / cfg.optim.lr} if adversarial else None,
    )
    judge = judge.to(world.device) if judge is not None else None
    seed_all(cfg.run.seed + 1 + world.rank)
    progress = restore(args.out, engine, cfg.checkpoint, world) or Progress(0, Cursor(fingerprint, cfg.run.seed, 0), world.size, engine.zero_optimization_stage())
    progress.cursor.check(fingerprint, cfg.run.seed)

    meter = Meter(
        args.out,
        world,
        first_step=progress.step,
        total_steps=durations.total_steps,
        stop_step=durations.stop_step,
        log_every=cfg.run.log_every_steps,
        global_batch=cfg.run.global_batch,
        num_samples=order.num_samples,
    )

    def round_trip(images_11: torch.Tensor):
        output = engine(images_11)
        return output.tokenizer if adversarial else output

    def evaluate(step: int) -> dict[str, float]:
        """Held-out quality into metrics, and original | round trip into TensorBoard and reconstructions.png."""
        engine.eval()
        quality = reconstruction_quality(
            round_trip,
            held_out,
            num_codes=cfg.tokenizer.num_codes,
            batch=cfg.run.micro_batch,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            all_reduce=world.all_reduce,
        )
        shown = held_out[: cfg.evaluation.grid_images]
        with torch.no_grad():
            grid = comparison_grid([shown, to_u8(round_trip(shown.to(world.device).float() / 127.5 - 1).reconstruction).cpu()])
        engine.train()
        if world.is_main:
            meter.evaluation(step, quality)
            meter.picture("original | round trip", grid, step)
            save_png(args.out / "reconstructions.png", grid)
        return quality

    newest = list_checkpoints(args.out)[0] if progress.step else None
    quality = evaluate(progress.step)
    batches = crops(progress.step, durations.stop_step)
    done, stopping, counts = progress.step, False, torch.zeros(cfg.tokenizer.num_codes)
    for step in range(progress.step, durations.stop_step):
        rate = set_rate(engine, cfg.optim, cfg.schedule, durations, step)
        for _ in range(micro_steps(cfg.run, world.size)):
            before = time.perf_counter()
            images_11 = next(batches)
            meter.waited(time.perf_counter() - before)
            output = engine(images_11)
            reconstructed, logits = (output.tokenizer, output.logits) if adversarial else (output, None)
            features = [judge.features(x / 2 + 0.5, cfg.perceptual.blocks) for x in (reconstructed.reconstruction, images_11)] if judge is not None else [(), ()]
            loss, stats = tokenizer_loss(
                reconstructed,
                images_11,
                settings=cfg.loss,
                features_reconstruction=features[0],
                features_target=features[1],
                perceptual_weight=cfg.perceptual.weight,
                critic_logits=logits,
                adversarial_weight=adversarial.weight if adversarial and step >= adversarial.start_step else 0.0,
            )
            meter.add(loss, stats)
            engine.backward(loss)
            engine.step()
        if engine.was_step_applied():
            counts = tokenizer.codebook.update(world.all_reduce)
        else:  # skipped for values that are not finite: they must not enter the moving averages either
            tokenizer.codebook.discard_pending()
        done = step + 1
        meter.step_done()
        if meter.due(done):
            codes_used, perplexity = (float(value) for value in usage(counts))
            optim_row = {"lr": rate, "grad_norm": grad_norm(engine), "skipped_steps": engine.skipped_steps}
            meter.log(done, {**optim_row, "memory_gib": memory_gib(world.device), "codes_used": codes_used, "perplexity": perplexity})
            stopping = world.stop_requested()
        last = done == durations.stop_step
        paused = meter.pause()
        if last or (cfg.evaluation.every_steps and done % cfg.evaluation.every_steps == 0):
            quality = evaluate(done)
        if stopping or last or (durations.checkpoint_steps and done % durations.checkpoint_steps == 0):
            cursor = Cursor(fingerprint, cfg.run.seed, done * cfg.run.global_batch)
            newest = save(args.out, engine, Progress(done, cursor, world.size, engine.zero_optimization_stage()), cfg.checkpoint, world)
        meter.resume(paused)
        if stopping:
            break
    meter.close()
    if done < durations.stop_step:
        return EXIT_REQUEUE
    if world.is_main and done == durations.total_steps:
        weights = {name.removeprefix("tokenizer."): value for name, value in fp32_weights(newest).items() if not name.startswith("critic.")}
        facts = {"recipe": cfg.name, "steps": done, "images_seen": done * cfg.run.global_batch, "judge": judge.description if judge is not None else "none", **quality}
        written = save_tokenizer(args.out / "tokenizer", weights, cfg.tokenizer, facts)
        sys.stdout.write(f"tokenizer {written[:12]}: PSNR {quality['psnr']:.2f} dB, SSIM {quality['ssim']:.3f}, {quality['codes_used']} of {cfg.tokenizer.num_codes} codes, in {args.out / 'tokenizer'}\n")
    world.barrier()
    return EXIT_DONE


if __name__ == "__main__":
    run(main)
