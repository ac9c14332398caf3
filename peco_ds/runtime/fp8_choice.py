"""Products in fp8 where the recipe asks for them (run.fp8): whether the device has them, and which layers take them."""

from __future__ import annotations

import logging

import torch
from torch import nn

from peco_ds.config import RunSettings
from peco_ds.models.block_linear import FP8_MULTIPLE, fits_fp8
from peco_ds.models.vit import TransformerBlock
from peco_ds.runtime.distributed import World

logger = logging.getLogger("peco_ds")

# The first compute capability whose tensor cores take 8-bit numbers.
FP8_CAPABILITY = (8, 9)


def settle_fp8(model: nn.Module, run: RunSettings, world: World) -> None:
    """Let every transformer block compute its products in fp8. Collective.

    Raises: UserError if a rank's GPU has no fp8.
    """
    if not run.fp8:
        return
    world.agree(fp8_fault(world.device))
    if world.device.type != "cuda":
        logger.warning("run.fp8: this device has no fp8, its rounding is computed in float32, slower than without")
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, TransformerBlock)}
    unfit: dict[str, torch.Size] = {}
    for block in blocks.values():
        block.fp8 = True
        layers = dict(qkv=block.attn.qkv, proj=block.attn.proj, fc1=block.mlp.fc1, fc2=block.mlp.fc2)
        unfit |= {name: layer.weight.shape for name, layer in layers.items() if not fits_fp8(layer.weight)}
    if unfit:
        named = ", ".join(f"{name} ({' x '.join(map(str, shape))})" for name, shape in unfit.items())
        logger.warning("run.fp8: sides are no multiples of %d, so in %s: %s", FP8_MULTIPLE, run.precision, named)


def fp8_fault(device: torch.device) -> str:
    """Why a device cannot take run.fp8, as one line; "" if it can."""
    if device.type != "cuda":
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability >= FP8_CAPABILITY:
        return ""
    have, need = (".".join(map(str, version)) for version in (capability, FP8_CAPABILITY))
    return (
        f"run.fp8: {torch.cuda.get_device_name(device)} has compute capability {have}, fp8 needs {need} or higher; "
        "set run.fp8=false"
    )
