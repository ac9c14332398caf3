"""The forms of attention that a GPU may take compute what the formula says; without Triton the others are there."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from attention_interpreted import drawn, formula
from conftest import REPOSITORY

from peco_ds.config import ModelSettings
from peco_ds.models import attention_unfused
from peco_ds.models.attention import attend, biased_attention, biased_attention_backward, form_fault
from peco_ds.models.vit import build_backbone, run_blocks

TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict:
    pytest.importorskip("triton", reason="a CPU build of torch brings no Triton")
    target = tmp_path_factory.mktemp("interpreted") / "found.json"
    script = REPOSITORY / "tests" / "attention_interpreted.py"
    subprocess.run([sys.executable, script, target], check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    return json.loads(target.read_text())


def test_the_triton_kernels_give_the_values_and_all_four_gradients_of_the_formula(interpreted):
    for case, errors in interpreted["errors"].items():
        limit = TOLERANCES[torch.float32 if "float32" in case else torch.float16]
        assert set(errors) == {"output", "query", "key", "value", "bias"}
        assert max(errors.values()) <= limit, (case, errors)


def test_the_triton_kernels_sum_the_bias_gradient_in_one_order(interpreted):
    """Images one by one, or all at once: the same additions, so the same bits."""
    assert interpreted["same bits"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 37, 2, 64), (2, 24, 3, 80)], ids=str)
def test_the_unfused_form_gives_the_values_and_gradients_of_the_formula(dtype, shape):
    qkv, bias, grad = drawn(dtype, *shape)
    inputs = [qkv.clone().requires_grad_(), bias.float().clone().requires_grad_()]
    exact = [qkv.double().requires_grad_(), bias.double().requires_grad_()]
    out, reference = attend(*inputs, "unfused"), formula(*exact)
    out.backward(grad), reference.backward(grad.double())
    for found, expected in zip((out, *(x.grad for x in inputs)), (reference, *(x.grad for x in exact))):
        assert (found.double() - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()
    assert inputs[1].grad.dtype == torch.float32


def test_a_compiler_is_told_the_shapes_that_the_unfused_form_gives():
    qkv, bias, grad = drawn(torch.float32, 2, 37, 2, 16)
    out, kept = biased_attention(qkv, bias, "unfused")
    for told, found in zip(biased_attention._abstract_fn(qkv, bias, "unfused"), (out, kept)):
        assert told.shape == found.shape and told.dtype == found.dtype and told.stride() == found.stride()
    grads = biased_attention_backward(grad, qkv, bias, out, kept, "unfused")
    for told, found in zip(biased_attention_backward._abstract_fn(grad, qkv, bias, out, kept, "unfused"), grads):
        assert told.shape == found.shape and told.dtype == found.dtype and told.stride() == found.stride()


def test_a_setting_reaches_the_blocks_and_forms_train_alike():
    settings = dict(image_px=64, patch_px=16, width=48, depth=2, heads=3)
    grads = {}
    for form in ("auto", "efficient", "unfused"):
        torch.manual_seed(0)
        backbone = build_backbone(ModelSettings(**settings, attention=form))
        x = torch.randn(4, 17, 48)
        run_blocks(backbone.blocks, x, backbone.rel_pos_bias()).square().mean().backward()
        grads[form] = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    for name, expected in grads["efficient"].items():
        assert torch.equal(grads["auto"][name], expected), "auto on a CPU is what it was before there was a choice"
        torch.testing.assert_close(grads["unfused"][name], expected, rtol=1e-4, atol=1e-7)


def test_nothing_but_the_kernels_imports_triton(monkeypatch):
    """A CPU build of torch has none; there the package imports and trains."""
    importers = [
        path.name
        for path in (REPOSITORY / "peco_ds").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(name.name.split(".")[0] == "triton" for name in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "triton")
    ]
    assert set(importers) == {"attention_kernels.py"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_unfused, "has_triton", lambda: False)
    assert "package triton" in form_fault("triton", torch.device("cuda"))
    assert form_fault("triton", torch.device("cpu")) == "needs a GPU"
    assert not form_fault("unfused", torch.device("cuda")) and not form_fault("efficient", torch.device("cpu"))
