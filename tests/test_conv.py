"""Convolutional judges as plans see them: which family weights are of, and what a network costs, against timm's own."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from timm.models._registry import _model_to_module
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from peco_ds.config import TokenizerRecipe
from peco_ds.kinds.conv import MEASURED
from peco_ds.planner.report import dry_run_report
from peco_ds.planner.work import frozen_cost, frozen_net_bytes, tokenizer_segments
from peco_ds.recipe_files import load_recipe
from peco_ds.registry import FEATURE_NETS, family_of

CONVOLUTIONAL = (
    "resnet resnetv2 vgg efficientnet mobilenetv3 convnext regnet densenet nfnet hrnet dla dpn res2net resnest sknet "
    "senet ghostnet rexnet vovnet inception_v3 inception_v4 xception cspnet hardcorenas selecsls tresnet nasnet"
).split()


def recipe(*overrides: str) -> TokenizerRecipe:
    return load_recipe(TokenizerRecipe, "peco_tokenizer", ["perceptual.weights=x.pth", *overrides], environ={}).recipe


def test_every_name_of_timm_goes_to_the_family_that_reads_it():
    counts = Counter()
    for name, module in _model_to_module.items():
        family = (
            "conv" if module in CONVOLUTIONAL else "vit" if module in ("vision_transformer", "beit", "deit") else ""
        )
        if family:
            counts[family] += 1
            assert family_of("x.pth", name) is FEATURE_NETS[family], name
            assert family_of(f"{name}.some_tag", "auto") is FEATURE_NETS[family], name
    assert counts["conv"] > 400 and counts["vit"] > 200


VGG_11 = [f"features.{number}.weight" for number in (0, 3, 6, 8, 11, 13, 16, 18)]
NAMES = {
    "MoCo": (["module.encoder_q.layer1.0.conv1.weight"], "conv"),
    "VGG-11": (VGG_11, "conv"),
    "AlexNet": (VGG_11[:3], "vit"),
    "a ViT": (["patch_embed.proj.weight"], "vit"),
    "CLIP's ResNet": (["visual.layer1.0.conv1.weight"], "vit"),
    "EfficientNet": (["conv_stem.weight"], "vit"),
}


@pytest.mark.parametrize("case", NAMES)
def test_a_file_goes_to_the_family_that_its_names_show(tmp_path, case):
    names, family = NAMES[case]
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "net.pth")
    assert family_of(str(tmp_path / "net.pth"), "auto") is FEATURE_NETS[family]


def test_what_tells_nothing_stays_with_the_vits():
    assert family_of("/nowhere/file.pth", "auto") is family_of("x", "auto") is FEATURE_NETS["vit"]


def measured(net: nn.Module, px: int) -> list[tuple[int, ...]]:
    """Of each stage, counted while an image with a gradient goes through: parameters, MACs, elements that autograd
    keeps, bytes of indices, convolutions, features.
    """
    net.eval().requires_grad_(False)
    own = {tensor.untyped_storage()._cdata for tensor in net.state_dict().values()}
    kept: dict[int, torch.Tensor] = {}
    flops, rows, seen = FlopCounterMode(display=False), [], Counter()

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def count(module, _, __):
        seen["parameters"] += sum(parameter.numel() for parameter in module.parameters(recurse=False))
        seen["convolutions"] += isinstance(module, nn.Conv2d)

    def end(_, __, out):
        elements = sum(tensor.numel() for tensor in kept.values() if tensor.is_floating_point())
        indices = sum(8 * tensor.numel() for tensor in kept.values() if not tensor.is_floating_point())
        macs = flops.get_total_flops() // 2
        rows.append((seen["parameters"], macs, elements, indices, seen["convolutions"], out.numel()))

    modules = dict(net.named_modules())
    for module in modules.values():
        module.register_forward_hook(count)
    for name in net.feature_info.module_name():
        modules[name if name in modules else name.replace(".", "_", 1)].register_forward_hook(end)
    image = torch.zeros(1, 3, px, px, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), flops:
        net(image * 1.0)
    before = [(0,) * 5, *(row[:5] for row in rows)]
    return [(*(now - then for now, then in zip(row, last)), row[5]) for row, last in zip(rows, before)]


AT_224 = ("resnet18", "resnext50_32x4d", "wide_resnet50_2", "vgg16_bn", *MEASURED)


@pytest.mark.parametrize("name, px", [*((name, 224) for name in AT_224), ("resnet50", 200), ("vgg16", 200)])
def test_a_plan_counts_what_timms_network_has_and_does(name, px):
    with torch.device("meta"):
        stages = {"out_indices": (0, 1, 2, 3, 4)} if name.startswith("vgg") else {}
        net = timm.create_model(name, pretrained=False, features_only=True, **stages)
    cost = frozen_cost(recipe(f"perceptual.architecture={name}", f"perceptual.image_px={px}"))
    assert cost.parameters == sum(parameter.numel() for parameter in net.parameters())
    for stage, (parameters, macs, elements, indices, convolutions, features) in zip(
        cost.stages, measured(net, px), strict=True
    ):
        assert (stage.layers.parameters, stage.layers.macs) == (parameters, macs)
        assert (stage.layers.convolutions, stage.features, stage.saved_bytes) == (convolutions, features, indices)
        # Norms keep two numbers a channel too, which is most where maps are small.
        assert 0.94 * elements <= stage.saved <= elements


def test_the_file_at_hand_tells_a_plan_which_resnet_it_is(tmp_path):
    with torch.device("meta"):
        names = timm.create_model("resnet101", pretrained=False).state_dict()
    state = {f"module.encoder_q.{name}": torch.zeros(1) for name in names}
    torch.save({"state_dict": state}, tmp_path / "moco.pth.tar")
    cost = frozen_cost(recipe(f"perceptual.weights={tmp_path / 'moco.pth.tar'}"))
    assert cost.name == "ResNet-101" and cost.parameters == pytest.approx(42.5e6, rel=0.001)


def test_a_dry_run_says_what_it_takes_the_judge_for():
    lines = {}
    for architecture in ("resnet50", "regnety_016", "auto"):
        text = dry_run_report(recipe(f"perceptual.architecture={architecture}", "perceptual.blocks=[]"), ds_config={})
        lines[architecture] = next(line for line in text.splitlines() if line.startswith("judge"))
    assert "ResNet-50, 224 px, 23.5 M parameters, in bf16 on a GPU" in lines["resnet50"]
    assert "regnety_016, of unknown cost: neither its memory nor its time is below" in lines["regnety_016"]
    assert "ViT-B/16 (assumed: no architecture is named), 224 px" in lines["auto"]


def test_a_plan_says_that_an_unknown_judge_is_not_counted(capsys):
    from peco_ds.plan import main

    assert main(["--recipe", "peco_tokenizer", "--gpus", "8", "perceptual.architecture=regnety_016"]) == 0
    said = "what its judge regnety_016 costs is not known; neither its memory nor its time is counted"
    assert f"peco_tokenizer: {said}" in capsys.readouterr().out


def test_the_stages_asked_for_are_those_that_cost():
    first, whole, named = (
        recipe("perceptual.architecture=resnet50", f"perceptual.blocks={blocks}")
        for blocks in ("[1]", "[]", "[1,2,3,4,5]")
    )
    macs = sum(stage.layers.macs for stage in frozen_cost(whole).stages)
    judge = tokenizer_segments(whole)[-1]
    # Both images forward; backward for the gradient of the image alone.
    assert judge.forward.flops == 2 * 2 * macs and judge.backward.flops == 2 * macs
    assert macs == pytest.approx(4.09e9, rel=0.01)
    assert tokenizer_segments(named)[-1] == judge and frozen_net_bytes(named) == frozen_net_bytes(whole)
    assert tokenizer_segments(first)[-1].forward.flops == 2 * 2 * frozen_cost(first).stages[0].layers.macs
    assert frozen_net_bytes(first).a_image < frozen_net_bytes(whole).a_image / 4
