"""The fine-tuned model: timm's `Beit` with a bias table in every block, mean pooling, and a linear head.

Its parameters have timm's names, so a release renames nothing.
"""

from __future__ import annotations

import torch
from timm.models.beit import Beit

from peco_ds.config import ClassifierSettings, ModelSettings
from peco_ds.models.vit import (
    ActivationCheckpointing,
    build_blocks,
    init_as_beit_fine_tunes,
    patches_of,
    run_blocks,
    timm_arguments,
    with_class_token,
)


class Classifier(Beit):
    """images_norm [B, 3, S, S] -> logits [B, C]; images are cast to the parameters' dtype here."""

    def forward(self, images_norm: torch.Tensor) -> torch.Tensor:
        tokens = with_class_token(self, patches_of(self, images_norm))
        return self.forward_head(self.norm(run_blocks(self.blocks, tokens)))


def build_classifier(
    settings: ModelSettings,
    classifier: ClassifierSettings,
    num_classes: int,
    *,
    activation_checkpointing: ActivationCheckpointing = "none",
) -> Classifier:
    """A freshly initialised classifier.

    Args:
        activation_checkpointing: of each block in the backward pass.
    Source: BEiT (arXiv 2106.08254) and its released `modeling_finetune.py`: mean over patches, LayerNorm, initial
        weights wider than in pre-training, head weights scaled down.
    """
    model = Classifier(
        **timm_arguments(settings, shared_bias=False, num_classes=num_classes, pooling=classifier.pooling)
        | {"depth": 0}
    )
    model.blocks = build_blocks(settings, own_bias=True, activation_checkpointing=activation_checkpointing)
    init_as_beit_fine_tunes(model, settings.init_std)
    with torch.no_grad():
        model.head.weight.mul_(classifier.head_scale)
    return model
