"""Augmentation for classifiers, and the central crop they are evaluated on: timm's transforms, reproducibly seeded.

timm draws from the global generators of Python, numpy and torch. `drawn_from` seeds them and restores their states
afterwards, so that neither worker, rank nor restart changes an image, and no image changes the model's stochastic
depth.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment, posterize
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torchvision.transforms.functional import to_pil_image

from peco_ds.config import AugmentSettings
from peco_ds.data.order import MIX, generator
from peco_ds.data.views import normalize
from peco_ds.errors import UserError
from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD

# The largest seed that numpy's global generator takes, plus one.
_MAX_SEED = 2**32

# What timm raises for an augmentation text that it cannot read.
_NOT_AUGMENT = (AssertionError, ValueError, LookupError, TypeError)


@contextmanager
def drawn_from(*words: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside the context, the global generators of `random`, numpy and torch follow from the words only.

    Afterwards they continue as if they had not been used.

    Args:
        words: non-negative integers, as for `order.generator`.
        device: a CUDA device, whose generator is seeded too; None or another device: only the CPU's is.
    """
    # torch.manual_seed and fork_rng would reach for every CUDA device, which a forked loader process must not touch.
    lent = [torch.default_generator]
    if device is not None and device.type == "cuda":
        lent.append(
            torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        )
    kept_python, kept_numpy, kept_torch = random.getstate(), np.random.get_state(), [each.get_state() for each in lent]
    draw = generator(*words)
    python_seed, numpy_seed, torch_seed = (int(seed) for seed in draw.integers(_MAX_SEED, size=3))
    random.seed(python_seed)
    np.random.seed(numpy_seed)
    for each in lent:
        each.manual_seed(torch_seed)
    try:
        yield
    finally:
        random.setstate(kept_python)
        np.random.set_state(kept_numpy)
        for each, state in zip(lent, kept_torch):
            each.set_state(state)


class TrainCrop:
    """Random resized crop, flip, and RandAugment or colour jitter: uint8 [3, H, W] -> uint8 [3, image_px, image_px].

    Call it inside `drawn_from`.

    Raises: UserError if timm cannot read augment.auto_augment.
    Source: timm's training transform with ImageNet's mean as fill, which BEiT fine-tunes with.
    """

    def __init__(self, augment: AugmentSettings, image_px: int) -> None:
        try:
            self._transform = create_transform(
                image_px,
                is_training=True,
                scale=augment.scale,
                ratio=augment.ratio,
                hflip=augment.flip,
                color_jitter=augment.color_jitter or None,
                auto_augment=augment.auto_augment or None,
                interpolation=augment.interpolation,
                # The result is uint8; normalisation and erasing run on the device.
                normalize=False,
            )
        except _NOT_AUGMENT as error:
            raise UserError(
                f"augment.auto_augment {augment.auto_augment!r}: timm cannot read it ({error}); write it as "
                "rand-m9-mstd0.5-inc1, or leave it empty for none"
            ) from None
        for operation in _augment_operations(self._transform):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize

    def __call__(self, image_u8: torch.Tensor) -> torch.Tensor:
        return self._transform(to_pil_image(image_u8))


def _augment_operations(transform) -> Iterator[AugmentOp]:
    """The operations that a timm training transform picks from."""
    for part in transform.transforms:
        if isinstance(part, (RandAugment, AugMixAugment)):
            yield from part.ops
        elif isinstance(part, AutoAugment):
            for operations in part.policy:
                yield from operations


def _posterize(image: Image.Image, bits_to_keep: int, **colours) -> Image.Image:
    # RandAugment's strongest step keeps no bit at all: a black image, in every published run. Pillow 13 raises an error
    # instead.
    return posterize(image, bits_to_keep, **colours) if bits_to_keep > 0 else Image.new(image.mode, image.size)


class CenterCrop:
    """Short side resized to image_px / crop (bicubic), central square: uint8 [3, H, W] -> uint8 [3, image_px,
    image_px].

    Args:
        crop: share of the resized short side that is seen, in (0, 1]. At 1 the central square reaches from border to
            border; the aspect is kept, never squashed.
    Source: timm's evaluation transform; BEiT's released `datasets.py` does the same, with 224 / 256 below 384 px and 1
        from there on.
    """

    def __init__(self, image_px: int, crop: float) -> None:
        self._transform = create_transform(
            image_px, is_training=False, crop_pct=crop, crop_mode="center", interpolation="bicubic", normalize=False
        )

    def __call__(self, image_u8: torch.Tensor) -> torch.Tensor:
        return self._transform(to_pil_image(image_u8))


class BatchMix:
    """Operations on a whole training batch on the device: normalisation, random erasing, mixup or cutmix, label
    smoothing.

    Args:
        smoothing: share of a label spread evenly over all classes, in [0, 1).
        seed: of the run.
        mean, std: of images in [0, 1].
    Source: timm's RandomErasing (per-pixel noise, before mixing, as BEiT) and Mixup (one mixture a batch; image i
        meets image B - 1 - i).
    """

    def __init__(
        self,
        augment: AugmentSettings,
        *,
        smoothing: float,
        num_classes: int,
        seed: int,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        self._erasing, self._smoothing, self._num_classes, self._seed = augment.erasing, smoothing, num_classes, seed
        self._mean, self._std = mean, std
        self._mixup = None
        if augment.mix_probability > 0 and (augment.mixup > 0 or augment.cutmix > 0):
            self._mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_probability,
                switch_prob=augment.switch_probability,
                mode="batch",
                label_smoothing=smoothing,
                num_classes=num_classes,
            )

    def __call__(
        self, images_u8: torch.Tensor, labels: torch.Tensor, *, slice_number: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            images_u8: uint8 [B, 3, S, S]; B is even where batches are mixed.  labels: int64 [B], on the same device.
            slice_number: which batch of the run this is, counted over all ranks; the draws follow from it and the seed.
        Returns: images_norm float32 [B, 3, S, S], targets float32 [B, C] whose rows sum to 1.
        """
        images_norm = normalize(images_u8, self._mean, self._std)
        with drawn_from(MIX, self._seed, slice_number, device=images_u8.device):
            if self._erasing > 0:
                images_norm = RandomErasing(self._erasing, mode="pixel", device=images_u8.device)(images_norm)
            if self._mixup is not None:
                return self._mixup(images_norm, labels)
        return images_norm, mixup_target(labels, self._num_classes, smoothing=self._smoothing)
