"""Write a release folder: weights, the target library's config, and a model card that states the weights' origin."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peco_ds.errors import UserError
from peco_ds.models.beit_weights import JUDGE_LICENCE, TOKENIZER_LICENCE, BeitWeights
from peco_ds.models.weight_files import check_finite, save_pickle, save_tensors
from peco_ds.own_files import MADE_BY, PACKAGE, Own, refuse_foreign, written_whole
from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD, json_text, read_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
# Keys of config.json that distinguish the releases of timm, transformers and unilm.
_TELLING = {"architecture", "model_type", "layout"}
_WEIGHTS_OF_ANY = (WEIGHTS, "mim_head.safetensors", "model.pth", "pytorch_model.bin", "preprocessor_config.json")
_WORDS_OF_OLD = (
    "Licence: to be stated by whoever publishes these weights.",
    "Made by `python -m peco_ds.import_judge ",
)


@dataclass(frozen=True)
class Release:
    """Weights in the names and files of one library."""

    # The library's name in the front matter of a model card, as model hubs spell it.
    library: str
    # File name -> tensors: .safetensors, or .pth, which holds them under `container`.
    tensors: dict[str, dict[str, torch.Tensor]]
    # File name -> JSON; config.json is among them.
    configs: dict[str, dict]
    # Markdown: how to load it, and what each file is for.
    usage: str
    container: str = "model"
    # What a .pth holds beside its tensors: plain numbers, texts and lists.
    pickled: dict = field(default_factory=dict)
    # File name -> text.
    texts: dict[str, str] = field(default_factory=dict)


def write_release(out: Path, release: Release, weights: BeitWeights) -> None:
    """Write the release of a network of ours, as `write_files`."""
    write_files(out, release, model_card(release, weights))


def write_files(out: Path, release: Release, card: str) -> None:
    """Write weights, card and configs; config.json last, so a folder with one is whole.

    Everything is on disk under temporary names before a standing file is touched. The card takes its name first: it
    records which files are the release's, and a later one replaces no others.

    Raises: UserError if the folder holds a file of a release of another kind, which a reader would take along, or one
        that no release of ours wrote, or a tensor is not finite; OSError that names the file.
    """
    names = {CARD, *release.tensors, *release.configs, *release.texts}
    for name, tensors in release.tensors.items():
        check_finite(tensors, f"no release in {out}: {name}", "give the weights of an earlier checkpoint")
    _refuse_other_release(out, release)
    refuse_foreign_files(out, names)
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        # Names are taken in the reverse order of these blocks.
        with ExitStack() as drafts:

            def draft(name: str) -> Path:
                return drafts.enter_context(written_whole(out / name))

            for name in sorted(release.configs, key=lambda name: name != CONFIG):
                draft(name).write_text(json_text(release.configs[name]), encoding="utf-8")
            for name, text in release.texts.items():
                draft(name).write_text(text, encoding="utf-8")
            for name, tensors in release.tensors.items():
                _write_tensors(draft(name), tensors, release, safe=name.endswith(".safetensors"))
            draft(CARD).write_text(card + _record(names), encoding="utf-8", errors="backslashreplace")
            refuse_foreign_files(out, names)
            (out / CONFIG).unlink(missing_ok=True)
    except BaseException:
        # An empty folder of ours is left by nobody.
        if is_new and not any(out.iterdir()):
            out.rmdir()
        raise


def _refuse_other_release(out: Path, release: Release) -> None:
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


def refuse_foreign_files(out: Path, names: Iterable[str]) -> None:
    """Raises: UserError if one of these files stands in the folder and no card of ours records it."""
    if os.path.lexists(out) and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder")
    recorded = _recorded_files(out / CARD)
    own = Own("a conversion or import", lambda path: path.name in recorded)
    for name in sorted(names):
        refuse_foreign(out / name, own, remedy="give an empty folder")


def _record(names: Iterable[str]) -> str:
    """The last line of a card, which is not shown: the files of its release."""
    return f"\n<!-- {MADE_BY} {PACKAGE}: {' '.join(sorted(names))} -->\n"


def _recorded_files(card: Path) -> frozenset[str]:
    """The files that the release of a standing card wrote; none where it is no card of ours."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return frozenset()
    found = re.search(rf"<!-- {MADE_BY} {PACKAGE}: (.*) -->\s*$", text)
    if found:
        return frozenset(found[1].split())
    # Cards of before there was a record are known by their sentences.
    return frozenset({CARD, CONFIG, *_WEIGHTS_OF_ANY}) if any(words in text for words in _WORDS_OF_OLD) else frozenset()


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], release: Release, *, safe: bool) -> None:
    if safe:
        save_tensors(tensors, path)
        return
    with open(path, "wb") as file:
        held = {key: _alone(tensor) for key, tensor in tensors.items()}
        save_pickle({**release.pickled, release.container: held}, file)


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
