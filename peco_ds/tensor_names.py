"""Names of the tensors in a weights file, read without torch and without running anything in the file."""

from __future__ import annotations

import json
import pickletools
import zipfile
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO

# More than the names of any network take. Tensors' values lie elsewhere in every format.
_LIMIT_BYTES = 2**26
# torch.save of old wrote several pickles one after the other: a mark, a version, sizes of numbers, the object.
_OLD_PICKLES = 4
_ZIP = b"PK\x03\x04"


def tensor_names(path: Path) -> frozenset[str]:
    """The names of a .safetensors file, or all texts in the pickle of a torch.save file (.pth, .pt, .pth.tar, .bin),
    the names of tensors among them; empty where the file is missing, damaged or of another kind.
    """
    try:
        state = path.stat()
        return _names(path, state.st_size, state.st_mtime_ns) if path.is_file() else frozenset()
    except OSError:
        return frozenset()


# A plan asks many times about one file.
@lru_cache(maxsize=8)
def _names(path: Path, size: int, changed_ns: int) -> frozenset[str]:
    try:
        with open(path, "rb") as file:
            if path.suffix == ".safetensors":
                return _of_safetensors(file, size)
            start = file.read(len(_ZIP))
            file.seek(0)
            return _of_zip(file) if start == _ZIP else _of_pickles(BytesIO(file.read(_LIMIT_BYTES)))
    except Exception:
        # On damaged bytes the readers raise ValueError, KeyError, struct.error, UnicodeDecodeError and others. Whoever
        # loads the file then says what is wrong with it.
        return frozenset()


def _of_safetensors(file: IO[bytes], size: int) -> frozenset[str]:
    length = int.from_bytes(file.read(8), "little")
    if length > min(size, _LIMIT_BYTES):
        return frozenset()
    return frozenset(json.loads(file.read(length))) - {"__metadata__"}


def _of_zip(file: IO[bytes]) -> frozenset[str]:
    with zipfile.ZipFile(file) as archive:
        member = next(item for item in archive.infolist() if item.filename.endswith("data.pkl"))
        # torch.save never compresses; a compressed member may be a thousand times the file's size.
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > _LIMIT_BYTES:
            return frozenset()
        with archive.open(member) as pickled:
            return _texts(pickled)


def _of_pickles(file: IO[bytes]) -> frozenset[str]:
    return frozenset().union(*(_texts(file) for _ in range(_OLD_PICKLES)))


def _texts(pickled: IO[bytes]) -> frozenset[str]:
    """The texts of one pickle, taken apart and not run."""
    return frozenset(
        argument
        for operation, argument, _ in pickletools.genops(pickled)
        if isinstance(argument, str) and "UNICODE" in operation.name
    )
