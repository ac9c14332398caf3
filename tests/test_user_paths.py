import importlib
import os
from pathlib import Path

import pytest

from peco_ds import pack_images
from peco_ds.config import DataSettings, FinetuneRecipe, PretrainRecipe, TokenizerRecipe
from peco_ds.convert.read import read_weights
from peco_ds.data_paths import data_path
from peco_ds.deepspeed_json import DS_CONFIGS, read_deepspeed_json
from peco_ds.errors import UserError
from peco_ds.models.feature_nets import load_feature_net
from peco_ds.recipe_files import find_recipe, load_recipe
from peco_ds.user_paths import check_can_make, check_can_write, expand, expand_path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    home = tmp_path / "home of mine"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    return home


@pytest.mark.parametrize(
    "text, expected",
    [
        ("~", "{home}"),
        ("~/run", "{home}/run"),
        ("$SCRATCH/run", "{scratch}/run"),
        ("${SCRATCH}/a/$SCRATCH", "{scratch}/a/{scratch}"),
        ("runs/~a", "runs/~a"),
        ("/data/#1: two", "/data/#1: two"),
        ("50$", "50$"),
        ("", ""),
    ],
)
def test_a_path_is_what_a_shell_would_make_of_it(home, tmp_path, text, expected):
    assert expand(text) == expected.format(home=home, scratch=tmp_path / "scratch")


def test_a_folder_with_a_dollar_in_its_name_is_taken_as_it_is_written(home, tmp_path):
    for name in ("$RECYCLE.BIN", "${x}", "~"):
        (tmp_path / name).mkdir()
    assert expand_path("$RECYCLE.BIN") == Path("$RECYCLE.BIN") and expand_path("${x}") == Path("${x}")
    assert expand_path("~") == home and expand_path("./~") == Path("~"), "./ keeps it, as in a shell"


@pytest.mark.parametrize("text", ["$NOWHERE/x", "a/${NOWHERE}", "~nobody_of_this_name/x"])
def test_a_variable_or_a_user_that_is_not_known_is_named(text):
    with pytest.raises(UserError, match=r"NOWHERE|nobody_of_this_name"):
        expand(text)
    with pytest.raises(UserError, match="no path may hold"):
        expand(f"{text}\0")


@pytest.mark.parametrize("spelling", ["~", "$HOME", "${HOME}"])
def test_every_setting_and_option_that_names_a_path_takes_it(home, spelling):
    """Each says that the file at home is not there, or is the wrong one; none looks for a folder of that name."""
    there = f"{spelling}/x"
    assert data_path(DataSettings(root=there), "images") == home / "x" / "images"
    assert data_path(DataSettings(root="/data"), there) == home / "x"
    for read in (
        lambda: read_weights(there),
        lambda: load_feature_net(f"{there}.pth"),
        lambda: read_deepspeed_json(there),
    ):
        with pytest.raises(UserError, match=str(home)):
            read()
    (home / "mine.yaml").write_text("name: mine")
    (home / "x").write_text((DS_CONFIGS / "zero1.json").read_text())
    assert find_recipe(f"{spelling}/mine.yaml") == home / "mine.yaml"
    assert read_deepspeed_json(there)


ENTRIES = ("pack_images", "import_tokenizer", "import_judge", "convert_checkpoint", "evaluate", "linear_probe")
NEEDED = {
    "pack_images": ["--images", "."],
    "import_tokenizer": ["x.pth"],
    "import_judge": ["lite0"],
    "convert_checkpoint": ["x", "--to", "timm"],
    "evaluate": ["x", "--images", "."],
}


@pytest.mark.parametrize("entry", [*ENTRIES, "pretrain", "finetune", "train_tokenizer"])
@pytest.mark.parametrize("out, word", [("", "empty"), ("$NOWHERE/x", "NOWHERE")])
def test_an_output_without_a_name_is_refused_and_not_the_current_folder(tmp_path, entry, out, word):
    main = importlib.import_module(f"peco_ds.{entry}").main
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=rf"--out.*{word}"):
        main([*NEEDED.get(entry, []), f"--out={out}"])
    assert sorted(tmp_path.iterdir()) == before


