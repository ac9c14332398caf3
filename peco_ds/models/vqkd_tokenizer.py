"""image -> codes -> a teacher's features: BEiT v2's tokenizer, a ViT on either side of a codebook of unit vectors.

The released files keep the names of the code they were trained with; `read_vqkd` turns them into a tokenizer of this
package.
Source: BEiT v2 (arXiv 2208.06366) and its released `modeling_vqkd.py`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.beit import Beit
from torch import nn

from peco_ds.config import TokenizerSettings, TokenizerVitSettings
from peco_ds.errors import UserError
from peco_ds.kinds.vqkd import LEFT_BEHIND
from peco_ds.models.image_tokenizer import CodebookTokenizer
from peco_ds.models.vit import mlp_ratio_of
from peco_ds.models.vq import Codebook
from peco_ds.models.weight_files import rename_tensors
from peco_ds.recipe_checks import check_tokenizer_settings


class VqkdOutput(NamedTuple):
    # float32 [B, N, target_width], trained towards the direction of the teacher's features.
    features: torch.Tensor
    codes: torch.Tensor  # int64 [B, N], row-major
    commitment: torch.Tensor  # float32 [], unweighted


class PatchTransformer(Beit):
    """timm's `Beit` with absolute positions that ends in its patch tokens: [B, C, S, S] -> [B, N, D], after the norm.

    The patches attend to the class token, which is then dropped. timm's initialisation is the released one:
    normal, std 0.02, not cut at one deviation as in pre-training, projections divided by sqrt(2 i) in block i from 1.
    """

    def __init__(
        self, *, image_px: int, patch_px: int, channels: int, width: int, depth: int, heads: int, mlp_ratio: float
    ) -> None:
        super().__init__(
            img_size=image_px,
            patch_size=patch_px,
            in_chans=channels,
            num_classes=0,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            init_values=None,
            use_abs_pos_emb=True,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc_norm(self.forward_features(x)[:, 1:])


class Fp32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever its input, its weights or autocast are: float32 out.

    An engine in bf16 keeps a rounded copy of the weights, as of all others; with products rounded as well, a feature
    would have 8 bits to choose among V codes.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class TransformerTokenizer(CodebookTokenizer):
    """A ViT, a codebook, a ViT. Training calls only `forward`, and every parameter takes part in it.

    Args:
        out_width: numbers that the decoder gives for a place.
        seed: decides at which encoder outputs dead codes restart.
    """

    def __init__(self, settings: TokenizerSettings, out_width: int, *, seed: int = 0) -> None:
        super().__init__(settings)
        vit, grid = settings.vit, settings.vit.image_px // settings.vit.patch_px
        self.encoder = PatchTransformer(
            image_px=vit.image_px,
            patch_px=vit.patch_px,
            channels=3,
            width=vit.width,
            depth=vit.depth,
            heads=vit.heads,
            mlp_ratio=vit.mlp_ratio,
        )
        self.to_code = nn.Sequential(
            Fp32Linear(vit.width, vit.width), nn.Tanh(), Fp32Linear(vit.width, settings.code_dim)
        )
        self.codebook = Codebook.from_settings(settings, seed=seed)
        # The grid of codes is the decoder's image, one code a patch.
        self.decoder = PatchTransformer(
            image_px=grid,
            patch_px=1,
            channels=settings.code_dim,
            width=vit.decoder_width,
            depth=vit.decoder_depth,
            heads=vit.decoder_heads,
            mlp_ratio=vit.mlp_ratio,
        )
        self.to_target = nn.Sequential(
            nn.Linear(vit.decoder_width, vit.decoder_width), nn.Tanh(), nn.Linear(vit.decoder_width, out_width)
        )
        for layer in (*self.to_code, *self.to_target):
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def trunk(self, images_11: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, S, S] in [-1, 1] of the encoder's own size -> patch tokens [B, N, D]."""
        size = self.settings.only_px
        assert images_11.shape[-2:] == (size, size), (
            f"image {tuple(images_11.shape)}, the encoder's positions are those of {size} px"
        )
        return self.encoder(images_11.to(self.encoder.cls_token.dtype))

    def to_features(self, outputs: torch.Tensor) -> torch.Tensor:
        """Patch tokens [B, N, D] -> float32 [B, C, grid, grid]."""
        vit = self.settings.vit
        grid = vit.image_px // vit.patch_px
        return self.to_code(outputs).transpose(1, 2).unflatten(2, (grid, grid))

    def decode(self, quantized: torch.Tensor) -> torch.Tensor:
        """Code vectors [B, C, grid, grid] -> float32 [B, N, out_width]."""
        return self.to_target(self.decoder(quantized.to(self.decoder.cls_token.dtype))).float()


class VqkdTokenizer(TransformerTokenizer):
    """Codes of images, decoded to features.

    Args:
        seed: decides at which encoder outputs dead codes restart.
    """

    makes_images = False

    def __init__(self, settings: TokenizerSettings, *, seed: int = 0) -> None:
        super().__init__(settings, settings.vit.target_width, seed=seed)

    def forward(self, images_11: torch.Tensor) -> VqkdOutput:
        """Images [B, 3, S, S] in [-1, 1] -> features, codes, commitment; in training mode the codebook counts."""
        quantized = self.codebook(self.encode(images_11))
        return VqkdOutput(self.decode(quantized.quantized), quantized.codes, quantized.commitment)


