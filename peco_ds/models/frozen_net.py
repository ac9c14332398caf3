"""The frozen network that a tokenizer learns from, as its kind has it: a judge of its images, or a teacher of its
features.
"""

from __future__ import annotations

from peco_ds.config import TokenizerRecipe
from peco_ds.errors import UserError
from peco_ds.models.feature_nets import FeatureNet, load_feature_net
from peco_ds.registry import TOKENIZERS
from peco_ds.user_paths import released_path


def load_frozen_net(recipe: TokenizerRecipe) -> FeatureNet | None:
    """The judge or the teacher that the recipe names, on the CPU; None for images without a judge.

    Raises: UserError if its file is none, it lacks one of perceptual.blocks, or a teacher's features have another width
        or grid than the tokenizer gives.
    """
    return _teacher(recipe) if _taught(recipe) else _judge(recipe)


def frozen_net_at_hand(recipe: TokenizerRecipe) -> str:
    """What a dry run says of it: its description where its file or folder is there, so that one that does not fit is
    refused before the run; nothing is fetched.
    """
    judge = recipe.perceptual.weights if recipe.perceptual.weight else ""
    named = recipe.teacher.weights if _taught(recipe) else judge
    if not named:
        return "none"
    if not released_path(named).exists():
        return f"not there yet ({named})"
    network = load_frozen_net(recipe)
    assert network is not None
    return network.description


def _taught(recipe: TokenizerRecipe) -> bool:
    return TOKENIZERS[recipe.tokenizer.kind].learns_from == "teacher"


def _judge(recipe: TokenizerRecipe) -> FeatureNet | None:
    perceptual = recipe.perceptual
    if not perceptual.weight:
        return None
    judge = load_feature_net(
        perceptual.weights, perceptual.architecture, image_px=perceptual.image_px, precision=perceptual.precision
    )
    judge.checked_blocks(perceptual.blocks)
    return judge


def _teacher(recipe: TokenizerRecipe) -> FeatureNet:
    settings, vit = recipe.teacher, recipe.tokenizer.vit
    teacher = load_feature_net(
        settings.weights,
        settings.architecture,
        image_px=settings.image_px,
        section="teacher",
        precision=settings.precision,
    )
    width, grid = teacher.target_width, teacher.grid
    wanted = recipe.views.tokenizer_px // recipe.tokenizer.stride_px
    if not width:
        raise UserError(f"teacher.weights: {teacher.description} only judges; give another network")
    if width != vit.target_width:
        raise UserError(
            f"tokenizer.vit.target_width {vit.target_width}: the teacher {teacher.description} gives "
            f"features of width {width}; set it to {width}"
        )
    if grid != wanted:
        size = wanted * teacher.image_px // grid
        raise UserError(
            f"teacher.image_px {teacher.image_px}: the teacher {teacher.description} gives a grid of "
            f"{grid} x {grid} features, "
            f"the tokenizer one of {wanted} x {wanted} codes; set teacher.image_px={size}"
        )
    return teacher
