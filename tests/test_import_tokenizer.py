from __future__ import annotations

import hashlib

import pytest
import torch
from conftest import run_stage
from published_samples import dalle_tensors, save_dalle, save_lightning, taming_tensors

from peco_ds.errors import UserError
from peco_ds.import_tokenizer import main
from peco_ds.models.published_tokenizers import read_published
from peco_ds.models.tokenizers import build_tokenizer, load_tokenizer, read_card
from peco_ds.registry import TOKENIZERS


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refused(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        main(list(map(str, arguments)))
    return str(caught.value)


def test_dalles_full_size_encoder_becomes_a_release_whose_codes_are_its_own(tmp_path, capsys):
    encoder, out = tmp_path / "encoder.pkl", tmp_path / "tokenizer"
    save_dalle(encoder, "encoder", dalle_tensors("encoder", channels=256, codes=8192))
    assert encoder.stat().st_size == pytest.approx(215e6, rel=0.01)
    assert main([str(encoder), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert (
        said.count("\n") == 1
        and all(
            words in said
            for words in ("dvae tokenizer, 8192 codes, stride 8 px", "licence: MIT, modified", "makes no images")
        )
        and "trained with" not in said
    )
    loaded, card = load_tokenizer(out)
    assert (card.num_codes, card.stride_px, card.settings.only_px) == (8192, 8, None)
    assert (
        card.extra["files"] == [["encoder.pkl", sha256(encoder)]]
        and card.extra["judge"] == "none"
        and "DALL-E" in card.extra["origin"]
    )
    found = read_published([encoder])
    direct = build_tokenizer(found.settings)
    direct.load_state_dict(found.state_dict)
    images_11 = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = loaded.tokenize(images_11)
    assert codes.shape == (1, 14 * 14) and torch.equal(codes, direct.eval().tokenize(images_11))


def test_started_by_path_a_gumbel_checkpoint_becomes_a_release_that_decodes(tmp_path):
    ckpt, out = tmp_path / "last.ckpt", tmp_path / "new" / "tokenizer"
    save_lightning(ckpt, taming_tensors("gumbel", mults=(1, 1, 2, 4)))
    done = run_stage("import_tokenizer", ckpt, "--out", out, "--kind", "gumbel")
    assert (
        "2 tensors left out that only its training needs" in done.stdout
        and "licence: MIT (github.com/CompVis/taming-transformers)" in done.stdout
    )
    assert "trained with LPIPS on VGG16, licence: BSD-2-Clause" in done.stdout
    loaded, card = load_tokenizer(out)
    assert "LPIPS" in card.extra["judge"] and "BSD-2-Clause" in card.extra["judge_licence"]
    images_11 = torch.rand(2, 3, 16, 24) * 2 - 1
    assert loaded.decode_codes(loaded.tokenize(images_11), (2, 3)).shape == images_11.shape
    assert card.extra["files"] == [["last.ckpt", sha256(ckpt)]]


def test_importing_again_is_harmless_and_nothing_else_is_written_over(tmp_path):
    encoder, decoder, out = tmp_path / "encoder.pkl", tmp_path / "decoder.pkl", tmp_path / "tokenizer"
    for path in (encoder, decoder):
        save_dalle(path, path.stem, dalle_tensors(path.stem))
    main([str(encoder), str(decoder), "--out", str(out)])
    first = read_card(out).fingerprint
    main([str(decoder), str(encoder), "--out", str(out)])
    assert read_card(out).fingerprint == first
    assert "release of another tokenizer" in refused(encoder, "--out", out)
    assert read_card(out).fingerprint == first
    (out / "notes.txt").write_text("mine")
    assert "holds notes.txt" in refused(encoder, decoder, "--out", out)
    assert "is a file" in refused(encoder, "--out", decoder)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "encoder.pkl").write_bytes(b"PK\x03\x04 cut short")
    done = run_stage("import_tokenizer", tmp_path / "encoder.pkl", "--out", tmp_path / "tokenizer", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "tokenizer").exists()


def test_the_kinds_to_choose_from_are_all_that_others_released(capsys):
    assert "invalid choice" in refused("x.pkl", "--out", "y", "--kind", "none")
    with pytest.raises(SystemExit):
        main(["--help"])
    released = sorted(name for name, kind in TOKENIZERS.items() if kind.release is not None)
    assert "vqvit" not in released and "{" + ",".join(["auto", *released]) + "}" in capsys.readouterr().out.replace(
        "\n", ""
    )
