"""The transformer block: stochastic depth, one compiled graph for all blocks, what recomputation keeps."""

import pytest
import torch
from test_planner import bytes_kept
from torch.utils._python_dispatch import TorchDispatchMode

from peco_ds.config import ClassifierSettings, ModelSettings
from peco_ds.models.classifier import build_classifier
from peco_ds.models.vit import _PRODUCTS, TransformerBlock, build_backbone, run_blocks
from peco_ds.planner.shapes import skipped_by_subsets
from peco_ds.runtime.engine import compile_each

SMALL = ModelSettings(image_px=64, patch_px=16, width=48, depth=3, heads=3, layer_scale=0.1, drop_path=0.5)


def blocks_and_tokens(images=8, **settings):
    torch.manual_seed(0)
    backbone = build_backbone(ModelSettings(**{**SMALL.__dict__, **settings}))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return backbone, torch.randn(images, 17, 48, requires_grad=True)


def seen_by_branches(backbone):
    """Lists that grow by the number of images that attention, and MLP, of every block get."""
    seen = [[], []]
    for block in backbone.blocks:
        block.norm1.register_forward_hook(lambda _module, _inputs, out: seen[0].append(len(out)))
        block.norm2.register_forward_hook(lambda _module, _inputs, out: seen[1].append(len(out)))
    return seen


def test_subset_stochastic_depth_computes_a_fixed_share_of_the_images_and_leaves_the_others_as_they_were():
    backbone, x = blocks_and_tokens(drop_path_by="subset")
    seen = seen_by_branches(backbone)
    backbone.train()
    run_blocks(backbone.blocks, x, backbone.rel_pos_bias())
    assert seen == [[8, 6, 4], [8, 6, 4]], "rates 0, 0.25 and 0.5 of 8 images"
    assert skipped_by_subsets(SMALL, 8) == 1 - 18 / 24, "what a dry run says of it"
    last = backbone.blocks[-1]
    attention, mlp = last.draw_paths(x)
    out = last(x, backbone.rel_pos_bias(), attention, mlp)
    untouched = sorted(set(range(8)) - set(attention.tolist()) - set(mlp.tolist()))
    changed = [image for image in range(8) if not torch.equal(out[image], x[image])]
    assert changed == sorted(set(attention.tolist()) | set(mlp.tolist())) and len(changed) + len(untouched) == 8
    backbone.eval()
    assert last.draw_paths(x) == (None, None)


def test_a_path_takes_every_image_equally_often_and_keeps_the_expectation_of_a_branch():
    for kind in ("image", "subset"):
        backbone, x = blocks_and_tokens(drop_path_by=kind)
        block = backbone.blocks[-1].train()
        torch.manual_seed(1)
        drawn = [path for _ in range(1000) for path in block.draw_paths(x)]
        if kind == "image":
            factors = torch.stack(drawn).flatten(1)
        else:
            assert all(len(path.unique()) == 4 for path in drawn)
            factors = torch.stack([torch.zeros(8).index_fill(0, path, 2.0) for path in drawn])
        assert set(factors.unique().tolist()) == {0.0, 2.0}
        assert (factors.mean(0) - 1).abs().max() < 0.1, kind


def test_subsets_of_everything_are_everything():
    """At rate 0, and where the rate is less than half an image, the function is the one without stochastic depth."""
    for rate in (0.0, 0.05):
        backbone, x = blocks_and_tokens(drop_path_by="subset", drop_path=rate)
        backbone.train()
        with torch.no_grad():
            subset = run_blocks(backbone.blocks, x, backbone.rel_pos_bias())
            backbone.eval()
            assert torch.equal(subset, run_blocks(backbone.blocks, x, backbone.rel_pos_bias()))


