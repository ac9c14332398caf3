"""Run a tokenizer once over image shards: K recorded views an image -> token shards and their manifest.

deepspeed peco_ds/tokenize_shards.py --recipe peco_vith14 data.tokenizer=runs/tokenizer/tokenizer
srun ... python peco_ds/tokenize_shards.py --part $SLURM_ARRAY_TASK_ID --parts 8    # then once: --finish --parts 8
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python's path needs the package's parent, not the package's folder.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds.command_line import parse_stage, run, stage_parser
from peco_ds.config import PretrainRecipe
from peco_ds.data_paths import data_path, tokenizer_path
from peco_ds.errors import EXIT_DONE, EXIT_REQUEUE, UserError
from peco_ds.progress_bar import Progress

logger = logging.getLogger("peco_ds")


def main(argv: list[str] | None = None) -> int:
    parser = stage_parser(__doc__.splitlines()[0], recipe="peco_vith14", deepspeed_config=None)
    parser.add_argument(
        "--part", type=int, default=0, help="this job's part of the shards, from 0 (SLURM_ARRAY_TASK_ID)"
    )
    parser.add_argument(
        "--parts", type=int, default=1, help="number of parts; with more than one the manifest is written by --finish"
    )
    parser.add_argument(
        "--finish", action="store_true", help="write the manifest once all parts are there; tokenizes nothing"
    )
    args, resolved = parse_stage(parser, PretrainRecipe, argv)
    if not 0 <= args.part < args.parts:
        raise UserError(
            f"--part {args.part} of --parts {args.parts}: parts count from 0; give --parts, or TOKENIZE_PARTS of the "
            "launchers, how many there are in all, whichever of them run now"
        )
    cfg = resolved.recipe

    from peco_ds.data.image_set import ImageSet
    from peco_ds.data.store_token_parts import token_parts_at
    from peco_ds.models.tokenizers import load_tokenizer, read_card
    from peco_ds.runtime.token_source import check_pair
    from peco_ds.schema import ViewRecipe

    images = ImageSet(data_path(cfg.data, cfg.data.images))
    folder = tokenizer_path(cfg.data)
    card, views = read_card(folder), cfg.views
    check_pair(card, cfg, str(folder))
    parts = token_parts_at(
        data_path(cfg.data, cfg.data.tokens),
        images.manifest,
        tokenizer_fingerprint=card.fingerprint,
        num_codes=card.num_codes,
        grid=cfg.model.grid,
        num_views=views.count,
        topk=views.topk,
        topk_temperature=views.topk_temperature,
        views=ViewRecipe(
            views.tokenizer_px,
            views.scale,
            views.ratio,
            views.flip,
            views.color_jitter,
            views.seed,
            views.tokenizer_interpolation,
            views.tokenizer_precision,
        ),
        tokenizer_facts=card.extra,
    )
    num_shards = len(images.manifest.shards)
    own = range(args.part, num_shards, args.parts)
    if args.dry_run:
        from peco_ds.planner.report import tokenizing_report

        missing = [number for number in own if not parts.is_done(number)]
        sys.stdout.write(
            f"{len(missing)} of {num_shards} shards to tokenize into {parts.folder}, {views.count} views "
            f"of {views.tokenizer_px} px an image, the tokenizer's network in "
            f"{views.tokenizer_precision}\n"
        )
        left = sum(images.manifest.shards[number].samples for number in missing)
        sys.stdout.write(tokenizing_report(cfg, card.settings, num_samples=left) + "\n" if left else "")
        return EXIT_DONE
    if args.finish:
        return report(parts.finish(args.parts))

    from peco_ds.runtime.distributed import start_world
    from peco_ds.runtime.rank_log import stacks_path
    from peco_ds.runtime.set_check import check_shared
    from peco_ds.runtime.watchdog import Watchdog

    world = start_world()
    check_shared(world, images.shards)
    tokenizer, _ = load_tokenizer(folder)
    tokenizer.to(world.device)
    with Watchdog(cfg.run.hang_timeout_s, stacks_path(parts.folder, world.rank), rank=world.rank) as watchdog:
        # The ranks share this check: a shard counts as done only after its index was read, and there may be 100,000 of
        # them.
        missing = sorted(
            number
            for found in world.gather_objects(
                [number for number in own[world.rank :: world.size] if not parts.is_done(number)]
            )
            for number in found
        )
        for number in missing[world.rank :: world.size]:
            parts.check_place(number)
        done = sorted(set(own) - set(missing))
        tokenize_missing(
            cfg,
            images,
            tokenizer,
            parts,
            missing[world.rank :: world.size],
            done[world.rank :: world.size],
            world,
            watchdog,
        )
    # No collective from here on: ranks end hours apart, and a process group gives up after minutes.
    waited_for = list(range(num_shards))
    while args.parts == 1 and world.is_main and not world.stop_seen:
        waited_for = [number for number in waited_for if not parts.is_done(number)]
        if not waited_for:
            return report(parts.finish())
        time.sleep(1.0)
    return EXIT_REQUEUE if world.stop_seen else EXIT_DONE


class Stopped(Exception):
    """This rank was asked to stop in the middle of a shard."""


def tokenize_missing(cfg, images, tokenizer, parts, shard_numbers: list[int], done: list[int], world, watchdog) -> None:
    """One shard after the other.

    A shard is written when its last image is tokenized, so an interruption costs one shard.

    Args:
        done: shards of earlier starts, whose unreadable images count on.
    """
    import numpy as np

    from peco_ds.data.image_set import BadImages
    from peco_ds.data.loaders import view_batches
    from peco_ds.runtime.token_records import ShardWriter, record_batches
    from peco_ds.runtime.token_source import codes_function

    starts = np.concatenate([[0], np.cumsum(images.shards.shard_sizes)])
    images_per_batch = max(1, cfg.run.micro_batch // cfg.views.count)
    batches_of = {}
    for number in shard_numbers:
        samples = np.arange(starts[number], starts[number + 1])
        batches_of[number] = (
            np.split(samples, range(images_per_batch, len(samples), images_per_batch)) if len(samples) else []
        )
    bad = BadImages(cfg.data.max_bad_share)
    bad.load_state([parts.read_counts(number) for number in done])
    loaded = view_batches(
        images,
        [batch for number in shard_numbers for batch in batches_of[number]],
        cfg,
        world.device,
        bad,
    )
    # Images may hold more views than a forward pass should: K = 100 at 256 px is 25 GB of activations in one piece.
    batches = record_batches(loaded, codes_function(tokenizer, cfg, images_per_batch * cfg.views.count))
    total = int(sum(images.shards.shard_sizes[number] for number in shard_numbers))
    progress = Progress(total, 0, "images") if world.is_main else None
    done_now = 0

    # Share of each image's softmax mass that the stored soft codes hold.
    kept: list[float] = []
    try:
        with ShardWriter(parts) as writer:
            for number in shard_numbers:
                for _ in batches_of[number]:
                    if world.stop_seen:
                        raise Stopped
                    records = next(batches)
                    writer.put(number, records)
                    kept.extend(
                        float(record.topk_probs.sum(axis=-1, dtype=np.float32).mean())
                        for record in records
                        if record.topk_probs is not None
                    )
                    done_now += len(records)
                    if progress is not None:
                        progress.show(done_now)
                    watchdog.beat(number)
                writer.end(number)
    except Stopped:
        # The unfinished shard is dropped whole.
        pass
    finally:
        if progress is not None:
            progress.close()
    tell_mass_kept(kept, cfg.views.topk)


def tell_mass_kept(kept: list[float], topk: int) -> None:
    """One line in the log; a warning where soft codes lose more than half of what the tokenizer said.

    Args:
        kept: share of the softmax mass that the stored soft codes of an image hold; none for hard codes alone.
    """
    if not kept:
        return
    share = sum(kept) / len(kept)
    advice = (
        "; a lower views.topk_temperature or more views.topk keeps more (benchmarks/soft_target_mass.py tells how "
        "much): the temperature is the tokenizer's own matter"
    )
    logger.log(
        logging.INFO if share >= 0.5 else logging.WARNING,
        "the %d soft codes a patch hold %.2f of the softmax%s",
        topk,
        share,
        "" if share >= 0.5 else advice,
    )


def report(manifest) -> int:
    total_bytes = sum(shard.bytes for shard in manifest.shards)
    sys.stdout.write(
        f"{manifest.samples} images, {manifest.num_views} views each, in {len(manifest.shards)} "
        f"token shards, {total_bytes} bytes; tokenizer {manifest.tokenizer_fingerprint[:12]}\n"
    )
    return EXIT_DONE


if __name__ == "__main__":
    run(main)
