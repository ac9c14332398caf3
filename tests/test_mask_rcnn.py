"""The detector's parts by closed formulas: anchors, pooling, mask targets, samplers, windows, pyramids, seams."""

from dataclasses import replace

import pytest
import torch
from beit_samples import SMALL, sample
from torchvision.ops import roi_align

from peco_ds.config import DetectorSettings
from peco_ds.convert.initialize import start_detector
from peco_ds.convert.resample import resize_bias_table
from peco_ds.data.objects import ObjectTargets
from peco_ds.errors import UserError
from peco_ds.models.beit_weights import SHARED_TABLE, TABLE
from peco_ds.models.dense_backbone import build_dense_backbone
from peco_ds.models.mask_rcnn import (
    AlignedPooler,
    Anchors,
    SeededSampler,
    batch_images,
    build_detector,
    mask_targets_of,
)
from peco_ds.models.window_backbone import build_window_backbone, from_windows, to_windows

MODEL = replace(SMALL, image_px=128, width=48, depth=4, heads=3)
SETTINGS = DetectorSettings(
    taps=(0, 1, 2, 3), channels=32, box_width=32, rois=32, mask_convs=1, detections=10, branch_norm="group"
)
WINDOWS = replace(SETTINGS, window=3, global_blocks=(1, 3), pyramid="simple", taps=(3,), head_norm="layer")


def image(height, width, seed=0):
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def target(boxes, height, width, seed=5):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    return ObjectTargets(boxes, torch.ones(len(boxes), dtype=torch.int64), masks, seed)


def detector(settings=SETTINGS, **options):
    torch.manual_seed(0)
    return build_detector(MODEL, settings, 2, **options)


def test_anchors_are_eight_strides_wide_on_exact_strides_and_not_rounded():
    images = batch_images([image(96, 100)], (0.5,) * 3, (0.5,) * 3)
    assert images.tensors.shape == (1, 3, 96, 128) and images.image_sizes == [(96, 100)]
    maps = [torch.zeros(1, 8, *size) for size in ((24, 32), (12, 16), (6, 8), (3, 4), (2, 2))]
    anchors = Anchors()(images, maps)[0]
    assert len(anchors) == 3 * (24 * 32 + 12 * 16 + 6 * 8 + 3 * 4 + 4)
    # The second place of the first row at stride 4, ratio 1/2 (height over width), area 32^2.
    left, top, right, bottom = anchors[3].tolist()
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((4, 0), abs=1e-5)
    assert (right - left, bottom - top) == pytest.approx((32 * 2**0.5, 32 / 2**0.5), rel=1e-6)
    # The last one, at stride 64, although 96 px hold no two of them.
    left, top, right, bottom = anchors[-1].tolist()
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((64, 64), abs=1e-4)


def test_a_pooled_box_of_a_linear_map_is_the_maps_value_at_the_centres_of_its_bins():
    pooler, stride = AlignedPooler(7), 4
    down, across = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    maps = {"0": (3 * down + across)[None, None]} | {str(k): torch.zeros(1, 1, 32 >> k, 32 >> k) for k in (1, 2, 3)}
    box = torch.tensor([[20.0, 24.0, 76.0, 52.0]])
    found = pooler(maps, [box], [(128, 128)])[0, 0]
    # A pixel's centre lies half a pixel inside, which "aligned" counts.
    x = (20 + (torch.arange(7) + 0.5) * 8) / stride - 0.5
    y = (24 + (torch.arange(7) + 0.5) * 4) / stride - 0.5
    torch.testing.assert_close(found, 3 * y[:, None] + x[None], rtol=0, atol=1e-4)


def test_large_boxes_are_pooled_from_coarse_maps():
    maps = {str(level): torch.full((1, 1, 256 >> level, 256 >> level), float(level)) for level in range(4)}
    boxes = torch.tensor([[0.0, 0, side, side] for side in (100, 112, 223, 224, 448, 1000)])
    found = AlignedPooler(7)(maps, [boxes], [(1024, 1024)])[:, 0, 3, 3]
    assert found.tolist() == [0, 1, 1, 2, 3, 3]


