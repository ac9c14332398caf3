import importlib.machinery
import importlib.metadata
import importlib.util

import numpy as np
import pytest
import torch

from peco_ds.config import ClassifierSettings, ModelSettings, OptimSettings, RunSettings, SegmenterSettings
from peco_ds.errors import UserError
from peco_ds.models.classifier import build_classifier
from peco_ds.models.mim import MaskedImageModel
from peco_ds.models.segmenter import build_segmenter
from peco_ds.runtime.optim import build_optimizer, decay_groups, layer_scales, use_layer_norm


def test_decay_groups_are_beits():
    model = MaskedImageModel(ModelSettings(image_px=32, patch_px=16, width=24, depth=1, heads=3), 10)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in decay_groups(model, 0.05)}
    assert groups[0.05] == {
        "mask_token",
        "lm_head.weight",
        "backbone.patch_embed.proj.weight",
        "backbone.rel_pos_bias.relative_position_bias_table",
        *(f"backbone.blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    }
    assert groups[0.0] == set(names.values()) - groups[0.05] and "backbone.cls_token" in groups[0.0]


def test_a_prefix_gets_its_own_rate():
    model = torch.nn.ModuleDict({"critic": torch.nn.Linear(2, 2), "tokenizer": torch.nn.Linear(2, 2)})
    groups = decay_groups(model, 0.1, {"critic.": 0.5})
    assert sorted((group["lr_scale"], group["weight_decay"], len(group["params"])) for group in groups) == [
        (0.5, 0.0, 1),
        (0.5, 0.1, 1),
        (1.0, 0.0, 1),
        (1.0, 0.1, 1),
    ]


def test_every_parameter_of_a_classifier_gets_the_rate_of_its_layer():
    """As BEiT assigns layers: patch embedding and class token 0, block i to i + 1, pooling norm and head last.

    Twelve blocks, so that blocks.1 is not blocks.11.
    """
    model = build_classifier(
        ModelSettings(image_px=32, patch_px=16, width=24, depth=12, heads=3), ClassifierSettings(), 10
    )
    found = {
        id(p): group["lr_scale"] for group in decay_groups(model, 0.05, layer_scales(12, 0.65)) for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        layer = (
            0
            if name.startswith(("patch_embed", "cls_token"))
            else int(name.split(".")[1]) + 1
            if name.startswith("blocks")
            else 13
        )
        assert found[id(parameter)] == pytest.approx(0.65 ** (13 - layer)), name
    assert len(found) == len(list(model.parameters()))


def test_the_optimiser_carries_the_recipes_numbers():
    optimizer = build_optimizer(
        decay_groups(torch.nn.Linear(2, 2), 0.05), OptimSettings(lr=1e-3, betas=(0.9, 0.98), eps=1e-6), offloaded=False
    )
    assert all(
        (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.98), 1e-6) for group in optimizer.param_groups
    )


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_adam_and_adamw_step_as_their_papers_write_them(kind):
    """Five steps by NumPy in float64. Adam (arXiv 1412.6980) adds decay to the gradient, AdamW (1711.05101) to the
    step.
    """
    lr, betas, eps, decay = 1e-2, (0.5, 0.95), 1e-8, 0.1
    layer = torch.nn.Linear(3, 4, bias=False)
    weight = layer.weight.detach().double().numpy().copy()
    settings = OptimSettings(kind=kind, lr=lr, betas=betas, eps=eps, weight_decay=decay)
    optimizer = build_optimizer(decay_groups(layer, decay), settings, offloaded=False)
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(1, 6):
        gradient = np.random.default_rng(step).normal(size=weight.shape)
        layer.weight.grad = torch.from_numpy(gradient).float()
        optimizer.step()
        if kind == "adam":
            gradient = gradient + decay * weight
        else:
            weight = weight * (1 - lr * decay)
        mean, square = betas[0] * mean + (1 - betas[0]) * gradient, betas[1] * square + (1 - betas[1]) * gradient**2
        corrected = mean / (1 - betas[0] ** step), square / (1 - betas[1] ** step)
        weight = weight - lr * corrected[0] / (np.sqrt(corrected[1]) + eps)
        np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "installed, words",
    [
        ({}, "apex is not installed"),
        ({"apex"}, "web toolkit of the same name"),
        ({"apex", "apex.optimizers", "apex.normalization"}, "without its CUDA extensions"),
    ],
)
@pytest.mark.parametrize(
    "setting, ask",
    [
        (
            "optim.impl",
            lambda: build_optimizer(
                [{"params": [torch.nn.Parameter(torch.zeros(1))]}], OptimSettings(impl="apex"), offloaded=False
            ),
        ),
        ("run.layer_norm", lambda: use_layer_norm(RunSettings(layer_norm="apex"))),
    ],
)
def test_a_missing_or_wrong_apex_is_explained(monkeypatch, installed, words, setting, ask):
    spec = importlib.machinery.ModuleSpec("apex", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: spec if name in installed else None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.10.dev0")
    with pytest.raises(UserError, match=f"{setting} = 'apex'.*{words}.*{setting}=torch"):
        ask()


def test_a_segmenters_heads_keep_the_full_rate_and_its_patch_embedding_has_the_lowest():
    settings = ModelSettings(image_px=32, patch_px=8, width=24, depth=12, heads=3)
    model = build_segmenter(settings, SegmenterSettings(head_width=8, auxiliary_width=8), 5)
    groups = decay_groups(model, 0.05, layer_scales(12, 0.65, prefix="backbone."))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert scales.keys() == set(names.values())
    assert scales["backbone.patch_embed.proj.weight"] == scales["backbone.cls_token"] == pytest.approx(0.65**13)
    assert scales["backbone.blocks.0.attn.relative_position_bias_table"] == pytest.approx(0.65**12)
    assert scales["backbone.blocks.11.mlp.fc2.weight"] == pytest.approx(0.65)
    rest = {scale for name, scale in scales.items() if not name.startswith("backbone.")}
    assert rest == {1.0} and "pyramid.fpn1.0.weight" in scales
