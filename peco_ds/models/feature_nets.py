"""Frozen networks that judge (perceptual loss) or teach: timm ViTs, MoCo v3, DINO, our own releases.

A file is read strictly: a tensor that is missing, left over or of another shape is an error, because a judge with a few random
blocks still gives a loss that falls.
"""

from __future__ import annotations

import re
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from peco_ds.errors import UserError
from peco_ds.models.weight_files import read_tensor_file
from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD, sha256_of_file

MOCO_V3_URL = "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"
FETCH_MOCO_V3 = f"fetch {MOCO_V3_URL} (MoCo v3, ViT-B/16, 300 epochs) and give its path in perceptual.weights"

# Where training scripts put the weights inside their checkpoint, and what they put before each name. The first that fits is taken,
# so an average ("teacher", "base_encoder") wins over what it averages.
CONTAINERS = ("state_dict", "teacher", "model", "module")
MOCO_PREFIXES = ("module.base_encoder.", "base_encoder.")
PREFIXES = (*MOCO_PREFIXES, "module.backbone.", "backbone.", "module.encoder.", "encoder.", "module.", "")
PATCH_WEIGHT = "patch_embed.proj.weight"
HEADS = ("head.", "head_dist.", "fc.")  # what sits behind the features

HEADS_OF_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
MOCO_HEADS_OF_WIDTH = {384: 12, 768: 12}  # MoCo v3's ViT-S has 12 heads; the shapes of a file do not tell


class FeatureNet(nn.Module):
    """A frozen ViT that gives the patch tokens after chosen blocks. It stays in eval mode, whatever its parent does.

    Args:
        net: timm `VisionTransformer` or `Beit`.  mean, std: of its input, for pictures in [0, 1].  description: one line for the log.
    Attributes: image_px, the side of the square picture it looks at; depth, its number of blocks.
    """

    def __init__(self, net: VisionTransformer | Beit, *, mean: tuple[float, ...], std: tuple[float, ...], description: str) -> None:
        super().__init__()
        self.net = net.float().eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.image_px = net.patch_embed.img_size[0]
        self.depth = len(net.blocks)
        self.description = description

    def train(self, mode: bool = True) -> FeatureNet:
        return super().train(False)

    def check_blocks(self, blocks: tuple[int, ...]) -> None:
        """Raises: UserError if one of the block numbers does not exist, or none is given."""
        if not blocks or not all(1 <= number <= self.depth for number in blocks):
            raise UserError(f"perceptual.blocks {list(blocks)}: {self.description} has blocks 1 to {self.depth}; name at least one of these and no other")

    def features(self, images_01: torch.Tensor, blocks: tuple[int, ...]) -> list[torch.Tensor]:
        """Patch tokens after the given blocks, without class token and without the final norm.

        Args:
            images_01: [B, 3, H, W] in [0, 1], resized (bilinear, antialiased) where its size is not image_px; gradient flows back to it.
            blocks: numbers from 1, in the order of the answer.
        Returns: one float32 [B, N, D] a block. Under autocast the blocks compute in its dtype.
        Raises: UserError if a block does not exist.
        """
        self.check_blocks(blocks)
        size = (self.image_px, self.image_px)
        images = images_01.float()
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        ascending = sorted(set(blocks))
        tokens = self.net.forward_intermediates(
            (images - self.mean) / self.std,
            indices=[number - 1 for number in ascending],
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        after = dict(zip(ascending, tokens))
        return [after[number].float() for number in blocks]


def load_feature_net(weights: str, architecture: str = "auto", *, image_px: int = 0) -> FeatureNet:
    """Read a frozen network.

    Args:
        weights: a file (.pth, .pt, .pth.tar, .safetensors: MoCo v3, DINO, any timm ViT state dict), a release folder with timm's
            `config.json` and `model.safetensors`, or, where no such path exists, the name of a timm model, which is downloaded.
        architecture: timm name; "auto" reads width, depth, patch size and picture size off the file. Folders and timm names bring theirs.
        image_px: side of the picture it shall look at, position embeddings resampled; 0: the one it was trained on.
    Raises: UserError if the file is missing or unreadable, does not hold a ViT, does not fit the architecture, misses a tensor or
        has one left over, or if a download fails.
    """
    if not weights:
        raise UserError(f"perceptual.weights is empty; {FETCH_MOCO_V3}, or set perceptual.weight=0")
    path = Path(weights).expanduser()
    if path.is_dir():
        net, mean, std, description = _from_folder(path, architecture)
    elif path.is_file():
        net, description = _from_file(path, architecture)
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    else:
        net, mean, std, description = _from_name(weights, architecture)
    if image_px:
        patch = net.patch_embed.patch_size[0]
        if image_px < 0 or image_px % patch:
            raise UserError(f"perceptual.image_px {image_px} is not a multiple of the patch size {patch} of {description}")
        net.set_input_size(img_size=(image_px, image_px))
    return FeatureNet(net, mean=mean, std=std, description=description)


# ---------------------------------------------------------------------------------------------- three sources


def _from_folder(folder: Path, architecture: str):
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: holds no {name}; give a weights file, or a release folder made with convert_checkpoint.py --to timm")
    try:
        net = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError, MemoryError, SafetensorError, OSError) as error:
        raise UserError(f"{folder}: timm cannot load it ({_one_line(error)}); make it again with convert_checkpoint.py --to timm") from None
    name = _checked_name(net, str(folder))
    if architecture not in ("auto", name):
        raise UserError(f"{folder}: holds {name}, but perceptual.architecture is {architecture}; use auto")
    sha = sha256_of_file(folder / "model.safetensors")[:12]
    return net, *_statistics(net), f"{name} ({folder.name}/model.safetensors, sha256 {sha})"