def test_mask_targets_are_zeros_and_ones_of_the_box_they_lie_in():
    wanted = target([[10, 20, 38, 48]], 64, 64)
    found = mask_targets_of(wanted.masks, torch.tensor([[10.0, 20, 66, 48], [10, 20, 38, 48]]), torch.tensor([0, 0]))
    assert found.shape == (2, 28, 28) and set(found.unique().tolist()) <= {0.0, 1.0}
    assert found[1].all() and found[0, :, :14].all() and not found[0, :, 14:].any()


def test_what_is_picked_does_not_depend_on_the_order_of_the_boxes_and_keeps_the_share():
    sampler = SeededSampler(16, 0.25)
    boxes = torch.rand(100, 4, generator=torch.Generator().manual_seed(2)) * 100
    labels = (torch.arange(100) % 3) - 1
    shuffle = torch.randperm(100, generator=torch.Generator().manual_seed(3))
    picks = []
    for order in (torch.arange(100), shuffle):
        sampler.seeds, sampler.boxes = [7], [boxes[order]]
        positive, negative = (found[0] for found in sampler([labels[order]]))
        assert positive.sum() == 4 and negative.sum() == 12 and (labels[order][positive] == 1).all()
        picks.append({tuple(row) for row in boxes[order][positive | negative].tolist()})
    assert picks[0] == picks[1]
    sampler.seeds = [8]
    positive, negative = (found[0] for found in sampler([labels[shuffle]]))
    assert {tuple(row) for row in boxes[shuffle][positive | negative].tolist()} != picks[0]


@pytest.mark.parametrize("settings", (SETTINGS, WINDOWS), ids=("branches", "windows"))
def test_every_parameter_has_a_gradient_with_and_without_objects(settings):
    model = detector(settings).train()
    images = [image(96, 80), image(64, 112, seed=1)]
    with_objects = [target([[8, 8, 50, 40]], 96, 80), target([], 64, 112)]
    for targets in (with_objects, [target([], 96, 80), target([], 64, 112)]):
        model.zero_grad(set_to_none=True)
        losses = model(images, targets)
        assert all(torch.isfinite(loss) for loss in losses.values())
        sum(losses.values()).backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert losses["loss_mask"].item() == losses["loss_box"].item() == 0


def test_losses_are_l1_and_means_over_what_was_picked():
    model = detector().train()
    rows = [torch.tensor([1.0, 0, 0, -1])]
    model.rpn.fg_bg_sampler.seeds = [1]
    deltas, wanted = torch.randn(4, 4), [torch.randn(4, 4)]
    objectness, box = model.rpn.compute_loss(torch.zeros(4, 1), deltas, rows, wanted)
    assert objectness.item() == pytest.approx(0.693147, rel=1e-5)
    assert box.item() == pytest.approx(float((deltas[0] - wanted[0][0]).abs().sum()) / 3, rel=1e-5)


def test_in_bf16_maps_are_cast_at_the_seams_and_results_are_float32():
    model = detector(WINDOWS).bfloat16()
    losses = model.train()([image(96, 80)], [target([[8, 8, 50, 40]], 96, 80)])
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    with torch.no_grad():
        found = model.eval()([image(96, 80)])[0]
    assert found.boxes.dtype == found.scores.dtype == found.masks.dtype == torch.float32


def test_a_detection_of_an_image_does_not_change_with_its_neighbours_where_all_have_one_shape():
    model = detector(WINDOWS, square_px=128).eval()
    with torch.no_grad():
        together, alone = model([image(96, 80), image(64, 112, seed=1)]), model([image(64, 112, seed=1)])
    torch.testing.assert_close(together[1].scores, alone[0].scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["roi_heads.box_predictor.cls_score.bias", "pyramid", None])
def test_an_image_without_objects_and_one_whose_numbers_are_not_finite_are_told_apart(part):
    """What is NaN passes no threshold of a score, so nothing would be found in either."""
    model = detector().eval()
    if part:
        next(value for name, value in model.named_parameters() if name.startswith(part)).data.fill_(float("nan"))
    with torch.no_grad():
        found = model([image(96, 80), image(64, 112)])
    assert [each.is_finite for each in found] == [part is None] * 2


# ------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("shape", ((6, 9), (7, 5), (3, 3), (1, 4)))
def test_windows_are_undone_exactly(shape):
    tokens = torch.randn(2, shape[0] * shape[1], 5)
    windows = to_windows(tokens, *shape, 3)
    assert windows.shape == (2 * -(-shape[0] // 3) * -(-shape[1] // 3), 9, 5)
    assert torch.equal(from_windows(windows, *shape, 3), tokens)
    assert torch.equal(windows[0, 0], tokens[0, 0])


def test_a_window_that_is_the_whole_image_sees_what_a_global_block_sees():
    window = build_window_backbone(MODEL, (0, 3), window=8, global_blocks=(3,)).eval()
    whole = build_window_backbone(MODEL, (0, 3), window=8, global_blocks=(0, 1, 2, 3)).eval()
    whole.load_state_dict(window.state_dict())
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        for one, other in zip(window(images), whole(images)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_window_does_not_see_its_neighbours():
    backbone = build_window_backbone(MODEL, (0, 3), window=4, global_blocks=(3,)).eval()
    images = torch.randn(1, 3, 64, 128)
    other = images.clone()
    other[..., 64:] = 0
    with torch.no_grad():
        first, second = backbone(images)[0], backbone(other)[0]
    assert torch.equal(first[..., :4], second[..., :4]) and not torch.equal(first[..., 4:], second[..., 4:])


# --------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize("kind", ("mim", "classifier"))
def test_window_and_global_tables_are_resized_from_the_weights(kind):
    weights, settings = sample(kind), replace(SMALL, image_px=128)
    backbone = build_window_backbone(settings, (2,), window=4, global_blocks=(2,))
    start_detector(backbone, weights, settings)
    for block, grid in ((0, 4), (1, 4), (2, 8)):
        table = weights.tensors.get(TABLE.format(block), weights.tensors.get(SHARED_TABLE))
        found = backbone.blocks[block].attn.relative_position_bias_table
        torch.testing.assert_close(found.data, resize_bias_table(table, grid), rtol=0, atol=1e-6)
    torch.testing.assert_close(backbone.patch_embed.proj.weight.data, weights.tensors["patch_embed.proj.weight"])


def test_weights_of_patch_14_are_refused_or_resized_as_asked():
    weights = sample("classifier")
    small = replace(weights.model, patch_px=14, image_px=56)
    kernel = weights.tensors["patch_embed.proj.weight"][..., :14, :14].contiguous()
    weights = replace(weights, model=small, tensors=weights.tensors | {"patch_embed.proj.weight": kernel})
    backbone = build_dense_backbone(SMALL, (0, 2))
    with pytest.raises(UserError, match="patch_px 14, but the recipe's model has patch_px 16"):
        start_detector(backbone, weights, SMALL)
    start_detector(backbone, weights, SMALL, resample_patch=True)
    # The token of a patch that was enlarged is the token of the patch.
    patch = torch.randn(1, 3, 14, 14)
    large = torch.nn.functional.interpolate(patch, (16, 16), mode="bicubic", antialias=True)
    expected = (kernel * patch).sum((1, 2, 3))
    found = (backbone.patch_embed.proj.weight.data * large).sum((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_unaligned_pooling_would_be_seen():
    """The tests above tell the two apart."""
    down = torch.arange(32.0)[:, None].expand(32, 32)[None, None].contiguous()
    box = torch.tensor([[0, 20.0, 24, 76, 52]])
    aligned, unaligned = (roi_align(down, box, 7, 0.25, sampling_ratio=0, aligned=how) for how in (True, False))
    assert float((aligned - unaligned).abs().max()) == pytest.approx(0.5, abs=1e-4)
