"""Weights in the layouts that others wrote, small and with random values.

Names and shapes are spelt out here, independently of the package.
"""

from __future__ import annotations

import torch

from peco_ds.config import ModelSettings
from peco_ds.models.beit_weights import BeitWeights

SMALL = ModelSettings(image_px=64, patch_px=16, width=96, depth=3, heads=3, drop_path=0.0)
CODES, CLASSES = 50, 7


def block_shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "gamma_1": (width,),
        "gamma_2": (width,),
        "attn.q_bias": (width,),
        "attn.v_bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.fc1.weight": (hidden, width),
        "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (width, hidden),
        "mlp.fc2.bias": (width,),
    }


def trunk_shapes(model: ModelSettings) -> dict[str, tuple[int, ...]]:
    shapes = {
        "cls_token": (1, 1, model.width),
        "patch_embed.proj.weight": (model.width, 3, model.patch_px, model.patch_px),
        "patch_embed.proj.bias": (model.width,),
    }
    for block in range(model.depth):
        shapes |= {
            f"blocks.{block}.{name}": shape
            for name, shape in block_shapes(model.width, int(model.width * model.mlp_ratio)).items()
        }
    return shapes


def rows(model: ModelSettings) -> int:
    return (2 * model.grid - 1) ** 2 + 3


def mim_shapes(model: ModelSettings, codes: int = CODES) -> dict[str, tuple[int, ...]]:
    head = {
        "mask_token": (1, 1, model.width),
        "norm.weight": (model.width,),
        "norm.bias": (model.width,),
        "lm_head.weight": (codes, model.width),
        "lm_head.bias": (codes,),
    }
    return trunk_shapes(model) | head | {"rel_pos_bias.relative_position_bias_table": (rows(model), model.heads)}


def block_tables(model: ModelSettings) -> dict[str, tuple[int, ...]]:
    return {
        f"blocks.{block}.attn.relative_position_bias_table": (rows(model), model.heads) for block in range(model.depth)
    }


def feature_shapes(model: ModelSettings) -> dict[str, tuple[int, ...]]:
    return trunk_shapes(model) | block_tables(model) | {"norm.weight": (model.width,), "norm.bias": (model.width,)}


def classifier_shapes(
    model: ModelSettings, classes: int = CLASSES, norm: str = "fc_norm"
) -> dict[str, tuple[int, ...]]:
    head = {
        f"{norm}.weight": (model.width,),
        f"{norm}.bias": (model.width,),
        "head.weight": (classes, model.width),
        "head.bias": (classes,),
    }
    return trunk_shapes(model) | block_tables(model) | head


def index_buffers(names, model: ModelSettings) -> dict[str, torch.Tensor]:
    """What unilm's modules keep beside each table: which row belongs to which pair of tokens."""
    side, places = model.grid, model.grid**2
    index = torch.empty(places + 1, places + 1, dtype=torch.long)
    for query in range(places):
        for key in range(places):
            down, right = query // side - key // side, query % side - key % side
            index[1 + query, 1 + key] = (down + side - 1) * (2 * side - 1) + right + side - 1
    last = rows(model)
    index[0, :], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
    return {
        name.replace("bias_table", "index"): index.clone()
        for name in names
        if name.endswith("relative_position_bias_table")
    }


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Values with a trained look: norms and layer scale about 1 and 0.1, so that a tensor in the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)

    def start(name: str) -> float:
        return 1.0 if "norm" in name and name.endswith("weight") else 0.1 if "gamma" in name else 0.0

    return {name: start(name) + 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def sample(kind: str, model: ModelSettings = SMALL, **fields) -> BeitWeights:
    shapes = {"mim": mim_shapes, "features": feature_shapes, "classifier": classifier_shapes}[kind](model)
    return BeitWeights(kind, model, drawn(shapes), f"a drawn {kind}", **fields)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )
