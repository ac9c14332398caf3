"""Frozen convolutional networks that judge, as plans see them; read by models/conv_feature_nets.py.

What is told here without torch: whether weights are a convolutional network's, which ResNet or VGG the names in a file
are those of, and what a network costs. ResNets and VGGs are counted layer by layer, a few others from a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from peco_ds.costs import IMAGE_CHANNELS, Cost, FrozenCost, FrozenStage
from peco_ds.registry import FeatureNetFamily, later
from peco_ds.schema import read_json
from peco_ds.tensor_names import tensor_names
from peco_ds.user_paths import released_path

CONFIG = "config.json"
# Beginnings of the names under which training scripts keep a network. The first that fits is taken: an encoder before
# the average of its weights in MoCo's files.
PREFIXES = (
    *("module.base_encoder.", "base_encoder.", "module.encoder_q.", "encoder_q.", "module.backbone.", "backbone."),
    *("module.encoder.", "encoder.", "module.", ""),
)
RESNET_MARK, VGG_MARK = "layer1.0.conv1.weight", "features.0.weight"
_BASIC, _BOTTLENECK = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}, {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_VGGS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_VGG_WIDTHS = (64, 128, 256, 512, 512)
_INDEX_BYTES = 8


@dataclass(frozen=True)
class ResNet:
    """A ResNet of 64 channels at its first stage.

    Args:
        depths: residual blocks of each of the four stages.
        width: channels of a group in the middle of a bottleneck of the first stage.
    """

    bottleneck: bool
    depths: tuple[int, ...]
    groups: int = 1
    width: int = 64

    @property
    def title(self) -> str:
        wide = "" if self.groups * self.width == 64 else f", {self.groups} x {self.width} wide"
        return f"ResNet-{sum(self.depths) * (3 if self.bottleneck else 2) + 2}{wide}"


@dataclass(frozen=True)
class Vgg:
    """A VGG.

    Args:
        convolutions: of each of the five stages.
        norm: a batch norm follows each of them.
    """

    convolutions: tuple[int, ...]
    norm: bool

    @property
    def title(self) -> str:
        return f"VGG-{sum(self.convolutions) + 3}{' with batch norm' if self.norm else ''}"


def network_of(names: Iterable[str]) -> tuple[str, ResNet | Vgg] | None:
    """Prefix and shape of the ResNet or VGG that tensors of these names are; None: they are neither's.

    Names tell neither groups nor width of a ResNet; the plain ones are given.
    """
    found = set(names)
    for prefix in PREFIXES:
        own = {name.removeprefix(prefix) for name in found if name.startswith(prefix)}
        if RESNET_MARK in own:
            depths = tuple(_count(own, rf"layer{stage}\.(\d{{1,4}})\.conv1\.weight") for stage in (1, 2, 3, 4))
            return prefix, ResNet("layer1.0.conv3.weight" in own, depths)
        if VGG_MARK in own:
            norms = {name.split(".")[1] for name in own if re.fullmatch(r"features\.\d{1,4}\.running_mean", name)}
            weights = {name.split(".")[1] for name in own if re.fullmatch(r"features\.\d{1,4}\.weight", name)}
            layers = len(weights - norms) + 3
            return (prefix, Vgg(_VGGS[layers], bool(norms))) if layers in _VGGS else None
    return None


def _count(names: set[str], pattern: str) -> int:
    return 1 + max((int(found[1]) for found in (re.fullmatch(pattern, name) for name in names) if found), default=-1)


# -------------------------------------------------------------------------------------- recognition

# timm's names. Plain ViTs, and what is built of them, stay with the ViTs.
_TRANSFORMER = re.compile(r"(test_)?(vit|deit3?|beit\w*|flexivit|eva\w*|aimv2|samvit|naflexvit)_")
_CONVOLUTIONAL = re.compile(
    r"net|next|vgg|resne|res2ne|dla\d|dpn\d|xception|inception|hardcorenas|selecsls|mobileone|darknet|tresnet"
)


def named_architecture(weights: str, architecture: str) -> str:
    """timm's name of the network, as settings or a release folder tell it; "" where a file has to tell, or nothing
    does.
    """
    if architecture != "auto":
        return architecture
    path = released_path(weights)
    try:
        if path.is_dir():
            config = read_json(path / CONFIG)
            name = config.get("architecture") if isinstance(config, dict) else None
            return name if isinstance(name, str) else ""
        return "" if path.is_file() or "/" in weights else weights
    except (OSError, ValueError):
        return ""


def _recognises(weights: str, architecture: str) -> bool:
    name = named_architecture(weights, architecture)
    if name:
        return _CONVOLUTIONAL.search(name) is not None and _TRANSFORMER.match(name) is None
    return network_of(tensor_names(released_path(weights))) is not None


# --------------------------------------------------------------------------------------------- cost


class _Measured(NamedTuple):
    """Of one stage, for one image of `MEASURED_PX`, as `FrozenStage`."""

    parameters: int
    macs: int
    saved: int
    features: int
    convolutions: int


# Counted from timm's networks; a test counts them again.
MEASURED_PX = 224
MEASURED = {
    "tf_efficientnet_lite0": (
        _Measured(1824, 20_873_216, 2_761_187, 200_704, 3),
        _Measured(13_968, 54_942_720, 7_674_496, 75_264, 6),
        _Measured(39_712, 37_933_056, 3_043_120, 31_360, 6),
        _Measured(645_264, 129_519_936, 4_241_712, 21_952, 18),
        _Measured(2_258_080, 120_568_224, 2_047_360, 15_680, 15),
    ),
    "efficientnet_b0": (
        _Measured(2376, 20_873_728, 3_161_328, 200_704, 5),
        _Measured(16_714, 54_945_216, 8_406_036, 75_264, 10),
        _Measured(46_640, 37_939_584, 3_295_296, 31_360, 10),
        _Measured(786_078, 129_657_600, 4_827_036, 21_952, 30),
        _Measured(2_743_580, 121_048_224, 2_254_584, 15_680, 25),
    ),
    "mobilenetv2_100": (
        _Measured(1824, 20_873_216, 2_759_840, 200_704, 3),
        _Measured(13_968, 54_942_720, 7_652_896, 75_264, 6),
        _Measured(39_696, 37_443_840, 3_702_784, 25_088, 9),
        _Measured(487_040, 96_601_344, 3_957_696, 18_816, 21),
        _Measured(1_269_184, 69_562_752, 1_367_040, 15_680, 12),
    ),
    "mobilenetv3_large_100": (
        _Measured(928, 10_436_608, 1_354_848, 200_704, 3),
        _Measured(7880, 32_338_432, 3_337_344, 75_264, 6),
        _Measured(52_312, 28_863_744, 1_796_304, 31_360, 15),
        _Measured(731_368, 80_467_360, 3_189_440, 21_952, 22),
        _Measured(2_179_464, 61_974_816, 1_370_152, 47_040, 16),
    ),
}


def _cost(weights: str, architecture: str, image_px: int) -> FrozenCost | None:
    name, image_px = named_architecture(weights, architecture).partition(".")[0], image_px or MEASURED_PX
    shape = _shape_of(name) if name else None
    if not name:
        told = network_of(tensor_names(released_path(weights)))
        shape = told[1] if told else None
    if isinstance(shape, ResNet):
        return _frozen(shape.title, image_px, _resnet_stages(shape, image_px))
    if isinstance(shape, Vgg):
        return _frozen(shape.title, image_px, _vgg_stages(shape, image_px))
    if name not in MEASURED:
        return None
    area = (image_px / MEASURED_PX) ** 2
    return _frozen(name, image_px, [_scaled(stage, area) for stage in MEASURED[name]])


def _frozen(name: str, image_px: int, stages: list[FrozenStage]) -> FrozenCost:
    parameters = sum(stage.layers.parameters for stage in stages if isinstance(stage.layers, Cost))
    return FrozenCost(name, parameters, image_px, 0, tuple(stages))


def _scaled(stage: _Measured, area: float) -> FrozenStage:
    saved = round(area * stage.saved)
    layers = Cost(stage.parameters, round(area * stage.macs), saved, convolutions=stage.convolutions)
    return FrozenStage(layers, saved, saved, round(area * stage.features))


def _shape_of(name: str) -> ResNet | Vgg | None:
    """The shape that timm's name of a ResNet or VGG stands for; None for another network."""
    found = re.fullmatch(r"(tv_|wide_)?(resnet|resnext)(\d+)(?:_(2|\d+x\d+d))?", name)
    if found:
        layers, middle = int(found[3]), found[4] or ""
        depths = _BASIC.get(layers) or _BOTTLENECK.get(layers)
        plain = ResNet(layers in _BOTTLENECK, depths) if depths else None
        if plain is None or (found[2] == "resnet" and found[1] != "wide_" and not middle):
            return plain
        if found[1] == "wide_" and middle == "2" and plain.bottleneck:
            return replace(plain, width=128)
        if found[2] == "resnext" and "x" in middle and plain.bottleneck:
            groups, width = middle.removesuffix("d").split("x")
            return replace(plain, groups=int(groups), width=int(width))
        return None
    found = re.fullmatch(r"vgg(11|13|16|19)(_bn)?", name)
    return Vgg(_VGGS[int(found[1])], found[2] is not None) if found else None


