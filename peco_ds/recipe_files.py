"""Recipes as files and overrides: reading them, and where each value came from.

Order of sources, the later one wins: defaults of `config.py`, environment (`PECO_DATA_ROOT`), recipe, `a.b=c` on the
command line.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from peco_ds.config import (
    DetectRecipe,
    FinetuneRecipe,
    PretrainRecipe,
    ProbeRecipe,
    Recipe,
    SegmentRecipe,
    TokenizerRecipe,
)
from peco_ds.errors import UserError, nearest, notice
from peco_ds.field_marks import known_keys, text_keys, values_before
from peco_ds.old_spellings import current_setting
from peco_ds.recipe_checks import check_recipe
from peco_ds.schema import short
from peco_ds.strict_yaml import NOT_YAML, parse_value, read_yaml
from peco_ds.user_paths import expand_path

RECIPES = Path(__file__).parent / "recipes"
# The file of a run folder that holds its settings.
SETTINGS = "settings.yaml"
COMMAND_LINE = "command line"  # source of an override

# Which stages read which settings, for messages.
READERS = {
    PretrainRecipe: "pretrain.py and tokenize_shards.py",
    TokenizerRecipe: "train_tokenizer.py",
    FinetuneRecipe: "finetune.py",
    DetectRecipe: "detect.py",
    SegmentRecipe: "segment.py",
    ProbeRecipe: "linear_probe.py",
}


# The type of the recipe in hand.
R = TypeVar("R", bound=Recipe, covariant=True)


@dataclass(frozen=True)
class Resolved(Generic[R]):
    """A recipe with the source of every value that is not a default."""

    recipe: R
    sources: dict[str, str]

    def as_dict(self) -> dict:
        """What `settings.yaml` of a run folder holds."""
        return {"recipe": asdict(self.recipe), "sources": self.sources}


def load_recipe(recipe_type: type[R], path: str | Path, overrides: list[str], environ=os.environ) -> Resolved[R]:
    """Defaults, environment, recipe file, overrides -> one frozen recipe.

    Args:
        recipe_type: one of `READERS`.
        path: YAML file; a bare name is looked up among the package's recipes; of a run folder, the run's own settings.
        overrides: "a.b=c" texts; the value is read as YAML, unless the setting is text.
    Raises: UserError naming the key, with the nearest known one, for an unknown or mistyped key, a missing file, a
        value out of range, or two spellings of one duration.
    """
    path = find_recipe(path)
    merged: dict = {}
    sources: dict[str, str] = {}
    if environ.get("PECO_DATA_ROOT"):
        _set(merged, sources, "data.root", environ["PECO_DATA_ROOT"], "environment PECO_DATA_ROOT", recipe_type)
    for key, value in _read_yaml(path, recipe_type):
        _set(merged, sources, key, value, str(path), recipe_type)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"override {short(text)}: written as key.sub=value")
        _set(merged, sources, key, _override_value(text, key, value, recipe_type), COMMAND_LINE, recipe_type)
    _displace(merged, sources)
    try:
        recipe = TypeAdapter(recipe_type).validate_python(merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        raise UserError(
            f"{key} = {short(first['input'])}: {first['msg']} (from {sources.get(key, 'the recipe')})"
        ) from None
    check_recipe(recipe)
    return Resolved(recipe, sources)


def _override_value(text: str, key: str, value: str, recipe_type: type):
    """The value of an override: of a setting that is text as it stands, with or without quotes, of any other as YAML.

    A path may hold what YAML takes for a comment, a number or a mapping.
    """
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if not quoted and (not value or key in text_keys(recipe_type)):
        return value
    try:
        parsed = parse_value(value)
    except NOT_YAML:
        raise UserError(f"override {short(text)}: the value is not YAML; quote it") from None
    if isinstance(parsed, dict):
        raise UserError(f"override {short(text)}: sets one value, not a section; write {key[:80]}.NAME=VALUE for each")
    return parsed


# Two spellings of one duration. A spelling of the command line takes the place of the recipe's other one.
_SPELLINGS = (
    ("schedule.epochs", "schedule.steps"),
    ("schedule.warmup_epochs", "schedule.warmup_steps"),
    ("checkpoint.every_epochs", "checkpoint.every_steps"),
)


def _displace(merged: dict, sources: dict) -> None:
    for pair in _SPELLINGS:
        for mine, other in (pair, pair[::-1]):
            if sources.get(mine) == COMMAND_LINE and sources.get(other, COMMAND_LINE) != COMMAND_LINE:
                section, name = other.split(".")
                merged[section][name] = None
                sources[other] = f"displaced by {mine}"


def find_recipe(path: str | Path) -> Path:
    path = expand_path(path)
    named = [RECIPES / path.name, RECIPES / f"{path.name}.yaml"] if len(path.parts) == 1 else []
    for candidate in (path, *named, path / SETTINGS):
        if candidate.is_file():
            return candidate
    known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    raise UserError(f"recipe {str(path)!r}: no such file; known recipes: {', '.join(known)}{nearest(path.stem, known)}")


def _read_yaml(path: Path, recipe_type: type) -> list[tuple[str, object]]:
    """Dotted settings of a recipe file, or of a run's record, in its order."""
    try:
        raw = read_yaml(path)
        raw = {} if raw is None else raw
        recorded = isinstance(raw, dict) and isinstance(raw.get("stage"), str) and isinstance(raw.get("recipe"), dict)
        tree = raw["recipe"] if recorded else raw
        settings = list(flatten(tree)) if isinstance(tree, dict) else []
    except NOT_YAML as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds {type(raw).__name__}, a recipe is sections of settings")
    twice = next((key for key, count in Counter(key for key, _ in settings).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{path}: {short(twice)} is set twice, once with its section written before a dot; drop one")
    if recorded:
        # A run from before a setting existed goes on as it began.
        settings = list((values_before(recipe_type, raw["stage"]) | dict(settings)).items())
    return settings


def flatten(tree: dict, prefix: str = ""):
    """(dotted setting, value) of every leaf, in order."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_option(key: str, known: list[str]) -> bool:
    """Whether it may be a setting that a kind declares for itself; `check_options` finds out."""
    section = key.rpartition(".")[0]
    return section.endswith(".options") and section in known


def _set(merged: dict, sources: dict, key: str, value, source: str, recipe_type: type) -> None:
    key, value, renamed = current_setting(recipe_type, key, value)
    if renamed:
        notice(renamed)
    known = known_keys(recipe_type)
    if key not in known and not _is_option(key, known):
        others = [readers for other, readers in READERS.items() if key in known_keys(other)]
        if others:
            raise UserError(
                f"{source}: {short(key)} is a setting of {', '.join(others)}, not of this stage{nearest(key, known)}"
            )
        raise UserError(
            f"{source}: unknown setting {short(key)}{nearest(key, known)}; all settings stand in peco_ds/config.py"
        )
    *sections, name = key.split(".")
    node = merged
    for section in sections:
        node = node.setdefault(section, {})
    node[name] = value
    sources[key] = source
