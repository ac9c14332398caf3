from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from published_samples import taming_tensors

from peco_ds.config import TokenizerSettings
from peco_ds.errors import UserError
from peco_ds.models.taming_layout import read_gumbel, read_vqgan
from peco_ds.models.tokenizers import build_tokenizer, load_tokenizer, save_tokenizer

READ = {"vqgan": read_vqgan, "gumbel": read_gumbel}
# f16 and f8, with fewer channels
SIZES = {"vqgan": {"mults": (1, 1, 2, 2, 4), "blocks": 2}, "gumbel": {"mults": (1, 1, 2, 4), "blocks": 2}}


def built(kind: str, tensors):
    settings, state = READ[kind](tensors)
    tokenizer = build_tokenizer(settings)
    tokenizer.load_state_dict(state)
    return tokenizer.eval()


# ----------------------------------------------------------------------- the network from its formulas


class Reference:
    """VQGAN over a dictionary of tensors in the released names; what is there decides what is run."""

    def __init__(self, tensors) -> None:
        self.t = tensors

    def convolution(self, x, name, **options):
        weight = self.t[f"{name}.weight"]
        return F.conv2d(x, weight, self.t[f"{name}.bias"], **({"padding": weight.shape[-1] // 2} | options))

    def norm(self, x, name):
        grouped = x.reshape(len(x), 32, -1).double()
        spread = (grouped.var(dim=2, correction=0, keepdim=True) + 1e-6).sqrt()
        standard = ((grouped - grouped.mean(dim=2, keepdim=True)) / spread).reshape(x.shape).float()
        return standard * self.t[f"{name}.weight"][:, None, None] + self.t[f"{name}.bias"][:, None, None]

    @staticmethod
    def swish(x):
        return x / (1 + torch.exp(-x))

    def residual(self, x, name):
        y = self.convolution(self.swish(self.norm(x, f"{name}.norm1")), f"{name}.conv1")
        y = self.convolution(self.swish(self.norm(y, f"{name}.norm2")), f"{name}.conv2")
        return (self.convolution(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.t else x) + y

    def attend(self, x, name):
        y = self.norm(x, f"{name}.norm")
        q, k, v = (self.convolution(y, f"{name}.{part}").flatten(2) for part in "qkv")
        likeness = torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5
        weights = torch.exp(likeness - likeness.amax(dim=2, keepdim=True))
        weights = weights / weights.sum(dim=2, keepdim=True)
        return x + self.convolution(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape), f"{name}.proj_out")

    def level(self, x, name):
        index = 0
        while f"{name}.block.{index}.conv1.weight" in self.t:
            x = self.residual(x, f"{name}.block.{index}")
            if f"{name}.attn.{index}.q.weight" in self.t:
                x = self.attend(x, f"{name}.attn.{index}")
            index += 1
        return x

    def middle(self, x, side):
        return self.residual(
            self.attend(self.residual(x, f"{side}.mid.block_1"), f"{side}.mid.attn_1"), f"{side}.mid.block_2"
        )

    def encode(self, x):
        x = self.convolution(x, "encoder.conv_in")
        level = 0
        while f"encoder.down.{level}.block.0.conv1.weight" in self.t:
            x = self.level(x, f"encoder.down.{level}")
            if f"encoder.down.{level}.downsample.conv.weight" in self.t:
                x = self.convolution(
                    F.pad(x, (0, 1, 0, 1)), f"encoder.down.{level}.downsample.conv", stride=2, padding=0
                )
            level += 1
        x = self.swish(self.norm(self.middle(x, "encoder"), "encoder.norm_out"))
        return self.convolution(self.convolution(x, "encoder.conv_out"), "quant_conv")

    def decode(self, vectors):
        x = self.convolution(self.convolution(vectors, "post_quant_conv"), "decoder.conv_in")
        x = self.middle(x, "decoder")
        for level in range(16, -1, -1):
            x = self.level(x, f"decoder.up.{level}")
            if f"decoder.up.{level}.upsample.conv.weight" in self.t:
                x = self.convolution(
                    x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), f"decoder.up.{level}.upsample.conv"
                )
        return self.convolution(self.swish(self.norm(x, "decoder.norm_out")), "decoder.conv_out")


@torch.no_grad()
def test_vqgan_f16_encodes_chooses_and_decodes_as_its_formulas_say():
    tensors = taming_tensors("vqgan", codes=64, **SIZES["vqgan"])
    tokenizer, reference = built("vqgan", tensors), Reference(tensors)
    images_11 = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    features = reference.encode(images_11)
    assert features.shape == (2, 8, 4, 6) and features.std() > 0.1
    torch.testing.assert_close(tokenizer.encode(images_11), features, atol=1e-4, rtol=0)
    vectors = tensors["quantize.embedding.weight"]
    codes = torch.cdist(features.flatten(2).transpose(1, 2), vectors).argmin(dim=2)
    assert torch.equal(tokenizer.tokenize(images_11), codes) and len(codes.unique()) > 3
    images = reference.decode(vectors[codes].transpose(1, 2).unflatten(2, (4, 6)))
    torch.testing.assert_close(tokenizer.decode_codes(codes, (4, 6)), images, atol=1e-4, rtol=0)
    torch.testing.assert_close(tokenizer(images_11).reconstruction, images, atol=1e-4, rtol=0)


@torch.no_grad()
def test_gumbel_f8_encodes_chooses_and_decodes_as_its_formulas_say():
    tensors = taming_tensors("gumbel", codes=64, **SIZES["gumbel"])
    tokenizer, reference = built("gumbel", tensors), Reference(tensors)
    images_11 = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    logits = reference.convolution(reference.encode(images_11), "quantize.proj")
    assert logits.shape == (2, 64, 4, 6) and logits.std() > 0.1
    torch.testing.assert_close(tokenizer.logits(images_11), logits, atol=1e-4, rtol=0)
    codes = logits.argmax(dim=1).flatten(1)
    assert torch.equal(tokenizer.tokenize(images_11), codes) and len(codes.unique()) > 3
    assert torch.equal(tokenizer.tokenize(images_11), tokenizer.tokenize(images_11)), "codes are drawn at random"
    vectors = tensors["quantize.embed.weight"]
    images = reference.decode(vectors[codes].transpose(1, 2).unflatten(2, (4, 6)))
    torch.testing.assert_close(tokenizer.decode_codes(codes, (4, 6)), images, atol=1e-4, rtol=0)
    assert torch.equal(tokenizer.code_vectors, vectors) and not tokenizer.code_vectors.requires_grad


def test_soft_tokens_of_gumbel_hold_the_largest_probabilities_of_the_whole_softmax():
    tokenizer = built("gumbel", taming_tensors("gumbel"))
    images_11 = torch.rand(2, 3, 8, 12) * 2 - 1
    soft = tokenizer.tokenize_soft(images_11, 3, temperature=4.0)
    probs, codes = (
        (tokenizer.logits(images_11) / 4).softmax(dim=1).flatten(2).transpose(1, 2).sort(dim=-1, descending=True)
    )
    assert torch.equal(soft.codes, codes[..., 0]) and torch.equal(soft.topk_codes, codes[..., :3])
    torch.testing.assert_close(soft.topk_probs, probs[..., :3])


# ------------------------------------------------------------------------------------------ the layout


@pytest.mark.parametrize(
    ("kind", "mults", "codes", "px", "stride", "millions"),
    [
        ("vqgan", (1, 1, 2, 2, 4), 1024, 224, 16, (29.3, 42.4)),
        ("vqgan", (1, 1, 2, 2, 4), 16384, 224, 16, (29.3, 42.4)),
        ("gumbel", (1, 1, 2, 4), 8192, 112, 8, (26.3, 38.3)),
    ],
)
def test_the_released_shapes_give_the_published_sizes_and_a_14x14_grid(kind, mults, codes, px, stride, millions):
    settings, state = READ[kind](taming_tensors(kind, channels=128, mults=mults, blocks=2, z=256, codes=codes, dim=256))
    assert (settings.kind, settings.num_codes, settings.code_dim, settings.stride_px, px // settings.stride_px) == (
        kind,
        codes,
        256,
        stride,
        14,
    )
    found = [
        sum(tensor.numel() for name, tensor in state.items() if name.startswith(side)) / 1e6
        for side in ("encoder", "decoder")
    ]
    assert found == [pytest.approx(number, rel=0.01) for number in millions]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "px"), [("vqgan", 224), ("gumbel", 112)])