class _Layers:
    """Adds up the layers of a stage. `px` is the side of the map that they have come to."""

    def __init__(self, px: int) -> None:
        self.px, self.parameters, self.macs, self.saved, self.read = px, 0, 0, 0, 0
        self.largest, self.convolutions, self.saved_bytes = 0, 0, 0

    def conv(self, width: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1, norm: bool, bias: bool):
        """A convolution with its norm; the activation behind it works in place.

        Autograd keeps what the norm reads. What the convolution reads was kept by the layer before.
        """
        before, self.px = self.px, (self.px - 1) // stride + 1
        weights, area = width // groups * out * kernel**2, self.px**2
        self.parameters += weights + (out if bias else 0) + (2 * out if norm else 0)
        self.macs += weights * area
        self.saved += out * area if norm else 0
        # What the layer reads and writes beside the convolution, in maps of a norm and an activation.
        self.read += 2 * out * area
        self.largest = max(self.largest, width * before**2 + out * area)
        self.convolutions += 1

    def keep(self, width: int) -> None:
        """A map that autograd keeps, because an activation or a convolution needs it."""
        self.saved += width * self.px**2

    def pool(self, width: int, px: int) -> None:
        self.px = px
        self.keep(width)
        self.saved_bytes += _INDEX_BYTES * width * px**2

    def stage(self, width: int) -> FrozenStage:
        layers = Cost(self.parameters, self.macs, self.read, convolutions=self.convolutions)
        return FrozenStage(layers, self.saved, self.largest, width * self.px**2, self.saved_bytes)


