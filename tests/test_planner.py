"""The planner's arithmetic against the modules and the kernels' own counters.

What DeepSpeed holds and sends: test_engine_state.py, test_traffic.py.
"""

from __future__ import annotations

import io
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.models import beit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from webdataset import TarWriter

from peco_ds.config import (
    AggregationSettings,
    EncodingSettings,
    MaskSettings,
    ModelSettings,
    PretrainRecipe,
    RunSettings,
    ScheduleSettings,
    TokenizerRecipe,
    TokenizerSettings,
    ViewSettings,
)
from peco_ds.durations import resolve_durations
from peco_ds.models.mim import build_mim
from peco_ds.models.tokenizers import build_tokenizer
from peco_ds.models.vit import build_blocks, run_blocks, timm_arguments
from peco_ds.objectives.hard_tokens import hard_tokens
from peco_ds.planner.chain import recipe_type
from peco_ds.planner.data_side import token_bytes
from peco_ds.planner.memory import STAGES
from peco_ds.planner.report import WORLD_SIZES, dry_run_report, tokenizing_report
from peco_ds.planner.shapes import (
    FLOPS_PER_MAC,
    backbone_parameters,
    mim_activation_bytes,
    mim_macs,
    mim_parameters,
    tokenizer_cost,
)
from peco_ds.planner.stages import IMAGENET_1K_TRAIN
from peco_ds.recipe_files import RECIPES, load_recipe
from peco_ds.schema import VIEW_COLUMNS

SIZES = {
    "B/16": ModelSettings(),
    "L/16": ModelSettings(width=1024, depth=24, heads=16, layer_scale=1e-5),
    "H/14": ModelSettings(patch_px=14, width=1280, depth=32, heads=16, layer_scale=1e-5),
    "H/14 448": ModelSettings(image_px=448, patch_px=14, width=1280, depth=32, heads=16),
    "without layer scale": ModelSettings(
        image_px=64, patch_px=8, width=96, depth=3, heads=3, mlp_ratio=2.5, layer_scale=0.0
    ),
}
SMALL = ModelSettings(image_px=64, patch_px=8, width=96, depth=3, heads=3)
SMALL_TOKENIZER = TokenizerSettings(
    channels=32, channel_mults=(1, 2, 2), blocks_per_level=1, z_channels=48, num_codes=64, code_dim=16
)


# What a recipe adds to the plain pre-training model; the decoder's width is not the backbone's.
VARIANTS = {
    "plain": {},
    "aggregation": dict(aggregation=AggregationSettings(early_block=2, blocks=2)),
    "visible": dict(encoding=EncodingSettings(kind="visible", decoder_width=64, decoder_depth=3, decoder_heads=4)),
}


def mim_of(settings: ModelSettings, num_codes: int, variant: str, **arguments) -> torch.nn.Module:
    asked = {"encoding": EncodingSettings(), "aggregation": AggregationSettings()} | VARIANTS[variant]
    return build_mim(settings, asked["encoding"], asked["aggregation"], num_codes, **arguments)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize("shared_bias", [True, False])
@pytest.mark.parametrize("num_classes", [0, 1000])
@pytest.mark.parametrize("size", SIZES)
def test_backbone_parameters_equal_those_of_timms_beit(size, num_classes, shared_bias):
    with torch.device("meta"):
        module = beit.Beit(**{**timm_arguments(SIZES[size], shared_bias=shared_bias), "num_classes": num_classes})
    assert backbone_parameters(SIZES[size], shared_bias=shared_bias, num_classes=num_classes) == count(module)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
def test_parameters_by_part_equal_those_of_the_pretraining_model(size, variant):
    with torch.device("meta"):
        module = mim_of(SIZES[size], 8192, variant)
    parts = mim_parameters(SIZES[size], num_codes=8192, **VARIANTS[variant])
    held = module.decoder if variant == "visible" else module
    assert (parts.backbone, parts.token_head, parts.mask_token) == (
        count(module.backbone),
        count(held.lm_head),
        held.mask_token.numel(),
    )
    assert parts.aggregation == (count(module.aggregation_blocks) if variant == "aggregation" else 0)
    assert parts.decoder == (count(module.decoder) - parts.token_head - parts.mask_token if variant == "visible" else 0)
    assert parts.total == count(module)


