import pytest
import timm
import torch

from peco_ds.errors import UserError
from peco_ds.models.timm_classifier import load_timm_classifier

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
