"""What a dry run prints: the resolved run in numbers, as aligned plain text."""

from __future__ import annotations

from peco_ds.config import (
    FinetuneRecipe,
    ModelSettings,
    PretrainRecipe,
    RunSettings,
    TokenizerRecipe,
    TokenizerSettings,
)
from peco_ds.durations import Durations, micro_steps
from peco_ds.errors import UserError
from peco_ds.planner.bill import aligned, figure, ranged
from peco_ds.planner.data_side import token_bytes
from peco_ds.planner.estimate import estimate
from peco_ds.planner.fitting import FRAGMENTATION, GIB, RESERVED_BYTES, DeepSpeedChoice, Room, room
from peco_ds.planner.hardware import find_hardware
from peco_ds.planner.memory import STAGES, checkpoint_bytes, zero_stage
from peco_ds.planner.shapes import (
    FLOPS_PER_MAC,
    MimMacs,
    MimParameters,
    mim_macs,
    mim_parameters,
    skipped_by_subsets,
    tokenizer_cost,
)
from peco_ds.planner.stages import IMAGENET_1K_TRAIN, Stage

WORLD_SIZES = (1, 8, 64, 256)
# that a dry run's times are predicted for; plan.py takes any
HARDWARE = "h100"

_LABEL_WIDTH = 20


def pretrain_report(
    recipe: PretrainRecipe,
    *,
    num_samples: int,
    num_views: int,
    durations: Durations,
    ds_config: dict,
    assumed: bool = False,
) -> str:
    """Model, compute, schedule, storage and memory of a pre-training run.

    Args:
        num_samples: images of the set.  num_views: recorded views of each.
        durations: `resolve_durations(recipe, num_samples)`.
        ds_config: DeepSpeed JSON, read or merged: stage, buckets, offload and the type of summed gradients count.
        assumed: `num_samples` is a guess because no set was read; the report says so.
    Returns: lines without a final newline.
    """
    model, run, masked = recipe.model, recipe.run, recipe.mask.count
    num_codes, variants = recipe.objective.num_codes, dict(encoding=recipe.encoding, aggregation=recipe.aggregation)
    parameters = mim_parameters(model, num_codes, **variants)
    macs = mim_macs(model, num_codes=num_codes, masked=masked, **variants)
    stage = Stage("pre-training", recipe, num_samples)
    patches = model.grid**2
    payload, in_tar = token_bytes(num_views, patches, recipe.views.topk)
    lines = [
        f"{recipe.name}: masked pre-training",
        _line(
            "model",
            f"width {model.width}, depth {model.depth}, heads {model.heads}, patch {model.patch_px} px, "
            f"image {model.image_px} px",
        ),
        _line("parameters", _parameter_text(parameters, num_codes)),
        _line(
            "grid",
            f"{model.grid} x {model.grid} = {patches} patches; {recipe.mask.kind} mask hides "
            f"{'' if recipe.mask.exact else 'at most '}{masked} ({masked / patches:.1%})",
        ),
        *_variant_lines(recipe, macs),
        _line(
            "objective",
            recipe.objective.name
            + (f", {recipe.views.topk} soft codes a patch" if recipe.objective.name == "multi_choice" else ""),
        ),
        *_compute_lines(macs.total, macs.training_flops, durations, run.global_batch),
        *_subset_lines(model, run.micro_batch),
        *_schedule_lines(recipe, durations, num_samples, assumed),
        _line(
            "token storage",
            f"{payload:,} B an image ({num_views} views: codes {2 * num_views * patches:,} B), "
            f"{_decimal(num_samples * payload)} for the set, {_decimal(num_samples * in_tar)} in tars",
        ),
        *_checkpoint_lines(recipe, parameters.total, durations, ds_config),
        "",
        *_memory_lines(stage, ds_config),
        "",
        *_time_lines(stage, ds_config),
    ]
    return "\n".join(lines)