def test_a_released_tokenizer_survives_its_release_on_disk(tmp_path, kind, px):
    settings, state = READ[kind](taming_tensors(kind, **SIZES[kind]))
    save_tokenizer(tmp_path, state, settings, {"judge": "none"})
    loaded, card = load_tokenizer(tmp_path)
    images_11 = torch.rand(1, 3, px, px) * 2 - 1
    codes = loaded.tokenize(images_11)
    assert codes.shape == (1, 196) and card.settings == settings
    assert torch.equal(codes, built(kind, taming_tensors(kind, **SIZES[kind])).tokenize(images_11))
    assert loaded.makes_images and loaded.decode_codes(codes, (14, 14)).shape == images_11.shape


def test_vqgans_codes_stay_where_they_are_in_a_training_that_chooses_none_of_them():
    tensors = taming_tensors("vqgan")
    codebook = built("vqgan", tensors).train().codebook
    codebook.update()
    assert codebook.initialized == 1
    torch.testing.assert_close(codebook.codes, tensors["quantize.embedding.weight"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["vqgan", "gumbel"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("decoder.up.1.attn.1.k.weight"), "decoder.up.1.attn.1.k.weight is missing"),
        (lambda t: t.pop("encoder.conv_in.weight"), "encoder.conv_in.weight is missing"),
        (
            lambda t: t.update({"encoder.down.0.attn.0.q.weight": torch.ones(32, 32, 1, 1)}),
            "encoder.down.0.attn.0.q.weight' has no place",
        ),
        (
            lambda t: t.update({"encoder.mid.attn_1.v.weight": torch.ones(32, 32, 1, 1)}),
            r"mid.attn_1.v.weight has shape \(32, 32, 1, 1\)",
        ),
        (lambda t: t.update({"encoder.conv_in.weight": torch.ones(32, 4, 3, 3)}), "encoder.conv_in.weight has shape"),
        (
            lambda t: t.update({"quant_conv.bias": torch.full((8,), float("inf"))}),
            "quant_conv.bias holds values that are not finite",
        ),
        (lambda t: t.update({"quantize.used": torch.arange(4)}), "quantize.used' has no place"),
        (lambda t: t.update({"encoder.down.1.block.0.conv1.weight": torch.ones(48, 32, 3, 3)}), "no multiples"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_in_one_line(kind, change, words):
    tensors = taming_tensors(kind)
    change(tensors)
    with pytest.raises(UserError, match=words) as caught:
        READ[kind](tensors)
    assert "\n" not in str(caught.value)


def test_sixteen_bit_files_give_float32_tokenizers():
    settings, state = read_gumbel({name: tensor.half() for name, tensor in taming_tensors("gumbel").items()})
    assert settings == TokenizerSettings(
        kind="gumbel", channels=32, channel_mults=(1, 2), blocks_per_level=1, z_channels=8, num_codes=16, code_dim=8
    )
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
