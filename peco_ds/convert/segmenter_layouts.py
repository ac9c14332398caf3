"""Names of a segmenter's tensors in others' layouts, both ways.

hf      UperNetForSemanticSegmentation with BeitBackbone, as transformers has it on disk: the same network
unilm   the released BEiT code's `semantic_segmentation` on mmsegmentation 0.11: our names but for the branches, and
        index buffers in every block
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from timm.models.beit import gen_relative_position_index

from peco_ds.convert.release import CONFIG, WEIGHTS, Release, licence_of
from peco_ds.convert.resample import grid_of
from peco_ds.convert.to_hf import _BASE, _BLOCK, _PARTS, _QKV, NORM_EPS
from peco_ds.convert.to_unilm import FILE as UNILM_FILE
from peco_ds.errors import UserError
from peco_ds.models.segmenter_weights import SegmenterWeights
from peco_ds.models.uper_head import POOL_SCALES

_BACKBONE = "backbone."
_BLOCK_NAME = re.compile(r"blocks\.(\d{1,6})\.(.+)")
_LAYER_NAME = re.compile(r"encoder\.layer\.(\d{1,6})\.(.+)")
_INDEX = "relative_position_index"
_EMBEDDINGS = {ours: theirs for ours, theirs in _BASE.items() if ours.startswith(("cls_token", "patch_embed"))}


# ------------------------------------------------------------------------------------------------- unilm


def to_unilm_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors in unilm's names, with an index beside each table."""
    found: dict[str, torch.Tensor] = {}
    indexes: dict[int, torch.Tensor] = {}
    for name, tensor in tensors.items():
        found[re.sub(r"^pyramid\.", _BACKBONE, name)] = tensor
        if name.endswith("relative_position_bias_table"):
            grid = grid_of(tensor)
            assert grid is not None, name
            # One tensor under many names is stored once.
            index = indexes.setdefault(grid, gen_relative_position_index((grid, grid)))
            found[name.replace("relative_position_bias_table", _INDEX)] = index
    return found


def from_unilm_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        re.sub(r"^backbone\.fpn", "pyramid.fpn", name): tensor
        for name, tensor in tensors.items()
        if not name.endswith(_INDEX)
    }


# ---------------------------------------------------------------------------------------------------- hf


def to_hf_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors in the names of UperNetForSemanticSegmentation; query, key and value apart."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(_BACKBONE)
        block = _BLOCK_NAME.fullmatch(inner)
        if not name.startswith(_BACKBONE):
            found[_head_to_hf(name)] = tensor
        elif block and inner == _QKV.format(block[1]):
            for part, rows in zip(_PARTS, tensor.chunk(3)):
                found[_BACKBONE + part.format(block[1])] = rows
        elif block:
            found[f"{_BACKBONE}encoder.layer.{block[1]}.{_BLOCK[block[2]]}"] = tensor
        else:
            found[_BACKBONE + _EMBEDDINGS[inner]] = tensor
    return found


def from_hf_names(tensors: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """The reverse.

    Raises: UserError for a tensor that has no place in the network, or a missing one of query, key and value.
    """
    ours_of_block = {theirs: ours for ours, theirs in _BLOCK.items()}
    ours_of_embeddings = {theirs: ours for ours, theirs in _EMBEDDINGS.items()}
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith(_INDEX)}
    found: dict[str, torch.Tensor] = {}
    layers = {match[1] for name in left if (match := _LAYER_NAME.match(name.removeprefix(_BACKBONE)))}
    for layer in layers:
        parts = [_BACKBONE + part.format(layer) for part in _PARTS]
        missing = next((name for name in parts if name not in left), None)
        if missing:
            raise UserError(f"{where}: tensor {missing} is missing; fetch the file again")
        found[_BACKBONE + _QKV.format(layer)] = torch.cat([left.pop(name) for name in parts])
    for name, tensor in left.items():
        inner = name.removeprefix(_BACKBONE)
        match = _LAYER_NAME.fullmatch(inner)
        if match and match[2] in ours_of_block:
            found[f"{_BACKBONE}blocks.{match[1]}.{ours_of_block[match[2]]}"] = tensor
        elif inner in ours_of_embeddings:
            found[_BACKBONE + ours_of_embeddings[inner]] = tensor
        elif re.match(r"backbone\.fpn[12]\.|decode_head\.|auxiliary_head\.", name):
            found[_head_from_hf(name)] = tensor
        else:
            raise UserError(f"{where}: tensor {name} has no place in a segmenter; give a file without it")
    return found


