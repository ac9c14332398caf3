"""What a training needs of the planner while it runs: the two numbers of its model FLOP utilisation (MFU)."""

from __future__ import annotations

from peco_ds.config import Recipe
from peco_ds.planner.hardware import hardware_of_device
from peco_ds.planner.stages import IMAGENET_1K_CLASSES, stage_of


def training_flops(recipe: Recipe, num_classes: int = IMAGENET_1K_CLASSES) -> float:
    """FLOP of one image, forward and backward, as `Stage.model_flops` counts them.

    Args:
        recipe: of a training stage.  num_classes: of a fine-tuning or a detector.
    """
    return stage_of(recipe, num_classes=num_classes).model_flops


def peak_flops(device_name: str, precision: str) -> float:
    """Dense FLOP/s of one GPU by its data sheet; 0 for one that the catalogue does not know.

    Args:
        device_name: what `torch.cuda.get_device_name()` says.  precision: bf16, fp16 or fp32.
    """
    machine = hardware_of_device(device_name)
    return machine.peak_flops[precision] if machine else 0.0
