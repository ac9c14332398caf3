"""How much of a tokenizer's softmax do its k likeliest codes hold, and how far is a target made of them from the whole
one?

    python benchmarks/soft_target_mass.py TOKENIZER --images DATA/images/val --image_px 112 --temperature 4.0

TOKENIZER is a release folder, DIR a folder of image shards; what is measured are central squares, bicubic, so a run's
own kept_mass differs a little. To be asked before views.topk of an mc-BEiT run is chosen: the token shards grow by 4
bytes a soft code.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peco_ds.command_line import Parser, run
from peco_ds.data.central_squares import square_batches
from peco_ds.data.image_set import ImageSet
from peco_ds.errors import EXIT_DONE, UserError
from peco_ds.models.tokenizers import load_tokenizer


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER", help="release folder")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="image shards (pack_images.py)")
    parser.add_argument("--image_px", type=int, required=True, help="side of the tokenizer's view")
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        default=[4.0],
        help="of the softmax over the tokenizer's logits (default: 4, mc-BEiT's)",
    )
    parser.add_argument(
        "--k",
        type=int,
        nargs="+",
        default=[8, 16, 32, 64],
        help="soft codes a patch (default: 8 16 32 64); those beyond the vocabulary are left out",
    )
    parser.add_argument("--images", type=int, default=64, help="default: %(default)s")
    args = parser.parse_args(argv)
    tokenizer, card = load_tokenizer(args.tokenizer)
    if args.image_px % card.stride_px or card.settings.only_px not in (None, args.image_px):
        raise UserError(
            f"--image_px {args.image_px}: the tokenizer's stride is {card.stride_px} px; give a multiple"
            + (f", which has to be {card.settings.only_px}" if card.settings.only_px else "")
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer.to(device)
    batches = square_batches(
        ImageSet(args.images), rank=0, world_size=1, batch=8, size_px=args.image_px, num_workers=2, device=device
    )
    images, kept = [], 0
    for batch in batches:
        images.append(batch.images_01[batch.samples.to(device) >= 0] * 2 - 1)
        kept += len(images[-1])
        if kept >= args.images:
            break
    sys.stdout.write(
        f"{kept} images, {card.num_codes} codes of {args.tokenizer} ({card.settings.kind}, {card.fingerprint[:12]})\n\n"
    )
    sys.stdout.write(
        "| temperature | k | mass kept, mean | least 5 % | total variation, rest renormalized | rest "
        "spread evenly | perplexity of the whole softmax |\n|---|---|---|---|---|---|---|\n"
    )
    for temperature in args.temperature:
        # All codes, likeliest first: every k is a prefix.
        probs = torch.cat(
            [
                tokenizer.tokenize_soft(piece, card.num_codes, temperature=temperature).topk_probs.flatten(0, 1).cpu()
                for piece in images
            ]
        )
        perplexity = torch.special.entr(probs).sum(-1).exp().mean()
        for k in (k for k in args.k if k < card.num_codes):
            mass = probs[:, :k].sum(-1)
            # what is cut from the rest is added to the kept: half the sum of both
            renormalized = 1 - mass
            spread = 0.5 * (probs[:, k:] - ((1 - mass) / (card.num_codes - k)).unsqueeze(-1)).abs().sum(-1)
            cells = (
                f"{temperature:g} | {k} | {mass.mean():.3f} | {mass.quantile(0.05):.3f} | "
                f"{renormalized.mean():.3f} | {spread.mean():.3f} | {perplexity:.0f}"
            )
            sys.stdout.write(f"| {cells} |\n")
    return EXIT_DONE


if __name__ == "__main__":
    run(main)
