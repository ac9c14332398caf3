"""The linear layers of a transformer block whose output is scaled, with the gradient of the scale for free.

A block computes gamma * (x W^T + b), gamma being its layer scale. Autograd would keep x W^T + b for the gradient of
gamma, and read it once more in the backward pass. But that gradient follows from the weight's: with G = g^T x, where g
is the gradient of the output, the weight's is gamma * G, and that of gamma is the sum of G * W over a row, plus that of
the bias. So nothing is kept for gamma, and no sum runs over tokens. The output has the same bits either way.

Letters: R rows (tokens of all images), I inputs, O outputs.
"""

from __future__ import annotations

import torch


def scaled_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """scale * (x weight^T + bias); differentiable once.

    Args:
        x: [..., I].  weight: [O, I].  bias, scale: [O]. All of one dtype: not for autocast.
    Returns: [..., O].
    """
    return _ScaledLinear.apply(x, weight, bias, scale)


class _ScaledLinear(torch.autograd.Function):
    # Parameters are saved themselves and not views of them, which would keep them gathered under ZeRO-3.

    @staticmethod
    def forward(ctx, x, weight, bias, scale):
        ctx.save_for_backward(x, weight, bias, scale)
        # Not added in place: selective checkpointing keeps this very product.
        out = torch.addmm(bias, x.flatten(0, -2), weight.t())
        return (scale * out).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, scale = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        of_x = of_weight = of_bias = of_scale = None
        if ctx.needs_input_grad[0]:
            of_x = (scale * grad).mm(weight).view_as(x)
        if any(ctx.needs_input_grad[1:]):
            unscaled, summed = grad.t().mm(x.flatten(0, -2)), grad.sum(0)
            of_weight, of_bias = scale[:, None] * unscaled, scale * summed
            of_scale = (unscaled * weight).sum(1) + summed * bias
        return of_x, of_weight, of_bias, of_scale
