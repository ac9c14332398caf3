"""Our masked image model -> timm's `Beit`.

The backbone is timm's already, so names only lose their prefix. The bias table that pre-training shares between blocks is copied into every
block, the form in which timm's registered BEiT models keep it. What timm has no place for (mask token, token head) goes
into a file of its own.
"""

from __future__ import annotations

import torch

from peco_ds.config import ModelSettings
from peco_ds.data.views import IMAGENET_MEAN, IMAGENET_STD
from peco_ds.errors import UserError
from peco_ds.models.vit import timm_arguments

_PREFIX = "backbone."
_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
_TABLE = "blocks.{}.attn.relative_position_bias_table"
HEAD_NAMES = ("mask_token", "lm_head.weight", "lm_head.bias")


def split_weights(weights: dict[str, torch.Tensor], depth: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """State of `MaskedImageModel` -> (state of timm's `Beit` with a table a block, mask token and head).

    Raises: UserError if a tensor is missing or of no known place.
    """
    head = {name: weights[name] for name in HEAD_NAMES if name in weights}
    backbone = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items() if name.startswith(_PREFIX)}
    strange = weights.keys() - head.keys() - {_PREFIX + name for name in backbone}
    table = backbone.pop(_SHARED_TABLE, None)
    if table is None or len(head) != len(HEAD_NAMES) or strange:
        raise UserError(f"these are not the weights of a masked pre-training run: {len(weights)} tensors, unknown {sorted(strange)[:3]}; give the run folder of pretrain.py")
    # One copy a block: safetensors refuses tensors that share memory.
    backbone |= {_TABLE.format(block): table.clone() for block in range(depth)}
    return backbone, head


def timm_config(settings: ModelSettings, tag: str) -> dict:
    """`config.json` as timm's `local-dir:` and hub loaders read it; sizes that are not registered ride on `model_args`."""
    base = "beit_large_patch16_224" if settings.width >= 1024 else "beit_base_patch16_224"
    arguments = timm_arguments(settings, shared_bias=False)
    # The rate of stochastic depth is the training's, not the model's.
    model_args = {name: value for name, value in arguments.items() if name not in ("num_classes", "drop_path_rate")}
    return {
        "architecture": base,
        "num_classes": 0,
        "num_features": settings.width,
        "global_pool": "token",
        "model_args": model_args,
        "pretrained_cfg": {
            "tag": tag,
            "custom_load": False,
            "input_size": [3, settings.image_px, settings.image_px],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
