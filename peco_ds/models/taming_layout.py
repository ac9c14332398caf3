"""Convert the files of taming-transformers' VQGANs, VQModel (nearest code) and GumbelVQ, into our tokenizers.

Source: VQGAN (arXiv 2012.09841) and the names in its released files.
"""

from __future__ import annotations

import torch

from peco_ds.config import TokenizerSettings
from peco_ds.errors import UserError
from peco_ds.models.gumbel_tokenizer import GumbelTokenizer
from peco_ds.models.peco_tokenizer import PecoTokenizer
from peco_ds.models.vq import Codebook
from peco_ds.models.weight_files import count_of, rename_tensors, size_of
from peco_ds.recipe_checks import check_tokenizer_settings

# Names of the layers inside a block, ours -> theirs; the others are the same.
_INSIDE = {"shortcut": ("nin_shortcut",), "proj": ("proj_out",), "qkv": ("q", "k", "v")}
_AROUND = {
    "to_code": "quant_conv",
    "from_code": "post_quant_conv",
    "to_logits": "quantize.proj",
    "codes": "quantize.embed",
}


def read_vqgan(tensors: dict) -> tuple[TokenizerSettings, dict[str, torch.Tensor]]:
    """Settings of kind vqgan and a PecoTokenizer's state dict from a VQModel's tensors; sizes are read off shapes.

    Raises: UserError if a tensor is missing, left over, or of a shape that does not fit the others.
    """
    settings = _settings(tensors, "vqgan", "quantize.embedding.weight")
    with torch.device("meta"):
        expected = PecoTokenizer(settings).state_dict()
    network = [name for name in expected if not name.startswith("codebook.")]
    state = rename_tensors(
        tensors, _names(network, settings) | {"codebook.codes": ("quantize.embedding.weight",)}, expected
    )
    codebook = Codebook.from_settings(settings)
    codebook.start_at(state["codebook.codes"])
    return settings, state | {f"codebook.{name}": tensor for name, tensor in codebook.state_dict().items()}


def read_gumbel(tensors: dict) -> tuple[TokenizerSettings, dict[str, torch.Tensor]]:
    """Settings of kind gumbel and a GumbelTokenizer's state dict from a GumbelVQ's tensors; sizes are read off shapes.

    Raises: UserError if a tensor is missing, left over, or of a shape that does not fit the others.
    """
    settings = _settings(tensors, "gumbel", "quantize.embed.weight")
    with torch.device("meta"):
        expected = GumbelTokenizer(settings).state_dict()
    return settings, rename_tensors(tensors, _names(list(expected), settings), expected)


def _settings(tensors: dict, kind: str, codes: str) -> TokenizerSettings:
    channels = size_of(tensors, "encoder.conv_in.weight", 0)
    levels = count_of(tensors, "encoder.down.{}.block.0.conv1.weight", first=0)
    widths = [size_of(tensors, f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)]
    if any(width % channels or width % 32 for width in [channels, *widths]):
        raise UserError(
            f"levels of {widths} channels are no multiples of 32 and of the first convolution's "
            f"{channels}, so it is no VQGAN of taming-transformers"
        )
    settings = TokenizerSettings(
        kind=kind,
        channels=channels,
        channel_mults=tuple(width // channels for width in widths),
        blocks_per_level=count_of(tensors, "encoder.down.0.block.{}.conv1.weight", first=0),
        attention=True,
        z_channels=size_of(tensors, "encoder.conv_out.weight", 0),
        num_codes=size_of(tensors, codes, 0),
        code_dim=size_of(tensors, codes, 1),
    )
    check_tokenizer_settings(settings)
    return settings


def _names(ours: list[str], settings: TokenizerSettings) -> dict[str, tuple[str, ...]]:
    """Our names -> theirs."""
    layers = {"encoder": _encoder_layers(settings), "decoder": _decoder_layers(settings)}
    names: dict[str, tuple[str, ...]] = {}
    for name in ours:
        side, *inside, kind = name.split(".")
        if side in _AROUND:
            names[name] = (f"{_AROUND[side]}.{kind}",)
            continue
        prefix = [side, layers[side][int(inside[0])]]
        parts = _INSIDE.get(inside[1], (inside[1],)) if len(inside) > 1 else (None,)
        names[name] = tuple(".".join([*prefix, *([part] if part else []), kind]) for part in parts)
    return names


def _stack(place: str, number: int, *, attention: bool) -> list[str]:
    blocks = [[f"{place}.block.{index}"] + ([f"{place}.attn.{index}"] if attention else []) for index in range(number)]
    return [name for block in blocks for name in block]


_MIDDLE = ["mid.block_1", "mid.attn_1", "mid.block_2"]
_END = ["norm_out", "", "conv_out"]


def _encoder_layers(settings: TokenizerSettings) -> list[str]:
    """The released names of `Encoder`'s layers, in order; "" for the activation, which has no tensors."""
    last = len(settings.channel_mults) - 1
    names = ["conv_in"]
    for level in range(last + 1):
        names += _stack(f"down.{level}", settings.blocks_per_level, attention=level == last)
        if level != last:
            names.append(f"down.{level}.downsample")
    return names + _MIDDLE + _END


def _decoder_layers(settings: TokenizerSettings) -> list[str]:
    last = len(settings.channel_mults) - 1
    names = ["conv_in", *_MIDDLE]
    for level in range(last, -1, -1):
        names += _stack(f"up.{level}", settings.blocks_per_level + 1, attention=level == last)
        if level != 0:
            names.append(f"up.{level}.upsample")
    return names + _END
