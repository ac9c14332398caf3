"""Frozen ViTs that judge or teach: timm's, MoCo v3, DINO, DINOv2, CLIP, our own releases.

A file is read strictly: a tensor that is missing, left over or of another shape is an error, because a judge with a few
random blocks still gives a loss that falls. `vit_layouts` knows the layouts.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp, QuickGELU, SwiGLUPacked
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from peco_ds.errors import UserError
from peco_ds.models.feature_nets import FETCH, FeatureNet
from peco_ds.models.image_statistics import statistics_of_weights
from peco_ds.models.timm_weights import (
    MAKE_AGAIN,
    WEIGHTS,
    check_architecture,
    check_name,
    check_tensors,
    created,
    downloaded,
    licence_of_name,
    read_timm_config,
    refuse_folder,
    statistics,
)
from peco_ds.models.vit import mlp_ratio_of
from peco_ds.models.vit_layouts import (
    HF_CONFIG,
    OPEN_CLIP_CONFIG,
    PATCH_WEIGHT,
    VitFile,
    is_projection,
    licence_beside,
    object_in,
    read_vit_file,
    statistics_of_release,
)
from peco_ds.models.weight_files import check_finite
from peco_ds.schema import sha256_of_file
from peco_ds.user_paths import released_path


class VitFeatureNet(FeatureNet):
    """A frozen ViT that gives the patch tokens after chosen blocks, or its final ones; blocks of it are stages.

    Args:
        projection: float [T, D] that CLIP puts behind its final norm, or None.
        others: of `FeatureNet`.
    """

    def __init__(self, net: VisionTransformer | Beit, *, projection: torch.Tensor | None = None, **others) -> None:
        super().__init__(
            net,
            image_px=net.patch_embed.img_size[0],
            grid=net.patch_embed.grid_size[0],
            depth=len(net.blocks),
            target_width=net.embed_dim if projection is None else projection.shape[0],
            **others,
        )
        self.register_buffer(
            "projection", None if projection is None else projection.detach().float().contiguous(), persistent=False
        )

    def after_blocks(self, images_norm: torch.Tensor, blocks: list[int]) -> list[torch.Tensor]:
        """Patch tokens without class token and without the final norm."""
        return self.net.forward_intermediates(
            images_norm,
            indices=[number - 1 for number in blocks],
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )

    def final(self, images_norm: torch.Tensor) -> torch.Tensor:
        """After the final norm, and after CLIP's projection where the weights have one; no class token, no registers.

        Source: BEiT v2's teachers (arXiv 2208.06366, section 2.2; released `modeling_vqkd.py`): CLIP's final norm and
            projection on every patch.
        """
        tokens = self.net.forward_features(images_norm)[:, self.net.num_prefix_tokens :]
        # With mean pooling, timm keeps the final norm behind the pooling.
        if isinstance(self.net.norm, nn.Identity):
            tokens = self.net.fc_norm(tokens)
        return tokens if self.projection is None else F.linear(tokens, self.projection.to(tokens.dtype))


class _Loaded(NamedTuple):
    net: VisionTransformer | Beit
    mean: tuple[float, ...]
    std: tuple[float, ...]
    description: str
    projection: torch.Tensor | None
    licence: str
    # What tells mean and std.
    statistics: str


def load_vit(weights: str, architecture: str = "auto", *, image_px: int = 0, section: str = "perceptual") -> FeatureNet:
    """Read a frozen ViT.

    Args:
        weights: a file in a layout of `vit_layouts` (.pth, .pt, .pth.tar, .bin, .safetensors: MoCo v3, DINO, DINOv2,
            CLIP of OpenAI, open_clip and Hugging Face, any timm ViT), a folder of timm's, Hugging Face's or open_clip's
            with its config, or, where no such path exists, the name of a timm model, which is downloaded.
        architecture: timm name; "auto" reads width, depth, patch size and image size off the file. Folders and timm
            names bring theirs. CLIP weights that stand without a config and are not OpenAI's own file need it, for it
            tells GELU from QuickGELU.
        image_px, section: as `feature_nets.load_feature_net`.
    Raises: UserError if the file is missing or unreadable, does not hold a ViT, does not fit the architecture, misses a
        tensor or has one left over, if one is not finite, if its activation cannot be told, or if a download fails.
    """
    path = released_path(weights)
    if path.is_dir():
        loaded = _from_folder(path, architecture, section)
    elif path.is_file():
        loaded = _from_file(path, architecture, section)
    else:
        loaded = _from_name(weights, architecture, section)
    check_finite({**loaded.net.state_dict(), "projection": loaded.projection}, loaded.description)
    if image_px:
        patch = loaded.net.patch_embed.patch_size[0]
        if image_px < 0 or image_px % patch:
            raise UserError(
                f"{section}.image_px {image_px} is not a multiple of the patch size {patch} of {loaded.description}"
            )
        loaded.net.set_input_size(img_size=(image_px, image_px))
    return VitFeatureNet(
        loaded.net,
        mean=loaded.mean,
        std=loaded.std,
        description=loaded.description,
        projection=loaded.projection,
        licence=loaded.licence,
        statistics=loaded.statistics,
    )


# --------------------------------------------------------------------------------------- three sources

_WEIGHTS_OF = {
    HF_CONFIG: ("model.safetensors", "pytorch_model.bin"),
    OPEN_CLIP_CONFIG: ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}


def _from_folder(folder: Path, architecture: str, section: str) -> _Loaded:
    config = read_timm_config(folder)
    if config is None:
        found = next(
            (
                folder / name
                for config, names in _WEIGHTS_OF.items()
                if (folder / config).is_file()
                for name in names
                if (folder / name).is_file()
            ),
            None,
        )
        if found is None:
            raise refuse_folder(folder)
        return _from_file(found, architecture, section)
    name, tag = config.get("architecture"), object_in(config, "pretrained_cfg").get("tag")
    net = created(
        f"local-dir:{folder}",
        f"{folder}: timm cannot load it ({{}}); {MAKE_AGAIN}",
        pretrained=True,
        **_activation(f"{name}.{tag}"),
    )
    name = _checked_name(net, str(folder))
    if architecture not in ("auto", name):
        raise UserError(f"{folder}: holds {name}, but {section}.architecture is {architecture}; use auto")
    sha = sha256_of_file(folder / WEIGHTS)[:12]
    licence = licence_beside(folder) or str(object_in(config, "pretrained_cfg").get("license") or "")[:80]
    description = f"{name} ({folder.name}/{WEIGHTS}, sha256 {sha})"
    told = statistics_of_release(folder, config, description)
    return _Loaded(net, told.mean, told.std, description, _projection_of(net), licence, told.words)


def _from_name(name: str, architecture: str, section: str) -> _Loaded:
    check_name(name, architecture, section)
    net = downloaded(name, section, **_activation(name))
    _checked_name(net, name)
    return _Loaded(net, *statistics(net), f"timm {name}", _projection_of(net), licence_of_name(net), "")


def _activation(name: str) -> dict[str, str]:
    """QuickGELU where timm notes that the weights of this name were trained with it, whatever the model's own."""
    try:
        notes = getattr(timm.get_pretrained_cfg(name), "notes", None) or ()
    except RuntimeError:  # a tag of somebody's own
        notes = ()
    return {"act_layer": "quick_gelu"} if any("natively QuickGELU" in note for note in notes) else {}


