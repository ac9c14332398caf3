"""Convolutional judges: every released layout against torchvision's or timm's own computation, stage by stage."""

from __future__ import annotations

import argparse
import json

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from trained_look import trained

from peco_ds.config import TokenizerRecipe
from peco_ds.errors import UserError
from peco_ds.models.feature_nets import load_feature_net
from peco_ds.models.frozen_net import load_frozen_net
from peco_ds.objectives.tokenizer_losses import perceptual_loss
from peco_ds.recipe_files import load_recipe

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
PX = 64


def small_resnet(block=Bottleneck, **options) -> ResNet:
    """torchvision's, of four blocks and narrow in the middle."""
    return trained(ResNet(block, [1, 1, 1, 1], **options))


@pytest.fixture(scope="module")
def resnet() -> ResNet:
    return small_resnet(width_per_group=8)


@pytest.fixture(scope="module")
def images_01() -> torch.Tensor:
    return torch.rand(2, 3, PX, PX, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def stages_of(net: nn.Module, images_01: torch.Tensor) -> list[torch.Tensor]:
    """torchvision's modules one after the other, so that no helper is shared with what is tested."""
    x, found = (images_01 - MEAN) / STD, []
    if isinstance(net, ResNet):
        x = net.relu(net.bn1(net.conv1(x)))
        found.append(x)
        x = net.maxpool(x)
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            found.append(x)
        return found
    for layer in net.features:
        if isinstance(layer, nn.MaxPool2d):
            found.append(x)
        x = layer(x)
    return found


def assert_same_stages(judge, expected: list[torch.Tensor], images_01: torch.Tensor) -> None:
    with torch.no_grad():
        found = judge.features(images_01, ())
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected):
        assert theirs.std() > 0.01, "else the tolerance would forgive anything"
        torch.testing.assert_close(mine, theirs.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)


def prefixed(prefix: str, state: dict, *, plus: float = 0) -> dict:
    return {f"{prefix}{name}": tensor + plus for name, tensor in state.items()}


