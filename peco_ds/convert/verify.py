"""Verify a release: load it with the target library, without this package, and compare the outputs with our model's.

timm, transformers  Their own loaders are used.
unilm               It has no installable package. Its file is loaded strictly into timm's port of its model by timm's
                    own filter for its files; the index buffers are compared with the port's, and the names with the
                    state of unilm's modules.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.beit import Beit, gen_relative_position_index
from torch import nn

from peco_ds.errors import UserError
from peco_ds.models.beit_weights import SHARED_TABLE, BeitWeights
from peco_ds.models.mim import MaskedImageModel
from peco_ds.models.segmenter_weights import SegmenterWeights, segmenter_of
from peco_ds.models.vit import timm_arguments

# In float32, largest difference over largest value; the worst case measured on B/16 and H-wide models is 2e-6.
TOLERANCE = 1e-5
COMPARED = {"mim": "token logits and features", "features": "features", "classifier": "class logits"}
LOADERS = {"timm": "timm", "transformers": "transformers", "unilm": "timm's port of unilm"}
_MASKED_SHARE = 0.4

_START = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peco_ds":
            raise ImportError("a release must load without peco_ds")
sys.meta_path.insert(0, Refuse())
import json, numpy, torch
import torch.nn.functional as F
folder, kind, inputs, outputs = sys.argv[1:]
given = numpy.load(inputs)
images, is_masked = torch.from_numpy(given["images"]), torch.from_numpy(given["is_masked"])
torch.set_grad_enabled(False)
def answers_of_timm(model, head):
    if kind == "classifier":
        return {"logits": model(images)}
    tokens = model.forward_features(images)
    if kind == "features":
        return {"tokens": tokens, "pooled": model(images)}
    mask_token = head["mask_token"].float()
    where = is_masked[..., None]
    model.patch_embed.register_forward_hook(lambda module, given, out: torch.where(where, mask_token, out))
    patches = model.forward_features(images)[:, 1:]
    return {"tokens": tokens, "logits": F.linear(patches, head["lm_head.weight"].float(), head["lm_head.bias"].float())}
"""
_TIMM = """
import timm
from safetensors.torch import load_file
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
found = answers_of_timm(model, load_file(folder + "/mim_head.safetensors") if kind == "mim" else {})
"""
_TRANSFORMERS = """
import transformers
architecture = getattr(transformers, json.load(open(folder + "/config.json"))["architectures"][0])
model, report = architecture.from_pretrained(folder, output_loading_info=True)
if any(report.values()):
    first = {name: sorted(map(str, keys))[:3] for name, keys in report.items() if keys}
    raise ValueError(f"not loaded whole: {first}")
model = model.float().eval()
if kind == "mim":
    tokens = model.layernorm(model.beit(images).last_hidden_state)
    found = {"tokens": tokens, "logits": model(images, bool_masked_pos=is_masked).logits}
elif kind == "features":
    out = model(images)
    found = {"tokens": out.last_hidden_state, "pooled": out.pooler_output}
else:
    found = {"logits": model(images).logits}
"""
_UNILM = """
from timm.models.beit import Beit, checkpoint_filter_fn
given = json.load(open(folder + "/config.json"))["model_args"]
given.pop("vocab_size", None)
classes = given.pop("num_classes", 0)
pooling = "avg" if given.pop("use_mean_pooling", False) else "token"
model = Beit(**given, num_classes=classes, global_pool=pooling).eval()
content = torch.load(folder + "/model.pth", weights_only=True, mmap=True)
tensors = checkpoint_filter_fn(content, model)
head = {name: tensors.pop(name) for name in ("mask_token", "lm_head.weight", "lm_head.bias") if name in tensors}
model.load_state_dict(tensors, strict=True)
table, index = "relative_position_bias_table", "relative_position_index"
buffers = {name: content["model"].pop(name) for name in list(content["model"]) if name.endswith(index)}
expected = dict(model.named_buffers())
if {name.replace(index, table) for name in buffers} != {name for name in tensors if name.endswith(table)}:
    raise ValueError("a bias table without its index buffer, or the reverse")
for name, buffer in buffers.items():
    if not torch.equal(buffer, expected[name]):
        raise ValueError(f"{name} is not the port's")
found = answers_of_timm(model, head)
"""
_END = """
numpy.savez(outputs, **{name: value.numpy() for name, value in found.items()})
"""
_SCRIPTS = {"timm": _TIMM, "transformers": _TRANSFORMERS, "unilm": _UNILM}


@dataclass(frozen=True)
class ModelOutputs:
    """A model's outputs for random images: float32 arrays by name.

    `tokens` are computed with nothing masked, token `logits` with the patches of `is_masked` masked.
    """

    kind: str
    images_norm: torch.Tensor  # [B, 3, S, S]
    is_masked: torch.Tensor  # bool [B, N]
    values: dict[str, np.ndarray]