def _from_file(path: Path, architecture: str, section: str) -> _Loaded:
    try:
        vit = read_vit_file(path)
    except UserError as error:
        raise UserError(f"{error}, or {FETCH[section]}") from None
    state, heads = vit.state, vit.heads
    width, patch_px = state[PATCH_WEIGHT].shape[0], state[PATCH_WEIGHT].shape[-1]
    if architecture == "auto":
        net = _build_from_shapes(path, vit, section)
        name = (
            f"{vit.layout} {width} x {len(net.blocks)} blocks x {heads} heads, patch {patch_px}, "
            f"{net.patch_embed.img_size[0]} px"
        )
        name += ", QuickGELU" if vit.activation == "quick_gelu" else ""
    else:
        check_architecture(architecture, section)
        net = timm.create_model(architecture, pretrained=False, num_classes=0)
        name = _checked_name(net, architecture)
        if net.embed_dim != width:
            raise UserError(
                f"{path}: holds a ViT of width {width}, but {architecture} has width {net.embed_dim}; use "
                f"{section}.architecture=auto or another file"
            )
        quick = isinstance(net.blocks[0].mlp.act, QuickGELU) if isinstance(net, VisionTransformer) else False
        if vit.layout == "CLIP" and vit.activation is not None and quick != (vit.activation == "quick_gelu"):
            raise UserError(
                f"{path}: was trained with {vit.activation}, {architecture} computes "
                f"{'quick_gelu' if quick else 'gelu'}; use {section}.architecture=auto"
            )
        if vit.fixed_heads:
            # timm's names for this width may mean another number of heads, which no shape would betray.
            net = timm.create_model(architecture, pretrained=False, num_classes=0, num_heads=heads)
    check_tensors(net.state_dict(), state, str(path), name, section)
    net.load_state_dict(state)
    projection = vit.projection
    if projection is not None and (
        projection.ndim != 2
        or projection.shape[1] != width
        or not projection.numel()
        or not projection.is_floating_point()
    ):
        raise UserError(
            f"{path}: CLIP's projection has shape {tuple(projection.shape)}, the patch tokens are {width} "
            "wide; fetch the file again"
        )
    told = statistics_of_weights(
        str(path),
        remedy=f"name a timm model with its tag in {section}.architecture, or give a release folder",
        stated=(vit.mean, vit.std) if vit.statistics_by else None,
        stated_by=vit.statistics_by,
        arguments=vit.arguments,
        path=path,
        architecture="" if architecture == "auto" else architecture,
    )
    description = f"{name} ({path.name}, sha256 {sha256_of_file(path)[:12]})"
    return _Loaded(net, told.mean, told.std, description, projection, vit.licence, told.words)


