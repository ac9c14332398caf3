"""The tokenizers by kind, and the release of one on disk: `tokenizer.safetensors` and `tokenizer.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from peco_ds.config import TokenizerSettings
from peco_ds.errors import UserError
from peco_ds.models.image_tokenizer import ImageTokenizer
from peco_ds.models.weight_files import check_finite, made_here, save_tensors, weights_fingerprint
from peco_ds.own_files import Own, refuse_foreign, written_whole
from peco_ds.recipe_checks import check_tokenizer_settings
from peco_ds.registry import TOKENIZERS
from peco_ds.schema import read_json, short, write_json

RELEASE_VERSION = 1
TENSORS_NAME = "tokenizer.safetensors"
CARD_NAME = "tokenizer.json"
# Names the file format, whatever settings.kind says of the network.
KIND = "peco_tokenizer"
_MAKERS = "train_tokenizer.py or import_tokenizer.py"
REMEDY = "make it again with train_tokenizer.py or copy it again"


def _is_card(path: Path) -> bool:
    raw = read_json(path)
    return isinstance(raw, dict) and raw.get("kind") == KIND


_OWN_CARD = Own(_MAKERS, _is_card)


def build_tokenizer(settings: TokenizerSettings, *, seed: int = 0) -> ImageTokenizer:
    """A tokenizer with fresh weights from torch's generator.

    `seed` decides at which encoder outputs dead codes restart.
    """
    return TOKENIZERS[settings.kind].network(settings, seed=seed)


# ------------------------------------------------------------------------------------- release on disk


@dataclass(frozen=True)
class TokenizerCard:
    """What a release says about itself. Token shards are tied to `fingerprint`."""

    fingerprint: str
    settings: TokenizerSettings
    num_codes: int
    stride_px: int
    # Facts of the training, as `save_tokenizer` was given them.
    extra: dict


def save_tokenizer(
    folder: str | Path, state_dict: dict[str, torch.Tensor], settings: TokenizerSettings, extra: dict
) -> str:
    """Write a release: `tokenizer.safetensors` and `tokenizer.json`.

    Args:
        state_dict: of a tokenizer of these settings, whole tensors, on any device.
        extra: JSON-able facts of the training.
    Returns: the fingerprint.
    The card is the last file to appear and the first to go, so a folder with a card holds a whole release.
    """
    with torch.device("meta"):
        expected = build_tokenizer(settings).state_dict()
    assert state_dict.keys() == expected.keys(), (
        f"not a tokenizer's state: {sorted(state_dict.keys() ^ expected.keys())[:5]}"
    )
    folder = Path(folder)
    check_finite(state_dict, f"no release in {folder}", "give the weights of an earlier step")
    refuse_foreign_release(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    described = json.loads(json.dumps(asdict(settings)))
    # A kind without options of its own keeps the fingerprint that it had before there were any.
    if not settings.options:
        del described["options"]
    fingerprint = weights_fingerprint(described, tensors)
    card = {
        "kind": KIND,
        "format_version": RELEASE_VERSION,
        "fingerprint": fingerprint,
        "num_codes": settings.num_codes,
        "stride_px": settings.stride_px,
        "input_range": [-1, 1],
        "settings": described,
        "extra": extra,
    }
    with written_whole(folder / TENSORS_NAME) as temporary:
        save_tensors(tensors, temporary)
        # Between the two no card vouches for tensors that are not its own.
        (folder / CARD_NAME).unlink(missing_ok=True)
    write_json(folder / CARD_NAME, card)
    return fingerprint


def refuse_foreign_release(folder: Path) -> None:
    """Raises: UserError if a release in this folder would replace a file that this package has not written there."""
    tensors, card = folder / TENSORS_NAME, folder / CARD_NAME
    remedy = "give another folder, or move it away"
    refuse_foreign(card, _OWN_CARD, remedy=remedy)
    # Releases of before tensors named their maker are known by the card beside them.
    refuse_foreign(tensors, Own(_MAKERS, lambda path: card.is_file() or made_here(path)), remedy=remedy)


def read_card(folder: str | Path) -> TokenizerCard:
    """What a release says about itself, without reading its tensors.

    `load_tokenizer` verifies that they are the ones it names.

    Raises: UserError if the folder or one of its files is missing, or the card is not one.
    """
    return _read_card(Path(folder))[0]


def load_tokenizer(folder: str | Path) -> tuple[ImageTokenizer, TokenizerCard]:
    """Read and verify a release: the tokenizer on the CPU in float32 and eval mode, and its card.

    Raises: UserError if the folder or a file is missing, a file is not what its name says, a tensor is missing or
        unexpected or of another shape, or any byte of settings and tensors differs from what the fingerprint was taken
        over.
    """
    folder = Path(folder)
    card, described = _read_card(folder)
    path = folder / TENSORS_NAME
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); {REMEDY}") from None
    asked = TOKENIZERS[card.settings.kind].tensors(card.settings)
    if asked > len(tensors):
        raise UserError(f"{path}: {len(tensors)} tensors, the settings ask for {asked} blocks; {REMEDY}")
    try:
        # Damaged settings may ask for more memory than there is.
        with torch.device("meta"):
            expected = build_tokenizer(card.settings).state_dict()
    except (RuntimeError, ValueError, TypeError) as error:  # TypeError: a size of more than 64 bits
        raise UserError(
            f"{folder / CARD_NAME}: its settings give no network ({' '.join(str(error).split())[:120]}); {REMEDY}"
        ) from None
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise UserError(f"{path}: tensor {name} is missing; {REMEDY}")
        if name not in expected:
            raise UserError(f"{path}: unexpected tensor {name}; {REMEDY}")
        if tensors[name].shape != expected[name].shape:
            found, wanted = tuple(tensors[name].shape), tuple(expected[name].shape)
            raise UserError(f"{path}: tensor {name} has shape {found}, the settings ask for {wanted}; {REMEDY}")
        if tensors[name].is_floating_point() != expected[name].is_floating_point():
            raise UserError(
                f"{path}: tensor {name} is {tensors[name].dtype}, the settings ask for {expected[name].dtype}; {REMEDY}"
            )
    fingerprint = weights_fingerprint(described, tensors)
    if fingerprint != card.fingerprint:
        raise UserError(
            f"{folder}: fingerprint {fingerprint[:12]} is not the card's {card.fingerprint[:12]}, so a "
            f"file was changed; {REMEDY}"
        )
    check_finite(tensors, str(path), REMEDY)
    tokenizer = build_tokenizer(card.settings)
    tokenizer.load_state_dict(tensors)
    return tokenizer.eval(), card


def _read_card(folder: Path) -> tuple[TokenizerCard, dict]:
    """The card, and its settings as they stand in the file."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such tokenizer folder; make one with train_tokenizer.py or "
            "import_tokenizer.py, or correct data.tokenizer (relative paths lie under data.root)"
        )
    for name in (CARD_NAME, TENSORS_NAME):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: holds no {name}, so it is no whole tokenizer release; {REMEDY}")
    path = folder / CARD_NAME
    try:
        raw = read_json(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); {REMEDY}") from None
    if not isinstance(raw, dict) or raw.get("kind") != KIND or raw.get("format_version") != RELEASE_VERSION:
        raise UserError(f"{path}: describes no {KIND} release of format version {RELEASE_VERSION}; {REMEDY}")
    try:
        settings = TypeAdapter(TokenizerSettings).validate_python(raw.get("settings"))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: settings.{'.'.join(map(str, first['loc']))}: {first['msg']}; {REMEDY}") from None
    try:
        check_tokenizer_settings(settings, "settings")
    except UserError as error:
        raise UserError(f"{path}: {error}; {REMEDY}") from None
    fingerprint, extra = raw.get("fingerprint"), raw.get("extra", {})
    if not isinstance(fingerprint, str) or not isinstance(extra, dict):
        raise UserError(f"{path}: fingerprint is no text, or extra no object; {REMEDY}")
    for name in ("num_codes", "stride_px"):
        if raw.get(name) != getattr(settings, name):
            raise UserError(
                f"{path}: {name} is {short(raw.get(name))}, its settings give {getattr(settings, name)}; {REMEDY}"
            )
    return TokenizerCard(fingerprint, settings, settings.num_codes, settings.stride_px, extra), raw["settings"]