def without_head(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def moco_v2(state: dict) -> dict:
    head = {"fc.0.weight": torch.zeros(8, 8), "fc.0.bias": torch.zeros(8), "fc.2.weight": torch.zeros(2, 8)}
    query = without_head(state) | head
    both = prefixed("module.encoder_q.", query) | prefixed("module.encoder_k.", query, plus=1)
    queue = {"module.queue": torch.zeros(2, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": queue | both, "optimizer": {"state": {}}}


def moco_v3(state: dict) -> dict:
    base = without_head(state) | {"fc.0.weight": torch.zeros(8, 8), "fc.1.running_mean": torch.zeros(8)}
    both = prefixed("module.base_encoder.", base) | prefixed("module.momentum_encoder.", base, plus=1)
    return {"state_dict": both | {"module.predictor.0.weight": torch.zeros(2, 2)}, "args": argparse.Namespace(lr=1.0)}


def dino_full(state: dict) -> dict:
    head = {"module.head.mlp.0.weight": torch.zeros(2, 2), "module.head.last_layer.weight_g": torch.zeros(2, 1)}
    teacher = prefixed("module.backbone.", without_head(state))
    student = prefixed("module.backbone.", without_head(state), plus=1)
    return {"student": student | head, "teacher": teacher | head, "dino_loss": {"center": torch.zeros(1, 2)}}


def swav(state: dict) -> dict:
    heads = {"projection_head.0.weight": torch.zeros(2, 2), "projection_head.1.running_var": torch.ones(2)}
    return prefixed("module.", without_head(state) | heads | {"prototypes.weight": torch.zeros(3, 2)})


def uncounted(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name}


LAYOUTS = {
    "torchvision, timm": ("resnet50-0676ba61.pth", lambda state: state, "torchvision ResNet-14", "BSD-3-Clause"),
    "without a count of batches": ("resnet.pth", uncounted, "ResNet-14", ""),
    "MoCo v2": ("moco_v2_800ep_pretrain.pth.tar", moco_v2, "MoCo v2 ResNet-14", "CC BY-NC 4.0"),
    "MoCo v3": ("r-50-1000ep.pth.tar", moco_v3, "MoCo v3 ResNet-14", "CC BY-NC 4.0"),
    "DINO": ("dino_resnet50_pretrain.pth", without_head, "DINO ResNet-14", "Apache-2.0"),
    "DINO, checkpoint": ("full_checkpoint.pth", dino_full, "DINO ResNet-14", "Apache-2.0"),
    "SwAV": ("swav_800ep_pretrain.pth.tar", swav, "SwAV ResNet-14", "CC BY-NC 4.0"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resnet_of_every_layout_is_read_to_its_last_stage(tmp_path, resnet, images_01, layout):
    file, wrap, title, licence = LAYOUTS[layout]
    # The files of these two are of torch's old format.
    new_format = layout not in ("MoCo v2", "SwAV")
    torch.save(wrap(resnet.state_dict()), tmp_path / file, _use_new_zipfile_serialization=new_format)
    judge = load_feature_net(str(tmp_path / file), image_px=PX)
    assert_same_stages(judge, stages_of(resnet, images_01), images_01)
    assert judge.description.startswith(f"{title}, 1 x 8 wide ({file}, sha256 ")
    assert judge.licence.startswith(licence) and bool(judge.licence) == bool(licence)
    assert judge.target_width == 0 and judge.grid == 2


def vgg_features(convolutions: tuple[int, ...], norm: bool) -> nn.Sequential:
    """As torchvision numbers them."""
    layers: list[nn.Module] = []
    width = 3
    for out, number in zip((64, 128, 256, 512, 512), convolutions):
        for _ in range(number):
            layers += [nn.Conv2d(width, out, 3, padding=1), *([nn.BatchNorm2d(out)] if norm else []), nn.ReLU(True)]
            width = out
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


class SmallHeadedVgg(nn.Module):
    """torchvision's names; a classifier of full size would take half a GB."""

    def __init__(self, convolutions: tuple[int, ...], norm: bool) -> None:
        super().__init__()
        self.features = vgg_features(convolutions, norm)
        self.classifier = nn.Sequential(nn.Linear(2, 2))


SHAPES = {
    "ResNet-10": lambda: small_resnet(BasicBlock),
    "ResNet-14, 4 x 8 wide": lambda: small_resnet(groups=4, width_per_group=8),
    "VGG-11 with batch norm": lambda: trained(SmallHeadedVgg((1, 1, 2, 2, 2), norm=True)),
    "VGG-16": lambda: trained(SmallHeadedVgg((2, 2, 3, 3, 3), norm=False)),
}


@pytest.mark.parametrize("title", SHAPES)
def test_depth_and_width_are_read_off_the_file(tmp_path, images_01, title):
    net = SHAPES[title]()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    judge = load_feature_net(str(tmp_path / "net.safetensors"), image_px=PX)
    assert_same_stages(judge, stages_of(net, images_01), images_01)
    assert judge.description.startswith(f"{title} (net.safetensors, sha256 ")


def test_torchvisions_own_numbering_of_a_vgg_is_that_of_the_samples():
    with torch.device("meta"):
        theirs = torchvision.models.vgg16_bn().features.state_dict()
        assert theirs.keys() == vgg_features((2, 2, 3, 3, 3), norm=True).state_dict().keys()


def test_a_vgg_without_classifier_loads_and_caffes_statistics_are_those_of_its_file(tmp_path):
    state = {f"features.{name}": tensor for name, tensor in vgg_features((1, 1, 2, 2, 2), False).state_dict().items()}
    for file, mean in (("vgg.pth", MEAN), ("vgg16_features-amdegroot-88682ab5.pth", None)):
        torch.save(state, tmp_path / file)
        judge = load_feature_net(str(tmp_path / file))
        assert judge.depth == 5 and judge.image_px == 224 and judge.grid == 14
        assert (judge.std.max() < 0.01) if mean is None else torch.equal(judge.mean[0], mean)


def test_a_real_resnet_50_is_read_by_its_shapes(tmp_path, images_01):
    net = trained(torchvision.models.resnet50(weights=None))
    torch.save(moco_v2(net.state_dict()), tmp_path / "moco_v2_200ep_pretrain.pth.tar")
    judge = load_feature_net(str(tmp_path / "moco_v2_200ep_pretrain.pth.tar"), image_px=PX)
    assert_same_stages(judge, stages_of(net, images_01), images_01)
    assert judge.description.startswith("MoCo v2 ResNet-50 (")


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite0", "test_efficientnet", "test_convnext", "mobilenetv3_small_050"]
)
def test_a_file_of_another_network_of_timms_is_read_by_its_name(tmp_path, images_01, name):
    net = trained(timm.create_model(name, pretrained=False))
    torch.save({"state_dict": prefixed("module.", net.state_dict())}, tmp_path / "net.pth")
    judge = load_feature_net(str(tmp_path / "net.pth"), name, image_px=PX)
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        assert_same_stages(
            judge, net.forward_intermediates((images_01 - mean) / std, intermediates_only=True), images_01
        )
    assert judge.description.startswith(f"{name} (net.pth, sha256 ")


@pytest.fixture
def release(tmp_path):
    """A folder as timm's `local-dir:` scheme reads it."""
    net = trained(timm.create_model("test_efficientnet", pretrained=False, num_classes=7))
    folder = tmp_path / "release"
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    config = net.pretrained_cfg | {"mean": [0.1, 0.2, 0.3], "num_classes": 7, "license": "mit"}
    whole = {"architecture": "test_efficientnet", "num_classes": 7, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(whole))
    return folder, net


def test_a_release_folder_brings_its_own_statistics_and_size(release, images_01):
    folder, net = release
    judge = load_feature_net(str(folder))
    assert judge.image_px == net.pretrained_cfg["input_size"][-1] and judge.licence == "mit"
    images = torch.nn.functional.interpolate(images_01, size=(judge.image_px,) * 2)
    x = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(net.pretrained_cfg["std"]).view(3, 1, 1)
    with torch.no_grad():
        assert_same_stages(judge, net.forward_intermediates(x, intermediates_only=True), images)


def test_a_damaged_release_folder_is_refused(release):
    folder, net = release
    with pytest.raises(UserError, match="holds test_efficientnet, but perceptual.architecture is resnet50; use auto"):
        load_feature_net(str(folder), "resnet50")
    state = net.state_dict()
    state["blocks.0.0.bn1.running_var"][0] = float("nan")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"blocks.0.0.bn1.running_var .* not finite; fetch the weights again"):
        load_feature_net(str(folder))
    save_file(dict(list(state.items())[1:]), folder / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor conv_stem.weight \(timm's name\) of test_efficientnet is missing"):
        load_feature_net(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        load_feature_net(str(folder))


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory, resnet):
    path = tmp_path_factory.mktemp("judge") / "resnet.pth"
    torch.save(resnet.state_dict(), path)
    return str(path)


def test_a_judge_is_frozen_in_eval_mode_and_the_gradient_of_its_loss_reaches_the_image(resnet_file, resnet, images_01):
    judge = nn.ModuleList([load_feature_net(resnet_file, image_px=PX)]).train()[0]
    image = images_01[:1].clone().requires_grad_()
    perceptual_loss(judge.features(image, ()), judge.features(images_01[1:], ())).backward()
    assert image.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad and p.dtype == torch.float32 for p in judge.parameters())
    assert not any(module.training for module in judge.modules())
    torch.testing.assert_close(judge.net.bn1.running_mean, resnet.bn1.running_mean, rtol=0, atol=0)


def test_in_bf16_a_judge_answers_in_float32_close_to_float32(resnet_file, images_01):
    whole = load_feature_net(resnet_file, image_px=PX, precision="fp32")
    half = load_feature_net(resnet_file, image_px=PX, precision="bf16")
    image = images_01.clone().requires_grad_()
    for exact, near in zip(whole.features(images_01, ()), half.features(image, ()), strict=True):
        assert near.dtype == torch.float32 and near.requires_grad
        # bf16 has 8 bits of mantissa; the worst case measured was 0.009.
        assert 1e-5 < (exact - near).norm() / exact.norm() < 0.02
    sum(near.square().mean() for near in half.features(image, ())).backward()
    assert image.grad.dtype == torch.float32 and image.grad.abs().sum() > 0
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())


def test_what_lies_behind_the_last_stage_asked_for_does_not_run(resnet_file, images_01):
    judge = load_feature_net(resnet_file, image_px=PX)
    ran = []
    for name in ("layer2", "layer3", "layer4"):
        judge.net[name].register_forward_hook(lambda *_, name=name: ran.append(name))
    third, first = judge.features(images_01, (3, 1))
    assert ran == ["layer2"] and third.shape == (2, 64, 512) and first.shape == (2, 1024, 64)


def test_images_of_another_size_are_resized_and_one_too_small_is_refused(resnet_file):
    judge = load_feature_net(resnet_file, image_px=96)
    assert [len(tokens[0]) for tokens in judge.features(torch.rand(1, 3, 50, 60), ())] == [48**2, 24**2, 144, 36, 9]
    with pytest.raises(UserError, match=r"perceptual.image_px 16: ResNet-14.* needs 32 or more; 0: 224"):
        load_feature_net(resnet_file, image_px=16)


@pytest.mark.parametrize("blocks", [(3, 6, 9, 12), (0,), (6,)])
def test_a_stage_that_does_not_exist_is_named_with_the_way_to_ask_for_all(resnet_file, blocks):
    settings = [f"perceptual.weights={resnet_file}", f"perceptual.blocks={list(blocks)}"]
    with pytest.raises(UserError) as refused:
        load_frozen_net(load_recipe(TokenizerRecipe, "peco_tokenizer", settings, environ={}).recipe)
    text = str(refused.value)
    assert text.startswith(f"perceptual.blocks {list(blocks)}: ResNet-14") and "\n" not in text
    assert "has stages 1 to 5; name at least one of these and no other, or [] for all of them" in text


def test_without_numbers_all_stages_judge_in_the_recipe_too(resnet_file, images_01):
    settings = [f"perceptual.weights={resnet_file}", "perceptual.blocks=[]", f"perceptual.image_px={PX}"]
    judge = load_frozen_net(load_recipe(TokenizerRecipe, "peco_tokenizer", settings, environ={}).recipe)
    assert len(judge.features(images_01, ())) == 5


def test_a_convolutional_network_is_no_teacher(resnet_file):
    settings = [f"teacher.weights={resnet_file}"]
    with pytest.raises(UserError, match="teacher.weights: ResNet-14.* only judges; give another network"):
        load_frozen_net(load_recipe(TokenizerRecipe, "beitv2_tokenizer", settings, environ={}).recipe)


def shorter(state: dict, name: str) -> dict:
    return {**state, name: state[name][1:].clone()}


DAMAGED = {
    r"tensor layer2.0.bn1.weight \(timm's name\) of ResNet-14.* is missing": lambda s: {
        name: tensor for name, tensor in s.items() if name != "layer2.0.bn1.weight"
    },
    r"tensor layer5.0.conv1.weight has no place in ResNet-14": lambda s: s | {"layer5.0.conv1.weight": torch.zeros(2)},
    r"tensor bn1.bias \(timm's name\) has shape \(63,\), ResNet-14.* has \(64,\)": lambda s: shorter(s, "bn1.bias"),
    r"tensor bn1.bias \(timm's name\) is torch.int64": lambda s: s | {"bn1.bias": torch.zeros(64, dtype=torch.long)},
    "tensor layer3.0.conv3.weight holds values that are not finite": lambda s: (
        s | {"layer3.0.conv3.weight": s["layer3.0.conv3.weight"] * float("inf")}
    ),
    r"layer1.0.conv2.weight is missing": lambda s: {k: v for k, v in s.items() if k != "layer1.0.conv2.weight"},
    r"layer1.0.conv2.weight is of shape \(2, 3\)": lambda s: s | {"layer1.0.conv2.weight": torch.zeros(2, 3)},
    r"holds 9002 blocks, but": lambda s: s | {"layer4.8998.conv1.weight": torch.zeros(1)},
    r"holds no ViT .*, nor a ResNet or VGG": lambda s: prefixed("visual.", s),
}


@pytest.mark.parametrize("said", DAMAGED)
def test_a_file_that_is_not_wholly_the_network_is_refused_in_one_line(tmp_path, resnet, said):
    torch.save(DAMAGED[said](resnet.state_dict()), tmp_path / "net.pth")
    with pytest.raises(UserError, match=said) as refused:
        load_feature_net(str(tmp_path / "net.pth"))
    assert "\n" not in str(refused.value)


NAMES = {
    "resnet50": r"tensor layer1\.1\.conv1\.weight .* of resnet50 is missing",
    "vgg16": r"holds no vgg16 \(no tensor named \.\.\.features\.0\.weight among \d+\)",
    "resnet51": "perceptual.architecture 'resnet51': no timm model of this name",
}


@pytest.mark.parametrize("architecture", NAMES)
def test_an_architecture_that_the_file_is_not_is_refused(resnet_file, architecture):
    with pytest.raises(UserError, match=NAMES[architecture]):
        load_feature_net(resnet_file, architecture)


def test_a_network_without_maps_is_refused(resnet_file, tmp_path):
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="give a plain ViT, a BEiT or a convolutional network of timm"):
        load_feature_net(str(tmp_path / "vit.pth"), "mixer_s32_224")


def test_a_download_that_fails_says_which_file_to_fetch(monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(UserError, match=r"huggingface\.co/timm/resnet50\.a1_in1k .*perceptual\.architecture=resnet50"):
        load_feature_net("resnet50.a1_in1k")


def test_a_missing_or_damaged_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"resnet50\.pth: no such file; correct the path, or fetch"):
        load_feature_net(str(tmp_path / "resnet50.pth"), "resnet50")
    for content in (b"", b"PK\x03\x04 half a zip", b"\x80\x020."):
        (tmp_path / "resnet50.pth").write_bytes(content)
        for architecture in ("auto", "resnet50"):
            with pytest.raises(UserError, match="not a readable weights file"):
                load_feature_net(str(tmp_path / "resnet50.pth"), architecture)
