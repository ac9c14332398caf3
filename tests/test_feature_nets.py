from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from peco_ds.errors import UserError
from peco_ds.models.feature_nets import load_feature_net

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def vit(name: str, seed: int, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    net = timm.create_model(name, pretrained=False, num_classes=0, **options)
    # fresh biases and norms are 0 and 1, which would hide one that was not loaded
    with torch.no_grad():
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
    torch.save(
        {
            "epoch": 300,
            "arch": "vit",
            "args": argparse.Namespace(lr=1.0),
            "state_dict": state,
            "optimizer": {"param_groups": []},
        },
        path,
    )


def tokens_by_hand(net, images_01: torch.Tensor, blocks) -> list[torch.Tensor]:
    """timm's modules one after the other, so that no helper is shared with what is tested."""
    x = net.patch_embed((images_01 - MEAN) / STD)
    x = torch.cat([net.cls_token.expand(len(x), -1, -1), x], dim=1) + net.pos_embed
    found = {}
    for number, block in enumerate(net.blocks, start=1):
        x = block(x)
        found[number] = x[:, 1:]
    return [found[number] for number in blocks]


def image_01(path, px: int) -> torch.Tensor:
    image = Image.open(path).convert("RGB").resize((px, px))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).unsqueeze(0).float() / 255


def assert_same_features(judge, net, images_01, blocks=(3, 12)):
    with torch.no_grad():
        for found, expected in zip(
            judge.features(images_01, blocks), tokens_by_hand(net, images_01, blocks), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["auto", "vit_small_patch16_224"])
def test_a_moco_v3_small_file_gives_the_features_of_its_base_encoder_with_twelve_heads(
    tmp_path, real_data, architecture
):
    net = vit("vit_small_patch16_224", 0, num_heads=12)
    moco_v3_file(tmp_path / "vit-s-300ep.pth.tar", net)
    judge = load_feature_net(str(tmp_path / "vit-s-300ep.pth.tar"), architecture)
    assert_same_features(judge, net, image_01(real_data.imagenet[0], 224))
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
    assert_same_features(load_feature_net(str(tmp_path / "vit.pth")), net, image_01(real_data.imagenet[1], 224))


def test_image_size_and_patch_size_are_read_off_a_safetensors_file(tmp_path, real_data):
    net = vit("vit_tiny_patch16_224", 2, img_size=64, patch_size=8, depth=4)
    save_file(net.state_dict(), tmp_path / "vit.safetensors")
    judge = load_feature_net(str(tmp_path / "vit.safetensors"))
    assert judge.image_px == 64 and judge.depth == 4
    assert_same_features(judge, net, image_01(real_data.imagenet[2], 64), blocks=(4, 1))


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


def test_the_judge_is_frozen_and_the_gradient_reaches_the_images(tiny_file):
    judge = load_feature_net(tiny_file)
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    sum(tokens.square().mean() for tokens in judge.features(images, (1, 3))).backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad and p.dtype == torch.float32 for p in judge.parameters())
    assert not any(module.training for module in torch.nn.ModuleList([judge]).train()[0].modules())


def test_images_of_another_size_are_resized_as_antialiased_bilinear(tiny_file):
    judge = load_feature_net(tiny_file)
    images = torch.rand(1, 3, 160, 96, generator=torch.Generator().manual_seed(0))
    resized = torch.nn.functional.interpolate(images, size=(64, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(judge.features(images, (2,)), judge.features(resized, (2,)))


def test_the_judge_can_be_asked_to_look_at_a_larger_image(tiny_file):
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
    with pytest.raises(UserError, match=r"teacher\.weights is empty; fetch ViT-B-16\.pt"):
        load_feature_net("", section="teacher")
    with pytest.raises(UserError, match=r"no such file.*teacher\.weights"):
        load_feature_net(str(tmp_path / "ViT-B-16.pt"), section="teacher")


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
    with pytest.raises(UserError, match="holds no ViT .*, nor a ResNet or VGG under torchvision's names"):
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


BEIT = dict(
    img_size=64, depth=2, embed_dim=192, num_heads=3, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1
)


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
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "mean": MEAN.flatten().tolist(),
            "std": STD.flatten().tolist(),
            "num_classes": 0,
            "classifier": "head",
        },
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


# ----------------------------------------------------------- teachers: final features of other layouts

CLIP_MEAN, CLIP_STD = (
    torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1),
    torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1),
)
WIDTH, HEADS, DEPTH, OUT = 128, 2, 3, 48


