import json

import pytest
import torch
from beit_samples import CODES, SMALL, classifier_shapes, index_buffers, mim_shapes, same, sample

from peco_ds.config import ModelSettings
from peco_ds.convert.read import read_weights
from peco_ds.convert.release import write_release
from peco_ds.convert.to_unilm import to_unilm
from peco_ds.errors import UserError
from peco_ds.models.beit_weights import BeitWeights


def released(folder, weights):
    write_release(folder, to_unilm(weights), weights)
    return folder


@pytest.mark.parametrize("kind", ["mim", "classifier"])
def test_the_file_has_the_buffers_of_unilms_modules_and_tensors_alone(tmp_path, kind):
    weights = sample(kind)
    content = torch.load(released(tmp_path, weights) / "model.pth", weights_only=True)
    assert content.keys() == {"model"}
    assert same(content["model"], weights.tensors | index_buffers(weights.tensors, SMALL))


@pytest.mark.parametrize(
    "kind, shapes, count", [("mim", mim_shapes, 12 * 15 + 8 + 2), ("classifier", classifier_shapes, 12 * 17 + 7)]
)
def test_the_base_model_at_full_depth_has_every_name_and_shape_of_unilms_state(kind, shapes, count):
    base = ModelSettings(image_px=224, patch_px=16, width=768, depth=12, heads=12)
    sizes = {"mim": dict(codes=8192), "classifier": dict(classes=1000)}[kind]
    expected = shapes(base, **sizes)
    weights = BeitWeights(
        kind, base, {name: torch.empty(shape, device="meta") for name, shape in expected.items()}, "drawn"
    )
    found = {name: tuple(tensor.shape) for name, tensor in to_unilm(weights).tensors["model.pth"].items()}
    tables = [name for name in expected if name.endswith("table")]
    assert found == expected | {name.replace("bias_table", "index"): (197, 197) for name in tables}
    assert len(found) == count


@pytest.mark.parametrize("kind", ["mim", "classifier"])
def test_a_release_reads_back_bit_for_bit(tmp_path, kind):
    names = tuple("abcdefg") if kind == "classifier" else None
    weights = sample(kind, classes=names, mean=(0.5,) * 3, std=(0.25,) * 3, crop=0.9)
    found = read_weights(released(tmp_path, weights))
    assert found.kind == kind and same(found.tensors, weights.tensors)
    assert (found.mean, found.std, found.crop, found.classes) == (weights.mean, weights.std, weights.crop, names)
    assert same(read_weights(tmp_path / "model.pth").tensors, weights.tensors), (
        "the file alone is enough for the tensors"
    )


def test_the_config_holds_the_arguments_of_unilms_model_class(tmp_path):
    arguments = json.loads((released(tmp_path, sample("mim")) / "config.json").read_text())["model_args"]
    assert (
        arguments["vocab_size"] == CODES
        and arguments["use_shared_rel_pos_bias"]
        and not arguments["use_rel_pos_bias"]
        and arguments["init_values"] > 0
    )
    assert (
        arguments["img_size"],
        arguments["patch_size"],
        arguments["embed_dim"],
        arguments["depth"],
        arguments["num_heads"],
    ) == (64, 16, 96, 3, 3)


def test_parts_of_a_larger_tensor_do_not_take_the_whole_into_the_file(tmp_path):
    weights = sample("mim")
    flat = torch.cat([tensor.flatten() for tensor in weights.tensors.values()] + [torch.zeros(10_000_000)])
    parts = dict(
        zip(weights.tensors, flat.split([tensor.numel() for tensor in weights.tensors.values()] + [10_000_000]))
    )
    views = {name: part.view(weights.tensors[name].shape) for name, part in parts.items()}
    released(tmp_path, BeitWeights("mim", SMALL, views, "parts of one vector"))
    assert (tmp_path / "model.pth").stat().st_size < 8_000_000
    assert same(read_weights(tmp_path).tensors, weights.tensors)


def test_a_backbone_without_head_is_refused():
    with pytest.raises(UserError, match="convert it to timm or hf"):
        to_unilm(sample("features"))
