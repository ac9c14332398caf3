"""The same masked pre-training step here, in Hugging Face transformers and in timm: images/s as ratios, and
memory.

    python benchmarks/peers.py [--gpu] [--record FILE.md] [--plot FILE.png] [--budget_s 300] [key.sub=value ...]

All start from the same weights and take the same images, masks, codes, loss (cross-entropy at the masked patches),
AdamW and clipping:

ours          the recipe's model in the peers' own loop; and through DeepSpeed, as pretrain.py trains it
Hugging Face  BeitForMaskedImageModeling with its own loss, SDPA or its eager attention
timm          timm's Beit with a shared bias table, with the mask token and the linear head over hidden positions that
its user would write

First each library computes loss and gradient norm in float32 on weights that went through this package's converters
(stochastic depth off, at most four blocks); where they differ no table is printed. Then they take turns, a few at a
time together with the reference (the first row), since not all fit into memory; a ratio is over the turns that both
took. The loss of each trainer's first step, in the precision that is timed, must be the reference's too, or its row
has no figures. Stochastic depth is off unless model.drop_path is set: it is random, and the losses of first steps could
not be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from record import at_least, require_gpu

from peco_ds.command_line import Parser, run

GPU_SIZES = {
    "H/14 at 224": ("peco_vith14", "run.micro_batch=32"),
    "L/16 at 224": ("peco_vitl16", "run.micro_batch=128"),
    "B/16 at 224": ("peco_vitb16", "run.micro_batch=256"),
    "H/14 at 448": ("peco_vith14", "run.micro_batch=16 model.image_px=448 views.tokenizer_px=512 mask.count=392"),
}
CPU_SIZES = {"B/16 at 224": ("peco_vitb16", "run.micro_batch=8 run.precision=fp32")}
CHECKED_BLOCKS, CHECKED_IMAGES = 4, 2
# Relative, float32. On a CPU differences are about 1e-7; a bias table that is not taken up shows as 1e-2, one block's
# query bias as 1e-4 and 1e-3.
LIBRARY_TOLERANCE = {
    "loss": 1e-4,
    "gradient norm": 1e-3,
    "gradient norm of the bias table": 1e-3,
    "gradient norm of the patch embedding": 1e-3,
}
FIRST_STEP_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}  # relative, of the loss
# Added to all weights: at their initial values the bias table is zero and layer scale hides the blocks, so that a wrong
# one would not show.
NOISE, TABLE_NOISE = 0.05, 1.0
# in the names of all three libraries
TABLE, PATCH_EMBEDDING = "relative_position_bias_table", "patch_embed"
PACKAGES = ("deepspeed", "timm", "transformers")


@dataclass(frozen=True)
class Contender:
    """A row.

    Precision: fp32; bf16: 16-bit weights, sums and moments; autocast: 32-bit ones, 16-bit products; master: 16-bit
    weights under 32-bit ones.
    """

    library: str  # ours, Hugging Face, timm
    precision: str
    compiled: bool = False
    attention: str = "SDPA"
    zero: str = ""

    @property
    def label(self) -> str:
        parts = [
            self.library,
            *([f"DeepSpeed ZeRO-{self.zero}"] if self.zero else []),
            *(["eager attention"] if self.attention == "eager" else []),
        ]
        return ", ".join(
            [
                *parts,
                "compiled" if self.compiled else "eager",
                *([PRECISIONS[self.precision]] if self.precision != "fp32" else []),
            ]
        )


PRECISIONS = {"bf16": "bf16 weights", "autocast": "fp32 weights, bf16 autocast", "master": "bf16 weights, fp32 master"}
OURS, HF, TIMM = "ours", "Hugging Face", "timm"
CPU_CONTENDERS = [
    Contender(OURS, "fp32"),
    Contender(HF, "fp32"),
    Contender(TIMM, "fp32"),
    Contender(OURS, "fp32", compiled=True),
    Contender(HF, "fp32", compiled=True),
    Contender(TIMM, "fp32", compiled=True),
    Contender(OURS, "fp32", zero="1"),
    Contender(OURS, "fp32", compiled=True, zero="1"),
    Contender(OURS, "fp32", compiled=True, zero="3"),
    Contender(HF, "fp32", attention="eager"),
]
GPU_CONTENDERS = [
    Contender(OURS, "bf16"),
    Contender(OURS, "bf16", compiled=True),
    Contender(HF, "bf16"),
    Contender(TIMM, "bf16"),
    Contender(OURS, "master", compiled=True, zero="1"),
    Contender(TIMM, "autocast"),
    Contender(HF, "autocast"),
    Contender(TIMM, "bf16", compiled=True),
    Contender(HF, "bf16", compiled=True),
    Contender(OURS, "master", compiled=True, zero="3"),
    Contender(OURS, "autocast", compiled=True),
    Contender(TIMM, "autocast", compiled=True),
    Contender(HF, "autocast", compiled=True),
    Contender(HF, "bf16", attention="eager"),
]


@dataclass
class Result:
    """Of a contender at one size; `ratios` and `seconds` have an entry a turn."""

    contender: Contender
    seconds: list[float] = field(default_factory=list)
    # images/s over the reference's of the same turn
    ratios: list[float] = field(default_factory=list)
    cpu_ratios: list[float] = field(default_factory=list)  # the same in CPU time
    kept_bytes: int = 0  # by the forward pass
    # of a step at its worst moment beyond weights and moments; 0 on a CPU
    step_bytes: int = 0
    state_bytes: int = 0  # weights and moments; 0 on a CPU
    first_s: float = 0.0
    failure: str = ""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


class LossesDiffer(Exception):
    """The libraries do not compute the same, so their speeds must not stand side by side."""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpu", action="store_true", help="B/16, L/16, H/14 at 224 and H/14 at 448 in bf16; without it B/16 in fp32"
    )
    parser.add_argument(
        "--sizes", metavar="SIZE,SIZE", help=f"of {', '.join(GPU_SIZES)} (default: all; without --gpu B/16 at 224)"
    )
    parser.add_argument(
        "--without",
        metavar="TEXT",
        action="append",
        default=[],
        help="leave out rows whose name holds this, such as compiled or DeepSpeed; may be given again; "
        "the first row stays",
    )
    parser.add_argument(
        "--rounds", type=at_least(1), default=7, help="turns of each that are counted (default: %(default)s)"
    )
    parser.add_argument("--steps", type=at_least(1), help="of a turn (default: 3 with --gpu, else 1)")
    parser.add_argument(
        "--at_once",
        type=at_least(2),
        default=3,
        help="trainers in memory together, the reference among them (default: %(default)s)",
    )
    parser.add_argument(
        "--budget_s",
        type=float,
        default=float("inf"),
        help="no group of trainers is begun later than this (default: no limit)",
    )
    parser.add_argument("--record", type=Path, help="also write the tables to this file, anew after every group")
    parser.add_argument("--plot", type=Path, help="also draw the ratios into this PNG")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings over every size's recipe")
    args = parser.parse_intermixed_args(argv)
    comparison = Comparison(
        args, shlex.join(["python", "benchmarks/peers.py", *(sys.argv[1:] if argv is None else argv)])
    )
    try:
        comparison.measure()
    except LossesDiffer as error:
        sys.stderr.write(f"error: {error}; no table, because it would compare different computations\n")
        return 1
    sys.stdout.write(f"{comparison.body()}\n")
    return 1 if comparison.broken() else 0


class Comparison:
    """The sizes, one after another, and the record as it grows."""

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        from step_time import chosen

        from peco_ds.errors import UserError

        self.args, self.command = args, command
        known = GPU_SIZES if args.gpu else CPU_SIZES
        self.recipes = {
            size: resolved(*known[size], args.overrides)
            for size in (chosen("sizes", args.sizes, known) if args.sizes else known)
        }
        self.steps = args.steps or (3 if args.gpu else 1)
        self.has_hf = importlib.util.find_spec("transformers") is not None
        reference, *others = GPU_CONTENDERS if args.gpu else CPU_CONTENDERS
        idle = next(
            (text for text in args.without if not any(text in contender.label for contender in (reference, *others))),
            None,
        )
        if idle is not None:
            raise UserError(
                f"--without {idle}: in no row's name; the rows: "
                f"{'; '.join(contender.label for contender in (reference, *others))}"
            )
        unwanted = args.without + ([] if self.has_hf else [HF])
        self.contenders = [reference, *(other for other in others if not any(text in other.label for text in unwanted))]
        self.results: dict[str, list[Result]] = {}
        self.checked: dict[str, str] = {}
        self.left = 0

    def measure(self) -> None:
        from step import own_signals

        from peco_ds.runtime.distributed import start_world

        if self.args.gpu:
            require_gpu()
        begun = time.monotonic()
        own_signals(start_world)
        for size, recipe in self.recipes.items():
            weights, reference = None, Result(self.contenders[0])
            others, apart = self.contenders[1:], self.args.at_once - 1
            for group in [others[first : first + apart] for first in range(0, len(others), apart)]:
                if time.monotonic() - begun > self.args.budget_s:
                    self.left += len(group)
                    continue
                if weights is None:
                    self.checked[size] = check_libraries(recipe, self.libraries())
                    weights = drawn_weights(recipe)
                    self.results[size] = [reference]
                self.results[size] += measure_group(
                    recipe, weights, reference, group, rounds=self.args.rounds, steps=self.steps
                )
                self.flush()
                sys.stderr.write(
                    f"{size}: {', '.join(contender.label for contender in group)} done after "
                    f"{time.monotonic() - begun:.0f} s\n"
                )

    def libraries(self) -> list[Contender]:
        """One contender of each library and kind of attention, in float32."""
        return list(
            dict.fromkeys(
                Contender(contender.library, "fp32", attention=contender.attention) for contender in self.contenders
            )
        )

    def broken(self) -> list[Result]:
        from step_time import OUT_OF_MEMORY

        return [
            result
            for results in self.results.values()
            for result in results
            if result.failure and result.failure != OUT_OF_MEMORY
        ]

    def flush(self) -> None:
        if self.args.record:
            from record import write_record

            write_record(
                self.args.record,
                "One pre-training step, and the same in Hugging Face and timm",
                self.command,
                self.body(),
                *PACKAGES,
            )
        if self.args.plot:
            from plots import ratio_bars

            panels = {
                size: [
                    (done.contender.label, done.ratio, min(done.ratios), max(done.ratios)) for done in measured(results)
                ]
                for size, results in self.results.items()
            }
            ratio_bars(self.args.plot, f"images/s over those of: {self.contenders[0].label}", panels)

    def body(self) -> str:
        parts = [
            f"Turns of {self.steps} steps, {self.args.rounds} of each, {self.args.at_once} trainers in "
            "memory at a time; medians (smallest to largest). Ratios are images/s "
            "over the reference's, the first row's, of the same turns."
        ]
        if not self.has_hf:
            parts.append("transformers is not installed here: no rows of Hugging Face.")
        if any(contender.precision == "bf16" for contender in self.contenders):
            parts.append(
                "Rows are alike where the precision is. bf16 weights alone are the simplest form and lose "
                "small updates; a run through DeepSpeed keeps 32-bit weights and moments, "
                "as fp32 weights under autocast do, so those two belong together."
            )
        for size, results in self.results.items():
            recipe = self.recipes[size]
            parts += [
                f"## {size}, {recipe.run.micro_batch} images a step, {recipe.run.precision}",
                self.checked[size],
                table(results, recipe.run.micro_batch),
            ]
            parts.append("\n".join(f"- {line}" for line in verdicts(results)))
        if self.left:
            parts.append(f"{self.left} rows were not begun within {self.args.budget_s:g} s.")
        return "\n\n".join(part for part in parts if part)


def resolved(name: str, own: str, overrides: list[str]):
    """The recipe of a size.

    Raises: UserError for what the peers have no counterpart of.
    """
    from peco_ds.config import PretrainRecipe
    from peco_ds.errors import UserError
    from peco_ds.recipe_files import load_recipe

    recipe = load_recipe(PretrainRecipe, name, ["model.drop_path=0", *own.split(), *overrides]).recipe
    alike = (
        recipe.encoding.kind == "full"
        and not recipe.aggregation.early_block
        and recipe.objective.name == "hard_tokens"
        and recipe.mask.exact
    )
    if not alike:
        raise UserError(
            "transformers and timm have BEiT's own step alone; leave encoding, aggregation, "
            "objective.name and mask.exact as they are"
        )
    if recipe.run.precision == "fp16":
        raise UserError("run.precision fp16: a loss scale would be compared too; use bf16 or fp32")
    return replace(recipe, run=replace(recipe.run, global_batch=recipe.run.micro_batch))


# ------------------------------------------------------------------------------------------ the models


def drawn_weights(recipe) -> dict:
    """State of our model, float32 on the device, every value moved off where it starts."""
    import torch
    from step_time import build_model, this_device

    model = build_model(recipe, this_device())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=TABLE_NOISE if name.endswith(TABLE) else NOISE)
    return model.state_dict()


def canonical(recipe, weights: dict):
    from peco_ds.models.beit_weights import BeitWeights

    return BeitWeights(
        "mim", recipe.model, {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}, "drawn"
    )


def our_loss(recipe, weights: dict, batch, contender: Contender):
    """Model, and a function that gives its loss on the batch; compiled as a run compiles it."""
    from step_time import build_model

    from peco_ds.models.vit import TransformerBlock
    from peco_ds.objectives import build_objective
    from peco_ds.runtime.engine import compile_each

    model, objective = build_model(recipe, batch.images_norm.device), build_objective(recipe.objective)
    model.load_state_dict(weights)
    if contender.compiled:
        compile_each(model, (TransformerBlock,))
    return model, lambda: objective(model(batch.images_norm, batch.masked), batch.targets)[0]


def hugging_face_loss(recipe, weights: dict, batch, contender: Contender):
    """Its own loss: it picks the logits of masked patches by a boolean mask."""
    import torch
    from transformers import BeitConfig, BeitForMaskedImageModeling
    from transformers.utils import logging

    from peco_ds.convert.release import CONFIG, WEIGHTS
    from peco_ds.convert.to_hf import to_hf

    logging.disable_progress_bar()
    release = to_hf(canonical(recipe, weights))
    config = BeitConfig.from_dict(release.configs[CONFIG] | {"drop_path_rate": recipe.model.drop_path})
    implementation = "eager" if contender.attention == "eager" else "sdpa"
    # a model may keep what it is given, and train it
    tensors = {name: tensor.to("cpu", copy=True) for name, tensor in release.tensors[WEIGHTS].items()}
    model = BeitForMaskedImageModeling.from_pretrained(
        None, config=config, state_dict=tensors, attn_implementation=implementation
    ).float()
    model = model.to(batch.images_norm.device).train()
    net = torch.compile(model) if contender.compiled else model
    hidden, codes = masked_patches(batch, recipe.model.grid**2), batch.targets.codes.flatten()
    return (
        model,
        lambda: (
            net(
                pixel_values=batch.images_norm.to(next(model.parameters()).dtype), bool_masked_pos=hidden, labels=codes
            ).loss
        ),
    )


def timm_loss(recipe, weights: dict, batch, contender: Contender):
    """What a user of timm's Beit would add to it: a mask token, and a head at the masked patches."""
    import torch
    import torch.nn.functional as F
    from timm.models.beit import Beit

    from peco_ds.models.vit import timm_arguments

    class MaskedBeit(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Beit(**timm_arguments(recipe.model))
            self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, recipe.model.width))
            self.lm_head = torch.nn.Linear(recipe.model.width, recipe.objective.num_codes)

        def forward(self, images, hidden, masked):
            backbone = self.backbone
            x = backbone.patch_embed(images)
            x = torch.where(hidden.unsqueeze(-1), self.mask_token.to(x.dtype), x)
            x = torch.cat([backbone.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
            bias = backbone.rel_pos_bias()
            for block in backbone.blocks:
                x = block(x, shared_rel_pos_bias=bias)
            x = backbone.norm(x)[:, 1:]
            return self.lm_head(x.gather(1, masked.unsqueeze(-1).expand(-1, -1, x.shape[-1])))

    with torch.device(batch.images_norm.device):
        model = MaskedBeit()
    model.load_state_dict(weights)
    model.train()
    net = torch.compile(model) if contender.compiled else model
    hidden, codes = masked_patches(batch, recipe.model.grid**2), batch.targets.codes.flatten()
    return model, lambda: F.cross_entropy(
        net(batch.images_norm.to(model.mask_token.dtype), hidden, batch.masked).flatten(0, 1).float(), codes
    )


LIBRARIES: dict[str, Callable] = {OURS: our_loss, HF: hugging_face_loss, TIMM: timm_loss}


def masked_patches(batch, patches: int):
    """bool [B, N]."""
    import torch

    return torch.zeros(len(batch.masked), patches, dtype=torch.bool, device=batch.masked.device).scatter_(
        1, batch.masked, True
    )


# ----------------------------------------------------------------------------------- the same function


def check_libraries(recipe, libraries: list[Contender]) -> str:
    """One line: by how much losses and gradient norms differ, float32, on a few images through a few blocks of this
    size.

    Raises: LossesDiffer.
    """
    import torch
    from step_time import drawn_batch, free_memory, this_device

    small = replace(
        recipe,
        model=replace(recipe.model, depth=min(recipe.model.depth, CHECKED_BLOCKS), drop_path=0.0),
        run=replace(recipe.run, micro_batch=CHECKED_IMAGES),
    )
    weights, batch = drawn_weights(small), drawn_batch(small, this_device())
    found: dict[str, dict[str, float]] = {}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for contender in libraries:
            model, loss_of = LIBRARIES[contender.library](small, weights, batch, contender)
            loss = loss_of()
            loss.backward()
            gradients = [
                {name: p.grad for name, p in model.named_parameters() if p.grad is not None and of in name}
                for of in ("", TABLE, PATCH_EMBEDDING)
            ]
            found[contender.label] = dict(
                zip(
                    LIBRARY_TOLERANCE,
                    [loss.item(), *(torch.nn.utils.get_total_norm(list(some.values())).item() for some in gradients)],
                )
            )
            del model, loss_of, loss
            free_memory()
    return (
        "The same function, float32, "
        + compare(found, LIBRARY_TOLERANCE)
        + f" ({small.model.depth} blocks, {CHECKED_IMAGES} images)."
    )


def compare(found: dict[str, dict[str, float]], tolerance: dict[str, float]) -> str:
    """Largest relative difference of each figure from the first contender's, as text.

    Args:
        found: figures by contender.
    Raises: LossesDiffer naming both where one is beyond the tolerance, or no number.
    """
    (first, expected), *others = found.items()
    worst = dict.fromkeys(expected, 0.0)
    for label, figures in others:
        for name, value in figures.items():
            apart = abs(value - expected[name]) / abs(expected[name])
            if not apart <= tolerance[name]:
                raise LossesDiffer(f"{name} of {first} is {expected[name]:.6g}, of {label} {value:.6g}")
            worst[name] = max(worst[name], apart)
    return ", ".join(f"{name} {expected[name]:.6g} within {difference:.1g} of it" for name, difference in worst.items())


# ----------------------------------------------------------------------------------------------- turns


class BareTrainer:
    """Forward pass, backward pass, clipping, AdamW, in the dtypes that the contender names."""

    def __init__(self, recipe, weights: dict, contender: Contender) -> None:
        import torch
        from step_time import drawn_batch, this_device

        from peco_ds.runtime.optim import build_optimizer, decay_groups

        device = this_device()
        self.model, self.loss_of = LIBRARIES[contender.library](recipe, weights, drawn_batch(recipe, device), contender)
        if contender.precision == "bf16":
            self.model.to(torch.bfloat16)
        self.autocast = (
            (lambda: torch.autocast(device.type, torch.bfloat16))
            if contender.precision == "autocast"
            else contextlib.nullcontext
        )
        self.optimizer = build_optimizer(
            decay_groups(self.model, recipe.optim.weight_decay), recipe.optim, offloaded=False
        )
        self.clip_norm = recipe.optim.clip_norm
        self.first_loss = None

    def forward(self):
        with self.autocast():
            return self.loss_of()

    def learn(self, loss) -> None:
        import torch

        loss.backward()
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        loss = self.forward()
        self.learn(loss)
        self.first_loss = loss.detach() if self.first_loss is None else self.first_loss

    def close(self) -> None:
        self.model = self.loss_of = self.optimizer = None


class DeepSpeedTrainer:
    """The same through the engine, as pretrain.py steps."""

    def __init__(self, recipe, weights: dict, contender: Contender) -> None:
        from step import EngineTrainer
        from step_time import this_device

        asked = replace(recipe, run=replace(recipe.run, compile="blocks" if contender.compiled else "none"))
        self.trainer = EngineTrainer(asked, contender.zero, this_device(), weights)
        self.forward, self.learn, self.close = self.trainer.forward, self.trainer.learn, self.trainer.close
        self.first_loss = None

    def step(self) -> None:
        loss = self.trainer.step()
        self.first_loss = loss if self.first_loss is None else self.first_loss


def measure_group(
    recipe, weights: dict, reference: Result, group: list[Contender], *, rounds: int, steps: int
) -> list[Result]:
    """Turns of the reference and some others, whose results are returned; the reference's own is added to."""
    from step import NOTHING_COMPILED, compiler_facts, fresh_compiler
    from step_time import Turns, free_memory, reason

    # Rates of a warm-up's start: the weights are noise, and must not run away to where products are not numbers.
    recipe = replace(recipe, optim=replace(recipe.optim, lr=1e-6))
    fresh_compiler()
    results = {contender.label: Result(contender) for contender in group}
    every = {reference.contender.label: reference, **results}
    trainers: dict[str, BareTrainer | DeepSpeedTrainer] = {}
    for label, result in every.items():
        try:
            trainers[label] = (DeepSpeedTrainer if result.contender.zero else BareTrainer)(
                recipe, weights, result.contender
            )
        except Exception as error:
            # a library that cannot do a row must not cost the others theirs
            result.failure = reason(error)
            del error
            free_memory()
    turns = Turns(
        {label: trainer.step for label, trainer in trainers.items()},
        steps_a_turn=steps,
        give_up=lambda label: trainers.pop(label).close(),
    )
    turns.run(rounds)
    if not compiler_facts()[0]:
        turns.failed |= {
            label: NOTHING_COMPILED
            for label in turns.seconds
            if every[label].contender.compiled and label not in turns.failed
        }
    if reference.contender.label in trainers and not recipe.model.drop_path:
        turns.failed |= other_losses(
            {label: trainer.first_loss.float().item() for label, trainer in trainers.items()},
            FIRST_STEP_TOLERANCE[recipe.run.precision],
        )
    base, base_cpu = (seconds.get(reference.contender.label, []) for seconds in (turns.seconds, turns.cpu_seconds))
    for label, result in every.items():
        result.failure = turns.failed.get(label, result.failure)
        if not result.failure:
            result.seconds += turns.seconds[label]
            result.ratios += [theirs / own for theirs, own in zip(base, turns.seconds[label])]
            result.cpu_ratios += [theirs / own for theirs, own in zip(base_cpu, turns.cpu_seconds[label])]
            result.first_s = max(result.first_s, turns.first_s[label])
    for label, trainer in trainers.items():
        if not every[label].failure:
            measure_memory(every[label], trainer)
    turns.steps.clear()
    for label, trainer in trainers.items():
        before = allocated()
        trainer.close()
        free_memory()
        every[label].state_bytes = before - allocated()
    return list(results.values())


def other_losses(first_losses: dict[str, float], tolerance: float) -> dict[str, str]:
    """Of those whose first loss is not the first one's: what to say in the place of figures."""
    (_, expected), *others = first_losses.items()
    return {
        label: f"its first loss is {loss:.5g}, the reference's {expected:.5g}"
        for label, loss in others
        if not abs(loss - expected) <= tolerance * abs(expected)
    }


def measure_memory(result: Result, trainer) -> None:
    from step_time import free_memory, reason, step_memory

    try:
        result.kept_bytes, result.step_bytes = step_memory(trainer.forward, trainer.learn)
    except Exception as error:
        result.failure = reason(error)
        del error
        free_memory()


def allocated() -> int:
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


# ---------------------------------------------------------------------------------- what is said of it


def measured(results: list[Result]) -> list[Result]:
    return [result for result in results if result.ratios and not result.failure]


def table(results: list[Result], batch: int) -> str:
    on_gpu = any(result.step_bytes for result in results)
    heads = [
        "",
        "ratio",
        *([] if on_gpu else ["ratio in CPU time"]),
        "images/s",
        "s a step",
        "activations an image, MB",
    ]
    heads += [*(["step, GiB", "weights and moments, GiB"] if on_gpu else []), "first step, s"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for result in results:
        cells = [result.contender.label]
        if result.failure:
            cells += [result.failure, *[""] * (len(heads) - 2)]
        else:
            middle = statistics.median(result.seconds)
            compared = [result.ratios] if on_gpu else [result.ratios, result.cpu_ratios]
            cells += [
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})" if ratios else ""
                for ratios in compared
            ]
            cells += [
                f"{batch / middle:.4g}",
                f"{middle:.4g} ({min(result.seconds):.4g} to {max(result.seconds):.4g})",
                f"{result.kept_bytes / batch / 1e6:.1f}",
            ]
            cells += [f"{result.step_bytes / 2**30:.1f}", f"{result.state_bytes / 2**30:.1f}"] if on_gpu else []
            cells.append(f"{result.first_s:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(results: list[Result]) -> list[str]:
    """Ours against the fastest peer of the same precision: eager against eager peers, compiled against all.

    And through DeepSpeed, whose weights in 32 bits have
    their like in autocast's."""
    done, lines = measured(results), []
    for mine in (result for result in done if result.contender.library == OURS):
        own = mine.contender
        like = "autocast" if own.precision == "master" else own.precision
        rivals = [
            rival
            for rival in done
            if rival.contender.library != OURS
            and rival.contender.precision == like
            and (own.compiled or not rival.contender.compiled)
        ]
        if rivals:
            fastest = max(rivals, key=lambda rival: rival.ratio)
            which = f"of the {len(rivals)} measured peers" + ("" if own.compiled else " that are not compiled")
            spread = f"{mine.ratio / max(fastest.ratios):.2f} to {mine.ratio / min(fastest.ratios):.2f} over its turns"
            lines.append(
                f"{own.label}: {mine.ratio / fastest.ratio:.2f} times the fastest {which} "
                f"({fastest.contender.label}; {spread})"
            )
    return lines


if __name__ == "__main__":
    run(main)
