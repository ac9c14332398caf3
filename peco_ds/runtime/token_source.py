"""Open the source of a pre-training run's codes: stored token shards, or a tokenizer in the training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from peco_ds.config import ONLINE, PretrainRecipe
from peco_ds.data.image_set import ImageSet
from peco_ds.data.loaders import Codes, codes_of
from peco_ds.data.token_shards import TokenSet
from peco_ds.data_paths import data_path, tokenizer_path
from peco_ds.errors import UserError
from peco_ds.models.image_tokenizer import ImageTokenizer
from peco_ds.models.token_passes import TokenPasses, even_pass_size
from peco_ds.models.tokenizers import TokenizerCard, load_tokenizer, read_card
from peco_ds.remote_paths import RemotePath
from peco_ds.runtime.distributed import World
from peco_ds.runtime.engine import compiles
from peco_ds.runtime.set_check import check_shared

logger = logging.getLogger("peco_ds")


def find_tokens(recipe: PretrainRecipe, images: ImageSet, *, tokenizer_named: bool) -> TokenSet | TokenizerCard:
    """The token set that the recipe names or, for data.tokens = online, the card of its tokenizer. Needs no ranks.

    Args:
        tokenizer_named: data.tokenizer was set by the user, so that it has to be there.
    Raises: UserError naming what is missing, or belongs to other images or another tokenizer.
    """
    data = recipe.data
    tokenizer = tokenizer_path(data)
    if data.tokens == ONLINE:
        card = read_card(tokenizer)
        check_pair(card, recipe, str(tokenizer))
        return card
    if not tokenizer.exists() and not tokenizer_named:
        logger.warning("data.tokenizer %s is not there: which tokenizer made the tokens is not checked", tokenizer)
    return TokenSet(
        data_path(data, data.tokens),
        images.manifest,
        num_codes=recipe.objective.num_codes,
        grid=recipe.model.grid,
        views=recipe.views,
        # Without the tokenizer at hand the tokens' own record of it is all there is to go by.
        tokenizer_fingerprint=read_card(tokenizer).fingerprint if tokenizer_named or tokenizer.exists() else None,
    )


def open_tokens(
    found: TokenSet | TokenizerCard, recipe: PretrainRecipe, images: ImageSet, world: World
) -> TokenSet | Callable[[torch.Tensor], Codes]:
    """What `find_tokens` found, ready to be read: the token set, or a function images_11 [B, 3, T, T] -> Codes.

    The shards on disk are compared with their manifests; the ranks share the hashing. Collective.

    Raises: UserError naming a shard that is missing or damaged.
    """
    data = recipe.data
    # Their sizes were compared when the run was opened.
    if data.verify == "all":
        check_shared(world, images.shards, verify="all")
    if not isinstance(found, TokenSet):
        return online_tokenizer(tokenizer_path(data), recipe, world.device)
    is_remote = isinstance(found.folder, RemotePath)
    hashed = data.verify == "all" or (data.verify == "tokens" and not is_remote)
    check_shared(world, found.shards, verify="all" if hashed else "size")
    return found


def token_provenance(recipe: PretrainRecipe, tokens) -> dict:
    """The fingerprint and facts of the tokenizer that the codes come from: from its release where that exists, else
    from the token set.
    """
    folder = tokenizer_path(recipe.data)
    card = read_card(folder) if folder.exists() else None
    if isinstance(tokens, TokenSet):
        fingerprint, facts = tokens.manifest.tokenizer_fingerprint, tokens.manifest.tokenizer_facts
    else:
        assert card is not None, f"{folder}: the tokenizer that computes the codes"
        fingerprint, facts = card.fingerprint, {}
    return {"tokenizer_fingerprint": fingerprint, "tokenizer": facts | (card.extra if card else {})}


def check_pair(card: TokenizerCard, recipe: PretrainRecipe, where: str) -> None:
    """Whether a tokenizer's codes are what the recipe's model predicts.

    Raises: UserError naming vocabulary, grid, or size of view that differ.
    """
    views, grid, num_codes = recipe.views, recipe.model.grid, recipe.objective.num_codes
    own, wanted = card.settings.only_px, card.stride_px * grid
    if own not in (None, wanted):
        raise UserError(
            f"{where}: its {card.settings.kind} tokenizer takes images of {own} px only, a "
            f"{own // card.stride_px}x{own // card.stride_px} grid; the backbone has {grid}x{grid} "
            "patches; "
            "change model.image_px or model.patch_px, or take another tokenizer"
        )
    if views.tokenizer_px != wanted:
        found = views.tokenizer_px / card.stride_px
        raise UserError(
            f"{where}: stride {card.stride_px} px on views.tokenizer_px {views.tokenizer_px} gives a "
            f"{found:g}x{found:g} grid, the backbone has {grid}x{grid} patches; set "
            f"views.tokenizer_px={wanted}"
        )
    if card.num_codes != num_codes:
        raise UserError(
            f"{where}: {card.num_codes} codes, the recipe has objective.num_codes {num_codes}; set it to "
            f"{card.num_codes}"
        )
    if views.topk > card.num_codes:
        raise UserError(f"{where}: views.topk {views.topk}, but the tokenizer has {card.num_codes} codes; lower it")


def online_tokenizer(folder: Path, recipe: PretrainRecipe, device: torch.device) -> Callable[[torch.Tensor], Codes]:
    """The tokenizer of a release folder as a function of crops.

    Raises: UserError if its codes do not fit the recipe.
    """
    tokenizer, card = load_tokenizer(folder)
    check_pair(card, recipe, str(folder))
    return codes_function(tokenizer.to(device), recipe, recipe.run.micro_batch)


def codes_function(tokenizer: ImageTokenizer, recipe: PretrainRecipe, images: int) -> Callable[[torch.Tensor], Codes]:
    """The tokenizer as a function images_11 [B, 3, T, T] -> Codes, in views.tokenizer_precision and compiled as
    run.compile says: codes to be stored and codes computed in the training loop both come from it.

    Args:
        tokenizer: in eval mode, on its device.
        images: the usual number of images of a call, which is cut into passes of at most run.micro_batch.
    """
    passes = TokenPasses(
        tokenizer,
        precision=recipe.views.tokenizer_precision,
        images=even_pass_size(images, recipe.run.micro_batch),
        compiled=compiles(recipe.run),
    )
    return lambda images_11: codes_of(passes, images_11, recipe.views)
