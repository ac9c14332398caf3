from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from peco_ds.errors import UserError
from peco_ds.evaluation.reconstruction import (
    CodeSums,
    CosineSums,
    RoundTripSums,
    comparison_grid,
    held_out_quality,
    quality_line,
    to_u8,
)


class Rounded:
    """A round trip that keeps 3 bits of every value, and codes that repeat every 5 patches."""

    def __init__(self, images_11):
        self.reconstruction = ((images_11 + 1) * 3.5).round() / 3.5 - 1
        self.codes = (torch.arange(4) % 5).repeat(len(images_11), 1)
        # as if a teacher's: colours of every 16th pixel
        self.features = self.reconstruction.flatten(2).transpose(1, 2)[:, ::16]


@pytest.fixture(scope="module")
def images(real_data):
    crops = [np.asarray(Image.open(path).convert("RGB").resize((64, 64))) for path in real_data.kodak[:7]]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def measure(images, *, world_size=1, batch=3, sums=lambda: RoundTripSums(6, torch.device("cpu"))):
    """All ranks one after the other: the sums each hands to all_reduce are what the last one adds up."""
    handed: list[list[torch.Tensor]] = []
    for rank in range(world_size):
        calls: list[torch.Tensor] = []

        def all_reduce(tensor):
            calls.append(tensor.clone())
            return tensor if rank + 1 < world_size else sum((other[len(calls) - 1] for other in handed), tensor)

        world = SimpleNamespace(rank=rank, size=world_size, device=torch.device("cpu"), all_reduce=all_reduce)
        found = held_out_quality(Rounded, images, sums(), world, batch=batch)
        handed.append(calls)
    return found


def test_psnr_and_ssim_are_scikit_images(images):
    found = measure(images)
    restored = ((Rounded(images.float() / 127.5 - 1).reconstruction + 1) / 2).numpy()
    originals = (images.float() / 255).numpy()
    psnr = np.mean([peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(originals, restored)])
    # scikit-image leaves out the rim of half a window; mirrored outwards by as much, what it leaves out is not the
    # image's
    padded = [np.pad(each, ((0, 0), (0, 0), (5, 5), (5, 5)), mode="reflect") for each in (originals, restored)]
    arguments = dict(data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    ssim = np.mean([structural_similarity(a, b, **arguments) for a, b in zip(*padded)])
    assert found["psnr"] == pytest.approx(psnr, abs=1e-3)
    assert found["ssim"] == pytest.approx(ssim, abs=1e-4)
    assert found["codes_used"] == 4 and found["perplexity"] == pytest.approx(4.0)


@pytest.mark.parametrize("world_size, batch", [(1, 2), (2, 3), (3, 1), (4, 2)])
def test_ranks_and_batches_divide_the_held_out_set_without_counting_twice(images, world_size, batch):
    assert measure(images, world_size=world_size, batch=batch) == pytest.approx(measure(images), rel=1e-6)


def colours(images_01):
    return (images_01 - 0.5).flatten(2).transpose(1, 2)[:, ::16]


@pytest.mark.parametrize("world_size, batch", [(1, 3), (3, 1), (4, 2)])
def test_the_cosine_to_a_teacher_is_averaged_over_patches_and_images(images, world_size, batch):
    found = measure(
        images, world_size=world_size, batch=batch, sums=lambda: CosineSums(6, torch.device("cpu"), colours)
    )
    mine, target = (
        Rounded(images.float() / 127.5 - 1).features.double().numpy(),
        colours(images.double() / 255).numpy(),
    )
    cosines = (mine * target).sum(-1) / np.maximum(
        np.linalg.norm(mine, axis=-1) * np.linalg.norm(target, axis=-1), 1e-8
    )
    assert found == {
        "cosine": pytest.approx(cosines.mean(), abs=1e-5),
        "codes_used": 4,
        "perplexity": pytest.approx(4.0),
    }
    assert 0.5 < found["cosine"] < 1


def test_without_images_or_teacher_the_codes_are_measured_and_said(images):
    found = measure(images, sums=lambda: CodeSums(6, torch.device("cpu")))
    assert found == {"codes_used": 4, "perplexity": pytest.approx(4.0)}
    assert quality_line(found, 6) == "4 of 6 codes, perplexity 4.0"
    assert quality_line({"cosine": 0.51234, **found}, 6) == "cosine to the teacher 0.512, 4 of 6 codes, perplexity 4.0"
    assert (
        quality_line({"psnr": 20.123, "ssim": 0.5, "lpips": 0.25, **found}, 6)
        == "PSNR 20.12 dB, SSIM 0.500, LPIPS 0.250, 4 of 6 codes, perplexity 4.0"
    )


def test_a_grid_holds_every_image_in_its_place(images):
    grid = comparison_grid([images[:3], 255 - images[:3]])
    assert grid.shape == (3, 3 * 72, 2 * 72)
    assert torch.equal(grid[:, 72 + 4 : 72 + 68, 4:68], images[1]) and torch.equal(
        grid[:, 4:68, 76:140], 255 - images[0]
    )


def test_small_images_of_a_grid_are_enlarged_and_its_columns_named(images):
    plain, named = (
        comparison_grid([images[:2]] * 2, names=names, at_least_px=100) for names in ((), ("left", "right"))
    )
    assert plain.shape == (3, 2 * 136, 2 * 136) and torch.equal(named[:, 24:], plain)
    shrunk = torch.nn.functional.avg_pool2d(plain[:, 4:132, 4:132].float(), 2)
    assert (shrunk - images[0].float()).abs().mean() < 8
    left, right = named[:, :24, :136].float(), named[:, :24, 136:].float()
    assert all(0 < (name < 128).float().mean() < 0.2 for name in (left, right)) and not torch.equal(left, right)
    assert torch.equal(comparison_grid([images[:2]], at_least_px=64), comparison_grid([images[:2]]))


def test_images_survive_the_way_to_the_tokenizers_range_and_back(images):
    assert torch.equal(to_u8(images.float() / 127.5 - 1), images)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_round_trip_that_is_not_finite_has_no_score(images, value):
    def broken(images_11):
        output = Rounded(images_11)
        output.features = output.features * value
        output.reconstruction = output.reconstruction * float("nan")
        return output

    world = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"), all_reduce=lambda tensor: tensor)
    for sums in (
        RoundTripSums(6, world.device),
        CosineSums(6, world.device, lambda images_01: Rounded(images_01).features),
    ):
        with pytest.raises(UserError, match="not finite .*no score"):
            held_out_quality(broken, images, sums, world, batch=3)
