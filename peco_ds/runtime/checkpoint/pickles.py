"""Read DeepSpeed's checkpoint files, which are pickles, only if they name no class beyond DeepSpeed's own few."""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from peco_ds.errors import UserError
from peco_ds.models.weight_files import foreign_classes

# The classes that occur under ZeRO 0 to 3 in fp32, bf16 and fp16.
_CLASSES = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
_NAMES = frozenset(f"{kind.__module__}.{kind.__name__}" for kind in _CLASSES)


def refuse_foreign_classes(path: Path, rank: int = 0, world_size: int = 1) -> None:
    """To be called before DeepSpeed reads a checkpoint: its own loading would run anything that a pickle names.

    Args:
        path: a file, or a folder, of whose files this rank checks its share.
    Raises: UserError naming the first file that holds another class.
    """
    files = sorted(path.rglob("*.pt")) if path.is_dir() else [path]
    for file in files[rank::world_size]:
        foreign = foreign_classes(file, _NAMES)
        if foreign:
            raise UserError(
                f"{file}: its pickle names {foreign[0]}, which no checkpoint of a run holds; it was not read, "
                "give another checkpoint"
            )


def load_known(path: Path, *, mmap: bool = False):
    """torch.load of one file of a checkpoint, onto the CPU; classes beyond the known ones are refused by torch."""
    with torch.serialization.safe_globals(_CLASSES):
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
