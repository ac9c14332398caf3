"""Measure how well a tokenizer reconstructs images or its teacher's features, and how much of the codebook it uses."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torchmetrics.functional.image import structural_similarity_index_measure

from peco_ds.config import EvaluationSettings
from peco_ds.data.loaders import HeldOutImages
from peco_ds.errors import UserError, describe_os_error
from peco_ds.evaluation.atlas_picture import atlas_picture
from peco_ds.evaluation.code_atlas import AtlasSums
from peco_ds.models.vq import usage
from peco_ds.own_files import Own, png_text, written_whole

logger = logging.getLogger("peco_ds")

# Of comparison grids: white around an image, the line of names on top, and the least side of an image that is to be
# looked at.
_GAP_PX, _NAMES_PX = 4, 24
SHOWN_PX = 128


class RoundTrip(NamedTuple):
    codes: torch.Tensor  # int64 [b, N]
    # [b, 3, S, S] in [-1, 1]; None for a tokenizer that makes no images.
    reconstruction: torch.Tensor | None


def round_trip_of(tokenizer) -> Callable[[torch.Tensor], RoundTrip]:
    """The function images_11 [b, 3, S, S] -> codes and, where the tokenizer makes images, their reconstruction from the
    codes.

    In eval mode.
    """
    stride = tokenizer.settings.stride_px

    def round_trip(images_11: torch.Tensor) -> RoundTrip:
        codes = tokenizer.tokenize(images_11)
        grid = (images_11.shape[-2] // stride, images_11.shape[-1] // stride)
        return RoundTrip(codes, tokenizer.decode_codes(codes, grid) if tokenizer.makes_images else None)

    return round_trip


class CodeSums:
    """Code usage, summed over a rank's images; every tokenizer can be measured by it."""

    # Names of the values that `_measured` gives; they are averaged over images.
    names: tuple[str, ...] = ()

    def __init__(self, num_codes: int, device: torch.device) -> None:
        # The last entry counts images.
        self._sums = torch.zeros(len(self.names) + 1, device=device, dtype=torch.float64)
        self._counts = torch.zeros(num_codes, device=device, dtype=torch.float64)

    @torch.no_grad()
    def add(self, originals_01: torch.Tensor, output, real: torch.Tensor) -> None:
        """
        Args:
            originals_01: [b, 3, S, S] in [0, 1].  output: has .codes [b, N], and what a subclass asks for.
            real: bool [b]; False: the row only fills up the batch and is not counted.
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

        Raises: UserError on every rank where one of them is not finite.
        """
        *totals, images = all_reduce(self._sums).tolist()
        averages = {name: total / images for name, total in zip(self.names, totals)}
        broken = next((name for name, value in averages.items() if not math.isfinite(value)), None)
        if broken is not None:
            raise UserError(
                f"the tokenizer gives values that are not finite ({broken} {averages[broken]}), so there is no score; "
                "take weights of an earlier step, or more precision (fp32)"
            )
        return {**averages, **usage(all_reduce(self._counts))}


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
    """New sums for what a tokenizer learns to reconstruct: images, or the teacher's features.

    Args:
        frozen: the frozen network of its training, on the device; for a tokenizer that makes no images the teacher,
            with `.targets(images_01) -> [b, N, D]`.
    """
    num_codes = tokenizer.settings.num_codes
    return RoundTripSums(num_codes, device) if tokenizer.makes_images else CosineSums(num_codes, device, frozen.targets)


def quality_line(quality: dict[str, float], num_codes: int) -> str:
    """A `result` as one line of text."""
    formats = {
        "psnr": "PSNR {:.2f} dB",
        "ssim": "SSIM {:.3f}",
        "lpips": "LPIPS {:.3f}",
        "cosine": "cosine to the teacher {:.3f}",
    }
    measured = [text.format(quality[name]) for name, text in formats.items() if name in quality]
    return ", ".join(
        [*measured, f"{quality['codes_used']} of {num_codes} codes", f"perplexity {quality['perplexity']:.1f}"]
    )