def finetune_report(
    recipe: FinetuneRecipe,
    *,
    num_samples: int,
    num_classes: int,
    durations: Durations,
    ds_config: dict,
    assumed: bool = False,
) -> str:
    """The same for a fine-tuning run.

    The moving average of the weights stands on a line of its own, beside the memory table.

    Args:
        num_classes: of the images.  The other arguments and the result: as `pretrain_report`.
    """
    model, run = recipe.model, recipe.run
    stage = Stage("fine-tuning", recipe, num_samples, num_classes)
    # A classifier's head sees one token an image, where pre-training's sees the masked patches.
    macs, parameters = mim_macs(model, num_codes=num_classes, masked=1), stage.parameters
    classifier, augment = recipe.classifier, recipe.augment
    lowest = recipe.optim.lr * classifier.layer_decay ** (model.depth + 1)
    lines = [
        f"{recipe.name}: fine-tuning",
        _line(
            "model",
            f"width {model.width}, depth {model.depth}, heads {model.heads}, patch {model.patch_px} px, "
            f"image {model.image_px} px",
        ),
        _line("parameters", f"{_millions(parameters)} with a head of {num_classes} classes"),
        _line(
            "learning rate",
            f"{recipe.optim.lr:g} at the head, {lowest:.2g} at the patch embedding (layer decay "
            f"{classifier.layer_decay}), stochastic depth up to {model.drop_path}",
        ),
        _line(
            "augmentation",
            f"{augment.auto_augment or 'no RandAugment'}, mixup {augment.mixup}, cutmix {augment.cutmix}, "
            f"erasing {augment.erasing}, smoothing {classifier.smoothing}, repeats {augment.repeats}",
        ),
        *_compute_lines(macs.total, macs.training_flops, durations, run.global_batch),
        *_subset_lines(model, run.micro_batch),
        *_schedule_lines(recipe, durations, num_samples, assumed),
        *_checkpoint_lines(recipe, parameters, durations, ds_config),
    ]
    if recipe.ema.decay:
        lines.append(
            _line(
                "moving average",
                f"decay {recipe.ema.decay}: 4 bytes a parameter, {4 * parameters / GIB:.2f} GiB over all "
                'ranks together (ZeRO-0: on each), under "other" below',
            )
        )
    return "\n".join([*lines, "", *_memory_lines(stage, ds_config), "", *_time_lines(stage, ds_config)])


def tokenizer_report(
    recipe: TokenizerRecipe,
    num_samples: int,
    durations: Durations,
    *,
    ds_config: dict | None = None,
    assumed: bool = False,
) -> str:
    """The same for a tokenizer's training; its judge or teacher is taken for a ViT-B/16.

    Args:
        ds_config: None: DeepSpeed's defaults.  The other arguments and the result: as `pretrain_report`.
    """
    tokenizer, run, size = recipe.tokenizer, recipe.run, recipe.views.tokenizer_px
    cost = tokenizer_cost(tokenizer, size)
    grid = size // tokenizer.stride_px
    stage = Stage("tokenizer", recipe, num_samples)
    lines = [
        f"{recipe.name}: tokenizer training",
        _line(
            "image",
            f"{size} px, stride {tokenizer.stride_px} px: {grid} x {grid} = {grid**2} codes of "
            f"{tokenizer.num_codes}, {tokenizer.code_dim} wide",
        ),
        _line(
            "parameters",
            f"encoder {_millions(cost.encoder.parameters)}, decoder {_millions(cost.decoder.parameters)}, "
            f"total {_millions(cost.parameters)}; codebook buffers {_millions(cost.codebook_elements)} in "
            "fp32",
        ),
        *_compute_lines(
            cost.forward_macs,
            stage.model_flops,
            durations,
            run.global_batch,
            with_frozen=stage.fixed_bytes > 4 * cost.codebook_elements,
        ),
        *_schedule_lines(recipe, durations, num_samples, assumed),
        *_checkpoint_lines(recipe, cost.parameters, durations, ds_config or {}),
        "",
        *_memory_lines(stage, ds_config or {}),
        "",
        *_time_lines(stage, ds_config or {}),
    ]
    return "\n".join(lines)


def tokenizing_report(recipe: PretrainRecipe, tokenizer: TokenizerSettings, *, num_samples: int) -> str:
    """What the rest of a tokenizing costs.

    Args:
        num_samples: images that have no tokens yet.
    """
    stage, views = Stage("tokenizing", recipe, num_samples, tokenizer=tokenizer), recipe.views
    lines = [
        _line(
            "network",
            f"{tokenizer.kind}, {_millions(stage.parameters)}, {stage.model_flops / 1e9:.1f} GFLOP a view "
            f"of {views.tokenizer_px} px, in {views.tokenizer_precision}",
        ),
        _line(
            "views",
            f"{num_samples:,} images x {views.count} = {stage.images:,}; "
            f"{_decimal(num_samples * token_bytes(views.count, recipe.model.grid**2, views.topk)[1])} in "
            "tars",
        ),
    ]
    return "\n".join([*lines, "", *_time_lines(stage, {})])