def shaken(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """With a trained look: fresh biases, norms and layer scales are all alike, which would hide one in the wrong
    place.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def images_of(px: int, number: int = 2) -> torch.Tensor:
    return torch.rand(number, 3, px, px, generator=torch.Generator().manual_seed(px))


def assert_targets(net, images_01: torch.Tensor, expected: torch.Tensor) -> None:
    with torch.no_grad():
        found = net.targets(images_01)
    assert found.dtype == torch.float32 and found.shape == expected.shape == (
        len(images_01),
        net.grid**2,
        net.target_width,
    )
    assert expected.std() > 0.05  # else the tolerance would forgive anything
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class QuickGelu(torch.nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class PlainClipBlock(torch.nn.Module):
    def __init__(self, activation: torch.nn.Module) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.mlp = torch.nn.ModuleDict(
            {"c_fc": torch.nn.Linear(WIDTH, 4 * WIDTH), "gelu": activation, "c_proj": torch.nn.Linear(4 * WIDTH, WIDTH)}
        )

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp["c_proj"](self.mlp["gelu"](self.mlp["c_fc"](self.ln_2(x))))


class PlainClip(torch.nn.Module):
    """CLIP's image tower from torch's own parts, under the names of OpenAI's files.

    Every patch normed and projected, the class token left out.
    """

    def __init__(self, activation: torch.nn.Module) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, WIDTH, 8, 8, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = torch.nn.Parameter(torch.randn(17, WIDTH))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.transformer = torch.nn.ModuleDict(
            {"resblocks": torch.nn.ModuleList(PlainClipBlock(activation) for _ in range(DEPTH))}
        )
        self.proj = torch.nn.Parameter(WIDTH**-0.5 * torch.randn(WIDTH, OUT))

    def forward(self, images_norm):
        patches = self.conv1(images_norm).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(patches.shape[0], 1, WIDTH), patches], dim=1)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(x)[:, 1:] @ self.proj


class WholeClip(torch.nn.Module):
    """Beside the tower what OpenAI's archives hold too: text tensors of the same names, and three numbers."""

    def __init__(self, tower: PlainClip) -> None:
        super().__init__()
        self.visual = tower
        self.positional_embedding = torch.nn.Parameter(torch.randn(7, 16))
        self.ln_final = torch.nn.LayerNorm(16)
        self.text_projection = torch.nn.Parameter(torch.randn(16, OUT))
        for name, number in (("input_resolution", 32), ("context_length", 7), ("vocab_size", 100)):
            self.register_buffer(name, torch.tensor(number))

    def forward(self, images_norm):
        return self.visual(images_norm)


def plain_clip(activation: torch.nn.Module) -> PlainClip:
    torch.manual_seed(1)
    return shaken(PlainClip(activation))


def clip_tensors(tower: PlainClip) -> dict[str, torch.Tensor]:
    """As open_clip saves a model: no numbers beside the weights."""
    return {
        name: tensor.clone()
        for name, tensor in WholeClip(tower).state_dict().items()
        if name not in ("input_resolution", "context_length", "vocab_size")
    }


def clip_answer(tower: PlainClip, images_01: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tower((images_01 - CLIP_MEAN) / CLIP_STD)


def save_torchscript(module: torch.nn.Module, path) -> None:
    with torch.no_grad():
        torch.jit.trace(module, images_of(32, 1)).save(str(path))


# deprecated; OpenAI's files stay what they are
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_openais_archive_gives_its_projected_patch_tokens_with_quickgelu(tmp_path, real_data):
    tower = plain_clip(QuickGelu())
    save_torchscript(WholeClip(tower).eval(), tmp_path / "ViT-B-16.pt")
    teacher = load_feature_net(str(tmp_path / "ViT-B-16.pt"), section="teacher")
    image = image_01(real_data.imagenet[0], 32)
    assert_targets(teacher, image, clip_answer(tower, image))
    assert (teacher.grid, teacher.image_px, teacher.target_width, teacher.depth) == (4, 32, OUT, DEPTH)
    assert teacher.licence.startswith("MIT") and "QuickGELU" in teacher.description


def test_openais_half_precision_state_dict_is_read_as_its_archive(tmp_path):
    tower = plain_clip(QuickGelu())
    halved = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in WholeClip(tower).state_dict().items()
    }
    torch.save(halved, tmp_path / "clip.pt")
    tower.load_state_dict({name: tensor.half().float() for name, tensor in tower.state_dict().items()})
    assert_targets(load_feature_net(str(tmp_path / "clip.pt")), images_of(32), clip_answer(tower, images_of(32)))


def open_clip_folder(folder, tower: PlainClip, **model_cfg):
    folder.mkdir()
    save_file(clip_tensors(tower), folder / "open_clip_model.safetensors")
    config = {
        "model_cfg": {"embed_dim": OUT, **model_cfg},
        "preprocess_cfg": {"mean": CLIP_MEAN.flatten().tolist(), "std": CLIP_STD.flatten().tolist()},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlibrary_name: open_clip\nlicense: mit\n---\n# a model\n")
    return folder


@pytest.mark.parametrize(
    "activation, model_cfg", [(torch.nn.GELU(), {}), (QuickGelu(), {"quick_gelu": True})], ids=["gelu", "quickgelu"]
)
def test_an_open_clip_folder_has_the_activation_of_its_config_and_the_licence_of_its_card(
    tmp_path, activation, model_cfg
):
    tower = plain_clip(activation)
    folder = open_clip_folder(tmp_path / "clip", tower, **model_cfg)
    for given in (folder, folder / "open_clip_model.safetensors"):
        teacher = load_feature_net(str(given))
        assert_targets(teacher, images_of(32), clip_answer(tower, images_of(32)))
        assert teacher.licence == "mit"


def test_clip_weights_that_do_not_tell_their_activation_are_refused_until_it_is_named(tmp_path):
    net = shaken(timm.create_model("vit_xsmall_patch16_clip_224", num_classes=0, act_layer="quick_gelu"))
    torch.save(net.state_dict(), tmp_path / "clip.bin")
    with pytest.raises(UserError, match=r"QuickGELU.*teacher\.architecture"):
        load_feature_net(str(tmp_path / "clip.bin"), section="teacher")
    torch.save(clip_tensors(plain_clip(QuickGelu())), tmp_path / "clip.pt")
    with pytest.raises(UserError, match=r"QuickGELU.*teacher\.architecture"):
        load_feature_net(str(tmp_path / "clip.pt"), section="teacher")
    named = load_feature_net(str(tmp_path / "clip.bin"), "vit_xsmall_patch16_clip_224")
    with torch.no_grad():
        net.blocks.apply(lambda module: setattr(module, "act", torch.nn.GELU()) if hasattr(module, "act") else None)
        expected = net.forward_features((images_of(224, 1) - CLIP_MEAN) / CLIP_STD)[:, 1:]
    assert_targets(named, images_of(224, 1), expected)


def test_a_named_architecture_with_another_activation_than_the_weights_were_trained_with_is_refused(tmp_path):
    tensors = timm.create_model("vit_xsmall_patch16_clip_224", num_classes=0).state_dict()
    official = {"input_resolution": torch.tensor(224)}
    for name, tensor in tensors.items():
        for new, old in (
            ("cls_token", "class_embedding"),
            ("pos_embed", "positional_embedding"),
            ("patch_embed.proj", "conv1"),
            ("norm_pre", "ln_pre"),
        ):
            name = f"visual.{old}{name.removeprefix(new)}" if name.startswith(new) else name
        official[name] = tensor.squeeze() if "embedding" in name else tensor
    torch.save(official, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=r"trained with quick_gelu.*teacher\.architecture=auto"):
        load_feature_net(str(tmp_path / "clip.pt"), "vit_xsmall_patch16_clip_224", section="teacher")


def clip_in_timm(activation: str) -> torch.nn.Module:
    torch.manual_seed(2)
    net = shaken(
        timm.create_model("vit_base_patch16_clip_224", **CLIP_ARGUMENTS, act_layer=activation, num_classes=OUT)
    )
    with torch.no_grad():
        net.head.bias.zero_()
    return net


CLIP_ARGUMENTS = dict(img_size=32, patch_size=8, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)


@pytest.mark.parametrize("tag, activation", [("openai", "quick_gelu"), ("laion2b", "gelu")])
def test_timms_release_of_clip_has_its_head_as_projection_and_the_activation_it_was_trained_with(
    tmp_path, tag, activation
):
    net = clip_in_timm(activation)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_base_patch16_clip_224",
        "num_classes": OUT,
        "model_args": CLIP_ARGUMENTS,
        "pretrained_cfg": {
            "tag": tag,
            "input_size": [3, 32, 32],
            "num_classes": OUT,
            "license": "apache-2.0",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "mean": CLIP_MEAN.flatten().tolist(),
            "std": CLIP_STD.flatten().tolist(),
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher = load_feature_net(str(tmp_path))
    with torch.no_grad():
        expected = net.forward_features((images_of(32) - CLIP_MEAN) / CLIP_STD)[:, 1:] @ net.head.weight.T
    assert_targets(teacher, images_of(32), expected)
    assert teacher.licence == "apache-2.0"


def hf_clip(kind: str, activation: str):
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(3)
    vision = dict(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=32,
        patch_size=8,
        hidden_act=activation,
    )
    if kind == "vision":
        return shaken(CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=OUT, **vision)))
    text = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return shaken(CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=OUT)))


