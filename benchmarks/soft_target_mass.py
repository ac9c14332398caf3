"""How much of a tokenizer's softmax do its k likeliest codes hold, and how far is a target made of them from the whole
one?

    python -m benchmarks.soft_target_mass TOKENIZER --images DATA/images/val --image_px 112 --temperature 4.0

TOKENIZER is a release folder, --images a folder of image shards; what is measured are central squares, bicubic, so a
run's own kept_mass differs a little. To be asked before views.topk of an mc-BEiT run is chosen: the token shards grow
by 4 bytes a soft code.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.record import at_least, benchmark_parser, markdown_table, parse, publish
from benchmarks.step_time import this_device
from peco_ds.command_line import run
from peco_ds.data.central_squares import square_batches
from peco_ds.data.image_set import ImageSet
from peco_ds.errors import UserError
from peco_ds.models.tokenizers import load_tokenizer


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser("soft_target_mass", __doc__)
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER", help="release folder")
    images = "image shards (pack_images.py)"
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help=images)
    parser.add_argument("--image_px", type=int, required=True, help="side of the tokenizer's view")
    temperature = "of the softmax over the tokenizer's logits (default: 4, mc-BEiT's)"
    parser.add_argument("--temperature", type=float, nargs="+", default=[4.0], help=temperature)
    k = "soft codes a patch (default: 8 16 32 64); those beyond the vocabulary are left out"
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16, 32, 64], help=k)
    parser.add_argument("--num_images", type=at_least(1), default=64, help="(default: %(default)s)")
    args = parse(parser, argv, renamed={"--pictures": "--num_images"})
    tokenizer, card = load_tokenizer(args.tokenizer)
    only_px = card.settings.only_px
    if args.image_px % card.stride_px or only_px not in (None, args.image_px):
        asked = f"give a multiple, which has to be {only_px}" if only_px else "give a multiple"
        raise UserError(f"--image_px {args.image_px}: the tokenizer's stride is {card.stride_px} px; {asked}")
    tokenizer.to(this_device())
    pieces = squares(ImageSet(args.images), args.image_px, args.num_images)
    rows = []
    for temperature in args.temperature:
        # All codes, likeliest first: every k is a prefix.
        soft = [tokenizer.tokenize_soft(piece, card.num_codes, temperature=temperature).topk_probs for piece in pieces]
        probs = torch.cat([part.flatten(0, 1).cpu() for part in soft])
        rows += [row(probs, temperature, k) for k in args.k if k < card.num_codes]
    heads = ("temperature", "k", "mass kept, mean", "least 5 %", "total variation, rest renormalized")
    heads += ("rest spread evenly", "perplexity of the whole softmax")
    about = (
        f"{sum(map(len, pieces))} images, {card.num_codes} codes of {args.tokenizer} ({card.settings.kind}, "
        f"{card.fingerprint[:12]})"
    )
    sys.stdout.write(publish(args, "Mass of soft targets", f"{about}\n\n{markdown_table(heads, rows)}"))
    return 0


def squares(images: ImageSet, size_px: int, count: int) -> list[torch.Tensor]:
    """At least `count` images, where there are so many, in batches [b, 3, S, S] of values in [-1, 1]."""
    device, found = this_device(), []
    batches = square_batches(images, rank=0, world_size=1, batch=8, size_px=size_px, num_workers=2, device=device)
    for batch in batches:
        found.append(batch.images_01[batch.samples.to(device) >= 0] * 2 - 1)
        if sum(map(len, found)) >= count:
            break
    return found


def row(probs: torch.Tensor, temperature: float, k: int) -> tuple[str, ...]:
    """Of a softmax [n, V], likeliest code first, cut after k codes."""
    mass, num_codes = probs[:, :k].sum(-1), probs.shape[-1]
    # What is cut from the rest is added to the kept: half the sum of both is what is cut.
    renormalized = 1 - mass
    spread_evenly = ((1 - mass) / (num_codes - k)).unsqueeze(-1)
    spread = 0.5 * (probs[:, k:] - spread_evenly).abs().sum(-1)
    perplexity = torch.special.entr(probs).sum(-1).exp().mean()
    shares = (mass.mean(), mass.quantile(0.05), renormalized.mean(), spread.mean())
    return f"{temperature:g}", f"{k}", *(f"{share:.3f}" for share in shares), f"{perplexity:.0f}"


if __name__ == "__main__":
    run(main)
