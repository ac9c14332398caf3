"""Batch norm whose statistics are those of all ranks' images, computed in float32 on any device.

PyTorch's own needs a GPU and refuses float32 statistics beside bfloat16 weights. Here each pass adds up one small
vector over the ranks, forward and backward, by a function that is handed in. A rank without images takes part with
zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

# Sums a float32 tensor over the ranks, in place.
AllReduce = Callable[[torch.Tensor], object]
_PLACES = (0, 2, 3)


def on_one_rank(tensor: torch.Tensor) -> torch.Tensor:
    """The `AllReduce` of a process by itself."""
    return tensor


class SyncBatchNorm(nn.Module):
    """[B, C, H, W] -> the same, each channel normalised over all places of all ranks' images; a rank may have none.

    Parameters and buffers have the names of `torch.nn.BatchNorm2d`.

    Args:
        all_reduce: sums over the ranks; all of them make the same passes.
    Source: batch norm (arXiv 1502.03167); statistics over ranks as in mmsegmentation's UperNet.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(
        self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1, all_reduce: AllReduce = on_one_rank
    ) -> None:
        super().__init__()
        self.eps, self.momentum, self.all_reduce = eps, momentum, all_reduce
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        if not self.training:
            mean, var = self.running_mean.float(), self.running_var.float()
            return F.batch_norm(x.float(), mean, var, weight, bias, False, 0.0, self.eps).to(x.dtype)
        out, mean, var, count = _Normalize.apply(x, weight, bias, self.eps, self.all_reduce)
        self._track(mean, var, count)
        return out

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor) -> None:
        unbiased = var * (count / (count - 1).clamp_min(1))
        # One pass that is not finite, whose step is skipped, would otherwise stay in the average for good.
        sound = torch.isfinite(mean).all() & torch.isfinite(unbiased).all() & (count > 0)
        for kept, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            kept.copy_(torch.where(sound, torch.lerp(kept.float(), new, self.momentum), kept.float()))
        self.num_batches_tracked += 1


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, all_reduce):
        values = x.float()
        count = values.new_full((1,), x.numel() / x.shape[1])
        sums = torch.cat([count, values.sum(_PLACES), values.square().sum(_PLACES)])
        all_reduce(sums)
        count, total, squares = sums.split([1, x.shape[1], x.shape[1]])
        mean = total / count.clamp_min(1)
        var = (squares / count.clamp_min(1) - mean.square()).clamp_min(0)
        inverse = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.all_reduce = all_reduce
        ctx.mark_non_differentiable(mean, var, count)
        return ((values - _wide(mean)) * _wide(inverse * weight) + _wide(bias)).to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx, grad_out, *_unused):
        x, weight, mean, inverse, count = ctx.saved_tensors
        grad, normalized = grad_out.float(), (x.float() - _wide(mean)) * _wide(inverse)
        # The ranks' own sums: the engine averages the gradients of weight and bias, as those of all parameters.
        grad_bias, grad_weight = grad.sum(_PLACES), (grad * normalized).sum(_PLACES)
        sums = torch.cat([grad_bias, grad_weight])
        ctx.all_reduce(sums)
        mean_grad, mean_product = (sums / count.clamp_min(1)).chunk(2)
        grad_x = (grad - _wide(mean_grad) - normalized * _wide(mean_product)) * _wide(inverse * weight)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None


def _wide(channels: torch.Tensor) -> torch.Tensor:
    return channels[None, :, None, None]
