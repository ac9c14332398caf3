"""Read weight files of unknown origin without running anything in them, and rename or fingerprint their tensors.

A file that holds no weights is refused with what it seems to be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.serialization import get_unsafe_globals_in_checkpoint

from peco_ds.errors import UserError
from peco_ds.models.torchscript_files import is_torchscript
from peco_ds.own_files import MADE_BY, PACKAGE
from peco_ds.schema import short

_LFS = b"version https://git-lfs"
_WEB_PAGE = (b"<!doctype", b"<html", b"<?xml")
_NOT_A_WEIGHTS_FILE = "not a readable weights file"


class StoredObject:
    """Replaces an object of another package that a pickle holds: it keeps the stored attributes, and nothing of it can
    run.
    """

    def __init__(self, *arguments) -> None:
        pass

    def __setstate__(self, state) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


def read_tensor_file(path: str | Path, *, objects: frozenset[str] = frozenset()) -> dict:
    """The content of a .safetensors or a torch.save file (.pth, .pt, .bin, .pth.tar), its tensors on the CPU.

    Tensors are mapped where the format allows it: they take memory once they are read. Of pickles only tensors, plain
    containers and argparse.Namespace (MoCo v3 and DINO store their command line) are unpickled.

    Args:
        objects: classes, as "package.module.Class", that a pickle may name too. They are not imported: a `StoredObject`
            stands in for theirs. Where the file is one such object, a module that was saved whole, its parameters and
            buffers come back under the names that state_dict() gives them.
    Raises: UserError if the file is missing, a folder, empty, a web page, a git-LFS pointer, damaged or cut short,
        would run code, or holds no dictionary.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a weights file; name the file in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file; correct the path")
    with open(path, "rb") as file:
        start = file.read(512).lstrip()
    if not start:
        raise UserError(f"{path}: {_NOT_A_WEIGHTS_FILE}: it is empty; fetch it again")
    if start.startswith(_LFS):
        raise UserError(
            f"{path}: {_NOT_A_WEIGHTS_FILE}: a git-LFS pointer, the weights were not fetched; run `git "
            "lfs pull` in its repository"
        )
    if start.lower().startswith(_WEB_PAGE):
        raise UserError(
            f"{path}: {_NOT_A_WEIGHTS_FILE}: a web page (a log-in or an error page was saved under this "
            "name); fetch it again, logged in"
        )
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickle(path, objects)
        if isinstance(content, StoredObject):
            content = _tensors_of(content)
    except Exception as error:
        # On a damaged pickle the reader raises IndexError, struct.error, AssertionError and others.
        raise UserError(f"{path}: {_NOT_A_WEIGHTS_FILE}: {_reason(error, path)}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: {_NOT_A_WEIGHTS_FILE}: it holds a {type(content).__name__}, no dictionary of "
            "tensors; save model.state_dict() instead"
        )
    _refuse_odd_tensors(content, path)
    return content


def _refuse_odd_tensors(content: dict, path: Path) -> None:
    """Refuse tensors without bytes behind them, or expanded by their strides: they would take memory that the file does
    not have.
    """
    # A pickle may hold a dictionary that holds itself.
    waiting, seen = [content], {id(content)}
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
            elif isinstance(value, torch.Tensor):
                odd = value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized
                if odd or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                    raise UserError(
                        f"{path}: {_NOT_A_WEIGHTS_FILE}: tensor {str(name)[:80]} is sparse, quantized, expanded "
                        "or without data; save it dense and contiguous"
                    )


def _tensors_of(module: StoredObject) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    waiting, seen = [("", module)], set()
    while waiting:
        prefix, stored = waiting.pop()
        if id(stored) in seen or len(prefix) > 500:
            raise ValueError("one of its modules stands in it twice")
        seen.add(id(stored))
        for part in ("_parameters", "_buffers"):
            tensors |= {
                f"{prefix}{name}": tensor.detach()
                for name, tensor in vars(stored).get(part, {}).items()
                if isinstance(tensor, torch.Tensor)
            }
        waiting += [
            (f"{prefix}{name}.", child)
            for name, child in vars(stored).get("_modules", {}).items()
            if isinstance(child, StoredObject)
        ]
    return tensors


