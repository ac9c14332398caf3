"""A detector's release, loaded without this package by the module in it, finds what our own detector finds."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from peco_ds.config import DetectorSettings, ModelSettings
from peco_ds.convert.read_detector import is_detector_release, read_detector_release
from peco_ds.convert.release import write_files
from peco_ds.convert.to_torchvision import detector_card, detector_release
from peco_ds.convert.torchvision_detector import load
from peco_ds.convert.verify import compare_detector, detector_outputs
from peco_ds.errors import UserError
from peco_ds.models.detector_weights import DetectorWeights
from peco_ds.models.mask_rcnn import build_detector
from peco_ds.schema import read_json

SMALL = dict(channels=16, box_width=32, rois=32, mask_convs=1, detections=20)
WINDOWS = dict(window=3, global_blocks=(1, 3))
KINDS = {
    "branches": (dict(taps=(0, 1, 2, 3)), 0),
    "absolute": (dict(taps=(0, 1, 2, 3), branch_norm="batch"), 128),
    "absolute, of any shape": (dict(taps=(0, 1, 2, 3)), 0),
    "absolute in windows": (dict(taps=(0, 1, 2, 3), **WINDOWS), 0),
    "windows": (dict(taps=(0, 1, 2, 3), **WINDOWS, head_norm="batch", box_convs=1, rpn_convs=2), 128),
    "simple": (dict(taps=(3,), pyramid="simple", **WINDOWS, head_norm="layer", box_convs=1, box_layers=1), 128),
}


def drawn(kind="branches"):
    """Every parameter matters, and scores lie apart."""
    settings, square = KINDS[kind]
    model = ModelSettings(
        image_px=128, width=48, depth=4, heads=3, drop_path=0.0, absolute_positions=kind.startswith("absolute")
    )
    detector = DetectorSettings(**SMALL | settings)
    torch.manual_seed(0)
    tensors = build_detector(model, detector, 3, square_px=square).state_dict()
    for name, tensor in tensors.items():
        if name.endswith(("running_var", "norm1.weight", "norm2.weight")) or (tensor.ndim == 1 and "gamma" in name):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        elif tensor.ndim == 1 or "table" in name or "pos_embed" in name:
            tensor.add_(0.2 * torch.randn_like(tensor))
        elif name.endswith(("cls_logits.weight", "bbox_pred.weight", "cls_score.weight")):
            nn.init.normal_(tensor, std=0.1)
        elif name.endswith("mask_fcn_logits.weight"):
            nn.init.normal_(tensor, std=2)
    return DetectorWeights(
        model, detector, tensors, "detect_toy, step_4", ("cat", "dog", "hen"), (3, 17, 18), 96, 128, square,
        mean=(0.5,) * 3, std=(0.25,) * 3, facts={"recipe": "detect_toy", "box AP": "12.34", "mask AP": "5.60"},
    )  # fmt: skip


def released(weights, folder):
    release = detector_release(weights)
    write_files(folder, release, detector_card(release, weights))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_finds_in_a_process_without_this_package_what_our_detector_finds(tmp_path, kind):
    weights = drawn(kind)
    image, expected = detector_outputs(weights)
    assert len(expected["found boxes"]) == 20 and expected["found masks"].any()
    difference, share = compare_detector(released(weights, tmp_path), image, expected)
    assert difference < 1e-5 and share == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_is_read_as_what_was_written(tmp_path, kind):
    weights = drawn(kind)
    found = read_detector_release(released(weights, tmp_path))
    assert is_detector_release(tmp_path) and found.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in weights.tensors.items())
    told = ("classes", "category_ids", "short_px", "long_px", "square_px", "mean", "std")
    assert [getattr(found, name) for name in told] == [getattr(weights, name) for name in told]
    image, expected = detector_outputs(weights)
    again = detector_outputs(found)[1]
    assert all((again[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize(
    "change, words",
    [
        (("depth", 5), "its config says depth 5, its tensors are of 4 blocks"),
        (("width", 96), "its config asks for (1, 1, 96)"),
        (("patch_px", "16"), "backbone.patch_px: Input should be a valid integer"),
        (("heads", 7), "width 48 and 7 heads, which do not divide it"),
        (("layer_scale", False), "gamma_1 has no place in the network that its config describes"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_refused(tmp_path, change, words):
    folder = released(drawn(), tmp_path)
    config = read_json(folder / "config.json")
    config["backbone"][change[0]] = change[1]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as refused:
        read_detector_release(folder)
    assert words in str(refused.value)


def test_a_changed_weight_is_noticed(tmp_path):
    weights = drawn()
    image, expected = detector_outputs(weights)
    name = "roi_heads.mask_predictor.mask_fcn_logits.bias"
    changed = dataclasses.replace(weights, tensors=weights.tensors | {name: weights.tensors[name] + 1})
    with pytest.raises(UserError, match="maps and heads differ from the trained detector's"):
        compare_detector(released(changed, tmp_path), image, expected)


def test_a_release_gives_what_torchvisions_detectors_give_for_images_of_any_size(tmp_path):
    model = load(released(drawn(), tmp_path))
    images = [torch.rand(3, 50, 70), torch.randint(0, 256, (3, 200, 90), dtype=torch.uint8)]
    for found, image in zip(model(images), images):
        count, (height, width) = len(found["boxes"]), image.shape[1:]
        assert found["masks"].shape == (count, 1, height, width) and found["scores"].shape == (count,)
        assert found["boxes"][:, 2].max() <= width + 1e-3 and found["boxes"][:, 3].max() <= height + 1e-3
        assert set(found["labels"].tolist()) <= {1, 2, 3}
    assert [category["name"] for category in model.categories] == ["cat", "dog", "hen"]


def test_config_and_card_tell_categories_statistics_sizes_and_ap(tmp_path):
    released(drawn(), tmp_path)
    config, card = read_json(tmp_path / "config.json"), (tmp_path / "README.md").read_text()
    assert config["categories"][1] == {"id": 17, "name": "dog"} and config["image_mean"] == [0.5] * 3
    assert (config["short_px"], config["long_px"]) == (96, 128)
    for words in ("| box AP | 12.34 |", "library_name: torchvision", "from detector import load", "short side 96 px"):
        assert words in card
