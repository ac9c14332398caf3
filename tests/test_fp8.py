"""Products in fp8: what is rounded, which layers take them, that a model learns alike, and that a device says no."""

import logging
from dataclasses import replace

import pytest
import torch

from peco_ds.config import AggregationSettings, EncodingSettings, ModelSettings, PretrainRecipe, RunSettings
from peco_ds.errors import UserError
from peco_ds.models.block_linear import GRADIENTS, VALUES, block_linear, fits_fp8, to_fp8
from peco_ds.models.mim import build_mim
from peco_ds.models.vit import TransformerBlock, build_backbone, run_blocks
from peco_ds.recipe_files import load_recipe
from peco_ds.runtime.distributed import World
from peco_ds.runtime.fp8_choice import fp8_fault, settle_fp8

SMALL = ModelSettings(image_px=64, patch_px=16, width=64, depth=2, heads=4, layer_scale=0.1, drop_path=0.0)
CPU = World(0, 1, torch.device("cpu"))
FP8 = RunSettings(fp8=True)


@pytest.mark.parametrize("dtype, step", [(VALUES, 2**-4), (GRADIENTS, 2**-3)], ids=["values", "gradients"])
def test_numbers_are_rounded_to_the_bits_of_their_type_whatever_their_size(dtype, step):
    drawn = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for size in (1e-12, 1.0, 1e12):
        rounded, factor = to_fp8(size * drawn, dtype)
        assert rounded.dtype == dtype
        found = rounded.float() * factor / size
        # half of a step of the mantissa, and what is too small for any of its exponents
        assert bool(((found - drawn).abs() <= step * drawn.abs() + 1e-4).all())
        assert (found - drawn).abs().max() > 0
    assert not to_fp8(torch.zeros(3), dtype)[0].float().any(), "zeros stay zeros"


def test_what_is_not_finite_does_not_become_finite():
    x = torch.ones(2, 16)
    x[0, 0] = float("nan")
    assert not block_linear(x, torch.ones(16, 16), torch.ones(16), fp8=True).isfinite().any()


@pytest.mark.parametrize("scaled", [False, True])
def test_a_layer_and_its_gradients_are_those_of_the_rounded_operands(scaled):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 32), torch.randn(48, 32), torch.randn(48)
    scale, grad = (torch.randn(48) if scaled else None), torch.randn(3, 5, 48)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    out = block_linear(*inputs, None if scale is None else scale.requires_grad_(), fp8=True)
    found = torch.autograd.grad(out, inputs, grad)
    of_out = 1.0 if scale is None else scale.detach()

    def rounded(tensor, dtype=VALUES):
        eight, factor = to_fp8(tensor.detach(), dtype)
        return eight.float() * factor

    torch.testing.assert_close(out, of_out * (rounded(x) @ rounded(weight).t() + bias))
    expected_x = rounded(of_out * grad, GRADIENTS) @ rounded(weight)
    torch.testing.assert_close(found[0], expected_x)
    # The weight's gradient is not rounded.
    expected_weight = (of_out * grad).flatten(0, 1).t() @ x.detach().flatten(0, 1)
    torch.testing.assert_close(found[1], expected_weight, rtol=1e-5, atol=1e-4)


def trained_losses(fp8: bool, steps: int = 50) -> list[float]:
    """A masked image model that learns codes of a few images, bf16 with weights of 32 bits beside it."""
    torch.manual_seed(0)
    model = build_mim(SMALL, EncodingSettings(), AggregationSettings(), 32).train()
    for block in model.modules():
        if isinstance(block, TransformerBlock):
            block.fp8 = fp8
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    model.bfloat16()
    optimizer = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.05)
    images, codes = torch.randn(8, 3, 64, 64), torch.randint(32, (8, 6))
    masked = torch.stack([torch.randperm(16)[:6] for _ in range(8)])
    losses = []
    for _ in range(steps):
        logits = model(images, masked).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
        loss.backward()
        for master, parameter in zip(masters, model.parameters()):
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters()):
                parameter.copy_(master)
        losses.append(loss.item())
    return losses


def test_a_model_learns_as_in_bf16():
    in_bf16, in_fp8 = (torch.tensor(trained_losses(fp8)) for fp8 in (False, True))
    assert in_bf16[-1] < 0.6 * in_bf16[0], "it learns"
    assert not torch.equal(in_bf16, in_fp8)
    # Worst seen: 0.4 % of the first loss.
    assert (in_fp8 - in_bf16).abs().max() < 0.01 * in_bf16[0]


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputation_changes_no_bit(kind):
    found = []
    for how in ("none", kind):
        torch.manual_seed(0)
        backbone = build_backbone(SMALL, activation_checkpointing=how).train()
        settle_fp8(backbone, FP8, CPU)
        x = torch.randn(4, 17, 64, requires_grad=True)
        run_blocks(backbone.blocks, x, backbone.rel_pos_bias()).square().mean().backward()
        found.append([x.grad, *(parameter.grad for parameter in backbone.blocks.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_a_model_is_measured_without_fp8():
    outs = []
    for run in (RunSettings(), FP8):
        torch.manual_seed(0)
        backbone = build_backbone(SMALL).eval()
        settle_fp8(backbone, run, CPU)
        outs.append(run_blocks(backbone.blocks, torch.randn(2, 17, 64), backbone.rel_pos_bias()))
    assert torch.equal(*outs)


def test_layers_that_do_not_fit_stay_as_they_are_and_are_named(caplog):
    backbone = build_backbone(replace(SMALL, width=40, mlp_ratio=3.2)).train()
    assert not fits_fp8(backbone.blocks[0].attn.proj.weight)
    logger = logging.getLogger("peco_ds")
    logger.addHandler(caplog.handler)
    settle_fp8(backbone, FP8, CPU)
    logger.removeHandler(caplog.handler)
    assert (
        "proj (40 x 40)" in caplog.text and "multiples of 16" in caplog.text and "this device has no fp8" in caplog.text
    )
    x = torch.randn(2, 17, 40)
    out = run_blocks(backbone.blocks, x, backbone.rel_pos_bias())
    for block in backbone.blocks:
        block.fp8 = False
    assert torch.equal(out, run_blocks(backbone.blocks, x, backbone.rel_pos_bias()))


def test_a_gpu_without_fp8_says_so_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "A100")
    gpu = torch.device("cuda")
    assert fp8_fault(gpu) == "run.fp8: A100 has compute capability 8.0, fp8 needs 8.9 or higher; set run.fp8=false"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    assert fp8_fault(gpu) == "" == fp8_fault(torch.device("cpu"))


def test_fp8_goes_with_bf16_alone():
    assert not RunSettings().fp8
    with pytest.raises(UserError, match="run.fp8 and run.precision fp32"):
        load_recipe(PretrainRecipe, "peco_vitb16", ["run.fp8=true", "run.precision=fp32"], environ={})
    assert load_recipe(PretrainRecipe, "peco_vitb16", ["run.fp8=true"], environ={}).recipe.run.fp8
