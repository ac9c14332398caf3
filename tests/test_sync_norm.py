import threading

import pytest
import torch
from torch import nn

from peco_ds.models.sync_norm import SyncBatchNorm


class Ranks:
    """The all-reduce of threads that stand for ranks."""

    def __init__(self, size):
        self._barrier, self._parts = threading.Barrier(size, timeout=60), [None] * size
        self.size = size

    def all_reduce(self, rank):
        def reduce(tensor):
            self._parts[rank] = tensor.clone()
            self._barrier.wait()
            total = sum(self._parts)
            self._barrier.wait()
            tensor.copy_(total)

        return reduce


def on_ranks(parts, loss):
    """Each part of a batch through a norm on a rank of its own: outputs, gradients of inputs, norms."""
    ranks, results = Ranks(len(parts)), [None] * len(parts)

    def one(rank):
        # A copy of the rank's own, as after the same seed.
        norm = seeded(SyncBatchNorm(3, all_reduce=ranks.all_reduce(rank)))
        x = parts[rank].clone().requires_grad_()
        out = norm(x)
        loss(out, rank).backward()
        results[rank] = out.detach(), x.grad, norm

    # Backward passes of one process share a thread a device: each rank's collective would wait for the other's turn.
    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def seeded(norm):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(3, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(3, generator=generator))
    return norm


def batch(images):
    return torch.randn(images, 3, 4, 5, generator=torch.Generator().manual_seed(4)) * 3 + 7


@pytest.mark.parametrize("sizes", [(4,), (1, 3), (4, 0), (2, 1, 1)])
def test_statistics_outputs_and_gradients_are_those_of_the_whole_batch(sizes):
    whole = batch(4).requires_grad_()
    factors = torch.randn(4, 3, 4, 5, generator=torch.Generator().manual_seed(5))
    norm = seeded(nn.BatchNorm2d(3))
    expected = norm(whole)
    (expected * factors).sum().backward()
    own = factors.split(sizes)
    results = on_ranks(batch(4).split(sizes), lambda out, rank: (out * own[rank]).sum())
    torch.testing.assert_close(torch.cat([out for out, _, _ in results]), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in results]), whole.grad, rtol=1e-4, atol=1e-5)
    for name in ("weight", "bias"):
        total = sum(getattr(part, name).grad for _, _, part in results)
        torch.testing.assert_close(total, getattr(norm, name).grad, rtol=1e-4, atol=1e-4)
    for _, _, part in results:
        torch.testing.assert_close(part.running_mean, norm.running_mean)
        torch.testing.assert_close(part.running_var, norm.running_var, rtol=1e-5, atol=1e-5)
        assert part.num_batches_tracked == 1
    norm.eval(), results[0][2].eval()
    torch.testing.assert_close(results[0][2](batch(2)), norm(batch(2)), rtol=1e-5, atol=1e-5)


def test_bfloat16_goes_in_and_comes_out_and_statistics_stay_float32():
    norm = SyncBatchNorm(3)
    norm.weight.data, norm.bias.data = norm.weight.bfloat16(), norm.bias.bfloat16()
    x = batch(4).bfloat16().requires_grad_()
    out = norm(x)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == norm.weight.grad.dtype == torch.bfloat16
    assert norm.running_mean.dtype == torch.float32
    expected = nn.BatchNorm2d(3)(batch(4).bfloat16().float())
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02)


def test_a_pass_that_is_not_finite_leaves_the_statistics_alone():
    norm = SyncBatchNorm(3)
    norm(batch(4))
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm(batch(4) * float("inf"))
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])
