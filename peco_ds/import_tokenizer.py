"""Import a tokenizer that others released: its official files -> a tokenizer release of this package.

tokenize_shards.py, pretrain.py and evaluate.py read such releases.

    python -m peco_ds.import_tokenizer encoder.pkl decoder.pkl --out data/dalle_tokenizer

FILE is DALL-E's encoder.pkl, with its decoder.pkl where reconstructions are wanted (BEiT's tokenizer), a last.ckpt of
taming-transformers (VQGAN f16; VQGAN f8 with Gumbel-softmax, mc-BEiT's tokenizer), or a VQ-KD file of unilm (BEiT
v2's). Pickles are read without running anything in them.
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
from peco_ds.registry import TOKENIZERS
from peco_ds.user_paths import check_can_make


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0], epilog="exit codes: 0 done, 2 bad input (one line says what)")
    parser.add_argument(
        "files",
        type=user_path,
        nargs="+",
        metavar="FILE",
        help="released file; DALL-E's tokenizer has two, of which encoder.pkl is enough for codes",
    )
    parser.add_argument(
        "--out",
        type=user_path,
        required=True,
        metavar="FOLDER",
        help="folder to write; a recipe names it as data.tokenizer",
    )
    parser.add_argument(
        "--kind",
        choices=["auto", *sorted(name for name, kind in TOKENIZERS.items() if kind.release is not None)],
        default="auto",
        help="what FILE must be (default: what it is)",
    )
    return import_tokenizer(parser.parse_args(argv))


def import_tokenizer(args: argparse.Namespace) -> int:
    from peco_ds.models.published_tokenizers import read_published
    from peco_ds.models.tokenizers import refuse_foreign_release, save_tokenizer

    check_can_make("--out", args.out)
    refuse_foreign_release(args.out)
    found = read_published(args.files, args.kind)
    settings = found.settings
    refuse_occupied(args.out, found.facts)
    fingerprint = save_tokenizer(args.out, found.state_dict, settings, found.facts)
    parameters = sum(tensor.numel() for tensor in found.state_dict.values())
    line = (
        f"{args.out}: {settings.kind} tokenizer, {settings.num_codes} codes, stride "
        f"{settings.stride_px} px, {parameters / 1e6:.1f} M numbers, fingerprint {fingerprint[:12]}"
    )
    notes = [f"licence: {found.facts['licence']} ({found.facts['origin']})"]
    if "judge_licence" in found.facts:
        notes.append(f"trained with {found.facts['judge']}, licence: {found.facts['judge_licence']}")
    if found.left_out:
        notes.append(f"{found.left_out} tensors left out that only its training needs")
    if not settings.decoder:
        notes.append("without decoder.pkl it makes no images")
    sys.stdout.write("; ".join([line, *notes]) + "\n")
    return EXIT_DONE


def refuse_occupied(out: Path, facts: dict) -> None:
    """Raises: UserError if --out holds anything but a release of the same files: token shards may be tied to it."""
    from peco_ds.models.tokenizers import CARD_NAME, TENSORS_NAME, read_card

    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    foreign = [
        name for name in names if name not in (CARD_NAME, TENSORS_NAME) and not name.startswith(f".{TENSORS_NAME}")
    ]
    if foreign:
        raise UserError(
            f"--out {out}: holds {foreign[0]}, which is no part of a tokenizer release; give an empty folder"
        )
    if CARD_NAME in names and read_card(out).extra.get("files") != facts["files"]:
        raise UserError(f"--out {out}: holds the release of another tokenizer; give an empty folder")


if __name__ == "__main__":
    run(main)
