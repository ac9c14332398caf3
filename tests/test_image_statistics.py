import argparse
import json
from functools import partial

import pytest
import timm
import torch
from beit_samples import SMALL, classifier_shapes, drawn, mim_shapes
from safetensors.torch import save_file

from peco_ds.convert.read import read_weights
from peco_ds.convert.release import write_release
from peco_ds.convert.to_hf import to_hf
from peco_ds.convert.to_timm import to_timm
from peco_ds.convert.to_unilm import to_unilm
from peco_ds.evaluate import load_classifier
from peco_ds.models.feature_nets import load_feature_net
from peco_ds.models.image_statistics import HALF, IMAGENET, statistics_of_name
from peco_ds.models.timm_classifier import load_timm_classifier

ASSUMED = "ImageNet's are assumed"


def saved(path, kind=classifier_shapes, **beside):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": drawn(kind(SMALL)), **beside}, path)
    return path


NAMES = {
    "beit_base_patch16_224_pt22k.pth": HALF,
    "beit_large_patch16_512_pt22k_ft22kto1k.pth": HALF,
    "beit_base_patch16_384_pt22k_ft22kto1k (1).pth": HALF,
    "microsoft/beit-base-patch16-224": HALF,
    "beit-base_3rdparty_in1k_20221114-c0a4df23.pth": HALF,
    "beit_base_patch16_224.in22k_ft_in22k_in1k.safetensors": HALF,
    "vit_base_patch16_224.augreg_in21k.bin": HALF,
    "beit_base_patch16_224_pt1k_800ep.pth": IMAGENET,
    "beitv2_base_patch16_224_pt1k_ft21kto1k.pth": IMAGENET,
    "beitv2-base_3rdparty_in1k_20221114-73e11905.pth": IMAGENET,
    "deit_small_patch16_224-cd65a155.pth": IMAGENET,
    "deit_3_base_224_21k.pth": IMAGENET,
    "mae_pretrain_vit_large.pth": IMAGENET,
    "facebook/vit-mae-base": IMAGENET,
    "vit-b-300ep.pth.tar": IMAGENET,
    "linear-vit-s-300ep.pth.tar": IMAGENET,
    "r-50-1000ep.pth.tar": IMAGENET,
    "dino_vitbase16_pretrain.pth": IMAGENET,
    "dinov2_vits14_reg4_pretrain.pth": IMAGENET,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_release_tells_what_its_images_had(name):
    found = statistics_of_name(name.rpartition("/")[2])
    assert found is not None and (found.mean, found.std) == NAMES[name]


@pytest.mark.parametrize(
    "name", ["checkpoint-799.pth", "mybeit_base.pth", "vit_base_patch16_224.pth", "model.mine.pth"]
)
def test_a_name_of_nobodys_release_tells_nothing(name):
    assert statistics_of_name(name) is None


def arguments(**values):
    return argparse.Namespace(model="beit_base_patch16_224", **values)


TELLING = {
    "the flag of BEiT's scripts": (arguments(imagenet_default_mean_and_std=True), IMAGENET),
    "its absence": (arguments(imagenet_default_mean_and_std=False), HALF),
    "a dictionary": ({"imagenet_default_mean_and_std": False}, HALF),
    "timm's": (arguments(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]), HALF),
    "MAE's": (arguments(norm_pix_loss=True), IMAGENET),
}


@pytest.mark.parametrize("what", TELLING)
def test_the_arguments_in_a_checkpoint_tell_before_the_name_does(tmp_path, caplog, what):
    given, (mean, std) = TELLING[what]
    other = "beitv2_base_patch16_224_pt1k" if mean == HALF[0] else "beit_base_patch16_224_pt22k"
    for name in ("checkpoint-99.pth", f"{other}.pth"):
        weights = read_weights(saved(tmp_path / name, args=given))
        assert (weights.mean, weights.std) == (mean, std)
    assert ASSUMED not in caplog.text


@pytest.mark.parametrize(
    "given",
    [arguments(mean=None, std=None), arguments(mean=[1, "a", None], std=[0.5]), "text", {"mean": [9] * 3}, None],
)
def test_where_nothing_tells_the_log_and_the_card_say_that_they_are_assumed(tmp_path, caplog, given):
    weights = read_weights(saved(tmp_path / "w.pth", args=given))
    assert (weights.mean, weights.std) == IMAGENET and "assumed" in weights.facts["image statistics"]
    assert caplog.text.count(ASSUMED) == 1 and "--statistics half (init.statistics=half)" in caplog.text
    write_release(tmp_path / "release", to_timm(weights), weights)
    assert (
        "| image statistics | ImageNet's mean and standard deviation; assumed"
        in (tmp_path / "release" / "README.md").read_text()
    )


