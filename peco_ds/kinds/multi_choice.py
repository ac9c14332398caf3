"""Cross-entropy on soft codes, as settings, plans and model cards see it; computed in objectives/multi_choice.py."""

from __future__ import annotations

from peco_ds.config import PretrainRecipe
from peco_ds.costs import FP32_BYTES, ObjectiveCost
from peco_ds.registry import ObjectiveKind, later


def _words(recipe: PretrainRecipe) -> str:
    objective, views = recipe.objective, recipe.views
    return (
        f"{views.topk} soft ones a patch at temperature {views.topk_temperature:g}, the rest {objective.rest}, "
        f"omega {objective.omega:g}"
    )


def _cost(recipe: PretrainRecipe) -> ObjectiveCost:
    """Cost for N patches, M of them masked, V codes, features of width D, and P rows of logits: M of each branch.

    Log-probabilities [P, V] are multiplied by choices [V, N]. The backward pass computes this product again, and the
    gradient of the log-probabilities alone. The refinement is computed once for both branches: rows [M, N] pick
    features [N, D], which are compared with all of them. Its gradient goes to the rows picked, to the other side, and
    back through the picking.
    """
    objective, patches, masked = recipe.objective, recipe.model.grid**2, recipe.mask.count
    predicted = masked * (2 if recipe.aggregation.early_block else 1)
    width = recipe.encoding.decoder_width if recipe.encoding.kind == "visible" else recipe.model.width
    mixing, comparing = predicted * patches * objective.num_codes, masked * patches * width
    return ObjectiveCost(
        forward_macs=mixing + 2 * comparing,
        backward_macs=mixing + (3 * comparing if objective.similarity_gradient else 0),
        recomputed_macs=mixing,
        # The dense choices [N, V] are filled, scattered into, and read by a product with every masked patch.
        moved_bytes=patches * objective.num_codes * 4 * FP32_BYTES,
        kernels=46,
    )


KIND = ObjectiveKind(
    build=later("peco_ds.objectives.multi_choice:MultiChoice"),
    soft_codes=True,
    tags={"kept_mass": "tokens/kept_mass"},
    words=_words,
    cost=_cost,
)
