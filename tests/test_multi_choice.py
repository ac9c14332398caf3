"""mc-BEiT's targets and loss against the formula in NumPy on random input: value, and gradient by central
differences.
"""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peco_ds.config import (
    AggregationSettings,
    MaskSettings,
    ModelSettings,
    ObjectiveSettings,
    PretrainRecipe,
    ViewSettings,
)
from peco_ds.costs import FLOPS_PER_MAC
from peco_ds.objectives import build_objective, multi_choice
from peco_ds.planner.shapes import objective_cost
from peco_ds.planner.work import pretrain_segments
from peco_ds.schema import IGNORED

B, N, M, V, D, T = 3, 6, 4, 9, 5, 3


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def choices(topk_codes, topk_probs, rest) -> np.ndarray:
    q = np.zeros((B, N, V))
    for b, n in product(range(B), range(N)):
        mass = topk_probs[b, n].sum()
        if rest == "uniform":
            q[b, n] = (1 - mass) / (V - T)
        for code, prob in zip(topk_codes[b, n], topk_probs[b, n]):
            q[b, n, code] = prob if rest == "uniform" else prob / mass
    return q


def targets_of(features, q, settings) -> np.ndarray:
    f = features[:, 1:] / np.linalg.norm(features[:, 1:], axis=-1, keepdims=True)
    w = softmax(f @ f.transpose(0, 2, 1) / settings.similarity_temperature)
    return settings.omega * (w @ q) + (1 - settings.omega) * q


def reference(branches, features, constant_features, batch, settings) -> float:
    """-sum t log softmax(prediction) over the places that count.

    `constant_features` are those from which no gradient comes.
    """
    q = choices(batch.topk_codes, batch.topk_probs, settings.rest)
    t = targets_of(features if settings.similarity_gradient else constant_features, q, settings)
    total, places = 0.0, [(b, m) for b in range(B) for m in range(M) if batch.codes[b, m] != IGNORED]
    for logits in branches:
        log_probs = np.log(softmax(logits))
        total += np.mean([-(t[b, batch.masked[b, m]] * log_probs[b, m]).sum() for b, m in places])
    return total


