"""Where the data of a recipe lie."""

from __future__ import annotations

import os
from pathlib import Path

from peco_ds.config import NO_CACHE, DataSettings
from peco_ds.remote_paths import Access, Place, is_url, local_folder, parse_url, use_access
from peco_ds.user_paths import expand, expand_path

# Files of a tokenizer's release (models/tokenizers.py).
_OF_A_TOKENIZER = ("tokenizer.safetensors", "tokenizer.json")


def data_path(data: DataSettings, value: str) -> Place:
    """A path or URL of the recipe: absolute as it stands, else under data.root.

    Variables stand for what they hold: that is how a credential reaches a URL, and no record of the run.

    Raises: UserError for a variable that is not set, a URL that is none, or a path that leads out of a store.
    """
    use_access(access_of(data))
    root, value = expand(data.root), expand(value)
    if is_url(value):
        return parse_url(value, access_of(data))
    # A path that is absolute hides what stands before it.
    if not is_url(root) or value.startswith("/"):
        return Path(root) / value
    return parse_url(root, access_of(data)) / value


def tokenizer_path(data: DataSettings) -> Path:
    """The release folder of data.tokenizer; of one in a store, a copy that lives as long as this process."""
    return local_folder(data_path(data, data.tokenizer), _OF_A_TOKENIZER)


def access_of(data: DataSettings) -> Access:
    """How the recipe reads stores. PECO_STAGE_DIR stands for a cache of whole shards that is filled before the first
    step.
    """
    staged = os.environ.get("PECO_STAGE_DIR", "")
    cache = staged or ("" if data.cache == NO_CACHE else data.cache)
    return Access(
        str(expand_path(cache).absolute()) if cache else "",
        # Nothing is evicted of a set that is to be there whole.
        1 << 62 if staged else int(data.cache_gib * (1 << 30)),
        bool(staged) or data.cache_whole_shards,
        data.store_retry_s,
        data.store_requests,
        bool(staged),
    )
