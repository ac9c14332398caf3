from __future__ import annotations

import numpy as np
import pytest
import torch

from peco_ds.models import vq
from peco_ds.models.vq import Codebook, usage
from peco_ds.schema import NO_CODE


def features_of(seed: int, batch: int = 4, dim: int = 6, side: int = 5) -> torch.Tensor:
    return torch.randn(batch, dim, side, side, generator=torch.Generator().manual_seed(seed))


def filled_codebook(num_codes: int = 12, dim: int = 6, **options) -> Codebook:
    codebook = Codebook(num_codes, dim, **options)
    codes = torch.randn(num_codes, dim, generator=torch.Generator().manual_seed(100))
    codes = torch.nn.functional.normalize(codes, dim=-1) if codebook.l2_normalized else codes
    codebook.codes.copy_(codes)
    codebook.ema_sum.copy_(codes)
    return codebook.train()


def rows_of(features: torch.Tensor) -> np.ndarray:
    return features.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, features.shape[1])


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("l2_normalized", [False, True])
def test_codes_commitment_and_gradient_follow_the_formula(l2_normalized):
    codebook = filled_codebook(l2_normalized=l2_normalized)
    features = features_of(0).requires_grad_()
    out = codebook(features)
    weights = features_of(1)
    ((out.quantized * weights).sum() + 3.0 * out.commitment).backward()

    raw, codes = rows_of(features), codebook.codes.double().numpy()
    rows = unit(raw) if l2_normalized else raw
    nearest = ((rows[:, None] - codes[None]) ** 2).sum(-1).argmin(-1)
    gradient = rows_of(weights) + 3.0 * 2 * (rows - codes[nearest]) / rows.size
    if l2_normalized:  # through x / |x|: (g - u (u g)) / |x|
        gradient = (gradient - rows * (rows * gradient).sum(-1, keepdims=True)) / np.linalg.norm(
            raw, axis=-1, keepdims=True
        )

    np.testing.assert_array_equal(out.codes.reshape(-1).numpy(), nearest)
    np.testing.assert_array_equal(rows_of(out.nearest), codes[nearest])
    np.testing.assert_array_equal(rows_of(out.quantized), codes[nearest])
    assert out.commitment.item() == pytest.approx(((rows - codes[nearest]) ** 2).mean(), rel=1e-5)
    np.testing.assert_allclose(rows_of(features.grad), gradient, rtol=1e-4, atol=1e-6)


def test_a_batch_larger_than_one_block_of_similarities_gets_the_same_codes_and_sums(monkeypatch):
    whole, cut = filled_codebook(), filled_codebook()
    features = features_of(2)
    expected = whole(features).codes
    monkeypatch.setattr(vq, "BLOCK_ELEMENTS", 12 * 7)  # seven rows at a time
    assert torch.equal(cut(features).codes, expected)
    whole.update()
    cut.update()
    torch.testing.assert_close(cut.codes, whole.codes)


@pytest.mark.parametrize("l2_normalized", [False, True])
def test_the_moving_average_follows_the_formula(l2_normalized):
    decay, eps = 0.9, 1e-3
    codebook = filled_codebook(l2_normalized=l2_normalized, decay=decay, count_eps=eps)
    codes = codebook.codes.double().numpy()
    count, total = np.ones(len(codes)), codes.copy()
    for step in range(3):
        features = features_of(step, batch=1, side=3)
        codebook(features)
        codebook.update()
        rows = unit(rows_of(features)) if l2_normalized else rows_of(features)
        nearest = ((rows[:, None] - codes[None]) ** 2).sum(-1).argmin(-1)
        hits = np.bincount(nearest, minlength=len(codes))
        sums = np.stack([rows[nearest == v].sum(0) for v in range(len(codes))])
        count, total = decay * count + (1 - decay) * hits, decay * total + (1 - decay) * sums
        smoothed = (count + eps) / (count.sum() + len(codes) * eps) * count.sum()
        renewed = total / smoothed[:, None]
        codes = np.where(hits[:, None] > 0, unit(renewed), codes) if l2_normalized else renewed
        np.testing.assert_allclose(codebook.codes.numpy(), codes, rtol=1e-4, atol=1e-6)


