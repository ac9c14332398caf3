"""Attention with an additive bias that is learned and the same for every image of a batch.

PyTorch's own attention returns such a bias's gradient for every image, [B, H, T, T], to be summed afterwards: for
ViT-H/14 at 448 px that is 34 MB an image and layer. Here the backward pass sums the images' gradients in float32.

A GPU has three forms of it, which compute the same function:

triton       kernels of our own (`attention_kernels.py`), which waste least where T is just above a multiple of a tile
unfused      batched products around a softmax (`attention_unfused.py`), which keep [B, H, T, T] for the backward pass
efficient    PyTorch's memory-efficient kernels: its flash kernels take no bias, cuDNN's give it no gradient

On a CPU, where PyTorch has no fused kernel with a gradient for the bias, `efficient` takes one image at a time, which
stays in the cache.

Both operators are opaque to torch.compile: a compiled block runs the same attention as one that is not. Equal inputs
give equal bits in every form: no sum is in the order in which threads arrive.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from peco_ds.config import AttentionForm
from peco_ds.models import attention_unfused

# In elements: the memory-efficient kernels read rows of the bias that start at multiples of it.
ALIGNMENT = 16
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
_efficient_backward = torch.ops.aten._efficient_attention_backward
# The most bytes that the bias's gradient takes, before it is summed, in one call of the backward kernel.
GPU_BYTES = 2**31


def attend(qkv: torch.Tensor, bias: torch.Tensor, form: AttentionForm = "auto") -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + bias) v; differentiable once.

    Args:
        qkv: [B, T, 3, H, D].
        bias: [H, T, T], the same for all images, in any float dtype; its gradient is float32 where it is. Or [B, H,
            T, T], one an image.
        form: of the pass whose backward pass gives the bias a gradient; auto: efficient. See `form_fault`.
    Returns: [B, T, H * D].
    """
    batch, tokens, _, heads, dim = qkv.shape
    if bias.dim() == 3 and bias.requires_grad and torch.is_grad_enabled() and dim % 8 == 0:
        return biased_attention(qkv, bias, "efficient" if form == "auto" else form)[0]
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    # Four dimensions, because a CPU's fused kernel accepts no other mask.
    mask = bias.to(qkv.dtype) if bias.dim() == 4 else bias.to(qkv.dtype)[None]
    return (
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        .transpose(1, 2)
        .reshape(batch, tokens, heads * dim)
    )


def form_fault(form: AttentionForm, device: torch.device) -> str:
    """Why a device cannot take a form, as the end of a sentence; "" if it can."""
    if form != "triton":
        return ""
    if device.type != "cuda":
        return "needs a GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or higher"
    return "" if attention_unfused.has_triton() else "needs the package triton, which a CUDA build of torch brings"


