"""The frame of every stage's `--dry_run`: check what needs no ranks, say what the run would be and cost."""

from __future__ import annotations

import sys
from collections.abc import Callable

from peco_ds.data.named_sets import check_named_sets
from peco_ds.data_paths import data_path
from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
from peco_ds.errors import EXIT_DONE
from peco_ds.planner.report import dry_run_report
from peco_ds.schema import ImageManifest, read_manifest


def dry_run(args, resolved, look: Callable[[ImageManifest | None], tuple[dict, list[str]]]) -> int:
    """Write the report of a training stage to stdout; nothing is trained.

    Args:
        args: the stage's command line.  resolved: its recipe.
        look: checks what the stage reads, given the manifest of data.images, or None where it is not there yet and
            ImageNet-1K is assumed. Returns further arguments of `dry_run_report`, and lines that follow it.
    Returns: the exit code.
    Raises: UserError for whatever a start would refuse before its ranks join, and for shards that are missing or cut
        short.
    """
    cfg = resolved.recipe
    ds_config = read_deepspeed_json(args.deepspeed_config)
    merge_deepspeed(ds_config, args.deepspeed_config, cfg.run, cfg.optim, world_size=1)
    folder = data_path(cfg.data, cfg.data.images)
    manifest = read_manifest(folder, ImageManifest) if folder.exists() else None
    check_named_sets(cfg.data)
    more, lines = look(manifest)
    num_samples = manifest.samples if manifest else None
    text = dry_run_report(cfg, ds_config=ds_config, num_samples=num_samples, **more)
    sys.stdout.write("\n".join([text, "", *lines]) + "\n")
    return EXIT_DONE