def test_the_average_of_directions_follows_the_released_formula():
    decay = 0.9
    codebook = filled_codebook(l2_normalized=True, average="directions", decay=decay)
    codes, rare = codebook.codes.double().numpy(), 0
    for step in range(6):
        features = features_of(step, batch=1, side=2)
        codebook(features)
        codebook.update()
        rows = unit(rows_of(features))
        nearest = (rows @ codes.T).argmax(-1)
        for code in set(nearest):
            chosen = rows[nearest == code]
            # however many chose it, and however long ago others did
            codes[code] = unit(decay * codes[code] + (1 - decay) * unit(chosen.mean(0)))
            rare += len(chosen) == 1
        np.testing.assert_allclose(codebook.codes.numpy(), codes, rtol=1e-4, atol=1e-6)
    assert rare > 0


def test_only_unit_codes_have_directions_to_average():
    with pytest.raises(AssertionError, match="unit codes"):
        Codebook(4, 2, average="directions")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"l2_normalized": True},
        {"l2_normalized": True, "average": "directions"},
        {"decay": 0.5, "revive_below": 4.0},
    ],
)
def test_the_update_does_not_depend_on_micro_batches_or_ranks(options):
    steps = [features_of(step, batch=4) for step in range(4)]
    whole, parts, ranks = (
        filled_codebook(**options),
        filled_codebook(**options),
        [filled_codebook(**options) for _ in range(2)],
    )
    plain = filled_codebook(**{**options, "revive_below": 0.0})
    for features in steps:
        whole(features)
        plain(features)
        for image in features.split(1):
            parts(image)
        for rank, share in zip(ranks, features.split(2)):
            for image in share.split(1):
                rank(image)
        whole.update()
        plain.update()
        parts.update()
        global_sums = ranks[0].pending + ranks[1].pending
        for rank in ranks:
            rank.update(lambda tensor: tensor.copy_(global_sums))
    assert torch.equal(whole.codes, plain.codes) == ("revive_below" not in options), "the case with revival must revive"
    assert torch.equal(ranks[0].codes, ranks[1].codes)
    for other in (parts, ranks[0]):
        torch.testing.assert_close(other.codes, whole.codes, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.ema_count, whole.ema_count)


def test_update_returns_how_often_each_code_was_chosen_and_starts_anew():
    codebook = filled_codebook()
    codes = torch.cat([codebook(features_of(seed)).codes.reshape(-1) for seed in (0, 1)])
    assert torch.equal(codebook.update(), torch.bincount(codes, minlength=12).float())
    assert codebook.update().sum() == 0


