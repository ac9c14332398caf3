import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchmetrics.functional.image.lpips import _NoTrainLpips

from peco_ds.errors import UserError
from peco_ds.evaluation.perceptual_distance import load_lpips


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """A file as torchvision writes its AlexNet; random weights have another distance, but a distance all the same."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images(real_data):
    crops = [np.asarray(Image.open(path).convert("RGB").resize((64, 64))) for path in real_data.kodak[:3]]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 255


def test_the_distance_is_torchmetrics_with_the_files_network(alexnet, images):
    lpips = load_lpips(alexnet)
    assert lpips.network == "alex"
    reference = _NoTrainLpips(net="alex", pnet_rand=True)
    torchvision_net = torchvision.models.alexnet(weights=None)
    torchvision_net.load_state_dict(torch.load(alexnet, weights_only=True))
    for number, layers in enumerate(((0, 2), (2, 5), (5, 8), (8, 10), (10, 12)), start=1):
        setattr(reference.net, f"slice{number}", torchvision_net.features[slice(*layers)])
    other = (images * 0.7 + 0.1).clamp(0, 1)
    torch.testing.assert_close(lpips(other, images), reference(other * 2 - 1, images * 2 - 1).reshape(-1))


def test_equal_images_have_no_distance_and_blur_has_more_the_stronger_it_is(alexnet, images):
    lpips = load_lpips(alexnet)
    blurred = [torchvision.transforms.functional.gaussian_blur(images, 9, sigma) for sigma in (0.5, 3.0)]
    same, little, much = (lpips(restored, images) for restored in (images, *blurred))
    assert torch.equal(same, torch.zeros(3)) and (little > 0).all() and (much > little).all()


def test_vgg16_is_told_from_its_shapes(tmp_path, images):
    state = {
        name: tensor
        for name, tensor in torchvision.models.vgg16(weights=None).state_dict().items()
        if name.startswith("features.")
    }
    torch.save(state, tmp_path / "vgg16.pth")
    lpips = load_lpips(tmp_path / "vgg16.pth")
    assert lpips.network == "vgg" and lpips(images, images.flip(0)).shape == (3,)
    torch.save({**state, "features.30.weight": torch.zeros(2)}, tmp_path / "vgg19.pth")
    with pytest.raises(UserError, match="features.30.weight is missing, unexpected"):
        load_lpips(tmp_path / "vgg19.pth")


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 5, 5)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="neither torchvision's AlexNet nor its VGG16"):
        load_lpips(tmp_path / "other.pth")


def test_a_network_that_is_not_finite_measures_no_distance(alexnet, tmp_path):
    state = torch.load(alexnet, weights_only=True)
    state["features.10.bias"][0] = float("nan")
    torch.save(state, tmp_path / "alexnet.pth")
    with pytest.raises(UserError, match="tensor 10.bias holds values that are not finite"):
        load_lpips(tmp_path / "alexnet.pth")
