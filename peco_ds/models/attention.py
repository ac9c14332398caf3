"""Attention with an additive bias that is learned and the same for every image of a batch.

PyTorch's own attention returns such a bias's gradient for every image, [B, H, T, T], to be summed afterwards: for
ViT-H/14 at 448 px that is 34 MB an image and layer. Here the backward pass takes a few images at a time and sums their
gradients in float32. On a GPU the kernels are PyTorch's memory-efficient ones, forward and backward: its flash kernels
take no bias, cuDNN's give it no gradient. On a CPU, where PyTorch has no fused kernel with a gradient for the bias, one
image at a time stays in the cache.

Both operators are opaque to torch.compile: a compiled block runs the same attention as one that is not. On a GPU the
backward kernel adds up the query's gradient in the device's order, unless `torch.use_deterministic_algorithms` is set.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

# In elements: the memory-efficient kernels read rows of the bias that start at multiples of it.
ALIGNMENT = 16
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
_efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
# The most bytes that the bias's gradient takes, before it is summed, in one call of the backward kernel.
GPU_BYTES = 2**27


def attend(qkv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + bias) v; differentiable once.

    Args:
        qkv: [B, T, 3, H, D].
        bias: [H, T, T], the same for all images, in any float dtype; its gradient is float32 where it is. Or [B, H,
            T, T], one an image.
    Returns: [B, T, H * D].
    """
    batch, tokens, _, heads, dim = qkv.shape
    if bias.dim() == 3 and bias.requires_grad and torch.is_grad_enabled() and dim % 8 == 0:
        return biased_attention(qkv, bias)[0]
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    # Four dimensions, because a CPU's fused kernel accepts no other mask.
    mask = bias.to(qkv.dtype) if bias.dim() == 4 else bias.to(qkv.dtype)[None]
    return (
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        .transpose(1, 2)
        .reshape(batch, tokens, heads * dim)
    )


