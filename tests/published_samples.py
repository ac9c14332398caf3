"""Tokenizer files as others released them, at any size, with random weights: DALL-E's pickled modules,
taming-transformers' Lightning checkpoints.
"""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

Tensors = dict[str, torch.Tensor]


def _convolution(
    tensors: Tensors, name: str, out: int, into: int, size: int, generator, kinds=("weight", "bias")
) -> None:
    tensors[f"{name}.{kinds[0]}"] = (
        torch.randn(out, into, size, size, generator=generator) / (into * size * size) ** 0.5
    )
    tensors[f"{name}.{kinds[1]}"] = torch.randn(out, generator=generator) / 10


# ---------------------------------------------------------------------------------------------- DALL-E


def dalle_tensors(side: str, *, channels: int = 8, codes: int = 32, init: int = 12, seed: int = 0) -> Tensors:
    """What state_dict() of the released Encoder or Decoder gives; full size is channels 256, codes 8192, init 128."""
    made, generator = {}, torch.Generator().manual_seed(seed)
    encoding = side == "encoder"
    widths = [channels, 2 * channels, 4 * channels, 8 * channels][:: 1 if encoding else -1]
    ends = (3, channels, 7) if encoding else (codes, init, 1)
    _convolution(made, "blocks.input", ends[1], ends[0], ends[2], generator, "wb")
    previous = ends[1]
    for level, width in enumerate(widths, 1):
        for block in (1, 2):
            name, hidden = f"blocks.group_{level}.block_{block}", width // 4
            if previous != width:
                _convolution(made, f"{name}.id_path", width, previous, 1, generator, "wb")
            steps = [previous, hidden, hidden, hidden, width]
            for number, size in enumerate((3, 3, 3, 1) if encoding else (1, 3, 3, 3)):
                _convolution(
                    made, f"{name}.res_path.conv_{number + 1}", steps[number + 1], steps[number], size, generator, "wb"
                )
                # so that the branch, which counts for 1/64, can be seen
                made[f"{name}.res_path.conv_{number + 1}.w"] *= 3
            previous = width
    _convolution(made, "blocks.output.conv", codes if encoding else 6, previous, 1, generator, "wb")
    return made


def save_dalle(path: Path, side: str, tensors: Tensors, **options) -> None:
    """torch.save of the whole module, its classes named as in the released package, which is not there when this
    returns.
    """
    modules = {name: types.ModuleType(name) for name in ("dall_e", "dall_e.encoder", "dall_e.decoder", "dall_e.utils")}
    kinds = {}
    for module, name in (
        (f"dall_e.{side}", side.title()),
        (f"dall_e.{side}", f"{side.title()}Block"),
        ("dall_e.utils", "Conv2d"),
    ):
        kinds[name.removeprefix(side.title()) or "Whole"] = kind = type(name, (nn.Module,), {"__module__": module})
        setattr(modules[module], name, kind)
    channels = tensors["blocks.input.w" if side == "encoder" else "blocks.group_4.block_1.res_path.conv_4.w"].shape[0]

    def filled(kind: type, **fields) -> nn.Module:
        module = kind()
        module.__dict__ |= {"device": torch.device("cpu"), "requires_grad": False} | fields
        return module

    def convolution(name: str, **fields) -> nn.Module:
        weight = tensors[f"{name}.w"]
        module = filled(
            kinds["Conv2d"], n_in=weight.shape[1], n_out=weight.shape[0], kw=weight.shape[2], use_float16=True, **fields
        )
        module.w, module.b = (nn.Parameter(tensors[f"{name}.{kind}"], requires_grad=False) for kind in "wb")
        return module

    def block(name: str) -> nn.Module:
        weight = tensors[f"{name}.res_path.conv_1.w"]
        module = filled(kinds["Block"], n_in=weight.shape[1], n_hid=weight.shape[0], n_layers=8, post_gain=1 / 64)
        module.id_path = convolution(f"{name}.id_path") if f"{name}.id_path.w" in tensors else nn.Identity()
        layers = [
            (f"{what}_{number}", nn.ReLU() if what == "relu" else convolution(f"{name}.res_path.conv_{number}"))
            for number in (1, 2, 3, 4)
            for what in ("relu", "conv")
        ]
        module.res_path = nn.Sequential(OrderedDict(layers))
        return module

    groups = []
    for level in (1, 2, 3, 4):
        layers = [(f"block_{number}", block(f"blocks.group_{level}.block_{number}")) for number in (1, 2)]
        if level < 4:
            layers.append(
                ("pool", nn.MaxPool2d(kernel_size=2))
                if side == "encoder"
                else ("upsample", nn.Upsample(scale_factor=2, mode="nearest"))
            )
        groups.append((f"group_{level}", nn.Sequential(OrderedDict(layers))))
    output = nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", convolution("blocks.output.conv"))]))
    whole = filled(kinds["Whole"], n_hid=channels, n_blk_per_group=2, vocab_size=32, use_mixed_precision=True)
    whole.blocks = nn.Sequential(OrderedDict([("input", convolution("blocks.input")), *groups, ("output", output)]))
    with mock.patch.dict(sys.modules, modules):
        torch.save(whole, path, **options)


