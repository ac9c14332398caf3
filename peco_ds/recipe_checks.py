"""What can be refused in a recipe without files and without knowing the number of ranks.

The range of a single value stands at its field (`field_marks.Bounds`); here stand the checks that need two.
"""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import TypeVar

from peco_ds.config import (
    DetectRecipe,
    FinetuneRecipe,
    PretrainRecipe,
    ProbeRecipe,
    Recipe,
    SegmentRecipe,
    TokenizerRecipe,
    TokenizerSettings,
    TrainingRecipe,
)
from peco_ds.durations import mixes_pairs, settle_micro_batch
from peco_ds.errors import UserError
from peco_ds.field_marks import Bounds, settings_fields
from peco_ds.registry import OBJECTIVES, TOKENIZERS, check_options, kinds_learning_from
from peco_ds.remote_paths import holds_credentials
from peco_ds.schedules import images_taken
from peco_ds.schema import short

R = TypeVar("R", bound=TrainingRecipe)


def check_recipe(recipe: Recipe) -> None:
    """Raises: UserError for the first value out of its range, else for the first two that do not go together."""
    check_bounds(recipe)
    _check_sources(recipe)
    if not isinstance(recipe, ProbeRecipe):
        _check_training(recipe)
    if isinstance(recipe, (PretrainRecipe, TokenizerRecipe)):
        _check_crops("views", recipe.views)
    if isinstance(recipe, (PretrainRecipe, FinetuneRecipe, SegmentRecipe, DetectRecipe)):
        _check_model(recipe)
    if isinstance(recipe, PretrainRecipe):
        _check_pretrain(recipe)
    elif isinstance(recipe, TokenizerRecipe):
        _check_tokenizer(recipe)
    elif isinstance(recipe, FinetuneRecipe):
        _check_finetune(recipe)
    elif isinstance(recipe, DetectRecipe):
        _check_detect(recipe)
    elif isinstance(recipe, SegmentRecipe):
        _check_segment(recipe)
    elif isinstance(recipe, ProbeRecipe):
        _check_probe(recipe)


def recipe_of_ranks(recipe: R, world_size: int) -> R:
    """The recipe with the micro-batch that so many ranks take (`settle_micro_batch`).

    Raises: UserError if the ranks do not divide the global batch, or as `check_recipe`.
    """
    settled = replace(recipe, run=settle_micro_batch(recipe.run, world_size, pairs=mixes_pairs(recipe)))
    check_recipe(settled)
    return settled


def check_bounds(settings, prefix: str = "") -> None:
    """Hold every value against the `Bounds` at its field.

    Raises: UserError naming the first value outside; keys begin with `prefix`.
    """
    # As a plain `type`, since mypy holds type[...] to be unhashable.
    settings_type: type = type(settings)
    for name, _, marks in settings_fields(settings_type):
        value = getattr(settings, name)
        if is_dataclass(value):
            check_bounds(value, f"{prefix}{name}.")
        for fault in (mark.fault(value) for mark in marks if isinstance(mark, Bounds)):
            _require(not fault, f"{prefix}{name} {_written(value)}: {fault}")


def _written(value) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) and len(value) <= 16 else short(value)


def _check_sources(recipe) -> None:
    """A path that is left empty would be the folder data.root itself."""
    wanted = {"images": "the folder of an image set (pack_images.py)"}
    if isinstance(recipe, PretrainRecipe):
        wanted |= {
            "tokens": "the folder of a token set (tokenize_shards.py), or online",
            "tokenizer": "the release folder of a tokenizer",
        }
    for name, what in wanted.items():
        _require(getattr(recipe.data, name).strip() != "", f"data.{name} is empty; give {what}")
    _refuse_credentials(recipe)


def _refuse_credentials(settings, prefix: str = "") -> None:
    """Settings are saved with the run, shown in its log, and copied into recipes."""
    settings_type: type = type(settings)
    for name, _, _ in settings_fields(settings_type):
        value = getattr(settings, name)
        if is_dataclass(value):
            _refuse_credentials(value, f"{prefix}{name}.")
        _require(
            not (isinstance(value, str) and holds_credentials(value)),
            f"{prefix}{name} {value}: a URL of a recipe holds no user, password or query, for settings are saved with "
            "the run; give credentials where the store's library looks (~/.aws, ~/.netrc, environment), or write "
            f"$VARIABLE in their place ('{prefix}{name}=https://host/set?$SIGNATURE')",
        )


