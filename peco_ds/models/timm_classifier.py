"""Load any classifier of timm, for comparison: by its name, with the hub's weights or a local file, or from a release
folder.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from peco_ds.errors import UserError
from peco_ds.models.image_statistics import FACT, Asked, statistics_of_weights
from peco_ds.models.timm_weights import MAKE_AGAIN, WEIGHTS, read_timm_config
from peco_ds.models.vit_layouts import statistics_of_release
from peco_ds.models.weight_files import check_finite, read_tensor_file, tensors_of_checkpoint
from peco_ds.schema import sha256_of_file

logger = logging.getLogger("peco_ds")

# Keys under which training scripts put the weights into their checkpoint.
_CONTAINERS = ("state_dict", "model", "module")


class TimmClassifier(NamedTuple):
    model: nn.Module  # images_norm -> logits; eval mode, float32
    num_classes: int
    source: str
    image_px: int
    # The side of the images that the model is evaluated at unless another is asked for.
    own_px: int
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # For the record: name -> text.
    facts: dict[str, str]


def load_timm_classifier(
    name: str, checkpoint: Path | None = None, *, image_px: int | None = None, statistics: Asked = "auto"
) -> TimmClassifier:
    """
    Args:
        name: of a timm model, with or without a tag.
        checkpoint: local weights of it, of any number of classes; None: downloaded.
        image_px: side of the images, position embeddings resampled; None: the model's own for evaluation.
        statistics: mean and standard deviation that the local weights were trained with; auto: what
            `image_statistics` finds, else ImageNet's, with a warning.
    Raises: UserError if timm does not know the name, the weights cannot be had or do not fit, or the model takes no
        other size.
    """
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(
            f"{name}: neither a run folder, a release, a weights file, nor the name of a timm model; correct it"
        )
    arguments: dict[str, object] = {}
    content: dict = {}
    if checkpoint is not None:
        content = read_tensor_file(checkpoint)
        tensors = tensors_of_checkpoint(content, _CONTAINERS)
        head = f"{timm.get_pretrained_cfg(name).classifier}.weight"
        overlay: dict[str, object] = {"state_dict": tensors}
        arguments["pretrained_cfg_overlay"] = overlay
        if head in tensors:
            arguments["num_classes"] = overlay["num_classes"] = len(tensors[head])
    try:
        model = timm.create_model(name, pretrained=True, **arguments).eval()
    except Exception as error:
        # Hub clients raise the errors of their transport, and timm's filters many others; none is a fault of this
        # package.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if checkpoint is not None:
            raise UserError(
                f"{checkpoint}: does not fit {name} ({reason}); give the file of that model, or the name of this file's"
            ) from None
        raise UserError(
            f"{name}: its weights could not be downloaded ({reason}); fetch them elsewhere and give --checkpoint FILE"
        ) from None
    source = f"timm {name}" + (f" ({checkpoint.name})" if checkpoint is not None else "")
    described = _described(model, name, source, image_px)
    if checkpoint is None:
        return described
    remedy = "say --statistics half for 0.5, or name the weights' own tag; --statistics imagenet confirms them"
    found = statistics_of_weights(
        source,
        remedy=remedy,
        asked=statistics,
        arguments=content.get("args"),
        path=checkpoint,
        architecture=name,
    )
    return described._replace(mean=found.mean, std=found.std, facts={FACT: found.words})


def is_foreign_release(target: str | Path) -> bool:
    """Whether a folder is a release of timm's of another family than BEiT, which `convert.read` reads."""
    config = read_timm_config(Path(target)) if Path(target).is_dir() else None
    name = str(config.get("architecture", "")) if config is not None else ""
    return name != "" and not name.startswith("beit")


def load_timm_release(folder: Path, *, image_px: int | None = None) -> TimmClassifier:
    """
    Args:
        folder: as `is_foreign_release`.
        image_px: as in `load_timm_classifier`.
    Raises: UserError as that one.
    """
    config = read_timm_config(folder)
    assert config is not None
    name = str(config["architecture"])
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"{folder}: holds a network {name[:80]}, which timm has not; give a classifier of timm's")
    if not config.get("num_classes"):
        raise UserError(f"{folder}: a release of {name} without a classifier; give one that has classes")
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:
        # A damaged config or file may fail anywhere in timm.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{folder}: timm cannot load it ({reason}); {MAKE_AGAIN}") from None
    sha256 = sha256_of_file(folder / WEIGHTS)[:12]
    described = _described(model, str(folder), f"{name} ({folder.name}/{WEIGHTS}, sha256 {sha256})", image_px)
    found = statistics_of_release(folder, config, described.source)
    return described._replace(mean=found.mean, std=found.std, facts={FACT: found.words})


def _described(model: nn.Module, name: str, source: str, image_px: int | None) -> TimmClassifier:
    """The model with what it is evaluated at, resized to `image_px`."""
    if not model.num_classes:
        raise UserError(f"{name}: has no classifier; give a fine-tuned model, or probe its features")
    check_finite(model.state_dict(), source)
    own_px = resolve_model_data_config(model, use_test_size=True)["input_size"][-1]
    if image_px is not None:
        _resize(model, name, image_px)
    config = resolve_model_data_config(model, use_test_size=True)
    if config["interpolation"] != "bicubic" or config["crop_mode"] != "center":
        logger.warning(
            "%s was trained for %s, %s crops; here they are bicubic and central, which moves its accuracy a little",
            name,
            config["interpolation"],
            config["crop_mode"],
        )
    side_px, crop, mean, std = image_px or own_px, config["crop_pct"], config["mean"], config["std"]
    return TimmClassifier(model, model.num_classes, source, side_px, own_px, crop, mean, std, {})


def _resize(model: nn.Module, name: str, image_px: int) -> None:
    """Make the model take images of another size: transformers have to be resized, convolutional networks take any."""
    try:
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=(image_px, image_px))
        with torch.no_grad():
            model(torch.zeros(1, 3, image_px, image_px))
    except Exception as error:
        # timm's models refuse in many ways.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"--image_px {image_px}: {name} takes no such image ({reason}); leave it out for the model's own size"
        ) from None
