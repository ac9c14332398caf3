"""Read tokenizers from the files in which others released them: recognised by tensor names, nothing in them is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from peco_ds.config import TokenizerSettings
from peco_ds.errors import UserError
from peco_ds.models.dalle_tokenizer import read_dvae
from peco_ds.models.taming_layout import read_gumbel, read_vqgan
from peco_ds.models.vqkd_tokenizer import LEFT_BEHIND, read_vqkd
from peco_ds.models.weight_files import read_tensor_file, size_of
from peco_ds.schema import sha256_of_file

# The classes that released files hold beside tensors: DALL-E's hold whole modules, Lightning's checkpoints the callback
# that wrote them and its best score.
_OBJECTS = frozenset(
    [
        f"dall_e.{name}"
        for name in (
            "encoder.Encoder",
            "encoder.EncoderBlock",
            "decoder.Decoder",
            "decoder.DecoderBlock",
            "utils.Conv2d",
        )
    ]
    + [
        f"torch.nn.modules.{name}"
        for name in (
            "container.Sequential",
            "activation.ReLU",
            "pooling.MaxPool2d",
            "upsampling.Upsample",
            "linear.Identity",
        )
    ]
    + [
        f"pytorch_lightning.callbacks.{name}"
        for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")
    ]
    + ["numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"]
)


@dataclass(frozen=True)
class Layout:
    """How a kind of tokenizer was released.

    Args:
        signs: names of tensors that are all there in a file of this kind, and not in one of another.
        read: the file's tensors -> settings and a state dict of our tokenizer.
        licence: of the weights, as `origin` states it.
        judge: what the tokenizer learnt from, as text values for its card: judge and judge_licence.
        left_out: beginnings of the names of tensors that only its training needs.
    """

    signs: tuple[str, ...]
    read: Callable[[dict], tuple[TokenizerSettings, dict[str, torch.Tensor]]]
    origin: str
    licence: str
    judge: Callable[[TokenizerSettings], dict[str, str]]
    left_out: tuple[str, ...] = ()


def _none(settings: TokenizerSettings) -> dict[str, str]:
    return {"judge": "none"}


def _lpips(settings: TokenizerSettings) -> dict[str, str]:
    return {"judge": "LPIPS on VGG16", "judge_licence": "BSD-2-Clause (LPIPS's release)"}


def _teacher(settings: TokenizerSettings) -> dict[str, str]:
    """The one of BEiT v2's teachers that has features of this width; no file names its own."""
    width = settings.vit.target_width
    known = {
        512: ("CLIP ViT-B/16", "MIT (OpenAI's release of CLIP)"),
        768: ("DINO ViT-B/16", "Apache-2.0 (DINO's release)"),
    }
    if width not in known:
        return {
            "judge": f"a teacher of width {width} that the file does not name",
            "judge_licence": "unknown, as its teacher is",
        }
    name, licence = known[width]
    return {"judge": f"most likely {name}, by its width of {width}", "judge_licence": licence}


LAYOUTS = {
    "dvae": Layout(
        ("blocks.input.w", "blocks.output.conv.w"), read_dvae, "github.com/openai/DALL-E", "MIT, modified", _none
    ),
    "vqgan": Layout(
        ("quantize.embedding.weight", "encoder.conv_in.weight"),
        read_vqgan,
        "github.com/CompVis/taming-transformers",
        "MIT",
        _lpips,
        ("loss.",),
    ),
    "gumbel": Layout(
        ("quantize.proj.weight", "quantize.embed.weight"),
        read_gumbel,
        "github.com/CompVis/taming-transformers",
        "MIT",
        _lpips,
        ("loss.",),
    ),
    "vqkd": Layout(
        ("quantize.embedding.weight", "encoder.patch_embed.proj.weight"),
        read_vqkd,
        "github.com/microsoft/unilm, beit2",
        "MIT",
        _teacher,
        LEFT_BEHIND,
    ),
}


@dataclass(frozen=True)
class PublishedTokenizer:
    settings: TokenizerSettings
    # The float32 state of the tokenizer that these settings build.
    state_dict: dict[str, torch.Tensor]
    # The number of tensors that were left out because only training needs them.
    left_out: int
    # For the release's card.
    facts: dict


def read_published(paths: list[Path], kind: str = "auto") -> PublishedTokenizer:
    """The tokenizer in one released file, or in two: DALL-E's encoder.pkl and decoder.pkl, in any order, or its
    encoder.pkl alone.

    Args:
        kind: of LAYOUTS, which it then must be; auto: the one whose tensors are in the file.
    Raises: UserError if a file is missing, damaged, would run code, or holds no tokenizer of this kind, or if the files
        do not belong together.
    """
    read = [(path, *_recognised(path)) for path in paths]
    for path, found, _ in read:
        if found != (read[0][1] if kind == "auto" else kind):
            wanted = f"{paths[0]} of a {read[0][1]} tokenizer" if kind == "auto" else f"--kind {kind} asks for another"
            raise UserError(f"{path}: tensors of a {found} tokenizer, {wanted}; give the files of one tokenizer")
    found = read[0][1]
    layout, tensors = LAYOUTS[found], read[0][2]
    if found == "dvae":
        tensors = _both_sides([(path, held) for path, _, held in read])
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
    content = read_tensor_file(path, objects=_OBJECTS)
    held = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    tensors = {name: value for name, value in held.items() if isinstance(name, str)}
    for kind, layout in LAYOUTS.items():
        if all(isinstance(tensors.get(sign), torch.Tensor) for sign in layout.signs):
            return kind, tensors
    raise UserError(
        f"{path}: no tokenizer's tensors among its {len(tensors)} entries; give DALL-E's encoder.pkl, "
        "taming-transformers' last.ckpt or unilm's VQ-KD file"
    )


def _both_sides(files: list[tuple[Path, dict]]) -> dict:
    """Tensors of DALL-E's files, with the side before their names: both files have the same ones, but only the encoder
    begins with a wide convolution.
    """
    sides: dict[str, Path] = {}
    tensors = {}
    for path, held in files:
        try:
            side = "encoder" if size_of(held, "blocks.input.w", 3) > 1 else "decoder"
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if side in sides:
            raise UserError(f"{path}: DALL-E's {side}, as {sides[side]} is; give encoder.pkl and decoder.pkl")
        sides[side] = path
        tensors |= {f"{side}.{name}": tensor for name, tensor in held.items()}
    if "encoder" not in sides:
        raise UserError(f"{files[0][0]}: DALL-E's decoder alone, which makes no codes; give encoder.pkl too")
    return tensors
