"""What a table of PeCo's paper at small scale is given: image sets, and networks that judge."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from peco_ds.data.image_folders import image_files
from peco_ds.data.image_formats import IMAGE_SUFFIXES, suffix_of
from peco_ds.errors import UserError
from peco_ds.schema import write_json

SPLITS = ("train", "val")
# how --judge begins for a control
UNTRAINED = "random:"


# ------------------------------------------------------------------------------------------------- images


def count_images(images: Path, option: str = "--images") -> dict[str, int]:
    """Images of each split, before anything is unpacked.

    Args:
        images: a folder with train/ and val/, or a tar of one.
    Raises: UserError if it is neither.
    """
    if images.is_dir():
        names: Iterable[str] = image_files(images)
    else:
        try:
            with tarfile.open(images) as tar:
                names = [member.name for member in tar if member.isfile() and suffix_of(member.name) in IMAGE_SUFFIXES]
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{option} {images}: neither a folder nor a tar ({error}); correct the path") from None
    found = dict.fromkeys(SPLITS, 0)
    for name in names:
        split = next((part for part in Path(name).parts[:2] if part in SPLITS), None)
        if split:
            found[split] += 1
    if not all(found.values()):
        raise UserError(
            f"{option} {images}: {found['train']} images in train/ and {found['val']} in val/; give a folder, or a tar "
            "of one, that holds both, each with a folder a class"
        )
    return found


def unpack(tar_file: Path, out: Path) -> Path:
    """The folder with train/ and val/ that a tar holds, whole or absent."""
    return folder_of(unpack_all(tar_file, out))


def unpack_all(tar_file: Path, out: Path) -> Path:
    """A tar's members in `out`, which is whole or absent."""
    if not out.exists():
        part = out.with_name(f"{out.name}.part")
        with tarfile.open(tar_file) as tar:
            tar.extractall(part, filter="data")
        part.rename(out)
    return out


def folder_of(out: Path) -> Path:
    """Where in an unpacked tar train/ and val/ lie."""
    return next(folder for folder in (out, *sorted(out.iterdir())) if (folder / "train").is_dir())


@dataclass(frozen=True)
class LabelledSet:
    """Images of this run.

    Args:
        images: folder with train/ and val/, or a tar of one.
        ending: of the names of its folders in OUT and of its steps; "": the set that is trained on.
    """

    images: Path
    ending: str = ""

    @property
    def title(self) -> str:
        return self.ending.lstrip("_")


# ------------------------------------------------------------------------------------------------- judges


@dataclass(frozen=True)
class GivenJudge:
    """A frozen network for the perceptual loss.

    Args:
        label: for the table.
        settings: over the tokenizer's recipe.
    """

    name: str
    label: str
    settings: tuple[str, ...]


def given_judge(text: str, *own: str, out: Path) -> GivenJudge:
    """--judge FILE_OR_FOLDER[:NAME] [key=value ...], NAME being timm's; random:NAME: a control that was never trained.

    Args:
        own: settings of its arms alone, perceptual.blocks=[4,6,8,10] for one.
        out: for the file of a control.
    Raises: UserError if there is no such file, or no network can be read from it.
    """
    from peco_ds.models.feature_nets import load_feature_net
    from peco_ds.registry import FEATURE_NETS, family_of

    for setting in own:
        if not setting.startswith("perceptual."):
            raise UserError(f"--judge {text} {setting}: a judge's own settings are perceptual.key=value; others: --set")
    if text.startswith(UNTRAINED):
        text = untrained(text.removeprefix(UNTRAINED), out)
    path, _, named = (text, "", "") if Path(text).exists() else text.rpartition(":")
    if not path or not Path(path).exists():
        raise UserError(f"--judge {text}: no such file or folder; give weights, or weights:NAME with timm's name")
    weights, architecture = str(Path(path).resolve()), named or "auto"
    network = load_feature_net(weights, architecture)
    # a convolutional network is asked after all of its stages
    is_vit = family_of(weights, architecture) is FEATURE_NETS["vit"]
    blocks = quarters(network.depth) if is_vit else []
    settings = [f"perceptual.weights={weights}", f"perceptual.blocks={as_list(blocks)}"]
    settings += [f"perceptual.architecture={named}"] if named else []
    return GivenJudge(as_name(named or Path(path).name), network.description, (*settings, *own))


def untrained(name: str, out: Path) -> str:
    """File with the random weights of a network of timm's, always the same ones.

    Raises: UserError for a name that timm has not.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    folder = out / f"untrained_{as_name(name)}"
    if not (folder / "config.json").exists():
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                network = timm.create_model(name, num_classes=0)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"--judge {UNTRAINED}{name}: timm makes no network of it ({error})") from None
        folder.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), folder / "model.safetensors")
        config = {"architecture": name, "num_classes": 0, "pretrained_cfg": {**network.pretrained_cfg, "tag": "random"}}
        write_json(folder / "config.json", config)
    return str(folder)


def as_name(text: str) -> str:
    """For files and steps."""
    return "".join(letter if letter.isalnum() else "_" for letter in text)


def quarters(depth: int) -> list[int]:
    """Blocks after every quarter of a ViT, as the paper's 3, 6, 9, 12 of 12."""
    return sorted({max(1, round(depth * quarter / 4)) for quarter in range(1, 5)})


def as_list(values: Iterable) -> str:
    return f"[{','.join(map(str, values))}]"