@torch.library.custom_op("peco_ds::biased_attention", mutates_args=())
def biased_attention(qkv: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend`.

    Returns: the output, and what the backward pass needs beside it: float32 log-sums [B, H, T] (rounded up), or on a
    CPU the weights.
    """
    batch, tokens, _, heads, dim = qkv.shape
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if qkv.is_cuda:
        out, log_sums, *_ = _efficient(query, key, value, _kernel_bias(bias, qkv), True)
        return out.transpose(1, 2).reshape(batch, tokens, heads * dim), log_sums
    weights, out = qkv.new_empty(batch, heads, tokens, tokens), qkv.new_empty(batch, tokens, heads, dim)
    shared = bias.to(qkv.dtype)
    for q, k, v, of_image, output in zip(query, key, value, weights, out):
        torch.softmax(torch.baddbmm(shared, q, k.transpose(1, 2), alpha=dim**-0.5), -1, out=of_image)
        output.copy_(torch.bmm(of_image, v).transpose(0, 1))
    return out.view(batch, tokens, heads * dim), weights


@biased_attention.register_fake
def _(qkv, bias):
    batch, tokens, _, heads, dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads * dim)
    if not qkv.is_cuda:
        return out, qkv.new_empty(batch, heads, tokens, tokens)
    return out, qkv.new_empty(batch, heads, (tokens + 31) // 32 * 32, dtype=torch.float32)


@torch.library.custom_op("peco_ds::biased_attention_backward", mutates_args=())
def biased_attention_backward(
    grad_out: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns: gradients of qkv and bias, laid out and typed as they are."""
    batch, tokens, _, heads, dim = qkv.shape
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grads = grad_qkv.permute(2, 0, 3, 1, 4).unbind(0)
    grad_out = grad_out.reshape(batch, tokens, heads, dim).transpose(1, 2)
    grad_bias = torch.zeros(heads, tokens, tokens, device=qkv.device)
    if qkv.is_cuda:
        out = out.view(batch, tokens, heads, dim).transpose(1, 2)
        # The seed and offset of dropout are not used: nothing is dropped.
        kernel_bias, unused = _kernel_bias(bias, qkv), torch.empty((), dtype=torch.int64, device=qkv.device)
        for some in _even_slices(batch, GPU_BYTES // (heads * tokens * kernel_bias.stride(-2) * qkv.element_size())):
            found = _efficient_backward(
                grad_out[some],
                query[some],
                key[some],
                value[some],
                kernel_bias[some],
                out[some],
                kept[some],
                unused,
                unused,
                0.0,
                [True] * 4,
            )
            for grad, part in zip(grads, found):
                grad[some].copy_(part)
            grad_bias += found[3].sum(0, dtype=torch.float32)
    else:
        for q, k, v, weights, grad, grad_q, grad_k, grad_v in zip(query, key, value, kept, grad_out, *grads):
            grad_v.copy_(torch.bmm(weights.transpose(1, 2), grad))
            grad_scores = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), weights, -1, weights.dtype)
            grad_bias += grad_scores
            grad_scores *= dim**-0.5
            grad_q.copy_(torch.bmm(grad_scores, k))
            grad_k.copy_(torch.bmm(grad_scores.transpose(1, 2), q))
    return grad_qkv, grad_bias.to(bias.dtype)


@biased_attention_backward.register_fake
def _(grad_out, qkv, bias, out, kept):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(
        bias, memory_format=torch.contiguous_format
    )


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _grad_kept):
    return biased_attention_backward(grad_out, *ctx.saved_tensors)


biased_attention.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.peco_ds.biased_attention)
def _flops(qkv_shape, _bias_shape, *_args, **_options) -> int:
    batch, tokens, _, heads, dim = qkv_shape
    return 2 * 2 * batch * heads * tokens**2 * dim


@register_flop_formula(torch.ops.peco_ds.biased_attention_backward)
def _backward_flops(_grad_shape, qkv_shape, bias_shape, *_args, **_options) -> int:
    return 2 * _flops(qkv_shape, bias_shape)


def _kernel_bias(bias: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    """[H, T, T] -> a view [B, H, T, T] with the kernel's dtype and alignment; all images share one copy in memory."""
    padded = F.pad(bias.to(qkv.dtype), (0, -bias.shape[-1] % ALIGNMENT))
    return padded[..., : bias.shape[-1]].expand(len(qkv), -1, -1, -1)


def _even_slices(batch: int, at_most: int) -> list[slice]:
    """Slices of nearly equal length, because a last call of a few images would leave most of a GPU idle."""
    calls = math.ceil(batch / max(1, at_most))
    ends = [batch * call // calls for call in range(calls + 1)]
    return [slice(first, last) for first, last in zip(ends, ends[1:])]


# ---------------------------------------------------------------------------------- relative positions


@torch.library.custom_op("peco_ds::bias_of_positions", mutates_args=())
def bias_of_positions(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The relative position bias, in float32 whatever the table's dtype: all layers add to its gradient.

    Args:
        table: [P, H].  index: int64 [T, T], rows of it.
    Returns: float32 [H, T, T].
    """
    return F.embedding(index, table.float()).permute(2, 0, 1).contiguous()


@bias_of_positions.register_fake
def _(table, index):
    return table.new_empty(table.shape[1], *index.shape, dtype=torch.float32)


@torch.library.custom_op("peco_ds::sum_by_position", mutates_args=())
def sum_by_position(grad: torch.Tensor, index: torch.Tensor, positions: int) -> torch.Tensor:
    """Sums of grad [H, T, T] over equal numbers of index [T, T]: [positions, H].

    The order of the additions is fixed; a compiler's own scatter would add in the order in which the threads arrive.
    """
    return torch.ops.aten.embedding_dense_backward(grad.permute(1, 2, 0).contiguous(), index, positions, -1, False)


@sum_by_position.register_fake
def _(grad, index, positions):
    return grad.new_empty(positions, grad.shape[0])


def _keep_index(ctx, inputs, output) -> None:
    table, index = inputs
    ctx.save_for_backward(index)
    ctx.positions, ctx.dtype = len(table), table.dtype


def _table_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return sum_by_position(grad, index, ctx.positions).to(ctx.dtype), None


bias_of_positions.register_autograd(_table_backward, setup_context=_keep_index)
