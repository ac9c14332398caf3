import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from peco_ds.evaluation.reconstruction import comparison_grid, reconstruction_quality, to_u8


class Rounded:
    """A round trip that keeps 3 bits of every value, and codes that repeat every 5 patches."""

    def __init__(self, images_11):
        self.reconstruction = ((images_11 + 1) * 3.5).round() / 3.5 - 1
        self.codes = (torch.arange(4) % 5).repeat(len(images_11), 1)


@pytest.fixture(scope="module")
def pictures(real_data):
    crops = [np.asarray(Image.open(path).convert("RGB").resize((64, 64))) for path in real_data.kodak[:7]]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def measure(pictures, *, world_size=1, batch=3):
    """All ranks one after the other: the sums each hands to all_reduce are what the last one adds up."""
    handed: list[list[torch.Tensor]] = []
    for rank in range(world_size):
        calls: list[torch.Tensor] = []

        def all_reduce(tensor):
            calls.append(tensor.clone())
            return tensor if rank + 1 < world_size else sum((other[len(calls) - 1] for other in handed), tensor)

        found = reconstruction_quality(Rounded, pictures, num_codes=6, batch=batch, rank=rank, world_size=world_size, device=torch.device("cpu"), all_reduce=all_reduce)
        handed.append(calls)
    return found


def test_psnr_and_ssim_are_scikit_images(pictures):
    found = measure(pictures)
    restored = ((Rounded(pictures.float() / 127.5 - 1).reconstruction + 1) / 2).numpy()
    originals = (pictures.float() / 255).numpy()
    psnr = np.mean([peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(originals, restored)])
    # scikit-image leaves out the rim of half a window; mirrored outwards by as much, what it leaves out is not the picture's
    padded = [np.pad(images, ((0, 0), (0, 0), (5, 5), (5, 5)), mode="reflect") for images in (originals, restored)]
    arguments = dict(data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    ssim = np.mean([structural_similarity(a, b, **arguments) for a, b in zip(*padded)])
    assert found["psnr"] == pytest.approx(psnr, abs=1e-3)
    assert found["ssim"] == pytest.approx(ssim, abs=1e-4)
    assert found["codes_used"] == 4 and found["perplexity"] == pytest.approx(4.0)


@pytest.mark.parametrize("world_size, batch", [(1, 2), (2, 3), (3, 1), (4, 2)])
def test_ranks_and_batches_divide_the_held_out_set_without_counting_twice(pictures, world_size, batch):
    assert measure(pictures, world_size=world_size, batch=batch) == pytest.approx(measure(pictures), rel=1e-6)


def test_a_grid_holds_every_picture_in_its_place(pictures):
    grid = comparison_grid([pictures[:3], 255 - pictures[:3]])
    assert grid.shape == (3, 3 * 72, 2 * 72)
    assert torch.equal(grid[:, 72 + 4 : 72 + 68, 4:68], pictures[1]) and torch.equal(grid[:, 4:68, 76:140], 255 - pictures[0])


def test_pictures_survive_the_way_to_the_tokenizers_range_and_back(pictures):
    assert torch.equal(to_u8(pictures.float() / 127.5 - 1), pictures)
