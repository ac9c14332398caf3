"""Segmenters that others released or trained are read, released again, and started from: files made here in the real
layouts, those of transformers by transformers itself.
"""

import dataclasses
import logging
from collections import OrderedDict

import beit_samples
import pytest
import torch
from scene_samples import CLASSES as FOUR
from scene_samples import RECIPE
from test_segmenter import CLASSES, resized, toy
from timm.models.beit import gen_relative_position_index
from transformers import BeitConfig, BeitForSemanticSegmentation, UperNetConfig, UperNetForSemanticSegmentation

from peco_ds import convert_checkpoint
from peco_ds.config import SegmentRecipe
from peco_ds.convert.read import read_weights
from peco_ds.convert.read_segmenter import (
    default_taps,
    is_segmenter,
    read_segmenter,
    read_weights_or_segmenter,
    told_by_mmcv_config,
)
from peco_ds.convert.release import write_files, write_release
from peco_ds.convert.segmenter_layouts import segmenter_card, segmenter_release, to_unilm_names
from peco_ds.convert.start_segmenter import start_segmenter
from peco_ds.convert.to_timm import to_timm
from peco_ds.errors import UserError
from peco_ds.models.image_statistics import HALF, IMAGENET
from peco_ds.models.segmenter import build_segmenter
from peco_ds.models.segmenter_weights import segmenter_of
from peco_ds.recipe_files import load_recipe
from peco_ds.schema import read_json, write_json

NAMES = tuple(f"class {number}" for number in range(CLASSES))
# As mmcv keeps it in a checkpoint, in short.
CONFIG = """norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    backbone=dict(
        type='BEiT', img_size=64, patch_size=16, embed_dim=48, depth=12, num_heads=3,
        out_indices=[3, 5, 7, 11]),
    decode_head=dict(type='UPerHead', in_channels=[48, 48, 48, 48], in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6)),
    auxiliary_head=dict(
        type='FCNHead', loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.3)))
img_norm_cfg = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True)
"""
META = {"mmseg_version": "0.11.0", "config": CONFIG, "CLASSES": list(NAMES), "PALETTE": [[0, 0, 0]] * CLASSES}


def mmseg_names(tensors):
    """MMSegmentation's own names, after its `beit2mmseg.py` and Feature2Pyramid."""
    found = {}
    for name, tensor in to_unilm_names(tensors).items():
        for old, new in (
            ("backbone.blocks.", "backbone.layers."),
            ("patch_embed.proj.", "patch_embed.projection."),
            (".norm1.", ".ln1."),
            (".norm2.", ".ln2."),
            (".mlp.fc1.", ".ffn.layers.0.0."),
            (".mlp.fc2.", ".ffn.layers.1."),
            ("backbone.fpn1.", "neck.upsample_4x."),
            ("backbone.fpn2.", "neck.upsample_2x."),
        ):
            name = name.replace(old, new)
        found[name] = tensor
    return found


def save(path, tensors, **more):
    torch.save({**more, "state_dict": OrderedDict(tensors)}, path)
    return path


def logits_of(weights, images):
    with torch.no_grad():
        return segmenter_of(weights)(images).logits


def images_of(side=64):
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(3))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def convert(source, to, out, *more):
    """By default without transformers in another process, which takes long."""
    verify = more or ([] if to == "unilm" else ["--no-verify"])
    assert convert_checkpoint.main([str(source), "--to", to, "--out", str(out), *verify]) == 0
    return out


def hf_backbone(**more):
    return BeitConfig(
        **dict(
            image_size=64,
            patch_size=16,
            hidden_size=48,
            num_hidden_layers=12,
            num_attention_heads=3,
            intermediate_size=96,
            layer_norm_eps=1e-6,
            use_relative_position_bias=True,
            layer_scale_init_value=1.0,
            auxiliary_channels=16,
            num_labels=CLASSES,
        )
        | more
    )