def _unpickle(path: Path, objects: frozenset[str]) -> object:
    with open(path, "rb") as file:
        # torch maps no other format.
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip:
        if is_torchscript(path):
            raise ValueError("TorchScript")
        with zipfile.ZipFile(path) as archive:
            packed = next(
                (member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED), None
            )
        # torch.save never compresses; a compressed member may be a thousand times the file's size.
        if packed is not None:
            raise ValueError(f"its member {packed[:80]} is compressed")
    with torch.serialization.safe_globals([argparse.Namespace, *((StoredObject, name) for name in objects)]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def foreign_classes(path: str | Path, known: frozenset[str] = frozenset()) -> list[str]:
    """The classes that the pickle of a torch.save file names beside tensors and plain containers; nothing is run.

    Call it before other code unpickles a file with objects: an unexpected class could run anything.

    Args:
        known: names that the reader expects, as "module.Class".
    Raises: UserError if the file is not one of torch.save's, or its pickle has operations that torch.save never writes.
    """
    try:
        return sorted(set(get_unsafe_globals_in_checkpoint(path)) - known)
    except Exception as error:
        # On a damaged pickle the reader raises IndexError, struct.error, AssertionError and others.
        raise UserError(f"{path}: {_NOT_A_WEIGHTS_FILE}: {_reason(error, Path(path))}") from None


def _reason(error: Exception, path: Path) -> str:
    text = " ".join(str(error).split())
    code = re.search(r"(?:GLOBAL|class) ([\w.]+)", text)
    if "Weights only load failed" in text and code and "nsupported" in text:
        return (
            f"its pickle calls {code[1]}, which could run anything and was not run; ask for safetensors, "
            "or save its tensors alone on a machine where you trust it"
        )
    if "TorchScript" in text:
        return (
            "a TorchScript archive (torch.jit.save), which holds a program; torch.jit.load() it where you trust "
            "it, and torch.save() its state_dict()"
        )
    if "persistent_load of storage" in text:
        return (
            "a module that was saved whole in torch's old format, which keeps source code beside it; "
            "load it where you trust it and torch.save() its state_dict()"
        )
    detail = text[:120] or type(error).__name__
    return f"damaged or cut short at {path.stat().st_size} bytes ({detail}); fetch it again"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. Takes no memory beside the tensor's own."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.linalg.vector_norm(tensor.detach(), math.inf).isfinite())


def check_finite(
    tensors: Mapping[str, torch.Tensor | None], what: str, remedy: str = "fetch the weights again"
) -> None:
    """Weights that are not finite give no score, make no release, and nothing starts from them.

    Args:
        what: the weights, as the error begins.
    Raises: UserError naming the first tensor that holds NaN or infinity.
    """
    broken = next((name for name, tensor in tensors.items() if tensor is not None and not is_finite(tensor)), None)
    if broken is not None:
        raise UserError(f"{what}: tensor {str(broken)[:80]} holds values that are not finite; {remedy}")


# --------------------------------------------------------------------------- tensors under other names

# Keys under which training scripts put the weights into their checkpoint. The first that is there is taken, so an
# average ("teacher") wins over what it averages.
CONTAINERS = ("state_dict", "teacher", "model", "module")
# What wrappers of a module put into the names of its tensors: data parallelism and Lightning before all of them,
# torch.compile, FSDP and activation checkpointing before those of any part.
_BEFORE_ALL = ("module.", "model.")
_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def tensors_of_checkpoint(content: dict, containers: tuple[str, ...] = CONTAINERS) -> dict[str, torch.Tensor]:
    """The tensors of a file, or of the network that a training checkpoint holds among other things, under the names
    that the network's own state has.

    A container may hold another one, as {"model": {"module": ...}} does.
    """
    held = opened(content, containers)
    return without_wrappers(
        {name: tensor for name, tensor in held.items() if isinstance(tensor, torch.Tensor) and isinstance(name, str)}
    )


def opened(content: dict, containers: tuple[str, ...] = CONTAINERS) -> dict:
    """What lies in the innermost of the containers of a checkpoint; the checkpoint itself where it has none."""
    # A pickle may hold a dictionary that holds itself.
    seen: set[int] = set()
    while id(content) not in seen:
        seen.add(id(content))
        content = next((content[key] for key in containers if isinstance(content.get(key), dict)), content)
    return content


def without_wrappers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors without the parts of their names that wrappers of the module have added.

    A name that another tensor has already stays as it is, to be refused where it has no place.
    """
    before = ""
    while wrapper := next((word for word in (*_BEFORE_ALL, *_ANYWHERE) if _all_begin(tensors, before + word)), ""):
        before += wrapper
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix(before)
        for part in _ANYWHERE:
            plain = plain.replace(part, "")
        found[name if plain in found else plain] = tensor
    return found


def _all_begin(tensors: dict[str, torch.Tensor], prefix: str) -> bool:
    return bool(tensors) and all(name.startswith(prefix) and name != prefix for name in tensors)


def size_of(tensors: dict, name: str, dimension: int) -> int:
    """One size of a tensor's shape.

    Raises: UserError if the tensor is not there or has no such dimension.
    """
    tensor = tensors.get(name)
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"tensor {name} is missing; fetch the file again, or give one of another tokenizer")
    if tensor.dim() <= dimension or tensor.numel() == 0:
        raise UserError(f"tensor {name} has shape {tuple(tensor.shape)}, which is no layer's; fetch the file again")
    return tensor.shape[dimension]


def count_of(tensors: dict, pattern: str, *, first: int) -> int:
    """How many of the names that `pattern` gives for first, first + 1, ... exist without a gap.

    At least 1, so that the caller names the first one where it is missing.
    """
    number = 1
    while pattern.format(first + number) in tensors:
        number += 1
    return number


def rename_tensors(
    tensors: dict, names: dict[str, tuple[str, ...]], expected: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A float32 state dict in our names from a file's tensors, all of which must be used.

    Args:
        names: ours -> the file's; several are concatenated along the first dimension.
        expected: tensors of the right shapes in our names, on any device; those that `names` does not have are left to
            the caller.
    Raises: UserError if a tensor is missing, left over, not of floats, not finite, or of another shape.
    """
    taken = {theirs for parts in names.values() for theirs in parts}
    missing, left_over = sorted(taken - tensors.keys()), sorted(map(str, tensors.keys() - taken))
    if missing:
        raise UserError(f"tensor {missing[0]} is missing ({len(missing)} in all); fetch the file again")
    if left_over:
        raise UserError(
            f"tensor {short(left_over[0])} has no place in the network that the other shapes describe "
            f"({len(left_over)} in all); give an unchanged released file"
        )
    renamed = {}
    for ours, parts in names.items():
        first, *others = expected[ours].shape
        wanted = (first // len(parts), *others)
        renamed[ours] = torch.cat([_float32(theirs, tensors[theirs], wanted) for theirs in parts])
    return renamed


def _float32(name: str, tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
    ):
        raise UserError(
            f"{short(name)} is "
            f"{tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__}, no tensor of "
            "floats; fetch the file again"
        )
    if tensor.shape != shape:
        raise UserError(
            f"tensor {name} has shape {tuple(tensor.shape)}, the other shapes ask for {shape}; give an "
            "unchanged released file"
        )
    # After the cast: a float64 may be too large for it.
    values = tensor.float()
    if not is_finite(values):
        raise UserError(f"tensor {name} holds values that are not finite; fetch the file again")
    return values


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a .safetensors file that names this package as its maker (`made_here`).

    Raises: OSError, also where safetensors reports one of the system's as its own.
    """
    try:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        # Readers of Hugging Face's ask for the format.
        save_file(contiguous, path, metadata={"format": "pt", MADE_BY: PACKAGE})
        _sort_metadata(path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    # safetensors makes the file readable by its owner only; a release is for others too.
    path.chmod(0o644)


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in an order of chance; equal tensors are to give equal files."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same words in another order"
        file.seek(8)
        file.write(text.ljust(size))


def save_pickle(content, file: BinaryIO) -> None:
    """torch.save into an open file.

    Raises: OSError where the system takes no more; torch's own writer hides it behind a RuntimeError.
    """
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def made_here(path: Path) -> bool:
    """Whether a .safetensors file was written by `save_tensors`."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(MADE_BY) == PACKAGE
    except (SafetensorError, OSError):
        return False


def weights_fingerprint(settings: dict, tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over the settings' canonical JSON and every tensor's name, dtype, shape and bytes, by sorted name.

    Args:
        settings: as they are recorded, so that a default added later changes no old fingerprint.
        tensors: on the CPU.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
