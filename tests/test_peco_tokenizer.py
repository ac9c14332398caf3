from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from peco_ds.config import TokenizerLossSettings, TokenizerSettings
from peco_ds.errors import UserError
from peco_ds.models import tokenizers
from peco_ds.models.tokenizers import build_tokenizer, load_tokenizer, read_card, save_tokenizer
from peco_ds.objectives.tokenizer_losses import tokenizer_loss

TINY = TokenizerSettings(
    channels=16, channel_mults=(1, 2, 2), blocks_per_level=1, z_channels=16, code_dim=8, num_codes=64
)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return build_tokenizer(TINY)


def images_11(paths, px: int) -> torch.Tensor:
    arrays = [np.asarray(Image.open(path).convert("RGB").resize((px, px), Image.Resampling.BICUBIC)) for path in paths]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_default_settings_give_the_published_sizes_of_vqgan_f16():
    with torch.device("meta"):
        tokenizer = build_tokenizer(TokenizerSettings())
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (tokenizer.encoder, tokenizer.decoder)]
    assert millions == [pytest.approx(29.3, rel=0.01), pytest.approx(42.4, rel=0.01)]


def test_grid_codes_and_reconstruction_have_the_promised_shapes(tiny):
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    out = tiny(images)
    assert out.reconstruction.shape == images.shape
    assert out.codes.shape == (2, 4 * 6) and out.codes.dtype == torch.int64
    assert tiny.encode(images).shape == (2, TINY.code_dim, 4, 6)


def test_codes_decode_to_the_reconstruction(tiny):
    tiny.eval()
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    codes = tiny.tokenize(images)
    torch.testing.assert_close(tiny.decode_codes(codes, (4, 6)), tiny(images).reconstruction)


def test_codes_are_row_major(tiny):
    tiny.eval()
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    features = tiny.encode(images)
    row_by_row = [tiny.codebook(features[:, :, y : y + 1]).codes for y in range(features.shape[2])]
    assert torch.equal(torch.cat(row_by_row, dim=1), tiny.tokenize(images))


def test_every_parameter_takes_part_in_forward(tiny):
    out = tiny(torch.rand(2, 3, 16, 16) * 2 - 1)
    (out.reconstruction.square().mean() + out.commitment).backward()
    assert [name for name, p in tiny.named_parameters() if p.grad is None] == []


def test_tokenizing_in_training_mode_is_refused_because_it_would_be_counted(tiny):
    with pytest.raises(AssertionError, match="eval"):
        tiny.tokenize(torch.zeros(1, 3, 16, 16))


def test_sixteen_bit_parameters_give_a_float32_reconstruction_close_to_full_precision(tiny):
    tiny.eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codes, full = tiny.tokenize(images), None
    full = tiny.decode_codes(codes, (4, 4))
    half = tiny.bfloat16().decode_codes(codes, (4, 4))
    assert half.dtype == torch.float32 and tiny(images).reconstruction.dtype == torch.float32
    assert (half - full).abs().mean() < 0.05 * full.abs().mean()