def test_a_gradient_through_a_subset_reaches_its_images_scaled_and_the_others_straight():
    backbone, x = blocks_and_tokens(drop_path_by="subset")
    block, bias = backbone.blocks[-1].train(), backbone.rel_pos_bias().detach()
    taken = torch.tensor([1, 4, 6, 7])
    out = block(x, bias, taken, None)
    with torch.no_grad():
        # the MLP's branch away: what is left is attention's
        block.gamma_2.zero_()
    out = block(x, bias, taken, None)
    (found,) = torch.autograd.grad(out.sum(), x)
    expected = torch.ones_like(x)
    part = x.detach()[taken].requires_grad_()
    (through,) = torch.autograd.grad(block._attention(part, bias).sum(), part)
    expected[taken] += 2 * through
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_blocks_are_compiled_without_a_break_into_one_graph_for_all_of_them(kind):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    eager, compiled = (build_backbone(SMALL, activation_checkpointing=kind) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    compile_each(compiled, (TransformerBlock,))
    x, results = torch.randn(4, 17, 48, requires_grad=True), []
    for backbone in (eager.train(), compiled.train()):
        for block in backbone.blocks:
            block.drop_path = 0.5  # all with a path, of one kind
        torch.manual_seed(3)
        out = run_blocks(backbone.blocks, x, backbone.rel_pos_bias())
        out.square().mean().backward()
        results.append(
            [
                out,
                *(parameter.grad for parameter in backbone.blocks.parameters()),
                backbone.rel_pos_bias.relative_position_bias_table.grad,
            ]
        )
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_a_fresh_classifier_starts_as_the_released_fine_tuning_does():
    torch.manual_seed(0)
    settings = ModelSettings(image_px=64, patch_px=16, width=384, depth=4, heads=6)
    model = build_classifier(settings, ClassifierSettings(), 1000)
    for number, block in enumerate(model.blocks, start=1):
        depth = (2 * number) ** 0.5
        for weight, std in (
            (block.attn.qkv.weight, 0.02),
            (block.mlp.fc1.weight, 0.02),
            (block.attn.proj.weight, 0.02 / depth),
            (block.mlp.fc2.weight, 0.02 / depth),
        ):
            assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert block.attn.qkv.weight.abs().max() > 0.06 and block.mlp.fc1.bias.abs().max() == 0
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02) and model.head.bias.abs().max() == 0
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.15)
    # PyTorch's default for a convolution: uniform between +-1 / sqrt(inputs), weights and biases alike.
    edge = (3 * 16 * 16) ** -0.5
    convolution = model.patch_embed.proj
    assert convolution.weight.std().item() == pytest.approx(edge / 3**0.5, rel=0.02)
    assert 0.9 * edge < convolution.bias.abs().max() <= edge


def test_a_compiled_classifier_trains_and_is_evaluated_in_batches_of_any_size():
    """Every block has a bias table of its own; weights are read without gradient, the last batch is short."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings, results = ModelSettings(**{**SMALL.__dict__, "drop_path": 0.0}), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = build_classifier(settings, ClassifierSettings(head_scale=1.0), 5)
        if compiled:
            compile_each(model, (TransformerBlock,))
        found = []
        for step in range(2):
            logits = model.train()(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(step)))
            logits.logsumexp(-1).mean().backward()
            found.append(logits)
            with torch.no_grad():
                found += [
                    model.eval()(torch.randn(images, 3, 64, 64, generator=torch.Generator().manual_seed(images)))
                    for images in (4, 3, 1)
                ]
        results.append([*found, *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5 and not torch._dynamo.utils.counters["graph_break"]
    )


def test_subsets_of_other_sizes_share_one_more_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backbone, x = blocks_and_tokens(images=16, drop_path_by="subset", depth=6)
    compile_each(backbone, (TransformerBlock,))
    backbone.train()
    run_blocks(backbone.blocks, x, backbone.rel_pos_bias()).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3, "whole batch, first subset, subsets of any size"


class Products(TorchDispatchMode):
    """Counts matrix products and attentions."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in _PRODUCTS
        return func(*args, **(kwargs or {}))


def test_selective_recomputation_repeats_no_product_and_keeps_no_more_for_autograd_than_full():
    products, kept = {}, {}
    for kind in ("none", "selective", "full"):
        torch.manual_seed(0)
        backbone = build_backbone(SMALL, activation_checkpointing=kind).train()
        bias, x = backbone.rel_pos_bias(), torch.randn(8, 17, 48)
        kept[kind] = bytes_kept(backbone, lambda: (run_blocks(backbone.blocks, x, bias),))
        out = run_blocks(backbone.blocks, x, bias).sum()
        with Products() as counted:
            out.backward()
        products[kind] = counted.count
    assert products["selective"] == products["none"] and products["full"] == products["none"] + 5 * SMALL.depth, (
        "query to value, attention, output, and the MLP's two"
    )
    assert kept["selective"] == kept["full"] < kept["none"] / 3