def _from_name(name: str, architecture: str):
    if "/" in name or name.endswith((".pth", ".pt", ".tar", ".safetensors", ".bin")):
        raise UserError(f"{name}: no such file; correct the path, or {FETCH_MOCO_V3}")
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"{name}: neither a file or folder nor the name of a timm model; correct it, or {FETCH_MOCO_V3}")
    if architecture not in ("auto", name):
        raise UserError(f"perceptual.architecture {architecture} contradicts perceptual.weights {name}; use auto")
    try:
        net = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub clients raise what their transport raises; none of it is a fault of ours
        raise UserError(
            f"{name}: its weights could not be downloaded ({_one_line(error)}); fetch model.safetensors of huggingface.co/timm/{name} "
            f"elsewhere, put it on this machine and set perceptual.weights to its path and perceptual.architecture={name.partition('.')[0]}"
        ) from None
    _checked_name(net, name)
    return net, *_statistics(net), f"timm {name}"


def _from_file(path: Path, architecture: str):
    state, prefix = _vit_tensors(path)
    moco = prefix in MOCO_PREFIXES
    width, patch_px = state[PATCH_WEIGHT].shape[0], state[PATCH_WEIGHT].shape[-1]
    heads = (MOCO_HEADS_OF_WIDTH if moco else {}).get(width, HEADS_OF_WIDTH.get(width))
    if architecture == "auto":
        net = _build_from_shapes(path, state, heads)
        name = f"ViT {width} x {len(net.blocks)} blocks x {heads} heads, patch {patch_px}, {net.patch_embed.img_size[0]} px"
    else:
        if not timm.is_model(architecture):
            raise UserError(f"perceptual.architecture {architecture!r}: no timm model of this name; use auto")
        net = timm.create_model(architecture, pretrained=False, num_classes=0)
        name = _checked_name(net, architecture)
        if net.embed_dim != width:
            raise UserError(f"{path}: holds a ViT of width {width}, but {architecture} has width {net.embed_dim}; use perceptual.architecture=auto or another file")
        if moco and width in MOCO_HEADS_OF_WIDTH:
            # timm's names for this width may mean another number of heads, which no shape would betray.
            net = timm.create_model(architecture, pretrained=False, num_classes=0, num_heads=heads)
    _load_strictly(net, state, path, name)
    return net, f"{name} ({path.name}, sha256 {sha256_of_file(path)[:12]})"


# ---------------------------------------------------------------------------------------------- reading a file


