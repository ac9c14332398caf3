"""How well a tokenizer's round trip keeps a picture, and how much of its codebook it uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from peco_ds.config import EvaluationSettings
from peco_ds.models.vq import usage


class RoundTripSums:
    """PSNR, SSIM, code usage and, where asked for, LPIPS, summed over a rank's pictures.

    Args:
        distance: restored_01, originals_01 [b, 3, S, S] -> [b]; LPIPS of `perceptual_distance.load_lpips`, or None.
    """

    def __init__(self, num_codes: int, device: torch.device, distance: Callable | None = None) -> None:
        self._distance = distance
        self._sums = torch.zeros(4, device=device, dtype=torch.float64)  # psnr, ssim, lpips, pictures
        self._counts = torch.zeros(num_codes, device=device, dtype=torch.float64)

    @torch.no_grad()
    def add(self, originals_01: torch.Tensor, output, real: torch.Tensor) -> None:
        """
        Args:
            originals_01: [b, 3, S, S] in [0, 1].  output: has .reconstruction [b, 3, S, S] in [-1, 1] and .codes [b, N].
            real: bool [b]; a row without it only fills the batch up and counts nothing.
        """
        restored = (output.reconstruction.float() / 2 + 0.5).clamp(0, 1)
        error = (restored - originals_01).square().mean(dim=(1, 2, 3)).double()
        psnr = -10 * error.clamp_min(1e-12).log10()
        ssim = structural_similarity_index_measure(restored, originals_01, data_range=1.0, reduction="none").double().reshape(-1)
        lpips = torch.zeros_like(psnr) if self._distance is None else self._distance(restored, originals_01).double()
        weight = real.double()
        self._sums += torch.stack([(weight * values).sum() for values in (psnr, ssim, lpips, torch.ones_like(psnr))])
        self._counts += torch.bincount(output.codes[real].flatten(), minlength=len(self._counts))

    def result(self, all_reduce: Callable) -> dict[str, float]:
        """psnr (dB, of each picture, averaged), ssim (Gaussian window of 11, averaged), lpips if measured (averaged), codes_used, perplexity (exp of the
        entropy of the code counts). Collective."""
        psnr, ssim, lpips, pictures = all_reduce(self._sums).tolist()
        distance = {} if self._distance is None else {"lpips": lpips / pictures}
        return {"psnr": psnr / pictures, "ssim": ssim / pictures, **distance, **usage(all_reduce(self._counts))}


@torch.no_grad()
def reconstruction_quality(
    round_trip: Callable, images_u8: torch.Tensor, *, num_codes: int, batch: int, rank: int, world_size: int, device: torch.device, all_reduce: Callable
) -> dict[str, float]:
    """PSNR, SSIM and code usage over a held-out set, shared by the ranks. Collective.

    Args:
        round_trip: images_11 [b, 3, S, S] -> has .reconstruction and .codes, as `RoundTripSums.add`; called equally often on every rank.
        images_u8: uint8 [n, 3, S, S], the same on every rank.
    Returns: as `RoundTripSums.result`.
    """
    total = len(images_u8)
    each = -(-total // world_size)
    sums = RoundTripSums(num_codes, device)
    for start in range(0, each, batch):
        places = torch.arange(rank * each + start, rank * each + min(start + batch, each))
        # Every rank makes the same number of calls: past the end the last picture stands in and counts nothing.
        originals = images_u8[places.clamp(max=total - 1)].to(device).float() / 255
        sums.add(originals, round_trip(originals * 2 - 1), (places < total).to(device))
    return sums.result(all_reduce)


class HeldOut:
    """Quality on held-out pictures while a tokenizer trains: evaluation.jsonl, TensorBoard, reconstructions.png. Collective.

    Args:
        images_u8: uint8 [n, 3, S, S], the same on every rank.  world: has rank, size, device, all_reduce, is_main.
        meter: takes what is measured.
    """

    def __init__(self, images_u8: torch.Tensor, settings: EvaluationSettings, *, num_codes: int, batch: int, out: Path, world, meter) -> None:
        self._images_u8, self._settings = images_u8, settings
        self._num_codes, self._batch, self._out, self._world, self._meter = num_codes, batch, out, world, meter
        self.last: dict[str, float] = {}

    def due(self, step: int) -> bool:
        return self._settings.every_steps > 0 and step % self._settings.every_steps == 0

    @torch.no_grad()
    def __call__(self, engine, step: int) -> None:
        """Measure; `engine(images_11)` gives a TokenizerOutput, or one that holds it as `.tokenizer`."""
        world = self._world
        engine.eval()

        def round_trip(images_11: torch.Tensor):
            output = engine(images_11)
            return getattr(output, "tokenizer", output)

        self.last = reconstruction_quality(
            round_trip,
            self._images_u8,
            num_codes=self._num_codes,
            batch=self._batch,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            all_reduce=world.all_reduce,
        )
        shown = self._images_u8[: self._settings.grid_images]
        restored = round_trip(shown.to(world.device).float() / 127.5 - 1).reconstruction
        engine.train()
        if world.is_main:
            grid = comparison_grid([shown, to_u8(restored).cpu()])
            self._meter.evaluation(step, self.last)
            self._meter.picture("original | round trip", grid, step)
            save_png(self._out / "reconstructions.png", grid)


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