def _check_training(recipe) -> None:
    schedule = recipe.schedule
    _require(
        recipe.run.compile != "blocks" or recipe.run.layer_norm == "torch",
        "run.compile blocks and run.layer_norm apex are both set: a compiled block fuses its own "
        "layer norm; set run.layer_norm=torch, or run.compile=none",
    )
    _require(
        not recipe.run.fp8 or recipe.run.precision == "bf16",
        f"run.fp8 and run.precision {recipe.run.precision}: 8-bit products go with bf16; set run.precision=bf16, or "
        "run.fp8=false",
    )
    _require(
        schedule.epochs is None or schedule.steps is None,
        "schedule.epochs and schedule.steps are both set; a duration has one spelling, drop one",
    )
    _require(
        schedule.epochs is not None or schedule.steps is not None,
        "schedule.epochs is not set; give schedule.epochs or schedule.steps",
    )
    _require(
        schedule.warmup_epochs is None or schedule.warmup_steps is None,
        "schedule.warmup_epochs and schedule.warmup_steps are both set; drop one",
    )
    drops = schedule.drops
    _require(
        (schedule.decay == "drops") == bool(drops),
        f"schedule.decay {schedule.decay} and schedule.drops {_written(drops)}: drops of the rate go with decay drops; "
        "set both, or neither",
    )
    _require(
        all(low < high for low, high in zip(drops, drops[1:])),
        f"schedule.drops {_written(drops)}: shares of the run, rising; sort them",
    )
    _require(
        recipe.checkpoint.every_epochs is None or recipe.checkpoint.every_steps is None,
        "checkpoint.every_epochs and checkpoint.every_steps are both set; drop one",
    )


def _check_crops(section: str, crops) -> None:
    for name in ("scale", "ratio"):
        low, high = getattr(crops, name)
        _require(low <= high, f"{section}.{name} [{low}, {high}]: the lowest first, then the highest; swap them")


def _check_model(recipe) -> None:
    model = recipe.model
    _require(
        model.image_px % model.patch_px == 0,
        f"model.image_px {model.image_px} is not a multiple of model.patch_px {model.patch_px}",
    )
    _require(
        model.width % model.heads == 0, f"model.width {model.width} is not a multiple of model.heads {model.heads}"
    )
    _require(
        int(model.width * model.mlp_ratio) >= 1,
        f"model.mlp_ratio {model.mlp_ratio}: gives a hidden layer without units",
    )
    if model.drop_path_by == "subset" and model.drop_path > 0:
        _require(
            images_taken(recipe.run.micro_batch, model.drop_path) < recipe.run.micro_batch,
            f"model.drop_path_by subset: of run.micro_batch {recipe.run.micro_batch} images a rate of "
            f"{model.drop_path} leaves out none, subsets are of whole images; raise one of the two, or "
            "set model.drop_path_by=image",
        )


def _check_pretrain(recipe: PretrainRecipe) -> None:
    mask, patches = recipe.mask, recipe.model.grid**2
    _require(
        mask.count < patches,
        f"mask.count {mask.count}: the image has {patches} patches, mask between 1 and {patches - 1}",
    )
    _require(
        mask.kind == "random" or mask.min_block <= mask.count,
        f"mask.min_block {mask.min_block} is more than mask.count {mask.count}; lower it",
    )
    objective = recipe.objective
    kind = OBJECTIVES.named(objective.name)
    _require(
        not kind.soft_codes or recipe.views.topk > 0,
        f"objective.name {objective.name} learns from soft codes, and views.topk is 0; set views.topk "
        "(mc-BEiT's recipes: 64) and tokenize with it",
    )
    check_options(objective.options, kind.options, "objective.options")
    kind.check(recipe)
    _check_variants(recipe)


def _check_variants(recipe: PretrainRecipe) -> None:
    model, encoding, aggregation = recipe.model, recipe.encoding, recipe.aggregation
    _require(
        aggregation.early_block < model.depth,
        f"aggregation.early_block {aggregation.early_block}: the backbone has {model.depth} blocks, "
        f"so an early one is 1 to {model.depth - 1} (BEiT v2: 9 of 12, 21 of 24), or 0 for no second "
        "branch",
    )
    visible = encoding.kind == "visible"
    _require(
        encoding.decoder_width % encoding.decoder_heads == 0,
        f"encoding.decoder_width {encoding.decoder_width} is not a multiple of encoding.decoder_heads "
        f"{encoding.decoder_heads}",
    )
    _require(
        not (visible and recipe.model.absolute_positions),
        "encoding.kind visible and model.absolute_positions are both set: the visible patches would get the places of "
        "others; drop one",
    )
    _require(
        not visible or recipe.mask.exact,
        "encoding.kind visible needs the same number of visible patches in every image; set mask.exact=true",
    )
    _require(
        not (visible and aggregation.early_block),
        "encoding.kind visible and aggregation.early_block are both set: the second branch needs a "
        "token at every place; drop one",
    )