# --------------------------------------------------------------------------------- taming-transformers


def taming_tensors(
    kind: str,
    *,
    channels: int = 32,
    mults=(1, 2),
    blocks: int = 1,
    z: int = 8,
    codes: int = 16,
    dim: int = 8,
    attention=None,
    seed: int = 0,
) -> Tensors:
    """What state_dict() of a VQModel ("vqgan") or GumbelVQ ("gumbel") gives.

    Args:
        attention: levels that have it, the coarsest where none are named. Full size is channels 128, blocks 2, z and
            dim 256; mults (1, 1, 2, 2, 4) for f16, (1, 1, 2, 4) for f8.
    """
    made, generator = {}, torch.Generator().manual_seed(seed)
    last = len(mults) - 1
    attention = (last,) if attention is None else attention

    def convolution(name: str, out: int, into: int, size: int) -> None:
        _convolution(made, name, out, into, size, generator)

    def norm(name: str, width: int) -> None:
        made[f"{name}.weight"], made[f"{name}.bias"] = (
            1 + torch.randn(width, generator=generator) / 10,
            torch.randn(width, generator=generator) / 10,
        )

    def residual(name: str, into: int, out: int) -> None:
        norm(f"{name}.norm1", into)
        convolution(f"{name}.conv1", out, into, 3)
        norm(f"{name}.norm2", out)
        convolution(f"{name}.conv2", out, out, 3)
        if into != out:
            convolution(f"{name}.nin_shortcut", out, into, 1)

    def attend(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            convolution(f"{name}.{part}", width, width, 1)
        for part in ("q", "k"):
            # else attention is nearly even, and its scale could not be seen
            made[f"{name}.{part}.weight"] *= 3

    def middle(side: str, width: int) -> None:
        residual(f"{side}.mid.block_1", width, width)
        attend(f"{side}.mid.attn_1", width)
        residual(f"{side}.mid.block_2", width, width)

    def levels(side: str, part: str, order, number: int, previous: int) -> int:
        for level in order:
            for index in range(number):
                residual(f"{side}.{part}.{level}.block.{index}", previous, channels * mults[level])
                previous = channels * mults[level]
                if level in attention:
                    attend(f"{side}.{part}.{level}.attn.{index}", previous)
            if part == "down" and level != last:
                convolution(f"{side}.down.{level}.downsample.conv", previous, previous, 3)
            if part == "up" and level != 0:
                convolution(f"{side}.up.{level}.upsample.conv", previous, previous, 3)
        return previous

    convolution("encoder.conv_in", channels, 3, 3)
    width = levels("encoder", "down", range(last + 1), blocks, channels)
    middle("encoder", width)
    norm("encoder.norm_out", width)
    convolution("encoder.conv_out", z, width, 3)
    convolution("decoder.conv_in", width, z, 3)
    middle("decoder", width)
    width = levels("decoder", "up", range(last, -1, -1), blocks + 1, width)
    norm("decoder.norm_out", width)
    convolution("decoder.conv_out", 3, width, 3)
    convolution("quant_conv", dim, z, 1)
    convolution("post_quant_conv", z, dim, 1)
    if kind == "gumbel":
        convolution("quantize.proj", codes, dim, 1)
    made[f"quantize.{'embed' if kind == 'gumbel' else 'embedding'}.weight"] = torch.randn(
        codes, dim, generator=generator
    )
    return made


def save_lightning(path: Path, tensors: Tensors, **options) -> None:
    """As Lightning wrote it: the network under state_dict, the loss's own networks with it, and a callback's class as a
    key.
    """
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    loss = {
        "loss.discriminator.main.0.weight": torch.ones(2, 2),
        "loss.perceptual_loss.lin0.model.1.weight": torch.ones(2),
    }
    content = {
        "epoch": 3,
        "global_step": 7,
        "state_dict": OrderedDict(tensors | loss),
        "callbacks": {
            module.ModelCheckpoint: {"best_model_score": np.float64(0.5), "current_score": torch.tensor(0.5)}
        },
    }
    parents = {name: types.ModuleType(name) for name in ("pytorch_lightning", "pytorch_lightning.callbacks")}
    with mock.patch.dict(sys.modules, parents | {module.__name__: module}):
        torch.save(content, path, **options)