def test_a_tiny_tokenizer_learns_four_real_images(tiny, real_data):
    images = images_11(real_data.imagenet[:4], 32)
    tiny.eval()
    with torch.no_grad():
        features = tiny.encode(images)
    tiny.codebook.init_kmeans(
        features.permute(0, 2, 3, 1).reshape(-1, TINY.code_dim), 5, torch.Generator().manual_seed(0)
    )
    tiny.train()
    optimizer = torch.optim.Adam(tiny.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        loss, stats = tokenizer_loss(tiny(images), images, settings=TokenizerLossSettings())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tiny.codebook.update()
        losses.append(stats["pixel"].item())
    assert losses[-1] < 0.5 * losses[0]


# --------------------------------------------------------------------------------------------- release


@pytest.fixture
def release(tiny, tmp_path):
    tiny.codebook.init_kmeans(
        torch.randn(200, TINY.code_dim, generator=torch.Generator().manual_seed(0)), 2, torch.Generator().manual_seed(0)
    )
    save_tokenizer(tmp_path / "release", tiny.state_dict(), TINY, {"images_seen": 4})
    return tmp_path / "release"


def test_a_saved_tokenizer_comes_back_with_the_same_codes_and_images(tiny, release):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    loaded, card = load_tokenizer(release)
    tiny.eval()
    assert not loaded.training
    assert torch.equal(loaded.tokenize(images), tiny.tokenize(images))
    assert torch.equal(loaded(images).reconstruction, tiny(images).reconstruction)
    assert card.settings == TINY and card.num_codes == 64 and card.stride_px == 4 and card.extra == {"images_seen": 4}
    assert read_card(release) == card


def test_the_fingerprint_is_that_of_weights_and_settings_and_of_nothing_else(tiny, release, tmp_path):
    fingerprint = read_card(release).fingerprint
    assert save_tokenizer(tmp_path / "again", tiny.state_dict(), TINY, {"other": "facts"}) == fingerprint
    state = tiny.state_dict()
    state["codebook.codes"][0, 0] += 1e-6
    assert save_tokenizer(tmp_path / "other", state, TINY, {}) != fingerprint


def test_saving_over_a_release_replaces_it(tiny, release):
    state = {name: tensor + 1 for name, tensor in tiny.state_dict().items()}
    fingerprint = save_tokenizer(release, state, TINY, {})
    loaded, card = load_tokenizer(release)
    assert card.fingerprint == fingerprint
    assert torch.equal(loaded.codebook.codes, state["codebook.codes"])
    assert sorted(path.name for path in release.iterdir()) == ["tokenizer.json", "tokenizer.safetensors"]


def test_weights_saved_in_sixteen_bits_load_in_float32(tiny, tmp_path):
    save_tokenizer(tmp_path, tiny.bfloat16().state_dict(), TINY, {})
    loaded, _ = load_tokenizer(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.999])
def test_one_flipped_byte_is_refused(release, place):
    path = release / "tokenizer.safetensors"
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(UserError):
        load_tokenizer(release)


def test_a_truncated_file_is_refused(release):
    path = release / "tokenizer.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="safetensors"):
        load_tokenizer(release)


def test_changed_settings_are_refused(release):
    path = release / "tokenizer.json"
    card = json.loads(path.read_text())
    card["settings"]["l2_normalized"] = True
    path.write_text(json.dumps(card))
    with pytest.raises(UserError, match="fingerprint"):
        load_tokenizer(release)


def test_missing_and_unexpected_tensors_are_named(release):
    path = release / "tokenizer.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "stranger": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="stranger"):
        load_tokenizer(release)
    del tensors["codebook.codes"]
    save_file(tensors, path)
    with pytest.raises(UserError, match="codebook.codes is missing"):
        load_tokenizer(release)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.safetensors"])
def test_a_missing_file_is_named(release, name):
    (release / name).unlink()
    for read in (load_tokenizer, read_card):
        with pytest.raises(UserError, match=name):
            read(release)


def test_a_missing_folder_says_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match="train_tokenizer.py"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"kind": "images"}',
        '{"kind": "peco_tokenizer", "format_version": 1, "settings": {"chanels": 3}}',
    ],
)
def test_a_card_that_is_none_is_refused_in_one_line(release, text):
    (release / "tokenizer.json").write_text(text)
    with pytest.raises(UserError) as caught:
        load_tokenizer(release)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_not_finite_is_neither_released_nor_read(tiny, tmp_path, monkeypatch):
    state = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    state["codebook.codes"][3, 1] = float("nan")
    with pytest.raises(UserError, match="no release in .*tensor codebook.codes holds values that are not finite"):
        save_tokenizer(tmp_path / "release", state, TINY, {})
    assert not (tmp_path / "release").exists()
    # As an earlier release of this package wrote it.
    monkeypatch.setattr(tokenizers, "check_finite", lambda *_: None)
    save_tokenizer(tmp_path / "release", state, TINY, {})
    monkeypatch.undo()
    with pytest.raises(UserError, match="tensor codebook.codes holds values that are not finite"):
        load_tokenizer(tmp_path / "release")
