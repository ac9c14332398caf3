"""Convert between canonical weights and Hugging Face transformers' BEiT, in the names that its version 4 has on disk.

Version 5 reads and writes the same names.

mim         BeitForMaskedImageModeling
features    BeitModel
classifier  BeitForImageClassification
"""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import torch

from peco_ds.convert.release import CONFIG, WEIGHTS, Release
from peco_ds.convert.to_timm import with_shared_table
from peco_ds.errors import UserError
from peco_ds.models.beit_weights import SHARED_TABLE, BeitWeights

logger = logging.getLogger("peco_ds")

PREPROCESSOR = "preprocessor_config.json"
# BEiT's value; the default of BeitConfig is 1e-12.
NORM_EPS = 1e-6
CLASSES = {"mim": "BeitForMaskedImageModeling", "features": "BeitModel", "classifier": "BeitForImageClassification"}
# PIL's number of the filter.
_BICUBIC = 3

# Names inside `beit.`.
_BASE = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    SHARED_TABLE: "encoder.relative_position_bias.relative_position_bias_table",
    "fc_norm.weight": "pooler.layernorm.weight",
    "fc_norm.bias": "pooler.layernorm.bias",
}
_BLOCK = {
    "norm1.weight": "layernorm_before.weight",
    "norm1.bias": "layernorm_before.bias",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    "attn.relative_position_bias_table": "attention.attention.relative_position_bias.relative_position_bias_table",
    "attn.proj.weight": "attention.output.dense.weight",
    "attn.proj.bias": "attention.output.dense.bias",
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
    "norm2.weight": "layernorm_after.weight",
    "norm2.bias": "layernorm_after.bias",
    "mlp.fc1.weight": "intermediate.dense.weight",
    "mlp.fc1.bias": "intermediate.dense.bias",
    "mlp.fc2.weight": "output.dense.weight",
    "mlp.fc2.bias": "output.dense.bias",
}
# Names outside of `beit.`.
_HEADS = {
    "lm_head.weight": "lm_head.weight",
    "lm_head.bias": "lm_head.bias",
    "head.weight": "classifier.weight",
    "head.bias": "classifier.bias",
}
_QKV = "blocks.{}.attn.qkv.weight"
_PARTS = tuple(f"encoder.layer.{{}}.attention.attention.{part}.weight" for part in ("query", "key", "value"))


def to_hf(weights: BeitWeights) -> Release:
    names = _names(weights.kind, weights.model.depth)
    prefix = _prefix(weights.kind)
    tensors = {names[name]: tensor for name, tensor in weights.tensors.items() if name in names}
    for block in range(weights.model.depth):
        parts = weights.tensors[_QKV.format(block)].chunk(3)
        tensors |= {prefix + name.format(block): part for name, part in zip(_PARTS, parts)}
    assert len(tensors) == len(weights.tensors) + 2 * weights.model.depth, "a tensor without a name in transformers"
    return Release(
        "transformers",
        {WEIGHTS: tensors},
        {CONFIG: hf_config(weights), PREPROCESSOR: preprocessor_config(weights)},
        _usage(weights),
    )


