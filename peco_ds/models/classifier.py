"""The fine-tuned model: timm's `Beit` with a bias table in every block, mean pooling, and a linear head. Its parameters carry timm's names, so a release is no
renaming at all."""

from __future__ import annotations

import torch
from timm.models.beit import Beit

from peco_ds.config import ClassifierSettings, ModelSettings
from peco_ds.models.vit import init_as_beit, timm_arguments, trunc_normal


class Classifier(Beit):
    """images_norm [B, 3, S, S] -> logits [B, C]; pictures are cast to the parameters' dtype here."""

    def forward(self, images_norm: torch.Tensor) -> torch.Tensor:
        return super().forward(images_norm.to(self.cls_token.dtype))


def build_classifier(settings: ModelSettings, classifier: ClassifierSettings, num_classes: int, *, checkpoint_blocks: bool = False) -> Classifier:
    """A freshly initialised classifier.

    Args:
        checkpoint_blocks: recompute each block in the backward pass.
    Source: BEiT (arXiv 2106.08254) and its released `modeling_finetune.py`: mean over patches, LayerNorm, head weights scaled down.
    """
    model = Classifier(**timm_arguments(settings, shared_bias=False, num_classes=num_classes, pooling=classifier.pooling))
    init_as_beit(model, settings.init_std)
    with torch.no_grad():
        trunc_normal(model.head.weight, settings.init_std)
        model.head.weight.mul_(classifier.head_scale)
    model.set_grad_checkpointing(checkpoint_blocks)
    return model