@pytest.mark.parametrize("to", [to_timm, to_hf, to_unilm])
def test_what_was_assumed_once_stays_assumed_over_releases_until_somebody_tells(tmp_path, caplog, to):
    weights = read_weights(saved(tmp_path / "w.pth"))
    write_release(tmp_path / "first", to(weights), weights)
    caplog.clear()
    again = read_weights(tmp_path / "first")
    assert ASSUMED in caplog.text and "assumed" in again.facts["image statistics"]
    told = read_weights(tmp_path / "first", statistics="imagenet")
    write_release(tmp_path / "second", to(told), told)
    caplog.clear()
    final = read_weights(tmp_path / "second")
    assert ASSUMED not in caplog.text and final.facts["image statistics"].endswith("as its config states")


def test_a_folder_of_hugging_face_without_preprocessor_is_told_by_its_name(tmp_path, caplog):
    half = read_weights(saved(tmp_path / "w.pth"), statistics="half")
    for name in ("beit-base-patch16-224-pt22k-ft22k", "mine"):
        write_release(tmp_path / name, to_hf(half), half)
        (tmp_path / name / "preprocessor_config.json").unlink()
        (tmp_path / name / "README.md").unlink()
    assert read_weights(tmp_path / "beit-base-patch16-224-pt22k-ft22k").mean == HALF[0] and ASSUMED not in caplog.text
    assert read_weights(tmp_path / "mine").mean == IMAGENET[0] and ASSUMED in caplog.text


def test_what_the_user_says_is_taken_and_a_contradiction_is_logged(tmp_path, caplog):
    path = saved(tmp_path / "beit_base_patch16_224_pt22k.pth", mim_shapes)
    assert read_weights(path, statistics="half").facts["image statistics"].endswith("as asked") and not caplog.records
    weights = read_weights(path, statistics="imagenet")
    assert (weights.mean, weights.std) == IMAGENET and "although it has mean 0.5, 0.5, 0.5" in caplog.text


def classifier_options(**options):
    values = {"checkpoint": None, "weights": "auto", "statistics": "auto", "images": "images"}
    return argparse.Namespace(**(values | options))


def test_evaluation_takes_what_the_file_tells(tmp_path):
    classes = tuple(f"class {number}" for number in range(7))
    path = saved(tmp_path / "beit_base_patch16_224_pt22k_ft1k.pth")
    _, crops, source = load_classifier(str(path), classifier_options(), classes)
    assert (crops.mean, crops.std) == HALF and "beit_base_patch16_224_pt22k_ft1k" in source["facts"]["image statistics"]
    _, crops, _ = load_classifier(str(path), classifier_options(statistics="imagenet"), classes)
    assert (crops.mean, crops.std) == IMAGENET


def test_local_weights_under_a_timm_name_are_told_by_file_then_by_all_that_timm_has_of_it(
    tmp_path, caplog, monkeypatch
):
    # One block of the networks, for speed.
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, img_size=32, depth=1))

    def loaded(name, file, **beside):
        state = timm.create_model(name, pretrained=False, num_classes=3).state_dict()
        torch.save({"state_dict": state, **beside}, tmp_path / file)
        return load_timm_classifier(name, tmp_path / file)

    assert loaded("deit_tiny_patch16_224", "w.pth").mean == IMAGENET[0]
    assert loaded("vit_tiny_patch16_224", "w.pth").mean == HALF[0] and ASSUMED not in caplog.text
    told = loaded("vit_tiny_patch16_224", "w.pth", args=arguments(imagenet_default_mean_and_std=True))
    assert told.mean == IMAGENET[0] and "tells" in told.facts["image statistics"]
    assert loaded("vit_small_patch16_224", "w.pth").mean == IMAGENET[0] and ASSUMED in caplog.text


def test_a_judges_statistics_are_told_by_its_file_or_by_the_tag_of_its_architecture(tmp_path, caplog):
    net = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=0)

    def mean_of(name, architecture="auto", **beside):
        torch.save({"model": net.state_dict(), **beside}, tmp_path / name)
        judge = load_feature_net(str(tmp_path / name), architecture)
        assert judge.statistics
        return tuple(judge.mean.flatten().tolist())

    assert mean_of("vit_tiny_patch16_224.augreg_in21k.pth") == HALF[0]
    assert mean_of("mae_pretrain_vit_base.pth") == pytest.approx(IMAGENET[0])
    assert mean_of("w.pth", args=arguments(imagenet_default_mean_and_std=False)) == HALF[0]
    assert ASSUMED not in caplog.text
    assert mean_of("w.pth") == pytest.approx(IMAGENET[0]) and ASSUMED in caplog.text
    assert "perceptual.architecture" in caplog.text


def test_a_judges_release_folder_that_states_no_statistics_is_told_of(tmp_path, caplog):
    net = timm.create_model("test_vit", pretrained=False, num_classes=0)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    cfg = {"input_size": [3, 160, 160], "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head"}
    for stated in ({"mean": [0.5] * 3, "std": [0.5] * 3}, {}):
        (tmp_path / "config.json").write_text(
            json.dumps({"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": cfg | stated})
        )
        judge = load_feature_net(str(tmp_path))
        assert (ASSUMED in caplog.text) == (not stated)
        assert tuple(judge.mean.flatten().tolist()) == pytest.approx(HALF[0] if stated else IMAGENET[0])
