"""Names of a segmenter's tensors in others' layouts, both ways.

hf      UperNetForSemanticSegmentation with BeitBackbone, as transformers has it on disk: the same network. Read too:
        BeitForSemanticSegmentation
unilm   the released BEiT code's `semantic_segmentation` on mmsegmentation 0.11: our names but for the branches, and
        index buffers in every block
mmseg   MMSegmentation's own BEiT with Feature2Pyramid; read only
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from timm.models.beit import gen_relative_position_index

from peco_ds.convert import to_unilm
from peco_ds.convert.from_mmpretrain import from_mmpretrain, has_mmpretrain_names
from peco_ds.convert.release import CONFIG, WEIGHTS, Release, licence_of
from peco_ds.convert.resample import grid_of
from peco_ds.convert.to_hf import _BASE, _BLOCK, _PARTS, _QKV, NORM_EPS
from peco_ds.errors import UserError
from peco_ds.models.beit_weights import PLACES, SHARED_TABLE
from peco_ds.models.segmenter_weights import SegmenterWeights
from peco_ds.models.uper_head import POOL_SCALES

_BACKBONE = "backbone."
_BLOCK_NAME = re.compile(r"blocks\.(\d{1,6})\.(.+)")
_LAYER_NAME = re.compile(r"encoder\.layer\.(\d{1,6})\.(.+)")
_INDEX = "relative_position_index"
# Of a segmenter's backbone, by our names.
_EMBEDDINGS = {
    ours: theirs
    for ours, theirs in _BASE.items()
    if ours.startswith(("cls_token", "patch_embed")) or ours in (PLACES, SHARED_TABLE)
}
_OF_BLOCK = {theirs: ours for ours, theirs in _BLOCK.items()}
_OF_EMBEDDINGS = {theirs: ours for ours, theirs in _EMBEDDINGS.items()}
# Left out in reading: no head sees them.
_UNSEEN_HF = ("backbone.embeddings.mask_token", "backbone.layernorm.")
# Marks our config.json beside a file in unilm's layout.
LAYOUT = f"{to_unilm.LAYOUT}_segmentation"


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


# ------------------------------------------------------------------------------------------------- mmseg

_BRANCHES_OF_MMSEG = (("neck.upsample_4x.", "pyramid.fpn1."), ("neck.upsample_2x.", "pyramid.fpn2."))


def has_mmseg_names(tensors: dict) -> bool:
    return has_mmpretrain_names(tensors)


def from_mmseg_names(tensors: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Our names of a file of MMSegmentation, whose BEiT has MMPretrain's names.

    Raises: UserError if two tensors would have one name.
    """
    inner = {name: tensor for name, tensor in tensors.items() if name.startswith(_BACKBONE)}
    found = {_BACKBONE + name: tensor for name, tensor in from_mmpretrain(inner, where).items()}
    for name, tensor in tensors.items():
        if name not in inner:
            theirs, ours = next((pair for pair in _BRANCHES_OF_MMSEG if name.startswith(pair[0])), ("", ""))
            found[ours + name.removeprefix(theirs)] = tensor
    return {name: tensor for name, tensor in found.items() if not name.endswith(_INDEX)}


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
    """The reverse, also for the names of BeitForSemanticSegmentation.

    Raises: UserError for a tensor that has no place in the network, a missing one of query, key and value, and names of
        transformers 5's memory.
    """
    if any(".attention.q_proj." in name for name in tensors):
        raise UserError(
            f"{where}: names that transformers 5 has in memory only; write the file with model.save_pretrained(...)"
        )
    left = {_as_upernet(name): tensor for name, tensor in tensors.items() if not name.endswith(_INDEX)}
    left = {name: tensor for name, tensor in left.items() if not name.startswith(_UNSEEN_HF)}
    found: dict[str, torch.Tensor] = {}
    layers = {match[1] for name in left if (match := _LAYER_NAME.match(name.removeprefix(_BACKBONE)))}
    for layer in layers:
        parts = [_BACKBONE + part.format(layer) for part in _PARTS]
        missing = next((name for name in parts if name not in left), None)
        if missing:
            raise UserError(f"{where}: tensor {missing} is missing; fetch the file again")
        if any(left[name].ndim != 2 or left[name].shape[1] != left[parts[0]].shape[1] for name in parts):
            raise UserError(
                f"{where}: query, key and value of layer {layer} have shapes "
                f"{', '.join(str(tuple(left[name].shape)) for name in parts)}; fetch the file again"
            )
        found[_BACKBONE + _QKV.format(layer)] = torch.cat([left.pop(name) for name in parts])
    for name, tensor in left.items():
        ours = _from_hf_name(name)
        if ours is None:
            raise UserError(f"{where}: tensor {name} has no place in a segmenter; give a file without it")
        found[ours] = tensor
    return found