# ------------------------------------------------------------------------------------------- overrides

TAKEN_AS_THEY_ARE = [
    "/data/#1",
    "/data/ #1",
    "#1",
    "a: b",
    "/data/with: colon",
    "*",
    "&x",
    "!x",
    "@x",
    "%x",
    "[1",
    "{a",
    "- x",
    "007",
    "1e3",
    "yes",
    "null",
    "~/x",
    "it's",
    "x'",
    "2024-13-01",
]


@pytest.mark.parametrize("text", TAKEN_AS_THEY_ARE)
def test_a_setting_that_is_text_takes_an_override_as_it_stands(text):
    for recipe_type, name, key in (
        (PretrainRecipe, "peco_vitb16", "data.images"),
        (FinetuneRecipe, "finetune_vitb16", "init.weights"),
        (TokenizerRecipe, "peco_tokenizer", "perceptual.weights"),
    ):
        given = [f"{key}={text}"] + (["perceptual.weight=0"] if key != "perceptual.weights" else [])
        needs = given if recipe_type is TokenizerRecipe else given[:1]
        section, field = key.split(".")
        recipe = load_recipe(recipe_type, name, [*needs, *HELD_OUT.get(name, [])], environ={}).recipe
        assert getattr(getattr(recipe, section), field) == text


HELD_OUT = {"peco_tokenizer": ["data.holdout=4"]}


@pytest.mark.parametrize("text", ["'a b'", '"a b"', '"a\\u0020b"'])
def test_quotes_around_an_override_are_yamls(text):
    assert load_recipe(PretrainRecipe, "peco_vitb16", [f"name={text}"], environ={}).recipe.name == "a b"


@pytest.mark.parametrize("text", ["run.seed=1 # 2", "views.scale=[0.2, 1.0] #x", "run.seed=#1", "run.precision=fp32 #"])
def test_nothing_of_an_override_is_dropped_as_a_comment(text):
    with pytest.raises(UserError, match=text.partition("=")[0]):
        load_recipe(PretrainRecipe, "peco_vitb16", [text], environ={})


# -------------------------------------------------------------------------------------------- outputs


def test_a_place_that_takes_no_file_is_found_out_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    check_can_write("--out", tmp_path / "e.json")
    check_can_make("--out", tmp_path / "new" / "release")
    assert sorted(os.listdir(tmp_path)) == ["file", "home of mine"]
    for check, path, word in (
        (check_can_write, Path("/proc/self/e.json"), "cannot be written"),
        (check_can_write, tmp_path / "none" / "e.json", "no folder"),
        (check_can_write, tmp_path, "is a folder"),
        (check_can_make, Path("/proc/self/release"), "cannot be written"),
        (check_can_make, tmp_path / "file" / "release", "is a file"),
    ):
        with pytest.raises(UserError, match=word) as caught:
            check("--out", path)
        assert str(caught.value).startswith(f"--out {path}: ")


@pytest.mark.parametrize(
    "entry, arguments",
    [
        ("evaluate", ["nothing_of_this_name", "--images", "nowhere"]),
        ("convert_checkpoint", ["nothing_of_this_name", "--to", "timm"]),
        ("import_tokenizer", ["nothing_of_this_name"]),
        ("import_judge", ["alexnet"]),
    ],
)
def test_a_disk_that_takes_no_file_is_said_before_anything_is_read(entry, arguments):
    with pytest.raises(UserError, match="--out /proc/self/x: cannot be written"):
        importlib.import_module(f"peco_ds.{entry}").main([*arguments, "--out", "/proc/self/x"])


@pytest.mark.parametrize("blank", ["", " ", "\t"])
def test_a_blank_path_is_no_folder(blank):
    with pytest.raises(UserError, match="--out: is empty; give a path"):
        pack_images.main(["--images", ".", "--out", blank])
