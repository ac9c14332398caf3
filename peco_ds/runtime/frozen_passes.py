"""The judge or teacher of a tokenizer's training, compiled where run.compile asks for it.

It is somebody else's network, which a compiler may not take: one pass is tried at the start, and a network that fails
stays as it is.
"""

from __future__ import annotations

import logging

import torch

from peco_ds.config import TokenizerRecipe
from peco_ds.models.feature_nets import FeatureNet
from peco_ds.registry import TOKENIZERS
from peco_ds.runtime.engine import compiles

logger = logging.getLogger("peco_ds")


def compile_frozen(frozen: FeatureNet | None, recipe: TokenizerRecipe, device: torch.device) -> None:
    """Compile the passes of run.micro_batch images, and try them."""
    if frozen is None or not compiles(recipe.run):
        return
    logger.info("%s is compiled (run.compile %s): the first step takes longer", frozen.description, recipe.run.compile)
    frozen.compile_passes(recipe.run.micro_batch)
    try:
        _try(frozen, recipe, device)
    # Compilers raise errors of many types. A network that does not compile must not end a run.
    except Exception as error:
        frozen.compile_passes(0)
        logger.warning("%s stays uncompiled: %s", frozen.description, " ".join(str(error).split())[:300])


def _try(frozen: FeatureNet, recipe: TokenizerRecipe, device: torch.device) -> None:
    """What a training pass asks of it; the backward pass is compiled at its first use."""
    size = recipe.views.tokenizer_px
    images_01 = torch.full((recipe.run.micro_batch, 3, size, size), 0.5, device=device)
    if TOKENIZERS[recipe.tokenizer.kind].learns_from == "teacher":
        with torch.no_grad():
            frozen.targets(images_01)
        return
    with torch.no_grad():
        frozen.features(images_01, recipe.perceptual.blocks)
    found = frozen.features(images_01.requires_grad_(), recipe.perceptual.blocks)
    torch.autograd.grad(torch.stack([features.sum() for features in found]).sum(), images_01)