def test_evaluation_and_a_discarded_step_leave_no_trace():
    codebook = filled_codebook()
    before = {name: value.clone() for name, value in codebook.named_buffers()}
    codebook(torch.full((1, 6, 2, 2), float("nan")))
    assert codebook.update(applied=False).sum() == 0
    codebook.eval()(features_of(0))
    for name, value in codebook.named_buffers():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("l2_normalized", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_features_that_overflow_have_no_code_and_a_loss_that_the_step_is_skipped_for(l2_normalized, value):
    """1e30 is finite, its square is not, and what is divided by an infinite norm is as near to every unit code."""
    codebook, features = filled_codebook(l2_normalized=l2_normalized), features_of(0)
    expected = codebook.eval().nearest(features)
    features = features.detach().clone()
    features[0, :, 0, 0] = value
    if value != 1e30 or l2_normalized:
        for codes in (codebook.nearest(features), codebook.topk(features, 2)[0]):
            assert codes[0, 0] == NO_CODE and torch.equal(codes.flatten()[1:], expected.flatten()[1:])
    out = codebook.train()(features)
    assert not out.commitment.isfinite()
    before = codebook.codes.clone()
    codebook.update(applied=False)
    assert torch.equal(codebook.codes, before) and not codebook.pending.any()


def test_a_unit_code_that_nothing_chose_keeps_its_vector():
    codebook = filled_codebook(l2_normalized=True)
    far = -codebook.codes[0]
    before = codebook.codes.clone()
    for _ in range(3):
        codebook(far.view(1, -1, 1, 1).expand(1, -1, 4, 4))
        hits = codebook.update()
    assert torch.equal(codebook.codes[hits == 0], before[hits == 0])
    torch.testing.assert_close(codebook.codes.norm(dim=-1), torch.ones(12))


def test_revival_brings_a_collapsed_codebook_back_into_use():
    def used_after(revive_below: float) -> tuple[int, Codebook]:
        codebook = filled_codebook(num_codes=32, revive_below=revive_below, decay=0.9)
        codebook.codes[1:] += 1000.0  # out of reach: code 0 takes everything
        codebook.ema_sum.copy_(codebook.codes)
        for step in range(60):
            codebook(features_of(step))
            hits = codebook.update()
        return usage(hits)["codes_used"], codebook

    collapsed, _ = used_after(0.0)
    revived, codebook = used_after(0.5)
    assert collapsed == 1
    assert revived > 0.9 * 32
    assert codebook.codes.abs().max() < 10


def test_dead_codes_restart_exactly_at_different_encoder_outputs_of_the_step():
    codebook = filled_codebook(num_codes=40, revive_below=0.5)
    codebook.ema_count[8:] = 0.0
    codebook.codes[8:] = codebook.ema_sum[8:] = 1000.0
    # 50 rows for 40 slots: some slots hold one row, some several
    features = features_of(5, batch=2)
    codebook(features)
    codebook.update()
    revived = codebook.codes[codebook.codes[:, 0] < 500][8:]
    assert 1 < len(revived) < 32
    outputs = {tuple(row) for row in rows_of(features).tolist()}
    restarts = {tuple(row) for row in revived.double().tolist()}
    assert len(restarts) == len(revived) and restarts <= outputs


def test_the_choice_of_restarts_depends_on_the_seed_and_the_step():
    def restart(seed: int, step: int) -> torch.Tensor:
        codebook = filled_codebook(revive_below=0.5, seed=seed)
        codebook(features_of(4))
        codebook.update()
        codebook.num_updates.fill_(step)
        codebook.ema_count[3] = 0.0
        codebook(features_of(5))
        codebook.update()
        return codebook.codes[3]

    assert torch.equal(restart(0, 0), restart(0, 0))
    assert len({tuple(restart(seed, step).tolist()) for seed in range(3) for step in range(3)}) > 3


def quantisation_error(codebook: Codebook, rows: torch.Tensor) -> float:
    return codebook.eval()(rows.T.reshape(1, codebook.code_dim, -1, 1)).commitment.item()


@pytest.mark.parametrize("l2_normalized", [False, True])
def test_kmeans_lowers_the_quantisation_error_and_is_deterministic(l2_normalized):
    generator = torch.Generator().manual_seed(1)
    centres = 5 * torch.randn(8, 6, generator=generator)
    rows = centres[torch.randint(8, (800,), generator=generator)] + 0.3 * torch.randn(800, 6, generator=generator)
    errors, codes = [], []
    for iterations in (0, 1, 10, 10):
        codebook = Codebook(16, 6, l2_normalized=l2_normalized)
        codebook.init_kmeans(rows, iterations, torch.Generator().manual_seed(2))
        errors.append(quantisation_error(codebook, rows))
        codes.append(codebook.codes)
    assert errors[0] > errors[1] > errors[2]
    assert torch.equal(codes[2], codes[3])
    assert codebook.initialized == 1


def test_kmeans_with_fewer_vectors_than_codes_gives_distinct_codes_near_the_vectors():
    rows = features_of(7, batch=1, side=3).permute(0, 2, 3, 1).reshape(-1, 6)
    codebook = Codebook(50, 6)
    codebook.init_kmeans(rows, 5, torch.Generator().manual_seed(0))
    assert torch.isfinite(codebook.codes).all()
    assert len(torch.unique(codebook.codes, dim=0)) == 50
    assert torch.cdist(codebook.codes, rows).min(dim=1).values.max() < 0.5


def test_kmeans_gives_an_empty_cluster_a_new_start():
    rows = torch.cat([torch.zeros(99, 2), torch.tensor([[9.0, 9.0]])])
    codebook = Codebook(3, 2)
    codebook.init_kmeans(rows, 4, torch.Generator().manual_seed(0))
    assert torch.isfinite(codebook.codes).all()
    assert codebook.codes.abs().max() < 10


def test_buffers_stay_float32_when_the_module_is_cast():
    codebook = filled_codebook(revive_below=0.5)
    before = codebook.codes.clone()
    outer = torch.nn.Sequential(torch.nn.Conv2d(6, 6, 1), codebook)
    for cast in (outer.bfloat16, outer.half, lambda: outer.to(torch.bfloat16)):
        cast()
        assert {buffer.dtype for buffer in codebook.buffers() if buffer.is_floating_point()} == {torch.float32}
    assert torch.equal(codebook.codes, before)
    outer.bfloat16()
    out = outer(features_of(0).bfloat16())
    assert out.quantized.dtype == torch.bfloat16 and out.commitment.dtype == torch.float32


def test_the_device_is_followed():
    assert Codebook(4, 2).to("meta").codes.device.type == "meta"


def test_autocast_does_not_change_the_codes():
    codebook, features = filled_codebook(num_codes=512).eval(), features_of(0, batch=8)
    expected = codebook(features).codes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codebook(features).codes, expected)


