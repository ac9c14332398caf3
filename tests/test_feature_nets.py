from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from peco_ds.errors import UserError
from peco_ds.models.feature_nets import load_feature_net

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def vit(name: str, seed: int, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    net = timm.create_model(name, pretrained=False, num_classes=0, **options)
    with torch.no_grad():  # fresh biases and norms are 0 and 1, which would hide one that was not loaded
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net.eval()


def moco_v3_file(path, net: torch.nn.Module) -> None:
    """As MoCo v3's main_moco.py saves it: both encoders with projection heads, the command line beside them."""
    state = {f"module.base_encoder.{name}": tensor for name, tensor in net.state_dict().items()}
    state |= {name.replace("base_encoder", "momentum_encoder"): tensor + 1 for name, tensor in state.items()}
    for encoder in ("base_encoder", "momentum_encoder"):
        state[f"module.{encoder}.head.0.weight"] = torch.zeros(8, net.embed_dim)
        state[f"module.{encoder}.head.1.running_mean"] = torch.zeros(8)
    state["module.predictor.0.weight"] = torch.zeros(8, 8)
    torch.save({"epoch": 300, "arch": "vit", "args": argparse.Namespace(lr=1.0), "state_dict": state, "optimizer": {"param_groups": []}}, path)


def tokens_by_hand(net, images_01: torch.Tensor, blocks) -> list[torch.Tensor]:
    """timm's modules one after the other, so that no helper is shared with what is tested."""
    x = net.patch_embed((images_01 - MEAN) / STD)
    x = torch.cat([net.cls_token.expand(len(x), -1, -1), x], dim=1) + net.pos_embed
    found = {}
    for number, block in enumerate(net.blocks, start=1):
        x = block(x)
        found[number] = x[:, 1:]
    return [found[number] for number in blocks]


def picture_01(path, px: int) -> torch.Tensor:
    picture = Image.open(path).convert("RGB").resize((px, px))
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).unsqueeze(0).float() / 255


def assert_same_features(judge, net, images_01, blocks=(3, 12)):
    with torch.no_grad():
        for found, expected in zip(judge.features(images_01, blocks), tokens_by_hand(net, images_01, blocks), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["auto", "vit_small_patch16_224"])
def test_a_moco_v3_small_file_gives_the_features_of_its_base_encoder_with_twelve_heads(tmp_path, real_data, architecture):
    net = vit("vit_small_patch16_224", 0, num_heads=12)
    moco_v3_file(tmp_path / "vit-s-300ep.pth.tar", net)
    judge = load_feature_net(str(tmp_path / "vit-s-300ep.pth.tar"), architecture)
    assert_same_features(judge, net, picture_01(real_data.imagenet[0], 224))
    assert "vit-s-300ep.pth.tar" in judge.description and "\n" not in judge.description


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"teacher": {f"backbone.{k}": v for k, v in state.items()}, "student": {}, "epoch": 3},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    ],
    ids=["plain", "model", "dino teacher", "module"],
)
def test_vit_files_of_other_origins_load_by_their_shapes(tmp_path, real_data, wrap):
    net = vit("vit_tiny_patch16_224", 1)
    torch.save(wrap({**net.state_dict(), "head.weight": torch.zeros(10, 192)}), tmp_path / "vit.pth")
    assert_same_features(load_feature_net(str(tmp_path / "vit.pth")), net, picture_01(real_data.imagenet[1], 224))


def test_picture_size_and_patch_size_are_read_off_a_safetensors_file(tmp_path, real_data):
    net = vit("vit_tiny_patch16_224", 2, img_size=64, patch_size=8, depth=4)
    save_file(net.state_dict(), tmp_path / "vit.safetensors")
    judge = load_feature_net(str(tmp_path / "vit.safetensors"))
    assert judge.image_px == 64 and judge.depth == 4
    assert_same_features(judge, net, picture_01(real_data.imagenet[2], 64), blocks=(4, 1))


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2"])
def test_registers_and_layer_scale_are_read_off_the_file(tmp_path, name):
    net = vit(name, 3, img_size=56, depth=2)
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    images = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    found = load_feature_net(str(tmp_path / "vit.pth")).features(images, (2,))[0]
    with torch.no_grad():
        expected = net.norm(found)
        torch.testing.assert_close(expected, net.forward_features((images - MEAN) / STD)[:, -16:], rtol=1e-4, atol=1e-4)


@pytest.fixture
def tiny_file(tmp_path):
    net = vit("vit_tiny_patch16_224", 4, img_size=64, depth=3)
    torch.save(net.state_dict(), tmp_path / "tiny.pth")
    return str(tmp_path / "tiny.pth")


def test_the_judge_is_frozen_and_the_gradient_reaches_the_pictures(tiny_file):
    judge = load_feature_net(tiny_file)
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    sum(tokens.square().mean() for tokens in judge.features(images, (1, 3))).backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad and p.dtype == torch.float32 for p in judge.parameters())
    assert not any(module.training for module in torch.nn.ModuleList([judge]).train()[0].modules())


