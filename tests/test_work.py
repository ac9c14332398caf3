"""What passes cost: segments against shapes.py, against the modules' parameters, and moved bytes against the operators
that PyTorch runs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peco_ds.config import (
    AdversarialSettings,
    AggregationSettings,
    FinetuneRecipe,
    MaskSettings,
    ModelSettings,
    ObjectiveSettings,
    PerceptualSettings,
    PretrainRecipe,
    RunSettings,
    TokenizerRecipe,
    TokenizerSettings,
    TokenizerVitSettings,
    ViewSettings,
)
from peco_ds.models.classifier import build_classifier
from peco_ds.models.critic import with_critic
from peco_ds.models.mim import build_mim
from peco_ds.models.tokenizers import build_tokenizer
from peco_ds.models.vit import TransformerBlock
from peco_ds.objectives import build_objective
from peco_ds.planner.chain import recipe_type
from peco_ds.planner.shapes import (
    FLOPS_PER_MAC,
    backbone_parameters,
    mim_macs,
    mim_parameters,
    objective_cost,
    tokenizer_cost,
)
from peco_ds.planner.work import (
    EAGER_BACKWARD,
    EAGER_FORWARD,
    BlockShape,
    Work,
    _attention_moves,
    block_kernels,
    block_work,
    finetune_segments,
    folded_bytes,
    frozen_net_bytes,
    model_flops,
    pretrain_segments,
    tokenizer_segments,
    tokenizing_segments,
)
from peco_ds.recipe_files import RECIPES, load_recipe
from peco_ds.schedules import images_taken

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
FINETUNE, TOKENIZER, PRETRAIN = (
    [name for name in NAMES if recipe_type(name) is kind] for kind in (FinetuneRecipe, TokenizerRecipe, PretrainRecipe)
)


def recipe_of(name: str, *overrides: str):
    if name in FINETUNE:
        return load_recipe(FinetuneRecipe, name, list(overrides)).recipe
    if name in PRETRAIN:
        return load_recipe(PretrainRecipe, name, list(overrides)).recipe
    needs = "teacher.weights=x" if name.startswith("beitv2") else "perceptual.weights=x"
    return load_recipe(TokenizerRecipe, name, [needs, *overrides]).recipe


def mim_variants(recipe: PretrainRecipe) -> dict:
    return dict(encoding=recipe.encoding, aggregation=recipe.aggregation)


# ------------------------------------------------------------------- against shapes.py and the modules


@pytest.mark.parametrize("name", PRETRAIN)
def test_segments_of_pretraining_hold_the_parameters_and_flops_that_shapes_counts(name):
    recipe = recipe_of(name, "model.drop_path_by=image")
    segments = pretrain_segments(recipe)
    codes = recipe.objective.num_codes
    assert (
        sum(segment.parameters for segment in segments)
        == mim_parameters(recipe.model, codes, **mim_variants(recipe)).total
    )
    macs = mim_macs(recipe.model, num_codes=codes, masked=recipe.mask.count, **mim_variants(recipe))
    assert model_flops(segments) == pytest.approx(macs.training_flops + objective_cost(recipe).model_flops, rel=0.01)


@pytest.mark.parametrize("name", FINETUNE)
def test_segments_of_fine_tuning_hold_the_parameters_and_flops_that_shapes_counts(name):
    recipe = recipe_of(name, "model.drop_path_by=image")
    segments = finetune_segments(recipe, num_classes=1000)
    assert sum(segment.parameters for segment in segments) == backbone_parameters(
        recipe.model, shared_bias=False, num_classes=1000
    )
    assert model_flops(segments) == pytest.approx(
        mim_macs(recipe.model, num_codes=1000, masked=1).training_flops, rel=0.01
    )


@pytest.mark.parametrize("name", TOKENIZER)
def test_segments_of_a_tokenizer_hold_the_parameters_and_flops_that_shapes_counts(name):
    recipe = recipe_of(name)
    cost = tokenizer_cost(recipe.tokenizer, recipe.views.tokenizer_px)
    segments = tokenizer_segments(recipe)
    assert sum(segment.parameters for segment in segments) == cost.parameters
    assert model_flops(segments) == pytest.approx(cost.training_flops, rel=0.01)


@pytest.mark.parametrize("name", ["peco_vittiny16", "peco_vith14_visible", "beitv2_vitb16"])
def test_segments_list_the_sizes_of_the_tensors_that_the_model_trains(name):
    recipe = recipe_of(name)
    with torch.device("meta"):
        model = build_mim(recipe.model, recipe.encoding, recipe.aggregation, recipe.objective.num_codes)
    listed = [elements for segment in pretrain_segments(recipe) for elements in segment.tensor_elements]
    assert sorted(listed) == sorted(parameter.numel() for parameter in model.parameters())


def test_segments_of_a_classifier_list_the_sizes_of_its_tensors():
    recipe = recipe_of("finetune_vittiny16")
    with torch.device("meta"):
        model = build_classifier(recipe.model, recipe.classifier, 10)
    segments = finetune_segments(recipe, num_classes=10)
    assert sorted(elements for segment in segments for elements in segment.tensor_elements) == sorted(
        parameter.numel() for parameter in model.parameters()
    )
    assert all(segment.tensors == len(segment.tensor_elements) for segment in segments)


@pytest.mark.parametrize(
    "tokenizer",
    [
        TokenizerSettings(),
        TokenizerSettings(
            channels=32,
            channel_mults=(2, 2, 4),
            blocks_per_level=1,
            attention=False,
            z_channels=48,
            num_codes=64,
            code_dim=16,
        ),
        TokenizerSettings(kind="vqkd", code_dim=32),
    ],
)
def test_a_tokenizer_has_as_many_tensors_as_its_modules_with_their_critic(tokenizer):
    adversarial = AdversarialSettings(weight=0.1 if tokenizer.kind == "vqgan" else 0.0)
    with torch.device("meta"):
        model = with_critic(build_tokenizer(tokenizer), adversarial)
    segments = tokenizer_segments(TokenizerRecipe(tokenizer=tokenizer, adversarial=adversarial))
    assert sum(segment.tensors for segment in segments) == len(list(model.parameters()))
    assert sum(segment.parameters for segment in segments) == sum(parameter.numel() for parameter in model.parameters())


# ------------------------------------------------------------------------------------ what settings do


def total(segments) -> Work:
    return sum((segment.forward + segment.backward for segment in segments), Work())


def test_checkpointing_adds_recomputation_and_leaves_the_models_flops():
    none, selective, full = (
        pretrain_segments(recipe_of("peco_vith14", f"run.activation_checkpointing={kind}"))
        for kind in ("none", "selective", "full")
    )
    assert model_flops(none) == model_flops(selective) == model_flops(full)
    assert total(selective).flops == total(none).flops
    assert total(none).moved_bytes < total(selective).moved_bytes == total(full).moved_bytes
    blocks = sum(segment.forward.flops for segment in full if segment.name.startswith("block"))
    assert total(full).flops == total(none).flops + blocks


def test_subsets_take_away_the_share_of_work_that_their_images_skip():
    whole = recipe_of("peco_vith14", "model.drop_path=0.5", "run.micro_batch=64")
    subset = replace(whole, model=replace(whole.model, drop_path_by="subset"))
    blocks = [
        [segment.forward.flops for segment in pretrain_segments(recipe) if segment.name.startswith("block")]
        for recipe in (whole, subset)
    ]
    assert blocks[1][-1] == pytest.approx(images_taken(64, 0.5) / 64 * blocks[0][-1])
    assert blocks[1][0] == blocks[0][0]


def test_compiled_blocks_move_fewer_bytes_with_fewer_kernels_and_the_same_products():
    compiled, eager = (
        total(pretrain_segments(recipe_of("peco_vith14", f"run.compile={kind}"))) for kind in ("blocks", "none")
    )
    assert compiled.moved_bytes < eager.moved_bytes and compiled.kernels < eager.kernels
    assert compiled.flops == eager.flops


def test_apexs_norm_keeps_blocks_from_being_compiled():
    assert total(pretrain_segments(recipe_of("peco_vith14", "run.layer_norm=apex"))) == total(
        pretrain_segments(recipe_of("peco_vith14", "run.compile=none"))
    )


def test_twice_the_bytes_an_element_move_twice_the_bytes_of_a_block():
    block = BlockShape(257, 1280, 5120, 16, 2, "compiled", scaled=True)
    moved = [
        [sum(kernel.moved_bytes for kernel in side) for side in block_kernels(replace(block, element=element))]
        for element in (2, 4)
    ]
    assert [2 * value for value in moved[0]] == moved[1]


def test_attentions_backward_pass_computes_the_scores_again():
    block = BlockShape(197, 768, 3072, 12, 2, "compiled", bias="shared")
    forward, backward, again = block_work(block)
    assert backward.attention == 2.5 * forward.attention
    assert backward.products - again.products == 2 * forward.products


@pytest.mark.parametrize("asked, used", [("auto", "bf16"), ("bf16", "bf16"), ("fp32", "fp32")])
def test_a_judge_sees_both_images_in_its_own_precision_and_is_no_part_of_the_model(asked, used):
    recipe = recipe_of("peco_tokenizer", f"perceptual.precision={asked}", "run.precision=fp32")
    *_, judge = tokenizer_segments(recipe)
    assert (judge.name, judge.parameters, judge.frozen, judge.precision) == ("judge", 0, True, used)
    # ViT-B/16: 17.6 GMAC, of both images; backward the gradient of inputs alone, which for attention's two products
    # is four, and the scores once more.
    assert judge.forward.flops == pytest.approx(2 * FLOPS_PER_MAC * 17.6e9, rel=0.01)
    assert judge.backward.flops == pytest.approx((judge.forward.flops + 1.5 * judge.forward.attention) / 2, rel=0.01)


def test_a_judge_costs_no_more_than_the_blocks_that_are_asked_for():
    half, whole = (
        tokenizer_segments(recipe_of("peco_tokenizer", f"perceptual.blocks={blocks}"))[-1].forward.flops
        for blocks in ("[6]", "[12]")
    )
    assert half == pytest.approx(whole / 2, rel=0.01)


def test_without_a_judge_there_is_no_frozen_network():
    recipe = recipe_of("peco_tokenizer", "perceptual.weight=0")
    assert not any(segment.frozen for segment in tokenizer_segments(recipe))
    assert (frozen_net_bytes(recipe).weights, frozen_net_bytes(recipe).a_image) == (0, 0)


def test_a_teacher_runs_forward_alone():
    *_, teacher = tokenizer_segments(recipe_of("beitv2_tokenizer"))
    assert (
        teacher.frozen
        and teacher.forward.flops == pytest.approx(FLOPS_PER_MAC * 17.6e9, rel=0.01)
        and teacher.backward == Work()
    )


@pytest.mark.parametrize(
    "architecture, parameters",
    [("auto", 85.8e6), ("vit_large_patch16_224", 303.3e6), ("vit_small_patch16_224", 21.7e6)],
)
def test_a_frozen_network_weighs_what_its_architecture_weighs(architecture, parameters):
    whole, half = (
        frozen_net_bytes(
            recipe_of("peco_tokenizer", f"perceptual.architecture={architecture}", f"perceptual.precision={precision}")
        )
        for precision in ("fp32", "bf16")
    )
    assert whole.weights == pytest.approx(4 * parameters, rel=0.01)
    assert half.weights == pytest.approx((4 + 2) * parameters, rel=0.01), "the copies of the backward pass"
    assert 0 < half.a_image < whole.a_image


@pytest.mark.parametrize(
    "settings",
    [
        TokenizerSettings(
            channels=32, channel_mults=(1, 2, 2), blocks_per_level=1, z_channels=48, num_codes=64, code_dim=16
        ),
        TokenizerSettings(
            kind="vqkd",
            num_codes=64,
            code_dim=32,
            vit=TokenizerVitSettings(
                image_px=32,
                patch_px=4,
                width=48,
                depth=2,
                heads=2,
                decoder_width=48,
                decoder_depth=1,
                decoder_heads=2,
                target_width=24,
            ),
        ),
        TokenizerSettings(
            kind="dvae", channels=32, channel_mults=(1, 2, 4), blocks_per_level=2, num_codes=64, code_dim=16
        ),
        TokenizerSettings(
            kind="gumbel",
            channels=32,
            channel_mults=(1, 2, 2),
            blocks_per_level=1,
            z_channels=48,
            num_codes=64,
            code_dim=16,
        ),
    ],
    ids=lambda settings: settings.kind,
)
def test_flops_of_tokenizing_are_those_a_counter_sees(settings):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    tokenizer = build_tokenizer(settings).eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tokenizer.tokenize(torch.rand(2, 3, 32, 32) * 2 - 1)
    segments = tokenizing_segments(settings, ViewSettings(tokenizer_px=32))
    assert 2 * sum(segment.forward.flops for segment in segments) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert all(segment.backward == Work() and segment.parameters == 0 for segment in segments)


def test_soft_codes_cost_more_than_hard_ones():
    hard, soft = (
        total(tokenizing_segments(TokenizerSettings(), ViewSettings(topk=topk))).moved_bytes for topk in (0, 64)
    )
    assert hard < soft


# ----------------------------------------------------------------------------------------- moved bytes

PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "convolution",
    "convolution_backward",
    "biased_attention",
    "biased_attention_backward",
)
ONCE_A_PASS = ("bias_of_positions", "sum_by_position")
NO_KERNEL = ("empty", "empty_like", "new_empty", "detach", "_unsafe_view")


class MovedBytes(TorchDispatchMode):
    """Bytes of inputs and outputs of every operator that is no view, no product and not attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        views = any(
            result.alias_info is not None and not result.alias_info.is_write for result in operator._schema.returns
        )
        if not views and operator._schema.name.split("::")[1] not in PRODUCTS + ONCE_A_PASS + NO_KERNEL:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.total += sum(
                math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride) * tensor.element_size()
                for tensor in tensors
            )
        return out


