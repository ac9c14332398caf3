"""A run folder takes its own continuation and refuses another run."""

from __future__ import annotations

import pytest
import yaml

from peco_ds.config import DetectRecipe, FinetuneRecipe, PretrainRecipe, SegmentRecipe, TokenizerRecipe
from peco_ds.errors import UserError
from peco_ds.recipe_files import load_recipe
from peco_ds.runtime.run_folder import SETTINGS, check_same_run, open_run_folder, read_settings
from peco_ds.runtime.run_weights import find_checkpoint

RECIPES = {
    "pretrain": (PretrainRecipe, "peco_vitb16", []),
    "train_tokenizer": (TokenizerRecipe, "peco_tokenizer", ["perceptual.weight=0", "data.holdout=5"]),
    "finetune": (FinetuneRecipe, "finetune_vitb16", []),
    "segment": (SegmentRecipe, "segment_vitb16", []),
    "detect": (DetectRecipe, "detect_vitb16", []),
}


class OneRank:
    is_main, rank = True, 0

    def agree(self, fault: str) -> None:
        if fault:
            raise UserError(fault)


def start(folder, stage, *overrides, recipe=None):
    recipe_type, shipped, needed = RECIPES[stage]
    resolved = load_recipe(recipe_type, recipe or shipped, [*(() if recipe else needed), *overrides], environ={})
    open_run_folder(folder, stage, resolved, {}, OneRank())


@pytest.fixture(params=RECIPES)
def begun(request, tmp_path):
    """A folder with a checkpoint, and its stage."""
    start(tmp_path, request.param)
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    return tmp_path, request.param


def change(folder, write) -> None:
    path = folder / SETTINGS
    recorded = yaml.safe_load(path.read_text())
    write(recorded["recipe"])
    path.write_text(yaml.safe_dump(recorded, sort_keys=False))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_folder_recorded_with_an_old_spelling_is_continued(tmp_path, stage, capsys):
    start(tmp_path, stage)
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    change(tmp_path, lambda recipe: recipe["model"].update(drop_path_by="picture"))
    (checkpoint / SETTINGS).write_bytes((tmp_path / SETTINGS).read_bytes())
    start(tmp_path, stage)
    check_same_run(checkpoint, tmp_path)
    assert read_settings(checkpoint)["recipe"]["model"]["drop_path_by"] == "image"
    assert "drop_path_by: image" in (tmp_path / SETTINGS).read_text()
    assert "drop_path_by: picture" in (checkpoint / SETTINGS).read_text()
    assert capsys.readouterr().err == "", "nobody can mend a record, so nobody is told"
    with pytest.raises(UserError, match="model.drop_path_by = 'image', this one has 'subset'"):
        start(tmp_path, stage, "model.drop_path_by=subset")


def test_settings_that_are_free_on_resume_may_change_and_others_may_not(begun):
    folder, stage = begun
    start(folder, stage, "run.micro_batch=2", "checkpoint.keep_last=7", "schedule.stop_at_step=3", "name=other")
    for override in ("run.seed=9", "optim.lr=0.5", "data.shuffle_window_shards=3"):
        with pytest.raises(UserError, match=override.partition("=")[0]):
            start(folder, stage, override)
    start(folder, stage, "run.seed=9", "checkpoint.resume=never")


def test_a_run_is_continued_with_its_own_settings_whatever_the_recipe_has_become(begun):
    """As a run that began before its recipe changed, and before some settings existed."""
    folder, stage = begun

    def differ(recipe) -> None:
        recipe["optim"] |= {"lr": 1.25e-3, "betas": [0.9, 0.98]}
        recipe["optim"].pop("kind")
        recipe.get("perceptual", {}).pop("normalize", None)

    change(folder, differ)
    with pytest.raises(UserError, match=f"continue it with its own settings .--recipe {folder}"):
        start(folder, stage)
    start(folder, stage, recipe=folder)
    recipe = load_recipe(RECIPES[stage][0], folder, [], environ={}).recipe
    assert recipe.optim.lr == 1.25e-3 and recipe.optim.kind == "adamw"
    assert stage != "train_tokenizer" or recipe.perceptual.normalize == "none", "features were compared raw then"


def test_a_setting_that_an_old_record_lacks_has_todays_default_unless_its_field_says_otherwise(begun):
    folder, stage = begun

    def forget(recipe) -> None:
        recipe["run"].pop("spike_factor")
        recipe["optim"].pop("eps")
        recipe.get("views", {}).pop("tokenizer_precision", None)

    change(folder, forget)
    if stage == "pretrain":
        with pytest.raises(UserError, match="views.tokenizer_precision = 'fp32', this one has 'bf16'"):
            start(folder, stage)
        start(folder, stage, "views.tokenizer_precision=fp32")
    else:
        start(folder, stage)


def test_another_stage_is_refused(begun):
    folder, stage = begun
    other = next(name for name in RECIPES if name != stage)
    with pytest.raises(UserError, match=f"holds a run of {stage}"):
        start(folder, other)


def test_a_record_of_an_unknown_stage_is_read_as_it_stands(tmp_path):
    (tmp_path / SETTINGS).write_text("stage: another\nrecipe: {model: 3, x: {}}\n")
    assert read_settings(tmp_path)["recipe"] == {"model": 3, "x": {}}
    with pytest.raises(UserError, match="a run of another"):
        find_checkpoint(tmp_path)
