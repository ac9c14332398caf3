"""Load any classifier of timm by its name, for comparison: with the hub's weights or with a local file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from peco_ds.errors import UserError
from peco_ds.models.weight_files import read_tensor_file

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


def load_timm_classifier(name: str, checkpoint: Path | None = None, *, image_px: int | None = None) -> TimmClassifier:
    """
    Args:
        name: of a timm model, with or without a tag.
        checkpoint: local weights of it, of any number of classes; None: downloaded.
        image_px: side of the images, position embeddings resampled; None: the model's own for evaluation.
    Raises: UserError if timm does not know the name, the weights cannot be had or do not fit, or the model takes no
        other size.
    """
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(
            f"{name}: neither a run folder, a release, a weights file, nor the name of a timm model; correct it"
        )
    arguments: dict[str, object] = {}
    if checkpoint is not None:
        tensors = read_tensor_file(checkpoint)
        tensors = next(
            (tensors[container] for container in _CONTAINERS if isinstance(tensors.get(container), dict)), tensors
        )
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
    if not model.num_classes:
        raise UserError(f"{name}: has no classifier; give a fine-tuned model, or probe its features")
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
    source = f"timm {name}" + (f" ({checkpoint.name})" if checkpoint is not None else "")
    return TimmClassifier(
        model, model.num_classes, source, image_px or own_px, own_px, config["crop_pct"], config["mean"], config["std"]
    )


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
