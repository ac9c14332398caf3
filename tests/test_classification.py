from typing import NamedTuple

import pytest
import torch

from peco_ds.errors import UserError
from peco_ds.evaluation.classification import classification_quality


class Batch(NamedTuple):
    images_norm: torch.Tensor
    labels: torch.Tensor


def naive(logits, labels, k):
    ranked = logits.argsort(dim=1, descending=True)[:, :k]
    return 100 * float((ranked == labels[:, None]).any(dim=1).float().mean())


@pytest.mark.parametrize("num_classes", (3, 9))
def test_top1_and_top5_are_counted_over_all_batches_and_padding_is_not(num_classes):
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(23, num_classes, generator=draw), torch.randint(num_classes, (23,), generator=draw)
    filled = [torch.cat([logits, 100 * torch.ones(1, num_classes)]), torch.cat([labels, torch.tensor([-1])])]
    batches = [Batch(*(part[i : i + 6] for part in filled)) for i in range(0, 24, 6)] + [
        Batch(torch.zeros(6, num_classes), torch.full((6,), -1))
    ]
    quality = classification_quality(
        lambda images: images, batches, num_classes=num_classes, device=torch.device("cpu")
    )
    assert quality["images"] == 23
    expected = (naive(logits, labels, 1), naive(logits, labels, min(5, num_classes)))
    assert (quality["top1"], quality["top5"]) == pytest.approx(expected, abs=1e-4)
    assert quality["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_score(value):
    """The highest of them would be class 0, and its share of the images the top-1."""
    logits = torch.zeros(8, 4)
    logits[5, 2] = value
    batches = [Batch(logits, torch.tensor([0, 0, 0, 0, 1, 2, 3, -1]))]
    with pytest.raises(UserError, match="not finite .*no score"):
        classification_quality(lambda images: images, batches, num_classes=4, device=torch.device("cpu"))
    logits[5, 2], logits[7] = 0.0, value
    found = classification_quality(lambda images: images, batches, num_classes=4, device=torch.device("cpu"))
    assert found["images"] == 7, "a row that only fills the batch up is not looked at"
