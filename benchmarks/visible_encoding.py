"""What does an encoder that sees the visible patches alone save? FLOPs and training steps of visible against full
encoding, at the same size, by turns.

    python benchmarks/visible_encoding.py [--rounds 10] [--record benchmarks/visible_encoding_HARDWARE_YYYYMM.md]
    [key.sub=value ...]

Both models are the recipe's (ViT-H/14 with 75 % of the patches masked), apart from `encoding.kind`; they predict the
codes of the same patches. A step is forward
pass, cross-entropy, backward pass and AdamW on one device, without DeepSpeed, on drawn images: values do not matter
to the time. Both models take a step in each round, in turning order; two rounds before the first are not counted. A
machine without the memory or the patience for the whole model takes fewer
blocks of it, in encoder and decoder alike: model.depth=4 encoding.decoder_depth=1 run.micro_batch=2 run.precision=fp32.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from peco_ds.command_line import Parser, run


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", default="peco_vith14_visible", help="with encoding.kind visible (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=10, help="steps of each model that are counted (default: %(default)s)"
    )
    parser.add_argument("--record", type=Path, help="also write the table to this file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="settings of the recipe; run.micro_batch images a step, in run.precision",
    )
    args = parser.parse_args(argv)
    text = record(args, *measure(args))
    sys.stdout.write(text)
    if args.record:
        args.record.write_text(text)
    return 0


def measure(args: argparse.Namespace):
    """The recipe, and what both models cost by name."""
    from step_time import step_costs

    from peco_ds.config import PretrainRecipe
    from peco_ds.errors import UserError
    from peco_ds.recipe_files import load_recipe

    recipe = load_recipe(PretrainRecipe, args.recipe, args.overrides).recipe
    if recipe.encoding.kind != "visible":
        raise UserError(
            f"recipe {args.recipe}: encoding.kind is {recipe.encoding.kind}, there is nothing to compare; "
            "set encoding.kind=visible"
        )
    whole = replace(recipe, encoding=replace(recipe.encoding, kind="full"))
    return recipe, step_costs({"full": whole, "visible": recipe}, rounds=args.rounds)


def record(args: argparse.Namespace, recipe, models: dict) -> str:
    """The table, as markdown."""
    import torch

    batch, full, visible = recipe.run.micro_batch, models["full"], models["visible"]
    cuda = torch.cuda.is_available()
    rows = [
        (
            "parameters, M",
            *(f"{model.parameters / 1e6:.1f}" for model in (full, visible)),
            f"{visible.parameters / full.parameters:.3f}",
        ),
        (
            "GFLOP an image, forward and backward (planner)",
            *(f"{model.flops_per_image / 1e9:.1f}" for model in (full, visible)),
            f"{visible.flops_per_image / full.flops_per_image:.3f}",
        ),
        timed(f"step of {batch} images, s", full.seconds, visible.seconds),
        (
            "images/s",
            *(f"{model.images_per_s:.2f}" for model in (full, visible)),
            f"{visible.images_per_s / full.images_per_s:.2f}",
        ),
        (
            "TFLOP a second",
            *(f"{model.flops_per_image * model.images_per_s / 1e12:.3g}" for model in (full, visible)),
            "",
        ),
    ]
    if cuda:
        rows.append(
            (
                "memory of a step beyond the state, GiB",
                *(f"{model.peak_bytes / 2**30:.2f}" for model in (full, visible)),
                f"{visible.peak_bytes / full.peak_bytes:.3f}",
            )
        )
    else:
        rows.insert(3, timed("the same in CPU seconds", full.cpu_seconds, visible.cpu_seconds))
    model, encoding = recipe.model, recipe.encoding
    command = " ".join(
        [
            "python benchmarks/visible_encoding.py",
            f"--recipe {args.recipe}",
            f"--rounds {args.rounds}",
            *map(shlex.quote, args.overrides),
        ]
    )
    hardware = (
        torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} of them used"
    )
    return "\n".join(
        [
            "# Visible against full encoding",
            "",
            f"`{command}`: ViT of width {model.width}, depth {model.depth}, patch {model.patch_px} at "
            f"{model.image_px} px; {recipe.mask.count} of {model.grid**2} patches masked; decoder of "
            f"width {encoding.decoder_width}, depth {encoding.decoder_depth}; {recipe.run.precision}, "
            f"activation checkpointing {recipe.run.activation_checkpointing}. Forward pass, "
            "cross-entropy, "
            f"backward pass and AdamW; one step of each by turns, medians of {args.rounds} (smallest to "
            "largest; of the ratio, over rounds).",
            "",
            "| | full | visible | visible / full |",
            "|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"{hardware}; torch {torch.__version__}; {time.strftime('%B %Y')}.",
            "",
        ]
    )


def timed(what: str, full: list[float], visible: list[float]) -> tuple[str, ...]:
    """A row of medians, each with its spread; of the ratio, over rounds."""
    ratios = [ours / theirs for ours, theirs in zip(visible, full)]
    medians = (statistics.median(full), statistics.median(visible))
    values = (*medians, medians[1] / medians[0])
    return (
        what,
        *(
            f"{value:.3f} ({min(spread):.2f} to {max(spread):.2f})"
            for value, spread in zip(values, (full, visible, ratios))
        ),
    )


if __name__ == "__main__":
    run(main)
