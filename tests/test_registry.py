"""Objectives, tokenizers and judges from a file outside the package: found, refused by name, trained with."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, run_stage
from test_train_tokenizer import SMALL
from torch import nn

from peco_ds import registry
from peco_ds.config import PretrainRecipe, TokenizerRecipe
from peco_ds.errors import UserError
from peco_ds.models.tokenizers import load_tokenizer
from peco_ds.planner.report import tokenizing_report
from peco_ds.recipe_files import load_recipe
from peco_ds.registry import EXTENSIONS, FEATURE_NETS, OBJECTIVES, TOKENIZERS, ObjectiveKind, family_of
from peco_ds.runtime.metrics import read_metrics
from peco_ds.runtime.run_weights import read_run

TOYS = Path(__file__).with_name("toy_extensions.py")


@pytest.fixture
def registries(monkeypatch):
    """What is added in a test is gone after it."""
    for one in (OBJECTIVES, TOKENIZERS, FEATURE_NETS):
        monkeypatch.setattr(one, "_entries", dict(one._entries))
    monkeypatch.setattr(registry, "_extensions", {})
    monkeypatch.delenv(EXTENSIONS, raising=False)
    return monkeypatch


@pytest.fixture
def toys(registries):
    registries.setenv(EXTENSIONS, str(TOYS))
    return registries


@pytest.mark.parametrize("table", [OBJECTIVES, TOKENIZERS, FEATURE_NETS], ids=["objective", "tokenizer", "family"])
def test_every_line_of_a_table_names_a_descriptor_whose_functions_are_there(registries, table):
    for kind in table.values():
        for name in ("build", "network", "load"):
            assert callable(getattr(kind, name, len))
    assert len(table) >= 1


def test_a_name_that_is_taken_or_unknown_is_refused(registries):
    OBJECTIVES.add("mine", ObjectiveKind(build=lambda settings: None))
    with pytest.raises(UserError, match="objective.name mine: is there already"):
        OBJECTIVES.add("mine", ObjectiveKind(build=lambda settings: None))
    with pytest.raises(UserError, match=r"'hard_token': there are hard_tokens, .*; did you mean 'hard_tokens'\?"):
        load_recipe(PretrainRecipe, "peco_vitb16", ["objective.name=hard_token"])
    with pytest.raises(UserError, match="tokenizer.kind 'zzz': there are vqgan, .* in PECO_EXTENSIONS"):
        load_recipe(TokenizerRecipe, "peco_tokenizer", ["tokenizer.kind=zzz", "perceptual.weight=0"])


@pytest.mark.parametrize("entry", ["nowhere.py", "no_such_module_of_anyones"])
def test_an_extension_that_is_not_there_is_refused_in_one_line(registries, entry):
    registries.setenv(EXTENSIONS, entry)
    for _ in range(2):
        with pytest.raises(UserError, match=f"PECO_EXTENSIONS {entry}: "):
            list(OBJECTIVES)


def test_several_extensions_are_run_once_each(registries, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            "from peco_ds.registry import OBJECTIVES, ObjectiveKind\n"
            f"OBJECTIVES.add({name!r}, ObjectiveKind(build=len, tags={{'stat': 'tokens/{name}'}}))\n"
        )
    registries.setenv(EXTENSIONS, os.pathsep.join(str(tmp_path / f"{name}.py") for name in ("one", "two")))
    assert {"one", "two"} < set(OBJECTIVES) and {"one", "two"} < set(OBJECTIVES)
    assert registry.stat_tags()["stat"] == "tokens/two"


OPTIONS = {
    "objective.options.amount=much": "objective.options.amount 'much': must be float, as its default 0.1",
    "objective.options.amuont=0.2": "objective.options.amuont: is not declared; there are amount",
    "objective.option.amount=0.2": "unknown setting 'objective.option.amount'",
}


@pytest.mark.parametrize("override", OPTIONS)
def test_an_option_that_is_not_declared_or_of_another_type_is_refused(toys, override):
    with pytest.raises(UserError, match=OPTIONS[override]):
        load_recipe(PretrainRecipe, "peco_vitb16", ["objective.name=toy_smooth", override])


def test_an_option_has_its_default_or_what_the_recipe_says(toys):
    for given, expected in (([], 0.1), (["objective.options.amount=1"], 1)):
        recipe = load_recipe(PretrainRecipe, "peco_vitb16", ["objective.name=toy_smooth", *given]).recipe
        assert recipe.objective.option("amount") == expected and hash(recipe)


def test_a_family_from_outside_is_asked_before_the_vits(toys):
    assert family_of("file.pth", "toy_pyramid_2") is FEATURE_NETS["toy_pyramid"]
    assert family_of("file.pth", "auto") is FEATURE_NETS["vit"]


def two_steps(*arguments: str) -> list[str]:
    return [*arguments, "schedule.steps=2", "schedule.warmup_steps=1"]


def events(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in (folder / "tensorboard").iterdir())


def test_an_objective_from_outside_is_planned_trained_and_named_by_its_card(small_sets, toys, tmp_path, capsys):
    from peco_ds import pretrain

    settings = two_steps(*small_sets.overrides, "objective.name=toy_smooth", "objective.options.amount=0.2")
    assert pretrain.main(["--recipe", "peco_vitb16", "--dry_run", *settings]) == 0
    assert "toy_smooth" in capsys.readouterr().out
    out = tmp_path / "run"
    run_stage("pretrain", "--recipe", "peco_vitb16", "--out", out, *settings, environment={EXTENSIONS: str(TOYS)})
    rows = read_metrics(out)
    assert len(rows) == 2 and all(row["loss"] > 0 and row["tokens/spread"] > 0 for row in rows)
    assert b"tokens/spread" in events(out) and b"loss/tokens" not in events(out)
    versions = json.loads((out / "provenance.json").read_text())["versions"]
    assert versions[f"extension {TOYS}"].startswith("sha256 ")
    # without the file too, for weights do not need it
    toys.delenv(EXTENSIONS)
    assert read_run(out).facts["objective"].startswith("toy_smooth, 64 codes, 6 of 16 patches")


def test_a_tokenizer_and_a_judge_from_outside_are_planned_trained_released_and_read(small_sets, toys, tmp_path, capsys):
    from peco_ds import train_tokenizer

    torch.manual_seed(0)
    judge = tmp_path / "judge.pth"
    torch.save(nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 12, 3, 2, 1)).state_dict(), judge)
    settings = two_steps(
        f"data.root={small_sets.root}",
        *SMALL,
        "tokenizer.kind=toy_patches",
        "tokenizer.options.patch_px=4",
        f"perceptual.weights={judge}",
        "perceptual.architecture=toy_pyramid",
        "perceptual.blocks=[1,2]",
        "perceptual.weight=1",
    )
    assert train_tokenizer.main(["--recipe", "peco_tokenizer", "--dry_run", *settings]) == 0
    planned = capsys.readouterr().out
    assert "kind toy_patches does not tell its network's cost" in planned
    assert "32 px, stride 4 px: 8 x 8 = 64 codes" in planned and "judge or teacher    toy pyramid" in planned
    out = tmp_path / "run"
    config = REPOSITORY / "ds_configs" / "zero1.json"
    run_stage(
        "train_tokenizer",
        *("--recipe", "peco_tokenizer", "--deepspeed_config", config, "--out", out, *settings),
        environment={EXTENSIONS: str(TOYS)},
    )
    rows = read_metrics(out)
    assert len(rows) == 2 and all(row["perceptual"] > 0 and row["pixel"] > 0 and "mfu" not in row for row in rows)
    tokenizer, card = load_tokenizer(out / "tokenizer")
    assert (card.settings.kind, card.stride_px, card.extra["judge"]) == ("toy_patches", 4, "toy pyramid")
    assert card.extra["judge_licence"] == "of no account"
    assert tokenizer.tokenize(torch.zeros(1, 3, 32, 32)).shape == (1, 64)
    recipe = load_recipe(PretrainRecipe, "peco_vitb16", small_sets.overrides).recipe
    assert "toy_patches" in tokenizing_report(recipe, card.settings, num_samples=96)