@pytest.mark.parametrize(
    "settings",
    [
        TokenizerSettings(),
        SMALL_TOKENIZER,
        replace(SMALL_TOKENIZER, attention=False),
        TokenizerSettings(channel_mults=(1, 1, 2, 4), code_dim=32),
    ],
)
def test_tokenizer_parameters_equal_those_of_its_modules(settings):
    with torch.device("meta"):
        module = build_tokenizer(settings)
    cost = tokenizer_cost(settings, image_px=64)
    assert cost.encoder.parameters == count(module.encoder) + count(module.to_code)
    assert cost.decoder.parameters == count(module.decoder) + count(module.from_code)
    assert cost.parameters == count(module)


PUBLISHED = {
    "dvae": TokenizerSettings(
        kind="dvae", channels=256, channel_mults=(1, 2, 4, 8), attention=False, code_dim=128, decoder=False
    ),
    "gumbel": TokenizerSettings(kind="gumbel", channel_mults=(1, 1, 2, 4)),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_cost_of_a_published_tokenizers_encoder_is_that_of_its_modules(kind):
    settings, side = PUBLISHED[kind], 32
    with torch.device("meta"):
        module = build_tokenizer(settings)
    module.to_empty(device="cpu").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        # Its weights are no numbers, so there is no code to check.
        module.choose(module.trunk(torch.zeros(1, 3, side, side)))
    cost = tokenizer_cost(settings, image_px=side)
    used = [module.encoder] + ([module.to_code, module.to_logits] if kind == "gumbel" else [])
    assert cost.encoder.parameters == sum(count(part) for part in used)
    assert FLOPS_PER_MAC * (cost.encoder.macs + cost.search_macs) == pytest.approx(counter.get_total_flops(), rel=0.01)


# ----------------------------------------------------------------------------------------------- FLOPs


def forward_and_training_flops(call) -> tuple[int, int]:
    """FLOPs a counter sees; the plain attention kernel, because the counter does not know the CPU's fused one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = call()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", [10, 40])
def test_flops_of_pretraining_are_those_a_counter_sees(masked, variant):
    # Three times the forward pass counts a gradient for the image, and one for the places of the bias, that nobody
    # asks for; twelve blocks deep it is below one percent.
    batch, codes, settings = 2, 512, replace(SMALL, width=192, depth=12)
    module = mim_of(settings, codes, variant)
    positions = torch.arange(masked).expand(batch, -1)

    def forward_pass():
        outputs = module(torch.randn(batch, 3, 64, 64), positions)
        return sum(logits.sum() for logits in (outputs.logits, outputs.aggregated_logits) if logits is not None)

    forward, training = forward_and_training_flops(forward_pass)
    macs = mim_macs(settings, num_codes=codes, masked=masked, **VARIANTS[variant])
    assert FLOPS_PER_MAC * macs.total * batch == pytest.approx(forward, rel=0.01)
    assert macs.training_flops * batch == pytest.approx(training, rel=0.01)


def test_flops_of_the_tokenizer_are_those_a_counter_sees():
    module = build_tokenizer(SMALL_TOKENIZER)
    forward, training = forward_and_training_flops(lambda: module(torch.randn(2, 3, 32, 32)).reconstruction.sum())
    cost = tokenizer_cost(SMALL_TOKENIZER, image_px=32)
    assert FLOPS_PER_MAC * cost.forward_macs * 2 == pytest.approx(forward, rel=0.01)
    assert cost.training_flops * 2 == pytest.approx(training, rel=0.01)


# ----------------------------------------------------------------------------------------- activations


def bytes_allocated(call) -> int:
    """Bytes that a call allocates and that are not freed while what it returns is held, in elements that recomputation
    keeps for itself too.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        held = call()
    assert held is not None
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


def bytes_kept(module: torch.nn.Module, call) -> int:
    """Bytes of all different storages that autograd saves or the call returns, without the module's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # held, so that no later tensor takes its address
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for output in call():
            keep(output)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    "layer_scale, folded, variant",
    [
        (0.1, True, "plain"),
        (0.1, False, "plain"),
        (0.0, True, "plain"),
        (0.1, True, "aggregation"),
        (0.1, True, "visible"),
    ],
)
def test_saved_activation_bytes_are_those_autograd_keeps(precision, checkpointing, layer_scale, folded, variant):
    batch, masked, codes = 16, 25, 512
    settings = replace(SMALL, layer_scale=layer_scale, fold_layer_scale=folded)
    module = mim_of(settings, codes, variant, activation_checkpointing=checkpointing).to(
        torch.bfloat16 if precision == "bf16" else torch.float32
    )
    for name, parameter in module.named_parameters():
        if name.endswith("relative_position_bias_table"):
            # the CPU's fused kernel has no gradient for it
            parameter.requires_grad_(False)
    positions = torch.arange(masked).expand(batch, -1)

    def call():
        output = module(torch.randn(batch, 3, 64, 64), positions)
        return (
            output.logits,
            output.features,
            hard_tokens(output, SimpleNamespace(codes=torch.zeros(batch, masked, dtype=torch.long)))[0],
        )

    predicted = mim_activation_bytes(
        settings, num_codes=codes, masked=masked, checkpointing=checkpointing, precision=precision, **VARIANTS[variant]
    )
    assert predicted.saved * batch == pytest.approx(bytes_kept(module, call), rel=0.02)


@pytest.mark.parametrize("layer_scale, folded", [(0.1, True), (0.1, False), (0.0, True)])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_bytes_of_blocks_under_every_checkpointing_are_those_a_profiler_sees(checkpointing, layer_scale, folded):
    settings, batch = replace(SMALL, layer_scale=layer_scale, fold_layer_scale=folded), 16
    tokens = settings.grid**2 + 1
    blocks = build_blocks(settings, activation_checkpointing=checkpointing).train()
    x, bias = (
        torch.randn(batch, tokens, settings.width, requires_grad=True),
        torch.zeros(settings.heads, tokens, tokens),
    )
    run_blocks(blocks, x, bias)
    sizes = dict(num_codes=64, masked=4, checkpointing=checkpointing, precision="fp32")
    one_more = (
        mim_activation_bytes(replace(settings, depth=settings.depth + 1), **sizes).saved
        - mim_activation_bytes(settings, **sizes).saved
    )
    assert one_more * batch * settings.depth == pytest.approx(
        bytes_allocated(lambda: run_blocks(blocks, x, bias)), rel=0.02
    )


def test_saved_elements_of_the_tokenizer_are_those_autograd_keeps():
    module = build_tokenizer(SMALL_TOKENIZER)
    kept = bytes_kept(module, lambda: (module(torch.randn(2, 3, 64, 64)).reconstruction,))
    cost = tokenizer_cost(SMALL_TOKENIZER, image_px=64)
    assert 2 * 4 * (cost.encoder.saved + cost.decoder.saved) == pytest.approx(kept, rel=0.05)


def test_checkpointing_keeps_less_and_grows_by_one_input_a_block():
    sizes = dict(num_codes=8192, masked=98, precision="bf16")
    deep, shallow = SIZES["H/14"], replace(SIZES["H/14"], depth=31)
    full = mim_activation_bytes(deep, checkpointing="full", **sizes)
    assert full.total < mim_activation_bytes(deep, checkpointing="none", **sizes).total / 5
    selective = mim_activation_bytes(deep, checkpointing="selective", **sizes)
    assert full.total < selective.total < 0.72 * mim_activation_bytes(deep, checkpointing="none", **sizes).total
    assert full.total - mim_activation_bytes(shallow, checkpointing="full", **sizes).total == 257 * 1280 * 2


# --------------------------------------------------------------------------------------------- reports


def h_recipe() -> PretrainRecipe:
    return PretrainRecipe(
        name="vith",
        model=SIZES["H/14"],
        mask=MaskSettings(count=98),
        schedule=ScheduleSettings(epochs=800, warmup_epochs=10),
        views=ViewSettings(count=100),
    )


def test_the_report_of_vit_h_names_its_sizes_schedule_storage_and_the_assumed_set():
    recipe = h_recipe()
    durations = resolve_durations(recipe, IMAGENET_1K_TRAIN)
    text = dry_run_report(recipe, ds_config={"zero_optimization": {"stage": 3}})
    lines = {line[:20].strip(): line[20:] for line in text.splitlines()}
    assert "backbone 630.5 M" in lines["parameters"]
    assert "16 x 16 = 256 patches" in lines["grid"] and "98 (38.3%)" in lines["grid"]
    assert "GFLOP an image" in lines["training"]
    assert (
        f"{durations.total_steps:,} steps" in lines["schedule"]
        and f"{durations.warmup_steps:,} steps" in lines["schedule"]
    )
    assert "800.00 epochs" in lines["images seen"]
    assert "51,200 B" in lines["token storage"]
    assert "assumed" in lines["set"] and "1,281,167" in lines["set"]
    assert "ZeRO-3" in lines["checkpoint"]


def report_lines(recipe: PretrainRecipe) -> dict[str, str]:
    text = dry_run_report(recipe, num_samples=5000, ds_config={})
    return {line[:20].strip(): line[20:] for line in text.splitlines()}


def test_the_report_says_what_a_variant_adds_and_what_it_costs_beside_the_plain_model():
    plain, codes = h_recipe(), 8192
    assert not report_lines(plain).keys() & {"encoding", "aggregation"}
    visible = load_recipe(PretrainRecipe, "peco_vith14_visible", [], environ={}).recipe
    lines = report_lines(visible)
    full, seen = (
        mim_macs(visible.model, num_codes=codes, masked=192, **asked).total
        for asked in ({}, dict(encoding=visible.encoding))
    )
    assert "64 of 256 patches" in lines["encoding"] and f"{seen / full:.1%}" in lines["encoding"]
    assert 0.25 < seen / full < 0.35, "about a third"
    assert "decoder 25.9 M" in lines["parameters"]
    aggregating = replace(plain, aggregation=AggregationSettings(early_block=30, blocks=2))
    lines = report_lines(aggregating)
    assert (
        "after block 30 through 2 extra blocks" in lines["aggregation"] and "aggregation 39.4 M" in lines["parameters"]
    )


def test_a_set_that_was_read_is_not_called_assumed():
    recipe = h_recipe()
    text = dry_run_report(recipe, num_samples=5000, ds_config={})
    assert "assumed" not in text and "5,000 images" in text


def test_the_memory_table_has_aligned_rows_that_add_up_and_marks_the_chosen_stage():
    recipe = replace(h_recipe(), run=RunSettings(activation_checkpointing="full"))
    text = dry_run_report(recipe, num_samples=5000, ds_config={"zero_optimization": {"stage": 2}})
    head, *rows = text.splitlines()[text.splitlines().index("") + 2 :][: 1 + len(WORLD_SIZES) * len(STAGES)]
    assert {len(row) for row in rows} == {len(head)}
    columns = head.split()
    parsed = [dict(zip(columns, row.replace("*", " ").split())) for row in rows]
    assert [(int(row["GPUs"]), int(row["ZeRO"])) for row in parsed] == [
        (world, stage) for world in WORLD_SIZES for stage in STAGES
    ]
    assert [int(row.split()[1].rstrip("*")) for row in rows if "*" in row] == [2] * len(WORLD_SIZES)
    for row in parsed:
        parts = sum(float(row[name]) for name in ("weights", "gradients", "optimiser", "buffers", "other"))
        assert float(row["state"]) == pytest.approx(parts, abs=0.03)
        assert float(row["total"]) == pytest.approx(float(row["state"]) + float(row["activations"]), abs=0.02)


def test_a_world_whose_batch_does_not_divide_is_shown_and_explained():
    recipe = replace(h_recipe(), run=RunSettings(global_batch=96, micro_batch=64))
    text = dry_run_report(recipe, num_samples=5000, ds_config={})
    assert "global_batch 96 is not a multiple of 64 or 256 GPUs" in text
    # On one GPU 96 images are two passes of 48, on 8 one of 12.
    assert re.search(r"^ +1 +0.? +48x2 ", text, re.MULTILINE) and re.search(r"^ +8 +0.? +12x1 ", text, re.MULTILINE)


def test_offloaded_bytes_have_their_own_column():
    recipe = h_recipe()
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    assert " host" in dry_run_report(recipe, ds_config=config, num_samples=5000)
    assert " host" not in dry_run_report(recipe, ds_config={}, num_samples=5000)


@pytest.mark.parametrize("topk", [0, 4])
@pytest.mark.parametrize("views", [1, 10, 100])
def test_token_storage_is_what_a_tar_of_records_takes(topk, views):
    patches, images, file = 196, 64, io.BytesIO()
    # a fractional time would add a header a member
    with TarWriter(file, user="peco", group="peco", mtime=0) as writer:
        for number in range(images):
            record = {
                "__key__": f"{number:08d}",
                "codes.npy": np.zeros((views, patches), np.uint16),
                "views.npy": np.zeros((views, len(VIEW_COLUMNS)), np.float32),
            }
            if topk:
                record["topk_codes.npy"] = np.zeros((views, patches, topk), np.uint16)
                record["topk_probs.npy"] = np.zeros((views, patches, topk), np.float16)
            writer.write(record)
    data, in_tar = token_bytes(views, patches, topk)
    assert data == sum(array.nbytes for array in record.values() if isinstance(array, np.ndarray))
    # a tar ends on a 10 KiB block
    assert images * in_tar <= file.getbuffer().nbytes <= images * in_tar + 2 * 10240


def test_the_tokenizers_report_names_sizes_schedule_and_memory():
    recipe = TokenizerRecipe(name="tok", schedule=ScheduleSettings(epochs=50, warmup_steps=100))
    text = dry_run_report(recipe, num_samples=1_000_000, ds_config={})
    assert "14 x 14 = 196 codes of 8192" in text and "warm-up 100 steps" in text and "50.00 epochs" in text
    assert "memory a GPU in GiB" in text


def test_the_report_of_a_tokenizing_counts_what_is_left_and_predicts_its_hours():
    recipe = h_recipe()
    hours = []
    for left in (100_000, 200_000):
        text = tokenizing_report(recipe, TokenizerSettings(), num_samples=left)
        assert f"{left:,} images x 100 = {100 * left:,}" in text and "views/s" in text
        hours.append(float(next(line for line in text.splitlines() if line.startswith("64 ")).split()[7]))
    assert hours[1] == pytest.approx(2 * hours[0], rel=0.02)


def sections(path) -> set[str]:
    return set(path.read_text().splitlines())


# no training run; linear_probe.py --dry_run is tested with its weights
PROBES = [path for path in RECIPES.glob("*.yaml") if "probe:" in sections(path)]


@pytest.mark.parametrize("path", sorted(set(RECIPES.glob("*.yaml")) - set(PROBES)), ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_report(path):
    kind, needed = recipe_type(path.stem), []
    if kind is TokenizerRecipe:
        needed = ["teacher.weights=teacher.pth" if "kind: vqkd" in path.read_text() else "perceptual.weight=0"]
    recipe = load_recipe(kind, path, needed, environ={}).recipe
    text = dry_run_report(recipe, num_samples=IMAGENET_1K_TRAIN, ds_config={})
    assert text.startswith(recipe.name) and "parameters" in text
