"""How well a tokenizer's round trip keeps an image, or its teacher's features, and how much of its codebook it
uses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from peco_ds.config import EvaluationSettings
from peco_ds.models.vq import usage


class RoundTrip(NamedTuple):
    codes: torch.Tensor  # int64 [b, N]
    reconstruction: torch.Tensor | None  # [b, 3, S, S] in [-1, 1]; None of a tokenizer that makes no images


def round_trip_of(tokenizer) -> Callable[[torch.Tensor], RoundTrip]:
    """images_11 [b, 3, S, S] -> codes and, where the tokenizer makes images, what it makes of the codes alone.

    In eval mode.
    """
    stride = tokenizer.settings.stride_px

    def round_trip(images_11: torch.Tensor) -> RoundTrip:
        codes = tokenizer.tokenize(images_11)
        grid = (images_11.shape[-2] // stride, images_11.shape[-1] // stride)
        return RoundTrip(codes, tokenizer.decode_codes(codes, grid) if tokenizer.makes_images else None)

    return round_trip


class CodeSums:
    """Code usage, summed over a rank's images: what every tokenizer can be measured by."""

    # of the values that `_measured` gives, averaged over images
    names: tuple[str, ...] = ()

    def __init__(self, num_codes: int, device: torch.device) -> None:
        # the last one counts images
        self._sums = torch.zeros(len(self.names) + 1, device=device, dtype=torch.float64)
        self._counts = torch.zeros(num_codes, device=device, dtype=torch.float64)

    @torch.no_grad()
    def add(self, originals_01: torch.Tensor, output, real: torch.Tensor) -> None:
        """
        Args:
            originals_01: [b, 3, S, S] in [0, 1].  output: has .codes [b, N], and what a subclass asks for.
            real: bool [b]; a row without it only fills the batch up and counts nothing.
        """
        weight = real.double()
        values = [*self._measured(originals_01, output), torch.ones_like(weight)]
        self._sums += torch.stack([(weight * each.double()).sum() for each in values])
        self._counts += torch.bincount(output.codes[real].flatten(), minlength=len(self._counts))

    def _measured(self, originals_01: torch.Tensor, output) -> list[torch.Tensor]:
        """One [b] for each of `names`."""
        return []

    def result(self, all_reduce: Callable) -> dict[str, float]:
        """The names, averaged over images; codes_used, perplexity (exp of the entropy of the code counts).

        Collective.
        """
        *totals, images = all_reduce(self._sums).tolist()
        return {
            **{name: total / images for name, total in zip(self.names, totals)},
            **usage(all_reduce(self._counts)),
        }


class RoundTripSums(CodeSums):
    """PSNR (dB), SSIM (Gaussian window of 11) and, where asked for, LPIPS, beside code usage.

    `output` has .reconstruction [b, 3, S, S] in [-1, 1] too.

    Args:
        distance: restored_01, originals_01 [b, 3, S, S] -> [b]; LPIPS of `perceptual_distance.load_lpips`, or None.
    """

    def __init__(self, num_codes: int, device: torch.device, distance: Callable | None = None) -> None:
        self.names = ("psnr", "ssim") if distance is None else ("psnr", "ssim", "lpips")
        super().__init__(num_codes, device)
        self._distance = distance

    def _measured(self, originals_01: torch.Tensor, output) -> list[torch.Tensor]:
        restored = (output.reconstruction.float() / 2 + 0.5).clamp(0, 1)
        error = (restored - originals_01).square().mean(dim=(1, 2, 3)).double()
        psnr = -10 * error.clamp_min(1e-12).log10()
        ssim = structural_similarity_index_measure(restored, originals_01, data_range=1.0, reduction="none").reshape(-1)
        return [psnr, ssim] if self._distance is None else [psnr, ssim, self._distance(restored, originals_01)]


class CosineSums(CodeSums):
    """Cosine to a teacher's features, averaged over an image's patches, beside code usage.

    `output` has .features [b, N, D] too.

    Args:
        targets: images_01 [b, 3, S, S] -> [b, N, D], the teacher's.
    """

    names = ("cosine",)

    def __init__(self, num_codes: int, device: torch.device, targets: Callable) -> None:
        super().__init__(num_codes, device)
        self._targets = targets

    def _measured(self, originals_01: torch.Tensor, output) -> list[torch.Tensor]:
        return [
            torch.nn.functional.cosine_similarity(
                output.features.float(), self._targets(originals_01).float(), dim=-1
            ).mean(dim=1)
        ]


def training_sums(tokenizer, device: torch.device, frozen) -> CodeSums:
    """Fresh sums of what a tokenizer learns: round trips, or the teacher's features.

    Args:
        frozen: what it learns from, on the device: of a tokenizer that makes no images the teacher,
            `.targets(images_01) -> [b, N, D]`.
    """
    num_codes = tokenizer.settings.num_codes
    return RoundTripSums(num_codes, device) if tokenizer.makes_images else CosineSums(num_codes, device, frozen.targets)


