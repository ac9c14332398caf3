"""BEiT v2's tokenizer, as settings and plans see it; the network is models/vqkd_tokenizer.py.

Source of the sizes: BEiT v2 (arXiv 2208.06366).
"""

from __future__ import annotations

from peco_ds.config import TokenizerSettings
from peco_ds.costs import IMAGE_CHANNELS, Blocks, TokenizerCost, patch_transformer, tanh_head
from peco_ds.errors import UserError
from peco_ds.registry import Release, TokenizerKind, later

# Tensors of a training checkpoint's frozen teacher and what belongs to it.
LEFT_BEHIND = ("teacher", "scaling", "loss")


def check(settings: TokenizerSettings, section: str) -> None:
    """Raises: UserError for sizes that do not divide each other."""
    vit = settings.vit
    for whole, part in (("image_px", "patch_px"), ("width", "heads"), ("decoder_width", "decoder_heads")):
        if getattr(vit, whole) % getattr(vit, part):
            raise UserError(
                f"{section}.vit.{whole} {getattr(vit, whole)} is not a multiple of {section}.vit.{part} "
                f"{getattr(vit, part)}"
            )
    if int(min(vit.width, vit.decoder_width) * vit.mlp_ratio) < 1:
        raise UserError(f"{section}.vit.mlp_ratio {vit.mlp_ratio}: gives a hidden layer without units")


def transformers_cost(settings: TokenizerSettings, image_px: int, *, out_width: int) -> TokenizerCost:
    """Cost of encoder and decoder; the grid of codes is the decoder's image, one code a patch.

    Args:
        out_width: numbers that the decoder gives for a place.
    """
    vit, patches = settings.vit, (image_px // settings.vit.patch_px) ** 2
    encoder, decoder = (
        Blocks(depth, patches + 1, width, int(width * vit.mlp_ratio), heads)
        for depth, width, heads in (
            (vit.depth, vit.width, vit.heads),
            (vit.decoder_depth, vit.decoder_width, vit.decoder_heads),
        )
    )
    return TokenizerCost(
        patch_transformer(IMAGE_CHANNELS, vit.patch_px, encoder) + tanh_head(vit.width, settings.code_dim, patches),
        patch_transformer(settings.code_dim, 1, decoder) + tanh_head(vit.decoder_width, out_width, patches),
        codebook_elements=settings.num_codes * (2 * settings.code_dim + 1),
        search_macs=patches * settings.code_dim * settings.num_codes,
        encoder_blocks=encoder,
        decoder_blocks=decoder,
    )


def _cost(settings: TokenizerSettings, image_px: int) -> TokenizerCost:
    return transformers_cost(settings, image_px, out_width=settings.vit.target_width)


def _teacher(settings: TokenizerSettings) -> dict[str, str]:
    """The one of BEiT v2's teachers that has features of this width; no file names its own."""
    width = settings.vit.target_width
    known = {
        512: ("CLIP ViT-B/16", "MIT (OpenAI's release of CLIP)"),
        768: ("DINO ViT-B/16", "Apache-2.0 (DINO's release)"),
    }
    if width not in known:
        return {
            "judge": f"a teacher of width {width} that the file does not name",
            "judge_licence": "unknown, as its teacher is",
        }
    name, licence = known[width]
    return {"judge": f"most likely {name}, by its width of {width}", "judge_licence": licence}


KIND = TokenizerKind(
    network=later("peco_ds.models.vqkd_tokenizer:VqkdTokenizer"),
    learns_from="teacher",
    stride_px=lambda settings: settings.vit.patch_px,
    only_px=lambda settings: settings.vit.image_px,
    check=check,
    tensors=lambda settings: settings.vit.depth + settings.vit.decoder_depth,
    cost=_cost,
    release=Release(
        signs=("quantize.embedding.weight", "encoder.patch_embed.proj.weight"),
        files="unilm's VQ-KD file",
        read=later("peco_ds.models.vqkd_tokenizer:read_vqkd"),
        origin="github.com/microsoft/unilm, beit2",
        licence="MIT",
        judge=_teacher,
        left_out=LEFT_BEHIND,
    ),
)