@pytest.mark.parametrize("kind, activation", [("vision", "quick_gelu"), ("whole", "gelu")])
def test_hugging_faces_clip_gives_what_its_own_library_gives(tmp_path, kind, activation):
    model = hf_clip(kind, activation)
    model.save_pretrained(tmp_path)
    teacher = load_feature_net(str(tmp_path))
    with torch.no_grad():
        hidden = model.vision_model(pixel_values=(images_of(32) - CLIP_MEAN) / CLIP_STD).last_hidden_state
        expected = model.visual_projection(model.vision_model.post_layernorm(hidden))[:, 1:]
    assert_targets(teacher, images_of(32), expected)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="QuickGELU"):
        load_feature_net(str(tmp_path / "model.safetensors"))


def hf_dinov2(registers: int, gated: bool = False):
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(4)
    sizes = dict(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=42,
        patch_size=14,
        use_swiglu_ffn=gated,
    )
    if registers:
        return shaken(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **sizes)))
    return shaken(Dinov2Model(Dinov2Config(**sizes)))


def official_dinov2(saved: dict[str, torch.Tensor], gated: bool) -> dict[str, torch.Tensor]:
    """The names of dinov2_vit*14_pretrain.pth, spelt out from those of transformers' files."""
    first, second = ("w12", "w3") if gated else ("fc1", "fc2")
    tensors = {
        "cls_token": saved["embeddings.cls_token"],
        "pos_embed": saved["embeddings.position_embeddings"],
        "mask_token": saved["embeddings.mask_token"],
        "patch_embed.proj.weight": saved["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": saved["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": saved["layernorm.weight"],
        "norm.bias": saved["layernorm.bias"],
    }
    if "embeddings.register_tokens" in saved:
        tensors["register_tokens"] = saved["embeddings.register_tokens"]
    for number in range(DEPTH):
        old, new = f"encoder.layer.{number}.", f"blocks.{number}."
        for kind in ("weight", "bias"):
            tensors[f"{new}attn.qkv.{kind}"] = torch.cat(
                [saved[f"{old}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            )
            tensors[f"{new}attn.proj.{kind}"] = saved[f"{old}attention.output.dense.{kind}"]
            for norm in ("norm1", "norm2"):
                tensors[f"{new}{norm}.{kind}"] = saved[f"{old}{norm}.{kind}"]
            tensors[f"{new}mlp.{first}.{kind}"] = saved[f"{old}mlp.{'weights_in' if gated else 'fc1'}.{kind}"]
            tensors[f"{new}mlp.{second}.{kind}"] = saved[f"{old}mlp.{'weights_out' if gated else 'fc2'}.{kind}"]
        for half in "12":
            tensors[f"{new}ls{half}.gamma"] = saved[f"{old}layer_scale{half}.lambda1"]
    return tensors


@pytest.mark.parametrize(
    "registers, gated", [(0, False), (4, False), (0, True)], ids=["plain", "registers", "giant's gated layers"]
)
def test_dinov2_of_facebook_and_of_hugging_face_gives_what_transformers_gives(tmp_path, registers, gated):
    model = hf_dinov2(registers, gated)
    model.save_pretrained(tmp_path / "hf")
    torch.save(
        official_dinov2(load_file(tmp_path / "hf" / "model.safetensors"), gated),
        tmp_path / "dinov2_vitb14_pretrain.pth",
    )
    with torch.no_grad():
        expected = model(pixel_values=(images_of(42) - MEAN) / STD).last_hidden_state[:, 1 + registers :]
    for given in ("hf", "dinov2_vitb14_pretrain.pth"):
        teacher = load_feature_net(str(tmp_path / given))
        assert_targets(teacher, images_of(42), expected)
        assert teacher.licence.startswith("Apache-2.0") and teacher.grid == 3
    assert load_feature_net(str(tmp_path / given), image_px=70).targets(images_of(70)).shape == (2, 25, WIDTH)


def test_a_vit_of_hugging_face_has_the_heads_and_statistics_of_its_configs(tmp_path):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(5)
    model = shaken(
        ViTModel(
            ViTConfig(
                hidden_size=96,
                intermediate_size=192,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
            )
        )
    )
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})
    )
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- dino\n---\n")
    with torch.no_grad():
        expected = model(pixel_values=images_of(32) * 2 - 1).last_hidden_state[:, 1:]
    teacher = load_feature_net(str(tmp_path))
    assert_targets(teacher, images_of(32), expected)
    assert teacher.licence == "apache-2.0"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 64}))
    with pytest.raises(UserError, match="hidden_size is 64.*width 96"):
        load_feature_net(str(tmp_path))


