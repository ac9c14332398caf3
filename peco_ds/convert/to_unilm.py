"""Convert between canonical weights and a checkpoint of the released BEiT code (unilm): the same names, plus the index
buffers that its modules keep in their state.

unilm has no installable package. Its file is a dictionary with the tensors under `model`; its model classes take the
sizes as arguments, which lie in config.json.
"""

from __future__ import annotations

import torch
from timm.models.beit import gen_relative_position_index

from peco_ds.convert.release import CONFIG, Release
from peco_ds.errors import UserError
from peco_ds.models.beit_weights import BeitWeights

FILE = "model.pth"
# Marks our config.json, which none of unilm's scripts reads.
LAYOUT = "unilm"
_TABLE_END, _INDEX_END = "relative_position_bias_table", "relative_position_index"


def to_unilm(weights: BeitWeights) -> Release:
    """Raises: UserError for weights without a head, for which unilm has no model."""
    if weights.kind == "features":
        raise UserError(
            f"{weights.source}: a backbone without mask token, token head or classifier, which unilm has "
            "no model for; convert it to timm or hf"
        )
    index = gen_relative_position_index((weights.model.grid, weights.model.grid))
    tensors = {}
    for name, tensor in weights.tensors.items():
        tensors[name] = tensor
        if name.endswith(_TABLE_END):
            # One tensor under many names is stored once.
            tensors[name.removesuffix(_TABLE_END) + _INDEX_END] = index
    return Release(LAYOUT, {FILE: tensors}, {CONFIG: unilm_config(weights)}, _usage(weights))


def from_unilm(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_INDEX_END)}


def unilm_config(weights: BeitWeights) -> dict:
    """Arguments of unilm's model class, and the settings that its weights file cannot hold."""
    model, mim = weights.model, weights.kind == "mim"
    head = (
        {"vocab_size": weights.num_codes}
        if mim
        else {"num_classes": weights.num_classes, "use_mean_pooling": weights.pooling == "mean"}
    )
    return {
        "layout": LAYOUT,
        "model_args": {
            "img_size": model.image_px,
            "patch_size": model.patch_px,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.heads,
            "mlp_ratio": model.mlp_ratio,
            "qkv_bias": True,
            "init_values": model.layer_scale,
            "use_abs_pos_emb": model.absolute_positions,
            "use_rel_pos_bias": not mim,
            "use_shared_rel_pos_bias": mim,
            **head,
        },
        "mean": list(weights.mean),
        "std": list(weights.std),
        "crop_pct": weights.crop,
        "label_names": list(weights.classes) if weights.classes else None,
    }


def preprocessing_of(config: dict) -> dict:
    """mean, std, crop and classes of a folder's config.json, under the names of `BeitWeights`."""
    found = {"mean": tuple(config["mean"]), "std": tuple(config["std"]), "crop": config["crop_pct"]}
    return found | ({"classes": tuple(config["label_names"])} if config["label_names"] else {})


def _usage(weights: BeitWeights) -> str:
    file, name = (
        ("modeling_pretrain", "VisionTransformerForMaskedImageModeling")
        if weights.kind == "mim"
        else ("modeling_finetune", "VisionTransformer")
    )
    tune = (
        f"\n\nTo fine-tune it there: `run_class_finetuning.py --finetune PATH_OF_THIS_FOLDER/{FILE}`."
        if weights.kind == "mim"
        else ""
    )
    return f"""```python
# in the folder `beit` of github.com/microsoft/unilm
import functools, json, torch
from {file} import {name}

arguments = json.load(open("PATH_OF_THIS_FOLDER/{CONFIG}"))["model_args"]
model = {name}(**arguments, norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6))
model.load_state_dict(torch.load("PATH_OF_THIS_FOLDER/{FILE}", map_location="cpu")["model"])
```{tune}"""
