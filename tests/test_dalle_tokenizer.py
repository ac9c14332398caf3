from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from published_samples import dalle_tensors
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from peco_ds.errors import UserError
from peco_ds.models.dalle_tokenizer import read_dvae
from peco_ds.models.tokenizers import build_tokenizer, load_tokenizer, save_tokenizer


def both(**sizes) -> dict[str, torch.Tensor]:
    return {
        f"{side}.{name}": tensor
        for side in ("encoder", "decoder")
        for name, tensor in dalle_tensors(side, **sizes).items()
    }


def built(tensors):
    settings, state = read_dvae(tensors)
    tokenizer = build_tokenizer(settings)
    tokenizer.load_state_dict(state)
    return tokenizer.eval()


def flava(tensors, channels: int, codes: int) -> FlavaImageCodebook:
    """transformers' implementation of the encoder with the same weights."""
    named = {}
    for name, tensor in tensors.items():
        name = re.sub(r"\.(group_\d)\.", r".\1.group.", name).replace("res_path.", "res_path.path.")
        named[name[:-1] + {"w": "weight", "b": "bias"}[name[-1]]] = tensor
    net = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=channels, vocab_size=codes))
    net.load_state_dict(named)
    return net.eval()


def read_01(paths, px: int) -> torch.Tensor:
    arrays = [np.asarray(Image.open(path).convert("RGB").resize((px, px), Image.Resampling.LANCZOS)) for path in paths]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
# the second is the released size
@pytest.mark.parametrize(("channels", "codes"), [(8, 32), (256, 8192)])
def test_logits_and_codes_of_real_images_are_those_of_transformers_implementation(real_data, channels, codes):
    tensors = dalle_tensors("encoder", channels=channels, codes=codes)
    images_01 = read_01(real_data.imagenet[:1], 112)
    tokenizer = built({f"encoder.{name}": tensor for name, tensor in tensors.items()})
    theirs = flava(tensors, channels, codes)(0.8 * images_01 + 0.1)
    ours = tokenizer.logits(2 * images_01 - 1)
    assert ours.shape == (1, codes, 14, 14)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.1  # so that 1e-4 means something
    assert torch.equal(tokenizer.tokenize(2 * images_01 - 1), theirs.argmax(dim=1).flatten(1))


def test_the_residual_branch_counts_in_the_comparison_with_transformers():
    tensors = {f"encoder.{name}": tensor for name, tensor in dalle_tensors("encoder").items()}
    images_11 = torch.rand(1, 3, 16, 16) * 2 - 1
    without = {
        name: torch.zeros_like(tensor) if "res_path.conv_4" in name else tensor for name, tensor in tensors.items()
    }
    assert (built(tensors).logits(images_11) - built(without).logits(images_11)).abs().max() > 1e-2


