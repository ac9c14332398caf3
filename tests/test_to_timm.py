import json
import logging

import numpy as np
import pytest
import timm
import torch
from beit_samples import SMALL, same, sample
from PIL import Image

from peco_ds.convert.read import read_weights
from peco_ds.convert.release import write_release
from peco_ds.convert.to_timm import to_timm
from peco_ds.convert.verify import model_outputs
from peco_ds.data.augment import CenterCrop
from peco_ds.data.views import to_backbone

NAMES = tuple(f"n{number:08d}" for number in range(7))


def released(folder, weights):
    write_release(folder, to_timm(weights), weights)
    return folder


def test_a_classifier_release_is_the_trained_classifier_in_timm(tmp_path):
    weights = sample("classifier", classes=NAMES, mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.9)
    model = timm.create_model(f"local-dir:{released(tmp_path, weights)}", pretrained=True).eval()
    answers = model_outputs(weights)
    with torch.no_grad():
        torch.testing.assert_close(
            model(answers.images_norm), torch.from_numpy(answers.values["logits"]), rtol=0, atol=1e-5
        )
    cfg = model.pretrained_cfg
    assert (
        tuple(cfg["mean"]) == (0.5,) * 3
        and cfg["crop_pct"] == 0.9
        and tuple(cfg["label_names"]) == NAMES
        and model.num_classes == 7
    )
    assert model.global_pool == "avg" and tuple(cfg["input_size"]) == (3, 64, 64)


def test_a_masked_pre_training_release_takes_a_new_classifier(tmp_path):
    released(tmp_path, sample("mim"))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=10)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True)(torch.randn(1, 3, 64, 64)).shape == (1, 96)


@pytest.mark.parametrize("kind", ["mim", "features", "classifier"])
def test_a_release_reads_back_bit_for_bit(tmp_path, kind):
    weights = sample(kind, classes=NAMES if kind == "classifier" else None, mean=(0.5,) * 3, std=(0.25,) * 3)
    found = read_weights(released(tmp_path, weights))
    assert found.kind == kind and same(found.tensors, weights.tensors)
    assert (found.mean, found.std, found.crop, found.classes) == (
        weights.mean,
        weights.std,
        weights.crop,
        weights.classes,
    )
    assert (found.model.heads, found.model.image_px, found.model.depth) == (SMALL.heads, SMALL.image_px, SMALL.depth)


def test_a_backbone_that_was_trained_on_reads_as_features_with_a_warning(tmp_path, caplog):
    released(tmp_path, sample("mim"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    tensors["blocks.1.attn.relative_position_bias_table"] = tensors["blocks.1.attn.relative_position_bias_table"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING, "peco_ds"):
        assert read_weights(tmp_path).kind == "features"
    assert "mim_head.safetensors is left out" in caplog.text


@pytest.mark.parametrize("crop", [0.875, 1.0])
def test_timm_shows_a_released_classifier_what_our_evaluation_shows(tmp_path, real_data, crop):
    model = timm.create_model(f"local-dir:{released(tmp_path, sample('classifier', crop=crop))}", pretrained=True)
    view = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = Image.open(real_data.kodak[0]).convert("RGB")
    ours = CenterCrop(64, crop)(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1))
    torch.testing.assert_close(view(image), to_backbone(ours[None])[0], rtol=0, atol=1e-5)


def test_others_may_read_a_release(tmp_path):
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in released(tmp_path, sample("mim")).iterdir())


def test_the_card_names_weights_statistics_and_facts(tmp_path):
    released(
        tmp_path,
        sample("classifier", mean=(0.5,) * 3, std=(0.5,) * 3, facts={"recipe": "my_recipe", "images seen": "12345"}),
    )
    card = (tmp_path / "README.md").read_text()
    assert (
        card.startswith("---\nlibrary_name: timm\n")
        and "# my_recipe" in card
        and "12345" in card
        and "mean [0.5, 0.5, 0.5]" in card
    )
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["tag"] == "my_recipe"
