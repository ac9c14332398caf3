"""Scene augmentation against the published algorithm, spelt out here in NumPy, for given draws."""

import colorsys

import numpy as np
import pytest
import torch

from peco_ds.config import SceneAugmentSettings
from peco_ds.data.order import generator
from peco_ds.data.scene_augment import (
    IGNORED_PIXEL,
    Scene,
    SceneCrop,
    bounded_size,
    hsv_to_rgb,
    photometric,
    random_crop,
    resize_scene,
    rgb_to_hsv,
)


class Draws:
    """The values that a generator is to give, in order; what it was asked for is kept."""

    def __init__(self, *values):
        self.left, self.asked = list(values), []

    def _next(self, *asked):
        self.asked.append(asked)
        return self.left.pop(0)

    integers = uniform = random = _next


def noise(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "height, width, long_px, short_px, size",
    [(480, 640, 2048, 512, (512, 683)), (300, 2000, 2048, 512, (307, 2048)), (683, 512, 1024, 256, (342, 256))],
)
def test_an_image_keeps_within_both_bounds(height, width, long_px, short_px, size):
    assert bounded_size(height, width, long_px, short_px) == size


def test_images_are_resized_without_antialiasing_and_labels_to_the_nearest():
    scene = Scene(noise(8, 8), torch.arange(64, dtype=torch.uint8).view(8, 8))
    small = resize_scene(scene, 4, 4)
    # Half the size: the middle of each output pixel lies between four input pixels, and no others count.
    expected = scene.image_u8.float().view(3, 4, 2, 4, 2).mean((2, 4)).round()
    assert (small.image_u8.float() - expected).abs().max() <= 1
    assert torch.equal(small.labels, scene.labels[::2, ::2])


def test_a_crop_of_one_class_is_drawn_again_and_the_tenth_redraw_is_taken():
    labels = torch.zeros(8, 16, dtype=torch.uint8)
    labels[:, 8:] = torch.arange(8, dtype=torch.uint8)
    scene = Scene(noise(8, 16), labels)
    draw = Draws(0, 0, 0, 2, 0, 8)
    assert torch.equal(random_crop(scene, 8, 0.75, draw).labels, labels[:, 8:])
    assert not draw.left and draw.asked[0] == (1,) and draw.asked[1] == (9,)
    only_one = Draws(*[0, 0] * 11)
    assert not random_crop(scene, 8, 0.75, only_one).labels.any() and not only_one.left


def test_pixels_without_a_class_do_not_count_in_a_crop():
    labels = torch.full((4, 4), IGNORED_PIXEL, dtype=torch.uint8)
    labels[0] = torch.tensor([0, 0, 1, 1])
    draw = Draws(0, 0)
    random_crop(Scene(noise(4, 4), labels), 4, 0.75, draw)
    assert not draw.left
    # Exactly the share is too much.
    labels[0] = torch.tensor([0, 0, 0, 1])
    draw = Draws(*[0, 0] * 11)
    random_crop(Scene(noise(4, 4), labels), 4, 0.75, draw)
    assert not draw.left


def test_a_scene_smaller_than_the_crop_keeps_its_size():
    cropped = random_crop(Scene(noise(5, 20), torch.zeros(5, 20, dtype=torch.uint8)), 8, 1.0, Draws(0, 3))
    assert cropped.image_u8.shape == (3, 5, 8) and cropped.labels.shape == (5, 8)


def cut(values):
    return np.clip(values, 0, 255).astype(np.uint8)


def test_brightness_and_contrast_are_cut_off_after_the_point_each_time():
    image = noise(6, 7)
    # brightness, contrast first, no saturation, no hue
    found = photometric(image, Draws(1, 10.7, 1, 1, 0.8, 0, 0))
    values = image.permute(1, 2, 0).numpy().astype(np.float32)
    expected = cut(cut(values + np.float32(10.7)).astype(np.float32) * np.float32(0.8))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)
    # contrast last
    found = photometric(image, Draws(0, 0, 0, 0, 1, 1.4))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), cut(values * np.float32(1.4)))
    assert torch.equal(photometric(image, Draws(0, 1, 0, 0, 0)), image)


def test_hue_and_saturation_are_opencvs_of_eight_bits():
    rgb = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128], [10, 200, 30], [255, 255, 0], [0, 0, 0]])
    expected = [[0, 255, 255], [60, 255, 255], [120, 255, 255], [0, 0, 128], [63, 242, 200], [30, 255, 255], [0, 0, 0]]
    assert rgb_to_hsv(rgb.astype(np.uint8)).tolist() == expected
    many = noise(50, 50).permute(1, 2, 0).numpy()
    hsv = rgb_to_hsv(many)
    exact = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in many.reshape(-1, 3) / 255])
    hue_error = np.abs(hsv[..., 0].ravel() - exact[:, 0] * 180)
    assert np.minimum(hue_error, 180 - hue_error).max() <= 0.51
    assert np.abs(hsv[..., 1].ravel() - exact[:, 1] * 255).max() <= 0.51
    back = np.array([colorsys.hsv_to_rgb(h / 180, s / 255, v / 255) for h, s, v in hsv.reshape(-1, 3)]) * 255
    assert np.abs(hsv_to_rgb(hsv).reshape(-1, 3) - back).max() <= 0.51


def test_the_hue_turns_round_and_its_upper_end_is_left_out():
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    draw = Draws(0, 0, 0, 1, -18, 0)
    assert photometric(red, draw).flatten().tolist() == [255, 0, 153]
    assert draw.asked[4] == (-18, 18)


def test_a_crop_follows_from_its_words_alone():
    scene = Scene(noise(60, 80), torch.randint(0, 5, (60, 80), generator=torch.Generator().manual_seed(1)).byte())
    crop = SceneCrop(SceneAugmentSettings(long_px=200, short_px=60), 32)
    once, again, other = (crop(scene, generator(5, 0, 0, sample)) for sample in (3, 3, 4))
    assert torch.equal(once.image_u8, again.image_u8) and torch.equal(once.labels, again.labels)
    assert not torch.equal(once.image_u8, other.image_u8)
    assert max(once.labels.shape) <= 32 and once.image_u8.is_contiguous()
