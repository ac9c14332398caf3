import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from peco_ds.config import ModelSettings, SegmentationSettings, SegmenterSettings
from peco_ds.convert.segmenter_layouts import (
    from_hf_names,
    from_unilm_names,
    hf_segmenter_config,
    to_hf_names,
    to_unilm_names,
)
from peco_ds.evaluation.segmentation import ScenePredictor
from peco_ds.models.segmenter import build_segmenter
from peco_ds.models.segmenter_weights import SegmenterWeights, segmenter_of
from peco_ds.schema import write_json

CLASSES = 7


def toy(image_px=64, *, width=48, depth=12, taps=(3, 5, 7, 11), **settings):
    """Weights whose every tensor matters: random tables, scales, biases and statistics."""
    model = ModelSettings(image_px=image_px, patch_px=16, width=width, depth=depth, heads=3, drop_path=0.0)
    segmenter = SegmenterSettings(taps=taps, head_width=24, auxiliary_width=16, **settings)
    torch.manual_seed(2)
    tensors = build_segmenter(model, segmenter, CLASSES).state_dict()
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var") or "norm" in name or name.endswith(("bn.weight", "1.weight")):
            tensors[name] = torch.rand_like(tensor) + 0.5
        elif tensor.ndim < 2 or name.endswith("table"):
            tensors[name] = torch.randn_like(tensor) * 0.3
    return SegmenterWeights(model, segmenter, tensors, "a toy")


def in_transformers(weights, folder):
    from transformers import UperNetForSemanticSegmentation

    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", hf_segmenter_config(weights))
    tensors = {name: tensor.contiguous() for name, tensor in to_hf_names(weights.tensors).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, told = UperNetForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    return model.eval()


def resized(logits, size):
    return nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


SIZES = [(64, {}), (512, dict(width=24, depth=4, taps=(0, 1, 2, 3))), (640, dict(width=24, depth=4, taps=(0, 1, 2, 3)))]


@pytest.mark.parametrize("image_px, sizes", SIZES, ids=["64", "512", "640"])
def test_logits_are_those_of_transformers_upernet_with_the_same_weights(image_px, sizes, tmp_path):
    weights = toy(image_px, **sizes)
    theirs, ours = in_transformers(weights, tmp_path / "hf"), segmenter_of(weights)
    images = torch.randn(1, 3, image_px, image_px, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(images).logits
        found = resized(ours(images).logits, images.shape[2:])
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() < 5e-5 * expected.abs().max()


def test_sliding_logits_are_those_of_transformers_upernet_in_the_released_codes_loop(tmp_path):
    weights = toy(64)
    theirs, ours = in_transformers(weights, tmp_path / "hf"), segmenter_of(weights)
    image = torch.randn(3, 100, 170, generator=torch.Generator().manual_seed(4))
    crop, stride = 64, 42
    total, count = torch.zeros(CLASSES, 100, 170), torch.zeros(100, 170)
    rows, columns = (max(side - crop + stride - 1, 0) // stride + 1 for side in image.shape[1:])
    with torch.no_grad():
        for row in range(rows):
            for column in range(columns):
                bottom, right = min(row * stride + crop, 100), min(column * stride + crop, 170)
                top, left = max(bottom - crop, 0), max(right - crop, 0)
                total[:, top:bottom, left:right] += theirs(image[None, :, top:bottom, left:right]).logits[0]
                count[top:bottom, left:right] += 1
        expected = total / count
        settings = SegmentationSettings(stride_px=stride)
        predict = ScenePredictor(
            lambda images: ours(images).logits, settings, weights.model, batch=3, mean=(0,) * 3, std=(1,) * 3
        )
        (found,) = predict.logits_of([image])
    assert count.max() > 1 and (found - expected).abs().max() < 5e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "to, back", [(to_hf_names, lambda t: from_hf_names(t, "x")), (to_unilm_names, from_unilm_names)]
)
def test_names_of_other_layouts_come_back_bit_for_bit(to, back):
    tensors = toy().tensors
    again = back(to(tensors))
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_names_in_a_unilm_file_are_the_released_ones():
    names = set(to_unilm_names(toy().tensors))
    conv = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
    units = [f"decode_head.psp_modules.{place}.1" for place in range(4)] + ["decode_head.bottleneck"]
    units += [f"decode_head.{kind}_convs.{place}" for kind in ("lateral", "fpn") for place in range(3)]
    units += ["decode_head.fpn_bottleneck", "auxiliary_head.convs.0"]
    expected = {f"{unit}.{name}" for unit in units for name in conv}
    expected |= {f"{head}.conv_seg.{kind}" for head in ("decode_head", "auxiliary_head") for kind in ("weight", "bias")}
    expected |= {f"backbone.fpn1.{place}.{kind}" for place in (0, 1, 3) for kind in ("weight", "bias")}
    expected |= {f"backbone.fpn1.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    expected |= {"backbone.fpn2.0.weight", "backbone.fpn2.0.bias", "backbone.cls_token"}
    expected |= {"backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}
    block = "norm1.weight norm1.bias norm2.weight norm2.bias attn.qkv.weight attn.q_bias attn.v_bias attn.proj.weight "
    block += "attn.proj.bias attn.relative_position_bias_table attn.relative_position_index gamma_1 gamma_2 "
    block += "mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"
    expected |= {f"backbone.blocks.{number}.{name}" for number in range(12) for name in block.split()}
    assert names == expected


def test_the_auxiliary_head_speaks_in_training_only_and_may_be_absent():
    model = segmenter_of(toy())
    images = torch.randn(2, 3, 64, 64)
    assert model(images).auxiliary is None and model.train()(images).auxiliary.shape == (2, CLASSES, 4, 4)
    without = segmenter_of(toy(auxiliary_weight=0.0)).train()
    assert without(images).auxiliary is None and not [n for n, _ in without.named_parameters() if "auxiliary" in n]


def test_fresh_heads_have_the_released_initialisation():
    head = build_segmenter(toy().model, SegmenterSettings(), CLASSES).decode_head
    fan_out = 48 * 9
    assert head.fpn_bottleneck.conv.weight.detach().std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.02)
    assert head.conv_seg.weight.detach().std().item() == pytest.approx(0.01, rel=0.1) and not head.conv_seg.bias.any()
