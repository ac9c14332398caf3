"""Cores that load, and bytes on disk."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peco_ds.planner.chain import read_chain
from peco_ds.planner.data_side import checkpoints_bytes, loader_core_s, token_set_bytes
from peco_ds.planner.memory import checkpoint_bytes

TOKENIZER, TOKENIZING, PRETRAINING, FINETUNING, LARGE = read_chain("peco_vith14", []).stages


def test_larger_images_and_augmentation_cost_cores():
    assert loader_core_s(PRETRAINING, 300_000) > loader_core_s(PRETRAINING, 100_000)
    assert loader_core_s(LARGE) > 2 * loader_core_s(FINETUNING) > 2 * loader_core_s(PRETRAINING)


def test_an_image_is_decoded_once_for_all_of_its_views():
    few = replace(TOKENIZING, recipe=replace(TOKENIZING.recipe, views=replace(TOKENIZING.recipe.views, count=1)))
    assert loader_core_s(few) > 3 * loader_core_s(TOKENIZING)
    assert loader_core_s(few) == pytest.approx(loader_core_s(TOKENIZER), rel=0.2)


def test_tokens_of_a_hundred_views_of_imagenet_take_less_than_its_images():
    assert 1_281_167 * 100 * 256 * 2 < token_set_bytes(TOKENIZING) < 1_281_167 * 115_000


def test_checkpoints_on_disk_are_the_newest_one_being_written_and_those_kept_for_good():
    one = checkpoint_bytes(PRETRAINING.parameters, stage=3, precision="bf16")
    ds_config = {"zero_optimization": {"stage": 3}}
    assert checkpoints_bytes(PRETRAINING, ds_config) == 3 * one
    averaged = checkpoints_bytes(FINETUNING, {"zero_optimization": {"stage": 3}}) / 3
    assert averaged - checkpoint_bytes(FINETUNING.parameters, stage=3, precision="bf16") == 4 * FINETUNING.parameters, (
        "the moving average"
    )
    kept = replace(
        PRETRAINING,
        recipe=replace(PRETRAINING.recipe, checkpoint=replace(PRETRAINING.recipe.checkpoint, keep_every_steps=50_000)),
    )
    assert checkpoints_bytes(kept, ds_config) == (3 + kept.durations.total_steps // 50_000) * one
