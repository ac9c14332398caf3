"""The stages of a chain: how many images, what an image costs, what stays in memory."""

from __future__ import annotations

import pytest

from peco_ds.config import FinetuneRecipe, PretrainRecipe, TokenizerRecipe
from peco_ds.planner.chain import NEIGHBOURS, read_chain, recipe_type
from peco_ds.planner.mfu import training_flops
from peco_ds.planner.shapes import mim_macs
from peco_ds.planner.stages import IMAGENET_1K_VAL, Stage
from peco_ds.recipe_files import RECIPES, load_recipe

TRAINABLE = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("probe_"))


def recipe(name: str, *overrides: str):
    return load_recipe(recipe_type(name), name, list(overrides), environ={}).recipe


def stage(name: str, *overrides: str, **sizes) -> Stage:
    return Stage(
        {PretrainRecipe: "pre-training", FinetuneRecipe: "fine-tuning"}[recipe_type(name)],
        recipe(name, *overrides),
        **sizes,
    )


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_pieces_of_every_recipe_add_up_to_its_parameters_and_its_flops(name):
    for found in read_chain(name, []).stages:
        if found.trains:
            assert sum(segment.parameters for segment in found.segments) == found.parameters
        assert sum(segment.model_flops for segment in found.segments) == pytest.approx(found.model_flops, rel=0.01)


def test_training_passes_whole_epochs_and_tokenizing_every_view_once():
    assert stage("peco_vith14", num_samples=10_000).images == pytest.approx(800 * 10_000, rel=0.001)
    tokenizing = next(
        found for found in read_chain("peco_vith14", [], num_samples=10_000).stages if found.kind == "tokenizing"
    )
    assert tokenizing.images == 100 * 10_000


def test_evaluations_are_counted_for_the_weights_and_for_their_average():
    averaged = stage("finetune_vith14")
    assert averaged.evaluated == 11 * 2 * IMAGENET_1K_VAL, (
        "after every fifth of fifty epochs, and at the end, which is some steps later"
    )
    assert stage("finetune_vith14", "ema.decay=0").evaluated == 11 * IMAGENET_1K_VAL
    assert stage("finetune_vith14", "evaluation.every_epochs=0").evaluated == 2 * IMAGENET_1K_VAL
    assert stage("peco_vith14").evaluated == 0


def test_subsets_of_stochastic_depth_are_no_work_of_the_model():
    plain, subset = (
        stage("peco_vitb16", "model.drop_path=0.4"),
        stage("peco_vitb16", "model.drop_path=0.4", "model.drop_path_by=subset"),
    )
    assert subset.model_flops == pytest.approx(0.8 * plain.model_flops, rel=0.02), "the mean rate of the blocks"


def test_recomputation_is_no_work_of_the_model_and_saves_memory():
    plain = stage("peco_vith14")
    full = plain.with_run(activation_checkpointing="full")
    assert full.model_flops == plain.model_flops
    assert full.activation_bytes < plain.activation_bytes / 5


def test_a_judge_takes_memory_and_flops_of_the_tokenizers_training():
    with_judge = Stage(
        "tokenizer", load_recipe(TokenizerRecipe, "peco_tokenizer", ["perceptual.weights=x.pth"], environ={}).recipe
    )
    without = Stage(
        "tokenizer", load_recipe(TokenizerRecipe, "peco_tokenizer", ["perceptual.weight=0"], environ={}).recipe
    )
    assert with_judge.fixed_bytes - without.fixed_bytes == pytest.approx((4 + 2) * 86e6, rel=0.02), (
        "ViT-B/16, copied to bf16"
    )
    assert with_judge.activation_bytes > without.activation_bytes
    # Three passes of 17.6 GMAC: both images forward, one of them backward to its pixels.
    assert with_judge.model_flops - without.model_flops == pytest.approx(3 * 2 * 17.6e9, rel=0.05)


def test_flops_for_mfu_are_those_of_the_model():
    cfg = recipe("peco_vitb16")
    assert training_flops(cfg) == mim_macs(cfg.model, num_codes=8192, masked=75).training_flops
    assert training_flops(recipe("finetune_vitb16"), 10) < training_flops(recipe("finetune_vitb16"), 1000)


def test_every_pretraining_recipe_of_the_package_has_neighbours():
    full_size = {
        name for name in TRAINABLE if recipe_type(name) is PretrainRecipe and not name.startswith("quickstart")
    }
    assert full_size == set(NEIGHBOURS)
