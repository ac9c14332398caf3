"""Evaluate a classifier: accuracy on a labelled image set, images per second, and accuracy under an attack."""

from __future__ import annotations

import time

from torch import nn

from peco_ds.data.image_set import ImageSet
from peco_ds.data.labelled import CropSettings, evaluation_batches
from peco_ds.evaluation.attacks import AttackSettings, RobustnessSums, robustness_line
from peco_ds.evaluation.classification import classification_quality
from peco_ds.evaluation.forward import ForwardSettings, in_precision, world_images_per_s
from peco_ds.evaluation.pixel_classifier import PixelClassifier
from peco_ds.evaluation.stopping import until_stopped


def evaluate_classifier(
    model: nn.Module,
    images: ImageSet,
    settings: CropSettings,
    how: ForwardSettings,
    world,
    *,
    attack: AttackSettings | None = None,
) -> tuple[dict, str]:
    """Collective.

    Args:
        model: images_norm [B, 3, S, S] -> logits [B, C], in eval mode.  images: labelled.
        world: the ranks (`runtime.distributed.World`).
        attack: to measure robustness against, in a second pass over the images; None: none.
    Returns: settings, quality, throughput and robustness as they are recorded, and one line about them.
    Raises: Stopped if the ranks were asked to stop; UserError for an unreadable image or a wrong label.
    """
    assert images.manifest.classes is not None, "the images are labelled"
    forward = in_precision(model.to(world.device), how.precision, world.device)
    forward_images_per_s = world_images_per_s(forward, how.batch, settings.image_px, world)
    batches = evaluation_batches(images, settings, world, batch=how.batch, num_workers=how.num_workers)
    begun = time.perf_counter()
    quality = classification_quality(
        forward,
        until_stopped(batches, world.stop_requested),
        num_classes=len(images.manifest.classes),
        device=world.device,
    )
    end_to_end_images_per_s = quality["images"] / (time.perf_counter() - begun)
    result = {
        "settings": {**settings._asdict(), **how.facts(world)},
        "quality": quality,
        "throughput": {
            "forward_images_per_s": forward_images_per_s,
            "end_to_end_images_per_s": end_to_end_images_per_s,
        },
    }
    line = (
        f"top-1 {quality['top1']:.2f}, top-5 {quality['top5']:.2f} on {quality['images']} images at "
        f"{settings.image_px} px, {forward_images_per_s:.1f} images/s ({end_to_end_images_per_s:.1f} with decoding)"
    )
    if attack is not None:
        robustness = _robustness(model, images, settings, how, world, attack)
        result["robustness"] = robustness
        line += f"; {robustness_line(robustness)}"
    return result, line


def _robustness(
    model: nn.Module, images: ImageSet, settings: CropSettings, how: ForwardSettings, world, attack: AttackSettings
) -> dict:
    """Collective."""
    assert images.manifest.classes is not None, "the images are labelled"
    # The attack changes pixels: the batches hold values in [0, 1], and the statistics are applied behind it.
    pixels = settings._replace(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    classifier = PixelClassifier(model, image_px=settings.image_px, mean=settings.mean, std=settings.std, source="").to(
        world.device
    )
    forward = in_precision(classifier, how.precision, world.device, gradients=True)
    sums = RobustnessSums(forward, attack, len(images.manifest.classes), world.device)
    batches = evaluation_batches(images, pixels, world, batch=how.batch, num_workers=how.num_workers)
    begun = time.perf_counter()
    for batch in until_stopped(batches, world.stop_requested):
        sums.add(batch.images_norm, batch.labels)
    result = sums.result()
    return {**result, "images_per_s": result["images"] / (time.perf_counter() - begun)}
