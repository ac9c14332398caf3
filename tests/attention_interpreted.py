"""The Triton kernels of attention on CPU tensors, against the formula in float64. Writes what it found as JSON.

A process of its own, because Triton reads TRITON_INTERPRET when it is imported.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from peco_ds.models import attention
from peco_ds.models.attention import biased_attention, biased_attention_backward

# Images, tokens, heads, head dimension: a whole tile and a rest; two heads, no whole tile; no rest.
SHAPES = ((2, 69, 1, 80), (2, 21, 2, 64), (1, 64, 1, 80))


def formula(qkv, bias):
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-2, -1) / qkv.shape[-1] ** 0.5 + bias).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def drawn(dtype, images, tokens, heads, dim):
    generator = torch.Generator().manual_seed(0)
    shapes = (images, tokens, 3, heads, dim), (heads, tokens, tokens), (images, tokens, heads * dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def errors(dtype, shape) -> dict[str, float]:
    """Largest differences of the output and all four gradients, over the largest value."""
    qkv, bias, grad = drawn(dtype, *shape)
    inputs = [qkv.clone().requires_grad_(), bias.float().clone().requires_grad_()]
    exact = [qkv.double().requires_grad_(), bias.double().requires_grad_()]
    out, reference = attention.attend(*inputs, "triton"), formula(*exact)
    out.backward(grad), reference.backward(grad.double())
    pairs = {"output": (out, reference), "bias": (inputs[1].grad, exact[1].grad)}
    for place, name in enumerate(("query", "key", "value")):
        pairs[name] = (inputs[0].grad[:, :, place], exact[0].grad[:, :, place])
    assert inputs[1].grad.dtype == torch.float32 and out.dtype == inputs[0].grad.dtype == dtype
    return {
        name: ((found.double() - expected).abs().max() / expected.abs().max()).item()
        for name, (found, expected) in pairs.items()
    }


def same_bits_however_many_images_are_taken_together() -> bool:
    qkv, bias, grad = drawn(torch.float16, 3, 17, 1, 16)
    bias = bias.float()
    out, kept = biased_attention(qkv, bias, "triton")
    found = []
    for most in (attention.GPU_BYTES, 1):
        attention.GPU_BYTES = most
        found.append(biased_attention_backward(grad, qkv, bias, out, kept, "triton"))
    return all(torch.equal(*pair) for pair in zip(*found))


def main(target: Path) -> None:
    found = {
        f"{dtype} {shape}": errors(dtype, shape)
        for dtype, shapes in ((torch.float32, SHAPES), (torch.float16, SHAPES[:1]))
        for shape in shapes
    }
    target.write_text(json.dumps({"errors": found, "same bits": same_bits_however_many_images_are_taken_together()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
