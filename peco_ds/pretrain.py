"""Masked pre-training: token shards -> checkpoints, under ZeRO 0..3 as the DeepSpeed JSON says.

deepspeed peco_ds/pretrain.py --deepspeed_config ds_configs/zero3.json
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python looks beside the package, not inside it.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds import command_line
from peco_ds.config import ONLINE, PretrainRecipe
from peco_ds.data_paths import data_path, tokenizer_path


def main(argv: list[str] | None = None) -> int:
    parser = command_line.stage_parser(__doc__.splitlines()[0], recipe="peco_vith14", deepspeed_config="zero3.json")
    args, resolved = command_line.parse_stage(parser, PretrainRecipe, argv)
    return dry_run(args, resolved) if args.dry_run else train(args, resolved)


def dry_run(args, resolved) -> int:
    from peco_ds.runtime.dry_run import dry_run

    cfg = resolved.recipe

    def look(manifest) -> tuple[dict, list[str]]:
        found = "not there yet" if cfg.data.tokens != ONLINE else "computed online"
        tokens, tokenizer = data_path(cfg.data, cfg.data.tokens), tokenizer_path(cfg.data)
        fingerprint = None
        if tokenizer.exists():
            from peco_ds.models.tokenizers import read_card
            from peco_ds.runtime.token_source import check_pair

            card = read_card(tokenizer)
            check_pair(card, cfg, str(tokenizer))
            fingerprint = card.fingerprint
        if manifest and cfg.data.tokens != ONLINE and tokens.exists():
            from peco_ds.data.token_shards import TokenSet

            TokenSet(
                tokens,
                manifest,
                num_codes=cfg.objective.num_codes,
                grid=cfg.model.grid,
                views=cfg.views,
                tokenizer_fingerprint=fingerprint,
            )
            found = "fit images and recipe" + ("" if fingerprint else "; the tokenizer is not at hand to compare")
        return {}, [f"tokens              {found} ({cfg.data.tokens})"]

    return dry_run(args, resolved, look)


def train(args, resolved) -> int:
    from peco_ds.data.image_set import ImageSet
    from peco_ds.data.loaders import masked_batches
    from peco_ds.models.mim import build_mim
    from peco_ds.models.vit import TransformerBlock
    from peco_ds.objectives import build_objective
    from peco_ds.planner.mfu import training_flops
    from peco_ds.runtime.run import START_UP, Run
    from peco_ds.runtime.run_folder import refuse_foreign_folder
    from peco_ds.runtime.token_source import find_tokens, open_tokens, token_provenance

    START_UP.ends("imports")
    cfg = resolved.recipe
    refuse_foreign_folder(args.out)
    objective = build_objective(cfg.objective)
    images = ImageSet(data_path(cfg.data, cfg.data.images))
    found = find_tokens(cfg, images, tokenizer_named="data.tokenizer" in resolved.sources)
    with Run.start(args, resolved, "pretrain", images) as run:
        run.record(token_provenance(cfg, found))
        tokens = open_tokens(found, cfg, images, run.world)
        run.seed_weights()
        model = build_mim(
            cfg.model,
            cfg.encoding,
            cfg.aggregation,
            cfg.objective.num_codes,
            activation_checkpointing=cfg.run.activation_checkpointing,
        )
        run.attach(model, training_flops=training_flops(cfg), leaf_modules=(TransformerBlock,))
        batches = masked_batches(images, tokens, run.positions(), cfg, run.world.device, run.bad_images)
        for _ in run.steps():
            for batch in run.micro_batches(batches):
                outputs = run.engine(batch.images_norm, batch.masked)
                loss, stats = objective(outputs, batch.targets)
                run.backward(loss, stats, batch.keys)
            run.finish_step()
    return run.exit_code


if __name__ == "__main__":
    command_line.run(main)
