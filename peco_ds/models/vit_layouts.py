"""Recognise the layouts in which ViTs are published and bring each to timm's names: MoCo v3, DINO, DINOv2, CLIP
(OpenAI, open_clip), Hugging Face's CLIP, DINOv2 and ViT.

Settings that no shape shows (activation, epsilon, heads) are taken from the layout or from the config file beside the
weights, and never guessed: CLIP's names are the same for weights trained with GELU and with its approximation
QuickGELU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from peco_ds.errors import UserError
from peco_ds.models.beit_weights import JUDGE_LICENCE, TOKENIZER_LICENCE
from peco_ds.models.image_statistics import ASSUMED, FACT, ImageStatistics, stated_in, statistics_of_weights
from peco_ds.models.torchscript_files import is_torchscript, read_torchscript
from peco_ds.models.weight_files import read_tensor_file, tensors_of_checkpoint
from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD, read_json

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PATCH_WEIGHT = "patch_embed.proj.weight"
OPEN_CLIP_CONFIG = "open_clip_config.json"
HF_CONFIG = "config.json"

# Activations as timm spells them.
_GELU, _QUICK_GELU = "gelu", "quick_gelu"
_HEADS_OF_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}
# MoCo v3's ViT-S has 12 heads; the shapes of a file do not tell
_MOCO_HEADS_OF_WIDTH = {384: 12, 768: 12}
# Widths of open_clip's H, g and bigG; in all others a head is 64 wide.
_CLIP_HEADS_OF_WIDTH = {1280: 16, 1408: 16, 1664: 16}

# Prefixes of each name in training scripts' checkpoints. The first that fits is taken.
_MOCO_PREFIXES = ("module.base_encoder.", "base_encoder.")
_PREFIXES = (*_MOCO_PREFIXES, "module.backbone.", "backbone.", "module.encoder.", "encoder.", "module.", "")
# Layers after the features.
_HEADS = ("head.", "head_dist.", "fc.")
_DIMENSIONS = {
    PATCH_WEIGHT: 4,
    "pos_embed": 3,
    "reg_token": 3,
    "blocks.0.mlp.fc1.weight": 2,
    "blocks.0.mlp.fc2.weight": 2,
}


@dataclass(frozen=True)
class VitFile:
    """A ViT as a file holds it, under timm's names.

    `projection` [out, width] is CLIP's way from patch tokens to the space it shares with text. `heads` None: neither
    shapes nor config tell. `activation` is timm's name of it; None: the file cannot tell. `fixed_heads`: a registered
    timm model of these shapes may have other heads.
    """

    state: dict[str, torch.Tensor]
    layout: str
    heads: int | None
    projection: torch.Tensor | None = None
    activation: str | None = _GELU
    norm_eps: float = 1e-6
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    licence: str = ""
    fixed_heads: bool = False
    # What tells mean and std, where a config or the layout does; else the arguments in the file may.
    statistics_by: str = ""
    arguments: object = None


def read_vit_file(path: Path) -> VitFile:
    """The ViT of a weights file in any of the layouts.

    Raises: UserError if the file or the config beside it is unreadable, or if no ViT of a known layout is in it.
    """
    raw = read_torchscript(path) if is_torchscript(path) else read_tensor_file(path)
    trained_by_dino = "dino_loss" in raw
    tensors = tensors_of_checkpoint(raw)
    for layout in _LAYOUTS:
        prefix = next((prefix for prefix in layout.prefixes if prefix + layout.mark in tensors), None)
        if prefix is not None:
            break
    else:
        raise UserError(
            f"{path}: holds no ViT (no tensor named ...{PATCH_WEIGHT} among {len(tensors)}), nor a ResNet or VGG under "
            "torchvision's names; of another convolutional network of timm's, name the architecture"
        )
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if layout.patches not in inner:
        raise UserError(f"{path}: tensor {prefix}{layout.patches} is missing; fetch the file again")
    _check(path, inner, {layout.patches: 4}, prefix)
    vit = layout.read(_Found(path, inner, tensors, prefix))
    _check(path, vit.state, _DIMENSIONS)
    if trained_by_dino:
        vit = replace(vit, layout="DINO", licence=_APACHE.format("DINO"))
    if not vit.statistics_by and vit.layout != "ViT":
        vit = replace(vit, statistics_by=f"as {vit.layout} was trained")
    return replace(vit, arguments=raw.get("args"))


def _check(path: Path, tensors: dict[str, torch.Tensor], dimensions: dict[str, int], prefix: str = "") -> None:
    """Check the tensors whose shapes are read before the strict comparison."""
    for name, wanted in dimensions.items():
        if name in tensors and (
            tensors[name].ndim != wanted or not tensors[name].numel() or not tensors[name].is_floating_point()
        ):
            raise UserError(
                f"{path}: tensor {prefix}{name} is {tensors[name].dtype} of shape "
                f"{tuple(tensors[name].shape)}, a ViT's has {wanted} numbers"
            )


def licence_beside(folder: Path) -> str:
    """What the model card of a folder states: the `license` of its front matter, and in cards of this package what
    bound the network itself; "" without a front matter.
    """
    front, text = _card(folder)
    found = re.search(r"^license: *[\"']?([\w.+-]{1,60})", front, re.MULTILINE)
    stated = (
        ""
        if found is None
        else f"as the README.md of {folder.resolve().name} says"
        if found[1] == "other"
        else found[1]
    )
    # A judge that learnt from the codes of another judge is bound by that one's terms too, over any number of
    # generations.
    bound = [f"its {name} {terms}" for name, terms in _terms(text)]
    return "; ".join([*([stated] if stated else []), *bound])


def terms_beside(folder: Path) -> dict[str, str]:
    """What bound the network of a folder, as a card of this package tells it: `TOKENIZER_LICENCE` and `JUDGE_LICENCE`,
    where there are any.
    """
    found = _terms(_card(folder)[1])
    return {name: "; ".join(terms for other, terms in found if other == name) for name, _ in found}


def assumed_beside(folder: Path) -> bool:
    """Whether the card of a release of this package says that its image statistics were assumed."""
    row = re.search(rf"^\| {re.escape(FACT)} \| ([^|\n]*) \|$", _card(folder)[1], re.MULTILINE)
    return row is not None and ASSUMED in row[1]


def statistics_of_release(folder: Path, config: dict, where: str) -> ImageStatistics:
    """Those of a release folder of timm's: its config's, unless its card says that they were assumed.

    Args:
        config: its config.json.  where: the network, in the log.
    """
    stated = None if assumed_beside(folder) else stated_in(config)
    remedy = f"state mean and std in {folder / HF_CONFIG}, or make the release again with --statistics"
    return statistics_of_weights(where, remedy=remedy, stated=stated, path=folder)


def _terms(text: str) -> list[tuple[str, str]]:
    """Name and terms of every row, each once: one name may stand for the weights and for what they started from."""
    return list(dict.fromkeys((name, terms) for name, terms in _TERMS.findall(text) if terms.isprintable()))


def _card(folder: Path) -> tuple[str, str]:
    """Front matter and text of a folder's model card; empty where it has none with a front matter."""
    try:
        with open(folder / "README.md", encoding="utf-8", errors="replace") as file:
            text = file.read(20000)
    except OSError:
        return "", ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return ("", "") if front is None else (front[1], text[front.end() :])