def final_tokens(net, images_01):
    with torch.no_grad():
        x = torch.cat([net.cls_token.expand(len(images_01), -1, -1), net.patch_embed((images_01 - MEAN) / STD)], dim=1)
        return x if net.pos_embed is None else x + net.pos_embed


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_targets_pass_the_final_norm_wherever_timm_keeps_it(tmp_path, global_pool):
    net = vit("vit_tiny_patch16_224", 8, img_size=64, depth=2, global_pool=global_pool)
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    with torch.no_grad():
        norm = net.fc_norm if global_pool == "avg" else net.norm
        assert_targets(
            load_feature_net(str(tmp_path / "vit.pth")),
            images_of(64),
            norm(net.blocks(final_tokens(net, images_of(64))))[:, 1:],
        )


def test_a_release_of_ours_can_teach(release):
    folder, net = release
    x = final_tokens(net, images_of(64))
    with torch.no_grad():
        for block in net.blocks:
            x = block(x)
        assert_targets(
            load_feature_net(str(folder)),
            images_of(64),
            (net.norm if not isinstance(net.norm, torch.nn.Identity) else net.fc_norm)(x)[:, 1:],
        )


def test_a_licence_is_told_by_the_layout_or_the_card_and_never_made_up(tmp_path, release):
    net = vit("vit_small_patch16_224", 0, num_heads=12, depth=1)
    moco_v3_file(tmp_path / "moco.pth.tar", net)
    assert load_feature_net(str(tmp_path / "moco.pth.tar")).licence.startswith("CC BY-NC 4.0")
    state = vit("vit_tiny_patch16_224", 0, depth=1).state_dict()
    torch.save(state, tmp_path / "mine.pth")
    assert load_feature_net(str(tmp_path / "mine.pth")).licence == ""
    torch.save(state, tmp_path / "dino_vitbase16_pretrain.pth")
    torch.save(
        {"teacher": {f"backbone.{k}": v for k, v in state.items()}, "student": {}, "dino_loss": {}, "epoch": 3},
        tmp_path / "checkpoint.pth",
    )
    assert all(
        load_feature_net(str(tmp_path / name)).licence.startswith("Apache-2.0")
        for name in ("dino_vitbase16_pretrain.pth", "checkpoint.pth")
    )
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit_base.pth")
    assert load_feature_net(str(tmp_path / "mae_pretrain_vit_base.pth")).licence.startswith("CC BY-NC 4.0")
    folder, _ = release
    assert load_feature_net(str(folder)).licence == ""
    (folder / "README.md").write_text(
        "---\nlibrary_name: timm\nlicense: other\n---\n| judge's licence | CC BY-NC 4.0 (MoCo v3's release) |\n"
    )
    licence = load_feature_net(str(folder)).licence
    assert "README.md of release" in licence and "CC BY-NC 4.0 (MoCo v3's release)" in licence


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda tensor: tensor.index_fill(0, torch.tensor([1]), float("inf")), "blocks.0.norm1.weight .* not finite"),
        (lambda tensor: tensor.long(), "blocks.0.norm1.weight .* is torch.int64"),
    ],
    ids=["not finite", "whole numbers"],
)
def test_a_tensor_that_is_not_of_finite_floats_is_named(tmp_path, spoil, words):
    state = vit("vit_tiny_patch16_224", 0, depth=1, img_size=32).state_dict()
    torch.save(state | {"blocks.0.norm1.weight": spoil(state["blocks.0.norm1.weight"])}, tmp_path / "vit.pth")
    with pytest.raises(UserError, match=words):
        load_feature_net(str(tmp_path / "vit.pth"))


