"""Read the tensors of TorchScript archives, the form of OpenAI's CLIP files, by name.

The program in them is neither compiled nor run.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from peco_ds.errors import UserError

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is a TorchScript archive: a zip whose folder has constants.pkl beside data.pkl."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def read_torchscript(path: str | Path) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the module in an archive, by their dotted names, on the CPU in the stored precision.

    A parameter with two names is one tensor.

    Raises: UserError if the archive is damaged, names a Python object that is neither a module of its own nor a tensor,
        or asks for more memory than it is large.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            table = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            root = _Reader(io.BytesIO(_stored(archive, table))).load()
            folder = table.removesuffix("data.pkl") + "data/"
            return _tensors(archive, folder, _saved_tensors(root), Path(path).stat().st_size)
    except Exception as error:
        # On a damaged pickle the reader raises IndexError, struct.error, AttributeError and others.
        detail = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"{path}: not a readable TorchScript archive ({detail}); fetch it again, or save "
            "model.state_dict() where you trust it"
        ) from None


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


class _Saved(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Module:
    """Replaces every module of the archive: it has attributes, and nothing that could run."""


def _saved(storage, offset, size, stride, *_flags) -> _Saved:
    if not isinstance(storage, _Storage) or not all(
        type(number) is int and number >= 0 for number in (offset, *size, *stride)
    ):
        raise pickle.UnpicklingError("a tensor without storage, size or place")
    return _Saved(storage, offset, size, stride)


def _first(content, *_type):
    return content


# Python's own unpickler, because the one in C allocates memory for any place in its memo that a damaged file names.
class _Reader(pickle._Unpickler):
    """Unpickles modules as `_Module` and tensors as `_Saved`, and nothing else."""

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = {("torch._utils", "_rebuild_tensor_v2"): _saved, ("collections", "OrderedDict"): dict}
        if (module, name) in known:
            return known[module, name]
        # Typed lists.
        if module == "torch.jit._pickle":
            return _first
        raise pickle.UnpicklingError(f"its pickle names {module[:60]}.{name[:60]}, which was not run")

    def persistent_load(self, saved) -> _Storage:
        kind, dtype, key, _device, numel = saved
        if (
            kind != "storage"
            or not isinstance(dtype, torch.dtype)
            or not isinstance(key, str)
            or not isinstance(numel, int)
        ):
            raise pickle.UnpicklingError("a storage without type, key or size")
        return _Storage(dtype, key, numel)


def _saved_tensors(root: object) -> dict[str, _Saved]:
    found: dict[str, _Saved] = {}
    waiting, seen = [("", root)], set()
    while waiting:
        prefix, module = waiting.pop()
        # A damaged archive may hold a module that holds itself.
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, value in vars(module).items():
            if isinstance(value, _Module):
                waiting.append((f"{prefix}{name}.", value))
            elif isinstance(value, _Saved):
                found[f"{prefix}{name}"] = value
    return found


def _tensors(
    archive: zipfile.ZipFile, folder: str, named: dict[str, _Saved], file_bytes: int
) -> dict[str, torch.Tensor]:
    """Each storage is read once and released, and each tensor is made once: any number of them may lie in one storage,
    or share a place in it.
    """
    distinct = sorted(set(named.values()), key=lambda saved: saved.storage.key)
    asked = sum(math.prod(saved.size) * saved.storage.dtype.itemsize for saved in distinct)
    if asked > file_bytes:
        raise ValueError(f"what its pickle names needs more than the file has, {asked} bytes of {file_bytes}")
    made: dict[_Saved, torch.Tensor] = {}
    for key, sharing in groupby(distinct, key=lambda saved: saved.storage.key):
        data = bytearray(_stored(archive, folder + key))
        made |= {saved: _tensor(data, saved) for saved in sharing}
    return {name: made[saved] for name, saved in named.items()}


def _tensor(data: bytearray, saved: _Saved) -> torch.Tensor:
    dtype, key, numel = saved.storage
    if numel < 0 or len(data) < numel * dtype.itemsize or math.prod(saved.size) > numel:
        raise ValueError(
            f"storage {key[:40]} has {len(data)} bytes, its tensor of shape {saved.size} of {dtype} needs more"
        )
    flat = torch.frombuffer(data, dtype=dtype, count=numel) if numel else torch.empty(0, dtype=dtype)
    return flat.as_strided(saved.size, saved.stride, saved.offset).clone(memory_format=torch.contiguous_format)


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    # torch never compresses; a compressed member may be a thousand times the file's size.
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its member {name[:80]} is compressed")
    return archive.read(name)
