import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.models.beit import Beit

from peco_ds.config import ModelSettings
from peco_ds.errors import UserError
from peco_ds.evaluation.features import FeatureFiles, compute_features, feature_bytes, pooled_features
from peco_ds.evaluation.stopping import Stopped
from peco_ds.models.vit import build_backbone

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone() -> Beit:
    torch.manual_seed(0)
    return build_backbone(
        ModelSettings(image_px=32, patch_px=8, width=24, depth=3, heads=2, layer_scale=1.0, drop_path=0)
    ).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def streams_of(backbone, images):
    """The residual stream after every block, caught by hooks while timm runs the whole model."""
    caught = []
    hooks = [
        block.register_forward_hook(lambda _module, _inputs, output: caught.append(output)) for block in backbone.blocks
    ]
    backbone.forward_features(images)
    for hook in hooks:
        hook.remove()
    return caught


@pytest.mark.parametrize("pooling", ["class_mean", "class", "mean"])
def test_a_layers_features_are_timms_stream_after_the_block_pooled_without_the_final_norm(backbone, images, pooling):
    streams = streams_of(backbone, images)
    for number, found in zip((1, 3), pooled_features(backbone, images, (1, 3), pooling)):
        tokens = streams[number - 1]
        parts = {"class": tokens[:, 0], "mean": tokens[:, 1:].mean(dim=1)}
        expected = torch.cat([parts["class"], parts["mean"]], dim=1) if pooling == "class_mean" else parts[pooling]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def padded_batches(images, samples):
    """Two batches of 3 in which -1 fills up."""
    labels = torch.tensor([sample % 2 if sample >= 0 else -1 for sample in samples])
    samples = torch.tensor(samples)
    return [
        SimpleNamespace(images_norm=images[at.clamp(max=4)].clone(), labels=labels[at], samples=samples[at])
        for at in torch.arange(6).split(3)
    ]


def taken(backbone, batches, **changes):
    arguments = dict(blocks=(1, 3), pooling="class_mean", precision="fp32", device=CPU, stop_requested=lambda: False)
    return compute_features(backbone, batches, **{**arguments, **changes})


def test_features_written_in_any_order_are_read_in_the_order_of_the_samples_and_padding_is_nowhere(
    backbone, images, tmp_path
):
    batches = [
        SimpleNamespace(
            images_norm=images[[4, 0, 2]], labels=torch.tensor([14, 10, 12]), samples=torch.tensor([4, 0, 2])
        ),
        SimpleNamespace(
            images_norm=images[[3, 0, 1]], labels=torch.tensor([13, -1, 11]), samples=torch.tensor([3, -1, 1])
        ),
    ]
    files = FeatureFiles(tmp_path / "features", {"weights": "a"}, blocks=(1, 3), sizes={"train": 5}, width=48)
    assert files.state() == "absent"
    files.create()
    files.write("train", taken(backbone, batches[:1]))
    files.write("train", taken(backbone, batches[1:]))  # as another rank would
    assert files.state() == "absent", "no manifest before all rows are there"
    files.finish()
    assert files.state() == "whole"
    assert files.labels("train").tolist() == [10, 11, 12, 13, 14]
    for block, expected in zip((1, 3), pooled_features(backbone, images, (1, 3), "class_mean")):
        torch.testing.assert_close(files.features("train", block).float(), expected, rtol=1e-3, atol=1e-3)
    on_disk = sum((tmp_path / "features" / f"train_block_{block:02d}.npy").stat().st_size - 128 for block in (1, 3))
    assert on_disk == feature_bytes(24, "class_mean", num_blocks=2, num_images=5)


def test_features_of_something_else_are_seen_and_replaced(tmp_path):
    arguments = dict(blocks=(2,), sizes={"train": 3, "val": 2}, width=4)
    first = FeatureFiles(tmp_path, {"weights": "a"}, **arguments)
    first.create()
    first.finish()
    other = FeatureFiles(tmp_path, {"weights": "b"}, **arguments)
    assert (first.state(), other.state()) == ("whole", "other")
    other.create()
    assert first.state() == other.state() == "absent"
    other.finish()
    assert (first.state(), other.state()) == ("other", "whole")
    (tmp_path / "val_block_02.npy").unlink()
    assert other.state() == "other"


def test_a_disk_that_is_too_small_is_said_before_anything_is_taken(tmp_path):
    files = FeatureFiles(tmp_path, {}, blocks=tuple(range(1, 33)), sizes={"train": 10**13}, width=2560)
    with pytest.raises(UserError, match="GB are free"):
        files.create()


def test_a_stop_and_values_that_are_not_finite_end_the_taking(backbone, images):
    batches = padded_batches(images, [0, 1, 2, 3, 4, -1])
    with pytest.raises(Stopped):
        list(taken(backbone, batches, stop_requested=lambda: True))
    batches[1].images_norm[0, 0, 0, 0] = float("nan")
    rows = taken(backbone, batches)
    assert len(next(rows)[0]) == 3
    with pytest.raises(UserError, match="not finite in fp32"):
        next(rows)


def test_values_beyond_float16_are_clipped_and_said(images, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("peco_ds"), "propagate", True)

    class Huge:
        def forward_intermediates(self, images_norm, **_):
            return [(torch.full((len(images_norm), 4, 6), 1e5), torch.full((len(images_norm), 1, 6), -1e5))]

    _, _, (features,) = next(rows := taken(Huge(), padded_batches(images, [0, 1, 2, 3, 4, -1]), blocks=(1,)))
    assert np.isfinite(features).all() and features.min() == -65504 and features.max() == 65504
    list(rows)
    assert "60 feature values" in caplog.text