def _resnet_stages(net: ResNet, image_px: int) -> list[FrozenStage]:
    layers = _Layers(image_px)
    layers.keep(IMAGE_CHANNELS)
    layers.conv(IMAGE_CHANNELS, 64, 7, stride=2, norm=True, bias=False)
    layers.keep(64)
    stages, width = [layers.stage(64)], 64
    for index, depth in enumerate(net.depths):
        layers = _Layers(layers.px)
        if index == 0:
            layers.pool(64, (layers.px - 1) // 2 + 1)
        planes = 64 * 2**index
        middle, out = net.groups * net.width * 2**index, planes * (4 if net.bottleneck else 1)
        for block in range(depth):
            stride, before = (2 if index and not block else 1), layers.px
            if net.bottleneck:
                layers.conv(width, middle, 1, norm=True, bias=False)
                layers.keep(middle)
                layers.conv(middle, middle, 3, stride=stride, groups=net.groups, norm=True, bias=False)
                layers.keep(middle)
                layers.conv(middle, out, 1, norm=True, bias=False)
            else:
                layers.conv(width, out, 3, stride=stride, norm=True, bias=False)
                layers.keep(out)
                layers.conv(out, out, 3, norm=True, bias=False)
            if stride != 1 or width != out:
                layers.px = before
                layers.conv(width, out, 1, stride=stride, norm=True, bias=False)
            layers.keep(out)
            width = out
        stages.append(layers.stage(width))
    return stages


def _vgg_stages(net: Vgg, image_px: int) -> list[FrozenStage]:
    stages, width, px = [], IMAGE_CHANNELS, image_px
    for index, (out, number) in enumerate(zip(_VGG_WIDTHS, net.convolutions)):
        layers = _Layers(px)
        if index == 0:
            layers.keep(width)
        else:
            layers.pool(width, px // 2)
        for _ in range(number):
            layers.conv(width, out, 3, norm=net.norm, bias=True)
            layers.keep(out)
            width = out
        px = layers.px
        stages.append(layers.stage(width))
    return stages


FAMILY = FeatureNetFamily(recognises=_recognises, load=later("peco_ds.models.conv_feature_nets:load_conv"), cost=_cost)