# ----------------------------------------------------------------------------------- parts of a report


def _parameter_text(parameters: MimParameters, num_codes: int) -> str:
    parts = {
        "backbone": parameters.backbone,
        "aggregation": parameters.aggregation,
        "decoder": parameters.decoder,
        "token head": parameters.token_head,
    }
    return (
        ", ".join(f"{name} {_millions(count)}" for name, count in parts.items() if count)
        + f" ({num_codes} codes), total {_millions(parameters.total)}"
    )


def _variant_lines(recipe: PretrainRecipe, macs: MimMacs) -> list[str]:
    """What differs from an encoder with a mask token at each masked place and one branch, and its share of that one's
    forward pass.
    """
    model, encoding, aggregation, masked = recipe.model, recipe.encoding, recipe.aggregation, recipe.mask.count
    plain = mim_macs(model, num_codes=recipe.objective.num_codes, masked=masked)
    if encoding.kind == "visible":
        shown = (
            f"the encoder sees {model.grid**2 - masked} of {model.grid**2} patches; decoder width "
            f"{encoding.decoder_width}, depth {encoding.decoder_depth}, heads {encoding.decoder_heads}"
        )
        return [_line("encoding", f"{shown}; {macs.total / plain.total:.1%} of the forward pass of full encoding")]
    if aggregation.early_block:
        return [
            _line(
                "aggregation",
                f"final class token and patches after block {aggregation.early_block} through "
                f"{aggregation.blocks} extra blocks; {macs.total / plain.total:.1%} of the forward pass "
                "without them",
            )
        ]
    return []


def _subset_lines(model: ModelSettings, micro_batch: int) -> list[str]:
    if model.drop_path_by != "subset":
        return []
    return [
        _line(
            "stochastic depth",
            f"subsets of {micro_batch} images: {skipped_by_subsets(model, micro_batch):.1%} of the "
            "blocks' work is left out (not taken off above)",
        )
    ]


def _compute_lines(
    forward_macs: int, training_flops: float, durations: Durations, global_batch: int, *, with_frozen: bool = False
) -> list[str]:
    total = training_flops * durations.total_steps * global_batch
    return [
        _line("forward", f"{forward_macs / 1e9:.1f} GMAC = {FLOPS_PER_MAC * forward_macs / 1e9:.1f} GFLOP an image"),
        _line(
            "training",
            f"{training_flops / 1e9:.1f} GFLOP a "
            f"image{' with its judge or teacher' if with_frozen else ''}, "
            f"{training_flops * global_batch / 1e12:.1f} TFLOP a step, {total:.3g} FLOP the run "
            "(recomputation not counted)",
        ),
    ]


def _schedule_lines(
    recipe: PretrainRecipe | TokenizerRecipe | FinetuneRecipe, durations: Durations, num_samples: int, assumed: bool
) -> list[str]:
    seen = durations.total_steps * recipe.run.global_batch
    source = (
        " (assumed: ImageNet-1K; no set was read)"
        if assumed and num_samples == IMAGENET_1K_TRAIN
        else " (assumed; no set was read)"
        if assumed
        else ""
    )
    stop = f"; this run stops at step {durations.stop_step:,}" if durations.stop_step < durations.total_steps else ""
    return [
        _line("set", f"{num_samples:,} images{source}"),
        _line(
            "schedule",
            f"{durations.total_steps:,} steps of {recipe.run.global_batch:,} images, warm-up "
            f"{durations.warmup_steps:,} steps{stop}",
        ),
        _line("images seen", f"{seen:,} = {seen / num_samples:.2f} epochs"),
    ]


def _checkpoint_lines(
    recipe: PretrainRecipe | TokenizerRecipe | FinetuneRecipe,
    num_parameters: int,
    durations: Durations,
    ds_config: dict,
) -> list[str]:
    stage, keep = zero_stage(ds_config), recipe.checkpoint.keep_last
    average = isinstance(recipe, FinetuneRecipe) and bool(recipe.ema.decay)
    size = checkpoint_bytes(num_parameters, stage=stage, precision=recipe.run.precision, average=average)
    every = f"every {durations.checkpoint_steps:,} steps" if durations.checkpoint_steps else "at the end"
    kept = f"the newest {keep} kept"
    if recipe.checkpoint.keep_every_steps:
        kept += f", and each at a multiple of {recipe.checkpoint.keep_every_steps:,} steps for good"
    return [_line("checkpoint", f"{size / GIB:.2f} GiB on disk at ZeRO-{stage}, {every}, {kept}")]