def _as_upernet(name: str) -> str:
    """A name of BeitForSemanticSegmentation as UperNetForSemanticSegmentation has it."""
    return re.sub(r"^(beit\.|(?=fpn[12]\.))", _BACKBONE, name)


def _from_hf_name(name: str) -> str | None:
    """Our name of a tensor that is no part of query, key and value; None: it has no place."""
    inner = name.removeprefix(_BACKBONE)
    match = _LAYER_NAME.fullmatch(inner)
    if match and match[2] in _OF_BLOCK:
        return f"{_BACKBONE}blocks.{match[1]}.{_OF_BLOCK[match[2]]}"
    if inner in _OF_EMBEDDINGS:
        return _BACKBONE + _OF_EMBEDDINGS[inner]
    return _head_from_hf(name) if re.match(r"backbone\.fpn[12]\.|decode_head\.|auxiliary_head\.", name) else None


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
            "use_absolute_position_embeddings": model.absolute_positions,
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
    classes = list(weights.classes or ())
    # As mmsegmentation's own checkpoints, so that its tools find classes and tensors.
    meta = {"CLASSES": classes or None, "PALETTE": None, "config": mmcv_config(weights)}
    return Release(
        "unilm",
        {to_unilm.FILE: to_unilm_names(weights.tensors)},
        {CONFIG: {"layout": LAYOUT, "classes": classes, **statistics}},
        _UNILM_USAGE,
        pickled={"meta": meta},
        container="state_dict",
    )


def mmcv_config(weights: SegmenterWeights) -> str:
    """The network, and the images' statistics, as a config of mmsegmentation 0.11 for the released BEiT code.

    Source: released `configs/_base_/models/upernet_beit.py`.
    """
    model, settings, width = weights.model, weights.segmenter, weights.segmenter.head_width or weights.model.width
    common = dict(dropout_ratio=settings.dropout, num_classes=weights.num_classes, align_corners=False)
    backbone = dict(
        type="BEiT", img_size=model.image_px, patch_size=model.patch_px, embed_dim=model.width, depth=model.depth,
        num_heads=model.heads, mlp_ratio=model.mlp_ratio, qkv_bias=True, use_abs_pos_emb=model.absolute_positions,
        use_rel_pos_bias=True, init_values=model.layer_scale, drop_path_rate=model.drop_path,
        out_indices=list(settings.taps),
    )  # fmt: skip
    norm = dict(type="SyncBN", requires_grad=True)
    decode = dict(
        type="UPerHead", in_channels=[model.width] * 4, in_index=[0, 1, 2, 3], pool_scales=list(POOL_SCALES),
        channels=width, norm_cfg=norm, **common,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    )  # fmt: skip
    auxiliary = dict(
        type="FCNHead", in_channels=model.width, in_index=2, channels=settings.auxiliary_width, num_convs=1,
        concat_input=False, norm_cfg=norm, **common,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=settings.auxiliary_weight),
    )  # fmt: skip
    side = model.image_px
    test = dict(mode="slide", crop_size=(side, side), stride=(side * 2 // 3, side * 2 // 3))
    parts = dict(backbone=backbone, decode_head=decode, train_cfg=dict(), test_cfg=test)
    if settings.auxiliary_weight:
        parts["auxiliary_head"] = auxiliary
    statistics = {name: [255 * value for value in getattr(weights, name)] for name in ("mean", "std")}
    return (
        f"norm_cfg = {_as_code(norm)}\nmodel = {_as_code(dict(type='EncoderDecoder', pretrained=None, **parts))}\n"
        f"img_norm_cfg = {_as_code(dict(**statistics, to_rgb=True))}\n"
    )


def _as_code(value) -> str:
    """A value in Python, its dictionaries as calls of dict, as mmcv writes them."""
    if isinstance(value, dict):
        return f"dict({', '.join(f'{name}={_as_code(each)}' for name, each in value.items())})"
    return repr(value)


_HF_USAGE = """```python
from transformers import UperNetForSemanticSegmentation

model = UperNetForSemanticSegmentation.from_pretrained("PATH_OF_THIS_FOLDER")
# pixel_values [B, 3, S, S], normalised by image_mean and image_std of config.json, S as below
classes = model(pixel_values).logits.argmax(1)
```"""
_UNILM_USAGE = f"""`{to_unilm.FILE}` is a checkpoint of mmsegmentation 0.11 for `semantic_segmentation` of
github.com/microsoft/unilm (folder `beit`): `meta`, with the classes and the network as a config, and `state_dict`. Its
`tools/test.py CONFIG {to_unilm.FILE}` measures it."""


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
