"""What a run of segment.py starts from and a conversion reads: a backbone's weights, or a whole segmenter's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from peco_ds.config import Average, InitSettings
from peco_ds.errors import UserError
from peco_ds.models.beit_weights import BeitWeights
from peco_ds.models.segmenter_weights import SegmenterWeights
from peco_ds.runtime.run_weights import read_run, read_segmenter_run, stage_of

Found = TypeVar("Found")


def read_run_or_segmenter(path: Path, average: Average = "auto") -> BeitWeights | SegmenterWeights:
    """As `read_run`, and of a run of segment.py the whole segmenter.

    Raises: UserError as both, and for the moving average of a segmenter, which keeps none.
    """
    if stage_of(path) != "segment":
        return read_run(path, average)
    if average == "ema":
        raise UserError(f"{path}: a run of segment.py, which keeps no moving average; take the raw weights")
    return read_segmenter_run(path)


def read_segmenter_start(read_weights: Callable[..., Found], init: InitSettings) -> Found:
    """The weights that init.weights names: as `start_weights.read_start`, and whole segmenters too.

    Args:
        read_weights: `read_weights_or_segmenter` of `convert.read_segmenter`, which this folder does not import.
    """
    return read_weights(init.weights, average=init.average, statistics=init.statistics, read_run=read_run_or_segmenter)
