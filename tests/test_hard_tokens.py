"""Cross-entropy on codes against its formula in NumPy, value and gradient, in one branch and two, with places that only
fill a row up.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from peco_ds.config import ObjectiveSettings
from peco_ds.objectives import build_objective
from peco_ds.schema import IGNORED

B, M, V = 3, 5, 7


def reference(logits: np.ndarray, codes: np.ndarray) -> tuple[float, np.ndarray, float]:
    """Mean of -log softmax at the codes over the places that count, its gradient, and the share of codes that are the
    likeliest.
    """
    counts = codes != IGNORED
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    losses, gradient = [], np.zeros_like(logits)
    for place in np.argwhere(counts):
        b, m = place
        losses.append(-np.log(probs[b, m, codes[b, m]]))
        gradient[b, m] = probs[b, m]
        gradient[b, m, codes[b, m]] -= 1
    return float(np.mean(losses)), gradient / counts.sum(), float((logits.argmax(-1) == codes)[counts].mean())


def drawn(ignored: bool):
    draw = np.random.default_rng(0)
    codes = draw.integers(V, size=(B, M))
    if ignored:
        codes[0, 3:] = codes[2, 1:] = IGNORED
    return draw.normal(size=(B, M, V)), draw.normal(size=(B, M, V)), codes


def computed(codes: np.ndarray, *branches: np.ndarray):
    logits = [torch.tensor(branch, requires_grad=True) for branch in branches]
    outputs = SimpleNamespace(logits=logits[0], features=None, aggregated_logits=logits[1] if len(logits) > 1 else None)
    loss, stats = build_objective(ObjectiveSettings())(outputs, SimpleNamespace(codes=torch.from_numpy(codes)))
    loss.backward()
    return (
        loss.item(),
        [branch.grad.numpy() for branch in logits],
        {name: value.item() for name, value in stats.items()},
    )


@pytest.mark.parametrize("ignored", (False, True))
def test_the_loss_is_the_mean_cross_entropy_of_the_places_that_count(ignored):
    logits, _, codes = drawn(ignored)
    expected, gradient, accuracy = reference(logits, codes)
    loss, (found,), stats = computed(codes, logits)
    assert loss == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(found, gradient, atol=1e-7)
    assert stats == {"accuracy": pytest.approx(accuracy)}


@pytest.mark.parametrize("ignored", (False, True))
def test_two_branches_are_summed_and_reported_one_by_one(ignored):
    first, second, codes = drawn(ignored)
    (loss_1, gradient_1, accuracy_1), (loss_2, gradient_2, accuracy_2) = (
        reference(first, codes),
        reference(second, codes),
    )
    loss, found, stats = computed(codes, first, second)
    assert loss == pytest.approx(loss_1 + loss_2, rel=1e-6)
    np.testing.assert_allclose(found[0], gradient_1, atol=1e-7)
    np.testing.assert_allclose(found[1], gradient_2, atol=1e-7)
    assert stats == pytest.approx(
        {"accuracy": accuracy_1, "aggregated_accuracy": accuracy_2, "mim_loss": loss_1, "aggregated_loss": loss_2},
        rel=1e-6,
    )
