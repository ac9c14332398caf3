"""Where the data of a recipe lie."""

from __future__ import annotations

import os
from pathlib import Path

from peco_ds.config import DataSettings


def data_path(data: DataSettings, value: str) -> Path:
    """A path of the recipe: absolute as it stands, else under data.root."""
    return (
        Path(os.path.expanduser(value))
        if os.path.isabs(os.path.expanduser(value))
        else Path(os.path.expanduser(data.root)) / value
    )
