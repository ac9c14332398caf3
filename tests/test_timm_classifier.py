import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from peco_ds.errors import UserError
from peco_ds.models.timm_classifier import is_foreign_release, load_timm_classifier, load_timm_release

NAME = "test_vit.r160_in1k"  # timm's smallest ViT


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A file of seven classes."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, pretrained=False, num_classes=7).eval()
    path = tmp_path_factory.mktemp("timm") / "vit.pth"
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
    return model, path


def test_a_local_file_gives_the_named_model_with_the_files_own_head(trained):
    model, path = trained
    loaded = load_timm_classifier(NAME, path)
    images = torch.randn(2, 3, loaded.image_px, loaded.image_px)
    assert loaded.num_classes == 7 and loaded.image_px == 160
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model(images))
    cfg = timm.get_pretrained_cfg(NAME)
    assert (loaded.mean, loaded.std, loaded.crop) == (cfg.mean, cfg.std, cfg.crop_pct)


def test_another_image_size_resamples_a_transformers_positions_and_suits_a_convolutional_network(trained, tmp_path):
    loaded = load_timm_classifier(NAME, trained[1], image_px=96)
    assert loaded.image_px == 96 and loaded.model(torch.randn(1, 3, 96, 96)).shape == (1, 7)
    net = timm.create_model("test_resnet", pretrained=False)
    torch.save(net.state_dict(), tmp_path / "resnet.pth")
    assert load_timm_classifier("test_resnet", tmp_path / "resnet.pth", image_px=64).image_px == 64
    with pytest.raises(UserError, match="--image_px 97.*takes no such image"):
        load_timm_classifier(NAME, trained[1], image_px=97)


def test_a_file_that_misses_a_tensor_or_is_of_another_model_is_refused(trained, tmp_path):
    state = trained[0].state_dict()
    state.pop("blocks.1.mlp.fc1.weight")
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(UserError, match="does not fit .*blocks.1.mlp.fc1.weight"):
        load_timm_classifier(NAME, tmp_path / "short.pth")
    with pytest.raises(UserError, match="does not fit test_resnet"):
        load_timm_classifier("test_resnet", trained[1])


def test_a_name_that_timm_does_not_know_is_refused():
    with pytest.raises(UserError, match="nor the name of a timm model"):
        load_timm_classifier("runs/finetune")


def test_a_release_folder_of_another_family_than_beit_is_a_classifier(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained=False, num_classes=3).eval()
    config = {"architecture": "test_resnet", "num_classes": 3}
    cfg = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.9, "crop_mode": "center"}
    cfg |= {"num_classes": 3, "interpolation": "bicubic", "first_conv": "conv1", "classifier": "fc"}
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": cfg}))
    assert is_foreign_release(tmp_path) and not is_foreign_release("test_resnet")
    loaded = load_timm_release(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model(images))
    assert (loaded.num_classes, loaded.own_px, loaded.crop) == (3, 64, 0.9)
    assert tuple(loaded.mean) == (0.5,) * 3 and tuple(loaded.std) == (0.25,) * 3
    assert load_timm_release(tmp_path, image_px=96).image_px == 96

    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"timm cannot load it .*; fetch it again"):
        load_timm_release(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_classes": 0}))
    with pytest.raises(UserError, match="a release of test_resnet without a classifier"):
        load_timm_release(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "beit_base_patch16_224"}))
    assert not is_foreign_release(tmp_path)
