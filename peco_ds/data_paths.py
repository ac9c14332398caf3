"""Where the data of a recipe lie."""

from __future__ import annotations

from pathlib import Path

from peco_ds.config import DataSettings
from peco_ds.user_paths import expand_path


def data_path(data: DataSettings, value: str) -> Path:
    """A path of the recipe: absolute as it stands, else under data.root."""
    # A path that is absolute hides what stands before it.
    return expand_path(data.root) / expand_path(value)
