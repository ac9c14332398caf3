"""From one recipe to the stages around it."""

from __future__ import annotations

import pytest

from peco_ds.config import FinetuneRecipe, PretrainRecipe, ProbeRecipe, TokenizerRecipe
from peco_ds.errors import UserError
from peco_ds.planner.chain import read_chain, recipe_type
from peco_ds.recipe_files import RECIPES


def names(chain) -> list[str]:
    return [f"{stage.kind}: {stage.recipe.name}" for stage in chain.stages]


def test_a_pretraining_recipe_brings_tokenizer_tokens_and_both_fine_tunings():
    chain = read_chain("peco_vith14", [])
    assert names(chain) == [
        "tokenizer: peco_tokenizer",
        "tokenizing: peco_vith14",
        "pre-training: peco_vith14",
        "fine-tuning: finetune_vith14",
        "fine-tuning: finetune_vith14_448",
    ]
    assert chain.main.kind == "pre-training"


def test_a_published_tokenizer_is_not_trained_but_used():
    assert [stage.kind for stage in read_chain("beit_vitb16", []).stages] == [
        "tokenizing",
        "pre-training",
        "fine-tuning",
    ]


def test_another_stages_recipe_is_planned_alone():
    assert names(read_chain("finetune_vith14_448", [])) == ["fine-tuning: finetune_vith14_448"]
    assert names(read_chain("beitv2_tokenizer", [])) == ["tokenizer: beitv2_tokenizer"]


def test_neighbours_can_be_named_or_left_out():
    chain = read_chain("peco_vitb16", [], finetune=[])
    assert [stage.kind for stage in chain.stages] == ["tokenizer", "tokenizing", "pre-training"]
    chain = read_chain("peco_vitb16", [], tokenizer="beitv2_tokenizer", finetune=["finetune_beitv2_vitb16"])
    assert (
        chain.stages[0].recipe.name == "beitv2_tokenizer" and chain.stages[-1].recipe.name == "finetune_beitv2_vitb16"
    )


def test_a_copy_of_a_recipe_keeps_its_neighbours(tmp_path):
    (tmp_path / "mine.yaml").write_text((RECIPES / "peco_vith14.yaml").read_text())
    assert names(read_chain(str(tmp_path / "mine.yaml"), [])) == names(read_chain("peco_vith14", []))


def test_a_model_of_another_size_is_fine_tuned_in_that_size():
    assert {
        stage.recipe.model.depth
        for stage in read_chain("peco_vith14", ["model.depth=4"]).stages
        if stage.kind in ("pre-training", "fine-tuning")
    } == {4}


def test_settings_go_to_the_recipe_they_name():
    chain = read_chain(
        "peco_vith14",
        ["schedule.epochs=1600", "finetune_vith14:schedule.epochs=30", "peco_tokenizer:perceptual.weight=0"],
    )
    assert read_chain("peco_vith14", ["peco_tokenizer:perceptual.weight=0.5"]).stages[0].recipe.perceptual.weight == 0.5
    epochs = {stage.recipe.name: stage.recipe.schedule.epochs for stage in chain.stages}
    assert epochs == {"peco_tokenizer": 100, "peco_vith14": 1600, "finetune_vith14": 30, "finetune_vith14_448": 10}
    assert chain.stages[0].recipe.perceptual.weight == 0


@pytest.mark.parametrize(
    "recipe, overrides, options, said",
    [
        ("peco_vith14", ["finetune_vitb16:schedule.epochs=3"], {}, "no recipe of this chain"),
        ("probe_vith14", [], {}, "probe"),
        ("finetune_vith14", [], {"tokenizer": "peco_tokenizer"}, "planned alone"),
        ("peco_vith14", ["views.tokenizer_px=224"], {}, "256"),
        ("peco_vith14", ["model.dept=2"], {}, "did you mean 'model.depth'"),
        ("peco_vit14", [], {}, "did you mean 'peco_vit"),
        ("peco_vitb16", [], {"finetune": ["finetune_vith14"]}, "does not go on from peco_vitb16"),
        ("peco_vitb16", [], {"finetune": ["peco_vitl16"]}, "finetune.py is needed"),
        ("peco_vitb16", [], {"tokenizer": "{list}"}, "train_tokenizer.py is needed"),
    ],
)
def test_what_makes_no_chain_is_refused_in_a_line(recipe, overrides, options, said, tmp_path):
    if options.get("tokenizer") == "{list}":
        (tmp_path / "list.yaml").write_text("- tokenizer\n- views\n")
        options = {"tokenizer": str(tmp_path / "list.yaml")}
    with pytest.raises(UserError, match=said):
        read_chain(recipe, overrides, **options)


def test_the_stage_of_a_recipe_is_read_off_its_sections():
    found = {
        name: recipe_type(name)
        for name in (
            "peco_vith14",
            "finetune_vitb16",
            "peco_tokenizer",
            "quickstart_tokenizer",
            "beitv2_tokenizer_dino",
            "probe_vitb16",
            "quickstart_vit",
            "beitv2_vitl16",
        )
    }
    assert found == {
        "peco_vith14": PretrainRecipe,
        "finetune_vitb16": FinetuneRecipe,
        "peco_tokenizer": TokenizerRecipe,
        "quickstart_tokenizer": TokenizerRecipe,
        "beitv2_tokenizer_dino": TokenizerRecipe,
        "probe_vitb16": ProbeRecipe,
        "quickstart_vit": PretrainRecipe,
        "beitv2_vitl16": PretrainRecipe,
    }
