"""VQ-KD tokenizers in the layout of BEiT v2's released files, with random numbers."""

from __future__ import annotations

import numpy as np
import torch

from peco_ds.config import TokenizerVitSettings


def released_layout(vit: TokenizerVitSettings, num_codes: int, code_dim: int) -> dict[str, torch.Tensor]:
    """Random tensors under the names and shapes of the released files, written down from these and not from our
    module.
    """
    generator = torch.Generator().manual_seed(7)
    grid = vit.image_px // vit.patch_px
    file: dict[str, torch.Tensor] = {}

    def weight(name: str, *shape: int) -> None:
        file[name] = torch.randn(*shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5

    def vector(name: str, size: int, mean: float = 0.0) -> None:
        file[name] = mean + 0.1 * torch.randn(size, generator=generator)

    def linear(name: str, out: int, width: int) -> None:
        weight(f"{name}.weight", out, width)
        vector(f"{name}.bias", out)

    def norm(name: str, width: int) -> None:
        vector(f"{name}.weight", width, 1.0)
        vector(f"{name}.bias", width)

    for part, channels, patch, width, depth in (
        ("encoder", 3, vit.patch_px, vit.width, vit.depth),
        ("decoder", code_dim, 1, vit.decoder_width, vit.decoder_depth),
    ):
        file[f"{part}.cls_token"] = torch.randn(1, 1, width, generator=generator)
        file[f"{part}.pos_embed"] = torch.randn(1, grid**2 + 1, width, generator=generator)
        weight(f"{part}.patch_embed.proj.weight", width, channels, patch, patch)
        vector(f"{part}.patch_embed.proj.bias", width)
        for number in range(depth):
            block = f"{part}.blocks.{number}"
            norm(f"{block}.norm1", width)
            vector(f"{block}.attn.q_bias", width)
            vector(f"{block}.attn.v_bias", width)
            weight(f"{block}.attn.qkv.weight", 3 * width, width)
            linear(f"{block}.attn.proj", width, width)
            norm(f"{block}.norm2", width)
            linear(f"{block}.mlp.fc1", int(vit.mlp_ratio * width), width)
            linear(f"{block}.mlp.fc2", width, int(vit.mlp_ratio * width))
        norm(f"{part}.fc_norm", width)
    codes = torch.nn.functional.normalize(torch.randn(num_codes, code_dim, generator=generator), dim=-1)
    file |= {
        "quantize.embedding.weight": codes,
        "quantize.embedding.embed_avg": codes.clone(),
        "quantize.embedding.initted": torch.ones(1),
    }
    file |= {
        name: torch.full((num_codes,), 3.0) for name in ("quantize.embedding.cluster_size", "quantize.cluster_size")
    }
    linear("encode_task_layer.0", vit.width, vit.width)
    linear("encode_task_layer.2", code_dim, vit.width)
    linear("decode_task_layer.0", vit.decoder_width, vit.decoder_width)
    linear("decode_task_layer.2", vit.target_width, vit.decoder_width)
    return file
