"""On a GPU: every form of attention at the sizes of the recipes, and equal bits for equal inputs."""

import pytest
import torch
from attention_interpreted import drawn, formula
from timm.models.beit import gen_relative_position_index

from peco_ds.models.attention import attend, form_fault, sum_by_position

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
FORMS = ("triton", "unfused", "efficient")
SHAPES = {"B/16": (4, 197, 12, 64), "H/14": (4, 257, 16, 80), "B/16 at 384": (2, 577, 12, 64)}
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5}


def gradients(inputs, grad, form):
    out = attend(*inputs, form)
    return out, *torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_form_gives_the_formula_and_the_same_bits_twice(form, dtype, name):
    device = torch.device("cuda")
    assert not form_fault(form, device)
    qkv, bias, grad = (tensor.to(device) for tensor in drawn(dtype, *SHAPES[name]))
    inputs = [qkv.clone().requires_grad_(), bias.float().clone().requires_grad_()]
    exact = [qkv.double().requires_grad_(), bias.double().requires_grad_()]
    reference = formula(*exact)
    expected = (reference, *torch.autograd.grad(reference, exact, grad.double()))
    first, second = (gradients(inputs, grad, form) for _ in range(2))
    for one, other, right in zip(first, second, expected):
        assert torch.equal(one, other)
        assert (one.double() - right).abs().max() <= TOLERANCES[dtype] * right.abs().max()


def test_the_gradient_of_a_table_is_the_cpus_and_has_the_same_bits_twice():
    grid = 14
    index = gen_relative_position_index((grid, grid))
    positions = int(index.max()) + 1
    grad = torch.randn(12, *index.shape, generator=torch.Generator().manual_seed(0))
    first, second = (sum_by_position(grad.cuda(), index.cuda(), positions) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first.cpu(), sum_by_position(grad, index, positions))
