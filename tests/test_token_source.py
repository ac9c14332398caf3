"""What a run records of the tokenizer behind its codes, whether the tokenizer is at hand or only its tokens."""

import json
import shutil

import pytest

from peco_ds import tokenize_shards
from peco_ds.config import PretrainRecipe
from peco_ds.data.image_set import ImageSet
from peco_ds.data.token_shards import TokenSet
from peco_ds.data_paths import data_path
from peco_ds.models.tokenizers import CARD_NAME
from peco_ds.recipe_files import load_recipe
from peco_ds.runtime.token_source import token_provenance
from peco_ds.schema import MANIFEST_NAME

FACTS = {"judge": "MoCo v3", "judge_licence": "CC BY-NC 4.0", "licence": "MIT", "recipe": "peco_tokenizer"}


def set_card(folder, extra: dict) -> None:
    card = json.loads((folder / CARD_NAME).read_text())
    (folder / CARD_NAME).write_text(json.dumps(card | {"extra": extra}))


@pytest.fixture
def sets(small_sets, tmp_path):
    """A data root whose tokenizer and token set may be changed."""
    for part in ("tokenizer", "tokens", "images"):
        shutil.copytree(small_sets.root / part, tmp_path / part)
    return tmp_path


def opened(small_sets, root):
    recipe = load_recipe(PretrainRecipe, "peco_vitb16", [*small_sets.overrides, f"data.root={root}"]).recipe
    images = ImageSet(data_path(recipe.data, recipe.data.images))
    return recipe, TokenSet(
        data_path(recipe.data, recipe.data.tokens), images.manifest, num_codes=64, grid=4, views=recipe.views
    )


def test_the_tokens_tell_their_tokenizers_judge_and_licences_where_the_tokenizer_is_gone(small_sets, sets):
    before = {path.name: path.stat().st_mtime_ns for path in (sets / "tokens" / "train").glob("*.tar")}
    set_card(sets / "tokenizer", FACTS | {"steps": 7, "psnr": 20.5})
    arguments = ["--recipe", "peco_vitb16", *small_sets.overrides, f"data.root={sets}", "--finish", "--parts", "2"]
    # as after a start that was cut off: shards of before count as done
    assert tokenize_shards.main(arguments) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (sets / "tokens" / "train").glob("*.tar")} == before
    recipe, tokens = opened(small_sets, sets)
    assert token_provenance(recipe, tokens)["tokenizer"] == FACTS | {"steps": 7, "psnr": 20.5}
    shutil.rmtree(sets / "tokenizer")
    found = token_provenance(recipe, tokens)
    assert found == {"tokenizer": FACTS, "tokenizer_fingerprint": tokens.manifest.tokenizer_fingerprint}


def test_tokens_from_before_these_facts_were_kept_give_none(small_sets, sets):
    path = sets / "tokens" / "train" / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    assert manifest.pop("tokenizer_facts") == {"judge": "none"}
    path.write_text(json.dumps(manifest))
    shutil.rmtree(sets / "tokenizer")
    recipe, tokens = opened(small_sets, sets)
    assert token_provenance(recipe, tokens)["tokenizer"] == {}