def from_hf(tensors: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Canonical tensors of a file in transformers' names.

    Raises: UserError for a segmentation model, for names of transformers 5's memory, and for a tensor that has no place
        in any of the three models.
    """
    if any(name.startswith("decode_head.") for name in tensors):
        raise UserError(
            f"{where}: a segmentation model of transformers; give a BeitModel, BeitForMaskedImageModeling "
            "or BeitForImageClassification"
        )
    if any(".attention.q_proj." in name for name in tensors):
        raise UserError(
            f"{where}: names that transformers 5 has in memory only; write the file with model.save_pretrained(...)"
        )
    kind = "mim" if "lm_head.weight" in tensors else "features" if "embeddings.cls_token" in tensors else "classifier"
    prefix = _prefix(kind)
    layer = re.compile(re.escape(prefix) + r"encoder\.layer\.([0-9]{1,6})\.")
    depth = 1 + max((int(match[1]) for match in map(layer.match, tensors) if match), default=-1)
    if depth > len(tensors):
        raise UserError(f"{where}: holds layer {depth - 1}, but {len(tensors)} tensors in all; fetch the file again")
    names = {theirs: ours for ours, theirs in _names(kind, depth).items()}
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith("relative_position_index")}
    found = {names[name]: left.pop(name) for name in names if name in left}
    for block in range(depth):
        parts = [prefix + name.format(block) for name in _PARTS]
        missing = [name for name in parts if name not in left]
        if missing:
            raise UserError(f"{where}: tensor {missing[0]} is missing; fetch the file again")
        if any(left[name].ndim != 2 or left[name].shape[1] != left[parts[0]].shape[1] for name in parts):
            raise UserError(
                f"{where}: query, key and value of layer {block} have shapes "
                f"{', '.join(str(tuple(left[name].shape)) for name in parts)}; fetch the file again"
            )
        found[_QKV.format(block)] = torch.cat([left.pop(name) for name in parts])
    if left:
        raise UserError(
            f"{where}: tensor {sorted(left)[0]} has no place in {CLASSES[kind]} as BEiT has it; give a file without it"
        )
    if kind == "features" and found.pop("mask_token", None) is not None:
        logger.info("%s: the mask token of a model without token head is left out", where)
    return with_shared_table(found) if kind == "mim" else found


def has_hf_names(tensors: dict) -> bool:
    return any("embeddings.patch_embeddings.projection" in name for name in tensors)


def _prefix(kind: str) -> str:
    return "" if kind == "features" else "beit."


def _names(kind: str, depth: int) -> dict[str, str]:
    """Canonical name -> name in a file of transformers, but for the three parts of qkv."""
    prefix = _prefix(kind)
    names = {ours: prefix + theirs for ours, theirs in _BASE.items()}
    for block in range(depth):
        names |= {
            f"blocks.{block}.{ours}": f"{prefix}encoder.layer.{block}.{theirs}" for ours, theirs in _BLOCK.items()
        }
    # The model with a token head has its norm outside of `beit.`.
    norm = "layernorm" if kind == "mim" else f"{prefix}layernorm"
    return names | {f"norm.{part}": f"{norm}.{part}" for part in ("weight", "bias")} | _HEADS


# --------------------------------------------------------------------------------------------- configs


def hf_config(weights: BeitWeights) -> dict:
    model = weights.model
    shared = SHARED_TABLE in weights.tensors
    config = {
        "architectures": [CLASSES[weights.kind]],
        "model_type": "beit",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": model.init_std,
        "layer_norm_eps": NORM_EPS,
        "image_size": model.image_px,
        "patch_size": model.patch_px,
        "num_channels": 3,
        "use_mask_token": weights.kind == "mim",
        "use_absolute_position_embeddings": model.absolute_positions,
        "use_relative_position_bias": not shared,
        "use_shared_relative_position_bias": shared,
        "layer_scale_init_value": model.layer_scale,
        # Stochastic depth belongs to the training, not to the model.
        "drop_path_rate": 0.0,
        # In the model with a token head this flag removes a norm in front of the head's own.
        "use_mean_pooling": weights.kind == "mim" or weights.pooling == "mean",
        "torch_dtype": str(weights.tensors["cls_token"].dtype).removeprefix("torch."),
    }
    if weights.kind == "mim":
        config["vocab_size"] = weights.num_codes
    if weights.kind == "classifier":
        classes = weights.classes or [f"LABEL_{number}" for number in range(weights.num_classes)]
        config["id2label"] = {str(number): name for number, name in enumerate(classes)}
        config["label2id"] = {name: number for number, name in enumerate(classes)}
    return config


def preprocessor_config(weights: BeitWeights) -> dict:
    """The evaluation's view of an image: short side to image_px / crop, then the central square.

    CLIP's processor does this; BEiT's own cannot keep the aspect ratio.
    """
    px = weights.model.image_px
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        # Rounded as timm and BEiT do.
        "size": {"shortest_edge": math.floor(px / weights.crop)},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": px, "width": px},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(weights.mean),
        "image_std": list(weights.std),
        "do_convert_rgb": True,
    }


def check_config(config: dict, where: str) -> None:
    """Warn of an eps that is not BEiT's.

    Raises: UserError if the config asks for a model that this backbone is not.
    """
    eps = config.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, (int, float)):
        raise UserError(f"{where}: layer_norm_eps {eps!r} in its {CONFIG}, no number; fetch the folder again")
    if eps != NORM_EPS:
        logger.warning(
            "%s: layer_norm_eps is %g in its %s; BEiT was trained with %g, which is taken here (1e-12 is "
            "only the default of BeitConfig)",
            where,
            eps,
            CONFIG,
            NORM_EPS,
        )
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{where}: hidden_act {config['hidden_act']}; BEiT has gelu, give another model")


def preprocessing_of(preprocessor: dict, classifier_config: dict) -> dict:
    """mean, std, crop and classes, where a folder's two files state them, under the names of `BeitWeights`."""
    found: dict = {}
    if preprocessor.get("image_mean") and preprocessor.get("image_std"):
        found |= {"mean": tuple(preprocessor["image_mean"]), "std": tuple(preprocessor["image_std"])}
    if preprocessor.get("size") is not None:
        cropped = preprocessor.get("do_center_crop") and preprocessor.get("crop_size") is not None
        found["crop"] = min(1.0, _side(preprocessor["crop_size"]) / _side(preprocessor["size"])) if cropped else 1.0
    labels = classifier_config.get("id2label") or {}
    names = [labels[key] for key in sorted(labels, key=int)]
    if any(name != f"LABEL_{number}" for number, name in enumerate(names)):
        found["classes"] = tuple(names)
    return found


def _side(size: int | dict) -> Any:
    """The side as the JSON states it: it may be no number, which shows when it is divided."""
    return size if isinstance(size, int) else size.get("shortest_edge", size.get("height"))


def _usage(weights: BeitWeights) -> str:
    name = CLASSES[weights.kind]
    call = {
        "mim": "model(**images, bool_masked_pos=hidden).logits    # [B, N, codes]",
        "features": "model(**images).last_hidden_state",
        "classifier": "model(**images).logits",
    }[weights.kind]
    return f"""```python
from transformers import AutoImageProcessor, {name}

processor = AutoImageProcessor.from_pretrained("PATH_OF_THIS_FOLDER")
model = {name}.from_pretrained("PATH_OF_THIS_FOLDER").eval()
images = processor(images=image, return_tensors="pt")
{call}
```"""