@pytest.mark.parametrize(
    "change, words",
    [
        ("conv1.weight", "conv1.weight is missing"),
        ("resblocks.1.attn.in_proj_weight", r"blocks.1.attn.qkv.weight"),
        ("ln_post.bias", "norm.bias"),
    ],
)
def test_a_missing_tensor_of_clip_is_named(tmp_path, change, words):
    folder = open_clip_folder(tmp_path / "clip", plain_clip(QuickGelu()))
    tensors = load_file(folder / "open_clip_model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.endswith(change)},
        folder / "open_clip_model.safetensors",
    )
    with pytest.raises(UserError, match=words):
        load_feature_net(str(folder))


@pytest.mark.parametrize(
    "broken", [torch.tensor(1.0), torch.ones(4), torch.empty(WIDTH, 0)], ids=["a number", "a row", "empty"]
)
def test_a_projection_of_another_form_is_refused_and_not_left_out(tmp_path, broken):
    folder = open_clip_folder(tmp_path / "clip", plain_clip(QuickGelu()))
    path = folder / "open_clip_model.safetensors"
    tensors = load_file(path)
    assert "visual.proj" in tensors
    save_file(tensors | {"visual.proj": broken}, path)
    with pytest.raises(UserError, match="CLIP's projection has shape"):
        load_feature_net(str(folder))


def test_a_foreign_tensor_of_clip_is_named(tmp_path):
    folder = open_clip_folder(tmp_path / "clip", plain_clip(QuickGelu()))
    save_file(
        load_file(folder / "open_clip_model.safetensors") | {"visual.attn_pool.query": torch.zeros(2, 2)},
        folder / "open_clip_model.safetensors",
    )
    with pytest.raises(UserError, match="attn_pool.query has no place"):
        load_feature_net(str(folder))


def test_gradient_reaches_the_images_through_targets_and_bf16_gives_float32(tiny_file):
    teacher = load_feature_net(tiny_file)
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        targets = teacher.targets(images)
    assert targets.dtype == torch.float32
    targets.square().mean().backward()
    assert images.grad.abs().sum() > 0
