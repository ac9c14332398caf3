"""Where a run starts from: the weights that init.weights names, what the run folder records of them, and one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from peco_ds.config import InitSettings
from peco_ds.models.beit_weights import BeitWeights
from peco_ds.models.segmenter_weights import SegmenterWeights
from peco_ds.remote_paths import Place
from peco_ds.runtime.run_folder import read_provenance
from peco_ds.runtime.run_weights import read_run
from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD


def read_start(read_weights: Callable[..., BeitWeights], init: InitSettings) -> BeitWeights:
    """The weights that init.weights names.

    Args:
        read_weights: of `convert.read`, which this folder does not import.
    Raises: UserError as `read_weights`.
    """
    return read_weights(init.weights, average=init.average, statistics=init.statistics, read_run=read_run)


def origin_from(weights: BeitWeights | SegmenterWeights | None, fresh: list[str]) -> dict:
    """What a run folder records of its start."""
    if weights is None:
        return {"init": "scratch", "init_facts": {}, "fresh": [], "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    # Images go on in the statistics that the weights know: the BEiT files that timm and Hugging Face host have seen
    # 0.5, 0.5, not ImageNet's.
    return {
        "init": weights.source,
        "init_facts": weights.facts,
        "fresh": fresh,
        "mean": weights.mean,
        "std": weights.std,
    }


def origin_of(run_folder: Path) -> dict:
    """The same of a run that goes on; what it started from may have been removed since."""
    return origin_from(None, []) | {
        name: value for name, value in read_provenance(run_folder).items() if name in origin_from(None, [])
    }


def lines_of_start(weights: BeitWeights | SegmenterWeights | None, sets: Mapping[str, Place]) -> list[str]:
    """What a dry run says of the start, and of image sets that are not there yet.

    Args:
        sets: folder of each set by the name of its setting.
    """
    start = f"{weights.source} ({weights.kind})" if weights else "scratch: init.weights is empty"
    missing = [f"{name} {path}: no such folder yet" for name, path in sets.items() if not path.exists()]
    return [f"starts from         {start}", *missing]


def tell_origin(origin: dict, run) -> None:
    """One line on rank 0: what this start goes on from."""
    if not run.world.is_main:
        return
    if run.resumes:
        sys.stdout.write(f"continues a run that started from {origin['init']}\n")
    else:
        fresh = f"; fresh: {', '.join(origin['fresh'])}" if origin["fresh"] else ""
        sys.stdout.write(f"starts from {origin['init']}{fresh}\n")
