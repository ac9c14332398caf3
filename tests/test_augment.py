"""Augmentation is timm's, and every draw a pure function of its words."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from torchvision import transforms

from peco_ds.config import AugmentSettings
from peco_ds.data.augment import BatchMix, CenterCrop, TrainCrop, drawn_from
from peco_ds.data.order import MIX
from peco_ds.data.views import to_backbone
from peco_ds.errors import UserError

NOT_MIXED = dict(mixup=0.0, cutmix=0.0)


def global_draws():
    return random.random(), float(np.random.rand()), torch.rand(3).tolist()


def global_states():
    numpy_state = np.random.get_state()
    return (
        random.getstate(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state],
        torch.get_rng_state().tolist(),
    )


@pytest.fixture(scope="module")
def photograph(real_data):
    """A photograph that is not square, as PIL and as uint8 [3, H, W]."""
    image = Image.open(real_data.kodak[0]).convert("RGB").resize((300, 200))
    return image, torch.from_numpy(np.array(image)).permute(2, 0, 1)


def random_batch(size=8, px=32, classes=10):
    draw = torch.Generator().manual_seed(0)
    return torch.randint(256, (size, 3, px, px), dtype=torch.uint8, generator=draw), torch.randint(
        classes, (size,), generator=draw
    )


def test_the_same_words_give_the_same_draws_and_other_words_others():
    drawn = []
    for words in ((5, 1), (5, 2), (5, 1)):
        with drawn_from(*words):
            drawn.append(global_draws())
    assert drawn[0] == drawn[2]
    assert all(a != b for a, b in zip(drawn[0], drawn[1]))


def test_the_global_generators_go_on_as_if_nothing_was_drawn_even_after_an_error():
    before = global_states()
    with drawn_from(1, 2):
        global_draws()
        assert global_states() != before
    assert global_states() == before
    with pytest.raises(ZeroDivisionError), drawn_from(1, 2):
        global_draws()
        raise ZeroDivisionError
    assert global_states() == before


def test_a_training_crop_is_the_one_that_beit_fine_tunes_with(photograph):
    """Normalised in the worker as BEiT's `build_transform(is_train=True)` does it, with the same draws, against uint8
    normalised here.
    """
    image, image_u8 = photograph
    reference = create_transform(
        64,
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )
    crop, seen = TrainCrop(AugmentSettings(), 64), []
    for number in range(20):
        with drawn_from(7, number):
            expected = reference(image)
        with drawn_from(7, number):
            found = crop(image_u8)
        assert found.dtype == torch.uint8 and found.shape == (3, 64, 64)
        assert torch.allclose(to_backbone(found[None])[0], expected, atol=1e-5)
        seen.append(found)
    assert not any(torch.equal(a, b) for a, b in zip(seen, seen[1:]))


def test_colour_jitter_serves_only_without_auto_augment(photograph):
    _, image_u8 = photograph

    def crop(**settings):
        with drawn_from(3):
            return TrainCrop(AugmentSettings(scale=(1.0, 1.0), ratio=(1.5, 1.5), flip=0.0, **settings), 64)(image_u8)

    plain = crop(auto_augment="")
    assert not torch.equal(crop(auto_augment="", color_jitter=0.4), plain)
    assert torch.equal(crop(color_jitter=0.4), crop())


@pytest.mark.parametrize("text", ["rnd-m9", "rand-mstd0.5-x1", "rand-m9.5", "original-p1", "v7"])
def test_an_augmentation_that_timm_cannot_read_is_refused_in_one_line(text):
    with pytest.raises(UserError, match="augment.auto_augment") as caught:
        TrainCrop(AugmentSettings(auto_augment=text), 32)
    assert text in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["rand-m10-n1-p1.0-inc1", "rand-m0-n1-p1.0"])
def test_the_strongest_posterize_is_black_whatever_pillow_thinks_of_it(photograph, text):
    crop, black = TrainCrop(AugmentSettings(auto_augment=text), 32), 0
    for number in range(90):  # one operation of 15 each
        with drawn_from(number):
            black += int(crop(photograph[1]).max() == 0)
    assert 0 < black < 20


@pytest.mark.parametrize("text", ["original-mstd0.5", "v0r", "3a", "augmix-m9-w2", "rand-m9-tweights"])
def test_timms_other_augmentations_serve_as_well(photograph, text):
    crop = TrainCrop(AugmentSettings(auto_augment=text), 32)
    for number in range(30):
        with drawn_from(number):
            assert crop(photograph[1]).shape == (3, 32, 32)


@pytest.mark.parametrize("image_px, crop", [(64, 0.875), (64, 0.9), (96, 1.0)])
def test_a_central_crop_keeps_the_aspect_as_beit_and_timm_do(photograph, image_px, crop):
    image, image_u8 = photograph
    beit = transforms.Compose(
        [
            transforms.Resize(int(image_px / crop), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(image_px),
        ]
    )
    timm_crop = create_transform(
        image_px,
        is_training=False,
        crop_pct=crop,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )
    found = CenterCrop(image_px, crop)(image_u8)
    assert torch.equal(found, torch.from_numpy(np.array(beit(image))).permute(2, 0, 1))
    assert torch.allclose(to_backbone(found[None])[0], timm_crop(image), atol=1e-5)


@pytest.mark.parametrize(
    "mixing", [dict(), dict(cutmix=0.0), dict(mixup=0.0), dict(mix_probability=0.5, switch_probability=0.2)]
)
def test_mixtures_equal_timms_mixup_with_the_same_draws(mixing):
    images_u8, labels = random_batch()
    augment = AugmentSettings(erasing=0.0, **mixing)
    mix = BatchMix(augment, smoothing=0.1, num_classes=10, seed=4)
    reference = Mixup(
        augment.mixup,
        augment.cutmix,
        prob=augment.mix_probability,
        switch_prob=augment.switch_probability,
        label_smoothing=0.1,
        num_classes=10,
    )
    mixed = 0
    for slice_number in range(12):
        images_norm, targets = mix(images_u8, labels, slice_number=slice_number)
        with drawn_from(MIX, 4, slice_number):
            expected_images, expected_targets = reference(to_backbone(images_u8), labels)
        assert torch.equal(images_norm, expected_images) and torch.equal(targets, expected_targets)
        assert images_norm.dtype == targets.dtype == torch.float32
        assert torch.allclose(targets.sum(dim=1), torch.ones(8), atol=1e-6)
        mixed += not torch.equal(images_norm, to_backbone(images_u8))
    assert mixed == 12 if augment.mix_probability == 1 else 0 < mixed < 12


def test_every_batch_of_a_run_is_mixed_in_its_own_way():
    images_u8, labels = random_batch()
    mix = BatchMix(AugmentSettings(), smoothing=0.1, num_classes=10, seed=0)
    first, second, again = (mix(images_u8, labels, slice_number=number)[0] for number in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert not torch.equal(
        first, BatchMix(AugmentSettings(), smoothing=0.1, num_classes=10, seed=1)(images_u8, labels, slice_number=0)[0]
    )


@pytest.mark.parametrize("off", [NOT_MIXED, dict(mix_probability=0.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_mixing_a_target_is_the_smoothed_label_also_of_an_odd_batch(off, smoothing):
    images_u8, labels = random_batch(size=5)
    images_norm, targets = BatchMix(AugmentSettings(erasing=0.0, **off), smoothing=smoothing, num_classes=10, seed=0)(
        images_u8, labels, slice_number=3
    )
    expected = torch.full((5, 10), smoothing / 10)
    expected[torch.arange(5), labels] += 1 - smoothing
    assert torch.allclose(targets, expected)
    assert torch.equal(images_norm, to_backbone(images_u8))


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_images_are_erased_at_the_stated_rate_with_noise_in_each_pixel(rate):
    images_u8 = torch.full((2000, 3, 16, 16), 128, dtype=torch.uint8)
    augment = AugmentSettings(erasing=rate, **NOT_MIXED)
    images_norm, _ = BatchMix(augment, smoothing=0.0, num_classes=2, seed=0)(
        images_u8, torch.zeros(2000, dtype=torch.int64), slice_number=0
    )
    changed = images_norm != to_backbone(images_u8)
    share = changed.flatten(1).any(dim=1).float().mean()
    # 4 standard deviations; and rarely no rectangle fits
    assert abs(share - rate) <= 4 * (rate * (1 - rate) / 2000) ** 0.5 + 2e-3
    if rate:
        noise = images_norm[changed]
        assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
        # one rectangle of a third at most
        assert changed.flatten(1).float().mean(dim=1).max() < 0.4
