"""The dense backbone with attention inside windows and a few blocks that see the whole image, for large images.

There is no class token: it would have to stand in every window. Windows are filled up with zeros after the norm, and
the zeros take part, as in ViTDet (arXiv 2203.16527).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peco_ds.config import ModelSettings
from peco_ds.models.attention import attend
from peco_ds.models.dense_backbone import DenseBackbone, DenseBlock, build_dense_backbone, position_index
from peco_ds.models.vit import ActivationCheckpointing


class WindowBlock(DenseBlock):
    """A block whose attention stays inside windows; its table is that of a window.

    `forward` is given (index of a window, height, width) in the bias's place.
    """

    window: int

    def _bias(self, given):
        index, height, width = given
        return super()._bias(index), height, width

    def _attention(self, x: torch.Tensor, bias) -> torch.Tensor:
        table, height, width = bias
        attn = self.attn
        windows = to_windows(self.norm1(x), height, width, self.window)
        qkv = self._linear(
            windows, attn.qkv.weight, torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        )
        out = attend(qkv.unflatten(2, (3, attn.num_heads, -1)), table, self.attention_form)
        return self._scaled(from_windows(out, height, width, self.window), attn.proj, self.gamma_1)


class WindowBackbone(DenseBackbone):
    """As `DenseBackbone`, without a class token; blocks of `global_blocks` see the whole image."""

    window: int

    def forward(self, images_norm: torch.Tensor) -> list[torch.Tensor]:
        weight = self.patch_embed.proj.weight
        patch = self.patch_embed.patch_size[0]
        height, width = (side // patch for side in images_norm.shape[2:])
        tokens = self.patch_embed(images_norm.to(weight.dtype))
        if (places := self.places(height, width)) is not None:
            tokens = tokens + places[:, 1:].to(tokens.dtype)
        whole = self._kept("whole", height, width, self.table_grid)
        inside = self._kept("inside", self.window, self.window, self.window), height, width
        maps = []
        for number, block in enumerate(self.blocks):
            given = inside if isinstance(block, WindowBlock) else whole
            tokens = block(tokens, given, *block.draw_paths(tokens))
            if number in self.taps:
                maps.append(tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2))
        return maps

    def _kept(self, name: str, height: int, width: int, grid: int) -> torch.Tensor:
        """The index of a grid without its class token; the last one is kept."""
        kept, device = self.__dict__.setdefault("_indexes", {}), self.patch_embed.proj.weight.device
        if name not in kept or kept[name][0] != (height, width, device):
            index = position_index(height, width, grid, device)[1:, 1:].contiguous()
            kept[name] = (height, width, device), index
        return kept[name][1]


def build_window_backbone(
    settings: ModelSettings,
    taps: tuple[int, ...],
    *,
    window: int,
    global_blocks: tuple[int, ...],
    activation_checkpointing: ActivationCheckpointing = "none",
) -> WindowBackbone:
    """A freshly initialised backbone.

    Args:
        taps, global_blocks: from 0.  window: patches a side.
    """
    model = build_dense_backbone(settings, taps, activation_checkpointing=activation_checkpointing)
    model.__class__ = WindowBackbone
    assert isinstance(model, WindowBackbone)
    model.window = window
    del model.cls_token
    model.cls_token = None
    for number, block in enumerate(model.blocks):
        if number in global_blocks:
            continue
        block.__class__ = WindowBlock
        block.window = window
        table = block.attn.relative_position_bias_table
        block.attn.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window - 1) ** 2 + len(table) - (2 * settings.grid - 1) ** 2, table.shape[1])
        )
    return model


def to_windows(x: torch.Tensor, height: int, width: int, window: int) -> torch.Tensor:
    """Tokens [B, h w, D] -> [B n, window^2, D]; the grid is filled up with zeros below and on the right."""
    batch, _, channels = x.shape
    x = x.view(batch, height, width, channels)
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = x.shape[1] // window, x.shape[2] // window
    x = x.view(batch, rows, window, columns, window, channels).transpose(2, 3)
    return x.reshape(batch * rows * columns, window * window, channels)


def from_windows(x: torch.Tensor, height: int, width: int, window: int) -> torch.Tensor:
    """The inverse of `to_windows`; what was filled up is dropped."""
    rows, columns, channels = -(-height // window), -(-width // window), x.shape[2]
    x = x.view(-1, rows, columns, window, window, channels).transpose(2, 3)
    x = x.reshape(-1, rows * window, columns * window, channels)[:, :height, :width]
    return x.reshape(len(x), height * width, channels)
