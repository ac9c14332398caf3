"""The linear layers of a transformer block where they are not PyTorch's own: with a folded scale, in fp8, or both.

A folded scale. A block computes gamma * (x W^T + b), gamma being its layer scale. Autograd would keep x W^T + b for
the gradient of gamma, and read it once more in the backward pass. But that gradient follows from the weight's: with
G = g^T x, where g is the gradient of the output, the weight's is gamma * G, and that of gamma is the sum of G * W over
a row, plus that of the bias. So nothing is kept for gamma, and no sum runs over tokens. The output has the same bits
either way.

fp8. The output and the gradient of the input are products of 8-bit numbers, e4m3 for activations and weights, e5m2 for
gradients, each tensor divided by its largest value first. The weight's gradient is a product in the run's precision.
Without tensor cores for it, the same rounding and products in float32.

Letters: R rows (tokens of all images), I inputs, O outputs.
"""

from __future__ import annotations

import torch

# Forward and backward: more bits for values, a wider range for gradients.
VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
# The tensor cores' products have sides of multiples of it.
FP8_MULTIPLE = 16
# Below the smallest normal number of float32, so that a tensor of zeros is not divided by zero.
_TINY = 1e-30


def fits_fp8(weight: torch.Tensor) -> bool:
    """Whether a layer can compute in fp8. The number of rows does not matter."""
    return all(side % FP8_MULTIPLE == 0 for side in weight.shape)


def block_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor | None = None, *, fp8: bool = False
) -> torch.Tensor:
    """scale * (x weight^T + bias); differentiable once.

    Args:
        x: [..., I].  weight: [O, I].  bias, scale: [O]. All of one dtype: not for autocast.
        fp8: only where `fits_fp8`.
    Returns: [..., O].
    """
    return _BlockLinear.apply(x, weight, bias, scale, fp8)


class _BlockLinear(torch.autograd.Function):
    # Parameters are saved themselves and not views of them, which would keep them gathered under ZeRO-3.

    @staticmethod
    def forward(ctx, x, weight, bias, scale, fp8):
        ctx.save_for_backward(x, weight, bias, scale)
        ctx.fp8 = fp8
        rows = x.flatten(0, -2)
        # Not added in place: selective checkpointing keeps this very product.
        out = _fp8_product(rows, weight, VALUES) + bias if fp8 else torch.addmm(bias, rows, weight.t())
        return (out if scale is None else scale * out).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, scale = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        of_x = of_weight = of_bias = of_scale = None
        if ctx.needs_input_grad[0]:
            scaled = grad if scale is None else scale * grad
            of_x = _fp8_product(scaled, weight.t(), GRADIENTS) if ctx.fp8 else scaled.mm(weight)
            of_x = of_x.view_as(x)
        if any(ctx.needs_input_grad[1:4]):
            of_weight, of_bias = grad.t().mm(x.flatten(0, -2)), grad.sum(0)
            if scale is not None:
                of_scale = (of_weight * weight).sum(1) + of_bias * bias
                of_weight, of_bias = scale[:, None] * of_weight, scale * of_bias
        return of_x, of_weight, of_bias, of_scale, None


def _fp8_product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a [R, I] in 8 bits of `dtype` times the transpose of b [O, I] in VALUES -> [R, O] in the dtype of a."""
    (a8, of_a), (b8, of_b) = to_fp8(a, dtype), to_fp8(b, VALUES)
    if a.is_cuda:
        # The second operand lies column by column. Gradients are summed in full float32.
        columns, fast = b8.contiguous().t(), dtype == VALUES
        return torch._scaled_mm(a8, columns, of_a, of_b, out_dtype=a.dtype, use_fast_accum=fast)
    return ((a8.float() @ b8.float().t()) * (of_a * of_b)).to(a.dtype)


def to_fp8(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor over a factor, rounded to 8 bits, and that factor, float32 []: the largest value is the dtype's largest.

    What is not finite makes the factor so, and a step with it is skipped as any other.
    """
    largest = torch.finfo(dtype).max
    factor = tensor.abs().amax().float().clamp(min=_TINY) / largest
    return (tensor.float() / factor).clamp(-largest, largest).to(dtype), factor