def _check_finetune(recipe: FinetuneRecipe) -> None:
    augment = recipe.augment
    _check_crops("augment", augment)
    _require(
        recipe.run.micro_batch > 1 or not mixes_pairs(recipe),
        "run.micro_batch 1: mixup and cutmix pair the images of a pass; make it 2 or more, or set augment.mixup=0 "
        "augment.cutmix=0",
    )
    _require(
        recipe.data.val_images != "", "data.val_images is empty; give the labelled images that top-1 is measured on"
    )


# The coarsest map that proposals are pooled from. Images are filled up to multiples of it.
DETECTION_STRIDE_PX = 32


def _check_detect(recipe: DetectRecipe) -> None:
    model, detector, augment = recipe.model, recipe.detector, recipe.augment
    _require(
        model.patch_px == 16,
        f"model.patch_px {model.patch_px}: maps need strides of 4 to 32 px, so patches of 16; set model.patch_px=16 "
        "(detector.resample_patch=true resizes the patch embedding of other weights)",
    )
    _require(
        model.image_px % DETECTION_STRIDE_PX == 0,
        f"model.image_px {model.image_px}: is the side of the largest image, a multiple of {DETECTION_STRIDE_PX} px",
    )
    _check_sizes(recipe)
    taps, blocks = detector.taps, detector.global_blocks
    wanted = 4 if detector.pyramid == "branches" else 1
    _require(
        len(taps) == wanted and all(low < high for low, high in zip(taps, taps[1:])) and taps[-1] == model.depth - 1,
        f"detector.taps {_written(taps)}: pyramid {detector.pyramid} takes {wanted}, rising, the last of them block "
        f"{model.depth - 1}, the last one",
    )
    _require(
        bool(blocks) == bool(detector.window) and all(block < model.depth for block in blocks),
        f"detector.window {detector.window} and detector.global_blocks {_written(blocks)}: windows need some blocks of "
        f"0 to {model.depth - 1} that see the whole image, and only windows do; set both, or neither",
    )
    low, high = augment.scale
    _require(low <= high, f"augment.scale [{low}, {high}]: the lowest first, then the highest; swap them")
    _require(
        recipe.data.val_images != "",
        "data.val_images is empty; give the images with COCO annotations that AP is measured on",
    )


def _check_sizes(recipe: DetectRecipe) -> None:
    model, augment = recipe.model, recipe.augment
    _require(
        DETECTION_STRIDE_PX <= augment.short_px <= augment.long_px,
        f"augment.short_px {augment.short_px} and augment.long_px {augment.long_px}: the first is at most the second, "
        f"and at least {DETECTION_STRIDE_PX}",
    )
    _require(
        augment.long_px <= model.image_px,
        f"augment.long_px {augment.long_px}: the position bias covers images up to model.image_px {model.image_px}; "
        "lower the one or raise the other",
    )
    _require(
        augment.kind == "resize" or augment.long_px % DETECTION_STRIDE_PX == 0,
        f"augment.long_px {augment.long_px}: scale_jitter fills images up to this square, a multiple of "
        f"{DETECTION_STRIDE_PX} px",
    )
    _require(
        model.drop_path_by == "image",
        "model.drop_path_by subset: a detector's passes hold too few images for subsets; set model.drop_path_by=image",
    )


def _check_segment(recipe: SegmentRecipe) -> None:
    model, taps, evaluation = recipe.model, recipe.segmenter.taps, recipe.evaluation
    _require(
        len(taps) == 4 and list(taps) == sorted(set(taps)) and taps[-1] == model.depth - 1,
        f"segmenter.taps [{', '.join(map(str, taps))}]: wants four blocks, rising from 0, the last of them "
        f"{model.depth - 1}, the last block of {model.depth}",
    )
    _require(
        model.grid % 2 == 0,
        f"model.image_px {model.image_px}: gives {model.grid} patches of {model.patch_px} px a side, the coarsest map "
        f"halves them; take {(model.grid - 1) * model.patch_px} or {(model.grid + 1) * model.patch_px} px",
    )
    low, high = recipe.augment.ratio
    _require(low <= high, f"augment.ratio [{low}, {high}]: the lowest first, then the highest; swap them")
    for section in ("augment", "evaluation"):
        bounds = getattr(recipe, section)
        _require(
            bounds.short_px <= bounds.long_px,
            f"{section}.short_px {bounds.short_px} is more than {section}.long_px {bounds.long_px}; swap them",
        )
    _require(
        evaluation.stride_px <= model.image_px,
        f"evaluation.stride_px {evaluation.stride_px} is more than model.image_px {model.image_px}: windows would "
        "leave pixels out; lower it (BEiT's: two thirds)",
    )
    _require(len(evaluation.scales) > 0, "evaluation.scales []: one factor at least; set it to [1.0]")
    _require(
        recipe.data.val_images != "", "data.val_images is empty; give the images with maps that mIoU is measured on"
    )


