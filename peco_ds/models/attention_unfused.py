"""Attention with a bias that all images share, as batched products around a softmax.

Rows of the scores are padded to a multiple of 8, as fast products in 16 bits ask. The weights are kept for the backward
pass: less memory would mean to compute a product again. On a GPU what lies between two products is one compiled kernel
where Triton is there. Every sum has a fixed order.

Letters: B images, T tokens, H heads, D head dimension, S: T rounded up to a multiple of 8.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
import torch.nn.functional as F

MULTIPLE = 8


def padded(tokens: int) -> int:
    """S of T."""
    return -(-tokens // MULTIPLE) * MULTIPLE


@torch.no_grad()
def forward(qkv: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T / sqrt(D) + bias) v.

    Args:
        qkv: [B, T, 3, H, D].  bias: [H, T, T].
    Returns: [B, T, H * D], and the weights [B, H, S, S] in the dtype of qkv.
    """
    batch, tokens, _, heads, dim = qkv.shape
    size = padded(tokens)
    query, key, value = _by_head(qkv, size)
    scores = torch.bmm(query, key.transpose(1, 2)).view(batch, heads, size, size)
    extra = size - tokens
    # No weight for the keys that pad. The rows that pad are computed and thrown away.
    columns = F.pad(bias.float(), (0, extra), value=float("-inf"))
    weights = _on(qkv, _softmax)(scores, F.pad(columns, (0, 0, 0, extra)), dim**-0.5)
    out = torch.bmm(weights.flatten(0, 1), value).view(batch, heads, size, dim)
    return out[:, :, :tokens].transpose(1, 2).reshape(batch, tokens, heads * dim), weights


@torch.no_grad()
def backward(grad_out: torch.Tensor, qkv: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of what `forward` was given.

    Returns: [B, T, 3, H, D]; float32 [H, T, T].
    """
    batch, tokens, _, heads, dim = qkv.shape
    size = padded(tokens)
    query, key, value = _by_head(qkv, size)
    (grad,) = _by_head(grad_out.reshape(batch, tokens, 1, heads, dim), size)
    grad_weights = torch.bmm(grad, value.transpose(1, 2)).view_as(weights)
    grad_scores = _on(qkv, _softmax_backward)(grad_weights, weights)
    grad_bias = grad_scores.sum(0, dtype=torch.float32)[:, :tokens, :tokens].contiguous()
    flat = grad_scores.flatten(0, 1)
    grads = (
        _scaled_product(flat, key, dim**-0.5),
        _scaled_product(flat.transpose(1, 2), query, dim**-0.5),
        torch.bmm(weights.flatten(0, 1).transpose(1, 2), grad),
    )
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    for target, found in zip(grad_qkv.unbind(2), grads):
        target.copy_(found.view(batch, heads, size, dim)[:, :, :tokens].transpose(1, 2))
    return grad_qkv, grad_bias


def _by_head(tensor: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """[B, T, n, H, D] -> n of [B * H, S, D], zero behind T."""
    batch, tokens, count, heads, dim = tensor.shape
    found = tensor.new_zeros(count, batch, heads, size, dim)
    found[:, :, :, :tokens].copy_(tensor.permute(2, 0, 3, 1, 4))
    return found.flatten(1, 2).unbind(0)


def _scaled_product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale a b, scaled before it is rounded."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def _softmax(scores: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.softmax(scores.float() * scale + bias, -1).to(scores.dtype)


def _softmax_backward(grad: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    products = grad.float() * weights.float()
    return (products - weights.float() * products.sum(-1, keepdim=True)).to(weights.dtype)


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _on(tensor: torch.Tensor, function):
    """The function, compiled where the tensor lies on a GPU."""
    return _compiled(function) if tensor.is_cuda and has_triton() else function


_compiled = cache(torch.compile)
