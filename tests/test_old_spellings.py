"""Old spellings keep working, each with one line of notice; old records are read with today's names."""

from __future__ import annotations

import argparse
import json
from dataclasses import field
from typing import Annotated, Literal

import pytest
import yaml
from pydantic.dataclasses import dataclass

from peco_ds import errors
from peco_ds.command_line import Parser, parse_stage, stage_parser
from peco_ds.config import PretrainRecipe, Recipe
from peco_ds.errors import UserError
from peco_ds.field_marks import FormerKey, Renamed
from peco_ds.old_spellings import current_record, current_setting, current_settings
from peco_ds.recipe_files import load_recipe
from peco_ds.run_status import run_lines
from peco_ds.runtime.timeline import read_evaluation, read_metrics


@pytest.fixture(autouse=True)
def nothing_noticed(monkeypatch):
    monkeypatch.setattr(errors, "_noticed", set())
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)


@dataclass(frozen=True)
class Section:
    way: Annotated[Literal["new", "other"], Renamed(old="new", older="new"), FormerKey("past.manner")] = "new"


@dataclass(frozen=True)
class Toy:
    section: Section = field(default_factory=Section)


# ---------------------------------------------------------------------------------------------- settings


def test_an_old_value_is_accepted_from_command_line_and_recipe_with_one_notice(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {drop_path_by: picture}\nschedule: {epochs: 1}\n")
    assert load_recipe(PretrainRecipe, recipe, [], environ={}).recipe.model.drop_path_by == "image"
    line = load_recipe(PretrainRecipe, "peco_vitb16", ["model.drop_path_by=picture"], environ={})
    assert line.recipe.model.drop_path_by == "image"
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1
    assert "model.drop_path_by=picture is now written model.drop_path_by=image" in notice


def test_ranks_other_than_the_first_keep_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    load_recipe(PretrainRecipe, "peco_vitb16", ["model.drop_path_by=picture"], environ={})
    assert capsys.readouterr().err == ""


def test_todays_spelling_and_unknown_ones_get_no_notice(capsys):
    load_recipe(PretrainRecipe, "peco_vitb16", ["model.drop_path_by=image"], environ={})
    with pytest.raises(UserError, match="drop_path_by"):
        load_recipe(PretrainRecipe, "peco_vitb16", ["model.drop_path_by=pictures"], environ={})
    with pytest.raises(UserError, match="drop_path_by"):
        load_recipe(PretrainRecipe, "peco_vitb16", ["model.drop_path_by=[picture]"], environ={})
    assert capsys.readouterr().err == ""


def test_a_former_key_becomes_todays_with_its_value():
    key, value, line = current_setting(Toy, "past.manner", "older")
    assert (key, value) == ("section.way", "new") and "past.manner=older is now written section.way=new" in line
    assert current_setting(Toy, "section.way", "other") == ("section.way", "other", "")
    assert current_setting(Toy, "past.else", 3) == ("past.else", 3, "")


@pytest.mark.parametrize(
    "recorded, found",
    [
        ({"past": {"manner": "old", "x": 1}}, {"past": {"x": 1}, "section": {"way": "new"}}),
        ({"section": {"way": "older"}, "y": []}, {"section": {"way": "new"}, "y": []}),
        ({"section": {"way": "other"}, "past": {"manner": "old"}}, {"section": {"way": "other"}, "past": {}}),
        ({"section": 3, "past": {"manner": "old"}}, {"section": 3, "past": {"manner": "old"}}),
        ({"section": {"way": ["old"]}, "past": None}, {"section": {"way": ["old"]}, "past": None}),
        ({}, {}),
    ],
)
def test_a_record_is_brought_up_to_date_and_what_is_damaged_stays(recorded, found):
    before = json.dumps(recorded)
    assert current_settings(Toy, recorded) == found and json.dumps(recorded) == before


def test_recorded_settings_of_every_recipe_are_brought_up_to_date():
    for stage_settings in ({"model": {"drop_path_by": "picture"}}, {"model": {"drop_path_by": "image"}}):
        assert current_settings(Recipe, stage_settings) == {"model": {"drop_path_by": "image"}}


# ------------------------------------------------------------------------------------------------- flags


def parser() -> Parser:
    made = Parser(prog="a_stage")
    made.add_argument("--images", type=int, default=1)
    made.add_argument("rest", nargs="*")
    made.renamed_flag("--pictures", "--images")
    return made


@pytest.mark.parametrize(
    "given", [["--pictures", "5", "a"], ["a", "--pictures=5"], ["--pictures", "4", "--pictures=5"]]
)
@pytest.mark.parametrize("method", ["parse_args", "parse_intermixed_args"])
def test_an_old_flag_works_with_one_notice(given, method, capsys, monkeypatch):
    assert getattr(parser(), method)(given).images == 5
    assert capsys.readouterr().err == "note: --pictures is now written --images; the old spelling still works\n"
    monkeypatch.setattr("sys.argv", ["a_stage", *given])
    assert getattr(parser(), method)().images == 5


def test_todays_flag_gets_no_notice_and_help_shows_it_alone(capsys):
    assert parser().parse_args(["--images", "5"]).images == 5
    assert capsys.readouterr().err == ""
    assert "--images" in parser().format_help() and "--pictures" not in parser().format_help()


def test_a_stage_takes_an_old_flag(tmp_path, capsys):
    stage = stage_parser("A stage.", recipe="peco_vitb16", deepspeed_config="zero1.json")
    stage.renamed_flag("--output", "--out")
    args, _ = parse_stage(stage, PretrainRecipe, ["run.seed=3", "--output", str(tmp_path), "model.depth=2"])
    assert args.out == tmp_path and isinstance(args, argparse.Namespace)
    assert capsys.readouterr().err.count("\n") == 1


# ----------------------------------------------------------------------------------------------- records


def test_rows_of_old_runs_are_read_with_todays_names(tmp_path):
    row = {"step": 3, "step_s": 1.0, "images": 24, "bad_pictures": 2}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "evaluation.jsonl").write_text('{"step": 3, "top1": 50.0, "pictures": 23}\n')
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"stage": "finetune", "recipe": {"name": "old"}}))
    assert read_metrics(tmp_path) == [{"step": 3, "step_s": 1.0, "images": 24, "bad_images": 2}]
    assert read_evaluation(tmp_path) == [{"step": 3, "top1": 50.0, "images": 23}]
    text = "\n".join(run_lines(tmp_path))
    assert "2 bad images" in text and "images 23" in text and "picture" not in text


def test_results_of_old_evaluations_are_read_with_todays_names():
    old = {
        "images": {"folder": "val"},
        "quality": {"top1": 1.0, "pictures": 5},
        "code_probes": {"pictures_as": {"bag of codes": {"best_linear": 2.0}}, "settings": {"lrs": [0.1]}},
    }
    assert current_record(old) == {
        "images": {"folder": "val"},
        "quality": {"top1": 1.0, "images": 5},
        "code_probes": {"images_as": {"bag of codes": {"best_linear": 2.0}}, "settings": {"lrs": [0.1]}},
    }
    assert current_record({"pictures": 1, "images": 2}) == {"pictures": 1, "images": 2}
