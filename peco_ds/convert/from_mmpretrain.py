"""Read BEiT and BEiT v2 as MMPretrain (before it MMClassification and MMSelfSup) saves them: the layers of the released
code under names of its own.
"""

from __future__ import annotations

import re

import torch

from peco_ds.errors import UserError

_PATCHES = "patch_embed.projection.weight"
_BACKBONE = "backbone."
# The first that a name begins with, once its backbone's prefix is gone.
_NAMES = (
    (r"patch_embed\.projection\.", "patch_embed.proj."),
    (r"layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
    (r"layers\.(\d+)\.", r"blocks.\1."),
    (r"ln1\.", "norm."),
    (r"ln2\.", "fc_norm."),
    # In BEiT v2's pre-training the final norm stands behind the backbone, for both branches.
    (r"neck\.norm\.", "norm."),
    (r"neck\.patch_aggregation\.", "cls_pt_layers."),
    (r"head\.cls_head\.", "lm_head."),
    (r"head\.(fc|layers\.head)\.", "head."),
)
# The tokenizer that computed the targets, and what an image's values are divided by.
_OF_TRAINING = ("target_generator.", "data_preprocessor.")


def has_mmpretrain_names(tensors: dict) -> bool:
    return any(name in tensors for name in (_PATCHES, _BACKBONE + _PATCHES))


def from_mmpretrain(tensors: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Canonical tensors, and of BEiT v2's second branch those that unilm's files have too.

    Raises: UserError if two tensors would have one name.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(_OF_TRAINING):
            continue
        plain = name.removeprefix(_BACKBONE)
        new = next((re.sub(f"^{old}", put, plain) for old, put in _NAMES if re.match(old, plain)), plain)
        if new in renamed:
            raise UserError(f"{where}: tensor {name} stands for {new}, as another one does; give an unchanged file")
        renamed[new] = tensor
    return renamed
