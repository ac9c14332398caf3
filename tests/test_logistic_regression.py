"""Logistic regressions are solved: no gradient is left, and SciPy finds no lower loss."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp

from peco_ds.evaluation import logistic_regression as module
from peco_ds.evaluation.linear_probes import linear_accuracy
from peco_ds.evaluation.logistic_regression import logistic_regressions

CPU = torch.device("cpu")
CLASSES, WIDTH = 4, 12
PENALTIES = (1.0, 1e-2, 1e-4, 1e-6)


def rows(features):
    return lambda index: features[index]


def clouds(number, seed):
    """Points around four centres, on axes whose scales differ by six orders of magnitude; the last axis is constant."""
    generator = torch.Generator().manual_seed(0)
    centres, scales = torch.randn(CLASSES, WIDTH, generator=generator), 10.0 ** torch.linspace(-3, 3, WIDTH)
    generator.manual_seed(seed)
    labels = torch.randint(CLASSES, (number,), generator=generator)
    points = (centres[labels] + torch.randn(number, WIDTH, generator=generator)) * scales + 5
    return torch.cat([points, torch.full((number, 1), 7.3)], dim=1), labels


def solved(number, penalties=PENALTIES):
    features, labels = clouds(number, 1)
    return logistic_regressions(rows(features), labels, penalties, num_classes=CLASSES, device=CPU)


def loss_and_gradient(flat, unit, truth, penalty):
    weight, bias = flat[: CLASSES * (WIDTH + 1)].reshape(CLASSES, -1), flat[CLASSES * (WIDTH + 1) :]
    logits = unit @ weight.T + bias
    shares = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
    loss = -np.log(shares[np.arange(len(truth)), truth]).mean() + penalty / 2 * np.square(weight).sum()
    shares[np.arange(len(truth)), truth] -= 1
    shares /= len(truth)
    return loss, np.concatenate([(shares.T @ unit + penalty * weight).ravel(), shares.sum(axis=0)])


@pytest.mark.parametrize(("number", "widest_rotated"), ((30, 2048), (600, 2048), (600, 0)))
def test_every_penalty_is_at_its_minimum(monkeypatch, number, widest_rotated):
    monkeypatch.setattr(module, "WIDEST_ROTATED", widest_rotated)
    features, labels = clouds(number, 1)
    found = solved(number)
    unit = ((features - found.mean) * found.scale).double().numpy()
    for place, penalty in enumerate(PENALTIES):
        flat = torch.cat([found.weight[place].flatten(), found.bias[place]]).double().numpy()
        loss, _ = loss_and_gradient(flat, unit, labels.numpy(), penalty)
        best = minimize(
            loss_and_gradient,
            np.zeros_like(flat),
            (unit, labels.numpy(), penalty),
            jac=True,
            options={"maxiter": 3000, "gtol": 1e-9},
        )
        assert loss - best.fun < 2e-4


def test_a_penalty_is_solved_alike_alone_and_after_stronger_ones():
    together, alone = solved(600, (1e-1, 1e-3)), solved(600, (1e-3,))
    torch.testing.assert_close(together.weight[1], alone.weight[0], rtol=0, atol=5e-3)


def test_directions_of_little_variance_are_used_as_fully_as_others():
    """Two features that nearly agree: only their difference, a ten-thousandth of them, tells the classes apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    common = torch.randn(400, 1, generator=generator)
    features = torch.cat([common, common + 1e-4 * (2 * labels[:, None] - 1)], dim=1)
    found = logistic_regressions(rows(features), labels, (1e-2, 1e-10), num_classes=2, device=CPU)
    assert [row["top1"] > 99 for row in linear_accuracy(found, rows(features), labels)] == [False, True]


def test_the_same_bits_come_out_again_and_features_need_not_be_kept(monkeypatch):
    first, again = solved(600), solved(600)
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    torch.testing.assert_close(solved(600).weight, first.weight, rtol=0, atol=0)


def test_unseen_points_are_classified_and_a_constant_feature_says_nothing():
    found = solved(600)
    torch.testing.assert_close(found.weight[:, :, -1], torch.zeros(len(PENALTIES), CLASSES), rtol=0, atol=1e-6)
    accuracies = linear_accuracy(found, rows(clouds(400, 2)[0]), clouds(400, 2)[1])
    assert max(row["top1"] for row in accuracies) > 80 and all(row["top5"] == 100 for row in accuracies)