def _head_to_hf(name: str) -> str:
    name = re.sub(r"^pyramid\.", _BACKBONE, name)
    return name.replace(".conv_seg.", ".classifier.").replace(".bn.", ".batch_norm.")


def _head_from_hf(name: str) -> str:
    name = re.sub(r"^backbone\.fpn", "pyramid.fpn", name)
    return name.replace(".classifier.", ".conv_seg.").replace(".batch_norm.", ".bn.")


def hf_segmenter_config(weights: SegmenterWeights) -> dict:
    """The config.json of UperNetForSemanticSegmentation."""
    model, settings = weights.model, weights.segmenter
    names = weights.classes or tuple(map(str, range(weights.num_classes)))
    return {
        "model_type": "upernet",
        "architectures": ["UperNetForSemanticSegmentation"],
        "backbone_config": {
            "model_type": "beit",
            "image_size": model.image_px,
            "patch_size": model.patch_px,
            "hidden_size": model.width,
            "num_hidden_layers": model.depth,
            "num_attention_heads": model.heads,
            "intermediate_size": int(model.width * model.mlp_ratio),
            # BEiT's value; the default is 1e-12.
            "layer_norm_eps": NORM_EPS,
            "hidden_act": "gelu",
            "layer_scale_init_value": model.layer_scale,
            "drop_path_rate": model.drop_path,
            "use_absolute_position_embeddings": False,
            "use_relative_position_bias": True,
            "use_shared_relative_position_bias": False,
            "use_mask_token": False,
            # Counted from 1.
            "out_features": [f"stage{tap + 1}" for tap in settings.taps],
            "add_fpn": True,
            "reshape_hidden_states": True,
        },
        "hidden_size": settings.head_width or model.width,
        "pool_scales": list(POOL_SCALES),
        "use_auxiliary_head": settings.auxiliary_weight > 0,
        "auxiliary_loss_weight": settings.auxiliary_weight,
        "auxiliary_in_channels": model.width,
        "auxiliary_channels": settings.auxiliary_width,
        "auxiliary_num_convs": 1,
        "auxiliary_concat_input": False,
        "loss_ignore_index": 255,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


# --------------------------------------------------------------------------------------------- releases


def segmenter_release(weights: SegmenterWeights, to: Literal["hf", "unilm"]) -> Release:
    """The files of a release for transformers, or for mmsegmentation 0.11 with the released BEiT code."""
    statistics = {"image_mean": list(weights.mean), "image_std": list(weights.std)}
    if to == "hf":
        tensors = to_hf_names(weights.tensors)
        return Release(
            "transformers", {WEIGHTS: tensors}, {CONFIG: hf_segmenter_config(weights) | statistics}, _HF_USAGE
        )
    config = {"layout": "unilm_segmentation", "classes": list(weights.classes or ()), **statistics}
    return Release("unilm", {UNILM_FILE: to_unilm_names(weights.tensors)}, {CONFIG: config}, _UNILM_USAGE)


_HF_USAGE = """```python
from transformers import UperNetForSemanticSegmentation

model = UperNetForSemanticSegmentation.from_pretrained("PATH_OF_THIS_FOLDER")
# pixel_values [B, 3, S, S], normalised by image_mean and image_std of config.json, S as below
classes = model(pixel_values).logits.argmax(1)
```"""
_UNILM_USAGE = f"""The tensors of `{UNILM_FILE}` lie under `model`, in the names of `semantic_segmentation` of
github.com/microsoft/unilm (folder `beit`): load them into its segmentor by `load_state_dict`."""


def segmenter_card(release: Release, weights: SegmenterWeights) -> str:
    """Markdown with the front matter that model hubs read."""
    model, settings = weights.model, weights.segmenter
    facts = {
        "weights": weights.source,
        "backbone": f"ViT, width {model.width}, depth {model.depth}, {model.heads} heads, patch {model.patch_px}",
        "head": f"UperNet of {settings.head_width or model.width} channels on blocks "
        f"{', '.join(str(tap + 1) for tap in settings.taps)}, counted from 1",
        "classes": f"{weights.num_classes}, named in {CONFIG}" if weights.classes else f"{weights.num_classes}",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in (facts | weights.facts).items())
    return f"""---
library_name: {release.library}
tags:
- image-segmentation
- {release.library}
license: other
---
# {weights.facts.get("recipe", weights.source)}

Semantic segmentation: UperNet on a vision transformer of the BEiT family (arXiv 2106.08254).

| | |
|---|---|
{table}

{release.usage}

Input: {model.image_px} px, RGB, mean {list(weights.mean)}, standard deviation {list(weights.std)}.

{licence_of(weights.facts)}
"""
