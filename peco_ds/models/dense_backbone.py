"""The backbone of segmentation and detection: a ViT whose blocks give maps, for images of any height and width.

Its parameters have the names of the fine-tuned classifier (`classifier.py`), less norm and head: a bias table in every
block. The table is that of a square grid; an image of h x w patches, each side at most the grid's, takes the rows that
its own distances need. So one table serves all shapes, with exact distances and nothing interpolated at run time.
Absolute places, of weights that have such, are likewise those of the square's upper left. Maps are the residual stream
after chosen blocks, without a norm, the class token left out.
"""

from __future__ import annotations

import torch
from timm.layers import calculate_drop_path_rates
from timm.models.beit import Beit
from torch import nn

from peco_ds.config import ModelSettings
from peco_ds.errors import UserError
from peco_ds.models.attention import bias_of_positions
from peco_ds.models.vit import (
    ActivationCheckpointing,
    TransformerBlock,
    init_as_beit,
    patches_of,
    timm_arguments,
    with_class_token,
)

# The last rows of every table: class token to patch, patch to class token, class token to itself.
CLASS_ROWS = 3


class DenseBlock(TransformerBlock):
    """A transformer block with a bias table of its own, read by an index that `forward` is given in the bias's place.

    All blocks of one grid share that index, int64 [T, T]: of 1,600 patches it takes 20 MB.
    """

    def __init__(self, width: int, heads: int, *, grid: int, **settings) -> None:
        # Without a grid the block makes no index of its own, which for a large grid is hundreds of megabytes.
        super().__init__(width, heads, grid=None, **settings)
        self.attn.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + CLASS_ROWS, heads))

    def _bias(self, given: torch.Tensor | None) -> torch.Tensor:
        return bias_of_positions(self.attn.relative_position_bias_table, given)


class DenseBackbone(Beit):
    """images_norm [B, 3, H, W], H and W multiples of the patch size -> one map [B, D, H / p, W / p] for each tap.

    Images are cast to the parameters' dtype here; maps have it too, and lie channels-last in memory.
    """

    taps: tuple[int, ...]
    # Patches a side of the square that the tables are for; no image may have more.
    table_grid: int

    def forward(self, images_norm: torch.Tensor) -> list[torch.Tensor]:
        patch = self.patch_embed.patch_size[0]
        height, width = (side // patch for side in images_norm.shape[2:])
        tokens = with_class_token(self, patches_of(self, images_norm), self.places(height, width))
        index = self.position_index(height, width)
        maps = []
        # Maps are taken from what blocks return: ZeRO-3 gathers a block's weights for the backward pass by its outputs.
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, index, *block.draw_paths(tokens))
            if number in self.taps:
                maps.append(tokens[:, 1:].unflatten(1, (height, width)).permute(0, 3, 1, 2))
        return maps

    def places(self, height: int, width: int) -> torch.Tensor | None:
        """The vectors [1, 1 + h w, D] of an image's places, which begin in the upper left of the square; None where
        the backbone has none.
        """
        if self.pos_embed is None or height == width == self.table_grid:
            return self.pos_embed
        square = self.pos_embed[:, 1:].unflatten(1, (self.table_grid, self.table_grid))
        return torch.cat([self.pos_embed[:, :1], square[:, :height, :width].flatten(1, 2)], dim=1)

    def position_index(self, height: int, width: int) -> torch.Tensor:
        """`position_index` for this grid, on the parameters' device; the one of the last grid is kept."""
        kept, device = getattr(self, "_kept_index", None), self.cls_token.device
        if kept is None or kept[0] != (height, width, device):
            kept = (height, width, device), position_index(height, width, self.table_grid, device)
            self._kept_index = kept
        return kept[1]


def build_dense_backbone(
    settings: ModelSettings,
    taps: tuple[int, ...],
    *,
    table_grid: int | None = None,
    activation_checkpointing: ActivationCheckpointing = "none",
) -> DenseBackbone:
    """A freshly initialised backbone without norm and head.

    Args:
        taps: blocks whose outputs are returned, from 0, rising. In a recipe the last one is the last block, since a
            later one would learn nothing.
        table_grid: patches a side of the square that the bias tables are for; None: that of settings.image_px.
        activation_checkpointing: of each block in the backward pass.
    Source: BEiT (arXiv 2106.08254), released `semantic_segmentation/backbone/beit.py`: no final norm, none on a tap.
    """
    assert list(taps) == sorted(set(taps)) and taps[-1] < settings.depth, (taps, settings.depth)
    model = DenseBackbone(**timm_arguments(settings, shared_bias=False) | {"depth": 0})
    model.norm = nn.Identity()
    model.patch_embed.strict_img_size = False
    model.taps, model.table_grid = tuple(taps), table_grid or settings.grid
    if model.pos_embed is not None:
        model.pos_embed = nn.Parameter(torch.zeros(1, 1 + model.table_grid**2, settings.width))
    model.blocks = nn.ModuleList(
        DenseBlock(
            settings.width,
            settings.heads,
            grid=model.table_grid,
            mlp_ratio=settings.mlp_ratio,
            layer_scale=settings.layer_scale,
            drop_path=rate,
            drop_path_by=settings.drop_path_by,
            activation_checkpointing=activation_checkpointing,
            fold_layer_scale=settings.fold_layer_scale,
        )
        for rate in calculate_drop_path_rates(settings.drop_path, settings.depth)
    )
    init_as_beit(model, settings.init_std)
    return model


def position_index(height: int, width: int, grid: int, device: torch.device | None = None) -> torch.Tensor:
    """Rows of a grid x grid bias table for an image of height x width patches: int64 [1 + h w, 1 + h w].

    Row and column 0 are the class token's. For height = width = grid it is the index of the released BEiT code.

    Raises: UserError if a side is longer than the grid's.
    """
    if max(height, width) > grid:
        raise UserError(
            f"an image of {height} x {width} patches: the position tables are for at most {grid} a side; "
            "use smaller images, or set model.image_px higher"
        )
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    distances_y = rows[:, None] - rows[None] + grid - 1
    distances_x = columns[:, None] - columns[None] + grid - 1
    patches = distances_y[:, None, :, None] * (2 * grid - 1) + distances_x[None, :, None, :]
    first_of_class = (2 * grid - 1) ** 2
    index = torch.empty(1 + height * width, 1 + height * width, dtype=torch.int64, device=device)
    index[1:, 1:] = patches.reshape(height * width, height * width)
    index[0], index[1:, 0], index[0, 0] = first_of_class, first_of_class + 1, first_of_class + 2
    return index