@pytest.mark.parametrize("l2_normalized", [False, True])
def test_soft_codes_are_the_head_of_the_softmax_over_all_codes(l2_normalized):
    codebook, features = filled_codebook(l2_normalized=l2_normalized).eval(), features_of(0)
    nearest, codes, probs = codebook.topk(features, 4, temperature=0.7)
    rows, table = rows_of(features), codebook.codes.double().numpy()
    logits = unit(rows) @ table.T / 0.7 if l2_normalized else -((rows[:, None] - table[None]) ** 2).sum(-1) / 0.7
    softmax = np.exp(logits - logits.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    order = np.argsort(-softmax, axis=-1)[:, :4]
    np.testing.assert_array_equal(codes.reshape(-1, 4).numpy(), order)
    np.testing.assert_allclose(probs.reshape(-1, 4).numpy(), np.take_along_axis(softmax, order, -1), rtol=1e-4)
    assert torch.equal(codes[..., 0], codebook(features).codes) and torch.equal(nearest, codebook(features).codes)


def test_looked_up_codes_are_the_nearest_vectors_in_place():
    codebook, features = filled_codebook().eval(), features_of(0)[:, :, :, :3]
    out = codebook(features)
    assert torch.equal(codebook.lookup(out.codes, (5, 3)), out.nearest)


def test_usage_counts_codes_and_their_evenness():
    assert usage(torch.tensor([5, 5, 0, 5, 5])) == {"codes_used": 4, "perplexity": pytest.approx(4.0)}
    assert usage(torch.tensor([0, 7, 0])) == {"codes_used": 1, "perplexity": pytest.approx(1.0)}


def test_a_saved_codebook_continues_as_if_never_stopped():
    first = filled_codebook(revive_below=0.9)
    for step in range(2):
        first(features_of(step))
        first.update()
    second = Codebook(12, 6, revive_below=0.9).train()
    second.load_state_dict(first.state_dict())
    for codebook in (first, second):
        codebook(features_of(9))
        codebook.update()
    assert torch.equal(first.codes, second.codes)
