"""What does an encoder that sees the visible patches alone save? FLOPs and training steps of visible against full
encoding, at the same size, by turns.

    python -m benchmarks.visible_encoding [--rounds 10] [--record FILE.md] [key.sub=value ...]

Both models are the recipe's (ViT-H/14 with 75 % of the patches masked), apart from `encoding.kind`; they predict the
codes of the same patches. A step is forward pass, cross-entropy, backward pass and AdamW on one device, without
DeepSpeed, on drawn images: values do not matter to the time. Both models take a step in each round, in turning order;
two rounds before the first are not counted. A machine without the memory or the patience for the whole model takes
fewer blocks of it, in encoder and decoder alike: model.depth=4 encoding.decoder_depth=1 run.micro_batch=2
run.precision=fp32.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from benchmarks.record import at_least, benchmark_parser, markdown_table, parse, publish
from benchmarks.step_time import StepCost, step_costs
from benchmarks.turns import ratios, spread
from peco_ds.command_line import run
from peco_ds.config import PretrainRecipe
from peco_ds.errors import UserError
from peco_ds.recipe_files import load_recipe


def main(argv: list[str] | None = None) -> int:
    overrides = "settings of the recipe; run.micro_batch images a step, in run.precision"
    parser = benchmark_parser("visible_encoding", __doc__, overrides=overrides)
    recipe = "with encoding.kind visible (default: %(default)s)"
    parser.add_argument("--recipe", default="peco_vith14_visible", help=recipe)
    rounds = "steps of each model that are counted (default: %(default)s)"
    parser.add_argument("--rounds", type=at_least(1), default=10, help=rounds)
    args = parse(parser, argv)
    visible = load_recipe(PretrainRecipe, args.recipe, args.overrides).recipe
    if visible.encoding.kind != "visible":
        raise UserError(
            f"recipe {args.recipe}: encoding.kind is {visible.encoding.kind}, there is nothing to compare; "
            "set encoding.kind=visible"
        )
    full = replace(visible, encoding=replace(visible.encoding, kind="full"))
    costs = step_costs({"full": full, "visible": visible}, rounds=args.rounds)
    model, encoding = visible.model, visible.encoding
    about = (
        f"ViT of width {model.width}, depth {model.depth}, patch {model.patch_px} at {model.image_px} px; "
        f"{visible.mask.count} of {model.grid**2} patches masked; decoder of width {encoding.decoder_width}, depth "
        f"{encoding.decoder_depth}; {visible.run.precision}, activation checkpointing "
        f"{visible.run.activation_checkpointing}. Forward pass, cross-entropy, backward pass and AdamW; one step of "
        f"each by turns, medians of {args.rounds} (smallest to largest; of the ratio, over rounds)."
    )
    body = f"{about}\n\n{table(visible.run.micro_batch, costs['full'], costs['visible'])}"
    sys.stdout.write(publish(args, "Visible against full encoding", body))
    return 0


def table(batch: int, full: StepCost, visible: StepCost) -> str:
    def plain(what: str, of_full: float, of_visible: float, form: str, ratio: str = ".3f") -> tuple[str, ...]:
        return what, f"{of_full:{form}}", f"{of_visible:{form}}", f"{of_visible / of_full:{ratio}}"

    def timed(what: str, of_full: list[float], of_visible: list[float]) -> tuple[str, ...]:
        return what, spread(of_full, ".3f"), spread(of_visible, ".3f"), spread(ratios(of_visible, of_full), ".3f")

    giga = [cost.flops_per_image / 1e9 for cost in (full, visible)]
    rows = [
        plain("parameters, M", full.parameters / 1e6, visible.parameters / 1e6, ".1f"),
        plain("GFLOP an image, forward and backward (planner)", *giga, ".1f"),
        timed(f"step of {batch} images, s", full.seconds, visible.seconds),
    ]
    if not full.peak_bytes:
        rows.append(timed("the same in CPU seconds", full.cpu_seconds, visible.cpu_seconds))
    rates = full.images_per_s, visible.images_per_s
    rows.append(plain("images/s", *rates, ".2f", ".2f"))
    rows.append(("TFLOP a second", *(f"{flop * rate / 1e3:.3g}" for flop, rate in zip(giga, rates)), ""))
    if full.peak_bytes:
        peaks = [cost.peak_bytes / 2**30 for cost in (full, visible)]
        rows.append(plain("memory of a step beyond the state, GiB", *peaks, ".2f"))
    return markdown_table(("", "full", "visible", "visible / full"), rows)


if __name__ == "__main__":
    run(main)