@torch.library.custom_op("peco_ds::biased_attention", mutates_args=())
def biased_attention(
    qkv: torch.Tensor, bias: torch.Tensor, form: str = "efficient"
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend`.

    Returns: the output, and what the backward pass needs beside it: float32 log-sums [B, H, T] (efficient: rounded up;
    triton: to base 2), or the weights (unfused: rounded up; efficient on a CPU).
    """
    if form == "triton":
        return _kernels().forward(qkv.contiguous(), _aligned(bias, qkv.dtype))
    if form == "unfused":
        return attention_unfused.forward(qkv, bias)
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
def _(qkv, bias, form="efficient"):
    batch, tokens, _, heads, dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads * dim)
    if form == "triton":
        return out, qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    if form == "unfused":
        size = attention_unfused.padded(tokens)
        return out, qkv.new_empty(batch, heads, size, size)
    if not qkv.is_cuda:
        return out, qkv.new_empty(batch, heads, tokens, tokens)
    return out, qkv.new_empty(batch, heads, (tokens + 31) // 32 * 32, dtype=torch.float32)


@torch.library.custom_op("peco_ds::biased_attention_backward", mutates_args=())
def biased_attention_backward(
    grad_out: torch.Tensor,
    qkv: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    kept: torch.Tensor,
    form: str = "efficient",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns: gradients of qkv and bias, laid out and typed as they are."""
    if form == "triton":
        aligned = _aligned(bias, qkv.dtype)
        grads = _kernels().backward(
            grad_out.contiguous(), qkv.contiguous(), aligned, out, kept, _slices(len(qkv), aligned)
        )
    elif form == "unfused":
        grads = attention_unfused.backward(grad_out, qkv, kept)
    else:
        grads = (_backward_on_gpu if qkv.is_cuda else _backward_on_cpu)(grad_out, qkv, bias, out, kept)
    return grads[0], grads[1].to(bias.dtype)


def _backward_on_gpu(grad_out, qkv, bias, out, log_sums) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, _, heads, dim = qkv.shape
    query, key, value = qkv.unbind(2)
    grad_out, out = (tensor.reshape(batch, tokens, heads, dim) for tensor in (grad_out, out))
    # The seed and offset of dropout are not used: nothing is dropped.
    kernel_bias, unused = _kernel_bias(bias, qkv), torch.empty((), dtype=torch.int64, device=qkv.device)
    grads, grad_bias = [], torch.zeros(heads, tokens, tokens, device=qkv.device)
    for some in _slices(batch, kernel_bias[0]):
        operands = (grad_out[some], query[some], key[some], value[some], kernel_bias[some], out[some])
        *found, of_images = _efficient_backward(
            *operands,
            *(None, None, tokens, tokens, log_sums[some], 0.0, unused, unused, 0, True),
            # Several splits add to the query's gradient in the order in which they arrive.
            num_splits_key=1,
            shared_storage_dqdkdv=True,
        )
        grads.append(_together(*found))
        grad_bias += of_images.sum(0, dtype=torch.float32)
    return grads[0] if len(grads) == 1 else torch.cat(grads), grad_bias


def _together(grad_query: torch.Tensor, grad_key: torch.Tensor, grad_value: torch.Tensor) -> torch.Tensor:
    """[B, T, H, D] each -> [B, T, 3, H, D]: the storage that the kernel has written all three into, not a copy."""
    batch, tokens, heads, dim = grad_query.shape
    part, parts = heads * dim, (grad_query, grad_key, grad_value)
    shared = all(grad.stride() == (3 * tokens * part, 3 * part, dim, 1) for grad in parts)
    if shared and [grad.storage_offset() for grad in parts] == [0, part, 2 * part]:
        return grad_query.as_strided((batch, tokens, 3, heads, dim), (3 * tokens * part, 3 * part, part, dim, 1))
    return torch.stack(parts, dim=2)


def _backward_on_cpu(grad_out, qkv, _bias, _out, kept) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, _, heads, dim = qkv.shape
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grads = grad_qkv.permute(2, 0, 3, 1, 4).unbind(0)
    grad_out = grad_out.reshape(batch, tokens, heads, dim).transpose(1, 2)
    grad_bias = torch.zeros(heads, tokens, tokens)
    for q, k, v, weights, grad, grad_q, grad_k, grad_v in zip(query, key, value, kept, grad_out, *grads):
        grad_v.copy_(torch.bmm(weights.transpose(1, 2), grad))
        grad_scores = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), weights, -1, weights.dtype)
        grad_bias += grad_scores
        grad_scores *= dim**-0.5
        grad_q.copy_(torch.bmm(grad_scores, k))
        grad_k.copy_(torch.bmm(grad_scores.transpose(1, 2), q))
    return grad_qkv, grad_bias


@biased_attention_backward.register_fake
def _(grad_out, qkv, bias, out, kept, form="efficient"):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(
        bias, memory_format=torch.contiguous_format
    )


def _keep(ctx, inputs, output) -> None:
    qkv, bias, ctx.form = inputs
    ctx.save_for_backward(qkv, bias, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _grad_kept):
    return *biased_attention_backward(grad_out, *ctx.saved_tensors, ctx.form), None


biased_attention.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.peco_ds.biased_attention)
def _flops(qkv_shape, _bias_shape, *_args, **_options) -> int:
    batch, tokens, _, heads, dim = qkv_shape
    return 2 * 2 * batch * heads * tokens**2 * dim


@register_flop_formula(torch.ops.peco_ds.biased_attention_backward)
def _backward_flops(_grad_shape, qkv_shape, bias_shape, *_args, **_options) -> int:
    return 2 * _flops(qkv_shape, bias_shape)


def _kernels():
    """The module of Triton kernels. Not imported with this one, because a CPU build of torch has no Triton."""
    from peco_ds.models import attention_kernels

    return attention_kernels


def _aligned(bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[H, T, T] in a dtype, whose rows start at multiples of ALIGNMENT."""
    return F.pad(bias.to(dtype), (0, -bias.shape[-1] % ALIGNMENT))[..., : bias.shape[-1]]


def _kernel_bias(bias: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    """[H, T, T] -> a view [B, H, T, T] with the kernel's dtype and alignment; all images share one copy in memory."""
    return _aligned(bias, qkv.dtype).expand(len(qkv), -1, -1, -1)


def _slices(batch: int, aligned: torch.Tensor) -> list[slice]:
    """Images whose gradients of the scores are held at once, at most GPU_BYTES."""
    of_image = len(aligned) * aligned.stride(0) * aligned.element_size()
    return _even_slices(batch, GPU_BYTES // of_image)


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
    rows = grad.permute(1, 2, 0).flatten(0, 1)
    if grad.device.type == "cpu":
        return torch.ops.aten.embedding_dense_backward(rows.contiguous(), index.flatten(), positions, -1, False)
    return sum_sorted(rows, *_sorted_places(index, positions))


def sum_sorted(rows: torch.Tensor, places: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Sums of rows [N, H] by group -> [P, H].

    Args:
        places: int64 [N], the rows of the first group, then those of the second, ...
        counts: int64 [P], how many rows each group has; may be 0.
    """
    return torch.segment_reduce(rows[places], "sum", lengths=counts, axis=0, unsafe=True)


def sorted_places(index: torch.Tensor, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places and counts of `sum_sorted` for groups of equal numbers of index; equal numbers keep their order."""
    flat = index.flatten()
    return torch.argsort(flat, stable=True), torch.bincount(flat, minlength=positions)


# An index never changes, and a run has few: one for a grid. PyTorch's own backward sorts it in every layer and step.
# An entry holds its index, so that no other one gets its address; blocks with equal indexes share the places.
_SORTED: OrderedDict[tuple, tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]] = OrderedDict()
_SORTED_BYTES = 2**29


def _sorted_places(index: torch.Tensor, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`sorted_places`, made once for an index."""
    alike = (index.shape, index.device, positions)
    key = (*alike, index.data_ptr(), index._version)
    if key not in _SORTED:
        same = (made for (*other, _, _), (old, made) in _SORTED.items() if tuple(other) == alike and old.equal(index))
        _SORTED[key] = index, next(same, None) or sorted_places(index, positions)
        while len(_SORTED) > 1 and sum(old.nbytes for old, _ in _SORTED.values()) > _SORTED_BYTES:
            _SORTED.popitem(last=False)
    _SORTED.move_to_end(key)
    return _SORTED[key][1]


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