_TERMS = re.compile(
    rf"^\| ({re.escape(TOKENIZER_LICENCE)}|{re.escape(JUDGE_LICENCE)})(?: of what it started "
    rf"from)? \| ([^|\n]{{1,2000}}) \|$",
    re.MULTILINE,
)


# ----------------------------------------------------------------------------------------- the layouts

_APACHE = "Apache-2.0 ({}'s release)"
_MOCO_LICENCE = "CC BY-NC 4.0 (MoCo v3's release)"
_OPENAI_LICENCE = "MIT (OpenAI's release of CLIP)"
_CLIP_LICENCE = "as its model card says"
# Files whose tensors have the names of any timm ViT; only what they are called tells them.
_KNOWN_FILES = (
    (re.compile(r"dino_(vitbase|deitsmall)(8|16)_pretrain\.pth"), "DINO", _APACHE.format("DINO")),
    (re.compile(r"mae_pretrain_vit_(base|large|huge)\.pth"), "MAE", "CC BY-NC 4.0 (MAE's release)"),
)


class _Found(NamedTuple):
    path: Path
    # The tensors whose names have the prefix, named without it.
    inner: dict[str, torch.Tensor]
    whole: dict[str, torch.Tensor]
    prefix: str


@dataclass(frozen=True)
class _Layout:
    # The tensor by which the layout is known.
    mark: str
    # The name of the patch embedding's weight.
    patches: str
    # Prefixes that its names may have; the first that fits is taken.
    prefixes: tuple[str, ...]
    read: Callable[[_Found], VitFile]