def _vit_tensors(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The ViT inside a checkpoint under timm's names, without its head; and the prefix that stood before them."""
    try:
        raw = read_tensor_file(path)
    except UserError as error:
        raise UserError(f"{error}, or {FETCH_MOCO_V3}") from None
    for container in CONTAINERS:
        if isinstance(raw.get(container), dict):
            raw = raw[container]
            break
    tensors = {name: tensor for name, tensor in raw.items() if isinstance(tensor, torch.Tensor) and isinstance(name, str)}
    prefix = next((prefix for prefix in PREFIXES if prefix + PATCH_WEIGHT in tensors), None)
    if prefix is None:
        raise UserError(f"{path}: holds no ViT (no tensor named ...{PATCH_WEIGHT} among {len(tensors)}); {FETCH_MOCO_V3}, or give a timm ViT file")
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    numbers = (PATCH_WEIGHT, 4), ("pos_embed", 3), ("reg_token", 3), ("blocks.0.mlp.fc1.weight", 2)
    for name, dimensions in numbers:
        if name in inner and (inner[name].ndim != dimensions or not inner[name].numel() or not inner[name].is_floating_point()):
            raise UserError(f"{path}: tensor {prefix}{name} is {inner[name].dtype} of shape {tuple(inner[name].shape)}, a ViT's has {dimensions} numbers; {FETCH_MOCO_V3}")
    return {name: tensor for name, tensor in inner.items() if not name.startswith(HEADS)}, prefix


def _build_from_shapes(path: Path, state: dict[str, torch.Tensor], heads: int | None) -> VisionTransformer:
    advice = "name the model in perceptual.architecture"
    width, _, patch_px, _ = state[PATCH_WEIGHT].shape
    if heads is None:
        raise UserError(f"{path}: a ViT of width {width}, whose number of heads no shape tells; {advice}")
    if "blocks.0.attn.q_bias" in state:
        raise UserError(f"{path}: weights of a BEiT; give its release folder (config.json and model.safetensors), or {advice}")
    if "pos_embed" not in state or "blocks.0.mlp.fc1.weight" not in state:
        raise UserError(f"{path}: no plain ViT (pos_embed or blocks.0.mlp.fc1.weight is missing); {advice}")
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    depth = 1 + max(int(number) for number in blocks if re.fullmatch("[0-9]{1,6}", number))
    if depth > len(state):  # no model of so many blocks is built to find the first missing tensor
        raise UserError(f"{path}: holds block {depth - 1}, but {len(state)} tensors in all; fetch the file again")
    class_tokens = 1 if "cls_token" in state else 0
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    positions = state["pos_embed"].shape[1]
    # With registers timm knows both tables with a place for every token and tables for patches alone.
    sides = {prefix: round((positions - prefix) ** 0.5) for prefix in (class_tokens + registers, 0) if positions > prefix}
    prefix = next((prefix for prefix, side in sides.items() if side * side == positions - prefix), None)
    if prefix is None:
        raise UserError(f"{path}: pos_embed has {positions} places, no square grid of patches; {advice}")
    return VisionTransformer(
        img_size=sides[prefix] * patch_px,
        patch_size=patch_px,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
        class_token=class_tokens == 1,
        reg_tokens=registers,
        no_embed_class=prefix == 0 and class_tokens + registers > 0,
        pre_norm="norm_pre.weight" in state,
        global_pool="avg" if "fc_norm.weight" in state else "token",
        num_classes=0,
    )


def _load_strictly(net: nn.Module, state: dict[str, torch.Tensor], path: Path, name: str) -> None:
    expected = net.state_dict()
    for key in expected:
        if key not in state:
            raise UserError(f"{path}: tensor {key} of {name} is missing; fetch the file again or correct perceptual.architecture")
    for key, tensor in state.items():
        if key not in expected:
            raise UserError(f"{path}: tensor {key} has no place in {name}; correct perceptual.architecture, or give a file without it")
        if tensor.shape != expected[key].shape:
            found, wanted = tuple(tensor.shape), tuple(expected[key].shape)
            raise UserError(f"{path}: tensor {key} has shape {found}, {name} has {wanted}; correct perceptual.architecture")
    net.load_state_dict(state)


def _checked_name(net: nn.Module, source: str) -> str:
    if not isinstance(net, (VisionTransformer, Beit)):
        raise UserError(f"{source}: a {type(net).__name__}; the judge must be a plain ViT or a BEiT of timm")
    return net.pretrained_cfg["architecture"]


def _statistics(net: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(net.pretrained_cfg["mean"]), tuple(net.pretrained_cfg["std"])


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
