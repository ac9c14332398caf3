"""Any tokenizer with any objective, by recipe alone; and the pairs that do not go together."""

import pytest
import torch

from peco_ds.config import PretrainRecipe, TokenizerSettings, TokenizerVitSettings
from peco_ds.data.image_set import ImageSet
from peco_ds.data.loaders import masked_batches
from peco_ds.data.order import rank_positions
from peco_ds.data_paths import data_path
from peco_ds.errors import UserError
from peco_ds.models.mim import build_mim
from peco_ds.models.tokenizers import build_tokenizer, save_tokenizer
from peco_ds.objectives import build_objective
from peco_ds.recipe_files import load_recipe
from peco_ds.registry import OBJECTIVES, TOKENIZERS
from peco_ds.runtime.token_source import online_tokenizer

CPU = torch.device("cpu")
VIT = TokenizerVitSettings(
    image_px=64,
    patch_px=16,
    width=32,
    depth=1,
    heads=2,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=2,
    target_width=24,
)
CONVOLUTIONS = dict(channels=8, channel_mults=(1, 1, 2, 2), blocks_per_level=1, z_channels=8)
SETTINGS = {
    "vqgan": TokenizerSettings(num_codes=64, code_dim=8, **CONVOLUTIONS),
    "gumbel": TokenizerSettings(kind="gumbel", num_codes=64, code_dim=8, **CONVOLUTIONS),
    "dvae": TokenizerSettings(
        kind="dvae", num_codes=64, code_dim=8, channels=16, channel_mults=(1, 1, 2, 2), blocks_per_level=1
    ),
    "vqkd": TokenizerSettings(kind="vqkd", num_codes=64, code_dim=8, l2_normalized=True, vit=VIT),
    "vqvit": TokenizerSettings(kind="vqvit", num_codes=64, code_dim=8, vit=VIT),
}
VIEW_PX = {kind: 4 * settings.stride_px for kind, settings in SETTINGS.items()}
VARIANTS = {
    "full": [],
    "visible": [
        "encoding.kind=visible",
        "encoding.decoder_width=24",
        "encoding.decoder_depth=1",
        "encoding.decoder_heads=3",
    ],
    "aggregated": ["aggregation.early_block=1"],
}


def test_every_kind_of_tokenizer_is_among_these():
    assert SETTINGS.keys() == TOKENIZERS.keys()


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    root = tmp_path_factory.mktemp("releases")
    for kind, settings in SETTINGS.items():
        torch.manual_seed(0)
        save_tokenizer(root / kind, build_tokenizer(settings).state_dict(), settings, {"judge": "none"})
    return root


def recipe_of(small_sets, releases, kind, *overrides):
    settings = [
        f"data.tokenizer={releases / kind}",
        "data.tokens=online",
        f"views.tokenizer_px={VIEW_PX[kind]}",
        *overrides,
    ]
    return load_recipe(PretrainRecipe, "peco_vitb16", [*small_sets.overrides, *settings]).recipe


@pytest.fixture(scope="module", params=SETTINGS)
def batch(request, small_sets, releases):
    """Real images with hard and soft codes of one kind of tokenizer."""
    recipe = recipe_of(small_sets, releases, request.param, "views.topk=4")
    images, tokens = (
        ImageSet(data_path(recipe.data, recipe.data.images)),
        online_tokenizer(releases / request.param, recipe, CPU),
    )
    positions = rank_positions(recipe.run, 0, 1, first_step=0, last_step=1)
    return next(masked_batches(images, tokens, positions, recipe, CPU))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_tokenizer_teaches_any_model_with_any_objective(small_sets, batch, objective, variant):
    recipe = load_recipe(
        PretrainRecipe,
        "peco_vitb16",
        [
            *small_sets.overrides,
            f"objective.name={objective}",
            "objective.rest=renormalize",
            "views.topk=4",
            *VARIANTS[variant],
        ],
    ).recipe
    torch.manual_seed(0)
    model = build_mim(recipe.model, recipe.encoding, recipe.aggregation, recipe.objective.num_codes)
    learn = build_objective(recipe.objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss, _ = learn(model(batch.images_norm, batch.masked), batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05, losses
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_tokenizer_whose_codes_are_not_the_models_is_refused_with_the_remedy(small_sets, releases, kind):
    right = VIEW_PX[kind]
    wrong = {
        "objective.num_codes=128": "64 codes, the recipe has objective.num_codes 128; set it to 64",
        "views.topk=65": "views.topk 65, but the tokenizer has 64 codes",
    }
    wrong[f"views.tokenizer_px={2 * right}"] = (
        f"gives a 8x8 grid, the backbone has 4x4 patches; set views.tokenizer_px={right}"
    )
    for override, words in wrong.items():
        recipe = recipe_of(small_sets, releases, kind, override)
        with pytest.raises(UserError, match=words):
            online_tokenizer(releases / kind, recipe, CPU)


def test_a_tokenizer_of_one_size_is_refused_for_a_model_with_another_grid(small_sets, releases):
    recipe = recipe_of(small_sets, releases, "vqkd", "model.image_px=128", "views.tokenizer_px=128")
    with pytest.raises(UserError, match="takes images of 64 px only, a 4x4 grid; the backbone has 8x8 patches"):
        online_tokenizer(releases / "vqkd", recipe, CPU)


REFUSED = {
    "soft targets without soft codes": (["objective.name=multi_choice"], "views.topk is 0"),
    "an early block past the depth": (["aggregation.early_block=12"], "the backbone has 12 blocks"),
    "a second branch without tokens at every place": (
        ["encoding.kind=visible", "aggregation.early_block=9"],
        "drop one",
    ),
    "visible patches that differ in number": (["encoding.kind=visible", "mask.exact=false"], "set mask.exact=true"),
    "a decoder that its heads do not divide": (
        ["encoding.decoder_width=500"],
        "not a multiple of encoding.decoder_heads 16",
    ),
    "a share above one": (["objective.omega=1.5"], r"objective.omega 1.5: must be in \[0, 1\]"),
    "an unknown objective": (["objective.name=soft"], "objective.name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_recipe_that_contradicts_itself_is_refused_by_name(name):
    overrides, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        load_recipe(PretrainRecipe, "peco_vitb16", overrides)