# -------------------------------------------------------------------------------------- released files

# The width of every attention head of the released networks, which no shape tells.
HEAD_WIDTH = 64
CONTAINERS = ("model", "state_dict")
HEADS = {"encode_task_layer.": "to_code.", "decode_task_layer.": "to_target."}
CODES = "quantize.embedding.weight"
UNUSED = (
    "quantize.embedding.cluster_size",
    "quantize.embedding.embed_avg",
    "quantize.embedding.initted",
    "quantize.cluster_size",
)
DIMENSIONS = {
    CODES: 2,
    "encoder.pos_embed": 3,
    "encoder.patch_embed.proj.weight": 4,
    "encoder.blocks.0.mlp.fc1.weight": 2,
    "decoder.pos_embed": 3,
    "decode_task_layer.2.weight": 2,
}
REMEDY = "fetch one of BEiT v2's vqkd_encoder_base_decoder_*.pth again"


def read_vqkd(tensors: dict) -> tuple[TokenizerSettings, dict[str, torch.Tensor]]:
    """A released VQ-KD file as settings and state of a `VqkdTokenizer`.

    Args:
        tensors: what `read_tensor_file` gives: the file's dictionary, or the one that it holds as `model`.
    Returns: settings, sizes read off the shapes; and the state, float32. What the file holds of a teacher is left
        behind.
    Raises: UserError naming the tensor that is missing, left over, not of floats, not finite, or of another shape.
    """
    tensors = next((tensors[name] for name in CONTAINERS if isinstance(tensors.get(name), dict)), tensors)
    released = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor) and not name.startswith(LEFT_BEHIND)
    }
    settings = _settings_of(released)
    check_tokenizer_settings(settings, "the file's")
    with torch.device("meta"):
        expected = VqkdTokenizer(settings).state_dict()
    names: dict[str, tuple[str, ...]] = {
        name: (_their_name(name),) for name in expected if name == "codebook.codes" or not name.startswith("codebook.")
    }
    state = rename_tensors({name: tensor for name, tensor in released.items() if name not in UNUSED}, names, expected)
    # Tokenizing needs only the codes. A training that continued from here would start its averages anew, as after
    # k-means.
    codebook = Codebook.from_settings(settings)
    codebook.start_at(state["codebook.codes"])
    return settings, state | {f"codebook.{name}": tensor for name, tensor in codebook.state_dict().items()}


def _settings_of(released: dict[str, torch.Tensor]) -> TokenizerSettings:
    for name, dimensions in DIMENSIONS.items():
        if name not in released:
            raise UserError(f"tensor {name} is missing, so this is no VQ-KD tokenizer; {REMEDY}")
        if released[name].ndim != dimensions or not released[name].numel() or not released[name].is_floating_point():
            raise UserError(
                f"tensor {name} is {released[name].dtype} of shape {tuple(released[name].shape)}, a VQ-KD "
                f"tokenizer's has {dimensions} dimensions; {REMEDY}"
            )
    width, _, patch_px, _ = released["encoder.patch_embed.proj.weight"].shape
    decoder_width, patches = released["decoder.pos_embed"].shape[2], released["encoder.pos_embed"].shape[1] - 1
    grid = round(max(patches, 0) ** 0.5)
    if grid < 1 or grid**2 != patches:
        raise UserError(
            f"tensor encoder.pos_embed has {patches + 1} places, no square grid of patches and a class token; {REMEDY}"
        )
    for part, wide in (("encoder", width), ("decoder", decoder_width)):
        if wide % HEAD_WIDTH:
            raise UserError(
                f"its {part} is {wide} wide, not a multiple of {HEAD_WIDTH}, the width of VQ-KD's attention "
                f"heads; {REMEDY}"
            )
    vit = TokenizerVitSettings(
        image_px=grid * patch_px,
        patch_px=patch_px,
        width=width,
        depth=_depth(released, "encoder"),
        heads=width // HEAD_WIDTH,
        mlp_ratio=mlp_ratio_of(width, released["encoder.blocks.0.mlp.fc1.weight"].shape[0]),
        decoder_width=decoder_width,
        decoder_depth=_depth(released, "decoder"),
        decoder_heads=decoder_width // HEAD_WIDTH,
        target_width=released["decode_task_layer.2.weight"].shape[0],
    )
    num_codes, code_dim = released[CODES].shape
    return TokenizerSettings(
        kind="vqkd", vit=vit, num_codes=num_codes, code_dim=code_dim, l2_normalized=True, average="directions"
    )


def _depth(released: dict[str, torch.Tensor], part: str) -> int:
    numbers = {int(found[1]) for name in released if (found := re.match(rf"{part}\.blocks\.([0-9]{{1,6}})\.", name))}
    depth = 1 + max(numbers, default=-1)
    # Checked first, so that no huge network is built only to find its first missing tensor.
    if not 1 <= depth <= len(released):
        raise UserError(
            f"its {part} has {len(numbers)} blocks up to number {depth - 1} in {len(released)} tensors; {REMEDY}"
        )
    return depth


def _their_name(name: str) -> str:
    return next(
        (theirs + name.removeprefix(ours) for theirs, ours in HEADS.items() if name.startswith(ours)),
        CODES if name == "codebook.codes" else name,
    )
