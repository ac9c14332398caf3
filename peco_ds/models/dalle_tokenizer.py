"""image -> codes -> image: the discrete VAE of DALL-E, BEiT's tokenizer.

Read from its released files; it is not trained here.

Source: DALL-E (arXiv 2102.12092), appendix A.2, and the layout of its released `encoder.pkl` and `decoder.pkl`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from peco_ds.config import TokenizerSettings
from peco_ds.errors import UserError
from peco_ds.models.image_tokenizer import LogitTokenizer
from peco_ds.models.weight_files import count_of, rename_tensors, size_of
from peco_ds.recipe_checks import check_tokenizer_settings

# The logit-Laplace likelihood has no mass at 0 and 1: images of [0, 1] are put into [0.1, 0.9].
MARGIN = 0.1


class Bottleneck(nn.Module):
    """[B, in, H, W] -> [B, out, H, W]: four times ReLU and convolution at a quarter of the width.

    A 1x1 convolution on the shortcut where the width changes.

    Args:
        kernels: sizes of the four.  gain: of the residual branch.
    """

    def __init__(self, in_channels: int, out_channels: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        hidden = out_channels // 4
        widths = (in_channels, hidden, hidden, hidden, out_channels)
        self.gain = gain
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(*ends, size, padding=size // 2) for *ends, size in zip(widths, widths[1:], kernels)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for convolution in self.convolutions:
            y = convolution(F.relu(y))
        return self.shortcut(x) + self.gain * y


def _stack(
    previous: int, widths: list[int], blocks: int, kernels: tuple[int, int, int, int], resize: nn.Module
) -> list[nn.Module]:
    """A group of blocks for each width, and between two groups a change of size."""
    gain = 1 / (len(widths) * blocks) ** 2
    layers: list[nn.Module] = []
    for level, width in enumerate(widths):
        layers += [Bottleneck(previous if index == 0 else width, width, kernels, gain) for index in range(blocks)]
        if level != len(widths) - 1:
            layers.append(resize)
        previous = width
    return layers


class Encoder(nn.Sequential):
    """Images [B, 3, H, W] in [MARGIN, 1 - MARGIN] -> logits [B, V, H / stride, W / stride]."""

    def __init__(self, settings: TokenizerSettings) -> None:
        widths = [settings.channels * mult for mult in settings.channel_mults]
        super().__init__(
            nn.Conv2d(3, settings.channels, 7, padding=3),
            *_stack(settings.channels, widths, settings.blocks_per_level, (3, 3, 3, 1), nn.MaxPool2d(2)),
            nn.ReLU(),
            nn.Conv2d(widths[-1], settings.num_codes, 1),
        )


class Decoder(nn.Sequential):
    """One-hot codes [B, V, h, w] -> means and log-scales of the pixels' logits [B, 6, h * stride, w * stride]."""

    def __init__(self, settings: TokenizerSettings) -> None:
        widths = [settings.channels * mult for mult in reversed(settings.channel_mults)]
        super().__init__(
            nn.Conv2d(settings.num_codes, settings.code_dim, 1),
            *_stack(settings.code_dim, widths, settings.blocks_per_level, (1, 3, 3, 3), nn.Upsample(scale_factor=2)),
            nn.ReLU(),
            nn.Conv2d(widths[-1], 6, 1),
        )


