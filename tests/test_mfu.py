"""The two numbers of a run's MFU."""

from __future__ import annotations

import pytest

from peco_ds.config import FinetuneRecipe
from peco_ds.planner.mfu import peak_flops, training_flops
from peco_ds.planner.stages import Stage
from peco_ds.recipe_files import load_recipe


@pytest.mark.parametrize(
    "device, precision, peak",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA H100 PCIe", "fp32", 66.9e12),
        ("AMD Instinct MI300X", "bf16", 0.0),
    ],
)
def test_the_peak_of_a_device_is_its_data_sheets_and_0_where_none_is_known(device, precision, peak):
    assert peak_flops(device, precision) == peak


def test_a_classifier_of_more_classes_has_more_flop():
    recipe = load_recipe(FinetuneRecipe, "finetune_vitb16", []).recipe
    few, many = training_flops(recipe, 10), training_flops(recipe, 10_000)
    assert many - few == pytest.approx(6 * 9_990 * recipe.model.width, rel=1e-3)
    assert many == Stage("fine-tuning", recipe, num_classes=10_000).model_flops
