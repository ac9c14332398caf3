"""Tokenizing is killed, and gets done: the set is that of an undisturbed start, byte for byte."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import run_stage

from peco_ds import tokenize_shards
from peco_ds.config import PretrainRecipe
from peco_ds.data.image_set import ImageSet
from peco_ds.data.token_shards import TokenSet
from peco_ds.data_paths import data_path
from peco_ds.errors import EXIT_DONE, EXIT_REQUEUE, UserError
from peco_ds.recipe_files import load_recipe


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def test_a_tokenizing_that_is_killed_again_and_again_gives_the_set_of_an_undisturbed_one(small_sets, tmp_path):
    arguments = [
        "--recipe",
        "peco_vitb16",
        *small_sets.overrides,
        f"data.tokens={tmp_path / 'tokens'}",
        "data.num_workers=1",
        "run.micro_batch=3",
    ]
    done = run_stage("tests/killed_starts.py", tmp_path / "tokens", json.dumps(arguments))
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes[-1] == EXIT_DONE and codes[2] in (EXIT_REQUEUE, EXIT_DONE, -15), codes
    assert contents(tmp_path / "tokens") == contents(small_sets.root / "tokens" / "train")
    assert codes.count(-9) >= 3


def test_the_networks_precision_is_told_before_recorded_after_and_compared_when_the_set_is_read(
    small_sets, tmp_path, capsys
):
    settings = [*small_sets.overrides, f"data.tokens={tmp_path / 'tokens'}"]
    in_bf16 = [*settings, "views.tokenizer_precision=bf16"]
    assert tokenize_shards.main(["--recipe", "peco_vitb16", "--dry_run", *in_bf16]) == EXIT_DONE
    assert "network in bf16" in capsys.readouterr().out
    run_stage("tokenize_shards", "--recipe", "peco_vitb16", *in_bf16)
    recipe = load_recipe(PretrainRecipe, "peco_vitb16", in_bf16).recipe
    images = ImageSet(data_path(recipe.data, recipe.data.images))
    opened = lambda views, folder: TokenSet(folder, images.manifest, num_codes=64, grid=4, views=views)  # noqa: E731
    rounded, exact = (
        opened(recipe.views, tmp_path / "tokens"),
        opened(replace(recipe.views, tokenizer_precision="fp32"), small_sets.root / "tokens" / "train"),
    )
    with pytest.raises(UserError, match="views.tokenizer_precision = bf16, the recipe has fp32"):
        opened(replace(recipe.views, tokenizer_precision="fp32"), tmp_path / "tokens")
    # nor are two precisions mixed in one set
    with pytest.raises(UserError, match="tokenizer_precision='bf16'.*tokenizer_precision='fp32'"):
        tokenize_shards.main(["--recipe", "peco_vitb16", *settings])
    same = [(rounded.read(sample).codes == exact.read(sample).codes).mean() for sample in range(96)]
    assert 0.8 < sum(same) / 96 < 1, "bf16 changes some codes, those of patches between two codes, and few"