def _memory_lines(planned: Stage, ds_config: dict) -> list[str]:
    """One row a world size and stage; the stage of `ds_config` is marked.

    The same figures as plan.py has for the recipe's micro-batch.
    """
    run, hardware = planned.run, find_hardware(HARDWARE)
    names = ("weights", "gradients", "optimiser", "buffers", "other", "state", "activations", "total")
    rows, offloads, indivisible = [], False, []
    for world_size in WORLD_SIZES:
        accumulation = _accumulation(run, world_size)
        if accumulation == "-":
            indivisible.append(world_size)
        for stage in STAGES:
            found = room(
                planned, hardware, world_size, DeepSpeedChoice("the DeepSpeed JSON", _with_stage(ds_config, stage, run))
            )
            offloads = offloads or found.state.host > 0
            rows.append((world_size, stage, accumulation, found))
    head = (
        f"{'GPUs':>6} {'ZeRO':>5} {'accumulation':>12}"
        + "".join(f" {name:>11}" for name in names)
        + (f" {'host':>11}" if offloads else "")
    )
    lines = [
        f"memory a GPU in GiB, {run.precision}, micro-batch {run.micro_batch}, activation "
        f"checkpointing {run.activation_checkpointing}; * is the DeepSpeed JSON's stage; "
        f"other: {RESERVED_BYTES / GIB:g} for context and communicators, and what ZeRO does not "
        f"divide; activations with {FRAGMENTATION - 1:.0%} lost in the allocator",
        head,
    ]
    for world_size, stage, accumulation, found in rows:
        mark = "*" if stage == zero_stage(ds_config) else " "
        lines.append(
            f"{world_size:>6} {stage:>4}{mark} {accumulation:>12}"
            + "".join(f" {value / GIB:>11.2f}" for value in _columns(found, run.micro_batch, offloads))
        )
    if indivisible:
        counts = " or ".join(str(count) for count in indivisible)
        lines.append(
            f"- : global_batch {run.global_batch} is not a multiple of micro_batch {run.micro_batch} x "
            f"{counts} GPUs; such a run needs another run.micro_batch"
        )
    return lines


def _with_stage(ds_config: dict, stage: int, run: RunSettings) -> dict:
    """The JSON with another ZeRO stage, as far as that stage goes with it: without ZeRO gradients are summed in the
    weights' type.
    """
    changed = {**ds_config, "zero_optimization": {**ds_config.get("zero_optimization", {}), "stage": stage}}
    if stage == 0:
        changed["data_types"] = {**ds_config.get("data_types", {}), "grad_accum_dtype": run.precision}
    return changed


def _time_lines(planned: Stage, ds_config: dict) -> list[str]:
    """Predicted speed at each world size, with the recipe's settings.

    A micro-batch that does not divide or fit is made smaller.
    """
    hardware, choice = find_hardware(HARDWARE), DeepSpeedChoice("the DeepSpeed JSON", ds_config)
    rows, refused = (
        [("GPUs", "micro x passes", "step s", "images/s" if planned.trains else "views/s", "MFU", "hours")],
        [],
    )
    for world_size in WORLD_SIZES:
        try:
            made = estimate(planned, hardware, world_size, choice)
        except UserError as error:
            rows.append((str(world_size), "-", "-", "-", "-", "-"))
            refused.append(f"- : {error}")
            continue
        rows.append(
            (
                str(world_size),
                f"{made.micro_batch} x {made.micro_steps}",
                figure(made.step_s()),
                f"{made.images_s():,.0f}",
                f"{made.mfu():.0%}",
                ranged(made.hours),
            )
        )
    return [
        f"predicted on {hardware.title}, hours with saves and failures, from a fast to a slow pace; plan.py tells more",
        *aligned(rows),
        *dict.fromkeys(refused),
    ]


def _columns(found: Room, micro_batch: int, offloads: bool) -> list[float]:
    state, other, activations = found.state, RESERVED_BYTES + found.fixed_bytes, micro_batch * found.bytes_per_image
    columns = [
        state.weights,
        state.gradients,
        state.optimizer,
        state.buffers,
        other,
        state.state + other,
        activations,
        state.state + other + activations,
    ]
    return columns + [state.host] if offloads else columns


def _accumulation(run: RunSettings, world_size: int) -> str:
    try:
        return str(micro_steps(run, world_size))
    except UserError:
        return "-"


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL_WIDTH}}{text}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _decimal(size: float) -> str:
    """Decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
