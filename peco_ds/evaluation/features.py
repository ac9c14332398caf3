"""Compute frozen features, the pooled tokens after chosen blocks, and keep them on disk: one float16 file a block."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from timm.models.beit import Beit

from peco_ds.config import ProbeSettings
from peco_ds.errors import UserError
from peco_ds.evaluation.stopping import until_stopped
from peco_ds.own_files import naming, own_json, refuse_foreign
from peco_ds.schema import MANIFEST_NAME, read_json, sha256_of_json, write_json

logger = logging.getLogger("peco_ds")

TRAIN, VAL = "train", "val"
STORED = np.float16
LARGEST = float(np.finfo(STORED).max)


# The folder in --out that they lie in.
FEATURES = "features"
OWN_FEATURES = own_json("linear_probe", "fingerprint", "made_from")
_FEATURES = re.compile(rf"({TRAIN}|{VAL})_(labels|block_\d{{2,}})\.npy")


def _is_features(path: Path) -> bool:
    return _FEATURES.fullmatch(path.name) is not None


def feature_width(width: int, pooling: str) -> int:
    """F, numbers an image and block."""
    return 2 * width if pooling == "class_mean" else width


def feature_bytes(width: int, pooling: str, *, num_blocks: int, num_images: int) -> int:
    """Size of the features on disk."""
    return np.dtype(STORED).itemsize * feature_width(width, pooling) * num_blocks * num_images


@torch.no_grad()
def pooled_features(
    backbone: Beit, images_norm: torch.Tensor, blocks: tuple[int, ...], pooling: Literal["class_mean", "class", "mean"]
) -> list[torch.Tensor]:
    """The features of a frozen backbone that a linear classifier is trained on.

    Args:
        images_norm: [B, 3, S, S].
        blocks: counted from 1, increasing; the residual stream after them, without the final norm.
        pooling: class_mean: class token beside the mean patch token; class: the class token; mean: the mean patch
            token.
    Returns: one float32 [B, F] a block, F = 2 D or D.
    Source: BEiT (arXiv 2106.08254), linear probe: class token and mean patch token of every layer.
    """
    tokens = backbone.forward_intermediates(
        images_norm,
        indices=[number - 1 for number in blocks],
        return_prefix_tokens=True,
        norm=False,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    pooled = []
    for patches, prefix in tokens:
        parts = {"class": prefix[:, 0].float(), "mean": patches.float().mean(dim=1)}
        pooled.append(torch.cat([parts["class"], parts["mean"]], dim=1) if pooling == "class_mean" else parts[pooling])
    return pooled


def refuse_foreign_features(folder: Path) -> None:
    """Raises: UserError if features would replace files that no manifest of features in the folder tells of."""
    manifest = folder / MANIFEST_NAME
    refuse_foreign(manifest, OWN_FEATURES, remedy="give another --out, or move it away")
    if manifest.is_file() or not folder.is_dir():
        return
    standing = next(iter(sorted(filter(_is_features, folder.iterdir()))), None)
    if standing is not None:
        raise UserError(
            f"{standing}: stands there already, and no {MANIFEST_NAME} says that linear_probe.py wrote it; give "
            "another --out, or move it away"
        )


class FeatureFiles:
    """A folder of features: `<split>_block_NN.npy` float16 [n, F] and `<split>_labels.npy` int64 [n], rows in the order
    of the samples.

    manifest.json appears last and says what the features were made from, so a folder with one is whole.

    Args:
        made_from: JSON-able; everything that determines the numbers (images, weights, settings).
        sizes: split -> n.  width: F.
    """

    def __init__(
        self, folder: Path, made_from: dict, *, blocks: tuple[int, ...], sizes: dict[str, int], width: int
    ) -> None:
        self.folder, self._made_from, self._blocks, self._sizes, self._width = (
            Path(folder),
            made_from,
            blocks,
            sizes,
            width,
        )
        self.fingerprint = sha256_of_json(made_from)

    def state(self) -> Literal["whole", "absent", "other"]:
        """ "whole": the folder holds these features; "other": it holds features of something else."""
        path = self.folder / MANIFEST_NAME
        if not path.is_file():
            return "absent"
        try:
            manifest = read_json(path)
        except ValueError:
            return "other"
        files = [
            self._path(split, name)
            for split in self._sizes
            for name in ("labels", *map(self._block_name, self._blocks))
        ]
        if not isinstance(manifest, dict):
            return "other"
        # Begun and not finished: what is there says nothing of other images.
        if manifest.get("fingerprint") == "":
            return "absent"
        return (
            "whole"
            if manifest.get("fingerprint") == self.fingerprint and all(path.is_file() for path in files)
            else "other"
        )

    def create(self) -> None:
        """Create the files in full size; all ranks write rows into them. One rank calls it.

        Raises: UserError if the disk is too small, or as `refuse_foreign_features`.
        """
        refuse_foreign_features(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        # From here on the folder tells whose files these are, whenever this start ends.
        self._write_manifest("")
        for path in filter(_is_features, self.folder.iterdir()):
            path.unlink(missing_ok=True)
        needed, free = (
            np.dtype(STORED).itemsize * self._width * len(self._blocks) * sum(self._sizes.values()),
            shutil.disk_usage(self.folder).free,
        )
        if needed > free:
            raise UserError(
                f"{self.folder}: the features take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
                "give another --out, or fewer blocks in probe.blocks"
            )
        for split, number in self._sizes.items():
            np.lib.format.open_memmap(self._path(split, "labels"), "w+", np.int64, (number,)).flush()
            for block in self._blocks:
                np.lib.format.open_memmap(
                    self._path(split, self._block_name(block)), "w+", STORED, (number, self._width)
                ).flush()

    def write(self, split: str, rows: Iterable[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]) -> None:
        """Write rows of any number of images, in any order.

        Args:
            rows: samples int64 [b], labels int64 [b], and float16 [b, F] a block.
        """
        # Written with pwrite, not mapped: ranks on several nodes write rows of one memory page, and NFS writes a mapped
        # page back as a whole.
        names = ("labels", *map(self._block_name, self._blocks))
        starts = [np.load(self._path(split, name), mmap_mode="r").offset for name in names]
        files = [os.open(self._path(split, name), os.O_WRONLY) for name in names]
        try:
            for samples, labels, features in rows:
                order = np.argsort(samples)
                borders = np.flatnonzero(np.diff(samples[order]) != 1) + 1
                for file, start, values in zip(files, starts, (labels, *features)):
                    row_bytes = values[:1].nbytes
                    for chosen in np.split(order, borders) if len(order) else ():
                        os.pwrite(
                            file, np.ascontiguousarray(values[chosen]).data, start + int(samples[chosen[0]]) * row_bytes
                        )
            for file in files:
                os.fsync(file)
        except OSError as error:
            raise naming(error, self.folder) from None
        finally:
            for file in files:
                os.close(file)

    def finish(self) -> None:
        """Mark the folder as whole, once all rows are written. One rank calls it."""
        self._write_manifest(self.fingerprint)

    def _write_manifest(self, fingerprint: str) -> None:
        write_json(self.folder / MANIFEST_NAME, {"fingerprint": fingerprint, "made_from": self._made_from})

    def labels(self, split: str) -> torch.Tensor:
        """int64 [n]."""
        return torch.from_numpy(self._read(split, "labels", (self._sizes[split],), np.int64))

    def features(self, split: str, block: int) -> torch.Tensor:
        """float16 [n, F], mapped from the file: rows that are not used are not read."""
        return torch.from_numpy(self._read(split, self._block_name(block), (self._sizes[split], self._width), STORED))

    def _read(self, split: str, name: str, shape: tuple[int, ...], dtype) -> np.ndarray:
        path = self._path(split, name)
        try:
            # Mapped copy-on-write, because torch asks for a writable array.
            array = np.load(path, mmap_mode="c", allow_pickle=False)
        except Exception as error:
            # The header is a Python literal; its reader fails on other bytes in many ways.
            raise UserError(
                f"{path}: not an .npy array ({' '.join(str(error).split())[:120]}); remove "
                f"{self.folder / MANIFEST_NAME} and start again"
            ) from None
        if array.shape != shape or array.dtype != dtype:
            raise UserError(
                f"{path}: {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}; remove "
                f"{self.folder / MANIFEST_NAME} and start again"
            )
        return array

    def _path(self, split: str, name: str) -> Path:
        return self.folder / f"{split}_{name}.npy"

    def _block_name(self, block: int) -> str:
        return f"block_{block:02d}"


def compute_features(backbone: Beit, batches: Iterable, settings: ProbeSettings, *, blocks: tuple[int, ...], world):
    """Features of this rank's images, for `FeatureFiles.write`. Collective.

    Args:
        batches: have `.images_norm`, `.labels`, `.samples` (int64 [B], -1 where a row only fills the batch up).
        settings: its pooling and precision are read.
        blocks: counted from 1, increasing.
        world: has device and stop_requested.
    Yields: samples, labels, and float16 [b, F] a block.
    Raises: Stopped; UserError if a feature is not finite.
    """
    clipped = 0
    for batch in until_stopped(batches, world.stop_requested):
        with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
            features = pooled_features(backbone, batch.images_norm, blocks, settings.pooling)
        real = batch.samples >= 0
        stacked = torch.stack(features)[:, real]
        if not bool(torch.isfinite(stacked).all()):
            raise UserError(
                f"the backbone gives values that are not finite in {settings.precision}; set probe.precision=fp32, or "
                "check the weights"
            )
        clipped += int((stacked.abs() > LARGEST).sum())
        halves = stacked.clamp(-LARGEST, LARGEST).half().cpu().numpy()
        yield batch.samples[real].cpu().numpy(), batch.labels[real].cpu().numpy(), list(halves)
    if clipped:
        logger.warning(
            "%d feature values beyond %.0f were clipped to it, the largest that a file of features holds",
            clipped,
            LARGEST,
        )


def feature_rows(features: torch.Tensor, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Access to stored features by row: int64 [b] on the CPU -> float32 [b, F] on `device`.

    Args:
        features: [n, F]; moved to a GPU whole where that leaves half of its free memory, else row by row as asked for.
    """
    if device.type == "cuda" and 2 * features.numel() * features.element_size() < torch.cuda.mem_get_info(device)[0]:
        features = features.to(device)
    return lambda index: features[index.to(features.device)].to(device, torch.float32, non_blocking=True)
