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

from peco_ds.data.object_augment import resized_shape
from peco_ds.errors import UserError
from peco_ds.models.beit_weights import SHARED_TABLE, BeitWeights
from peco_ds.models.detector_weights import DetectorWeights, detector_of
from peco_ds.models.mask_rcnn import batch_images, paste_masks
from peco_ds.models.mim import MaskedImageModel
from peco_ds.models.segmenter_weights import SegmenterWeights, segmenter_of
from peco_ds.models.vit import timm_arguments

# In float32, largest difference over largest value; the worst case measured on B/16 and H-wide models is 2e-6.
TOLERANCE = 1e-5
COMPARED = {"mim": "token logits and features", "features": "features", "classifier": "class logits"}
LOADERS = {
    "timm": "timm",
    "transformers": "transformers",
    "unilm": "timm's port of unilm",
    "torchvision": "its own module on torchvision",
}
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
torch.set_grad_enabled(False)
"""
_OF_IMAGES = """
images, is_masked = torch.from_numpy(given["images"]), torch.from_numpy(given["is_masked"])
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
_TORCHVISION = """
sys.path.insert(0, folder)
from detector import load
model = load(folder)
image = torch.from_numpy(given["image"])
seen = model.resized(image)
batch = model.batch([seen])
features = model.features(batch)
found = {f"map {level}": value for level, value in features.items()}
found["objectness"], found["proposals"] = (
    torch.cat([each.flatten() for each in values]) for values in model.rpn.head(list(features.values()))
)
height, width = seen.shape[1:]
boxes = []
for parts in (1, 2, 3):
    high, wide = height / parts, width / parts
    boxes += [[x * wide, y * high, (x + 1) * wide, (y + 1) * high] for y in range(parts) for x in range(parts)]
boxes, heads = [torch.tensor(boxes)], model.roi_heads
pooled = heads.box_roi_pool(features, boxes, batch.image_sizes)
found["classes"], found["boxes of classes"] = heads.box_predictor(heads.box_head(pooled))
pooled = heads.mask_roi_pool(features, boxes, batch.image_sizes)
found["masks of classes"] = heads.mask_predictor(heads.mask_head(pooled))
(best,) = model([image])
found |= {f"found {name}": best[name] for name in ("boxes", "scores", "labels")}
found["found masks"] = (best["masks"][:, 0] >= 0.5).float()
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


@torch.no_grad()
def detector_outputs(weights: DetectorWeights) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """An image, and our own detector's outputs for it: maps and heads, which a rounding changes by as much, and what
    was found, where it may swap two boxes of nearly one score.

    Returns: uint8 [3, H, W]; float32 arrays by name.
    """
    model, draw = detector_of(weights), torch.Generator().manual_seed(0)
    # Coarse squares: unlike noise they give boxes of unlike scores. Not of the size that the detector sees.
    coarse = torch.randint(0, 256, (1, 3, 9, 12), generator=draw).float()
    short = max(32, weights.short_px * 3 // 4)
    image = F.interpolate(coarse, (short, short * 4 // 3), mode="bilinear").round().to(torch.uint8)[0]
    height, width = image.shape[1:]
    size = resized_shape(height, width, weights.short_px, weights.long_px)
    seen = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    batch = batch_images([seen], weights.mean, weights.std, weights.square_px)
    maps = model.pyramid(model.backbone(batch.tensors))
    features = {str(level): found.float() for level, found in enumerate(maps)}
    values = {f"map {level}": found for level, found in features.items()}
    values["objectness"], values["proposals"] = (torch.cat([each.flatten() for each in found])
                                                 for found in model.rpn.head(list(features.values())))  # fmt: skip
    boxes = [boxes_of_parts(*size)]
    pooled = model.roi_heads.box_roi_pool(features, boxes, batch.image_sizes)
    values["classes"], values["boxes of classes"] = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    pooled = model.roi_heads.mask_roi_pool(features, boxes, batch.image_sizes)
    values["masks of classes"] = model.roi_heads.mask_predictor(model.roi_heads.mask_head(pooled))
    broken = next((name for name, value in values.items() if not value.isfinite().all()), None)
    if broken:
        raise UserError(f"{weights.source}: its {broken} are not finite; do not publish it, take an older checkpoint")
    (found,) = model([seen])
    scale = torch.tensor([width / size[1], height / size[0]] * 2)
    masks = paste_masks(found.masks, found.boxes * scale, height, width)
    values |= {"found boxes": found.boxes * scale, "found scores": found.scores, "found labels": found.labels.float(),
               "found masks": masks.float()}  # fmt: skip
    return image, {name: value.numpy() for name, value in values.items()}


def boxes_of_parts(height: int, width: int) -> torch.Tensor:
    """Boxes of several sizes over an image: float32 [14, 4]."""
    boxes = []
    for parts in (1, 2, 3):
        high, wide = height / parts, width / parts
        boxes += [[x * wide, y * high, (x + 1) * wide, (y + 1) * high] for y in range(parts) for x in range(parts)]
    return torch.tensor(boxes)


def compare_detector(release: Path, image: torch.Tensor, expected: dict[str, np.ndarray]) -> tuple[float, float]:
    """How a detector's release, loaded by its own module in a process without this package, differs from the run's.

    Args:
        image, expected: of `detector_outputs`.
    Returns: the largest difference of maps and heads, relative to the largest value of the same output; the share of
        the boxes found, with label, score and mask, that the release finds too.
    Raises: UserError if it cannot be loaded, the difference exceeds TOLERANCE, or more than a hundredth of the boxes is
        not found.
    """
    found = _answers(release, "torchvision", "detector", image=image.numpy())
    apart = [name for name in expected if not name.startswith("found ")]
    worst = float(np.max([np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max() for name in apart]))
    share = _share_found(found, expected)
    if not (worst <= TOLERANCE and share >= 0.99):
        raise UserError(
            f"{release}: maps and heads differ from the trained detector's by {worst:.1e}, and {share:.1%} of its "
            "boxes are found; do not publish it"
        )
    return worst, share


def _share_found(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Share of expected boxes for which one was found of the same label, within 0.1 px and 0.001, masks equal in 99
    pixels of 100.
    """
    matched = 0
    for place, box in enumerate(expected["found boxes"]):
        near = (
            (np.abs(found["found boxes"] - box).max(axis=1) <= 0.1)
            & (found["found labels"] == expected["found labels"][place])
            & (np.abs(found["found scores"] - expected["found scores"][place]) <= 1e-3)
        ).nonzero()[0]
        matched += any(np.mean(found["found masks"][each] == expected["found masks"][place]) >= 0.99 for each in near)
    return matched / max(1, len(expected["found boxes"]))


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
    given = {"images": expected.images_norm.numpy(), "is_masked": expected.is_masked.numpy()}
    found = _answers(release, library, expected.kind, **given)
    # np.max keeps a NaN, which then exceeds the tolerance.
    worst = float(
        np.max([np.abs(found[name] - value).max() / np.abs(value).max() for name, value in expected.values.items()])
    )
    if not worst <= TOLERANCE:
        raise UserError(
            f"{release}: {COMPARED[expected.kind]} in {LOADERS[library]} differ from the trained model's "
            f"by {worst:.1e}, more than {TOLERANCE:.0e}; do not publish it"
        )
    return worst


def _answers(release: Path, library: str, kind: str, **given: np.ndarray) -> dict[str, np.ndarray]:
    """What the script of the library computes from the given arrays, in a process that cannot import this package.

    Raises: UserError if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        np.savez(inputs, allow_pickle=False, **given)
        # -I: no PYTHONPATH and no current folder, as on a user's machine.
        command = [
            sys.executable,
            "-I",
            "-c",
            _START + (_TORCHVISION if kind == "detector" else _OF_IMAGES + _SCRIPTS[library]) + _END,
            str(release.resolve()),
            kind,
            str(inputs),
            str(outputs),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]
            raise UserError(f"{release}: {LOADERS[library]} does not load it: {lines[-1]}")
        with np.load(outputs) as found:
            return dict(found)
