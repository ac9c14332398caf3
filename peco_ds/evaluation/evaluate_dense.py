"""Evaluate a finished segmenter, mIoU over whole scenes, or a finished detector, AP of boxes and masks."""

from __future__ import annotations

import time
from dataclasses import asdict, replace

from peco_ds.config import ObjectAugmentSettings, SegmentationSettings
from peco_ds.data.objects import ObjectSet, detection_batches
from peco_ds.data.scenes import SceneSet, evaluation_scenes
from peco_ds.errors import UserError
from peco_ds.evaluation.detection import detection_quality, read_annotations
from peco_ds.evaluation.forward import ForwardSettings, in_precision
from peco_ds.evaluation.segmentation import ScenePredictor, segmentation_quality
from peco_ds.evaluation.stopping import until_stopped
from peco_ds.models.detector_weights import DetectorWeights, detector_of
from peco_ds.models.segmenter_weights import SegmenterWeights, segmenter_of


def default_segmentation(image_px: int) -> SegmentationSettings:
    """How a segmenter is measured that no run tells of.

    Args:
        image_px: of its crops.
    Source: released BEiT configs, for crops of 512 and 640 px: short side a crop, long side four at most, windows two
        thirds of a crop apart.
    """
    return SegmentationSettings(short_px=image_px, long_px=4 * image_px, stride_px=image_px * 2 // 3)


def segmentation_settings(weights: SegmenterWeights, **asked) -> SegmentationSettings:
    """How a segmenter sees scenes: as its run did, where none tells as the published configs, but for what is asked.

    Args:
        asked: fields of `SegmentationSettings`.
    Raises: UserError if windows would leave pixels between them.
    """
    settings = replace(weights.evaluation or default_segmentation(weights.model.image_px), **asked)
    if settings.windows == "slide" and settings.stride_px > weights.model.image_px:
        raise UserError(
            f"--stride_px {settings.stride_px}: windows are {weights.model.image_px} px, and pixels between them would "
            "not be seen; lower it"
        )
    return settings


def evaluate_segmenter(
    weights: SegmenterWeights, images: SceneSet, how: ForwardSettings, world, *, settings: SegmentationSettings
) -> tuple[dict, str]:
    """Collective.

    Args:
        images: of the weights' classes.  how: its batch counts windows.  settings: how it sees them.
        world: the ranks (`runtime.distributed.World`).
    Returns: settings, quality and throughput as they are recorded, and one line about them.
    Raises: Stopped if the ranks were asked to stop; UserError for a scene that cannot be read, or no labelled pixel.
    """
    model = segmenter_of(weights).to(world.device)
    predict = ScenePredictor(
        in_precision(lambda images_norm: model(images_norm).logits, how.precision, world.device),
        settings,
        weights.model,
        batch=how.batch,
        most_passes=lambda passes: max(world.gather_objects(passes)),
        mean=weights.mean,
        std=weights.std,
    )
    begun = time.perf_counter()
    scenes = until_stopped(evaluation_scenes(images, world, num_workers=how.num_workers), world.stop_requested)
    quality, _ = segmentation_quality(predict, scenes, weights.num_classes, world)
    seconds = time.perf_counter() - begun
    told = {
        "crop_px": weights.model.image_px,
        "mean": weights.mean,
        "std": weights.std,
        **{name: value for name, value in asdict(settings).items() if name in _OF_PREDICTIONS},
    }
    line = (
        f"mIoU {quality['miou']:.2f}, aAcc {quality['aacc']:.2f}, mAcc {quality['macc']:.2f} on {quality['images']} "
        "images"
    )
    return _result(told, how, world, quality, seconds), line


_OF_PREDICTIONS = ("windows", "stride_px", "long_px", "short_px", "scales", "flip")


def evaluate_detector(weights: DetectorWeights, images: ObjectSet, how: ForwardSettings, world) -> tuple[dict, str]:
    """Collective.

    Args:
        images: of the weights' categories.  world: the ranks (`runtime.distributed.World`).
    Returns: as `evaluate_segmenter`.
    Raises: Stopped if the ranks were asked to stop; UserError for an image that cannot be read.
    """
    # A damaged file shows here, not after the last image.
    annotations = read_annotations(images.annotation_file)
    sizes = ObjectAugmentSettings(short_px=weights.short_px, long_px=weights.long_px)
    model = in_precision(detector_of(weights).to(world.device), how.precision, world.device)
    begun = time.perf_counter()
    batches = detection_batches(images, sizes, world, batch=how.batch, num_workers=how.num_workers)
    quality, _ = detection_quality(model, until_stopped(batches, world.stop_requested), images, annotations, world)
    told = {name: getattr(weights, name) for name in ("short_px", "long_px", "square_px", "mean", "std")}
    found = ", ".join(f"{name} AP {quality.get(f'{name}_ap', 0):.1f}" for name in ("box", "mask"))
    return _result(told, how, world, quality, time.perf_counter() - begun), f"{found} on {quality['images']} images"


def _result(told: dict, how: ForwardSettings, world, quality: dict, seconds: float) -> dict:
    return {
        "settings": {**told, **how.facts(world)},
        "quality": quality,
        "throughput": {"end_to_end_images_per_s": quality["images"] / seconds},
    }