# -------------------------------------------------------------------------------- building and filling


def _build_from_shapes(path: Path, vit: VitFile, section: str) -> VisionTransformer:
    advice = f"name the model in {section}.architecture"
    state, heads = vit.state, vit.heads
    width, _, patch_px, _ = state[PATCH_WEIGHT].shape
    if heads is None:
        raise UserError(f"{path}: a ViT of width {width}, whose number of heads no shape tells; {advice}")
    if "blocks.0.attn.q_bias" in state:
        raise UserError(
            f"{path}: weights of a BEiT; give its release folder (config.json and model.safetensors), or {advice}"
        )
    if not {"pos_embed", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"} <= state.keys():
        raise UserError(
            f"{path}: no plain ViT (pos_embed, blocks.0.mlp.fc1.weight or blocks.0.mlp.fc2.weight is missing); {advice}"
        )
    if vit.activation is None:
        raise UserError(
            f"{path}: CLIP weights, which may have been trained with GELU (LAION-2B, DataComp: "
            "vit_base_patch16_clip_224) or QuickGELU (OpenAI, LAION-400M, DFN, "
            f"MetaCLIP: vit_base_patch16_clip_quickgelu_224), and nothing in the file tells; {advice}, or "
            "put its library's config file beside it"
        )
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    depth = 1 + max(int(number) for number in blocks if re.fullmatch("[0-9]{1,6}", number))
    # This check spares building a model of so many blocks only to find the first missing tensor.
    if depth > len(state):
        raise UserError(f"{path}: holds block {depth - 1}, but {len(state)} tensors in all; fetch the file again")
    class_tokens = 1 if "cls_token" in state else 0
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    positions = state["pos_embed"].shape[1]
    # With registers timm knows both tables with a place for every token and tables for patches alone; DINOv2 and timm's
    # own have the latter.
    prefixes = (0, class_tokens + registers) if registers else (class_tokens, 0)
    sides = {prefix: round((positions - prefix) ** 0.5) for prefix in prefixes if positions > prefix}
    prefix = next((prefix for prefix, side in sides.items() if side * side == positions - prefix), None)
    if prefix is None:
        raise UserError(f"{path}: pos_embed has {positions} places, no square grid of patches; {advice}")
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    # DINOv2's giant: two halves, one of which opens the other
    gated = hidden == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
    return VisionTransformer(
        img_size=sides[prefix] * patch_px,
        patch_size=patch_px,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio_of(width, hidden),
        mlp_layer=SwiGLUPacked if gated else Mlp,
        act_layer="silu" if gated else vit.activation,
        norm_layer=partial(LayerNorm, eps=vit.norm_eps),
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
        class_token=class_tokens == 1,
        reg_tokens=registers,
        no_embed_class=prefix == 0 and class_tokens + registers > 0,
        pre_norm="norm_pre.weight" in state,
        global_pool="avg" if "fc_norm.weight" in state else "token",
        num_classes=0,
    )


def _projection_of(net: VisionTransformer | Beit) -> torch.Tensor | None:
    """CLIP's projection, which timm's releases keep as the head."""
    if isinstance(net, Beit) or isinstance(net.norm_pre, nn.Identity) or not isinstance(net.head, nn.Linear):
        return None
    return net.head.weight if is_projection(net.head.weight, net.head.bias) else None


def _checked_name(net: nn.Module, source: str) -> str:
    if not isinstance(net, (VisionTransformer, Beit)):
        raise UserError(
            f"{source}: a {type(net).__name__}; give a plain ViT, a BEiT or a convolutional network of timm"
        )
    return net.pretrained_cfg["architecture"]
