"""What the planner counts for attention by its form: tiles as the kernels cut them, and what follows for a step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peco_ds.config import ModelSettings, PretrainRecipe
from peco_ds.models import attention, attention_unfused
from peco_ds.planner.attention_tiles import (
    ALIGNMENT,
    UNFUSED_MULTIPLE,
    _efficient_tiles,
    _triton_tiles,
    attention_cost,
    form_of,
    score_gradient_bytes,
    unfused_weight_bytes,
)
from peco_ds.planner.estimate import Estimate, estimate
from peco_ds.planner.fitting import shipped
from peco_ds.planner.hardware import HARDWARE, Hardware
from peco_ds.planner.shapes import mim_activation_bytes
from peco_ds.planner.stages import stage_of
from peco_ds.recipe_files import load_recipe

H14 = dict(tokens=257, heads=16, dim=80, element=2)
B16 = dict(tokens=197, heads=12, dim=64, element=2)


def test_sizes_are_those_of_the_models_code():
    assert (ALIGNMENT, UNFUSED_MULTIPLE) == (attention.ALIGNMENT, attention_unfused.MULTIPLE)
    weights = attention_unfused.forward(torch.zeros(1, 17, 3, 2, 4), torch.zeros(2, 17, 17))[1]
    assert weights.nbytes == unfused_weight_bytes(17, 2, 4)


@pytest.mark.parametrize("tokens, dim", [(257, 80), (197, 64), (577, 64), (1025, 80), (128, 96), (3, 8), (222, 72)])
def test_triton_tiles_are_those_of_the_kernels(tokens, dim):
    pytest.importorskip("triton")
    from peco_ds.models.attention_kernels import TILE, _tiling

    tiling = _tiling(tokens, dim)
    side = tiling["FULL"] * TILE + tiling["REST"]
    assert _triton_tiles(tokens, dim, backward=True) == (side, side, tiling["MAIN"] + tiling["SIDE"])


def test_one_token_above_a_tile_costs_the_efficient_form_a_whole_one():
    assert _efficient_tiles(257, 80, backward=True) == (384, 384, 128)
    assert _efficient_tiles(257, 80, backward=False) == (320, 384, 128)
    assert _efficient_tiles(197, 64, backward=True) == (256, 256, 64)
    assert _triton_tiles(257, 80, backward=True) == (272, 272, 80)


@pytest.mark.parametrize("shape", [H14, B16], ids=["H/14", "B/16"])
def test_the_unfused_form_computes_no_product_twice_and_moves_the_most(shape):
    costs = {form: attention_cost(form, **shape) for form in ("triton", "unfused", "efficient")}
    forward, backward = costs["unfused"]
    assert backward.batched == 2 * forward.batched and not forward.tiles
    for form in ("triton", "efficient"):
        assert costs[form][1].tiles > 2 * costs[form][0].tiles and not costs[form][0].batched
        assert costs[form][1].moved_bytes < backward.moved_bytes
    assert costs["triton"][1].tiles < costs["efficient"][1].tiles


def test_memory_follows_the_form():
    model = ModelSettings(image_px=224, patch_px=14, width=1280, depth=32, heads=16)
    sizes = dict(num_codes=8192, masked=98, checkpointing="none", precision="bf16")
    saved = {
        form: mim_activation_bytes(replace(model, attention=form), **sizes)
        for form in ("auto", "triton", "efficient", "unfused")
    }
    assert saved["auto"] == saved["triton"] == saved["efficient"]
    log_sums = 32 * 257 * 4 * 16
    assert saved["unfused"].saved - saved["triton"].saved == 32 * unfused_weight_bytes(257, 16, 2) - log_sums
    large = replace(model, image_px=448)
    working = mim_activation_bytes(large, **sizes).working
    assert working >= score_gradient_bytes("triton", 1025, 16, 2) == 16 * 1025 * 1040 * 2


def estimated(hardware: Hardware, form: str, name: str, micro_batch: int, *more: str) -> Estimate:
    """One GPU with ZeRO-1 and an optimiser step every four passes."""
    settings = [f"run.micro_batch={micro_batch}", f"run.global_batch={4 * micro_batch}", f"model.attention={form}"]
    recipe = load_recipe(PretrainRecipe, name, [*settings, *more], environ={}).recipe
    zero1 = next(choice for choice in shipped() if choice.stage == 1 and not choice.offloads)
    return estimate(stage_of(recipe), hardware, 1, zero1, micro_batch=micro_batch)


def images_s(product_share: float, form: str, *more: str) -> float:
    """ViT-H/14 on an H200 whose products reach a share of the peak."""
    hardware = replace(HARDWARE["h200"], product_share=(product_share,) * 3)
    return estimated(hardware, form, "peco_vith14", 128, *more).computed_images_s()


# A reading of the kernels' sources without a GPU, with products at 620 TFLOP/s and layer scale unfolded.
@pytest.mark.parametrize(
    "form, expected, tolerance", [("efficient", 327, 0.05), ("unfused", (390 + 422) / 2, 0.05), ("triton", 446, 0.05)]
)
def test_from_the_same_facts_the_planner_expects_what_a_reading_of_the_kernels_does(form, expected, tolerance):
    found = images_s(620 / 989.4, form, "model.fold_layer_scale=false")
    assert found == pytest.approx(expected, rel=tolerance)


def test_auto_is_planned_as_the_form_that_is_predicted_to_be_the_fastest():
    rates = {form: images_s(0.57, form) for form in ("auto", "triton", "unfused", "efficient")}
    assert form_of("auto") == "triton" and rates["auto"] == rates["triton"] == max(rates.values())


SHAPES = {
    "ViT-H/14 at 224": ("peco_vith14", 128),
    "ViT-L/16 at 224": ("peco_vitl16", 256),
    "ViT-B/16 at 224": ("peco_vitb16", 512),
    "ViT-H/14 at 448": ("peco_vith14", 32, "model.image_px=448", "mask.count=300"),
}


def test_the_predictions_in_the_docs_are_the_planners():
    text = (Path(__file__).parents[1] / "docs" / "speed.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ViT-")]
    assert {row[0] for row in rows} == set(SHAPES)
    for name, micro_batch, *cells, _bar in rows:
        recipe, size, *more = SHAPES[name]
        assert int(micro_batch) == size
        for form, cell in zip(("triton", "unfused", "efficient"), cells):
            made = estimated(HARDWARE["h200"], form, recipe, size, *more)
            found = [made.computed_images_s(pace) for pace in ("typical", "fast")]
            assert [int(value) for value in cell.split(",")] == [round(value) for value in found], (name, form)
