"""Tokenizers that others released, in the files they released them in: recognised by the names of their tensors, read
without running what is in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from peco_ds.config import TokenizerSettings
from peco_ds.errors import UserError
from peco_ds.models.weight_files import opened, read_tensor_file, without_wrappers
from peco_ds.registry import TOKENIZERS, Release
from peco_ds.schema import sha256_of_file


@dataclass(frozen=True)
class PublishedTokenizer:
    settings: TokenizerSettings
    # State of the tokenizer that these settings build, float32.
    state_dict: dict[str, torch.Tensor]
    # Number of tensors that only training needs.
    left_out: int
    # Facts for the release's card.
    facts: dict


def releases() -> dict[str, Release]:
    """How each kind of tokenizer was released, of those that were."""
    return {name: kind.release for name, kind in TOKENIZERS.items() if kind.release is not None}


def read_published(paths: list[Path], kind: str = "auto") -> PublishedTokenizer:
    """The tokenizer in one released file, or in two: DALL-E's encoder.pkl and decoder.pkl, in any order, or its
    encoder.pkl alone.

    Args:
        kind: of `releases`, which it then must be; auto: the one whose tensors are in the file.
    Raises: UserError if a file is missing, damaged, would run code, or holds no tokenizer of this kind, or if the files
        do not belong together.
    """
    read = [(path, *_recognised(path)) for path in paths]
    for path, found, _ in read:
        if found != (read[0][1] if kind == "auto" else kind):
            wanted = f"{paths[0]} of a {read[0][1]} tokenizer" if kind == "auto" else f"--kind {kind} asks for another"
            raise UserError(f"{path}: tensors of a {found} tokenizer, {wanted}; give the files of one tokenizer")
    found = read[0][1]
    layout, tensors = releases()[found], read[0][2]
    if layout.join is not None:
        tensors = layout.join([(path, held) for path, _, held in read])
    elif len(read) > 1:
        raise UserError(f"{paths[1]}: {paths[0]} is a whole {found} tokenizer already; give one file")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(layout.left_out or "\0")}
    try:
        settings, state_dict = layout.read(kept)
    except UserError as error:
        raise UserError(f"{' and '.join(map(str, paths))}: {error}") from None
    files = sorted([path.name, sha256_of_file(path)] for path in paths)
    facts = {"origin": layout.origin, "licence": layout.licence, "files": files, **layout.judge(settings)}
    return PublishedTokenizer(settings, state_dict, len(tensors) - len(kept), facts)


def _recognised(path: Path) -> tuple[str, dict]:
    """Kind and tensors of a file."""
    known = releases()
    content = read_tensor_file(path, objects=frozenset(name for layout in known.values() for name in layout.objects))
    held = opened(content, ("state_dict", "model", "module"))
    tensors = without_wrappers({name: value for name, value in held.items() if isinstance(name, str)})
    for kind, layout in known.items():
        if all(isinstance(tensors.get(sign), torch.Tensor) for sign in layout.signs):
            return kind, tensors
    *files, last = dict.fromkeys(layout.files for layout in known.values())
    raise UserError(
        f"{path}: no tokenizer's tensors among its {len(tensors)} entries; give {', '.join(files)} or {last}"
    )
