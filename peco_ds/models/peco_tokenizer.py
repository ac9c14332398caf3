"""image -> codes -> image: a convolutional autoencoder around a codebook, and its release on disk.

PeCo's paper does not publish its network; two papers that use it call it a VQGAN, so this is VQGAN's f16 autoencoder.
Source: VQGAN (arXiv 2012.09841) and the layout of its released `imagenet_vqgan.yaml`.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peco_ds.config import TokenizerSettings, check_tokenizer_settings
from peco_ds.errors import UserError
from peco_ds.models.vq import Codebook
from peco_ds.schema import read_json, short, write_json

RELEASE_VERSION = 1
TENSORS_NAME = "tokenizer.safetensors"
CARD_NAME = "tokenizer.json"
KIND = "peco_tokenizer"
REMEDY = "make it again with train_tokenizer.py or copy it again"


class TokenizerOutput(NamedTuple):
    reconstruction: torch.Tensor  # float32 [B, 3, H, W], trained towards [-1, 1], not clipped
    codes: torch.Tensor  # int64 [B, N], row-major
    commitment: torch.Tensor  # float32 [], unweighted


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups; fewer, but still a divisor, where there are not enough channels for them."""
    groups = next(number for number in range(min(32, channels), 0, -1) if channels % number == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """[B, in, H, W] -> [B, out, H, W]: norm, swish, 3x3, twice; a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.shortcut(x) + y


class AttentionBlock(nn.Module):
    """Single-head attention of every position to every other, [B, C, H, W] -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)
        q, k, v = tokens.chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.proj(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halves the grid. The padding lies right and below only: symmetric padding would need an odd size to see every pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the grid: nearest neighbour, then a convolution, which leaves no checkerboard."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def residual_stack(in_channels: int, out_channels: int, number: int, *, attention: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for index in range(number):
        layers.append(ResidualBlock(in_channels if index == 0 else out_channels, out_channels))
        if attention:
            layers.append(AttentionBlock(out_channels))
    return layers


def middle(channels: int, *, attention: bool) -> list[nn.Module]:
    between = [AttentionBlock(channels)] if attention else []
    return [ResidualBlock(channels, channels), *between, ResidualBlock(channels, channels)]


class Encoder(nn.Sequential):
    """Pictures [B, 3, H, W] -> [B, z_channels, H / stride, W / stride]."""

    def __init__(self, settings: TokenizerSettings) -> None:
        widths = [settings.channels * mult for mult in settings.channel_mults]
        layers: list[nn.Module] = [nn.Conv2d(3, settings.channels, 3, padding=1)]
        previous, last = settings.channels, len(widths) - 1
        for level, width in enumerate(widths):
            layers += residual_stack(previous, width, settings.blocks_per_level, attention=settings.attention and level == last)
            if level != last:
                layers.append(Downsample(width))
            previous = width
        layers += middle(previous, attention=settings.attention)
        layers += [group_norm(previous), nn.SiLU(), nn.Conv2d(previous, settings.z_channels, 3, padding=1)]
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """[B, z_channels, h, w] -> pictures [B, 3, h * stride, w * stride]; one residual block more a level than the encoder."""

    def __init__(self, settings: TokenizerSettings) -> None:
        widths = [settings.channels * mult for mult in settings.channel_mults]
        previous, last = widths[-1], len(widths) - 1
        layers: list[nn.Module] = [nn.Conv2d(settings.z_channels, previous, 3, padding=1)]
        layers += middle(previous, attention=settings.attention)
        for level in range(last, -1, -1):
            width = widths[level]
            layers += residual_stack(previous, width, settings.blocks_per_level + 1, attention=settings.attention and level == last)
            if level != 0:
                layers.append(Upsample(width))
            previous = width
        layers += [group_norm(previous), nn.SiLU(), nn.Conv2d(previous, 3, 3, padding=1)]
        super().__init__(*layers)


class PecoTokenizer(nn.Module):
    """Encoder, codebook, decoder. Training calls `forward` alone, and every parameter takes part in it."""

    def __init__(self, settings: TokenizerSettings, *, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(settings)
        self.to_code = nn.Conv2d(settings.z_channels, settings.code_dim, 1)
        self.codebook = Codebook.from_settings(settings, seed=seed)
        self.from_code = nn.Conv2d(settings.code_dim, settings.z_channels, 1)
        self.decoder = Decoder(settings)

    def forward(self, images_11: torch.Tensor) -> TokenizerOutput:
        """Pictures [B, 3, H, W] in [-1, 1] -> reconstruction, codes, commitment; in training mode the codebook counts."""
        quantized = self.codebook(self.encode(images_11))
        return TokenizerOutput(self.decode(quantized.quantized), quantized.codes, quantized.commitment)

    def encode(self, images_11: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, H, W] in [-1, 1], sides multiples of the stride -> features [B, C, H / stride, W / stride]."""
        stride = self.settings.stride_px
        assert images_11.shape[-2] % stride == 0 and images_11.shape[-1] % stride == 0, f"picture {tuple(images_11.shape)}, stride {stride}"
        return self.to_code(self.encoder(images_11.to(self.to_code.weight.dtype)))

    @torch.no_grad()
    def tokenize(self, images_11: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> codes int64 [B, N], row-major. In eval mode, so that nothing is counted."""
        assert not self.training, "call eval() before tokenize(): in training mode the codebook would count these pictures"
        return self.codebook(self.encode(images_11)).codes

    def decode(self, quantized: torch.Tensor) -> torch.Tensor:
        """Code vectors [B, C, h, w] -> pictures float32 [B, 3, h * stride, w * stride], about [-1, 1]."""
        return self.decoder(self.from_code(quantized.to(self.from_code.weight.dtype))).float()

    def decode_codes(self, codes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Codes int64 [B, N] of a (height, width) grid -> pictures float32, about [-1, 1]."""
        return self.decode(self.codebook.lookup(codes, grid))


def build_tokenizer(settings: TokenizerSettings, *, seed: int = 0) -> PecoTokenizer:
    """A tokenizer with fresh weights from torch's generator; `seed` decides at which encoder outputs dead codes restart."""
    return PecoTokenizer(settings, seed=seed)


# ---------------------------------------------------------------------------------------------- release on disk


@dataclass(frozen=True)
class TokenizerCard:
    """What a release says about itself. Token shards are tied to `fingerprint`."""

    fingerprint: str
    settings: TokenizerSettings
    num_codes: int
    stride_px: int
    extra: dict  # facts of the training, as `save_tokenizer` was given them


def save_tokenizer(folder: str | Path, state_dict: dict[str, torch.Tensor], settings: TokenizerSettings, extra: dict) -> str:
    """Write a release: `tokenizer.safetensors` and `tokenizer.json`.

    Args:
        state_dict: of `PecoTokenizer`, whole tensors, on any device.  extra: JSON-able facts of the training.
    Returns: the fingerprint.
    The card is the last file to appear and the first to go, so a folder with a card holds a whole release.
    """
    with torch.device("meta"):
        expected = build_tokenizer(settings).state_dict()
    assert state_dict.keys() == expected.keys(), f"not a tokenizer's state: {sorted(state_dict.keys() ^ expected.keys())[:5]}"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    described = json.loads(json.dumps(asdict(settings)))
    fingerprint = tokenizer_fingerprint(described, tensors)
    temporary = folder / f".{TENSORS_NAME}.{os.getpid()}.tmp"
    save_file(tensors, temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    (folder / CARD_NAME).unlink(missing_ok=True)
    os.replace(temporary, folder / TENSORS_NAME)
    write_json(
        folder / CARD_NAME,
        {
            "kind": KIND,
            "format_version": RELEASE_VERSION,
            "fingerprint": fingerprint,
            "num_codes": settings.num_codes,
            "stride_px": settings.stride_px,
            "input_range": [-1, 1],
            "settings": described,
            "extra": extra,
        },
    )
    return fingerprint


def read_card(folder: str | Path) -> TokenizerCard:
    """What a release says about itself, without reading its tensors; `load_tokenizer` verifies that they are the ones it names.

    Raises: UserError if the folder or one of its files is missing, or the card is not one.
    """
    return _read_card(Path(folder))[0]


def load_tokenizer(folder: str | Path) -> tuple[PecoTokenizer, TokenizerCard]:
    """Read and verify a release: the tokenizer on the CPU in float32 and eval mode, and its card.

    Raises: UserError if the folder or a file is missing, a file is not what its name says, a tensor is missing or unexpected or of
        another shape, or any byte of settings and tensors differs from what the fingerprint was taken over.
    """
    folder = Path(folder)
    card, described = _read_card(folder)
    path = folder / TENSORS_NAME
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); {REMEDY}") from None
    asked = card.settings.blocks_per_level * len(card.settings.channel_mults)
    if asked > len(tensors):
        raise UserError(f"{path}: {len(tensors)} tensors, the settings ask for {asked} blocks; {REMEDY}")
    try:
        with torch.device("meta"):  # damaged settings may ask for more memory than there is
            expected = build_tokenizer(card.settings).state_dict()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{folder / CARD_NAME}: its settings give no network ({' '.join(str(error).split())[:120]}); {REMEDY}") from None
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise UserError(f"{path}: tensor {name} is missing; {REMEDY}")
        if name not in expected:
            raise UserError(f"{path}: unexpected tensor {name}; {REMEDY}")
        if tensors[name].shape != expected[name].shape:
            found, wanted = tuple(tensors[name].shape), tuple(expected[name].shape)
            raise UserError(f"{path}: tensor {name} has shape {found}, the settings ask for {wanted}; {REMEDY}")
        if tensors[name].is_floating_point() != expected[name].is_floating_point():
            raise UserError(f"{path}: tensor {name} is {tensors[name].dtype}, the settings ask for {expected[name].dtype}; {REMEDY}")
    fingerprint = tokenizer_fingerprint(described, tensors)
    if fingerprint != card.fingerprint:
        raise UserError(f"{folder}: fingerprint {fingerprint[:12]} is not the card's {card.fingerprint[:12]}, so a file was changed; {REMEDY}")
    tokenizer = build_tokenizer(card.settings)
    tokenizer.load_state_dict(tensors)
    return tokenizer.eval(), card


def _read_card(folder: Path) -> tuple[TokenizerCard, dict]:
    """The card, and its settings as they stand in the file."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such tokenizer folder; train one with train_tokenizer.py or correct data.tokenizer")
    for name in (CARD_NAME, TENSORS_NAME):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: holds no {name}, so it is no whole tokenizer release; {REMEDY}")
    path = folder / CARD_NAME
    try:
        raw = read_json(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); {REMEDY}") from None
    if not isinstance(raw, dict) or raw.get("kind") != KIND or raw.get("format_version") != RELEASE_VERSION:
        raise UserError(f"{path}: describes no {KIND} release of format version {RELEASE_VERSION}; {REMEDY}")
    try:
        settings = TypeAdapter(TokenizerSettings).validate_python(raw.get("settings"))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: settings.{'.'.join(map(str, first['loc']))}: {first['msg']}; {REMEDY}") from None
    try:
        check_tokenizer_settings(settings, "settings")
    except UserError as error:
        raise UserError(f"{path}: {error}; {REMEDY}") from None
    fingerprint, extra = raw.get("fingerprint"), raw.get("extra", {})
    if not isinstance(fingerprint, str) or not isinstance(extra, dict):
        raise UserError(f"{path}: fingerprint is no text, or extra no object; {REMEDY}")
    for name in ("num_codes", "stride_px"):
        if raw.get(name) != getattr(settings, name):
            raise UserError(f"{path}: {name} is {short(raw.get(name))}, its settings give {getattr(settings, name)}; {REMEDY}")
    return TokenizerCard(fingerprint, settings, settings.num_codes, settings.stride_px, extra), raw["settings"]


def tokenizer_fingerprint(settings: dict, tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over the settings' canonical JSON and every tensor's name, dtype, shape and bytes, by sorted name.

    Args:
        settings: as the card holds them, so that a default added later changes no old fingerprint.  tensors: on the CPU.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