def _read_timm(found: _Found) -> VitFile:
    moco, inner = found.prefix in _MOCO_PREFIXES, found.inner
    width = inner[PATCH_WEIGHT].shape[0]
    state = {name: tensor for name, tensor in inner.items() if not name.startswith(_HEADS)}
    if "norm_pre.weight" in inner:
        weight, bias = inner.get("head.weight"), inner.get("head.bias")
        projection = weight if is_projection(weight, bias) else None
        return VitFile(
            state,
            "CLIP (timm)",
            _clip_heads(width),
            projection,
            None,
            1e-5,
            CLIP_MEAN,
            CLIP_STD,
            licence_beside(found.path.parent),
        )
    if "mask_token" in state and "blocks.0.ls1.gamma" in state:
        del state["mask_token"]
        swiglu = {
            name: re.sub(r"(blocks\.\d+\.mlp\.)w12\.", r"\1fc1.", re.sub(r"(blocks\.\d+\.mlp\.)w3\.", r"\1fc2.", name))
            for name in state
        }
        state = _with_registers({swiglu[name]: tensor for name, tensor in state.items()})
        return VitFile(state, "DINOv2", width // 64 if width % 64 == 0 else None, licence=_APACHE.format("DINOv2"))
    if moco:
        return VitFile(
            state,
            "MoCo v3",
            _MOCO_HEADS_OF_WIDTH.get(width, _HEADS_OF_WIDTH.get(width)),
            licence=_MOCO_LICENCE,
            fixed_heads=width in _MOCO_HEADS_OF_WIDTH,
        )
    layout, licence = next(
        (known[1:] for known in _KNOWN_FILES if known[0].fullmatch(found.path.name)),
        ("ViT", licence_beside(found.path.parent)),
    )
    return VitFile(state, layout, _HEADS_OF_WIDTH.get(width), licence=licence)


def is_projection(weight: torch.Tensor | None, bias: torch.Tensor | None) -> bool:
    """Whether the head of timm's CLIP is CLIP's projection: that one has no bias, so timm's layer holds zeros, and a
    trained classifier's does not.
    """
    return weight is not None and weight.ndim == 2 and (bias is None or not bias.any())


def _with_registers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with DINOv2's registers, which stand between class token and patches and have no position.

    timm then keeps positions for the patches only.
    """
    if "register_tokens" not in state:
        return state
    state = dict(state)
    state["reg_token"] = state.pop("register_tokens")
    if (
        {"cls_token", "pos_embed"} <= state.keys()
        and state["pos_embed"].ndim == 3
        and state["cls_token"].shape == (1, 1, state["pos_embed"].shape[-1])
    ):
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


_CLIP_NAMES = (
    (r"class_embedding", "cls_token"),
    (r"positional_embedding", "pos_embed"),
    (r"conv1\.", "patch_embed.proj."),
    (r"ln_pre\.", "norm_pre."),
    (r"ln_post\.", "norm."),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
    (r"transformer\.resblocks\.(\d+)\.ls_([12])\.", r"blocks.\1.ls\2."),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.mlp.fc1."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.mlp.fc2."),
)


def _read_clip(found: _Found) -> VitFile:
    tensors = dict(found.inner)
    projection = tensors.pop("proj", None)
    # A projection of another form stays as it is, to be refused and not left out.
    projection = projection.T if projection is not None and projection.ndim == 2 else projection
    state = _renamed(tensors, _CLIP_NAMES)
    width = state[PATCH_WEIGHT].shape[0]
    # OpenAI's own files keep three numbers beside the weights. Files of others with these names may have been trained
    # with either activation.
    of_openai = "input_resolution" in found.whole
    vit = VitFile(
        _with_batch(state),
        "CLIP",
        _clip_heads(width),
        projection,
        _QUICK_GELU if of_openai else None,
        1e-5,
        CLIP_MEAN,
        CLIP_STD,
    )
    vit = replace(vit, licence=_OPENAI_LICENCE if of_openai else licence_beside(found.path.parent) or _CLIP_LICENCE)
    config = _config_beside(found.path, OPEN_CLIP_CONFIG)
    if config is None or of_openai:
        return vit
    model, preprocess = object_in(config, "model_cfg"), object_in(config, "preprocess_cfg")
    mean, std = _three(preprocess.get("mean"), CLIP_MEAN), _three(preprocess.get("std"), CLIP_STD)
    by = "as its config states" if (mean, std) != (CLIP_MEAN, CLIP_STD) else ""
    return replace(
        vit, statistics_by=by, activation=_QUICK_GELU if model.get("quick_gelu") is True else _GELU, mean=mean, std=std
    )


def _clip_heads(width: int) -> int | None:
    return _CLIP_HEADS_OF_WIDTH.get(width, width // 64 if width % 64 == 0 else None)


_HF_CLIP_NAMES = (
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"pre_layrnorm\.", "norm_pre."),
    (r"post_layernorm\.", "norm."),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.", r"blocks.\1.norm\2."),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"blocks.\1.attn.\2."),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
)
_HF_VIT_NAMES = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.register_tokens", "register_tokens"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"layernorm\.", "norm."),
    (r"encoder\.layer\.(\d+)\.norm([12])\.", r"blocks.\1.norm\2."),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.([qkv])[a-z]+\.", r"blocks.\1.attn.\2."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_in\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_out\.", r"blocks.\1.mlp.fc2."),
    (r"encoder\.layer\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
)


def _read_hf_clip(found: _Found) -> VitFile:
    tensors = {
        name: tensor
        for name, tensor in found.inner.items()
        if name != "embeddings.position_ids" and not name.startswith("visual_projection.")
    }
    state = _with_batch(_joined(_renamed(tensors, _HF_CLIP_NAMES)))
    projection = found.whole.get("visual_projection.weight")
    vit = VitFile(state, "CLIP", _clip_heads(state[PATCH_WEIGHT].shape[0]), projection, None, 1e-5, CLIP_MEAN, CLIP_STD)
    # What a Hugging Face config leaves out is its class's default.
    return _as_configured(found.path, vit, ("clip", "clip_vision_model"), heads=12, activation=_QUICK_GELU, eps=1e-5)


def _read_hf_vit(found: _Found) -> VitFile:
    tensors = {
        name: tensor
        for name, tensor in found.inner.items()
        if name != "embeddings.mask_token" and not name.startswith(("pooler.", "classifier."))
    }
    state = _with_registers(_joined(_renamed(tensors, _HF_VIT_NAMES)))
    width = state[PATCH_WEIGHT].shape[0]
    if "blocks.0.ls1.gamma" in state:
        vit = VitFile(state, "DINOv2", width // 64 if width % 64 == 0 else None, licence=_APACHE.format("DINOv2"))
        return _as_configured(
            found.path, vit, ("dinov2", "dinov2_with_registers"), heads=12, activation=_GELU, eps=1e-6
        )
    return _as_configured(
        found.path, VitFile(state, "ViT", _HEADS_OF_WIDTH.get(width)), ("vit",), heads=12, activation=_GELU, eps=1e-12
    )


_HF_PATCHES = "embeddings.patch_embeddings.projection.weight"
_LAYOUTS = (
    _Layout(PATCH_WEIGHT, PATCH_WEIGHT, _PREFIXES, _read_timm),
    _Layout("class_embedding", "conv1.weight", ("visual.", "module.visual.", "model.visual.", ""), _read_clip),
    _Layout(
        "embeddings.class_embedding",
        "embeddings.patch_embedding.weight",
        ("vision_model.", "clip.vision_model.", ""),
        _read_hf_clip,
    ),
    _Layout(_HF_PATCHES, _HF_PATCHES, ("", "vit.", "dinov2.", "dinov2_with_registers."), _read_hf_vit),
)


# ----------------------------------------------------------------------------------------------- names


def _renamed(tensors: dict[str, torch.Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    """Rename each tensor by the first pattern that its name begins with.

    A name that no pattern fits, or whose new name is taken, stays, to be refused later as unexpected.
    """
    new = {
        name: next((re.sub(f"^{old}", put, name) for old, put in names if re.match(old, name)), name)
        for name in tensors
    }
    renamed = {name: tensors[name] for name in tensors if new[name] == name}
    for name, tensor in tensors.items():
        if new[name] != name:
            renamed[name if new[name] in renamed else new[name]] = tensor
    return renamed


def _joined(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Concatenate Hugging Face's query, key and value into one tensor, in this order.

    Unchanged where one is missing or of another shape.
    """
    state = dict(state)
    for name in [name for name in state if re.fullmatch(r"blocks\.\d+\.attn\.q\.(weight|bias)", name)]:
        start, kind = name.removesuffix(name[name.rindex("q.") :]), name.rpartition(".")[2]
        theirs = [f"{start}{letter}.{kind}" for letter in "qkv"]
        parts = [state[part] for part in theirs if part in state]
        if len(parts) == 3 and all(part.shape == parts[0].shape and part.ndim for part in parts):
            for part in theirs:
                del state[part]
            state[f"{start}qkv.{kind}"] = torch.cat(parts)
    return state


def _with_batch(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIP's class token [D] and positions [P, D] -> timm's [1, 1, D] and [1, P, D]."""
    state = dict(state)
    for name, dimensions in (("cls_token", 1), ("pos_embed", 2)):
        if name in state and state[name].ndim == dimensions:
            state[name] = state[name].reshape(*(1,) * (3 - dimensions), *state[name].shape)
    return state


# ---------------------------------------------------------------------------------------- config files


def _as_configured(
    path: Path, vit: VitFile, types: tuple[str, ...], *, heads: int, activation: str, eps: float
) -> VitFile:
    """The ViT with heads, activation, epsilon, statistics and licence from the files of a Hugging Face folder.

    Unchanged where there is no config beside the weights.
    """
    vit = replace(vit, licence=licence_beside(path.parent) or vit.licence)
    config = _config_beside(path, HF_CONFIG)
    if config is None or config.get("model_type") not in types:
        return vit
    vision = object_in(config, "vision_config") if config["model_type"] == "clip" else config
    width, where = vit.state[PATCH_WEIGHT].shape[0], path.parent / HF_CONFIG
    if vision.get("hidden_size", 768) != width:
        raise UserError(
            f"{where}: hidden_size is {str(vision.get('hidden_size', 768))[:40]}, {path.name} holds a ViT "
            f"of width {width}; put the file beside its own config"
        )
    heads, activation, eps = (
        vision.get("num_attention_heads", heads),
        vision.get("hidden_act", activation),
        vision.get("layer_norm_eps", eps),
    )
    if type(heads) is not int or heads < 1 or width % heads:
        raise UserError(
            f"{where}: num_attention_heads is {str(heads)[:40]}, the width is {width}; fetch the config again"
        )
    if activation not in (_GELU, _QUICK_GELU):
        raise UserError(
            f"{where}: hidden_act is {str(activation)[:40]}, known are {_GELU} and {_QUICK_GELU}; give another network"
        )
    if not isinstance(eps, (int, float)) or not 0 <= eps < 1:
        raise UserError(f"{where}: layer_norm_eps is {str(eps)[:40]}; fetch the config again")
    preprocess = _config_beside(path, "preprocessor_config.json") or {}
    mean, std = _three(preprocess.get("image_mean"), vit.mean), _three(preprocess.get("image_std"), vit.std)
    stated = {"image_mean", "image_std"} <= preprocess.keys()
    by = "as its preprocessor_config.json states" if stated else vit.statistics_by
    return replace(vit, heads=heads, activation=activation, norm_eps=float(eps), mean=mean, std=std, statistics_by=by)


def _config_beside(path: Path, name: str) -> dict | None:
    beside = path.parent / name
    if not beside.is_file():
        return None
    try:
        config = read_json(beside)
    except (ValueError, OSError) as error:
        raise UserError(f"{beside}: not readable as JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{beside}: no JSON object; fetch it again")
    return config


def object_in(config: dict, name: str) -> dict:
    """The object under a name of a config; {} if there is none."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _three(value: object, default: tuple[float, ...]) -> tuple[float, ...]:
    if (
        isinstance(value, list)
        and len(value) == 3
        and all(
            isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number <= 1 for number in value
        )
    ):
        return tuple(float(number) for number in value)
    return default
