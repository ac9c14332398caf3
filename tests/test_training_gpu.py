"""On a GPU: what lies around attention there. Feeding batches, saves, stops, ZeRO, compiled and 8-bit products."""

from dataclasses import replace

import pytest
import torch
from conftest import REPOSITORY, run_stage

from peco_ds.config import ModelSettings, RunSettings
from peco_ds.data.device_feed import SideStream, prepared_batches
from peco_ds.data.workers import RawBatch
from peco_ds.models.block_linear import block_linear
from peco_ds.models.vit import TransformerBlock, build_backbone, run_blocks
from peco_ds.models.vq import no_tf32
from peco_ds.runtime.checkpoint.pinned import SMALLEST_BYTES, host_buffer
from peco_ds.runtime.checkpoint.writer import HostCopies
from peco_ds.runtime.fp8_choice import fp8_fault
from peco_ds.runtime.metrics import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SIZES = ModelSettings(image_px=112, patch_px=16, width=256, depth=2, heads=4, drop_path=0.0)
STEPS = ["schedule.steps=8", "schedule.warmup_steps=2", "checkpoint.every_steps=4"]


def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


# ------------------------------------------------------------------------------------------ batches


def test_batches_come_whole_and_in_order_while_the_steps_stream_is_busy():
    """Memory that a batch gives back must not be written by a later one while the step still reads it."""

    def raws():
        for number in range(12):
            yield RawBatch(slice_number=number, rows=torch.full((2**20,), float(number)).pin_memory())

    def prepare(raw):
        return (raw.rows.to(gpu(), non_blocking=True) + 1,)

    busy, sums = torch.randn(2048, 2048, device=gpu()), []
    for rows in prepared_batches(raws(), prepare, lambda ready, _raw: ready[0], lane=SideStream(gpu())):
        # The step's stream lags behind the host.
        for _ in range(4):
            busy = torch.tanh(busy @ busy)
        sums.append(rows.min() + rows.max())
        del rows
    assert [float(found) for found in sums] == [2.0 * (number + 1) for number in range(12)]


# -------------------------------------------------------------------------------------------- saves


def test_a_saves_copy_is_page_locked_at_its_own_size_and_holds_what_was_there():
    buffer = host_buffer(torch.Size((SMALLEST_BYTES + 7,)), torch.float32)
    assert buffer.is_pinned() and buffer.untyped_storage().nbytes() == buffer.nbytes
    copies, weights = HostCopies(), torch.zeros(2**22 + 1, device=gpu())
    for value in (1.0, 2.0):
        weights.fill_(value)
        copies.save({"weights": weights}, "part.pt")
        held = copies.take()["part.pt"]["weights"]
        weights.fill_(-1.0)
        assert held.device.type == "cpu" and bool((held == value).all())


# --------------------------------------------------------------------------------------------- runs


def trained(small_sets, out, *settings, zero: int = 1) -> list[dict]:
    """Rows of metrics of a short pre-training on this GPU."""
    config = REPOSITORY / "ds_configs" / f"zero{zero}.json"
    arguments = ["--recipe", "peco_vitb16", "--deepspeed_config", config, "--out", out, *small_sets.overrides]
    run_stage("pretrain", *arguments, *STEPS, *settings, environment={"DS_ACCELERATOR": "cuda"}, fresh=True)
    return read_metrics(out)


def bits(rows: list[dict]) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.fixture(scope="module")
def whole(small_sets, tmp_path_factory):
    return trained(small_sets, tmp_path_factory.mktemp("whole") / "run", "run.precision=bf16")


def test_a_run_that_was_stopped_continues_bit_for_bit(small_sets, whole, tmp_path):
    for stop in (["schedule.stop_at_step=5"], []):
        rows = trained(small_sets, tmp_path / "run", "run.precision=bf16", *stop)
    assert bits(rows) == bits(whole)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_zero_stages_on_one_card_train_alike(small_sets, whole, tmp_path, zero):
    rows = trained(small_sets, tmp_path / "run", "run.precision=bf16", zero=zero)
    # Stage 0 sums gradients in bf16.
    assert [row["loss"] for row in rows] == pytest.approx(
        [row["loss"] for row in whole], rel=0.02 if zero == 0 else 2e-3
    )