class DalleTokenizer(LogitTokenizer):
    """The discrete VAE. Without a decoder (settings.decoder) it has codes, but makes no images.

    Args:
        seed: not used; nothing here is random.
    """

    def __init__(self, settings: TokenizerSettings, *, seed: int = 0) -> None:
        super().__init__(settings)
        self.makes_images = settings.decoder
        self.encoder = Encoder(settings)
        if settings.decoder:
            self.decoder = Decoder(settings)

    def trunk(self, images_11: torch.Tensor) -> torch.Tensor:
        self.check_sides(images_11)
        images_01 = images_11.float() / 2 + 0.5
        x = (1 - 2 * MARGIN) * images_01 + MARGIN
        *layers, _ = self.encoder
        for layer in layers:
            x = layer(x)
        return x

    def code_logits(self, outputs: torch.Tensor) -> torch.Tensor:
        last = self.encoder[-1]
        return last(outputs.to(last.weight.dtype))

    @torch.no_grad()
    def decode_codes(self, codes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Codes int64 [B, N] of a (height, width) grid -> the likeliest images, float32 [B, 3, H, W] in [-1, 1]."""
        assert self.makes_images, "this release holds no decoder"
        first, *others = self.decoder
        # The first convolution of one-hot codes picks columns of its weight; the one-hot tensor would have V channels.
        chosen = (F.embedding(codes, self.code_vectors) + first.bias).transpose(1, 2).unflatten(2, grid)
        with torch.autocast(chosen.device.type, enabled=False):
            for layer in others:
                chosen = layer(chosen)
        images_01 = ((chosen[:, :3].sigmoid() - MARGIN) / (1 - 2 * MARGIN)).clamp(0, 1)
        return images_01 * 2 - 1

    @property
    def code_vectors(self) -> torch.Tensor:
        """float32 [V, C] without gradient: the decoder's embedding of each code.

        Without a decoder, the weights of each code's logit.
        """
        vectors = self.decoder[0].weight[:, :, 0, 0].T if self.makes_images else self.encoder[-1].weight[:, :, 0, 0]
        return vectors.detach()


# ---------------------------------------------------------------------------------- the released files


def read_dvae(tensors: dict) -> tuple[TokenizerSettings, dict[str, torch.Tensor]]:
    """Settings and state dict from the tensors of the released files; sizes are read off shapes.

    Args:
        tensors: those of encoder.pkl with "encoder." before their names, and, where it is at hand, those of decoder.pkl
            with "decoder.".
    Raises: UserError if a tensor is missing, left over, or of a shape that does not fit the others.
    """
    channels, num_codes = (
        size_of(tensors, "encoder.blocks.input.w", 0),
        size_of(tensors, "encoder.blocks.output.conv.w", 0),
    )
    levels = count_of(tensors, "encoder.blocks.group_{}.block_1.res_path.conv_4.w", first=1)
    widths = [
        size_of(tensors, f"encoder.blocks.group_{level}.block_1.res_path.conv_4.w", 0) for level in range(1, levels + 1)
    ]
    if any(width % channels or width % 4 for width in widths):
        raise UserError(
            f"groups of {widths} channels are no multiples of 4 and of the first convolution's "
            f"{channels}, so it is no DALL-E encoder"
        )
    has_decoder = any(name.startswith("decoder.") for name in tensors)
    settings = TokenizerSettings(
        kind="dvae",
        channels=channels,
        channel_mults=tuple(width // channels for width in widths),
        blocks_per_level=count_of(tensors, "encoder.blocks.group_1.block_{}.res_path.conv_1.w", first=1),
        attention=False,
        num_codes=num_codes,
        code_dim=size_of(tensors, "decoder.blocks.input.w", 0) if has_decoder else widths[-1],
        decoder=has_decoder,
    )
    check_tokenizer_settings(settings)
    with torch.device("meta"):
        expected = DalleTokenizer(settings).state_dict()
    layers = _layer_names(settings)
    return settings, rename_tensors(tensors, {name: (_released_name(name, layers),) for name in expected}, expected)


def _layer_names(settings: TokenizerSettings) -> list[str]:
    """The released names of the layers of `Encoder`, and of `Decoder`, in order; "" for those without tensors."""
    names = ["input"]
    for level in range(1, len(settings.channel_mults) + 1):
        names += [f"group_{level}.block_{index}" for index in range(1, settings.blocks_per_level + 1)] + [""]
    # The last group's "" is the ReLU before the output.
    return [*names, "output.conv"]


def _released_name(name: str, layers: list[str]) -> str:
    """encoder.2.convolutions.0.weight -> encoder.blocks.group_1.block_2.res_path.conv_1.w"""
    side, number, *inside, kind = name.split(".")
    if inside[:1] == ["convolutions"]:
        inside = ["res_path", f"conv_{int(inside[1]) + 1}"]
    elif inside == ["shortcut"]:
        inside = ["id_path"]
    return ".".join([side, "blocks", layers[int(number)], *inside, kind[0]])


def both_sides(files: list[tuple[Path, dict]]) -> dict:
    """Tensors of DALL-E's files, with the side before their names: both files have the same ones, but only the encoder
    begins with a wide convolution.
    """
    sides: dict[str, Path] = {}
    tensors: dict[str, torch.Tensor] = {}
    for path, held in files:
        try:
            side = "encoder" if size_of(held, "blocks.input.w", 3) > 1 else "decoder"
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if side in sides:
            raise UserError(f"{path}: DALL-E's {side}, as {sides[side]} is; give encoder.pkl and decoder.pkl")
        sides[side] = path
        tensors |= {f"{side}.{name}": tensor for name, tensor in held.items()}
    if "encoder" not in sides:
        raise UserError(f"{files[0][0]}: DALL-E's decoder alone, which makes no codes; give encoder.pkl too")
    return tensors
