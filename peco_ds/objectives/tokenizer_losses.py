"""Losses of tokenizer training: pixels, commitment, perceptual distance, critic; a teacher's features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from peco_ds.config import AdversarialSettings, PerceptualSettings, TokenizerLossSettings, TokenizerRecipe
from peco_ds.registry import TOKENIZERS


def pixel_loss(reconstruction: torch.Tensor, target: torch.Tensor, kind: Literal["mse", "l1"]) -> torch.Tensor:
    """Mean squared or absolute difference over all values of two equal shapes; float32."""
    distance = {"mse": F.mse_loss, "l1": F.l1_loss}[kind]
    return distance(reconstruction.float(), target.float())


Normalization = Literal["channel", "layer", "none"]


def perceptual_loss(
    features_reconstruction: Sequence[torch.Tensor],
    features_target: Sequence[torch.Tensor],
    normalize: Normalization = "channel",
) -> torch.Tensor:
    """Sum over blocks of the squared difference of normalised features, each averaged over its values (C, H, W) and the
    batch.

    Args:
        features_reconstruction: one tensor [B, N, D] a block; the gradient goes here.
        features_target: same shapes; taken as constants.
        normalize: as `normalized`.
    Source: PeCo (arXiv 2111.12710), equation 5.
    """
    assert len(features_reconstruction) == len(features_target) > 0
    pairs = zip(features_reconstruction, features_target)
    return torch.stack(
        [F.mse_loss(normalized(mine, normalize), normalized(target.detach(), normalize)) for mine, target in pairs]
    ).sum()


def normalized(features: torch.Tensor, normalize: Normalization) -> torch.Tensor:
    """Features [..., D], normalised over their channels; float32.

    Args:
        normalize: channel: to length 1, as LPIPS does (arXiv 1801.03924). layer: to mean 0 and variance 1, as a layer
            norm without weights. none: as they are.
    """
    features = features.float()
    if normalize == "channel":
        return F.normalize(features, dim=-1, eps=1e-10)
    return F.layer_norm(features, features.shape[-1:]) if normalize == "layer" else features


def cosine_loss(features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over patches of 1 - cosine; float32.

    Args:
        features: [B, N, D]; the gradient goes here.  target: same shape; taken as constants.
    Source: BEiT v2 (arXiv 2208.06366).
    """
    assert features.shape == target.shape, f"features {tuple(features.shape)}, target {tuple(target.shape)}"
    cosines = F.normalize(features.float(), dim=-1) * F.normalize(target.detach().float(), dim=-1)
    return 1 - cosines.sum(dim=-1).mean()