def saved_by_transformers(model, folder):
    """Every parameter of weight: a fresh one's tables and biases are 0."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.ndim < 2 and tensor.is_floating_point() or "relative_position_bias_table" in name:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    model.save_pretrained(folder)
    return model.eval()


def upernet_folder(folder, **more):
    backbone = hf_backbone(
        out_features=["stage4", "stage6", "stage8", "stage12"], add_fpn=True, reshape_hidden_states=True
    )
    settings = dict(hidden_size=24, auxiliary_in_channels=48, auxiliary_channels=16, num_labels=CLASSES) | more
    return saved_by_transformers(
        UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **settings)), folder
    )


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("layout", [to_unilm_names, mmseg_names], ids=["unilm", "mmseg"])
def test_a_released_file_gives_the_segmenter_that_wrote_it_with_all_that_mmcv_keeps(tmp_path, layout):
    weights = toy()
    path = save(tmp_path / "upernet.pth", layout(weights.tensors), meta=META, optimizer={"state": {}})
    found = read_segmenter(path)
    assert equal(found.tensors, weights.tensors) and found.model.image_px == 64 and found.classes == NAMES
    assert found.segmenter.taps == (3, 5, 7, 11) and found.segmenter.auxiliary_weight == 0.3
    assert (found.mean, found.std) == HALF and "as its config states" in found.facts["image statistics"]
    images = images_of()
    assert torch.equal(logits_of(found, images), logits_of(weights, images))


@pytest.mark.parametrize("layout", [to_unilm_names, mmseg_names], ids=["unilm", "mmseg"])
@pytest.mark.parametrize("to", ["hf", "unilm"])
def test_a_released_file_becomes_a_release_that_is_read_as_the_same_network(tmp_path, layout, to, capsys):
    weights = toy()
    path = save(tmp_path / "upernet.pth", layout(weights.tensors), meta=META)
    again = read_segmenter(convert(path, to, tmp_path / "out"))
    assert equal(again.tensors, weights.tensors) and again.classes == NAMES and (again.mean, again.std) == HALF
    assert again.segmenter.taps == (3, 5, 7, 11)
    assert ("not verified" if to == "hf" else "read again holds the same 288") in capsys.readouterr().out


def test_a_unilm_file_written_read_and_written_again_is_the_same_bit_for_bit(tmp_path):
    path = save(tmp_path / "upernet.pth", to_unilm_names(toy().tensors), meta=META)
    first = convert(path, "unilm", tmp_path / "one")
    second = convert(first, "unilm", tmp_path / "two")
    third = convert(second / "model.pth", "unilm", tmp_path / "three")
    assert (first / "model.pth").read_bytes() == (second / "model.pth").read_bytes()
    assert (first / "model.pth").read_bytes() == (third / "model.pth").read_bytes()


def test_a_release_for_unilm_is_a_checkpoint_of_mmsegmentation(tmp_path):
    """No mmsegmentation is needed to see it: its tools take `state_dict`, and classes and config out of `meta`."""
    weights = dataclasses.replace(toy(), classes=NAMES)
    release = segmenter_release(weights, "unilm")
    write_files(tmp_path, release, segmenter_card(release, weights))
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    assert content.keys() == {"meta", "state_dict"} and content["meta"]["CLASSES"] == list(NAMES)
    tables = {name for name in content["state_dict"] if name.endswith("relative_position_bias_table")}
    assert len(tables) == 12
    for name in tables:
        index = content["state_dict"][name.replace("bias_table", "index")]
        assert index.dtype == torch.int64 and torch.equal(index, gen_relative_position_index((4, 4)))
    given = {"dict": dict}
    exec(content["meta"]["config"], given)  # it is Python, and says what the network is
    backbone, head = given["model"]["backbone"], given["model"]["decode_head"]
    assert backbone["out_indices"] == [3, 5, 7, 11] and backbone["embed_dim"] == 48 and head["channels"] == 24
    assert given["model"]["test_cfg"]["crop_size"] == (64, 64) and given["img_norm_cfg"]["mean"][0] == 123.675


def test_upernet_folders_of_transformers_are_read_with_its_logits(tmp_path):
    theirs = upernet_folder(tmp_path / "theirs")
    write_json(tmp_path / "theirs" / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    found = read_segmenter(tmp_path / "theirs")
    images = images_of()
    with torch.no_grad():
        expected = theirs(images).logits
    assert found.segmenter.taps == (3, 5, 7, 11) and (found.mean, found.std) == HALF and found.classes is None
    difference = (resized(logits_of(found, images), images.shape[2:]) - expected).abs().max()
    assert difference < 5e-5 * expected.abs().max() and expected.std() > 0.01
    for to in ("hf", "unilm"):
        assert equal(read_segmenter(convert(tmp_path / "theirs", to, tmp_path / to)).tensors, found.tensors)


def test_beit_heads_of_transformers_are_read_with_its_logits_and_a_warning_names_the_shifted_blocks(tmp_path, caplog):
    theirs = saved_by_transformers(BeitForSemanticSegmentation(hf_backbone(out_indices=[3, 5, 7, 11])), tmp_path / "hf")
    found, images = read_segmenter(tmp_path / "hf"), images_of()
    assert "taps two blocks too early" in caplog.text and "1, 3, 5, 9" in caplog.text and "3, 5, 7, 11" in caplog.text
    with torch.no_grad():
        expected = theirs(images).logits
    assert expected.std() > 0.01
    assert (logits_of(found, images) - expected).abs().max() < 5e-5 * expected.abs().max()
    assert found.segmenter.taps == (1, 3, 5, 9) and "two before" in found.facts["blocks seen"]
    again = read_segmenter(convert(tmp_path / "hf", "unilm", tmp_path / "unilm"))
    assert again.segmenter.taps == (1, 3, 5, 9) and equal(again.tensors, found.tensors)
    bare = read_segmenter(tmp_path / "hf" / "model.safetensors")
    assert bare.segmenter.taps == (1, 3, 5, 9)
    # Loaded by transformers in another process, whose logits are compared.
    convert(tmp_path / "hf", "hf", tmp_path / "upernet", "--verify")
    assert read_json(tmp_path / "upernet" / "config.json")["backbone_config"]["out_features"][-1] == "stage10"


def test_one_bias_table_for_all_blocks_becomes_every_blocks_own(tmp_path):
    tensors = to_unilm_names(toy().tensors)
    tables = [name for name in tensors if name.endswith(("relative_position_bias_table", "relative_position_index"))]
    shared = next(tensors[name] for name in tables if name.endswith("table"))
    left = {name: tensor for name, tensor in tensors.items() if name not in tables}
    path = save(tmp_path / "x.pth", left | {"backbone.rel_pos_bias.relative_position_bias_table": shared})
    found = read_segmenter(path)
    assert torch.equal(found.tensors["backbone.blocks.11.attn.relative_position_bias_table"], shared)
    assert "every block" in found.facts["bias tables"]


@pytest.mark.parametrize(
    "name, statistics, words",
    [
        ("beit_base_patch16_640_pt22k_ft22ktoade20k.pth", IMAGENET, "as the name"),
        ("upernet_beit_base_12_512_slide_160k_ade20k_pt.pth", IMAGENET, "as the name"),
        ("anything.pth", IMAGENET, "assumed"),
    ],
)
def test_where_a_file_tells_no_statistics_its_name_does_or_they_are_assumed(tmp_path, name, statistics, words):
    found = read_segmenter(save(tmp_path / name, to_unilm_names(toy().tensors)))
    assert (found.mean, found.std) == statistics and words in found.facts["image statistics"]
    asked = read_segmenter(tmp_path / name, statistics="half")
    assert (asked.mean, asked.std) == HALF


def test_the_blocks_of_published_depths():
    assert [default_taps(depth) for depth in (12, 24, 32)] == [(3, 5, 7, 11), (7, 11, 15, 23), (7, 15, 23, 31)]


def test_a_config_that_states_two_things_states_nothing():
    told = told_by_mmcv_config(CONFIG + "\nbackbone = dict(out_indices=(1, 2, 3, 4))")
    assert told["taps"] is None and told["statistics"] == HALF
    assert told_by_mmcv_config("mean=[1, 2, 3]\nstd=[0, 0, 0]")["statistics"] is None


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("decode_head.fpn_convs.1.conv.weight"), "fpn_convs.1.conv.weight is missing"),
        (lambda t: t.pop("decode_head.bottleneck.conv.weight"), "its head is no UperNet"),
        (lambda t: t.update({"decode_head.extra.weight": torch.ones(2)}), "decode_head.extra.weight has no place"),
        (lambda t: t.update({"decode_head.conv_seg.bias": torch.ones(3)}), "shape (3,), an UperNet of its other sizes"),
        (lambda t: t.update({"backbone.fpn2.0.bias": torch.full((48,), torch.nan)}), "not finite"),
        (lambda t: t.pop("backbone.patch_embed.proj.weight"), "holds no BEiT"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_the_tensors_name(tmp_path, change, words):
    tensors = to_unilm_names(toy().tensors)
    change(tensors)
    with pytest.raises(UserError) as refused:
        read_segmenter(save(tmp_path / "x.pth", tensors, meta=META))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"pool_scales": [1, 2]}, "pool_scales is a list of 2 in its config.json; the head here has [1, 2, 3, 6]"),
        ({"backbone_config": {"model_type": "swin"}}, "its backbone is swin"),
        ({"auxiliary_num_convs": 2}, "auxiliary_num_convs is 2"),
    ],
)
def test_a_folder_of_another_network_is_refused(tmp_path, config, words):
    upernet_folder(tmp_path)
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | config)
    with pytest.raises(UserError) as refused:
        read_segmenter(tmp_path)
    assert words in str(refused.value)


def test_a_pickle_that_would_run_code_is_refused_unread(tmp_path):
    class Runs:
        def __reduce__(self):
            return exec, ("raise SystemExit('it ran')",)

    path = tmp_path / "x.pth"
    torch.save({"state_dict": to_unilm_names(toy().tensors), "meta": Runs()}, path)
    assert not is_segmenter(path)
    with pytest.raises(UserError, match="could run anything"):
        read_weights_or_segmenter(path)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--to", "timm"], "a segmenter, and timm has none as it is made here; give --to hf or --to unilm"),
        (["--to", "hf", "--weights", "ema"], "keeps no moving average"),
        (["--to", "hf", "--from", "hf"], "of layout unilm, not hf"),
    ],
)
def test_what_no_library_or_file_has_is_refused_in_one_line(tmp_path, more, words):
    path = save(tmp_path / "upernet.pth", to_unilm_names(toy().tensors), meta=META)
    with pytest.raises(UserError) as refused:
        convert_checkpoint.main([str(path), "--out", str(tmp_path / "out"), *more])
    assert words in str(refused.value) and not (tmp_path / "out").exists()


def test_torchvision_is_for_detectors(tmp_path):
    path = save(tmp_path / "upernet.pth", to_unilm_names(toy().tensors), meta=META)
    with pytest.raises(UserError, match="a segmenter, and torchvision has none as it is made here"):
        convert_checkpoint.main([str(path), "--to", "torchvision", "--out", str(tmp_path / "out")])
    weights = beit_samples.sample("classifier")
    write_release(tmp_path / "release", to_timm(weights), weights)
    with pytest.raises(UserError, match="a backbone, and torchvision has none .*; give --to timm or --to hf or"):
        convert_checkpoint.main([str(tmp_path / "release"), "--to", "torchvision", "--out", str(tmp_path / "out")])


def test_readers_of_backbones_refuse_segmenters_by_name(tmp_path):
    path = save(tmp_path / "upernet.pth", to_unilm_names(toy().tensors), meta=META)
    for source in (path, convert(path, "hf", tmp_path / "hf"), convert(path, "unilm", tmp_path / "unilm")):
        with pytest.raises(UserError, match="segment"):
            read_weights(source)


# -------------------------------------------------------------------------------------------- starting from


def recipe_and_model(*more, classes=FOUR):
    settings = "segmenter.taps=[3,5,7,11] model.patch_px=16 model.image_px=96 model.depth=12 model.mlp_ratio=4"
    recipe = load_recipe(SegmentRecipe, "segment_vitb16", [*RECIPE, *settings.split(), "segmenter.head_width=24",
                                                         "segmenter.auxiliary_width=16", *more]).recipe  # fmt: skip
    return recipe, build_segmenter(recipe.model, recipe.segmenter, len(classes))


def taken(model, weights, prefix):
    ours = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}
    return all(torch.equal(tensor, weights.tensors[name]) for name, tensor in ours.items() if "_table" not in name)


def test_a_whole_segmenter_of_the_same_classes_is_taken_whole_and_its_tables_fit_the_crop():
    weights = dataclasses.replace(toy(), classes=NAMES)
    recipe, model = recipe_and_model(classes=NAMES)
    assert start_segmenter(model, weights, recipe, NAMES) == [] and taken(model, weights, "")
    table = model.state_dict()["backbone.blocks.3.attn.relative_position_bias_table"]
    assert table.shape[0] == (2 * 6 - 1) ** 2 + 3 and table.std() > 0.1


@pytest.mark.parametrize(
    "classes, more, words",
    [
        (FOUR, [], "its head has 7 classes, the image set has 4"),
        (tuple(reversed(NAMES)), [], "is 'class 0', of the image set 'class 6'"),
        (NAMES, ["init.head=new"], "init.head is new"),
        (NAMES, ["segmenter.head_width=16"], "(segmenter.head_width)"),
    ],
)
def test_heads_that_do_not_fit_are_fresh_and_that_is_said_aloud(caplog, classes, more, words):
    weights = dataclasses.replace(toy(), classes=NAMES)
    recipe, model = recipe_and_model(*more, classes=classes)
    with caplog.at_level(logging.WARNING, "peco_ds"):
        assert start_segmenter(model, weights, recipe, classes) == ["heads"]
    assert "fresh ones are trained" in caplog.text and words in caplog.text
    assert taken(model, weights, "backbone.") and taken(model, weights, "pyramid.")
    assert not model.state_dict()["decode_head.conv_seg.bias"].any()


def test_an_auxiliary_head_that_is_not_there_is_fresh_alone():
    weights = dataclasses.replace(toy(auxiliary_weight=0.0), classes=NAMES)
    recipe, model = recipe_and_model(classes=NAMES)
    assert start_segmenter(model, weights, recipe, NAMES) == ["auxiliary head"] and taken(
        model, weights, "decode_head."
    )
