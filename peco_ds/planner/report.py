"""What a dry run prints: the resolved run in numbers, as aligned plain text."""

from __future__ import annotations

from typing import Any

from peco_ds.config import (
    DetectRecipe,
    FinetuneRecipe,
    ModelSettings,
    PretrainRecipe,
    RunSettings,
    SegmentRecipe,
    TokenizerRecipe,
    TokenizerSettings,
)
from peco_ds.durations import settle_micro_batch
from peco_ds.errors import UserError
from peco_ds.planner import detection
from peco_ds.planner.bill_text import aligned, figure, images_of, labelled, ranged
from peco_ds.planner.data_side import token_bytes
from peco_ds.planner.estimate import estimate
from peco_ds.planner.fitting import FRAGMENTATION, GIB, RESERVED_BYTES, DeepSpeedChoice, Room, room
from peco_ds.planner.hardware import find_hardware
from peco_ds.planner.memory import STAGES, checkpoint_bytes, zero_stage
from peco_ds.planner.shapes import (
    FLOPS_PER_MAC,
    mim_macs,
    mim_parameters,
    objective_cost,
    skipped_by_subsets,
    tokenizer_cost,
)
from peco_ds.planner.stages import IMAGENET_1K_CLASSES, IMAGENET_1K_TRAIN, Stage, stage_of
from peco_ds.planner.work import frozen_cost, frozen_of_unknown_cost, frozen_precision, frozen_role
from peco_ds.registry import OBJECTIVES

WORLD_SIZES = (1, 8, 64, 256)
# The machine that a dry run predicts times for; plan.py takes any.
HARDWARE = "h100"

_LABEL_WIDTH = 20


def dry_run_report(
    recipe: PretrainRecipe | FinetuneRecipe | SegmentRecipe | DetectRecipe | TokenizerRecipe,
    *,
    ds_config: dict,
    num_samples: int | None = None,
    num_classes: int | None = None,
) -> str:
    """Model, compute, schedule, storage and memory of a training run.

    Args:
        ds_config: DeepSpeed JSON, read or merged: stage, buckets, offload and the type of summed gradients count.
        num_samples, num_classes: of the set; None: no set was read, ImageNet-1K's are assumed and the report says so.
    Returns: lines without a final newline.
    Raises: UserError as `resolve_durations`.
    """
    planned = stage_of(recipe, num_samples or IMAGENET_1K_TRAIN, num_classes=num_classes or IMAGENET_1K_CLASSES)
    if isinstance(recipe, TokenizerRecipe) and not tokenizer_cost(recipe.tokenizer, recipe.views.tokenizer_px).known:
        kind = recipe.tokenizer.kind
        unknown = f"kind {kind} does not tell its network's cost, so neither memory nor time is predicted"
        lines = _codes_line(recipe) | {"cost": unknown} | _schedule_lines(planned, num_samples is None)
        return "\n".join([f"{recipe.name}: tokenizer training", *labelled(lines, _LABEL_WIDTH)])
    parts = {
        "pre-training": _pretraining,
        "fine-tuning": _finetuning,
        "segmentation": _segmentation,
        "detection": _detection,
        "tokenizer": _tokenizer,
    }
    title, of_model, compute, storage = parts[planned.kind](planned)
    lines = of_model | compute | _schedule_lines(planned, num_samples is None)
    lines |= storage | _checkpoint_line(planned, ds_config)
    if planned.averages:
        lines["moving average"] = (
            f"decay {planned.recipe.ema.decay}: 4 bytes a parameter, {4 * planned.parameters / GIB:.2f} GiB over all "
            'ranks together (ZeRO-0: on each), under "other" below'
        )
    tables = [*_memory_lines(planned, ds_config), "", *_time_lines(planned, ds_config)]
    return "\n".join([f"{recipe.name}: {title}", *labelled(lines, _LABEL_WIDTH), "", *tables])


