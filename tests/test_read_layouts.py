"""Weights in layouts that people hold beside the released ones: containers, wrappers, MMPretrain, odd sizes; and the
files of neighbouring models, each refused by its own name.
"""

import logging
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from beit_samples import CODES, SMALL, classifier_shapes, drawn, index_buffers, mim_shapes, same
from published_samples import taming_tensors
from timm.layers import resample_abs_pos_embed
from timm.models.beit import Beit

from peco_ds.config import ClassifierSettings, ModelSettings
from peco_ds.convert.initialize import check_sizes, start_classifier
from peco_ds.convert.read import read_weights
from peco_ds.convert.release import write_release
from peco_ds.convert.to_hf import to_hf
from peco_ds.convert.to_timm import to_timm
from peco_ds.convert.to_unilm import to_unilm
from peco_ds.convert.verify import compare, model_outputs
from peco_ds.errors import UserError
from peco_ds.models.classifier import build_classifier
from peco_ds.models.feature_nets import load_feature_net
from peco_ds.models.published_tokenizers import read_published


def stored(content, path):
    torch.save(content, path)
    return path


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


# ------------------------------------------------------------------------------------ containers and wrappers

CONTAINERS = {
    "DeepSpeed's engine in a script's": lambda state: {"model": {"module": state}, "epoch": 3},
    "three deep": lambda state: {"state_dict": {"model": {"module": state}}},
    "data parallel in a container": lambda state: {"model": prefixed("module.", state)},
    "compiled": lambda state: {"model": prefixed("_orig_mod.", state)},
    "compiled under data parallelism": lambda state: {"state_dict": prefixed("module._orig_mod.", state)},
    "compiled blocks": lambda state: {
        name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in state.items()
    },
    "Lightning's": lambda state: {"state_dict": prefixed("model.", state), "pytorch-lightning_version": "2.1"},
    "sharded": lambda state: {"model": prefixed("_fsdp_wrapped_module.", state)},
    "a backbone's": lambda state: {"state_dict": prefixed("backbone.", state)},
}


@pytest.mark.parametrize("what", CONTAINERS)
def test_containers_in_containers_and_the_names_of_wrappers_are_opened(tmp_path, what):
    tensors = drawn(classifier_shapes(SMALL))
    content = CONTAINERS[what](tensors | index_buffers(tensors, SMALL))
    assert same(read_weights(stored(content, tmp_path / "w.pth")).tensors, tensors)


def test_the_average_of_a_wrapped_model_is_opened_too(tmp_path):
    raw, average = drawn(mim_shapes(SMALL), 0), drawn(mim_shapes(SMALL), 1)
    content = {"model": {"module": raw}, "model_ema": {"module": prefixed("module.", average)}}
    path = stored(content, tmp_path / "w.pth")
    assert same(read_weights(path).tensors, average) and same(read_weights(path, average="raw").tensors, raw)


def test_a_checkpoint_that_holds_itself_and_two_names_for_one_tensor_end_in_a_refusal(tmp_path):
    content: dict = {}
    content["model"] = content
    with pytest.raises(UserError, match="holds no BEiT"):
        read_weights(stored(content, tmp_path / "w.pth"))
    tensors = drawn(mim_shapes(SMALL))
    tensors["_orig_mod.cls_token"] = tensors["cls_token"]
    with pytest.raises(UserError, match="tensor _orig_mod.cls_token has no place"):
        read_weights(stored(tensors, tmp_path / "w.pth"))


def test_a_judge_and_a_tokenizer_are_opened_in_the_same_way(tmp_path):
    net = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=0)
    path = stored({"model": {"module": prefixed("module.", net.state_dict())}}, tmp_path / "judge.pth")
    judge = load_feature_net(str(path))
    images = torch.rand(1, 3, 32, 32)
    plain = load_feature_net(str(stored(net.state_dict(), tmp_path / "plain.pth")))
    assert torch.equal(judge.targets(images), plain.targets(images))
    tensors = taming_tensors("vqgan")
    found = read_published([stored({"state_dict": prefixed("module.", tensors)}, tmp_path / "last.ckpt")])
    assert same(found.state_dict, read_published([stored(tensors, tmp_path / "plain.ckpt")]).state_dict)