def decoded(tensors, codes: torch.Tensor, grid) -> torch.Tensor:
    """Images in [0, 1] from the released decoder's formula, on one-hot codes."""

    def convolution(x, name):
        weight = tensors[f"decoder.blocks.{name}.w"]
        return F.conv2d(x, weight, tensors[f"decoder.blocks.{name}.b"], padding=weight.shape[-1] // 2)

    x = F.one_hot(codes, tensors["decoder.blocks.input.w"].shape[1]).float().transpose(1, 2).unflatten(2, grid)
    x = convolution(x, "input")
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            name, y = f"group_{group}.block_{block}", x
            for number in (1, 2, 3, 4):
                y = convolution(y.clamp(min=0), f"{name}.res_path.conv_{number}")
            x = (convolution(x, f"{name}.id_path") if f"decoder.blocks.{name}.id_path.w" in tensors else x) + y / 64
        if group < 4:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    mean = 1 / (1 + torch.exp(-convolution(x.clamp(min=0), "output.conv")[:, :3]))
    return ((mean - 0.1) / 0.8).clamp(0, 1)


def test_decoded_codes_are_the_released_decoders_images():
    tensors = both()
    codes = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    images_11 = built(tensors).decode_codes(codes, (2, 3))
    assert images_11.shape == (2, 3, 16, 24) and images_11.dtype == torch.float32
    expected = 2 * decoded(tensors, codes, (2, 3)) - 1
    torch.testing.assert_close(images_11, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.05


def test_soft_tokens_hold_the_largest_probabilities_of_the_whole_softmax():
    tokenizer, images_11 = built(both()), torch.rand(2, 3, 16, 24) * 2 - 1
    soft = tokenizer.tokenize_soft(images_11, 5, temperature=0.5)
    probs, codes = (
        (tokenizer.logits(images_11) / 0.5).softmax(dim=1).flatten(2).transpose(1, 2).sort(dim=-1, descending=True)
    )
    assert torch.equal(soft.codes, tokenizer.tokenize(images_11)) and torch.equal(soft.topk_codes, codes[..., :5])
    torch.testing.assert_close(soft.topk_probs, probs[..., :5])


def test_codes_stand_for_what_the_decoder_makes_of_them_or_for_the_rows_of_the_last_layer():
    tensors = both()
    assert torch.equal(built(tensors).code_vectors, tensors["decoder.blocks.input.w"][:, :, 0, 0].T)
    alone = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    assert torch.equal(built(alone).code_vectors, tensors["encoder.blocks.output.conv.w"][:, :, 0, 0])
    assert built(alone).code_vectors.shape[1] == built(alone).settings.code_dim
    # probes of the codes train nothing here
    assert not built(tensors).code_vectors.requires_grad and not built(alone).code_vectors.requires_grad


def test_a_release_without_decoder_has_the_same_codes_and_says_that_it_makes_no_images(tmp_path):
    tensors, images_11 = both(), torch.rand(2, 3, 16, 16) * 2 - 1
    settings, state = read_dvae({name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")})
    save_tokenizer(tmp_path, state, settings, {"judge": "none"})
    loaded, card = load_tokenizer(tmp_path)
    assert not loaded.makes_images and not card.settings.decoder and card.stride_px == 8
    assert torch.equal(loaded.tokenize(images_11), built(tensors).tokenize(images_11))
    with pytest.raises(AssertionError, match="no decoder"):
        loaded.decode_codes(torch.zeros(1, 4, dtype=torch.int64), (2, 2))
    assert built(tensors).makes_images


@torch.no_grad()
def test_under_autocast_the_logits_are_read_off_in_float32():
    tokenizer, images_11 = built(both()), torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        outputs, logits = tokenizer.trunk(images_11), tokenizer.logits(images_11)
    assert logits.dtype == torch.float32 and torch.equal(logits, tokenizer.encoder[-1](outputs.float()))
    assert not torch.equal(logits, tokenizer.logits(images_11)), "the rest computes in bf16, as it was asked to"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("encoder.blocks.group_3.block_2.res_path.conv_2.b"),
            "group_3.block_2.res_path.conv_2.b is missing",
        ),
        (lambda t: t.pop("encoder.blocks.output.conv.w"), "output.conv.w is missing"),
        (
            lambda t: t.update({"encoder.blocks.group_1.block_9.id_path.w": torch.ones(1)}),
            "group_1.block_9.id_path.w' has no place",
        ),
        (
            lambda t: t.update({"decoder.blocks.input.w": torch.ones(12, 33, 1, 1)}),
            r"decoder.blocks.input.w has shape \(12, 33, 1, 1\)",
        ),
        (lambda t: t.update({"encoder.blocks.input.w": torch.ones(3)}), "no multiples"),
        (lambda t: t.update({"encoder.blocks.input.b": torch.full((8,), float("nan"))}), "not finite"),
        (
            lambda t: t.update({"encoder.blocks.input.b": torch.ones(8, dtype=torch.int64)}),
            "int64, no tensor of floats",
        ),
        (
            lambda t: t.update({"encoder.blocks.input.b": torch.ones(8).to(torch.float8_e4m3fn)}),
            "float8_e4m3fn, no tensor of floats",
        ),
        (
            lambda t: t.update({"encoder.blocks.group_2.block_1.res_path.conv_4.w": torch.ones(18, 4, 1, 1)}),
            "no multiples",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_in_one_line(change, words):
    tensors = both()
    change(tensors)
    with pytest.raises(UserError, match=words) as caught:
        read_dvae(tensors)
    assert "\n" not in str(caught.value)