def quality_line(quality: dict[str, float], num_codes: int) -> str:
    """What a `result` says, for one line of text."""
    told = {
        "psnr": "PSNR {:.2f} dB",
        "ssim": "SSIM {:.3f}",
        "lpips": "LPIPS {:.3f}",
        "cosine": "cosine to the teacher {:.3f}",
    }
    measured = [text.format(quality[name]) for name, text in told.items() if name in quality]
    return ", ".join(
        [*measured, f"{quality['codes_used']} of {num_codes} codes", f"perplexity {quality['perplexity']:.1f}"]
    )


@torch.no_grad()
def held_out_quality(
    round_trip: Callable, images_u8: torch.Tensor, sums: CodeSums, world, *, batch: int
) -> dict[str, float]:
    """What `sums` measures, over a held-out set, shared by the ranks. Collective.

    Args:
        round_trip: images_11 [b, 3, S, S] -> the output that `sums.add` takes; called equally often on every rank.
        images_u8: uint8 [n, 3, S, S], the same on every rank.
        sums: fresh.
        world: has rank, size, device, all_reduce.
        batch: images a forward pass.
    Returns: as `CodeSums.result`.
    """
    total = len(images_u8)
    each = -(-total // world.size)
    for start in range(0, each, batch):
        places = torch.arange(world.rank * each + start, world.rank * each + min(start + batch, each))
        # Every rank makes the same number of calls: past the end the last image stands in and counts nothing.
        originals = images_u8[places.clamp(max=total - 1)].to(world.device).float() / 255
        sums.add(originals, round_trip(originals * 2 - 1), (places < total).to(world.device))
    return sums.result(world.all_reduce)


class HeldOut:
    """Quality on held-out images while a tokenizer trains: evaluation.jsonl, TensorBoard and, of one that makes
    images, reconstructions.png. Collective.

    Args:
        images_u8: uint8 [n, 3, S, S], the same on every rank.  tokenizer, frozen: as `training_sums`.
        world: has rank, size, device, all_reduce, is_main.  meter: takes what is measured.
    """

    def __init__(
        self,
        images_u8: torch.Tensor,
        settings: EvaluationSettings,
        *,
        tokenizer,
        frozen,
        batch: int,
        out: Path,
        world,
        meter,
    ) -> None:
        self._images_u8, self._settings, self._tokenizer, self._frozen = images_u8, settings, tokenizer, frozen
        self._batch, self._out, self._world, self._meter = batch, out, world, meter
        self.last: dict[str, float] = {}

    def due(self, step: int) -> bool:
        return self._settings.every_steps > 0 and step % self._settings.every_steps == 0

    @torch.no_grad()
    def __call__(self, engine, step: int) -> None:
        """Measure; `engine(images_11)` gives the tokenizer's output, or one that holds it as `.tokenizer`."""
        world = self._world
        engine.eval()

        def round_trip(images_11: torch.Tensor):
            output = engine(images_11)
            return getattr(output, "tokenizer", output)

        self.last = held_out_quality(
            round_trip,
            self._images_u8,
            training_sums(self._tokenizer, world.device, self._frozen),
            world,
            batch=self._batch,
        )
        if world.is_main:
            self._meter.evaluation(step, self.last)
        if self._tokenizer.makes_images:
            self._show(round_trip, step)
        engine.train()

    def _show(self, round_trip: Callable, step: int) -> None:
        """Every rank makes the images, which may be a collective; the first one keeps them."""
        shown = self._images_u8[: self._settings.grid_images]
        restored = round_trip(shown.to(self._world.device).float() / 127.5 - 1).reconstruction
        if self._world.is_main:
            grid = comparison_grid([shown, to_u8(restored).cpu()])
            self._meter.image("original | round trip", grid, step)
            save_png(self._out / "reconstructions.png", grid)


@torch.no_grad()
def comparison_grid(columns: list[torch.Tensor]) -> torch.Tensor:
    """Images side by side: one row an image, one column a tensor.

    Args:
        columns: each uint8 [n, 3, S, S].
    Returns: uint8 [3, H, W] with white gaps.
    """
    gap = 4
    rows = [
        torch.cat([torch.nn.functional.pad(image, (gap, gap, gap, gap), value=255) for image in images], dim=2)
        for images in zip(*columns)
    ]
    return torch.cat(rows, dim=1)


def save_png(path: Path, image_u8: torch.Tensor) -> None:
    """Write uint8 [3, H, W]."""
    Image.fromarray(image_u8.permute(1, 2, 0).cpu().numpy()).save(path)


def to_u8(images_11: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8, rounded."""
    return ((images_11.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
