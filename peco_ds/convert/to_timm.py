"""Convert between canonical weights and timm's `Beit`.

timm kept BEiT's names. The bias table that pre-training shares between blocks is copied into every block, the form in
which timm's registered models keep it. Tensors that timm's model does not have (mask token, token head) go into a file
of their own. Where that file is present, the copies become one table again.
"""

from __future__ import annotations

import logging

import torch

from peco_ds.convert.release import CONFIG, WEIGHTS, Release
from peco_ds.models.beit_weights import SHARED_TABLE, TABLE, BeitWeights
from peco_ds.models.vit import timm_arguments

logger = logging.getLogger("peco_ds")

HEAD_FILE = "mim_head.safetensors"
HEAD_NAMES = ("mask_token", "lm_head.weight", "lm_head.bias")


def to_timm(weights: BeitWeights) -> Release:
    head = {name: weights.tensors[name] for name in HEAD_NAMES if name in weights.tensors}
    backbone = {name: tensor for name, tensor in weights.tensors.items() if name not in head and name != SHARED_TABLE}
    if SHARED_TABLE in weights.tensors:
        # One copy a block: safetensors refuses tensors that share memory.
        backbone |= {TABLE.format(block): weights.tensors[SHARED_TABLE].clone() for block in range(weights.model.depth)}
    files = {WEIGHTS: backbone} | ({HEAD_FILE: head} if head else {})
    return Release("timm", files, {CONFIG: timm_config(weights)}, _usage(weights))


def from_timm(tensors: dict[str, torch.Tensor], head: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Canonical tensors of a timm file.

    Args:
        head: tensors of HEAD_FILE, {} if there is none. Where the blocks' tables differ, it is left out with a
            warning: the backbone was trained further.
    """
    whole = with_shared_table(tensors | head)
    if head and SHARED_TABLE not in whole:
        logger.warning(
            "%s: %s is left out, because the blocks have bias tables of their own; what is read is a "
            "backbone without token head",
            where,
            HEAD_FILE,
        )
        return tensors
    return whole if head else tensors


def with_shared_table(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with one bias table for all blocks in place of equal ones in every block.

    Unchanged where they differ.
    """
    tables = [name for name in tensors if name.startswith("blocks.") and name.endswith("relative_position_bias_table")]
    if not tables:
        return tensors
    first = tensors[tables[0]]
    if not all(tensors[name].dtype == first.dtype and torch.equal(tensors[name], first) for name in tables):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name not in tables} | {SHARED_TABLE: first}


def timm_config(weights: BeitWeights) -> dict:
    """`config.json` as timm's `local-dir:` and hub loaders read it.

    `model_args` holds sizes that no registered model has.
    """
    model = weights.model
    pooling = weights.pooling
    arguments = timm_arguments(model, shared_bias=False, pooling=pooling)
    # The rate of stochastic depth is the training's, not the model's.
    model_args = {name: value for name, value in arguments.items() if name not in ("num_classes", "drop_path_rate")}
    labels = {"label_names": list(weights.classes)} if weights.classes else {}
    return {
        "architecture": "beit_large_patch16_224" if model.width >= 1024 else "beit_base_patch16_224",
        "num_classes": weights.num_classes,
        "num_features": model.width,
        "global_pool": arguments["global_pool"],
        **labels,
        "model_args": model_args,
        "pretrained_cfg": {
            "tag": weights.facts.get("recipe", ""),
            "custom_load": False,
            "input_size": [3, model.image_px, model.image_px],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": weights.crop,
            "crop_mode": "center",
            "mean": list(weights.mean),
            "std": list(weights.std),
            "num_classes": weights.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _usage(weights: BeitWeights) -> str:
    load = 'timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True'
    if weights.kind == "classifier":
        return f"```python\nimport timm\n\nmodel = {load}).eval()    # images -> {weights.num_classes} logits\n```"
    head = f"\n\n`{HEAD_FILE}` holds the mask token and the token head." if weights.kind == "mim" else ""
    return f"""```python
import timm

model = {load})               # features: class token, then patches
classifier = {load}, num_classes=1000)
```{head}"""
