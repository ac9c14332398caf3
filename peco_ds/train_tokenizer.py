"""Train a tokenizer on image shards, under DeepSpeed: PeCo's perceptual VQ, or BEiT v2's VQ-KD.

    deepspeed peco_ds/train_tokenizer.py --recipe peco_tokenizer perceptual.weights=vit-b-300ep.pth.tar
    deepspeed peco_ds/train_tokenizer.py --recipe beitv2_tokenizer teacher.weights=ViT-B-16.pt

The last act writes OUT/tokenizer, the release folder that tokenize_shards.py and pretrain.py read.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python looks beside the package, not inside it.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds import command_line
from peco_ds.config import TokenizerRecipe
from peco_ds.data_paths import data_path


def main(argv: list[str] | None = None) -> int:
    parser = command_line.stage_parser(__doc__.splitlines()[0], recipe="peco_tokenizer", deepspeed_config="zero1.json")
    args, resolved = command_line.parse_stage(parser, TokenizerRecipe, argv)
    return dry_run(args, resolved) if args.dry_run else train(args, resolved)


def dry_run(args, resolved) -> int:
    from peco_ds.models.frozen_net import frozen_net_at_hand
    from peco_ds.runtime.dry_run import dry_run

    def look(_manifest) -> tuple[dict, list[str]]:
        return {}, [f"judge or teacher    {frozen_net_at_hand(resolved.recipe)}"]

    return dry_run(args, resolved, look)


def train(args, resolved) -> int:
    from peco_ds.data.image_set import ImageSet
    from peco_ds.data.loaders import crop_batches, held_out_images, training_order
    from peco_ds.evaluation.reconstruction import HeldOut
    from peco_ds.models.critic import with_critic
    from peco_ds.models.frozen_net import load_frozen_net
    from peco_ds.models.tokenizers import build_tokenizer, refuse_foreign_release
    from peco_ds.models.vq import usage
    from peco_ds.objectives.tokenizer_losses import build_tokenizer_objective
    from peco_ds.planner.mfu import training_flops
    from peco_ds.runtime.codebook_init import init_codebook
    from peco_ds.runtime.frozen_passes import compile_frozen
    from peco_ds.runtime.run import START_UP, Run
    from peco_ds.runtime.run_folder import refuse_foreign_folder

    START_UP.ends("imports")
    cfg = resolved.recipe
    refuse_foreign_folder(args.out)
    # The release is the last act; that its place is another's is said first.
    refuse_foreign_release(args.out / "tokenizer")
    images = ImageSet(data_path(cfg.data, cfg.data.images))
    order = training_order(images, cfg.data, cfg.run.seed)
    frozen = load_frozen_net(cfg)
    judged = judge_facts(frozen) if frozen else {"judge": "none"}
    held_out = held_out_images(images, cfg.data, cfg.evaluation.max_images, cfg.views.tokenizer_px)
    with Run.start(args, resolved, "train_tokenizer", images, num_samples=order.num_samples) as run:
        run.record(judged)
        run.seed_weights()
        world = run.world

        def crops(positions, bad=None):
            return crop_batches(images, order, positions, cfg, world.device, bad)

        tokenizer = build_tokenizer(cfg.tokenizer, seed=cfg.run.seed).to(world.device)
        if cfg.tokenizer.kmeans_iters and not run.resumes:
            first_images = (batch.images_11 for batch in crops(run.positions(0, sys.maxsize)))
            init_codebook(tokenizer, first_images, cfg.tokenizer, cfg.run.seed, world)
        model = with_critic(tokenizer, cfg.adversarial).to(world.device)
        critic_lr = {"critic.": cfg.adversarial.lr / cfg.optim.lr}
        run.attach(model, training_flops=training_flops(cfg), lr_scales=critic_lr)
        frozen = frozen.to(world.device) if frozen else None
        compile_frozen(frozen, replace(cfg, run=run.cfg.run), world.device)
        objective = build_tokenizer_objective(cfg, frozen)
        evaluation = HeldOut(held_out, run, tokenizer=tokenizer, frozen=frozen)
        evaluation.measure(run.first_step)
        batches = crops(run.positions(), run.bad_images)
        for step in run.steps():
            for batch in run.micro_batches(batches):
                outputs = run.engine(batch.images_11)
                loss, stats = objective(outputs, batch.images_11, step)
                run.backward(loss, stats, batch.keys)
            applied = run.step_applied()
            counts = tokenizer.codebook.update(world.all_reduce, applied=applied)
            run.finish_step(partial(usage, counts) if applied else dict)
            # A stop has seconds: the next start measures in its place.
            if evaluation.is_due(step + 1) and not run.stopping:
                evaluation.measure(step + 1)
    if run.is_complete and world.is_main:
        release(args.out, cfg, evaluation.last, judged)
    world.barrier()
    return run.exit_code


def judge_facts(frozen) -> dict[str, str]:
    """What the run's record and the release's card say of the judge or teacher."""
    facts = {"judge": frozen.description, "judge_licence": frozen.licence}
    return facts | ({"judge_statistics": frozen.statistics} if frozen.statistics else {})


def release(out: Path, cfg: TokenizerRecipe, quality: dict[str, float], judged: dict[str, str]) -> None:
    """Write OUT/tokenizer from the newest checkpoint."""
    from peco_ds.evaluation.reconstruction import quality_line
    from peco_ds.models.tokenizers import save_tokenizer
    from peco_ds.runtime.checkpoint.consolidate import fp32_weights
    from peco_ds.runtime.checkpoint.files import newest_whole, read_progress

    checkpoint = newest_whole(out)
    assert checkpoint is not None, f"{out}: the last step was saved"
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
    command_line.run(main)
