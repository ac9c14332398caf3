"""Where the codes of a pre-training run come from: stored token shards, or a tokenizer in the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from peco_ds.config import ONLINE, PretrainRecipe, data_path
from peco_ds.data.indexed_tar import ShardSet
from peco_ds.data.loaders import Pictures
from peco_ds.data.token_shards import TokenSet
from peco_ds.errors import UserError
from peco_ds.models.peco_tokenizer import load_tokenizer, read_card
from peco_ds.runtime.distributed import World

logger = logging.getLogger("peco_ds")


def open_tokens(recipe: PretrainRecipe, pictures: Pictures, world: World, *, tokenizer_named: bool) -> TokenSet | Callable[[torch.Tensor], torch.Tensor]:
    """The token set that the recipe names, or a function images_11 [B, 3, T, T] -> codes [B, N] for data.tokens = online.

    What stands on disk is compared with its manifests before the first step, the hashing shared by the ranks.

    Args:
        tokenizer_named: data.tokenizer was set by the user, so that it has to be there.
    Raises: UserError naming what is missing, damaged, or belongs to other pictures or another tokenizer.
    """
    data = recipe.data
    tokenizer = data_path(data, data.tokenizer)
    if not tokenizer.exists() and data.tokens != ONLINE and not tokenizer_named:
        logger.warning("data.tokenizer %s is not there: which tokenizer made the tokens is not checked", tokenizer)
    check_shared(pictures.shards, "all" if data.verify == "all" else "size", world)
    if data.tokens == ONLINE:
        return online_tokenizer(tokenizer, recipe, world.device)
    tokens = TokenSet(
        data_path(data, data.tokens),
        pictures.manifest,
        num_codes=recipe.objective.num_codes,
        grid=recipe.model.grid,
        views=recipe.views,
        # Without the tokenizer at hand the tokens' own record of it is all there is to go by.
        tokenizer_fingerprint=read_card(tokenizer).fingerprint if tokenizer_named or tokenizer.exists() else None,
    )
    check_shared(tokens.shards, "size" if data.verify == "size" else "all", world)
    return tokens


def token_provenance(recipe: PretrainRecipe, tokens) -> dict:
    """Which tokenizer the codes come from, and what its release says of itself where it is at hand."""
    folder = data_path(recipe.data, recipe.data.tokenizer)
    card = read_card(folder) if folder.exists() else None
    fingerprint = tokens.manifest.tokenizer_fingerprint if isinstance(tokens, TokenSet) else card.fingerprint
    return {"tokenizer_fingerprint": fingerprint, "tokenizer": card.extra if card else {}}


def check_shared(shards: ShardSet, verify: str, world: World) -> None:
    """Each rank checks its share of the shards; a fault found by one rank is raised by all."""
    fault = ""
    try:
        shards.check_shards(range(world.rank, len(shards.manifest.shards), world.size), verify)
    except UserError as error:
        fault = str(error)
    except OSError as error:
        fault = f"{error.filename}: {error.strerror}"
    world.agree(fault)


def online_tokenizer(folder: Path, recipe: PretrainRecipe, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """The tokenizer of a release folder as a function of crops.

    Raises: UserError if its codes do not fit the recipe's grid or vocabulary.
    """
    tokenizer, card = load_tokenizer(folder)
    grid, num_codes = recipe.views.tokenizer_px // card.stride_px, recipe.objective.num_codes
    if recipe.views.tokenizer_px % card.stride_px or grid != recipe.model.grid:
        raise UserError(
            f"{folder}: stride {card.stride_px} px gives a {grid}x{grid} grid on views.tokenizer_px {recipe.views.tokenizer_px}, the backbone has "
            f"{recipe.model.grid}x{recipe.model.grid} patches; set views.tokenizer_px={card.stride_px * recipe.model.grid}"
        )
    if card.num_codes != num_codes:
        raise UserError(f"{folder}: {card.num_codes} codes, the recipe has objective.num_codes {num_codes}; set it to {card.num_codes}")
    tokenizer.to(device)

    @torch.no_grad()
    def tokenize(images_11: torch.Tensor) -> torch.Tensor:
        return tokenizer.tokenize(images_11)

    return tokenize
