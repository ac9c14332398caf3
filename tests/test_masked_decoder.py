"""The decoder behind a visible-only encoder, place by place."""

import pytest
import torch

from peco_ds.config import EncodingSettings, ModelSettings
from peco_ds.models.masked_decoder import MaskedDecoder, bias_at, tokens_at, visible_first

GRID, M, V = 4, 6, 50
PATCHES = GRID**2


def decoder_with_trained_look() -> MaskedDecoder:
    torch.manual_seed(0)
    settings = ModelSettings(image_px=64, patch_px=16, width=96, heads=3)
    decoder = MaskedDecoder(
        settings, EncodingSettings(kind="visible", decoder_width=48, decoder_depth=2, decoder_heads=3), V
    )
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return decoder


def masked_patches(batch=2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(PATCHES, generator=generator)[:M].sort().values for _ in range(batch)])


def test_shown_patches_come_first_and_both_kinds_increase():
    masked = masked_patches()
    for order, hidden in zip(visible_first(masked, PATCHES).tolist(), masked.tolist()):
        assert order == [patch for patch in range(PATCHES) if patch not in hidden] + hidden


def test_the_bias_of_some_patches_is_the_whole_ones_rows_and_columns():
    bias, masked = torch.randn(3, 1 + PATCHES, 1 + PATCHES), masked_patches()
    for found, patches in zip(bias_at(bias, masked), masked):
        tokens = [0, *(patches + 1).tolist()]
        assert torch.equal(found, bias[:, tokens][:, :, tokens])


def test_the_gradient_of_a_place_that_several_images_show_is_their_sum():
    bias, masked = torch.randn(3, 1 + PATCHES, 1 + PATCHES, dtype=torch.float64, requires_grad=True), masked_patches()
    weights = torch.randn(2, 3, 1 + M, 1 + M, dtype=torch.float64)
    (bias_at(bias, masked) * weights).sum().backward()
    expected = torch.zeros_like(bias)
    for image, patches in enumerate(masked):
        tokens = [0, *(patches + 1).tolist()]
        for i, row in enumerate(tokens):
            for j, column in enumerate(tokens):
                expected[:, row, column] += weights[image, :, i, j]
    torch.testing.assert_close(bias.grad, expected)


def test_every_token_is_put_at_its_place():
    """Written out place by place: visible tokens where they were, the mask token elsewhere, then blocks, norm and
    head.
    """
    decoder, masked = decoder_with_trained_look(), masked_patches()
    encoded = torch.randn(2, 1 + PATCHES - M, 96)
    with torch.no_grad():
        logits, features = decoder(encoded, visible_first(masked, PATCHES), masked)
        rows = []
        for tokens, hidden in zip(decoder.embed(encoded), masked.tolist()):
            shown = iter(tokens[1:])
            rows.append(
                torch.stack(
                    [
                        tokens[0],
                        *(decoder.mask_token[0, 0] if patch in hidden else next(shown) for patch in range(PATCHES)),
                    ]
                )
            )
        x, bias = torch.stack(rows), decoder.rel_pos_bias()
        for block in decoder.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        expected = decoder.norm(x)
        expected_logits = torch.stack(
            [decoder.lm_head(tokens[1:][patches]) for tokens, patches in zip(expected, masked)]
        )
    assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (logits - expected_logits).abs().max() <= 1e-5 * expected_logits.abs().max()


def test_tokens_are_taken_at_patch_numbers_behind_the_class_token():
    tokens, masked = torch.randn(2, 1 + PATCHES, 5), masked_patches()
    assert torch.equal(
        tokens_at(tokens, masked), torch.stack([row[1:][patches] for row, patches in zip(tokens, masked)])
    )


def test_it_starts_as_beit_does_and_without_layer_scale():
    torch.manual_seed(0)
    settings = ModelSettings(image_px=64, patch_px=16, width=384, heads=6)
    decoder = MaskedDecoder(
        settings, EncodingSettings(kind="visible", decoder_width=384, decoder_depth=4, decoder_heads=6), 1000
    )
    # a normal distribution cut at one standard deviation keeps 0.5396 of it
    expected = 0.02 * 0.5396
    for number, block in enumerate(decoder.blocks, start=1):
        assert block.mlp.fc1.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert block.mlp.fc2.weight.std().item() == pytest.approx(expected / (2 * number) ** 0.5, rel=0.02)
        assert block.gamma_1 is None and not block.mlp.fc1.bias.any()
    assert decoder.lm_head.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert decoder.mask_token.std().item() == pytest.approx(expected, rel=0.15)
