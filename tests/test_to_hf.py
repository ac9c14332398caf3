import json

import numpy as np
import pytest
import timm
import torch
import transformers
from beit_samples import SMALL, same, sample
from PIL import Image
from safetensors.torch import load_file

from peco_ds.convert.read import read_weights
from peco_ds.convert.release import write_release
from peco_ds.convert.to_hf import to_hf
from peco_ds.convert.to_timm import to_timm

KINDS = ("mim", "features", "classifier")
NAMES = tuple(f"n{number:08d}" for number in range(7))


def released(folder, weights, to=to_hf):
    write_release(folder, to(weights), weights)
    return folder


def loaded(folder):
    architecture = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, report = architecture.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_that_transformers_writes(tmp_path, kind):
    released(tmp_path / "ours", sample(kind))
    loaded(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert same(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_reads_back_bit_for_bit(tmp_path, kind):
    weights = sample(kind, classes=NAMES if kind == "classifier" else None, mean=(0.5,) * 3, std=(0.25,) * 3)
    found = read_weights(released(tmp_path, weights))
    assert found.kind == kind and same(found.tensors, weights.tensors)
    assert (found.mean, found.std, found.classes) == (
        weights.mean,
        weights.std,
        weights.classes,
    ) and found.crop == pytest.approx(weights.crop, abs=0.01)


def test_the_config_says_beits_eps_sizes_flags_and_class_names(tmp_path):
    classifier = loaded(released(tmp_path / "classifier", sample("classifier", classes=NAMES))).config
    assert (
        classifier.layer_norm_eps == 1e-6
        and classifier.use_relative_position_bias
        and not classifier.use_shared_relative_position_bias
    )
    assert classifier.id2label[3] == NAMES[3] and classifier.label2id[NAMES[3]] == 3 and classifier.use_mean_pooling
    mim = loaded(released(tmp_path / "mim", sample("mim"))).config
    assert (
        mim.use_mask_token
        and mim.use_shared_relative_position_bias
        and not mim.use_relative_position_bias
        and mim.vocab_size == 50
    )
    assert (mim.image_size, mim.patch_size, mim.hidden_size, mim.num_hidden_layers, mim.intermediate_size) == (
        64,
        16,
        96,
        3,
        384,
    )


@pytest.mark.parametrize("crop", [0.875, 1.0])
def test_its_processor_shows_the_model_what_timms_evaluation_shows(tmp_path, real_data, crop):
    weights = sample("classifier", crop=crop)
    processor = transformers.AutoImageProcessor.from_pretrained(released(tmp_path / "hf", weights))
    model = timm.create_model(f"local-dir:{released(tmp_path / 'timm', weights, to_timm)}", pretrained=True)
    view = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = Image.open(real_data.kodak[0]).convert("RGB")
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    assert theirs.shape == (3, SMALL.image_px, SMALL.image_px)
    assert (theirs - view(image)).abs().mean() < 0.02, "of values that spread by about 1"


def test_a_half_precision_model_is_written_and_declared_so(tmp_path):
    weights = sample("classifier")
    half = type(weights)(
        **{**weights.__dict__, "tensors": {name: tensor.bfloat16() for name, tensor in weights.tensors.items()}}
    )
    assert loaded(released(tmp_path, half)).dtype == torch.bfloat16
    assert np.all([tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "model.safetensors").values()])