def test_the_averages_of_tamings_ema_quantiser_are_left_out_and_counted(tmp_path):
    tensors = taming_tensors("vqgan")
    codes = tensors["quantize.embedding.weight"]
    averages = {"cluster_size": torch.ones(len(codes)), "embed_avg": codes.clone()}
    path = stored({"state_dict": tensors | prefixed("quantize.embedding.", averages)}, tmp_path / "last.ckpt")
    found = read_published([path])
    plain = read_published([stored(tensors, tmp_path / "plain.ckpt")])
    assert same(found.state_dict, plain.state_dict) and found.left_out == plain.left_out + 2


# -------------------------------------------------------------------------------------------------- MMPretrain

THEIRS = (
    ("patch_embed.proj.", "patch_embed.projection."),
    ("mlp.fc1.", "ffn.layers.0.0."),
    ("mlp.fc2.", "ffn.layers.1."),
    ("blocks.", "layers."),
)


def as_mmpretrain(tensors, norm="ln1"):
    """The same tensors under MMPretrain's names: `norm` is the final norm's."""
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in THEIRS:
            name = name.replace(ours, theirs)
        if name.startswith("layers."):
            name = name.replace(".norm1.", ".ln1.").replace(".norm2.", ".ln2.")
        if name.startswith("lm_head."):
            name = name.replace("lm_head.", "head.cls_head.")
        elif name.startswith("head."):
            name = name.replace("head.", "head.fc.")
        elif name.startswith("fc_norm."):
            name = "backbone." + name.replace("fc_norm.", "ln2.")
        elif name.startswith("norm."):
            name = name.replace("norm.", "neck.norm." if norm == "neck" else "backbone.ln1.")
        else:
            name = "backbone." + name
        renamed[name] = tensor
    return renamed


def test_mmpretrains_beit_is_read_under_its_own_names(tmp_path):
    mim, classifier = drawn(mim_shapes(SMALL)), drawn(classifier_shapes(SMALL))
    training = {"data_preprocessor.mean": torch.zeros(3, 1, 1), "target_generator.encoder.blocks.0.w": torch.zeros(2)}
    content = {"meta": {"epoch": 300}, "state_dict": as_mmpretrain(mim) | training}
    assert same(read_weights(stored(content, tmp_path / "mim.pth")).tensors, mim)
    index = as_mmpretrain(index_buffers(classifier, SMALL))
    content = {"state_dict": as_mmpretrain(classifier) | index}
    assert same(read_weights(stored(content, tmp_path / "beit-base_3rdparty_in1k.pth")).tensors, classifier)
    backbone = {name: tensor for name, tensor in classifier.items() if not name.startswith("head.")}
    bare = {name.removeprefix("backbone."): tensor for name, tensor in as_mmpretrain(backbone).items()}
    assert read_weights(stored(bare, tmp_path / "backbone.pth")).kind == "features"


def test_mmpretrains_beit_v2_is_read_without_its_second_branch(tmp_path, caplog):
    mim = drawn(mim_shapes(SMALL))
    branch = {
        f"neck.patch_aggregation.0.{name.removeprefix('backbone.layers.0.')}": tensor
        for name, tensor in as_mmpretrain(mim).items()
        if name.startswith("backbone.layers.0.")
    }
    content = {"state_dict": as_mmpretrain(mim, norm="neck") | branch}
    with caplog.at_level(logging.INFO, "peco_ds"):
        weights = read_weights(stored(content, tmp_path / "w.pth"))
    assert same(weights.tensors, mim) and f"{len(branch)} tensors" in weights.facts["left out"]


