"""Marks at the settings' fields: every range is held, and what is free on resume is what the fields say."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Annotated, Literal, get_args

import pytest
from pydantic.dataclasses import dataclass

from peco_ds.config import (
    DetectRecipe,
    FinetuneRecipe,
    PretrainRecipe,
    ProbeRecipe,
    Recipe,
    SegmentRecipe,
    TokenizerRecipe,
)
from peco_ds.errors import UserError
from peco_ds.field_marks import Bounds, FreeOnResume, keys_with, known_keys, recipe_fields
from peco_ds.recipe_files import load_recipe

BASES = {
    PretrainRecipe: ("peco_vitb16", []),
    TokenizerRecipe: ("peco_tokenizer", ["perceptual.weight=0", "data.holdout=5"]),
    FinetuneRecipe: ("finetune_vitb16", []),
    ProbeRecipe: ("probe_vitb16", ["init.weights=run"]),
    SegmentRecipe: ("segment_vitb16", []),
    DetectRecipe: ("detect_vitb16", []),
}


def default_of(recipe_type: type, key: str):
    value = recipe_type()
    for name in key.split("."):
        value = getattr(value, name)
    return value


def outside(bounds: Bounds, whole: bool) -> list[float]:
    """Values just outside, on each side that has one."""

    def beyond(limit, towards):
        return int(limit) + (1 if towards > 0 else -1) if whole else math.nextafter(limit, towards)

    found = []
    if bounds.at_least is not None:
        found.append(beyond(bounds.at_least, -math.inf))
    if bounds.above is not None:
        found.append(bounds.above)
    if bounds.at_most is not None:
        found.append(beyond(bounds.at_most, math.inf))
    if bounds.below is not None:
        found.append(bounds.below)
    found = [value for value in found if not (bounds.or_zero and value == 0)]
    return found if whole else [float(value) for value in found]


def refused_values():
    for recipe_type in get_args(Recipe):
        for key, bounds in keys_with(recipe_type, Bounds).items():
            default = default_of(recipe_type, key)
            numbers = default if isinstance(default, tuple) else (default,)
            whole = (numbers and all(isinstance(number, int) for number in numbers)) or key.endswith(
                ("steps", "at_step", "decoder_channels", "per_level", "global_blocks")
            )
            for value in outside(bounds, whole):
                text = json.dumps([value, *default[1:]] if isinstance(default, tuple) else value)
                yield pytest.param(recipe_type, key, text, id=f"{recipe_type.__name__}-{key}={text}")


@pytest.mark.parametrize("recipe_type, key, value", list(refused_values()))
def test_every_bounded_setting_refuses_a_value_outside_in_one_line_with_key_value_and_range(recipe_type, key, value):
    recipe, needed = BASES[recipe_type]
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_type, recipe, [*needed, f"{key}={value}"], environ={})
    message = str(caught.value)
    bounds = keys_with(recipe_type, Bounds)[key]
    limit = next(x for x in (bounds.at_least, bounds.above, bounds.at_most, bounds.below) if x is not None)
    assert message.startswith(f"{key} {value}: ") and "\n" not in message
    assert "must be" in message and str(limit) in message and bounds.because in message


def test_nearly_every_number_has_bounds():
    """A new number without a range is listed here on purpose, or gets one."""
    without = {
        key.split(".", 1)[-1]
        for recipe_type in get_args(Recipe)
        for key in known_keys(recipe_type)
        if isinstance(number := default_of(recipe_type, key), (int, float, tuple))
        and not isinstance(number, bool)
        and key not in keys_with(recipe_type, Bounds)
    }
    assert without == {
        *("mlp_ratio", "layer_scale", "init_std", "vit.mlp_ratio", "decay", "count_eps", "image_px", "blocks"),
        *("weight", "start_step", "channels", "layers", "lr", "pixel_weight", "commitment_weight"),
    }


def test_a_default_is_never_outside_its_own_bounds():
    for recipe_type in get_args(Recipe):
        for key, bounds in keys_with(recipe_type, Bounds).items():
            assert not bounds.fault(default_of(recipe_type, key)), key


def test_a_range_names_all_its_limits_and_its_reason():
    assert Bounds(at_least=0, below=1).fault(1.0) == "must be in [0, 1)"
    assert Bounds(above=0, at_most=1).fault(0.0) == "must be in (0, 1]"
    assert Bounds(above=1, or_zero=True).fault(0.5) == "must be above 1, or 0"
    assert Bounds(above=1, or_zero=True).fault(0.0) == "" and Bounds(above=1).fault(None) == ""
    assert Bounds(at_most=9, because="so it is").fault((1, 10)) == "each must be at most 9 (so it is)"


def test_marks_of_sections_unions_and_tuples_reach_their_settings():
    count = Annotated[int, Bounds(at_least=1)]

    @dataclass(frozen=True)
    class Section:
        maybe: count | None = None
        several: tuple[count, ...] = (1,)
        word: Literal["a"] = "a"

    @dataclass(frozen=True)
    class Whole:
        section: Annotated[Section, FreeOnResume()] = dataclasses.field(default_factory=Section)
        plain: str = ""

    Section.__annotations__["maybe"] = count | None
    Section.__annotations__["several"] = tuple[count, ...]
    Whole.__annotations__["section"] = Annotated[Section, FreeOnResume()]
    assert recipe_fields(Whole) == {
        "section.maybe": (FreeOnResume(), Bounds(at_least=1)),
        "section.several": (FreeOnResume(), Bounds(at_least=1)),
        "section.word": (FreeOnResume(),),
        "plain": (),
    }
    assert list(keys_with(Whole, Bounds)) == ["section.maybe", "section.several"]


def test_what_is_free_on_resume_is_what_a_run_does_not_depend_on():
    free = set(keys_with(Recipe, FreeOnResume))
    sections = {key.split(".")[0] for key in free - {"model.attention", "model.fold_layer_scale"}}
    assert sections == {"name", "data", "run", "schedule", "checkpoint", "evaluation"}
    bound = ("data.holdout", "data.shuffle_window_shards", "run.seed", "run.precision", "run.global_batch", "optim.lr")
    assert not free & {*bound, "schedule.epochs", "schedule.steps", "model.drop_path_by", "views.seed"}
    assert {"run.micro_batch", "schedule.stop_at_step", "checkpoint.keep_last", "evaluation.crop", "name"} <= free