def test_pictures_of_another_size_are_resized_as_antialiased_bilinear(tiny_file):
    judge = load_feature_net(tiny_file)
    images = torch.rand(1, 3, 160, 96, generator=torch.Generator().manual_seed(0))
    resized = torch.nn.functional.interpolate(images, size=(64, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(judge.features(images, (2,)), judge.features(resized, (2,)))


def test_the_judge_can_be_asked_to_look_at_a_larger_picture(tiny_file):
    judge = load_feature_net(tiny_file, image_px=96)
    assert judge.features(torch.rand(1, 3, 96, 96), (2,))[0].shape == (1, 36, 192)
    with pytest.raises(UserError, match="patch size 16"):
        load_feature_net(tiny_file, image_px=100)


@pytest.mark.parametrize("blocks", [(0,), (4,), (1, -1), ()])
def test_a_block_that_does_not_exist_is_named(tiny_file, blocks):
    with pytest.raises(UserError, match="blocks 1 to 3"):
        load_feature_net(tiny_file).features(torch.rand(1, 3, 64, 64), blocks)


def test_a_small_moco_file_given_for_a_base_model_names_both_widths(tmp_path):
    moco_v3_file(tmp_path / "vit-s.pth.tar", vit("vit_small_patch16_224", 0, num_heads=12, depth=1))
    with pytest.raises(UserError, match=r"width 384.*width 768"):
        load_feature_net(str(tmp_path / "vit-s.pth.tar"), "vit_base_patch16_224")


def test_a_missing_tensor_a_strange_one_and_a_wrong_depth_are_named(tmp_path):
    state = vit("vit_tiny_patch16_224", 5, depth=2).state_dict()
    cases = {
        "blocks.0.norm1.bias": {k: v for k, v in state.items() if k != "blocks.0.norm1.bias"},
        "decoder_embed.weight": {**state, "decoder_embed.weight": torch.zeros(2, 2)},
    }
    for number, (name, changed) in enumerate(cases.items()):
        torch.save(changed, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match=name):
            load_feature_net(str(tmp_path / f"{number}.pth"))
    torch.save(state, tmp_path / "shallow.pth")
    with pytest.raises(UserError, match="blocks.2"):
        load_feature_net(str(tmp_path / "shallow.pth"), "vit_tiny_patch16_224")


def test_a_missing_file_says_what_to_fetch_and_where_to_put_it(tmp_path):
    with pytest.raises(UserError, match=r"no such file.*vit-b-300ep\.pth\.tar.*perceptual\.weights"):
        load_feature_net(str(tmp_path / "vit-b-300ep.pth.tar"))
    with pytest.raises(UserError, match=r"vit-b-300ep\.pth\.tar"):
        load_feature_net("")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 half a zip", b"\x80\x020."])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_feature_net(str(tmp_path / name))
    assert "\n" not in str(caught.value)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"state_dict": {}, "surprise": Payload(str(tmp_path / "ran"))}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="not a readable weights file"):
        load_feature_net(str(tmp_path / "x.pth"))
    assert not (tmp_path / "ran").exists()


def test_a_file_without_a_vit_is_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="holds no ViT"):
        load_feature_net(str(tmp_path / "resnet.pth"))


def test_a_name_that_is_neither_file_nor_model_is_refused():
    with pytest.raises(UserError, match="neither a file or folder nor the name of a timm model"):
        load_feature_net("vit_enormous_patch3")


def test_a_download_that_fails_says_which_file_to_fetch(monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(UserError, match=r"huggingface\.co/timm/vit_base_patch16_224\.augreg_in1k.*perceptual\.weights"):
        load_feature_net("vit_base_patch16_224.augreg_in1k")


BEIT = dict(img_size=64, depth=2, embed_dim=192, num_heads=3, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1)


@pytest.fixture
def release(tmp_path):
    """A folder as timm's `local-dir:` scheme reads it."""
    net = vit("beit_base_patch16_224", 6, **BEIT)
    folder = tmp_path / "release"
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "beit_base_patch16_224",
        "num_classes": 0,
        "num_features": 192,
        "model_args": BEIT,
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": MEAN.flatten().tolist(), "std": STD.flatten().tolist(), "num_classes": 0, "classifier": "head"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, net


def test_a_release_folder_gives_the_features_of_its_beit(release):
    folder, net = release
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    judge = load_feature_net(str(folder))
    x = torch.cat([net.cls_token.expand(1, -1, -1), net.patch_embed((images - MEAN) / STD)], dim=1)
    with torch.no_grad():
        for number, block in enumerate(net.blocks, start=1):
            x = block(x)
            torch.testing.assert_close(judge.features(images, (number,))[0], x[:, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_release_folder_without_one_of_its_files_names_it(release, name):
    folder, _ = release
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        load_feature_net(str(folder))


def test_a_release_folder_with_a_missing_tensor_is_refused(release):
    folder, net = release
    state = net.state_dict()
    del state["blocks.0.gamma_1"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match="gamma_1"):
        load_feature_net(str(folder))
