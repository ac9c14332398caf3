"""What does an encoder that sees the shown patches alone save? FLOPs and training steps of visible against full encoding, at the same size, by turns.

    python benchmarks/visible_encoding.py [--rounds 10] [--record benchmarks/visible_encoding_HARDWARE_YYYYMM.md] [key.sub=value ...]

Both models are the recipe's (ViT-H/14 with 75 % of the patches hidden), apart from `encoding.kind`; they predict the codes of the same patches. A step is forward
pass, cross-entropy, backward pass and AdamW on one device, without DeepSpeed, on drawn pictures: values do not matter to the time. Both models take a step in
each round, in turning order; two rounds before the first are not counted. A machine without the memory or the patience for the whole model takes fewer
blocks of it, in encoder and decoder alike: model.depth=4 encoding.decoder_depth=1 run.micro_batch=2 run.precision=fp32.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
WARM_UP = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="peco_vith14_visible", help="with encoding.kind visible (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each model that are counted (default: %(default)s)")
    parser.add_argument("--record", type=Path, help="also write the table to this file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings of the recipe; run.micro_batch pictures a step, in run.precision")
    args = parser.parse_args()
    text = record(args, *measure(args))
    sys.stdout.write(text)
    if args.record:
        args.record.write_text(text)
    return 0


@dataclass
class Trained:
    """A model in training, and what was measured of it."""

    step: object  # () -> None: one training step, done when it returns
    flops: int  # of a picture's forward and backward pass, by the planner
    parameters: int
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads: what other work beside it changes least
    peak_bytes: int = 0  # on the device, beyond weights, gradients and moments; 0 where it is not counted


def measure(args: argparse.Namespace):
    """The recipe, the device, and both models by name."""
    import torch

    from peco_ds.config import PretrainRecipe, load_recipe
    from peco_ds.errors import UserError

    recipe = load_recipe(PretrainRecipe, args.recipe, args.overrides).recipe
    if recipe.encoding.kind != "visible":
        raise UserError(f"recipe {args.recipe}: encoding.kind is {recipe.encoding.kind}, there is nothing to compare; set encoding.kind=visible")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    batch, patches = recipe.run.micro_batch, recipe.model.grid**2
    images = torch.randn(batch, 3, recipe.model.image_px, recipe.model.image_px, device=device)
    masked = torch.stack([torch.randperm(patches)[: recipe.mask.count].sort().values for _ in range(batch)]).to(device)
    codes = torch.randint(recipe.objective.num_codes, masked.shape, device=device)
    whole = replace(recipe, encoding=replace(recipe.encoding, kind="full"))
    models = {name: trained(asked, device, images, masked, codes) for name, asked in (("full", whole), ("visible", recipe))}
    for round_ in range(-WARM_UP, args.rounds):
        for model in list(models.values())[:: 1 if round_ % 2 else -1]:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            began, cpu_began = time.perf_counter(), time.process_time()
            model.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
                model.peak_bytes = torch.cuda.max_memory_allocated() - before
            if round_ >= 0:
                model.seconds.append(time.perf_counter() - began)
                model.cpu_seconds.append(time.process_time() - cpu_began)
    return recipe, device, models


def trained(recipe, device, images, masked, codes) -> Trained:
    import torch

    from peco_ds.models.mim import build_mim
    from peco_ds.objectives.hard_tokens import hard_tokens
    from peco_ds.planner.shapes import mim_macs
    from peco_ds.runtime.optim import build_optimizer, decay_groups

    model = build_mim(recipe.model, recipe.encoding, recipe.aggregation, recipe.objective.num_codes, checkpoint_blocks=recipe.run.activation_checkpointing == "full")
    model.to(device, torch.bfloat16 if recipe.run.precision == "bf16" else torch.float32).train()
    optimizer = build_optimizer(decay_groups(model, recipe.optim.weight_decay), recipe.optim, offloaded=False)

    def step() -> None:
        loss, _ = hard_tokens(model(images, masked), SimpleNamespace(codes=codes))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the gradients' memory is part of the state, not of a step

    macs = mim_macs(recipe.model, num_codes=recipe.objective.num_codes, masked=recipe.mask.count, encoding=recipe.encoding)
    return Trained(step, macs.training_flops, sum(parameter.numel() for parameter in model.parameters()))


def record(args: argparse.Namespace, recipe, device, models: dict[str, Trained]) -> str:
    """The table, as markdown."""
    import torch

    batch, full, visible = recipe.run.micro_batch, models["full"], models["visible"]
    median = {name: statistics.median(model.seconds) for name, model in models.items()}
    rows = [
        ("parameters, M", *(f"{model.parameters / 1e6:.1f}" for model in (full, visible)), f"{visible.parameters / full.parameters:.3f}"),
        ("GFLOP a picture, forward and backward (planner)", *(f"{model.flops / 1e9:.1f}" for model in (full, visible)), f"{visible.flops / full.flops:.3f}"),
        timed(f"step of {batch} pictures, s", full.seconds, visible.seconds),
        ("pictures a second", *(f"{batch / median[name]:.2f}" for name in models), f"{median['full'] / median['visible']:.2f}"),
        ("TFLOP a second", *(f"{model.flops * batch / median[name] / 1e12:.3g}" for name, model in models.items()), ""),
    ]
    if device.type == "cuda":
        rows.append(("memory of a step beyond the state, GiB", *(f"{model.peak_bytes / 2**30:.2f}" for model in (full, visible)), f"{visible.peak_bytes / full.peak_bytes:.3f}"))
    else:
        rows.insert(3, timed("the same in CPU seconds", full.cpu_seconds, visible.cpu_seconds))
    model, encoding = recipe.model, recipe.encoding
    command = " ".join(["python benchmarks/visible_encoding.py", f"--recipe {args.recipe}", f"--rounds {args.rounds}", *map(shlex.quote, args.overrides)])
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} of them used"
    return "\n".join(
        [
            "# Visible against full encoding",
            "",
            f"`{command}`: ViT of width {model.width}, depth {model.depth}, patch {model.patch_px} at {model.image_px} px; {recipe.mask.count} of {model.grid**2} patches hidden; decoder of "
            f"width {encoding.decoder_width}, depth {encoding.decoder_depth}; {recipe.run.precision}, activation checkpointing {recipe.run.activation_checkpointing}. Forward pass, cross-entropy, "
            f"backward pass and AdamW; one step of each by turns, medians of {args.rounds} (smallest to largest; of the ratio, over rounds).",
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
    return (what, *(f"{value:.3f} ({min(spread):.2f} to {max(spread):.2f})" for value, spread in zip(values, (full, visible, ratios))))


if __name__ == "__main__":
    sys.exit(main())
