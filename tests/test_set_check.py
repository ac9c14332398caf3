"""Every stage that opens an image set names a tar that has changed or gone since it was indexed, before it works."""

from __future__ import annotations

import importlib
import os
import shutil

import pytest
from conftest import SMALL_CLASSIFIER, SMALL_VIT
from test_train_tokenizer import SMALL as SMALL_TOKENIZER

from peco_ds import pack_images
from peco_ds.errors import UserError


@pytest.fixture(scope="module")
def indexed(labelled_sets, tmp_path_factory):
    """Two labelled sets whose tars were indexed where they lie, and a copy of the tars."""
    root = tmp_path_factory.mktemp("indexed")
    for split in ("train", "val"):
        (root / split).mkdir()
        for tar in (labelled_sets.root / "images" / split).glob("*.tar"):
            shutil.copy2(tar, root / split / tar.name)
        arguments = ["--index_tars", str(root / split), "--out", str(root / "images" / split), "--workers", "1"]
        pack_images.main(arguments)
    return root


@pytest.fixture
def changed(indexed, request):
    """A tar that its owner has made anew: of the same size, or a longer one. Mended again."""
    split, how = request.param
    tar = sorted((indexed / split).glob("*.tar"))[-1]
    before, status = tar.read_bytes(), tar.stat()
    made_anew = bytearray(before + (bytes(10240) if how == "longer" else b""))
    at = made_anew.find(b"\xff\xd8\xff")
    made_anew[at + 600] ^= 1
    tar.write_bytes(made_anew)
    yield tar
    tar.write_bytes(before)
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))


def arguments_of(stage: str, root, out, small_sets) -> list[str]:
    sets = [f"data.root={root}", "--out", str(out)]
    tokenizer = f"data.tokenizer={small_sets.root / 'tokenizer'}"
    return {
        "finetune": ["--recipe", "finetune_vitb16", *SMALL_CLASSIFIER, "init.weights=", *sets],
        "train_tokenizer": ["--recipe", "peco_tokenizer", *SMALL_TOKENIZER, *sets],
        "pretrain": ["--recipe", "peco_vitb16", *SMALL_VIT, "data.tokens=online", tokenizer, *sets],
        "tokenize_shards": ["--recipe", "peco_vitb16", *SMALL_VIT, tokenizer, f"data.tokens={out}", sets[0]],
        "evaluate": [tokenizer.partition("=")[2], "--images", str(root / "images" / "train"), "--out", str(out)],
    }[stage]


@pytest.mark.parametrize(
    "changed", [("train", "same size"), ("train", "longer")], indirect=True, ids=lambda how: how[1]
)
@pytest.mark.parametrize("stage", ["finetune", "train_tokenizer", "pretrain", "tokenize_shards", "evaluate"])
def test_a_stage_refuses_a_tar_that_was_made_anew_before_it_writes_anything(
    stage, indexed, changed, tmp_path, small_sets
):
    main = importlib.import_module(f"peco_ds.{stage}").main
    # A tokenizer's held-out images are read while its set is opened.
    with pytest.raises(UserError, match=rf"{changed.name}: .*(changed|were indexed).* back, or index|again, or index"):
        main(arguments_of(stage, indexed, tmp_path / "out", small_sets))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changed", [("train", "longer"), ("val", "longer")], indirect=True, ids=lambda how: " ".join(how)
)
@pytest.mark.parametrize("stage", ["finetune", "train_tokenizer", "pretrain"])
def test_a_dry_run_names_it_too(stage, indexed, changed, tmp_path, small_sets, capsys):
    main = importlib.import_module(f"peco_ds.{stage}").main
    arguments = [*arguments_of(stage, indexed, tmp_path / "out", small_sets), "--dry_run"]
    if changed.parent.name == "val" and stage != "finetune":
        # They read no such set.
        assert main(arguments) == 0
        return
    with pytest.raises(UserError, match=changed.name):
        main(arguments)