def hinge_losses(
    real: torch.Tensor, fake_detached: torch.Tensor, fake: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Critic's and generator's loss from one forward, for one backward.

    Args:
        real, fake_detached, fake: logits of any equal shape, as `CriticLogits` of critic.py describes them.
    Returns:
        critic: half the hinge loss of telling real from fake.
        generator: `fake_detached.mean() - fake.mean()`. Its value is zero; its gradient is that of `-fake.mean()` for
            the reconstruction and cancels for the critic's weights.
    Source: hinge loss of arXiv 1705.02894, halved as in VQGAN (arXiv 2012.09841).
    """
    real, fake_detached, fake = real.float(), fake_detached.float(), fake.float()
    critic = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake_detached).mean())
    return critic, fake_detached.mean() - fake.mean()


def tokenizer_loss(
    output,
    images_11: torch.Tensor,
    *,
    settings: TokenizerLossSettings,
    features_reconstruction: Sequence[torch.Tensor] = (),
    features_target: Sequence[torch.Tensor] = (),
    perceptual_weight: float = 0.0,
    normalize: Normalization = "channel",
    critic_logits=None,
    adversarial_weight: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of what a recipe switched on.

    Args:
        output: has `.reconstruction` [B, 3, H, W] and `.commitment`, a scalar.  images_11: [B, 3, H, W] in [-1, 1].
        features_reconstruction, features_target: of the frozen judge, one [B, N, D] a block; empty without a judge.
        normalize: as `perceptual_loss`.
        critic_logits: has `.real`, `.fake_detached`, `.fake`; None without a critic. The critic learns from the first
            step, whatever adversarial_weight is; the tokenizer feels it with that weight, 0 before the step from which
            it is wanted.
    Returns: scalar loss, and detached unweighted scalars on the device: pixel, commitment, and where present
        perceptual, critic, generator (`-fake.mean()`).
    """
    pixel = pixel_loss(output.reconstruction, images_11, settings.pixel)
    commitment = output.commitment.float()
    loss = settings.pixel_weight * pixel + settings.commitment_weight * commitment
    stats = {"pixel": pixel.detach(), "commitment": commitment.detach()}
    if len(features_reconstruction) > 0:
        perceptual = perceptual_loss(features_reconstruction, features_target, normalize)
        loss = loss + perceptual_weight * perceptual
        stats["perceptual"] = perceptual.detach()
    if critic_logits is not None:
        critic, generator = hinge_losses(critic_logits.real, critic_logits.fake_detached, critic_logits.fake)
        loss = loss + critic + adversarial_weight * generator
        stats["critic"] = critic.detach()
        stats["generator"] = -critic_logits.fake.detach().float().mean()
    return loss, stats


class TokenizerObjective:
    """What a recipe asks of a tokenizer, as one function of an engine's output.

    Args:
        judge: frozen network with `.features(images_01, blocks)`, or None for a tokenizer without perceptual loss.
    """

    def __init__(
        self, loss: TokenizerLossSettings, perceptual: PerceptualSettings, adversarial: AdversarialSettings, judge=None
    ) -> None:
        self._loss, self._perceptual, self._adversarial, self._judge = loss, perceptual, adversarial, judge

    def __call__(self, outputs, images_11: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            outputs: TokenizerOutput, or with a critic TokenizerWithCriticOutput.  images_11: [B, 3, H, W] in [-1, 1].
            step: optimiser steps done; the critic's pull begins at adversarial.start_step.
        Returns: as `tokenizer_loss`.
        """
        output = getattr(outputs, "tokenizer", outputs)
        mine = target = ()
        if self._judge is not None:
            mine = self._judge.features(output.reconstruction / 2 + 0.5, self._perceptual.blocks)
            with torch.no_grad():
                target = self._judge.features(images_11 / 2 + 0.5, self._perceptual.blocks)
        return tokenizer_loss(
            output,
            images_11,
            settings=self._loss,
            features_reconstruction=mine,
            features_target=target,
            perceptual_weight=self._perceptual.weight,
            normalize=self._perceptual.normalize,
            critic_logits=getattr(outputs, "logits", None),
            adversarial_weight=self._adversarial.weight if step >= self._adversarial.start_step else 0.0,
        )


class DistillationObjective:
    """1 - cosine to a teacher's features, and commitment.

    Args:
        teacher: frozen network with `.targets(images_01) -> [B, N, D]`.
    """

    def __init__(self, loss: TokenizerLossSettings, teacher) -> None:
        self._loss, self._teacher = loss, teacher

    def __call__(self, outputs, images_11: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            outputs: has `.features` [B, N, D] and `.commitment`, a scalar.
            images_11: [B, 3, H, W] in [-1, 1].
            step: of no effect.
        Returns: scalar loss, and detached unweighted scalars on the device: cosine, commitment.
        """
        with torch.no_grad():
            target = self._teacher.targets(images_11 / 2 + 0.5)
        distance, commitment = cosine_loss(outputs.features, target), outputs.commitment.float()
        loss = distance + self._loss.commitment_weight * commitment
        return loss, {"cosine": 1 - distance.detach(), "commitment": commitment.detach()}


def build_tokenizer_objective(recipe: TokenizerRecipe, frozen) -> Callable:
    """The objective of the recipe's kind of tokenizer: `objective(outputs, images_11, step) -> loss, stats`.

    Args:
        frozen: what `load_frozen_net` gave for the recipe, on the device.
    """
    kind = TOKENIZERS[recipe.tokenizer.kind]
    if kind.objective is not None:
        return kind.objective(recipe, frozen)
    if kind.learns_from == "teacher":
        return DistillationObjective(recipe.loss, frozen)
    return TokenizerObjective(recipe.loss, recipe.perceptual, recipe.adversarial, frozen)
