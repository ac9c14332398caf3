"""All stages around the recipe of a pre-training: tokenizer, tokens, pre-training, fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from peco_ds.config import (
    DetectRecipe,
    FinetuneRecipe,
    PretrainRecipe,
    ProbeRecipe,
    SegmentRecipe,
    TokenizerRecipe,
    TokenizerSettings,
)
from peco_ds.errors import UserError
from peco_ds.planner.stages import IMAGENET_1K_CLASSES, IMAGENET_1K_TRAIN, IMAGENET_1K_VAL, Kind, Stage, stage_of
from peco_ds.recipe_files import READERS, find_recipe, load_recipe
from peco_ds.registry import TOKENIZERS, kinds_learning_from
from peco_ds.strict_yaml import NOT_YAML, read_yaml

# Recipe of a pre-training -> its tokenizer (recipe, or name of a published one) and the recipes of its fine-tunings, in
# order.
NEIGHBOURS = {
    "peco_vitb16": ("peco_tokenizer", ("finetune_vitb16",)),
    "peco_vitb16_300": ("peco_tokenizer", ("finetune_vitb16",)),
    "peco_vitb16_mae": ("peco_tokenizer", ("finetune_vitb16",)),
    "peco_vitl16": ("peco_tokenizer", ("finetune_vitl16",)),
    "peco_vith14": ("peco_tokenizer", ("finetune_vith14", "finetune_vith14_448")),
    "peco_vith14_visible": ("peco_tokenizer", ("finetune_vith14", "finetune_vith14_448")),
    "peco_vittiny16": ("peco_tokenizer", ("finetune_vittiny16",)),
    "mcbeit_vitb16": ("gumbel", ("finetune_vitb16",)),
    "mcbeit_vitl16": ("gumbel", ("finetune_vitl16",)),
    "beitv2_vitb16": ("beitv2_tokenizer", ("finetune_beitv2_vitb16",)),
    "beitv2_vitb16_300": ("beitv2_tokenizer", ("finetune_beitv2_vitb16_300",)),
    "beitv2_vitl16": ("beitv2_tokenizer", ("finetune_beitv2_vitl16",)),
    "beit_vitb16": ("dvae", ("finetune_vitb16",)),
    "beit_vitl16": ("dvae", ("finetune_vitl16",)),
}
# The JSON that a stage's entry point takes by itself.
DEFAULT_JSON: dict[Kind, str] = {
    "tokenizer": "zero1.json",
    "tokenizing": "zero0.json",
    "pre-training": "zero3.json",
    "fine-tuning": "zero1.json",
    "segmentation": "zero1.json",
    "detection": "zero1.json",
}
# Placeholder for weights that a plan does not read.
_PLANNED = "to-be-given"


@dataclass(frozen=True)
class Chain:
    """Stages in running order, and the one whose recipe was asked for."""

    stages: tuple[Stage, ...]
    main: Stage


def read_chain(
    recipe: str,
    overrides: list[str],
    *,
    tokenizer: str | None = None,
    finetune: list[str] | None = None,
    num_samples: int = IMAGENET_1K_TRAIN,
    finetune_samples: int | None = None,
    val_samples: int = IMAGENET_1K_VAL,
    num_classes: int = IMAGENET_1K_CLASSES,
) -> Chain:
    """The stages that belong to a recipe.

    Args:
        recipe: of a pre-training: the whole chain; of a tokenizer or a fine-tuning: that stage alone.
        overrides: "key.sub=value" of that recipe, or "RECIPE:key.sub=value" of another one of the chain.
        tokenizer, finetune: recipes in place of the usual neighbours, which take over the model's size where it was
            changed.
        num_samples: images of the training set.
        finetune_samples: of the labelled one; None: the same.
        val_samples: of the set that a classifier is measured on.
    Raises: UserError as `load_recipe`, for a probe's recipe, for an override of a recipe that is not in the chain.
    """
    name, kind = find_recipe(recipe).stem, recipe_type(recipe)
    if kind is ProbeRecipe:
        raise UserError(
            f"recipe {recipe!r}: of linear_probe.py, which trains no network; give a recipe of a "
            "pre-training, a tokenizer or a fine-tuning"
        )
    # A copy under another file name keeps its neighbours.
    usual = NEIGHBOURS.get(str(_settings(find_recipe(recipe)).get("name", name)), (None, ()))
    tokenizer_named = tokenizer or usual[0]
    others = [] if kind is not PretrainRecipe else list(usual[1] if finetune is None else finetune)
    if kind is not PretrainRecipe and (tokenizer or finetune):
        raise UserError(
            f"recipe {recipe!r} is planned alone: --tokenizer_recipe and --finetune_recipes go with the "
            "recipe of a pre-training"
        )
    published = _published(tokenizer_named)
    trained = None if published or kind is not PretrainRecipe else tokenizer_named
    known = [name, *(find_recipe(other).stem for other in (trained, *others) if other)]
    own: dict[str, list[str]] = {key: [] for key in known}
    for text in overrides:
        owner, colon, rest = text.partition(":")
        prefixed = colon and "=" not in owner
        if prefixed and owner not in own:
            raise UserError(f"override {text!r}: {owner!r} is no recipe of this chain; there are {', '.join(known)}")
        own[owner if prefixed else name].append(rest if prefixed else text)
    main_recipe = _read(recipe, kind, own[name])
    finetune_samples = finetune_samples or num_samples
    labelled = dict(num_classes=num_classes, val_samples=val_samples)
    main = stage_of(
        main_recipe,
        finetune_samples if kind in (FinetuneRecipe, SegmentRecipe, DetectRecipe) else num_samples,
        **labelled,
    )
    if kind is not PretrainRecipe:
        return Chain((main,), main)
    stages: list[Stage] = []
    if trained:
        training = _read(trained, TokenizerRecipe, own[find_recipe(trained).stem])
        stages.append(stage_of(training, num_samples))
    network = training.tokenizer if trained else published
    if network:
        _require_grid(network, main_recipe)
        stages.append(Stage("tokenizing", main_recipe, num_samples, tokenizer=network))
    stages.append(main)
    for other in others:
        tuned = _read(other, FinetuneRecipe, own[find_recipe(other).stem])
        if finetune is None:
            tuned = replace(tuned, model=replace(tuned.model, **_size(main_recipe)))
        else:
            _require_size(tuned, main_recipe)
        stages.append(stage_of(tuned, finetune_samples, **labelled))
    return Chain(tuple(stages), main)


def _published(name: str | None) -> TokenizerSettings | None:
    """The released tokenizer of a kind that plans know, which nothing here trains."""
    kind = TOKENIZERS.get(name or "")
    return kind.release.planned if kind and kind.release else None


def _size(recipe) -> dict[str, float]:
    return {name: getattr(recipe.model, name) for name in ("patch_px", "width", "depth", "heads", "mlp_ratio")}


def _require_size(tuned: FinetuneRecipe, recipe: PretrainRecipe) -> None:
    for name, value in _size(recipe).items():
        if getattr(tuned.model, name) != value:
            raise UserError(
                f"--finetune_recipes {tuned.name}: model.{name} {getattr(tuned.model, name)} does not go on "
                f"from {recipe.name}, which has {value}; name a recipe of that size, or set "
                f"{tuned.name}:model.{name}={value}"
            )


def _require_grid(network: TokenizerSettings, recipe: PretrainRecipe) -> None:
    side, stride, grid = recipe.views.tokenizer_px, network.stride_px, recipe.model.grid
    if side != stride * grid:
        raise UserError(
            f"views.tokenizer_px {side}: a tokenizer of stride {stride} gives {side / stride:g} codes a "
            f"side, the backbone has {grid} patches; set it to {stride * grid}, or name the tokenizer's "
            "recipe by --tokenizer_recipe"
        )


def recipe_type(recipe: str) -> type:
    """Type of a recipe, told by the sections it has.

    Raises: UserError if there is no such recipe.
    """
    path = find_recipe(recipe)
    keys = _settings(path)
    return next((kind for kind, own in _OWN_KEYS.items() if any(key.startswith(own) for key in keys)), PretrainRecipe)


# What only recipes of that stage set, the first that is found counts.
_OWN_KEYS = {
    ProbeRecipe: ("probe.",),
    SegmentRecipe: ("segmenter.",),
    DetectRecipe: ("detector.",),
    FinetuneRecipe: ("classifier.", "init.", "augment.", "ema."),
    PretrainRecipe: ("model.", "mask.", "objective.", "encoding.", "aggregation.", "data.tokens", "views.count"),
    TokenizerRecipe: tuple("tokenizer. perceptual. teacher. adversarial. loss. data.val_images data.holdout".split()),
}


def _settings(path: Path) -> dict[str, object]:
    """Settings as they stand in the file: dotted names, two levels deep."""
    try:
        raw = read_yaml(path)
    except NOT_YAML:
        # `load_recipe` says what is wrong with the file.
        return {}
    found: dict[str, object] = {}
    for section, value in raw.items() if isinstance(raw, dict) else ():
        nested = isinstance(value, dict)
        found |= {f"{section}.{key}": item for key, item in value.items()} if nested else {str(section): value}
    return found


def _read(recipe: str, kind: type, overrides: list[str]):
    """A recipe, with a word in place of weights that its stage would insist on."""
    found = recipe_type(recipe)
    if found is not kind:
        raise UserError(f"recipe {recipe!r}: of {READERS[found]}; here one of {READERS[kind]} is needed")
    needed = []
    if kind is TokenizerRecipe:
        written = _settings(find_recipe(recipe)) | dict(text.split("=", 1) for text in overrides if "=" in text)
        taught = written.get("tokenizer.kind") in kinds_learning_from("teacher")
        key = "teacher.weights" if taught else "perceptual.weights"
        needed = [] if written.get(key) else [f"{key}={_PLANNED}"]
    return load_recipe(kind, recipe, [*needed, *overrides]).recipe
