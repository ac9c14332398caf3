"""How well a tokenizer's round trip keeps a picture, and how much of its codebook it uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure


@torch.no_grad()
def reconstruction_quality(
    round_trip: Callable, images_u8: torch.Tensor, *, num_codes: int, batch: int, rank: int, world_size: int, device: torch.device, all_reduce: Callable
) -> dict[str, float]:
    """PSNR, SSIM and code usage over a held-out set, shared by the ranks. Collective.

    Args:
        round_trip: images_11 [b, 3, S, S] -> has .reconstruction [b, 3, S, S] in [-1, 1] and .codes [b, N]; called equally often on every rank.
        images_u8: uint8 [n, 3, S, S], the same on every rank.
    Returns: psnr (dB, of each picture, averaged), ssim (Gaussian window of 11, averaged), codes_used, perplexity (exp of the entropy of the code counts).
    """
    total = len(images_u8)
    each = -(-total // world_size)
    sums = torch.zeros(3, device=device, dtype=torch.float64)  # psnr, ssim, pictures
    counts = torch.zeros(num_codes, device=device, dtype=torch.float64)
    for start in range(0, each, batch):
        places = torch.arange(rank * each + start, rank * each + min(start + batch, each))
        # Every rank makes the same number of calls: past the end the last picture stands in and counts nothing.
        weight = (places < total).to(device, torch.float64)
        originals = images_u8[places.clamp(max=total - 1)].to(device).float() / 255
        output = round_trip(originals * 2 - 1)
        restored = (output.reconstruction.float() / 2 + 0.5).clamp(0, 1)
        error = (restored - originals).square().mean(dim=(1, 2, 3)).double()
        ssim = structural_similarity_index_measure(restored, originals, data_range=1.0, reduction="none").double().reshape(-1)
        sums += torch.stack([(weight * -10 * error.clamp_min(1e-12).log10()).sum(), (weight * ssim).sum(), weight.sum()])
        counts += torch.bincount(output.codes[weight.bool()].flatten(), minlength=num_codes)
    psnr, ssim, pictures = all_reduce(sums).tolist()
    share = all_reduce(counts) / counts.sum()
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return {"psnr": psnr / pictures, "ssim": ssim / pictures, "codes_used": int((share > 0).sum()), "perplexity": float(entropy.exp())}


@torch.no_grad()
def comparison_grid(columns: list[torch.Tensor]) -> torch.Tensor:
    """Pictures side by side: one row a picture, one column a tensor.

    Args:
        columns: each uint8 [n, 3, S, S].
    Returns: uint8 [3, H, W] with white gaps.
    """
    gap = 4
    rows = [torch.cat([torch.nn.functional.pad(image, (gap, gap, gap, gap), value=255) for image in images], dim=2) for images in zip(*columns)]
    return torch.cat(rows, dim=1)


def save_png(path: Path, image_u8: torch.Tensor) -> None:
    """Write uint8 [3, H, W]."""
    Image.fromarray(image_u8.permute(1, 2, 0).cpu().numpy()).save(path)


def to_u8(images_11: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8, rounded."""
    return ((images_11.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
