"""Mean and standard deviation of the images that published weights were trained with, decided in one place for
conversion, evaluation, fine-tuning, probing and judging.

No tensor tells them, and a model that sees other ones still works, only worse. What is believed, in this order: what
the user says, what a config states, the arguments that a training script kept in its checkpoint, the name under which
weights were released. Where none of them tells, ImageNet's are taken and the log says that they were assumed.

Source: released README of BEiT: pre-training on ImageNet-22K with 0.5, on ImageNet-1K with ImageNet's.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import timm

from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD, short

logger = logging.getLogger("peco_ds")

Asked = Literal["auto", "imagenet", "half"]
# The fact of a model card that says which statistics were taken, and why.
FACT = "image statistics"
ASSUMED = "assumed, since nothing in or beside the weights tells"


class ImageStatistics(NamedTuple):
    """Of images in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    # What tells them, for cards; "" where nothing does and they are assumed.
    source: str

    @property
    def words(self) -> str:
        """One line for a card."""
        return f"{_named(self.mean, self.std)}; {self.source or ASSUMED}"


IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
# The first BEiT's on ImageNet-22K.
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_Pair = tuple[tuple[float, ...], tuple[float, ...]]

# Names of released files and folders in lower case, with _ for -; the first that fits is taken.
_SIZE = r"(tiny|small|base|large)"
_RELEASED: tuple[tuple[re.Pattern, str, _Pair], ...] = tuple(
    (re.compile(rf"(?<![a-z0-9]){pattern}"), who, pair)
    for pattern, who, pair in (
        (rf"beitv2_{_SIZE}_patch16_\d+", "BEiT v2", IMAGENET),
        (rf"beitv2_{_SIZE}_3rdparty", "BEiT v2", IMAGENET),
        # The released segmentation code takes ImageNet's, whatever pre-training saw.
        (rf"(upernet_)?beit_{_SIZE}_[a-z0-9_]*ade20k", "BEiT on ADE20K", IMAGENET),
        (rf"upernet_beit_{_SIZE}_", "BEiT on ADE20K", IMAGENET),
        (rf"beit_{_SIZE}_patch16_\d+_pt1k", "BEiT on ImageNet-1K", IMAGENET),
        (rf"beit_{_SIZE}_patch16_\d+_pt22k", "BEiT on ImageNet-22K", HALF),
        (rf"beit_{_SIZE}_(finetuned_ade|3rdparty)", "BEiT on ImageNet-22K", HALF),
        # As Hugging Face and timm name what was trained on ImageNet-22K; a longer name may mean other weights.
        (rf"beit_{_SIZE}_patch16_\d+$", "BEiT on ImageNet-22K", HALF),
        (r"deit3?_(tiny|small|medium|base|large|huge)", "DeiT", IMAGENET),
        (r"deit_3_(small|medium|base|large|huge)", "DeiT III", IMAGENET),
        (r"mae_(pretrain|finetuned|finetune|visualize)_vit_", "MAE", IMAGENET),
        (r"vit_mae_(base|large|huge)", "MAE", IMAGENET),
        (r"(linear_)?vit_(conv_)?[sb]_\d+ep", "MoCo v3", IMAGENET),
        (r"r_50_\d+ep", "MoCo v3", IMAGENET),
        (r"moco_v[123]_", "MoCo", IMAGENET),
        (r"dino_(vit|deit|resnet|xcit)", "DINO", IMAGENET),
        (r"dinov2_(vit|small|base|large|giant|with_registers)", "DINOv2", IMAGENET),
    )
)
# An argument that only one family's script has -> the family, all of which take ImageNet's.
_ARGUMENTS_OF = {
    "norm_pix_loss": "MAE",
    "moco_dim": "MoCo",
    "momentum_teacher": "DINO",
    "distillation_type": "DeiT",
}
_ENDS = re.compile(r"(\.(pth|pt|tar|bin|safetensors|ckpt))+$")
# What libraries call every weights file; its folder has the telling name.
_ANY_FILE = ("model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")


def statistics_of_weights(
    where: str,
    *,
    remedy: str,
    asked: Asked = "auto",
    stated: _Pair | None = None,
    stated_by: str = "as its config states",
    arguments: object = None,
    path: Path | None = None,
    known: tuple[str, _Pair] | None = None,
    architecture: str = "",
) -> ImageStatistics:
    """Mean and standard deviation that weights were trained with, told or assumed; the log says which.

    Args:
        where: the weights, in the log.
        remedy: how the user tells them, in the log; follows "if they are others, ".
        asked: what the user says: 0.5, ImageNet's, or nothing.
        stated: by a config.  stated_by: which, as the end of a sentence.
        arguments: of the script that wrote the checkpoint, as it holds them under "args".
        path: of the weights, for the name that they were released under.
        known: whose layout it is, and the statistics of all that have it.
        architecture: timm's name of the network, where the user gave one: where nothing else tells, what all weights
            tell that timm has under it.
    """
    told = _told(stated, stated_by, arguments, path, known) or statistics_of_architecture(architecture)
    if asked != "auto":
        mean, std = IMAGENET if asked == "imagenet" else HALF
        if told is not None and (told.mean, told.std) != (mean, std):
            logger.warning("%s: %s are taken as asked, although it has %s", where, _named(mean, std), told.words)
        return ImageStatistics(mean, std, "as asked")
    if told is None:
        logger.warning(
            "%s: nothing in or beside it tells the mean and standard deviation of its images; ImageNet's are assumed; "
            "if they are others, %s",
            where,
            remedy,
        )
        return ImageStatistics(*IMAGENET, "")
    if told.source != stated_by:
        logger.info("%s: %s", where, told.words)
    return told