@torch.no_grad()
def held_out_quality(
    round_trip: Callable,
    images_u8: torch.Tensor,
    sums: CodeSums,
    world,
    *,
    batch: int,
    watch: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> dict[str, float]:
    """The measures of `sums` over a held-out set that the ranks share. Collective.

    Args:
        round_trip: images_11 [b, 3, S, S] -> the output that `sums.add` takes; called equally often on every rank.
        images_u8: uint8 [n, 3, S, S], the same on every rank.
        sums: empty.
        world: has rank, size, device, all_reduce.
        batch: images a forward pass.
        watch: is given the codes [b, N] of every pass, and the places in the set, int64 [b] on the CPU; -1: the row is
            not counted.
    Returns: as `CodeSums.result`.
    """
    total = len(images_u8)
    each = -(-total // world.size)
    for start in range(0, each, batch):
        places = torch.arange(world.rank * each + start, world.rank * each + min(start + batch, each))
        # Every rank makes the same number of calls. Past the end the last image is repeated and not counted.
        originals = images_u8[places.clamp(max=total - 1)].to(world.device).float() / 255
        output = round_trip(originals * 2 - 1)
        sums.add(originals, output, (places < total).to(world.device))
        if watch is not None:
            watch(output.codes, places.masked_fill(places >= total, -1))
    return sums.result(world.all_reduce)


class HeldOut:
    """Quality on held-out images while a tokenizer trains: evaluation.jsonl, TensorBoard and, of one that makes
    images, reconstructions.png; at the end the atlas of its codes, code_atlas.png.

    Args:
        held_out: the same on every rank.
        run: the training run, attached to its engine; `engine(images_11)` gives the tokenizer's output, or one that
            holds it as `.tokenizer`.
        tokenizer, frozen: as `training_sums`.
    """

    def __init__(self, held_out: HeldOutImages, run, *, tokenizer, frozen) -> None:
        self._held_out, self._run, self._tokenizer, self._frozen = held_out, run, tokenizer, frozen
        self._settings: EvaluationSettings = run.cfg.evaluation
        self.last: dict[str, float] = {}

    def is_due(self, step: int) -> bool:
        """Whether to measure when `step` steps are done: at the end, and every evaluation.every_steps."""
        every = self._settings.every_steps
        return self._is_last(step) or (every > 0 and step % every == 0)

    def _is_last(self, step: int) -> bool:
        return step == self._run.durations.stop_step

    @torch.no_grad()
    def measure(self, step: int) -> None:
        """Measure now, when `step` steps are done. Collective."""
        run, world = self._run, self._run.world

        def round_trip(images_11: torch.Tensor):
            output = run.engine(images_11)
            return getattr(output, "tokenizer", output)

        with run.evaluating():
            run.engine.eval()
            sums = training_sums(self._tokenizer, world.device, self._frozen)
            codes = self._code_sums() if self._is_last(step) else None
            watch = None if codes is None else partial(self._count_codes, codes)
            batch = run.cfg.run.micro_batch
            self.last = held_out_quality(round_trip, self._held_out.images_u8, sums, world, batch=batch, watch=watch)
            run.meter.evaluation(step, self.last)
            if self._tokenizer.makes_images:
                self._show(round_trip, step)
            if codes is not None:
                self._draw_atlas(codes, step)
            run.engine.train()

    def _show(self, round_trip: Callable, step: int) -> None:
        """Every rank makes the images, which may be a collective; the first one keeps them."""
        shown = self._held_out.images_u8[: self._settings.grid_images]
        restored = round_trip(shown.to(self._run.world.device).float() / 127.5 - 1).reconstruction
        if self._run.world.is_main:
            columns = {"original": shown, "round trip": to_u8(restored).cpu()}
            grid = comparison_grid(list(columns.values()), names=list(columns), at_least_px=SHOWN_PX)
            self._run.meter.image("original | round trip", grid, step)
            self._keep("reconstructions.png", grid)

    @property
    def _grid(self) -> int:
        return self._held_out.images_u8.shape[-1] // self._tokenizer.settings.stride_px

    def _code_sums(self) -> AtlasSums:
        return AtlasSums(self._tokenizer.settings.num_codes, self._grid, self._held_out.classes, self._run.world.device)

    def _count_codes(self, sums: AtlasSums, codes: torch.Tensor, places: torch.Tensor) -> None:
        sums.add(codes, self._held_out.labels[places], places)

    def _draw_atlas(self, sums: AtlasSums, step: int) -> None:
        """Collective; the first rank draws."""
        atlas = sums.result(self._run.world)
        if self._run.world.is_main:
            image = atlas_picture(
                atlas,
                self._held_out.images_u8.__getitem__,
                title=f"Code atlas of {self._run.cfg.name} at step {step:,}",
                images=f"{len(self._held_out.images_u8):,} held-out images",
                num_codes=self._tokenizer.settings.num_codes,
                grid=self._grid,
            )
            self._run.meter.image("code atlas", image, step)
            self._keep("code_atlas.png", image)

    def _keep(self, name: str, image_u8: torch.Tensor) -> None:
        """A picture is for looking at: a disk that does not take it does not end the run."""
        try:
            save_png(self._run.out / name, image_u8)
        except OSError as error:
            logger.warning("%s; the run goes on without", describe_os_error(error))


@torch.no_grad()
def comparison_grid(columns: list[torch.Tensor], *, names: Sequence[str] = (), at_least_px: int = 0) -> torch.Tensor:
    """Images side by side: one row an image, one column a tensor.

    Args:
        columns: each uint8 [n, 3, S, S].
        names: of the columns, written above them; none: no line above.
        at_least_px: smaller images are enlarged by the least whole number that makes them so large (bicubic).
    Returns: uint8 [3, H, W] with white gaps.
    """
    factor = -(-at_least_px // columns[0].shape[-1]) if at_least_px else 1
    if factor > 1:
        columns = [_enlarged(images, factor) for images in columns]
    gaps = (_GAP_PX,) * 4
    rows = [
        torch.cat([torch.nn.functional.pad(image, gaps, value=255) for image in images], dim=2)
        for images in zip(*columns)
    ]
    if names:
        rows.insert(0, _names_row(names, columns[0].shape[-1] + 2 * _GAP_PX))
    return torch.cat(rows, dim=1)


def _enlarged(images_u8: torch.Tensor, factor: int) -> torch.Tensor:
    enlarged = torch.nn.functional.interpolate(images_u8.float(), scale_factor=float(factor), mode="bicubic")
    return enlarged.round().clamp(0, 255).to(torch.uint8)


def _names_row(names: Sequence[str], column_px: int) -> torch.Tensor:
    """uint8 [3, _NAMES_PX, len(names) * column_px]: black on white, each in the middle of its column."""
    row = Image.new("RGB", (len(names) * column_px, _NAMES_PX), "white")
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(size=14)
    for number, name in enumerate(names):
        draw.text(((number + 0.5) * column_px, _NAMES_PX / 2), name, fill="black", font=font, anchor="mm")
    return torch.from_numpy(np.array(row)).permute(2, 0, 1)


def save_png(path: Path, image_u8: torch.Tensor, own: Own | None = None) -> None:
    """Write uint8 [3, H, W], whole or not at all.

    Args:
        own: the command whose picture it is; it replaces no other one. None: the folder is the caller's.
    Raises: OSError that names the file; UserError as `own_files.refuse_foreign`.
    """
    text = PngInfo()
    for key, value in png_text(own).items() if own else ():
        text.add_text(key, value)
    with written_whole(path, own) as temporary:
        Image.fromarray(image_u8.permute(1, 2, 0).cpu().numpy()).save(temporary, "PNG", pnginfo=text)


def to_u8(images_11: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8, rounded."""
    return ((images_11.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
