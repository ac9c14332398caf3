"""What all frozen networks share that timm builds: release folders, names to download, and the strict comparison of a
file's tensors with those of the network.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import nn

from peco_ds.errors import UserError
from peco_ds.models.feature_nets import FETCH
from peco_ds.schema import read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAKE_AGAIN = "fetch it again, or make it again with convert_checkpoint.py --to timm"
_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors", ".bin")


def read_timm_config(folder: Path) -> dict | None:
    """timm's config.json of a release folder; None where the folder is of another library.

    Raises: UserError if the file is there and holds no JSON object.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        return None
    try:
        config = read_json(folder / CONFIG)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / CONFIG}: not readable as JSON ({error}); {MAKE_AGAIN}") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: no JSON object; {MAKE_AGAIN}")
    return None if "model_type" in config and "architecture" not in config else config


def refuse_folder(folder: Path) -> UserError:
    """The refusal of a folder without a network that is read."""
    lacking = next((name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()), CONFIG)
    return UserError(
        f"{folder}: holds no {lacking}; give a weights file, or a release folder made with "
        "convert_checkpoint.py --to timm"
    )


def check_name(name: str, architecture: str, section: str) -> None:
    """Check weights that are no file or folder. Raises: UserError if they are no name of a timm model."""
    if "/" in name or name.endswith(_SUFFIXES):
        raise UserError(f"{name}: no such file; correct the path, or {FETCH[section]}")
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(
            f"{name}: neither a file or folder nor the name of a timm model; correct it, or {FETCH[section]}"
        )
    if architecture not in ("auto", name):
        raise UserError(f"{section}.architecture {architecture} contradicts {section}.weights {name}; use auto")


def check_architecture(architecture: str, section: str) -> None:
    """Raises: UserError if timm has no model of this name."""
    if not timm.is_model(architecture):
        raise UserError(f"{section}.architecture {architecture!r}: no timm model of this name; use auto")


def downloaded(name: str, section: str, **options) -> nn.Module:
    """timm's model of this name with its weights.

    Args:
        options: of `timm.create_model`.
    Raises: UserError saying what to fetch if the download fails.
    """
    return created(
        name,
        f"{name}: its weights could not be downloaded ({{}}); fetch model.safetensors of huggingface.co/timm/{name} "
        f"elsewhere, put it on this machine and set {section}.weights to its path and "
        f"{section}.architecture={name.partition('.')[0]}",
        pretrained=True,
        **options,
    )


def created(source: str, refusal: str, **options) -> nn.Module:
    """What timm makes of a name, or of the config of "local-dir:FOLDER".

    Args:
        refusal: of what it cannot make, with {} for its reason.
        options: of `timm.create_model`.
    """
    try:
        return timm.create_model(source, **options)
    except Exception as error:
        # Hub clients raise what their transport raises, and a damaged config may fail anywhere in timm. Neither is a
        # fault of this package.
        raise UserError(refusal.format(_one_line(error))) from None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def statistics(net: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the network's input."""
    return tuple(net.pretrained_cfg["mean"]), tuple(net.pretrained_cfg["std"])


def licence_of_name(net: nn.Module) -> str:
    """What timm records of downloaded weights."""
    licence = net.pretrained_cfg.get("license")
    return f"{licence} (as timm records it)" if licence else ""


def check_tensors(
    expected: dict[str, torch.Tensor],
    state: dict[str, torch.Tensor],
    where: str,
    name: str,
    section: str,
    *,
    may_lack: str = "",
) -> None:
    """Compare the tensors of a file with those of a network.

    Args:
        expected: the network's, on any device.
        where, name: of the file and the network, for messages.
        may_lack: an end of names that a file may be without.
    Raises: UserError if a tensor is missing, left over, or of another shape or kind of number.
    """
    for key in expected:
        if key not in state and not (may_lack and key.endswith(may_lack)):
            raise UserError(
                f"{where}: tensor {key} (timm's name) of {name} is missing; fetch the file again or correct "
                f"{section}.architecture"
            )
    for key, tensor in state.items():
        if key not in expected:
            raise UserError(
                f"{where}: tensor {key} has no place in {name}; correct {section}.architecture, or give a file "
                "without it"
            )
        if tensor.shape != expected[key].shape:
            found, wanted = tuple(tensor.shape), tuple(expected[key].shape)
            raise UserError(
                f"{where}: tensor {key} (timm's name) has shape {found}, {name} has {wanted}; correct "
                f"{section}.architecture"
            )
        if tensor.is_floating_point() != expected[key].is_floating_point():
            raise UserError(
                f"{where}: tensor {key} (timm's name) is {tensor.dtype}, {name} has {expected[key].dtype}; "
                "fetch the file again"
            )
