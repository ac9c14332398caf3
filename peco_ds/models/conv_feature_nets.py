"""Frozen convolutional networks that judge: those whose maps timm gives (`features_only`), and files of ResNets and
VGGs under torchvision's names, supervised or self-supervised.

Stages are timm's, numbered from 1:

- ResNet: 1 behind the first activation, before the pooling; 2 to 5 behind layer1 to layer4.
- VGG: 1 to 5 behind the last activation before each of the five poolings; of VGG-16 these are relu1_2, relu2_2,
  relu3_3, relu4_3 and relu5_3. timm's sixth, the last pooling, adds no layer and is left out.
- EfficientNet, MobileNet: 1 to 5 behind the last block of each size of the map. ConvNeXt: 1 to 4 behind its stages.

A file is read as strictly as a ViT's. Layers behind the last stage (the classifier, a projection head) are not read and
may be absent, also from a release folder. Batch norm always works with its running statistics.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.layers import Format
from timm.models import FeatureListNet
from torch import nn

from peco_ds.errors import UserError
from peco_ds.kinds.conv import PREFIXES, ResNet, Vgg, network_of
from peco_ds.models.feature_nets import FETCH, FeatureNet
from peco_ds.models.image_statistics import IMAGENET, ImageStatistics, statistics_of_weights
from peco_ds.models.timm_weights import (
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
from peco_ds.models.vit_layouts import licence_beside, object_in, statistics_of_release
from peco_ds.models.weight_files import check_finite, read_tensor_file, tensors_of_checkpoint
from peco_ds.schema import sha256_of_file
from peco_ds.user_paths import released_path

# Size of ImageNet's crops, for files that no config tells it of.
_IMAGE_PX = 224
# Batch norm's count of batches, which old files have not and nothing needs.
_COUNTER = "num_batches_tracked"
# Layers behind the features in training scripts' checkpoints: classifier, projection, prediction, prototypes.
_HEADS = ("fc.", "head.", "classifier.", "projection_head.", "prototypes.", "projector.", "predictor.")


class ConvFeatureNet(FeatureNet):
    """A frozen convolutional network that gives its maps at the end of chosen stages.

    Args:
        net: of timm's `features_only`.
        image_px, others: of `FeatureNet`.
    """

    stage_name, judged_whole = "stages", True

    def __init__(self, net: nn.Module, *, image_px: int, **others) -> None:
        strides = net.feature_info.reduction()
        super().__init__(net, image_px=image_px, grid=-(-image_px // strides[-1]), depth=len(strides), **others)

    def after_blocks(self, images_norm: torch.Tensor, blocks: list[int]) -> list[torch.Tensor]:
        """Maps [B, C, H, W] as [B, H * W, C]."""
        if images_norm.is_cuda:
            # Tensor cores take channels-last alone; otherwise every convolution changes the layout there and back.
            images_norm = images_norm.contiguous(memory_format=torch.channels_last)
        maps = self._maps(images_norm, blocks[-1])
        return [maps[number - 1].flatten(2).transpose(1, 2) for number in blocks]

    def _maps(self, images_norm: torch.Tensor, last: int) -> list[torch.Tensor]:
        if not isinstance(self.net, FeatureListNet):
            return self.net(images_norm)
        found: list[torch.Tensor] = []
        for name, module in self.net.items():
            images_norm = module(images_norm)
            if name in self.net.return_layers:
                found.append(images_norm)
                if len(found) == last:
                    break
        return found


class _Found(NamedTuple):
    """Weights, and what timm builds their network from.

    Args:
        source, options: of `timm.create_model`.
        state: may hold layers behind the features.
        where: of messages.
        name: of the network.
        statistics: of its input; None: those of timm's config, of a network that timm downloads.
        image_px: 0: that of timm's config.
    """

    source: str
    options: dict
    state: dict[str, torch.Tensor]
    where: str
    name: str
    description: str
    licence: str
    statistics: ImageStatistics | None = None
    image_px: int = 0


def load_conv(
    weights: str, architecture: str = "auto", *, image_px: int = 0, section: str = "perceptual"
) -> FeatureNet:
    """Read a frozen convolutional network.

    Args:
        weights: a file (.pth, .pt, .pth.tar, .bin, .safetensors) of a ResNet or VGG under torchvision's names, as
            torchvision, timm, MoCo, MoCo v3, DINO, SwAV and others release them; a file of any network of timm's whose
            name is in `architecture`; a release folder of timm's; or, where no such path exists, the name of a timm
            model, which is downloaded.
        architecture: timm name; "auto" reads depth and width off the file.
        image_px, section: as `feature_nets.load_feature_net`.
    Raises: UserError if the file is missing or unreadable, does not hold such a network, misses a tensor of the stages,
        has one left over or one that is not finite, or if a download fails.
    """
    path = released_path(weights)
    if path.is_dir():
        found = _from_folder(path, architecture, section)
    elif path.is_file():
        found = _from_file(path, architecture, section)
    else:
        found = _from_name(weights, architecture, section)
    net = _filled(found, section)
    default_px = found.image_px or net.pretrained_cfg["input_size"][-1]
    smallest = net.feature_info.reduction()[-1]
    if image_px and image_px < smallest:
        raise UserError(f"{section}.image_px {image_px}: {found.description} needs {smallest} or more; 0: {default_px}")
    if image_px not in (0, default_px) and net.pretrained_cfg.get("fixed_input_size"):
        raise UserError(f"{section}.image_px {image_px}: {found.description} takes {default_px} alone; set it to 0")
    mean, std = found.statistics[:2] if found.statistics else statistics(net)
    return ConvFeatureNet(
        net,
        image_px=image_px or default_px,
        mean=mean,
        std=std,
        description=found.description,
        licence=found.licence,
        statistics=found.statistics.words if found.statistics else "",
    )


# ----------------------------------------------------------------------------------------- three sources


def _from_folder(folder: Path, architecture: str, section: str) -> _Found:
    config = read_timm_config(folder)
    if config is None:
        raise refuse_folder(folder)
    name = str(config.get("architecture"))
    if architecture not in ("auto", name):
        raise UserError(f"{folder}: holds {name}, but {section}.architecture is {architecture}; use auto")
    if not timm.is_model(name.partition(".")[0]):
        use = "it is for evaluate.py --lpips, give" if name == "alexnet" else "correct its config.json, or give"
        raise UserError(f"{folder}: holds a network {name[:80]}, which timm has not; {use} another network")
    path = folder / WEIGHTS
    licence = licence_beside(folder) or str(object_in(config, "pretrained_cfg").get("license") or "")[:80]
    description = f"{name} ({folder.name}/{WEIGHTS}, sha256 {sha256_of_file(path)[:12]})"
    tensors = read_tensor_file(path)
    told = statistics_of_release(folder, config, description)
    return _Found(f"local-dir:{folder}", {}, tensors, str(folder), name, description, licence, told)


def _from_name(name: str, architecture: str, section: str) -> _Found:
    check_name(name, architecture, section)
    net = downloaded(name, section)
    return _Found(name, {}, net.state_dict(), name, name, f"timm {name}", licence_of_name(net))


def _from_file(path: Path, architecture: str, section: str) -> _Found:
    try:
        content = read_tensor_file(path)
    except UserError as error:
        raise UserError(f"{error}, or {FETCH[section]}") from None
    tensors = tensors_of_checkpoint(content)
    described = f"({path.name}, sha256 {sha256_of_file(path)[:12]})"
    if architecture != "auto":
        check_architecture(architecture, section)
        state = _inner(tensors, _prefix_of(path, tensors, architecture))
        licence = _release_of(path, content, tensors)[1]
        title = f"{architecture} {described}"
        trained_on = _statistics_of_file(path, content, section, architecture=architecture)
        return _Found(architecture, {}, state, str(path), architecture, title, licence, trained_on)
    told = network_of(tensors)
    if told is None:
        raise UserError(
            f"{path}: holds neither a ResNet nor a VGG of 11, 13, 16 or 19 layers under torchvision's names among its "
            f"{len(tensors)} tensors; name the architecture in {section}.architecture, or give another file"
        )
    prefix, shape = told
    state, (trained_by, licence) = _inner(tensors, prefix), _release_of(path, content, tensors)
    if isinstance(shape, ResNet):
        source, options, shape = _as_timm_resnet(path, state, shape)
    else:
        source, options = f"vgg{sum(shape.convolutions) + 3}{'_bn' if shape.norm else ''}", {}
    title = f"{trained_by} {shape.title}".strip()
    known = None
    if isinstance(shape, Vgg) and "amdegroot" in path.name:
        known = ("Caffe's VGG16", _CAFFE)
    elif trained_by:
        known = (f"{trained_by}'s release", IMAGENET)
    trained_on = _statistics_of_file(path, content, section, known=known)
    return _Found(source, options, state, str(path), title, f"{title} {described}", licence, trained_on, _IMAGE_PX)


def _statistics_of_file(path: Path, content: dict, section: str, **told) -> ImageStatistics:
    remedy = f"name a timm model with its tag in {section}.architecture, or give a release folder"
    return statistics_of_weights(str(path), remedy=remedy, arguments=content.get("args"), path=path, **told)


def _prefix_of(path: Path, tensors: dict[str, torch.Tensor], architecture: str) -> str:
    first = next(iter(_whole(architecture, {}).state_dict()))
    found = next((prefix for prefix in PREFIXES if prefix + first in tensors), None)
    if found is None:
        raise UserError(
            f"{path}: holds no {architecture} (no tensor named ...{first} among {len(tensors)}); correct the "
            "architecture, or give another file"
        )
    return found


def _inner(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _as_timm_resnet(path: Path, state: dict[str, torch.Tensor], named: ResNet) -> tuple[str, dict, ResNet]:
    """Name and options by which timm builds the ResNet of a file, and its shape with groups and width."""
    # This check spares building a model of so many blocks only to find the first missing tensor.
    if sum(named.depths) > len(state):
        raise UserError(f"{path}: holds {sum(named.depths)} blocks, but {len(state)} tensors; fetch the file again")
    options: dict = {"layers": list(named.depths)}
    if not named.bottleneck:
        return "resnet18", options, named
    middle = state.get("layer1.0.conv2.weight")
    if middle is None or middle.ndim != 4 or not middle.numel() or middle.shape[0] % middle.shape[1]:
        found = "missing" if middle is None else f"of shape {tuple(middle.shape)}"
        raise UserError(f"{path}: tensor layer1.0.conv2.weight is {found}, no ResNet's; fetch the file again")
    groups, width = middle.shape[0] // middle.shape[1], middle.shape[1]
    shape = ResNet(True, named.depths, groups, width)
    return "resnet50", options | {"cardinality": groups, "base_width": width}, shape


# -------------------------------------------------------------------------------- who released the weights

_CAFFE = ((0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255))
_NON_COMMERCIAL, _APACHE, _BSD = "CC BY-NC 4.0", "Apache-2.0", "BSD-3-Clause"
# What a file's tensors or their prefix show.
_BY_TENSOR = (
    (re.compile(r"(module\.)?base_encoder\."), "MoCo v3", _NON_COMMERCIAL),
    (re.compile(r"(module\.)?encoder_q\.fc\.0\."), "MoCo v2", _NON_COMMERCIAL),
    (re.compile(r"(module\.)?encoder_q\."), "MoCo", _NON_COMMERCIAL),
)
# Where the tensors are everyone's, only what the file is called tells.
_BY_FILE = (
    (re.compile(r"dino_resnet50_"), "DINO", _APACHE),
    (re.compile(r"(swav|deepclusterv2|selav2)_"), "SwAV", _NON_COMMERCIAL),
    (re.compile(r"(wide_)?(resnet|resnext|vgg)[\w-]*-[0-9a-f]{8}\.pth"), "torchvision", _BSD),
)


def _release_of(path: Path, content: dict, tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    """Who released a file, and its licence; "" where neither tensors nor names tell."""
    if "dino_loss" in content:
        return "DINO", f"{_APACHE} (DINO's release)"
    for pattern, who, licence in _BY_TENSOR:
        if any(pattern.match(name) for name in tensors):
            return who, f"{licence} ({who}'s release)"
    for pattern, who, licence in _BY_FILE:
        if pattern.match(path.name):
            return who, f"{licence} ({who}'s release)"
    return "", licence_beside(path.parent)


# -------------------------------------------------------------------------------- building and filling


def _whole(source: str, options: dict) -> nn.Module:
    """The whole network without memory behind its tensors."""
    with torch.device("meta"):
        return created(source, f"{source}: timm cannot build it ({{}}); correct its config or name", **options)


def _filled(found: _Found, section: str) -> nn.Module:
    """timm's network of features with the weights."""
    whole = _whole(found.source, found.options).state_dict()
    # timm's last stage of a VGG is its last pooling.
    stages = {"out_indices": (0, 1, 2, 3, 4)} if found.name.startswith("vgg") or found.source.startswith("vgg") else {}
    refusal = f"{found.where}: timm gives no features of {found.name} ({{}}); give a convolutional network"
    with torch.device("meta"):
        net = created(found.source, refusal, features_only=True, **found.options, **stages)
    if getattr(net, "output_fmt", Format.NCHW) != Format.NCHW or len(set(net.feature_info.reduction())) < 2:
        raise UserError(f"{found.where}: {found.name} gives no maps of a convolutional network; give another network")
    wanted = net.state_dict()
    names = {name: _name_in_features(name, wanted) for name in whole}
    expected = {name: whole[name] for name, ours in names.items() if ours in wanted}
    assert len(expected) == len(wanted), found.name
    state = {
        name: tensor
        for name, tensor in found.state.items()
        if name in expected or not (name in whole or name.startswith(_HEADS))
    }
    check_tensors(expected, state, found.where, found.name, section, may_lack=_COUNTER)
    check_finite(state, found.description)
    if {name for name, _ in net.named_buffers()} <= wanted.keys():
        # Without random weights, which a VGG's classifier needs seconds for.
        net.to_empty(device="cpu")
    else:
        net = created(found.source, refusal, features_only=True, **found.options, **stages)
    counters = {name: torch.tensor(0) for name in wanted if name.endswith(_COUNTER)}
    net.load_state_dict(counters | {names[name]: tensor for name, tensor in state.items()})
    return net


def _name_in_features(name: str, wanted: dict[str, torch.Tensor]) -> str:
    """A tensor's name in timm's network of features, which puts the parts of a sequence side by side."""
    return next((own for own in (name, name.replace(".", "_", 1), f"model.{name}") if own in wanted), name)
