"""What the data side of a stage needs: cores that load, and bytes on the shared file system."""

from __future__ import annotations

from peco_ds.planner.detection import image_shape
from peco_ds.planner.memory import checkpoint_bytes, zero_stage
from peco_ds.planner.stages import Stage
from peco_ds.schema import VIEW_COLUMNS

# Seconds of one core (AMD EPYC, torchvision's decoder), measured on ImageNet images of 87 thousand pixels:
# benchmarks/data.py for pre-training's parts; RandAugment through Pillow at 224 and 448 px gave 2.1 and 5.9 ms.
DECODE_S_A_PIXEL = 5.2e-9
# Seconds an image for reading, order, mask, token record and batch.
RECORD_S = 424e-6
# Box, resize and flip: seconds a pixel of the crop.
CROP_S_A_PIXEL = 4.3e-9
AUGMENT_S, AUGMENT_S_A_PIXEL = 850e-6, 25e-9
# Resizing by a factor of 1.25, cropping and the photometric changes of a scene, per pixel of its crop.
SCENE_S_A_PIXEL = 150e-9
# Resizing an image and drawing the masks of its objects, COCO's usual seven, per pixel: assumed, not measured.
OBJECTS_S_A_PIXEL = 30e-9
# ImageNet's mean image, as the literature has it
SOURCE_PIXELS = 469 * 387
# 147.9 GB of ILSVRC2012_img_train.tar over 1,281,167 images
SOURCE_BYTES = 115_400
# Of that time, by pace. Assumed: other processors, and two processes on the two threads of a core.
LOADER_PACE = {"slow": 1.6, "typical": 1.0, "fast": 0.8}


def loader_core_s(stage: Stage, source_pixels: float = SOURCE_PIXELS) -> float:
    """Seconds that one core works for one image of the stage (of tokenizing: for one view, an image being decoded
    once for all of its views).
    """
    decode, recipe = DECODE_S_A_PIXEL * source_pixels, stage.recipe
    if stage.kind == "fine-tuning":
        return decode + RECORD_S + AUGMENT_S + AUGMENT_S_A_PIXEL * recipe.model.image_px**2
    if stage.kind == "detection":
        height, width = image_shape(recipe)
        return decode + RECORD_S + OBJECTS_S_A_PIXEL * height * width
    if stage.kind == "segmentation":
        return decode + RECORD_S + SCENE_S_A_PIXEL * recipe.model.image_px**2
    if stage.kind == "pre-training":
        return decode + RECORD_S + CROP_S_A_PIXEL * recipe.model.image_px**2
    crop = CROP_S_A_PIXEL * recipe.views.tokenizer_px**2
    return decode + RECORD_S + crop if stage.kind == "tokenizer" else crop + (decode + RECORD_S) / recipe.views.count


def token_bytes(num_views: int, patches: int, topk: int = 0) -> tuple[int, int]:
    """Bytes of one image's token record: (array data, room in the tar with npy and tar headers).

    Args:
        topk: soft codes a patch, with float16 probabilities; 0: none.
    """
    codes = 2 * num_views * patches
    members = [codes, 4 * num_views * len(VIEW_COLUMNS)] + ([codes * topk] * 2 if topk else [])
    npy_header, tar_block = 128, 512
    return sum(members), sum(tar_block + -(-(npy_header + member) // tar_block) * tar_block for member in members)


def token_set_bytes(stage: Stage) -> int:
    """Bytes of the token shards that a tokenizing writes and its pre-training reads."""
    views = stage.recipe.views
    return stage.num_samples * token_bytes(views.count, stage.recipe.model.grid**2, views.topk)[1]


def checkpoints_bytes(stage: Stage, ds_config: dict) -> float:
    """The most that a training keeps on disk: the newest checkpoints, those kept for good, and one that is being
    written.
    """
    settings, durations = stage.recipe.checkpoint, stage.durations
    kept = settings.keep_last + 1 + (durations.total_steps // durations.keep_steps if durations.keep_steps else 0)
    return kept * checkpoint_bytes(
        stage.parameters, stage=zero_stage(ds_config), precision=stage.run.precision, average=stage.averages
    )