def _told(
    stated: _Pair | None, stated_by: str, arguments: object, path: Path | None, known: tuple[str, _Pair] | None
) -> ImageStatistics | None:
    if stated is not None:
        return ImageStatistics(tuple(stated[0]), tuple(stated[1]), stated_by)
    of_arguments = statistics_of_arguments(arguments)
    if of_arguments is not None:
        return of_arguments
    if known is not None:
        return ImageStatistics(*known[1], f"as {known[0]} was trained")
    return statistics_of_name(*_names_of(path)) if path is not None else None


def statistics_of_arguments(arguments: object) -> ImageStatistics | None:
    """What the arguments of a training script tell, an argparse.Namespace or its dictionary; None: nothing.

    Source: `imagenet_default_mean_and_std` of BEiT's, BEiT v2's and mc-BEiT's scripts, which take 0.5 without it;
        `mean` and `std` of timm's.
    """
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    if not isinstance(arguments, dict):
        return None
    flag = arguments.get("imagenet_default_mean_and_std")
    if isinstance(flag, bool):
        return ImageStatistics(*(IMAGENET if flag else HALF), f"as its imagenet_default_mean_and_std={flag} tells")
    mean, std = three_numbers(arguments.get("mean")), three_numbers(arguments.get("std"))
    if mean is not None and std is not None and min(std) > 0:
        return ImageStatistics(mean, std, "as the arguments of its training tell")
    family = next((family for name, family in _ARGUMENTS_OF.items() if name in arguments), None)
    return ImageStatistics(*IMAGENET, f"as the arguments of {family} in it tell") if family else None


def statistics_of_name(*names: str) -> ImageStatistics | None:
    """What the name of a released file, folder or timm model tells; None: it is of no release that is known.

    A timm model's name counts with its tag alone: without one it stands for any weights of this shape.
    """
    for name in names:
        stem = _ENDS.sub("", name.lower())
        plain = stem.replace("-", "_")
        found = next(((who, pair) for pattern, who, pair in _RELEASED if pattern.search(plain)), None)
        if found is not None:
            return ImageStatistics(*found[1], f"as the name {short(name)} of {found[0]} tells")
        architecture, _, tag = stem.partition(".")
        if tag and timm.is_model(architecture) and tag in _tags(architecture):
            return ImageStatistics(*_pair_of(timm.get_pretrained_cfg(stem)), f"as timm's {stem} was trained")
    return None


def statistics_of_architecture(name: str) -> ImageStatistics | None:
    """Those of all weights that timm has for a model, or of those that the name's tag names; None if they differ."""
    architecture, _, tag = name.partition(".")
    if not name or not timm.is_model(architecture):
        return None
    tags = _tags(architecture)
    chosen = {tag} & tags if tag else tags
    found = {_pair_of(timm.get_pretrained_cfg(f"{architecture}.{tag}")) for tag in chosen}
    return ImageStatistics(*found.pop(), f"as timm's {name} was trained") if len(found) == 1 else None


def stated_in(config: dict) -> _Pair | None:
    """What timm's config.json states; None: not both, or not as three numbers each."""
    inner = config.get("pretrained_cfg")
    cfg = inner if isinstance(inner, dict) else config
    mean, std = three_numbers(cfg.get("mean")), three_numbers(cfg.get("std"))
    return None if mean is None or std is None else (mean, std)


def _pair_of(cfg) -> _Pair:
    return tuple(cfg.mean), tuple(cfg.std)


def _tags(architecture: str) -> set[str]:
    return {name.partition(".")[2] for name in timm.list_models(f"{architecture}.*", pretrained=True)}


def _names_of(path: Path) -> list[str]:
    """The names that may be a release's: of the file, of the repository in a model hub's cache, and of the folder."""
    path = path.absolute()
    hub = [part.rpartition("--")[2] for part in path.parts if part.startswith("models--")]
    folder = [path.parent.name] if _ENDS.sub("", path.name) in _ANY_FILE else []
    return [path.name, *hub, *folder]


def three_numbers(value: object) -> tuple[float, ...] | None:
    """A mean or standard deviation of images in [0, 1], one number a colour; None: it is none."""
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return None
    fits = all(
        isinstance(number, (int, float)) and not isinstance(number, bool) and 0 <= number <= 1 for number in value
    )
    return tuple(float(number) for number in value) if fits else None


def _named(mean: Iterable[float], std: Iterable[float]) -> str:
    mean, std = tuple(mean), tuple(std)
    if (mean, std) == IMAGENET:
        return "ImageNet's mean and standard deviation"
    return f"mean {_listed(mean)}, standard deviation {_listed(std)}"


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