def tokenizing_report(recipe: PretrainRecipe, tokenizer: TokenizerSettings, *, num_samples: int) -> str:
    """What the rest of a tokenizing costs.

    Args:
        num_samples: images that have no tokens yet.
    """
    planned, views = Stage("tokenizing", recipe, num_samples, tokenizer=tokenizer), recipe.views
    in_tars = num_samples * token_bytes(views.count, recipe.model.grid**2, views.topk)[1]
    lines = {
        "network": f"{tokenizer.kind}, {_millions(planned.parameters)}, {planned.model_flops / 1e9:.1f} GFLOP a view "
        f"of {views.tokenizer_px} px, in {views.tokenizer_precision}",
        "views": f"{num_samples:,} images x {views.count} = {planned.images:,}; {_decimal(in_tars)} in tars",
    }
    return "\n".join([*labelled(lines, _LABEL_WIDTH), "", *_time_lines(planned, {})])


# ------------------------------------------------- by kind: title, and the lines of model, compute, storage

_Lines = dict[str, str]


def _pretraining(planned: Stage) -> tuple[str, _Lines, _Lines, _Lines]:
    recipe = planned.recipe
    model, mask, objective, views = recipe.model, recipe.mask, recipe.objective, recipe.views
    variants = dict(encoding=recipe.encoding, aggregation=recipe.aggregation)
    found = mim_parameters(model, objective.num_codes, **variants)
    macs = mim_macs(model, num_codes=objective.num_codes, masked=mask.count, **variants)
    patches = model.grid**2
    named = {
        "backbone": found.backbone,
        "aggregation": found.aggregation,
        "decoder": found.decoder,
        "token head": found.token_head,
    }
    parameters = ", ".join(f"{name} {_millions(count)}" for name, count in named.items() if count)
    of_model = _model_line(model) | {
        "parameters": f"{parameters} ({objective.num_codes} codes), total {_millions(found.total)}",
        "grid": f"{model.grid} x {model.grid} = {patches} patches; {mask.kind} mask hides "
        f"{'' if mask.exact else 'at most '}{mask.count} ({mask.count / patches:.1%})",
    }
    of_model |= _variant_line(recipe, macs.total)
    soft = f", {views.topk} soft codes a patch" if OBJECTIVES[objective.name].soft_codes else ""
    of_model["objective"] = objective.name + soft
    payload, in_tar = token_bytes(views.count, patches, views.topk)
    storage = (
        f"{payload:,} B an image ({views.count} views: codes {2 * views.count * patches:,} B), "
        f"{_decimal(planned.num_samples * payload)} for the set, {_decimal(planned.num_samples * in_tar)} in tars"
    )
    flops = macs.training_flops + objective_cost(recipe).model_flops
    compute = _compute_lines(planned, macs.total, flops)
    return "masked pre-training", of_model, compute, {"token storage": storage}


def _finetuning(planned: Stage) -> tuple[str, _Lines, _Lines, _Lines]:
    recipe = planned.recipe
    model, classifier, augment = recipe.model, recipe.classifier, recipe.augment
    lowest = recipe.optim.lr * classifier.layer_decay ** (model.depth + 1)
    of_model = _model_line(model) | {
        "parameters": f"{_millions(planned.parameters)} with a head of {planned.num_classes} classes",
        "learning rate": f"{recipe.optim.lr:g} at the head, {lowest:.2g} at the patch embedding (layer decay "
        f"{classifier.layer_decay}), stochastic depth up to {model.drop_path}",
        "augmentation": f"{augment.auto_augment or 'no RandAugment'}, mixup {augment.mixup}, cutmix {augment.cutmix}, "
        f"erasing {augment.erasing}, smoothing {classifier.smoothing}, repeats {augment.repeats}",
    }
    # A classifier's head sees one token an image, where pre-training's sees the masked patches.
    macs = mim_macs(model, num_codes=planned.num_classes, masked=1)
    return "fine-tuning", of_model, _compute_lines(planned, macs.total, macs.training_flops), {}