def _check_probe(recipe: ProbeRecipe) -> None:
    _require(len(recipe.probe.lrs) > 0, "probe.lrs []: one rate at least")
    _require(
        recipe.init.weights != "",
        "init.weights is empty; give the run folder, release or weights file whose features are probed",
    )
    _require(
        recipe.data.val_images != "",
        "data.val_images is empty; give the labelled images that accuracy is measured on",
    )


def _check_tokenizer(recipe: TokenizerRecipe) -> None:
    kept = recipe.run.activation_checkpointing
    _require(
        kept == "none",
        f"run.activation_checkpointing {kept}: is of transformers that are pre-trained or fine-tuned; a tokenizer is "
        "trained without, drop it",
    )
    _require(
        not recipe.run.fp8,
        "run.fp8: is of transformers that are pre-trained or fine-tuned; a tokenizer is trained without, drop it",
    )
    check_tokenizer_settings(recipe.tokenizer)
    kind, stride, size = recipe.tokenizer.kind, recipe.tokenizer.stride_px, recipe.views.tokenizer_px
    _require(size % stride == 0, f"views.tokenizer_px {size} is not a multiple of the tokenizer's stride {stride}")
    _require(
        recipe.tokenizer.only_px in (None, size),
        f"views.tokenizer_px {size} is not tokenizer.vit.image_px {recipe.tokenizer.only_px}; set both to one size",
    )
    judged, taught = kinds_learning_from("judge"), kinds_learning_from("teacher")
    _require(
        kind in judged + taught,
        f"tokenizer.kind {kind}: is read from released files (import_tokenizer.py), not trained here; "
        f"{' and '.join(judged + taught)} are",
    )
    if kind in taught:
        _require(
            recipe.perceptual.weights == "",
            f"perceptual.weights {recipe.perceptual.weights}: a tokenizer of kind {kind} has a teacher and "
            "no judge; drop it, and set teacher.weights",
        )
        _require(
            recipe.teacher.weights != "",
            "teacher.weights is empty; give a CLIP, DINO or any timm ViT file, whose features a "
            f"tokenizer of kind {kind} learns to give",
        )
        _require(
            recipe.adversarial.weight == 0,
            f"adversarial.weight {recipe.adversarial.weight}: a tokenizer of kind {kind} makes no images "
            "for a critic; set it to 0",
        )
    else:
        _require(
            recipe.teacher.weights == "",
            f"teacher.weights {recipe.teacher.weights}: a tokenizer of kind {kind} has a judge and no "
            f"teacher; drop it, or set tokenizer.kind={' or '.join(taught)}",
        )
        _require(
            recipe.perceptual.weight == 0 or recipe.perceptual.weights != "",
            "perceptual.weights is empty; give a MoCo v3 file (vit-b-300ep.pth.tar), any timm ViT file or a "
            "convolutional network's, or set perceptual.weight=0 for a tokenizer without a judge",
        )
    _require(
        recipe.data.val_images != "" or recipe.data.holdout > 0,
        "no held-out image to judge the tokenizer on; set data.val_images to an image set, or "
        "data.val_images= data.holdout=N to keep N of the training images",
    )


def check_tokenizer_settings(settings: TokenizerSettings, section: str = "tokenizer") -> None:
    """Raises: UserError if they describe no network; a release's are checked as a recipe's are."""
    check_bounds(settings, f"{section}.")
    kind = TOKENIZERS.named(settings.kind, f"{section}.kind")
    check_options(settings.options, kind.options, f"{section}.options")
    mults = settings.channel_mults
    _require(
        1 <= len(mults) <= 16,
        f"{section}.channel_mults of {len(mults)} levels: one factor a level, 1 to 16 levels",
    )
    _require(
        settings.decoder or kind.decoder_optional,
        f"{section}.decoder false: a {settings.kind} tokenizer has one; only "
        f"{' or '.join(name for name, other in TOKENIZERS.items() if other.decoder_optional)} can be without",
    )
    _require(
        settings.average == "sums" or settings.l2_normalized,
        f"{section}.average {settings.average}: is of unit codes; set {section}.l2_normalized=true, "
        f"or {section}.average=sums",
    )
    kind.check(settings, section)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
