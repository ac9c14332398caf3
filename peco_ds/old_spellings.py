"""Old spellings that keep working: of settings, as marks at their fields say, and of recorded numbers."""

from __future__ import annotations

import copy
from typing import Any

from peco_ds.field_marks import FormerKey, Renamed, keys_with

# Names in rows of metrics.jsonl and evaluation.jsonl and in results of evaluate.py, before and now.
RECORDED_NAMES = {"bad_pictures": "bad_images", "pictures": "images", "pictures_as": "images_as"}


def current_setting(recipe_type: type, key: str, value) -> tuple[str, object, str]:
    """A setting in today's spelling.

    Returns: key, value, and the line that names the new spelling; "" where nothing was old.
    """
    former = {mark.key: today for today, mark in keys_with(recipe_type, FormerKey).items()}
    new_key = former.get(key, key)
    renamed = keys_with(recipe_type, Renamed).get(new_key)
    new_value = renamed.today.get(value, value) if renamed and isinstance(value, str) else value
    if (new_key, new_value) == (key, value):
        return key, value, ""
    return new_key, new_value, f"{key}={value} is now written {new_key}={new_value}; the old spelling still works"


def current_settings(recipe_type: Any, recorded: dict) -> dict:
    """Recorded settings, in sections, in today's spelling. What is no known setting stays as it is."""
    found = copy.deepcopy(recorded)
    for key, mark in keys_with(recipe_type, FormerKey).items():
        old, old_name = _section(found, mark.key), mark.key.split(".")[-1]
        if old is not None and old_name in old and (new := _section(found, key, make=True)) is not None:
            new.setdefault(key.split(".")[-1], old.pop(old_name))
    for key, mark in keys_with(recipe_type, Renamed).items():
        section, name = _section(found, key), key.split(".")[-1]
        if section is not None and isinstance(section.get(name), str):
            section[name] = mark.today.get(section[name], section[name])
    return found


def _section(tree: dict, key: str, *, make: bool = False) -> dict | None:
    """The section that a dotted setting stands in; None where there is none."""
    for name in key.split(".")[:-1]:
        inner = tree.setdefault(name, {}) if make else tree.get(name)
        if not isinstance(inner, dict):
            return None
        tree = inner
    return tree


def current_record(value):
    """A row, or a result with sections, in which old names have become today's; a new name that stands there wins."""
    if isinstance(value, list):
        return [current_record(item) for item in value]
    if not isinstance(value, dict):
        return value
    renamed = {old: new for old, new in RECORDED_NAMES.items() if old in value and new not in value}
    return {renamed.get(name, name): current_record(item) for name, item in value.items()}