def test_fp8_trains_as_bf16(small_sets, whole, tmp_path):
    if fault := fp8_fault(gpu()):
        pytest.skip(fault)
    rows = trained(small_sets, tmp_path / "run", "run.precision=bf16", "run.fp8=true")
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole], rel=0.03)


# ------------------------------------------------------------------------------------------ numbers


def loss_and_gradients(backbone, dtype):
    torch.manual_seed(1)
    x = torch.randn(8, SIZES.grid**2 + 1, SIZES.width, device=gpu()).to(dtype).requires_grad_()
    loss = run_blocks(backbone.blocks, x, backbone.rel_pos_bias()).float().square().mean()
    loss.backward()
    return [loss.detach(), x.grad, *(parameter.grad for parameter in backbone.blocks.parameters())]


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("folded", [True, False])
def test_compiled_blocks_give_what_eager_ones_do(kind, folded):
    from peco_ds.runtime.engine import compile_each

    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        settings = replace(SIZES, fold_layer_scale=folded)
        backbone = build_backbone(settings, activation_checkpointing=kind).to(gpu(), torch.bfloat16).train()
        if compiled:
            compile_each(backbone, (TransformerBlock,))
        found.append(loss_and_gradients(backbone, torch.bfloat16))
    for ours, theirs in zip(*found):
        assert (ours - theirs).abs().max() <= 0.03 * theirs.abs().max()


def test_8_bit_products_are_those_of_the_same_rounding_on_a_cpu():
    if fault := fp8_fault(gpu()):
        pytest.skip(fault)
    torch.manual_seed(0)
    drawn = [torch.randn(size).bfloat16() for size in ((3, 257, 64), (48, 64), (48,), (48,))]
    grad, found = torch.randn(3, 257, 48).bfloat16(), []
    for device in (torch.device("cpu"), gpu()):
        inputs = [tensor.to(device).requires_grad_() for tensor in drawn]
        out = block_linear(*inputs, fp8=True)
        found.append([out, *torch.autograd.grad(out, inputs, grad.to(device))])
    for ours, theirs in zip(*found):
        assert (ours.cpu().float() - theirs.float()).abs().max() <= 0.02 * theirs.float().abs().max()


def test_codes_are_searched_in_full_float32():
    torch.manual_seed(0)
    images, weights = torch.randn(2, 64, 32, 32), torch.randn(64, 64, 3, 3)
    with no_tf32():
        found = torch.nn.functional.conv2d(images.to(gpu()), weights.to(gpu())).cpu()
    exact = torch.nn.functional.conv2d(images.double(), weights.double())
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


def test_the_memory_that_a_pass_keeps_is_what_is_planned():
    from peco_ds.planner.shapes import mim_activation_bytes

    batch, settings = 64, replace(SIZES, depth=4)
    backbone = build_backbone(settings).to(gpu(), torch.bfloat16).train()
    bias = backbone.rel_pos_bias()
    x = torch.randn(batch, settings.grid**2 + 1, settings.width, device=gpu(), dtype=torch.bfloat16, requires_grad=True)
    run_blocks(backbone.blocks, x, bias).sum().backward()
    before = torch.cuda.memory_allocated()
    out = run_blocks(backbone.blocks, x, bias)
    kept = torch.cuda.memory_allocated() - before
    sizes = dict(num_codes=64, masked=4, checkpointing="none", precision=RunSettings().precision)
    planned = [
        mim_activation_bytes(replace(settings, attention="efficient", depth=depth), **sizes).saved for depth in (4, 0)
    ]
    assert kept == pytest.approx(batch * (planned[0] - planned[1]), rel=0.05) and out is not None