def _segmentation(planned: Stage) -> tuple[str, _Lines, _Lines, _Lines]:
    recipe, model = planned.recipe, planned.recipe.model
    settings, augment = recipe.segmenter, recipe.augment
    lowest = recipe.optim.lr * settings.layer_decay ** (model.depth + 1)
    of_model = _model_line(model) | {
        "parameters": f"{_millions(planned.parameters)} with branches and heads of {planned.num_classes} classes",
        "heads": f"UperNet of {settings.head_width or model.width} channels on blocks "
        f"{', '.join(map(str, settings.taps))}; auxiliary loss x {settings.auxiliary_weight}; "
        "batch norm over micro_batch x ranks images",
        "learning rate": f"{recipe.optim.lr:g} at the heads, {lowest:.2g} at the patch embedding (layer decay "
        f"{settings.layer_decay}), stochastic depth up to {model.drop_path}",
        "augmentation": f"short side up to {augment.short_px} px x {augment.ratio[0]:g} to {augment.ratio[1]:g}, crop "
        f"{model.image_px} px" + (", photometric" if augment.photometric else ""),
    }
    forward = sum(segment.forward.flops for segment in planned.segments)
    return "segmentation", of_model, _compute_lines(planned, round(forward / FLOPS_PER_MAC), planned.model_flops), {}


def _detection(planned: Stage) -> tuple[str, _Lines, _Lines, _Lines]:
    recipe, model = planned.recipe, planned.recipe.model
    settings, shape = recipe.detector, detection.image_shape(recipe)
    lowest = recipe.optim.lr * settings.layer_decay ** (model.depth + 1)
    where = f"windows of {settings.window} patches, {len(settings.global_blocks)} blocks global"
    of_model = _model_line(model) | {
        "parameters": f"{_millions(planned.parameters)} with pyramid and heads of {planned.num_classes} classes",
        "attention": where if settings.window else "every block sees the whole image",
        "heads": f"Mask R-CNN on a pyramid of {settings.channels} channels ({settings.pyramid}), {settings.rois} "
        "proposals an image",
        "learning rate": f"{recipe.optim.lr:g} at the heads, {lowest:.2g} at the patch embedding (layer decay "
        f"{settings.layer_decay}), stochastic depth up to {model.drop_path}",
        "usual image": f"{shape[0]} x {shape[1]} px ({recipe.augment.kind})",
    }
    forward = sum(segment.forward.flops for segment in planned.segments)
    return "detection", of_model, _compute_lines(planned, round(forward / FLOPS_PER_MAC), planned.model_flops), {}


def _tokenizer(planned: Stage) -> tuple[str, _Lines, _Lines, _Lines]:
    tokenizer, size = planned.recipe.tokenizer, planned.recipe.views.tokenizer_px
    cost = tokenizer_cost(tokenizer, size)
    of_model = _codes_line(planned.recipe) | {
        "parameters": f"encoder {_millions(cost.encoder.parameters)}, decoder {_millions(cost.decoder.parameters)}, "
        f"total {_millions(cost.parameters)}; codebook buffers {_millions(cost.codebook_elements)} in fp32",
    }
    of_model |= _frozen_line(planned.recipe)
    frozen = " with its judge or teacher" if planned.fixed_bytes > 4 * cost.codebook_elements else ""
    return "tokenizer training", of_model, _compute_lines(planned, cost.forward_macs, planned.model_flops, frozen), {}


def _frozen_line(recipe: TokenizerRecipe) -> _Lines:
    """What the plan takes the judge or teacher for."""
    role, net, unknown = frozen_role(recipe), frozen_cost(recipe), frozen_of_unknown_cost(recipe)
    if role is None:
        return {}
    if net is None:
        return {role: f"{unknown.removeprefix(f'{role} ')}, of unknown cost: neither its memory nor its time is below"}
    precision = frozen_precision(recipe)
    return {role: f"{net.name}, {net.image_px} px, {_millions(net.parameters)} parameters, in {precision} on a GPU"}


def _codes_line(recipe: TokenizerRecipe) -> _Lines:
    tokenizer, size = recipe.tokenizer, recipe.views.tokenizer_px
    grid = size // tokenizer.stride_px
    text = f"{size} px, stride {tokenizer.stride_px} px: {grid} x {grid} = {grid**2} codes of {tokenizer.num_codes}"
    return {"image": f"{text}, {tokenizer.code_dim} wide"}


