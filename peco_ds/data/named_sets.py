"""The sets that a recipe names, looked at without ranks."""

from __future__ import annotations

from peco_ds.config import ONLINE, DataSettings
from peco_ds.data.indexed_tar import ShardSet
from peco_ds.data_paths import data_path
from peco_ds.schema import ImageManifest, TokenManifest, read_manifest


def check_named_sets(data: DataSettings) -> None:
    """Hold the tars of every set that is there against its manifest, by their sizes.

    Raises: UserError as `ShardSet.check`; StoreFault.
    """
    for name in ("images", "val_images", "tokens"):
        setting = getattr(data, name, "")
        folder = data_path(data, setting) if setting and setting != ONLINE else None
        if folder is not None and folder.exists():
            of_tokens = name == "tokens"
            manifest = read_manifest(folder, TokenManifest) if of_tokens else read_manifest(folder, ImageManifest)
            ShardSet(folder, manifest).check("size")
