"""Attention with a learned bias that all images share, against the formula in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peco_ds.models.attention import (
    ALIGNMENT,
    _sorted_places,
    attend,
    bias_of_positions,
    biased_attention,
    biased_attention_backward,
    sum_by_position,
    sum_sorted,
)

B, T, H, D = 3, 17, 4, 8


def written_out(qkv, bias):
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-2, -1) / D**0.5 + bias
    return (scores.exp() / scores.exp().sum(-1, keepdim=True) @ value).transpose(1, 2).reshape(B, T, H * D)


def drawn(dtype, *bias_shape):
    generator = torch.Generator().manual_seed(0)
    qkv, bias, grad = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((B, T, 3, H, D), bias_shape, (B, T, H * D))
    )
    return qkv.to(dtype), bias.to(dtype), grad.to(dtype)


@pytest.mark.parametrize("shape", [(H, T, T), (B, H, T, T)], ids=["shared", "an image's own"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_the_formula(shape, dtype, tolerance):
    qkv, bias, grad = drawn(dtype, *shape)
    inputs = [qkv.clone().requires_grad_(), bias.clone().requires_grad_()]
    exact = [qkv.double().requires_grad_(), bias.double().requires_grad_()]
    ours, reference = attend(*inputs), written_out(*exact)
    ours.backward(grad), reference.backward(grad.double())
    for found, expected in zip(
        (ours, *(tensor.grad for tensor in inputs)), (reference, *(tensor.grad for tensor in exact))
    ):
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_gradient_of_a_float32_bias_is_summed_in_float32_under_16_bit_training():
    """In bfloat16 a sum of many small equal parts stands still."""
    qkv, bias, _ = drawn(torch.bfloat16, H, T, T)
    images = 512
    qkv, bias = qkv[:1].expand(images, -1, -1, -1, -1), bias.float().requires_grad_()
    grad = torch.randn(1, T, H * D, generator=torch.Generator().manual_seed(1)).bfloat16()
    attend(qkv, bias).backward(grad.expand(images, -1, -1))
    many = bias.grad.clone()
    bias.grad = None
    attend(qkv[:1], bias).backward(grad)
    assert many.dtype == torch.float32
    torch.testing.assert_close(many, images * bias.grad, rtol=1e-4, atol=1e-5)


def test_evaluation_takes_the_same_values():
    qkv, bias, _ = drawn(torch.float32, H, T, T)
    trained = attend(qkv, bias.clone().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(attend(qkv, bias), trained, rtol=1e-5, atol=1e-6)


# torch's own check asks for gradients of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_operators_are_what_they_say_to_a_compiler():
    qkv, bias, _ = drawn(torch.float32, H, T, T)
    torch.library.opcheck(biased_attention, (qkv.requires_grad_(), bias.requires_grad_()))
    torch.library.opcheck(bias_of_positions, (torch.randn(60, H, requires_grad=True), torch.randint(60, (T, T))))


def test_the_position_bias_and_its_gradient_are_those_of_an_indexed_table():
    table, index = (
        torch.randn(60, H, dtype=torch.bfloat16),
        torch.randint(60, (T, T), generator=torch.Generator().manual_seed(0)),
    )
    ours, theirs = table.clone().requires_grad_(), table.float().requires_grad_()
    grad = torch.randn(H, T, T)
    bias, expected = bias_of_positions(ours, index), theirs[index].permute(2, 0, 1)
    assert bias.dtype == torch.float32 and torch.equal(bias, expected)
    bias.backward(grad), expected.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad.bfloat16())


@pytest.mark.parametrize(
    "tokens, heads, dim", [(197, 12, 64), (257, 16, 80), (1025, 16, 80)], ids=["B/16", "H/14", "H/14 at 448"]
)
def test_the_gpu_path_asks_for_the_fused_kernels_with_shapes_and_alignment_they_take(monkeypatch, tokens, heads, dim):
    """On tensors without memory: what a GPU would be asked to do, for the sizes of the recipes."""
    from peco_ds.models import attention

    biases, batches = [], []
    kernel, kernel_backward = attention._efficient, attention._efficient_backward

    def seen(query, key, value, bias, *rest):
        biases.append(bias)
        return kernel(query, key, value, bias, *rest)

    def seen_backward(grad, query, key, value, bias, *rest, **options):
        batches.append(len(query))
        assert options["num_splits_key"] == 1, "several add up in the order in which they arrive"
        return kernel_backward(grad, query, key, value, bias, *rest, **options)

    monkeypatch.setattr(attention, "_efficient", seen)
    monkeypatch.setattr(attention, "_efficient_backward", seen_backward)
    images = 64
    with FakeTensorMode():
        qkv = torch.empty(images, tokens, 3, heads, dim, dtype=torch.bfloat16, device="cuda")
        bias = torch.empty(heads, tokens, tokens, device="cuda")
        out, kept = biased_attention._init_fn(qkv, bias)
        declared = biased_attention._abstract_fn(qkv, bias)
        grad_qkv, grad_bias = biased_attention_backward._init_fn(torch.empty_like(out), qkv, bias, out, kept)
    assert [tuple(tensor.shape) for tensor in declared] == [tuple(out.shape), tuple(kept.shape)] and declared[
        1
    ].dtype == kept.dtype
    assert grad_qkv.shape == qkv.shape and grad_bias.shape == bias.shape and grad_bias.dtype == torch.float32
    for seen_bias in biases:
        assert (
            seen_bias.stride(0) == 0
            and seen_bias.stride(-1) == 1
            and all(stride % ALIGNMENT == 0 for stride in seen_bias.stride()[:-1])
        )
    assert sum(batches) == images and max(batches) * heads * tokens * tokens * 2 <= attention.GPU_BYTES


def test_sums_by_a_sorted_index_are_those_of_the_plain_sum():
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(H, T, T, generator=generator)
    # twice, and number 7 never: what is kept of one index serves its equals, and no other one
    for index in (torch.randint(7, (T, T), generator=generator) for _ in range(2)):
        for same in (index, index.clone()):
            got = sum_sorted(grad.permute(1, 2, 0).flatten(0, 1), *_sorted_places(same, 8))
            torch.testing.assert_close(got, sum_by_position(grad, index, 8))
            assert not got[7].any()
