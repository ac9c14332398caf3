"""Adversarial robustness of a classifier: its accuracy on images that were changed a little, against it.

The attacks know the classifier (white box), want any wrong answer (untargeted), and change every pixel value by at most
epsilon. They start from the image itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from peco_ds.evaluation.classification import ClassificationSums, accuracy_of

Attack = Literal["bim", "mim"]
ATTACKS: tuple[Attack, ...] = get_args(Attack)
# Share of the momentum that is kept in a step.
DECAY = 1.0
# Kept away from 0, where the gradient of an image that only fills up a batch lies.
_LEAST_NORM = 1e-30


@dataclass(frozen=True)
class AttackSettings:
    """An attack by signs of gradients.

    bim: basic iterative method, by the gradient's signs (Kurakin et al., arXiv 1607.02533).
    mim: momentum iterative method, by the signs of the gradients' running sum, each divided by its mean absolute value
    (Dong et al., arXiv 1710.06081, decay 1).
    """

    attack: Attack
    # The most that a pixel value in [0, 1] is changed by.
    epsilon: float
    steps: int
    # What a step changes a pixel value by.
    step_size: float


def default_step_size(attack: Attack, epsilon: float, steps: int) -> float:
    """Change of a pixel value in one step.

    mim: epsilon / steps, its paper's. bim: 2.5 epsilon / steps (Madry et al., arXiv 1706.06083), so that a pixel can
    cross the whole ball and still be corrected: at epsilon / steps only a pixel whose sign never changes reaches the
    border, and bim's own 1/255 is half of a ball of 2/255, too coarse to settle.
    """
    return (2.5 if attack == "bim" else 1.0) * epsilon / steps


def attacked(
    forward: Callable[[torch.Tensor], torch.Tensor],
    images_01: torch.Tensor,
    labels: torch.Tensor,
    settings: AttackSettings,
) -> torch.Tensor:
    """The last iterate of the attack.

    Every iterate lies within epsilon of the image and in [0, 1].

    Args:
        forward: images_01 [B, 3, S, S] -> logits [B, C]; differentiable, the same whatever the other images.
        images_01: in [0, 1].
        labels: int64 [B], the true ones; -1: the row stays as it is.
    Returns: [B, 3, S, S] without gradient.
    """
    lowest, highest = (images_01 - settings.epsilon).clamp_min(0), (images_01 + settings.epsilon).clamp_max(1)
    found, momentum = images_01.detach(), torch.zeros_like(images_01)
    for _ in range(settings.steps):
        found.requires_grad_(True)
        with torch.enable_grad():
            # Summed, so that no image's gradient depends on the size of the batch.
            loss = F.cross_entropy(forward(found).float(), labels, ignore_index=-1, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, found)
        if settings.attack == "mim":
            norm = gradient.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(_LEAST_NORM)
            gradient = momentum = DECAY * momentum + gradient / norm
        found = (found.detach() + settings.step_size * gradient.sign()).clamp(lowest, highest)
    return found


class RobustnessSums:
    """Accuracy of a classifier on images and on what an attack makes of them, summed over a rank's images.

    Args:
        forward: as `attacked` takes it.
    """

    def __init__(self, forward: Callable, settings: AttackSettings, num_classes: int, device: torch.device) -> None:
        self._forward, self._settings = forward, settings
        self._clean, self._robust = (ClassificationSums(num_classes, device) for _ in range(2))

    def add(self, images_01: torch.Tensor, labels: torch.Tensor) -> None:
        """
        Args:
            images_01: [B, 3, S, S].  labels: int64 [B]; -1: the row only fills the batch up and is not counted.
        """
        found = attacked(self._forward, images_01, labels, self._settings)
        with torch.no_grad():
            for sums, images in ((self._clean, images_01), (self._robust, found)):
                sums.add(self._forward(images), labels)

    def result(self) -> dict:
        """The settings, `clean` and `robust` {top1, top5} in percent, images. Collective."""
        clean, robust = self._clean.result(), self._robust.result()
        return {
            **asdict(self._settings),
            "judged": "the last iterate",
            "clean": accuracy_of(clean),
            "robust": accuracy_of(robust),
            "images": robust["images"],
        }


def robustness_line(result: dict) -> str:
    """A `RobustnessSums.result` as a few words."""
    return (
        f"{result['attack']} (epsilon {255 * result['epsilon']:g}/255, {result['steps']} steps): top-1 "
        f"{result['robust']['top1']:.2f} of {result['clean']['top1']:.2f}"
    )