def _model_line(model: ModelSettings) -> _Lines:
    text = f"width {model.width}, depth {model.depth}, heads {model.heads}, patch {model.patch_px} px, image"
    return {"model": f"{text} {model.image_px} px"}


def _variant_line(recipe: PretrainRecipe, macs: int) -> _Lines:
    """What differs from an encoder with a mask token at each masked place and one branch, and its share of that one's
    forward pass.
    """
    model, encoding, aggregation, masked = recipe.model, recipe.encoding, recipe.aggregation, recipe.mask.count
    share = f"{macs / mim_macs(model, num_codes=recipe.objective.num_codes, masked=masked).total:.1%}"
    if encoding.kind == "visible":
        return {
            "encoding": f"the encoder sees {model.grid**2 - masked} of {model.grid**2} patches; decoder width "
            f"{encoding.decoder_width}, depth {encoding.decoder_depth}, heads {encoding.decoder_heads}; {share} of the "
            "forward pass of full encoding"
        }
    if aggregation.early_block:
        return {
            "aggregation": f"final class token and patches after block {aggregation.early_block} through "
            f"{aggregation.blocks} extra blocks; {share} of the forward pass without them"
        }
    return {}


# ----------------------------------------------------------------------------- what all kinds say alike


def _compute_lines(planned: Stage, forward_macs: int, training_flops: float, with_what: str = "") -> _Lines:
    batch = planned.run.global_batch
    lines = {
        "forward": f"{forward_macs / 1e9:.1f} GMAC = {FLOPS_PER_MAC * forward_macs / 1e9:.1f} GFLOP an image",
        "training": f"{training_flops / 1e9:.1f} GFLOP an image{with_what}, {training_flops * batch / 1e12:.1f} TFLOP "
        f"a step, {training_flops * planned.images:.3g} FLOP the run (recomputation not counted)",
    }
    if planned.run.fp8:
        lines["fp8"] = "not counted: products are planned at the pace of 16 bits"
    model = getattr(planned.recipe, "model", None)
    if model and model.drop_path_by == "subset":
        skipped = skipped_by_subsets(model, planned.run.micro_batch)
        lines["stochastic depth"] = (
            f"subsets of {planned.run.micro_batch} images: {skipped:.1%} of the blocks' work is left out (not taken "
            "off above)"
        )
    return lines


def _schedule_lines(planned: Stage, assumed: bool) -> _Lines:
    durations, batch, num_samples = planned.durations, planned.run.global_batch, planned.num_samples
    stop = f"; this run stops at step {durations.stop_step:,}" if durations.stop_step < durations.total_steps else ""
    return {
        "set": images_of(num_samples, assumed),
        "schedule": f"{durations.total_steps:,} steps of {batch:,} images, warm-up "
        f"{durations.warmup_steps:,} steps{stop}",
        "images seen": f"{planned.images:,} = {planned.images / num_samples:.2f} epochs",
    }


def _checkpoint_line(planned: Stage, ds_config: dict) -> _Lines:
    stage, settings, durations = zero_stage(ds_config), planned.recipe.checkpoint, planned.durations
    sizes: dict[str, Any] = dict(stage=stage, precision=planned.run.precision, average=planned.averages)
    size = checkpoint_bytes(planned.parameters, **sizes)
    every = f"every {durations.checkpoint_steps:,} steps" if durations.checkpoint_steps else "at the end"
    kept = f"the newest {settings.keep_last} kept"
    if settings.keep_every_steps:
        kept += f", and each at a multiple of {settings.keep_every_steps:,} steps for good"
    return {"checkpoint": f"{size / GIB:.2f} GiB on disk at ZeRO-{stage}, {every}, {kept}"}


