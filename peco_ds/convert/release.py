"""Write a release folder: weights, the target library's config, and a model card that states the weights' origin."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from peco_ds.errors import UserError
from peco_ds.models.beit_weights import JUDGE_LICENCE, TOKENIZER_LICENCE, BeitWeights
from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD, read_json, write_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
# Keys of config.json that distinguish the releases of timm, transformers and unilm.
_TELLING = {"architecture", "model_type", "layout"}
_WEIGHTS_OF_ANY = (WEIGHTS, "mim_head.safetensors", "model.pth", "pytorch_model.bin", "preprocessor_config.json")


@dataclass(frozen=True)
class Release:
    """Weights in the names and files of one library."""

    # The library's name in the front matter of a model card, as model hubs spell it.
    library: str
    # File name -> tensors: .safetensors, or .pth, which holds them under "model".
    tensors: dict[str, dict[str, torch.Tensor]]
    # File name -> JSON; config.json is among them.
    configs: dict[str, dict]
    # Markdown: how to load it, and what each file is for.
    usage: str


def write_release(out: Path, release: Release, weights: BeitWeights) -> None:
    """Write the release of a network of ours, as `write_files`."""
    write_files(out, release, model_card(release, weights))


def write_files(out: Path, release: Release, card: str) -> None:
    """Write weights, card and configs; config.json last, so a folder with one is whole.

    Raises: UserError if the folder holds a file of a release of another kind, which a reader would take along.
    """
    foreign = [
        name
        for name in _WEIGHTS_OF_ANY
        if (out / name).exists() and name not in release.tensors.keys() | release.configs.keys()
    ]
    if foreign:
        raise UserError(f"{out}: holds {foreign[0]} of another release; give an empty folder")
    try:
        standing = read_json(out / CONFIG) if (out / CONFIG).is_file() else release.configs[CONFIG]
    except ValueError:
        standing = None
    if not isinstance(standing, dict) or standing.keys() & _TELLING != release.configs[CONFIG].keys() & _TELLING:
        raise UserError(f"{out}: holds a release for another library; give an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).unlink(missing_ok=True)
    for name, tensors in release.tensors.items():
        temporary = out / f".{name}.{os.getpid()}.tmp"
        if name.endswith(".safetensors"):
            save_file(
                {key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata={"format": "pt"}
            )
            # safetensors makes the file readable by its owner only; a release is for others too.
            temporary.chmod(0o644)
        else:
            torch.save({"model": {key: _alone(tensor) for key, tensor in tensors.items()}}, temporary)
        os.replace(temporary, out / name)
    (out / CARD).write_text(card)
    for name in sorted(release.configs, key=lambda name: name == CONFIG):
        write_json(out / name, release.configs[name])


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a storage of its own.

    A part of a larger tensor, as ZeRO's consolidated weights are, would take the whole into the file.
    """
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return (tensor if whole else tensor.clone(memory_format=torch.contiguous_format)).detach()


_WHAT = {
    "mim": "Vision transformer, pre-trained to predict the codes of masked patches (BEiT, arXiv "
    "2106.08254, and its successors PeCo, mc-BEiT, BEiT v2), no classifier.",
    "features": "Pre-trained vision transformer of the BEiT family (arXiv 2106.08254), no head.",
    "classifier": "Vision transformer of the BEiT family (arXiv 2106.08254), fine-tuned to classify.",
}


def model_card(release: Release, weights: BeitWeights) -> str:
    """Markdown with the front matter that model hubs read."""
    model = weights.model
    facts = {"weights": weights.source}
    facts["backbone"] = (
        f"ViT, width {model.width}, depth {model.depth}, {model.heads} heads, patch {model.patch_px} "
        f"at {model.image_px} px"
    )
    if weights.kind == "classifier":
        facts["classes"] = (
            f"{weights.num_classes}, {'named in ' + CONFIG if weights.classes else 'names not recorded'}; "
            f"{weights.pooling} pooling"
        )
    table = "\n".join(f"| {name} | {text} |" for name, text in (facts | weights.facts).items())
    statistics = (
        "ImageNet mean and standard deviation"
        if (weights.mean, weights.std) == (IMAGENET_MEAN, IMAGENET_STD)
        else f"mean {list(weights.mean)}, standard deviation {list(weights.std)}"
    )
    tag = "image-classification" if weights.kind == "classifier" else "image-feature-extraction"
    return f"""---
library_name: {release.library}
tags:
- {tag}
- {release.library}
license: other
---
# {weights.facts.get("recipe", weights.source)}

{_WHAT[weights.kind]}

| | |
|---|---|
{table}

{release.usage}

Input: {model.image_px} px, RGB, {statistics}; in evaluation {weights.crop:g} of the resized image's side is seen.

{licence_of(weights.facts)}
"""


def licence_of(facts: dict[str, str]) -> str:
    """The terms that bind the weights, as far as this run, or the one that it started from, recorded them."""
    named = {"the tokenizer": TOKENIZER_LICENCE, "the tokenizer's judge": JUDGE_LICENCE}
    known = {what: facts.get(fact) or facts.get(f"{fact} of what it started from") for what, fact in named.items()}
    terms = "\n".join(f"- {what}: {text}" for what, text in known.items() if text)
    if not terms:
        return (
            "Licence: to be stated by whoever publishes these weights. It is bound by the terms of the images and of "
            "the tokenizer's judge, if it had one\n(the weights that MoCo v3 released are CC BY-NC 4.0)."
        )
    return (
        "Licence: to be stated by whoever publishes these weights. It is bound by the terms of the "
        f"images, and of the networks that it was trained with:\n\n{terms}"
    )