def test_two_tensors_for_one_name_of_ours_are_refused(tmp_path):
    tensors = as_mmpretrain(drawn(mim_shapes(SMALL)))
    tensors["neck.norm.weight"] = tensors["backbone.ln1.weight"]
    with pytest.raises(UserError, match="stands for norm.weight, as another one does"):
        read_weights(stored(tensors, tmp_path / "w.pth"))


# -------------------------------------------------------------------------------------------------- odd sizes


@pytest.mark.parametrize("width, hidden", [(704, 3136), (96, 367), (1408, 6144)])
@pytest.mark.parametrize("to", [to_timm, to_hf, to_unilm])
def test_a_hidden_layer_whose_ratio_is_rounded_is_not_called_damaged(tmp_path, width, hidden, to):
    model = ModelSettings(image_px=32, patch_px=16, width=width, depth=1, heads=width // 32, drop_path=0.0)
    tensors = drawn(mim_shapes(model))
    for name, shape in (("fc1.weight", (hidden, width)), ("fc1.bias", (hidden,)), ("fc2.weight", (width, hidden))):
        tensors[f"blocks.0.mlp.{name}"] = torch.zeros(shape)
    weights = read_weights(stored(tensors, tmp_path / "w.pth"), statistics="imagenet")
    assert int(width * weights.model.mlp_ratio) == hidden
    write_release(tmp_path / "release", to(weights), weights)
    again = read_weights(tmp_path / "release")
    assert same(again.tensors, tensors) and again.model == weights.model
    assert np.isfinite(model_outputs(weights).values["logits"]).all()


# ------------------------------------------------------------------------------------------------- neighbours


def absolute(width=96, codes=CODES):
    model = ModelSettings(image_px=64, patch_px=16, width=width, depth=1, heads=width // 32)
    shapes = mim_shapes(model, codes)
    kept = {name: shape for name, shape in shapes.items() if "gamma" not in name and "table" not in name}
    return drawn(kept | {"pos_embed": (1, 17, width)})


BEIT3 = ("text_embed.weight", "vision_embed.proj.weight", "encoder.layers.0.self_attn.k_proj.A.weight")
NEIGHBOURS = {
    "an EVA-01": lambda: absolute(width=1408),
    "an EVA-01 (absolute positions": lambda: absolute(codes=768),
    "an EVA-02": lambda: absolute() | {"rope.freqs_cos": torch.zeros(16, 32)},
    "a BEiT-3": lambda: prefixed("beit3.", {name: torch.zeros(2, 2) for name in BEIT3}),
    "a segmentation model": lambda: (
        prefixed("backbone.", drawn(classifier_shapes(SMALL))) | {"decode_head.conv_seg.weight": torch.zeros(150, 8)}
    ),
    "a detector of mmdetection": lambda: (
        prefixed("backbone.", drawn(classifier_shapes(SMALL))) | {"roi_head.bbox_head.fc_cls.weight": torch.zeros(9, 8)}
    ),
    "a tokenizer, not a backbone": lambda: drawn(mim_shapes(SMALL)) | {"quantize.embedding.weight": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("words", NEIGHBOURS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_neighbouring_model_is_refused_by_its_own_name(tmp_path, words, prefix):
    path = stored({"model": prefixed(prefix, NEIGHBOURS[words]())}, tmp_path / "w.pth")
    with pytest.raises(UserError) as caught:
        read_weights(path)
    refusal = str(caught.value)
    assert f": {words}" in refusal and "\n" not in refusal and ("; give " in refusal or "import_tokenizer" in refusal)


def test_an_eva_is_known_by_its_file_where_its_head_was_dropped(tmp_path):
    with pytest.raises(UserError, match="an EVA-01"):
        read_weights(stored(absolute(), tmp_path / "eva_psz14.pt"))


# ------------------------------------------------------------------------------------------ absolute positions

ABSOLUTE = ModelSettings(image_px=64, patch_px=16, width=128, depth=2, heads=2, drop_path=0.0)


def pt1k_800ep(shapes=mim_shapes):
    """beit_base_patch16_224_pt1k_800ep.pth: absolute positions, no relative bias, no layer scale."""
    kept = {name: shape for name, shape in shapes(ABSOLUTE).items() if "gamma" not in name and "table" not in name}
    return drawn(kept | {"pos_embed": (1, 17, 128)})


def timms(**options):
    arguments = dict(img_size=64, patch_size=16, embed_dim=128, depth=2, num_heads=2, init_values=None)
    return Beit(**arguments, use_abs_pos_emb=True, use_rel_pos_bias=False, **options).eval()


def test_absolute_positions_without_relative_bias_and_layer_scale_compute_what_the_released_model_does(tmp_path):
    tensors = pt1k_800ep()
    weights = read_weights(stored({"model": tensors}, tmp_path / "beit_base_patch16_224_pt1k_800ep.pth"))
    assert weights.kind == "mim" and weights.model.absolute_positions and "added" in weights.facts
    reference = timms(num_classes=0, global_pool="token")
    head = {name: tensors.pop(name) for name in ("mask_token", "lm_head.weight", "lm_head.bias")}
    reference.load_state_dict(tensors)
    found = model_outputs(weights)
    with torch.no_grad():
        expected = reference.forward_features(found.images_norm)
        tokens = torch.where(found.is_masked[..., None], head["mask_token"], reference.patch_embed(found.images_norm))
        tokens = torch.cat([reference.cls_token.expand(2, -1, -1), tokens], dim=1) + reference.pos_embed
        for block in reference.blocks:
            tokens = block(tokens)
        logits = reference.norm(tokens)[:, 1:] @ head["lm_head.weight"].T + head["lm_head.bias"]
    np.testing.assert_allclose(
        found.values["tokens"], expected.numpy(), rtol=0, atol=1e-5 * float(expected.abs().max())
    )
    np.testing.assert_allclose(found.values["logits"], logits.numpy(), rtol=0, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize("to", [to_timm, to_hf, to_unilm])
def test_absolute_positions_go_through_every_release(tmp_path, to):
    for kind, shapes in (("mim", mim_shapes), ("classifier", classifier_shapes)):
        weights = read_weights(stored({"model": pt1k_800ep(shapes)}, tmp_path / f"{kind}.pth"), statistics="imagenet")
        write_release(tmp_path / kind, to(weights), weights)
        assert same(read_weights(tmp_path / kind).tensors, weights.tensors)
        library = {to_timm: "timm", to_hf: "transformers", to_unilm: "unilm"}[to]
        assert compare(tmp_path / kind, library, model_outputs(weights)) < 1e-5


def test_fine_tuning_takes_absolute_positions_where_the_recipe_has_them_and_resizes_them_as_timm_does(tmp_path):
    weights = read_weights(stored({"model": pt1k_800ep()}, tmp_path / "w.pth"), statistics="imagenet")
    larger = replace(weights.model, image_px=96)
    with pytest.raises(UserError, match="set model.absolute_positions=true"):
        check_sizes(weights, replace(larger, absolute_positions=False))
    model = build_classifier(larger, ClassifierSettings(), 5)
    fresh = start_classifier(model, weights, larger, classes=tuple("abcde"), head="auto")
    assert "pos_embed" not in fresh
    wanted = resample_abs_pos_embed(weights.tensors["pos_embed"], [6, 6], antialias=False)
    torch.testing.assert_close(model.pos_embed.detach(), wanted, rtol=1e-4, atol=1e-5)
    images = torch.randn(2, 3, 96, 96)
    reference = timms(num_classes=5, global_pool="avg")
    reference.set_input_size(img_size=(96, 96))
    state = {name: tensor for name, tensor in model.state_dict().items() if "gamma" not in name and "table" not in name}
    reference.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), reference(images), rtol=1e-4, atol=1e-6)