def _memory_lines(planned: Stage, ds_config: dict) -> list[str]:
    """One row a world size and stage; the stage of `ds_config` is marked.

    The same figures as plan.py has for the recipe's micro-batch.
    """
    run, hardware = planned.run, find_hardware(HARDWARE)
    taken = {world_size: _micro_batch(planned, world_size) for world_size in WORLD_SIZES}
    found = {
        (world_size, stage): room(
            planned, hardware, world_size, DeepSpeedChoice("the DeepSpeed JSON", _with_stage(ds_config, stage, run))
        )
        for world_size in WORLD_SIZES
        for stage in STAGES
    }
    offloads = any(each.state.host > 0 for each in found.values())
    names = ["weights", "gradients", "optimiser", "buffers", "other", "state", "activations", "total"]
    names += ["host"] if offloads else []
    lines = [
        f"memory a GPU in GiB, {run.precision}, micro-batch {run.micro_batch} at most, activation checkpointing "
        f"{run.activation_checkpointing}; * is the DeepSpeed JSON's stage; passes: images x number a step; other: "
        f"{RESERVED_BYTES / GIB:g} for context and communicators, and what ZeRO does not divide; activations with "
        f"{FRAGMENTATION - 1:.0%} lost in the allocator",
        f"{'GPUs':>6} {'ZeRO':>5} {'passes':>12}" + "".join(f" {name:>11}" for name in names),
    ]
    for (world_size, stage), each in found.items():
        mark = "*" if stage == zero_stage(ds_config) else " "
        micro_batch = taken[world_size] or run.micro_batch
        values = "".join(f" {value / GIB:>11.2f}" for value in _columns(each, micro_batch, offloads))
        passes = f"{micro_batch}x{run.global_batch // (micro_batch * world_size)}" if taken[world_size] else "-"
        lines.append(f"{world_size:>6} {stage:>4}{mark} {passes:>12}{values}")
    indivisible = " or ".join(str(world_size) for world_size, size in taken.items() if not size)
    if indivisible:
        lines.append(f"- : global_batch {run.global_batch} is not a multiple of {indivisible} GPUs")
    return lines


def _columns(found: Room, micro_batch: int, offloads: bool) -> list[float]:
    state, other, activations = found.state, RESERVED_BYTES + found.fixed_bytes, micro_batch * found.bytes_per_image
    parts = [state.weights, state.gradients, state.optimizer, state.buffers, other]
    sums = [state.state + other, activations, state.state + other + activations]
    return parts + sums + ([state.host] if offloads else [])


def _with_stage(ds_config: dict, stage: int, run: RunSettings) -> dict:
    """The JSON with another ZeRO stage, as far as that stage goes with it: without ZeRO gradients are summed in the
    weights' type.
    """
    changed = {**ds_config, "zero_optimization": {**ds_config.get("zero_optimization", {}), "stage": stage}}
    if stage == 0:
        changed["data_types"] = {**ds_config.get("data_types", {}), "grad_accum_dtype": run.precision}
    return changed


def _micro_batch(planned: Stage, world_size: int) -> int:
    """Images of a pass on so many GPUs. 0: they do not divide the global batch."""
    try:
        return settle_micro_batch(planned.run, world_size, pairs=planned.mixes).micro_batch
    except UserError:
        return 0


def _time_lines(planned: Stage, ds_config: dict) -> list[str]:
    """Predicted speed at each world size, with the recipe's settings.

    A micro-batch that does not divide or fit is made smaller.
    """
    hardware, choice = find_hardware(HARDWARE), DeepSpeedChoice("the DeepSpeed JSON", ds_config)
    rows = [("GPUs", "micro x passes", "step s", "images/s" if planned.trains else "views/s", "MFU", "hours")]
    refused = []
    for world_size in WORLD_SIZES:
        try:
            made = estimate(planned, hardware, world_size, choice)
        except UserError as error:
            rows.append((str(world_size), *"-----"))
            refused.append(f"- : {error}")
            continue
        passes, speed = f"{made.micro_batch} x {made.micro_steps}", f"{made.images_s():,.0f}"
        rows.append((str(world_size), passes, figure(made.step_s()), speed, f"{made.mfu():.0%}", ranged(made.hours)))
    return [
        f"predicted on {hardware.title}, hours with saves and failures, from a fast to a slow pace; plan.py tells more",
        *aligned(rows),
        *dict.fromkeys(refused),
    ]


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _decimal(size: float) -> str:
    """Decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