def moved_by(block: TransformerBlock, x: torch.Tensor, bias: torch.Tensor, *, autocast: bool) -> tuple[int, int]:
    paths = block.draw_paths(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), MovedBytes() as forward:
        out = block(x, bias, *paths)
    grad = torch.randn_like(out)
    with MovedBytes() as backward:
        out.backward(grad)
    return forward.total, backward.total


@pytest.mark.parametrize("dtype, autocast", [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize(
    "layer_scale, drop_path, folded", [(0.1, 0.0, False), (0.1, 0.0, True), (0.0, 0.0, True), (0.1, 0.3, False)]
)
def test_moved_bytes_of_an_eager_block_are_those_of_the_operators_it_runs(
    dtype, autocast, layer_scale, drop_path, folded
):
    torch.manual_seed(0)
    batch, grid, width, heads = 16, 8, 96, 3
    tokens = grid**2 + 1
    settings = dict(layer_scale=layer_scale, drop_path=drop_path, fold_layer_scale=folded)
    block = TransformerBlock(width, heads, **settings).to(dtype).train()
    x, bias = (
        torch.randn(batch, tokens, width, dtype=dtype, requires_grad=True),
        torch.zeros(heads, tokens, tokens, requires_grad=True),
    )
    seen = moved_by(block, x, bias, autocast=autocast)
    shape = BlockShape(
        tokens,
        width,
        4 * width,
        heads,
        2 if autocast else x.element_size(),
        "autocast" if autocast else "eager",
        bool(layer_scale),
        folded,
        drop_path > 0,
        "shared",
    )
    forward, backward = (batch * sum(kernel.moved_bytes for kernel in side) for side in block_kernels(shape))
    # inside the attention operator, which is not looked into
    backward -= batch * sum(kernel.moved_bytes for kernel in _attention_moves(shape))
    backward += folded_bytes(shape)
    # Worst seen: 10 % forward, of weights cast under autocast, which are once a pass; 7 % backward.
    assert forward == pytest.approx(seen[0], rel=0.12)
    assert backward == pytest.approx(seen[1], rel=0.10)


@pytest.mark.parametrize(
    "objective, early_block, tolerance", [("hard_tokens", 0, 0.10), ("hard_tokens", 1, 0.15), ("multi_choice", 0, 0.25)]
)
def test_moved_bytes_of_the_whole_eager_step_are_those_of_the_operators_it_runs(objective, early_block, tolerance):
    # Worst seen: 6 % for BEiT, 11 % with a second branch, 20 % for soft targets, whose many small operators are counted
    # by their largest.
    torch.manual_seed(0)
    batch, codes, hidden, topk = 16, 512, 25, 8
    recipe = PretrainRecipe(
        model=ModelSettings(image_px=64, patch_px=8, width=96, depth=2, heads=3, drop_path=0.0),
        aggregation=AggregationSettings(early_block=early_block, blocks=1),
        mask=MaskSettings(count=hidden),
        objective=ObjectiveSettings(name=objective, num_codes=codes),
        views=ViewSettings(topk=topk),
        run=RunSettings(compile="none"),
    )
    model = build_mim(recipe.model, recipe.encoding, recipe.aggregation, codes).to(torch.bfloat16).train()
    masked = torch.stack([torch.randperm(64)[:hidden].sort().values for _ in range(batch)])
    soft = dict(
        topk_codes=torch.rand(batch, 64, codes).topk(topk).indices, topk_probs=torch.rand(batch, 64, topk) / topk
    )
    targets = SimpleNamespace(codes=torch.randint(codes, (batch, hidden)), masked=masked, **soft)
    images = torch.randn(batch, 3, 64, 64)
    with MovedBytes() as forward:
        loss = build_objective(recipe.objective)(model(images, masked), targets)[0]
    with MovedBytes() as backward:
        loss.backward()
    segments = pretrain_segments(recipe)
    attention = sum(
        kernel.moved_bytes for kernel in _attention_moves(BlockShape(65, 96, 384, 3, 2, "eager", bias="shared"))
    )
    blocks = sum("block" in segment.name for segment in segments)
    assert batch * sum(segment.forward.moved_bytes for segment in segments) == pytest.approx(
        forward.total, rel=tolerance
    )
    assert batch * (sum(segment.backward.moved_bytes for segment in segments) - blocks * attention) == pytest.approx(
        backward.total, rel=tolerance
    )


def test_moved_bytes_of_a_convolutional_encoder_are_those_of_the_operators_it_runs():
    settings = TokenizerSettings(
        channels=32,
        channel_mults=(1, 1, 2, 2, 4),
        blocks_per_level=2,
        attention=False,
        z_channels=64,
        num_codes=64,
        code_dim=16,
    )
    encoder = build_tokenizer(settings).train().encoder
    images = torch.rand(2, 3, 64, 64)
    with MovedBytes() as forward:
        total_of_outputs = encoder(images).sum()
    with MovedBytes() as backward:
        total_of_outputs.backward()
    segment = tokenizer_segments(
        TokenizerRecipe(
            tokenizer=settings,
            run=RunSettings(precision="fp32"),
            views=ViewSettings(tokenizer_px=64),
            perceptual=PerceptualSettings(weight=0),
        )
    )[0]
    # An operator shows neither the second reading of a norm's operands nor what happens inside a convolution. Worst
    # seen: 10 %.
    shown = (2 + EAGER_FORWARD["activation"] + EAGER_FORWARD["sums and padding"]) / sum(EAGER_FORWARD.values())
    shown_backward = (3 + EAGER_BACKWARD["activation"] + EAGER_BACKWARD["sums and padding"]) / sum(
        EAGER_BACKWARD.values()
    )
    assert 2 * segment.forward.moved_bytes * shown == pytest.approx(forward.total, rel=0.15)
    assert 2 * segment.backward.moved_bytes * shown_backward == pytest.approx(backward.total, rel=0.15)


def test_the_heads_moved_bytes_grow_with_the_logits():
    few, many = (
        pretrain_segments(recipe_of("peco_vitb16", f"objective.num_codes={codes}"))[-1] for codes in (1024, 8192)
    )
    assert (
        4
        < (many.forward.moved_bytes + many.backward.moved_bytes) / (few.forward.moved_bytes + few.backward.moved_bytes)
        < 8
    )
    assert ModelSettings().width * 8192 + 8192 + 2 * 768 == many.parameters
