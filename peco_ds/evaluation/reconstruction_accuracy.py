"""What a classifier makes of a tokenizer's reconstructions, beside what it makes of the originals.

PeCo's measure of what codes keep: top-1 of a supervised classifier that has never seen a reconstruction.
"""

from __future__ import annotations

import torch

from peco_ds.evaluation.classification import ClassificationSums, accuracy_of
from peco_ds.evaluation.forward import ForwardSettings, in_precision
from peco_ds.evaluation.pixel_classifier import PixelClassifier


class ReconstructionAccuracy:
    """Accuracy on originals and on reconstructions, both seen in the same way, summed over a rank's images.

    Args:
        classifier: on the device.
    Source: PeCo (arXiv 2111.12710), table 4, where the classifier is DeiT-T.
    """

    def __init__(
        self, classifier: PixelClassifier, how: ForwardSettings, num_classes: int, device: torch.device
    ) -> None:
        self._facts = {"source": classifier.source, "image_px": classifier.image_px}
        self._device = device
        self._forward = in_precision(classifier, how.precision, device)
        self._originals, self._reconstructions = (ClassificationSums(num_classes, device) for _ in range(2))

    @torch.no_grad()
    def add(self, originals_01: torch.Tensor, reconstructions_11: torch.Tensor, labels: torch.Tensor) -> None:
        """
        Args:
            originals_01: [b, 3, S, S] in [0, 1].  reconstructions_11: about [-1, 1]; cut off to it.
            labels: int64 [b]; -1: the row only fills up the batch and is not counted.
        """
        labels = labels.to(self._device)
        self._originals.add(self._forward(originals_01), labels)
        self._reconstructions.add(self._forward((reconstructions_11.float() / 2 + 0.5).clamp(0, 1)), labels)

    def result(self) -> dict:
        """source and image_px of the classifier, `originals` and `reconstructions` {top1, top5} in percent, images.

        Collective.
        """
        originals, reconstructions = self._originals.result(), self._reconstructions.result()
        return {
            **self._facts,
            "originals": accuracy_of(originals),
            "reconstructions": accuracy_of(reconstructions),
            "images": originals["images"],
        }


def reading_line(result: dict) -> str:
    """A `ReconstructionAccuracy.result` as a few words."""
    return (
        f"read by {result['source']}: top-1 {result['reconstructions']['top1']:.2f} "
        f"of {result['originals']['top1']:.2f} on the originals"
    )