@torch.no_grad()
def model_outputs(weights: BeitWeights) -> ModelOutputs:
    """Our own model's outputs in float32; the weights are used in place, not copied."""
    settings = replace(weights.model, drop_path=0.0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, settings.image_px, settings.image_px, generator=generator)
    places = settings.grid**2
    masked = torch.stack(
        [torch.randperm(places, generator=generator)[: max(1, int(_MASKED_SHARE * places))] for _ in images]
    )
    is_masked = torch.zeros(len(images), places, dtype=torch.bool).scatter_(1, masked, True)
    tensors = {name: tensor.float() for name, tensor in weights.tensors.items()}
    if weights.kind == "mim":
        outside = ("mask_token", "lm_head.")
        tensors = {name if name.startswith(outside) else f"backbone.{name}": tensor for name, tensor in tensors.items()}
        model = _assembled(lambda: MaskedImageModel(settings, weights.num_codes), tensors)
        values = {"tokens": model.features(images), "logits": model.lm_head(model.features(images, masked)[:, 1:])}
    else:
        arguments = timm_arguments(
            settings, shared_bias=SHARED_TABLE in tensors, num_classes=weights.num_classes, pooling=weights.pooling
        )
        model = _assembled(lambda: Beit(**arguments), tensors)
        values = (
            {"logits": model(images)}
            if weights.kind == "classifier"
            else {"tokens": model.forward_features(images), "pooled": model(images)}
        )
    broken = next((name for name, value in values.items() if not value.isfinite().all()), None)
    if broken:
        raise UserError(f"{weights.source}: its {broken} are not finite; do not publish it, take an older checkpoint")
    return ModelOutputs(weights.kind, images, is_masked, {name: value.numpy() for name, value in values.items()})


@torch.no_grad()
def segmenter_outputs(weights: SegmenterWeights) -> ModelOutputs:
    """Our own segmenter's logits at the image's size, in float32. A segmentation model of a library answers as a
    classifier does, by `logits`.
    """
    side = weights.model.image_px
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    logits = F.interpolate(segmenter_of(weights)(images).logits, size=(side, side), mode="bilinear")
    if not logits.isfinite().all():
        raise UserError(f"{weights.source}: its logits are not finite; do not publish it, take an older checkpoint")
    unmasked = torch.zeros(1, weights.model.grid**2, dtype=torch.bool)
    return ModelOutputs("classifier", images, unmasked, {"logits": logits.numpy()})


def refuse_other_tensors(release: Path, found: SegmenterWeights, expected: SegmenterWeights) -> None:
    """Raises: UserError if a release that was read again does not hold what was written, bit for bit."""
    same = found.tensors.keys() == expected.tensors.keys() and found.segmenter.taps == expected.segmenter.taps
    if not same or any(not torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors):
        raise UserError(f"{release}: read again, it is not what was written; do not publish it, convert again")


def _assembled(build: Callable[[], nn.Module], tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A model around the tensors: no initialisation, no second copy of a large backbone."""
    with torch.device("meta"):
        model = build()
    model.load_state_dict(tensors, assign=True)
    # Buffers that no file holds are computed.
    for module in model.modules():
        if getattr(module, "relative_position_index", None) is not None:
            module.relative_position_index = gen_relative_position_index(module.window_size)
        if getattr(module, "k_bias", None) is not None:
            module.k_bias = torch.zeros_like(module.q_bias)
    return model.eval()


def compare(release: Path, library: str, expected: ModelOutputs) -> float:
    """Largest difference between the release in its library and our own model, relative to the largest value of the
    same output.

    Args:
        library: `Release.library`.
    Raises: UserError if the library cannot load the release, or the difference exceeds TOLERANCE.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        np.savez(inputs, images=expected.images_norm.numpy(), is_masked=expected.is_masked.numpy())
        # -I: no PYTHONPATH and no current folder, as on a user's machine.
        command = [
            sys.executable,
            "-I",
            "-c",
            _START + _SCRIPTS[library] + _END,
            str(release.resolve()),
            expected.kind,
            str(inputs),
            str(outputs),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]
            raise UserError(f"{release}: {LOADERS[library]} does not load it: {lines[-1]}")
        with np.load(outputs) as found:
            # np.max keeps a NaN, which then exceeds the tolerance.
            worst = float(
                np.max(
                    [np.abs(found[name] - value).max() / np.abs(value).max() for name, value in expected.values.items()]
                )
            )
    if not worst <= TOLERANCE:
        raise UserError(
            f"{release}: {COMPARED[expected.kind]} in {LOADERS[library]} differ from the trained model's "
            f"by {worst:.1e}, more than {TOLERANCE:.0e}; do not publish it"
        )
    return worst
