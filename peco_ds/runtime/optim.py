"""Build the parameter groups and the Adam or AdamW that a recipe asks for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging

import torch
from timm.layers import set_fast_norm
from torch import nn

from peco_ds.config import OptimSettings, RunSettings
from peco_ds.errors import UserError

logger = logging.getLogger("peco_ds")


def decay_groups(model: nn.Module, weight_decay: float, lr_scales: dict[str, float] | None = None) -> list[dict]:
    """Two groups a learning-rate scale: with and without weight decay.

    Args:
        lr_scales: parameter-name prefix -> factor on the scheduled learning rate; 1 for the rest.
    Returns: groups with `lr_scale` and `name`; no parameter is in two, none is left out.
    Source: released BEiT `optim_factory.py`: no decay on 1-D parameters, biases, position embedding and class token;
        the mask token and the relative position table are decayed.
    """
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = next((factor for prefix, factor in (lr_scales or {}).items() if name.startswith(prefix)), 1.0)
        # Under ZeRO-3 a partitioned parameter is an empty 1-D tensor; its own shape is kept in ds_shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decays = len(shape) > 1 and not name.endswith(".bias") and name.split(".")[-1] not in ("cls_token", "pos_embed")
        group = groups.setdefault(
            (scale, decays),
            {
                "params": [],
                "lr_scale": scale,
                "weight_decay": weight_decay if decays else 0.0,
                "name": f"{'decay' if decays else 'no_decay'}_x{scale:g}",
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def layer_scales(depth: int, decay: float, prefix: str = "") -> dict[str, float]:
    """Factors on the learning rate of a backbone's layers, for `decay_groups`: decay ** n for a layer `n` below
    the head.

    Args:
        prefix: of the backbone's parameters, `backbone.` where it is a part of the model.

    Returns: parameter-name prefix -> factor. Patch embedding, class token and places are layer 0, block i (from 0) is
        layer i + 1, the pooling norm and the head (of a dense model, whatever is beside the backbone) are layer depth
        + 1 and keep the full learning rate.
    Source: BEiT (arXiv 2106.08254), appendix; released `optim_factory.LayerDecayValueAssigner`.
    """
    scales = {f"{prefix}{name}": decay ** (depth + 1) for name in ("cls_token", "pos_embed", "patch_embed.")}
    return scales | {f"{prefix}blocks.{block}.": decay ** (depth - block) for block in range(depth)}


def build_optimizer(groups: list[dict], settings: OptimSettings, *, offloaded: bool) -> torch.optim.Optimizer:
    """Adam or AdamW over the groups.

    Args:
        offloaded: the DeepSpeed JSON keeps optimiser states on the host: DeepSpeed's CPU Adam is then the one that can
            step there.
    Raises: UserError if apex is asked for and is missing, or is the other project of that name on PyPI.
    """
    decoupled = settings.kind == "adamw"
    arguments = dict(lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
    if offloaded or (settings.impl == "deepspeed" and not torch.cuda.is_available()):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        logger.info("DeepSpeed's Adam for the host is compiled at its first use on a machine, which takes minutes")
        return DeepSpeedCPUAdam(groups, adamw_mode=decoupled, **arguments)
    if settings.impl == "deepspeed":
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(groups, adam_w_mode=decoupled, **arguments)
    if settings.impl == "apex":
        require_nvidia_apex("optim.impl", module="apex.optimizers", extension="amp_C")
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, adam_w_mode=decoupled, **arguments)
    return (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups, fused=True, **arguments)


def use_layer_norm(run: RunSettings) -> None:
    """Select the kernel of the layer norms by timm's own switch; to be called before a model is built.

    Raises: UserError as `require_nvidia_apex`.
    """
    if run.layer_norm == "apex":
        require_nvidia_apex("run.layer_norm", module="apex.normalization", extension="fused_layer_norm_cuda")
        set_fast_norm(True)


def require_nvidia_apex(setting: str, *, module: str, extension: str) -> None:
    """Raises: UserError saying which `apex` is installed, if any, and where the right one comes from.

    Args:
        setting: the name of the setting that asks for apex.
        module, extension: the part of apex that is needed, and that part's CUDA kernels.
    """
    remedy = (
        "build NVIDIA's from a clone of github.com/NVIDIA/apex (APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip "
        f"install -v --no-build-isolation .) or set {setting}=torch"
    )
    if importlib.util.find_spec("apex") is None:
        raise UserError(f"{setting} = 'apex': apex is not installed; {remedy}")
    if importlib.util.find_spec(module) is None:
        try:
            version = importlib.metadata.version("apex")
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        raise UserError(
            f"{setting} = 'apex': the installed apex {version} is PyPI's web toolkit of the same name; "
            f"pip uninstall apex, then {remedy}"
        )
    if importlib.util.find_spec(extension) is None:
        raise UserError(f"{setting} = 'apex': apex was built without its CUDA extensions; {remedy}")