def slope(function, at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    found = np.zeros_like(at)
    for place in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        found[place] = (function(up) - function(down)) / (2 * step)
    return found


def drawn():
    draw = np.random.default_rng(0)
    probs = softmax(2 * draw.normal(size=(B, N, V)))
    topk_codes = np.argsort(-probs, axis=-1)[..., :T]
    masked = np.stack([np.sort(draw.permutation(N)[:M]) for _ in range(B)])
    codes = np.take_along_axis(topk_codes[..., 0], masked, 1)
    # the second image has one masked patch less
    masked[1, 2:], codes[1, 3:] = masked[1, 2], IGNORED
    batch = SimpleNamespace(
        codes=codes, masked=masked, topk_codes=topk_codes, topk_probs=np.take_along_axis(probs, topk_codes, -1)
    )
    return draw.normal(size=(2, B, M, V)), draw.normal(size=(B, 1 + N, D)), batch


def computed(branches, features, batch, settings):
    logits = [torch.tensor(branch, requires_grad=True) for branch in branches]
    given = torch.tensor(features, requires_grad=True)
    outputs = SimpleNamespace(
        logits=logits[0], features=given, aggregated_logits=logits[1] if len(logits) > 1 else None
    )
    loss, stats = build_objective(settings)(
        outputs, SimpleNamespace(**{name: torch.from_numpy(value) for name, value in vars(batch).items()})
    )
    loss.backward()
    return loss, logits, given, stats


OPTIONS = [
    dict(omega=omega, similarity_temperature=tau, similarity_gradient=gradient, rest=rest)
    for omega, tau, gradient, rest in [
        (0.2, 1.0, True, "renormalize"),
        (0.2, 1.0, False, "renormalize"),
        (0.7, 0.1, True, "uniform"),
        (0.7, 0.1, False, "uniform"),
        (0.0, 1.0, True, "uniform"),
        (1.0, 0.5, True, "renormalize"),
    ]
]


@pytest.mark.parametrize("branches", (1, 2))
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_loss_and_gradient_are_the_formulas(options, branches):
    settings = ObjectiveSettings(name="multi_choice", num_codes=V, **options)
    logits, features, batch = drawn()
    logits = logits[:branches]
    loss, found_logits, found_features, stats = computed(logits, features, batch, settings)
    # float32 inside: 1e-6 of values near 1
    assert loss.item() == pytest.approx(reference(logits, features, features, batch, settings), rel=2e-6)
    for number, found in enumerate(found_logits):

        def of_branch(branch, number=number):
            replaced = [branch if i == number else other for i, other in enumerate(logits)]
            return reference(replaced, features, features, batch, settings)

        expected = slope(of_branch, logits[number])
        np.testing.assert_allclose(found.grad.numpy(), expected, atol=2e-7)
    expected = slope(lambda moved: reference(logits, moved, features, batch, settings), features)
    found = found_features.grad.numpy() if found_features.grad is not None else np.zeros_like(features)
    np.testing.assert_allclose(found, expected, atol=2e-7)
    assert settings.similarity_gradient == bool(found.any()) or settings.omega == 0
    assert not found[:, 0].any(), "the class token is no patch"


def test_what_is_reported_is_accuracy_by_the_hard_code_and_the_mass_that_was_kept():
    logits, features, batch = drawn()
    logits[0][0, 0, batch.codes[0, 0]] = 99
    _, _, _, stats = computed(logits, features, batch, ObjectiveSettings(name="multi_choice", num_codes=V))
    counted = batch.codes != IGNORED
    for name, branch in (("accuracy", logits[0]), ("aggregated_accuracy", logits[1])):
        assert stats[name].item() == pytest.approx((branch.argmax(-1) == batch.codes)[counted].mean())
    assert stats["accuracy"].item() > 0
    assert stats["kept_mass"].item() == pytest.approx(batch.topk_probs.sum(-1).mean())


def test_dividing_the_images_into_blocks_changes_neither_loss_nor_gradient(monkeypatch):
    settings = ObjectiveSettings(name="multi_choice", num_codes=V, omega=0.6, rest="uniform")
    logits, features, batch = drawn()
    results = []
    # all three images at once, one by one, two and one
    for elements in (2**26, 1, 2 * N * V):
        monkeypatch.setattr(multi_choice, "BLOCK_ELEMENTS", elements)
        loss, branches, given, _ = computed(logits, features, batch, settings)
        results.append([loss.detach(), given.grad, *(branch.grad for branch in branches)])
    for other in results[1:]:
        for ours, theirs in zip(results[0], other):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rest", ("renormalize", "uniform"))
def test_choices_are_probabilities_even_where_sixteen_bits_kept_more_than_one(rest):
    codes = torch.arange(V).expand(1, 2, V)
    probs = torch.full((1, 2, V), 1 / V).half().float() * 1.001
    for kept in (V, V - 1):  # every code, and all but one
        found = multi_choice.dense_choices(codes[..., :kept], probs[..., :kept] * V / kept, V, rest)
        torch.testing.assert_close(found.sum(-1), torch.ones(1, 2))
        assert (found >= 0).all()


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("branches", [1, 2])
def test_products_of_the_objective_are_those_that_a_counter_sees_and_the_planner_reckons(branches, gradient):
    batch, masked, width, codes, topk = 2, 12, 48, 64, 8
    recipe = PretrainRecipe(
        model=ModelSettings(image_px=64, patch_px=8, width=width, depth=2, heads=3),
        aggregation=AggregationSettings(early_block=branches - 1),
        mask=MaskSettings(count=masked),
        objective=ObjectiveSettings(name="multi_choice", num_codes=codes, similarity_gradient=gradient),
        views=ViewSettings(topk=topk),
    )
    torch.manual_seed(0)
    features = torch.randn(batch, 65, width, requires_grad=True)
    logits = [torch.randn(batch, masked, codes, requires_grad=True) for _ in range(branches)]
    outputs = SimpleNamespace(logits=logits[0], features=features, aggregated_logits=(*logits, None)[1])
    likeliest = torch.rand(batch, 64, codes).softmax(dim=-1).topk(topk)
    targets = SimpleNamespace(
        codes=torch.randint(codes, (batch, masked)),
        masked=torch.stack([torch.randperm(64)[:masked] for _ in range(batch)]),
        topk_codes=likeliest.indices,
        topk_probs=likeliest.values,
    )
    with FlopCounterMode(display=False) as forward:
        loss, _ = build_objective(recipe.objective)(outputs, targets)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    cost = objective_cost(recipe)
    assert forward.get_total_flops() == batch * FLOPS_PER_MAC * cost.forward_macs
    assert backward.get_total_flops() == batch * FLOPS_PER_MAC * (cost.backward_macs + cost.recomputed_macs)
    reckoned = next(segment for segment in pretrain_segments(recipe) if segment.name == "objective")
    assert batch * reckoned.forward.flops == forward.get_total_flops()
    assert batch * reckoned.backward.flops == backward.get_total_flops()
    assert reckoned.model_flops == cost.model_flops < reckoned.forward.flops + reckoned.backward.flops
