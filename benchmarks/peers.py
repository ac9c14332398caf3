"""The same masked pre-training step here, in Hugging Face transformers and in timm: images/s as ratios, and
memory.

    python -m benchmarks.peers [--gpu] [--record FILE.md] [--plot FILE.png] [--budget_s 300] [key.sub=value ...]

All start from the same weights and take the same images, masks, codes, loss (cross-entropy at the masked patches),
AdamW and clipping:

ours          the recipe's model in the peers' own loop; and through DeepSpeed, as pretrain.py trains it
Hugging Face  BeitForMaskedImageModeling with its own loss, SDPA or its eager attention
timm          timm's Beit with a shared bias table, with the mask token and the linear head over masked positions that
              its user would write

First each library computes loss and gradient norm in float32 on weights that went through this package's converters
(stochastic depth off, at most four blocks); rows of one that fails, or differs from ours, have the reason in the place
of figures. Then they take turns, a few at a
time together with the reference (the first row), since not all fit into memory; a ratio is over the turns that both
took. The loss of each trainer's first step, in the precision that is timed, must be the reference's too, or its row
has no figures. Stochastic depth is off unless model.drop_path is set: it is random, and the losses of first steps could
not be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from benchmarks.engine_step import NOTHING_COMPILED, EngineTrainer, compiler_facts, fresh_compiler, join_alone
from benchmarks.guards import OUT_OF_MEMORY, free_memory, reason
from benchmarks.plots import ratio_bars
from benchmarks.record import at_least, benchmark_parser, chosen, markdown_table, parse, publish
from benchmarks.step_time import (
    DrawnBatch,
    Turns,
    build_model,
    drawn_batch,
    step_memory,
    this_device,
)
from benchmarks.turns import ratios, spread
from peco_ds.command_line import run
from peco_ds.config import PretrainRecipe
from peco_ds.convert.release import CONFIG, WEIGHTS
from peco_ds.convert.to_hf import to_hf
from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.errors import UserError
from peco_ds.models.beit_weights import BeitWeights
from peco_ds.models.vit import TransformerBlock, timm_arguments
from peco_ds.objectives import build_objective
from peco_ds.recipe_files import load_recipe
from peco_ds.runtime.engine import compile_each
from peco_ds.runtime.optim import build_optimizer, decay_groups

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
OURS, HF, TIMM = "ours", "Hugging Face", "timm"
# Beside fp32. bf16: weights, sums and moments too.  master: as the engine keeps them.
PRECISIONS = {"bf16": "bf16 weights", "autocast": "fp32 weights, bf16 autocast", "master": "bf16 weights, fp32 master"}


@dataclass(frozen=True)
class Contender:
    """A row."""

    library: str  # ours, Hugging Face, timm
    precision: str  # fp32, or one of PRECISIONS
    compiled: bool = False
    attention: str = "SDPA"
    zero: str = ""
    # each block by itself, which is compiled once for all: a network of 32 blocks as one takes minutes. Ours always is.
    by_block: bool = False

    @property
    def family(self) -> tuple[str, str]:
        """What computes the same function in every precision."""
        return self.library, self.attention

    @property
    def label(self) -> str:
        parts = [
            self.library,
            f"DeepSpeed ZeRO-{self.zero}" if self.zero else "",
            "eager attention" if self.attention == "eager" else "",
            f"compiled{' by block' if self.by_block else ''}" if self.compiled else "eager",
            PRECISIONS.get(self.precision, ""),
        ]
        return ", ".join(part for part in parts if part)


# the first is the reference
CPU_CONTENDERS = [
    *(Contender(library, "fp32", compiled) for compiled in (False, True) for library in (OURS, HF, TIMM)),
    Contender(OURS, "fp32", zero="1"),
    Contender(OURS, "fp32", compiled=True, zero="1"),
    Contender(OURS, "fp32", compiled=True, zero="3"),
    Contender(HF, "fp32", attention="eager"),
]
GPU_CONTENDERS = [
    Contender(OURS, "bf16", compiled=True),
    Contender(TIMM, "bf16", compiled=True, by_block=True),
    Contender(HF, "bf16", compiled=True, by_block=True),
    Contender(OURS, "master", compiled=True, zero="1"),
    Contender(TIMM, "autocast", compiled=True, by_block=True),
    Contender(HF, "autocast", compiled=True, by_block=True),
    Contender(TIMM, "bf16"),
    Contender(HF, "bf16"),
    Contender(TIMM, "bf16", compiled=True),
    Contender(HF, "bf16", compiled=True),
    Contender(OURS, "bf16"),
    Contender(OURS, "master", compiled=True, zero="3"),
    Contender(OURS, "autocast", compiled=True),
    Contender(TIMM, "autocast"),
    Contender(HF, "autocast"),
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
    """Two libraries do not compute the same, so their speeds must not stand side by side."""


@dataclass
class Checked:
    """Whether the libraries compute the same function."""

    agreed: str  # one line
    # library and attention -> why it is in no turn
    unlike: dict[tuple[str, str], str] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    comparison = Comparison(arguments(argv))
    comparison.measure()
    sys.stdout.write(comparison.publish())
    return 1 if comparison.broken() else 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(
        "peers",
        __doc__,
        gpu="B/16, L/16, H/14 at 224 and H/14 at 448 in bf16; without it B/16 in fp32",
        plot="the ratios",
        overrides="settings over every size's recipe",
    )
    sizes = f"of {', '.join(GPU_SIZES)} (default: all; without --gpu B/16 at 224)"
    parser.add_argument("--sizes", metavar="SIZE,SIZE", help=sizes)
    without = "leave out rows whose name holds this, such as compiled or DeepSpeed; repeatable; the first row stays"
    parser.add_argument("--without", metavar="TEXT", action="append", default=[], help=without)
    parser.add_argument("--rounds", type=at_least(1), default=7, help="turns that are counted (default: %(default)s)")
    parser.add_argument("--steps", type=at_least(1), help="of a turn (default: 1)", default=1)
    passes = "forward and backward, of a step (default: 4 with --gpu, as a run of few GPUs has, else 1)"
    parser.add_argument("--passes", type=at_least(1), help=passes)
    together = "trainers in memory together, the reference among them (default: %(default)s)"
    parser.add_argument("--at_once", type=at_least(2), default=3, help=together)
    budget = "no group of trainers is begun later (default: no limit)"
    parser.add_argument("--budget_s", type=float, default=float("inf"), help=budget)
    return parse(parser, argv)


class Comparison:
    """The sizes, one after another, and the record as it grows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        known = GPU_SIZES if args.gpu else CPU_SIZES
        sizes = chosen("sizes", args.sizes, known) if args.sizes else known
        self.passes = args.passes or (4 if args.gpu else 1)
        self.recipes = {size: resolved(*known[size], args.overrides, passes=self.passes) for size in sizes}
        self.has_hf = importlib.util.find_spec("transformers") is not None
        reference, *others = GPU_CONTENDERS if args.gpu else CPU_CONTENDERS
        labels = [contender.label for contender in (reference, *others)]
        for text in args.without:
            if not any(text in label for label in labels):
                raise UserError(f"--without {text}: in no row's name; the rows: {'; '.join(labels)}")
        unwanted = args.without + ([] if self.has_hf else [HF])
        self.contenders = [reference, *(other for other in others if not any(text in other.label for text in unwanted))]
        self.results: dict[str, list[Result]] = {}
        self.checked: dict[str, Checked] = {}
        self.left = 0

    def measure(self) -> None:
        begun = time.monotonic()
        join_alone()
        reference, *others = self.contenders
        apart = self.args.at_once - 1
        groups = [others[first : first + apart] for first in range(0, len(others), apart)]
        # one contender of each library and kind of attention
        libraries = dict.fromkeys(Contender(one.library, "fp32", attention=one.attention) for one in self.contenders)
        for size, recipe in self.recipes.items():
            weights, first = None, Result(reference)
            for group in groups:
                if time.monotonic() - begun > self.args.budget_s:
                    self.left += len(group)
                    continue
                if weights is None:
                    self.checked[size] = check_libraries(recipe, list(libraries))
                    weights = drawn_weights(recipe)
                    self.results[size] = [first]
                self.measure_group(size, weights, first, group)
                self.publish()
                labels = ", ".join(contender.label for contender in group)
                sys.stderr.write(f"{size}: {labels} done after {time.monotonic() - begun:.0f} s\n")

    def measure_group(self, size: str, weights: dict, first: Result, group: list[Contender]) -> None:
        """Rows of the group; of a library that does not compute what ours does, the reason."""
        unlike = self.checked[size].unlike
        rows = [Result(one, failure=unlike.get(one.family, "")) for one in group]
        # before they are measured: one who ends the measurement keeps the turns that were taken
        self.results[size] += rows
        if sound := [row for row in rows if not row.failure]:
            Group(self.recipes[size], weights, first, sound).measure(self.args.rounds, self.args.steps)

    def broken(self) -> list[Result]:
        every = [result for results in self.results.values() for result in results]
        return [result for result in every if result.failure and result.failure != OUT_OF_MEMORY]

    def publish(self) -> str:
        if self.args.plot:
            panels = {
                size: [(one.contender.label, one.ratio, min(one.ratios), max(one.ratios)) for one in measured(results)]
                for size, results in self.results.items()
            }
            ratio_bars(self.args.plot, f"images/s over those of: {self.contenders[0].label}", panels)
        title = "One pre-training step, and the same in Hugging Face and timm"
        return publish(self.args, title, self.body(), *PACKAGES)

    def body(self) -> str:
        parts = [
            f"Turns of {self.args.steps} steps, each of {self.passes} passes; {self.args.rounds} turns of each, "
            f"{self.args.at_once} trainers in memory at a time; medians (smallest to largest). Ratios are images/s "
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
            batch, precision = self.recipes[size].run.micro_batch, self.recipes[size].run.precision
            parts += [f"## {size}, {batch} images a pass, {precision}", self.checked[size].agreed]
            parts.append(table(results, batch, self.passes))
            parts.append("\n".join(f"- {line}" for line in verdicts(results)))
        if self.left:
            parts.append(f"{self.left} rows were not begun within {self.args.budget_s:g} s.")
        return "\n\n".join(part for part in parts if part)


def resolved(name: str, own: str, overrides: list[str], *, passes: int = 1) -> PretrainRecipe:
    """The recipe of a size.

    Args:
        passes: of a step.

    Raises: UserError for what the peers have no counterpart of.
    """
    recipe = load_recipe(PretrainRecipe, name, ["model.drop_path=0", *own.split(), *overrides]).recipe
    plain = recipe.encoding.kind == "full" and not recipe.aggregation.early_block
    if not (plain and recipe.objective.name == "hard_tokens" and recipe.mask.exact):
        raise UserError(
            "transformers and timm have BEiT's own step alone; leave encoding, aggregation, "
            "objective.name and mask.exact as they are"
        )
    if recipe.run.precision == "fp16":
        raise UserError("run.precision fp16: a loss scale would be compared too; use bf16 or fp32")
    return replace(recipe, run=replace(recipe.run, global_batch=recipe.run.micro_batch * passes))


# ------------------------------------------------------------------------------------------ the models


def drawn_weights(recipe: PretrainRecipe) -> dict[str, torch.Tensor]:
    """State of our model, float32 on the device, every value moved off where it starts."""
    model = build_model(recipe, this_device())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=TABLE_NOISE if name.endswith(TABLE) else NOISE)
    return model.state_dict()


def our_loss(recipe: PretrainRecipe, weights: dict, batch: DrawnBatch, contender: Contender):
    """Model, and a function that gives its loss on the batch; compiled as a run compiles it."""
    model, objective = build_model(recipe, batch.images_norm.device), build_objective(recipe.objective)
    model.load_state_dict(weights)
    if contender.compiled:
        compile_each(model, (TransformerBlock,))
    return model, lambda: objective(model(batch.images_norm, batch.masked), batch.targets)[0]


def hugging_face_loss(recipe: PretrainRecipe, weights: dict, batch: DrawnBatch, contender: Contender):
    """Its own loss: it picks the logits of masked patches by a boolean mask."""
    from transformers import BeitConfig, BeitForMaskedImageModeling
    from transformers.utils import logging

    logging.disable_progress_bar()
    ours = {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
    release = to_hf(BeitWeights("mim", recipe.model, ours, "drawn"))
    config = BeitConfig.from_dict(release.configs[CONFIG] | {"drop_path_rate": recipe.model.drop_path})
    attention = "eager" if contender.attention == "eager" else "sdpa"
    # a model may keep what it is given, and train it
    state = {name: tensor.to("cpu", copy=True) for name, tensor in release.tensors[WEIGHTS].items()}
    model = BeitForMaskedImageModeling.from_pretrained(
        None, config=config, state_dict=state, attn_implementation=attention
    )
    model = model.float().to(batch.images_norm.device).train()
    net = compiled(model, contender, "BeitLayer")
    masked, codes = masked_patches(batch, recipe), batch.targets.codes.flatten()

    def loss() -> torch.Tensor:
        images = batch.images_norm.to(next(model.parameters()).dtype)
        return net(pixel_values=images, bool_masked_pos=masked, labels=codes).loss

    return model, loss


def timm_loss(recipe: PretrainRecipe, weights: dict, batch: DrawnBatch, contender: Contender):
    """What a user of timm's Beit would add to it: a mask token, and a head at the masked patches."""
    from timm.models.beit import Beit

    class MaskedBeit(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Beit(**timm_arguments(recipe.model))
            self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, recipe.model.width))
            self.lm_head = torch.nn.Linear(recipe.model.width, recipe.objective.num_codes)

        def forward(self, images, is_masked, masked):
            backbone = self.backbone
            x = backbone.patch_embed(images)
            x = torch.where(is_masked.unsqueeze(-1), self.mask_token.to(x.dtype), x)
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
    net = compiled(model, contender, "Block")
    is_masked, codes = masked_patches(batch, recipe), batch.targets.codes.flatten()

    def loss() -> torch.Tensor:
        logits = net(batch.images_norm.to(model.mask_token.dtype), is_masked, batch.masked)
        return F.cross_entropy(logits.flatten(0, 1).float(), codes)

    return model, loss


def compiled(model: torch.nn.Module, contender: Contender, block_name: str) -> torch.nn.Module:
    """As the contender asks for.

    Args:
        block_name: of the class of its blocks.
    """
    if not contender.compiled:
        return model
    if not contender.by_block:
        return torch.compile(model)
    blocks = [module for module in model.modules() if type(module).__name__ == block_name]
    # a block with a setting of its own is a graph of its own; one beyond the limit would run uncompiled without a word
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(blocks))
    assert blocks, f"no {block_name} in {type(model).__name__}"
    for block in blocks:
        block.compile()
    return model


LIBRARIES: dict[str, Callable] = {OURS: our_loss, HF: hugging_face_loss, TIMM: timm_loss}


def masked_patches(batch: DrawnBatch, recipe: PretrainRecipe) -> torch.Tensor:
    """bool [B, N]."""
    masked = batch.masked
    none = torch.zeros(len(masked), recipe.model.grid**2, dtype=torch.bool, device=masked.device)
    return none.scatter_(1, masked, True)


# ----------------------------------------------------------------------------------- the same function


def check_libraries(recipe: PretrainRecipe, libraries: list[Contender]) -> Checked:
    """By how much losses and gradient norms differ from the first one's, float32, on a few images through a few blocks
    of this size; a library that fails, or differs, does not cost the others their comparison.

    Raises: whatever the first one fails with.
    """
    model = replace(recipe.model, depth=min(recipe.model.depth, CHECKED_BLOCKS), drop_path=0.0)
    run_of_one = replace(recipe.run, micro_batch=CHECKED_IMAGES, global_batch=CHECKED_IMAGES)
    small = replace(recipe, model=model, run=run_of_one)
    weights, batch = drawn_weights(small), drawn_batch(small, this_device())
    (reference, *others), unlike = libraries, {}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = {reference.label: figures_of(*LIBRARIES[reference.library](small, weights, batch, reference))}
        for contender in others:
            try:
                figures = figures_of(*LIBRARIES[contender.library](small, weights, batch, contender))
                compare({reference.label: found[reference.label], contender.label: figures}, LIBRARY_TOLERANCE)
                found[contender.label] = figures
            except LossesDiffer as error:
                unlike[contender.family] = str(error)
            except Exception as error:
                unlike[contender.family] = reason(error)
                del error
            free_memory()
    same = (
        f"The same function, float32, {compare(found, LIBRARY_TOLERANCE)}" if len(found) > 1 else "Nothing to compare"
    )
    return Checked(f"{same} ({small.model.depth} blocks, {CHECKED_IMAGES} images).", unlike)


def figures_of(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Of one backward pass, what LIBRARY_TOLERANCE names."""
    loss = loss_of()
    loss.backward()
    norms = []
    for part in ("", TABLE, PATCH_EMBEDDING):
        gradients = [p.grad for name, p in model.named_parameters() if p.grad is not None and part in name]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
    return dict(zip(LIBRARY_TOLERANCE, [loss.item(), *norms]))


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
    """Forward and backward passes, clipping, AdamW, in the dtypes that the contender names."""

    def __init__(self, recipe: PretrainRecipe, weights: dict, contender: Contender) -> None:
        device, optim = this_device(), recipe.optim
        self.model, self.loss_of = LIBRARIES[contender.library](recipe, weights, drawn_batch(recipe, device), contender)
        if contender.precision == "bf16":
            self.model.to(torch.bfloat16)
        autocast = contender.precision == "autocast"
        self.autocast = (lambda: torch.autocast(device.type, torch.bfloat16)) if autocast else contextlib.nullcontext
        self.optimizer = build_optimizer(decay_groups(self.model, optim.weight_decay), optim, offloaded=False)
        self.clip_norm = optim.clip_norm
        self.passes = recipe.run.global_batch // recipe.run.micro_batch

    def forward(self) -> torch.Tensor:
        with self.autocast():
            return self.loss_of()

    def learn(self, loss: torch.Tensor) -> None:
        """The last pass of a step."""
        (loss / self.passes).backward()
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def earlier_passes(self) -> None:
        for _ in range(self.passes - 1):
            (self.forward() / self.passes).backward()

    def step(self) -> torch.Tensor:
        self.earlier_passes()
        loss = self.forward()
        self.learn(loss)
        return loss.detach()

    def close(self) -> None:
        self.model = self.loss_of = self.optimizer = None


def trainer_of(recipe: PretrainRecipe, weights: dict, contender: Contender) -> BareTrainer | EngineTrainer:
    if not contender.zero:
        return BareTrainer(recipe, weights, contender)
    asked = replace(recipe, run=replace(recipe.run, compile="blocks" if contender.compiled else "none"))
    return EngineTrainer(asked, DS_CONFIGS / f"zero{contender.zero}.json", this_device(), weights=weights)


class Group:
    """The reference and some others, in memory together; their results are added to."""

    def __init__(self, recipe: PretrainRecipe, weights: dict, reference: Result, others: list[Result]) -> None:
        # Rates of a warm-up's start: the weights are noise, and must not run away to where products are not numbers.
        self.recipe, self.weights = replace(recipe, optim=replace(recipe.optim, lr=1e-6)), weights
        self.reference = reference
        self.results = {result.contender.label: result for result in (reference, *others)}
        self.trainers: dict[str, BareTrainer | EngineTrainer] = {}
        self.first_losses: dict[str, torch.Tensor] = {}

    def measure(self, rounds: int, steps: int) -> None:
        fresh_compiler()
        try:
            self.build()
            turns = Turns(
                {label: lambda label=label: self.step(label) for label in self.trainers},
                steps_a_turn=steps,
                give_up=lambda label: self.trainers.pop(label).close(),
            )
            try:
                turns.run(rounds)
            finally:
                # one who ends the measurement keeps the turns that were taken
                self.take(turns)
                turns.steps.clear()
            for label, trainer in self.trainers.items():
                if not self.results[label].failure:
                    measure_memory(self.results[label], trainer)
        finally:
            self.close()

    def take(self, turns: Turns) -> None:
        """What the turns have shown so far."""
        for label, failure in (self.uncompiled(turns) | self.other_computations() | turns.failed).items():
            self.results[label].failure = failure
        self.add_times(turns)

    def build(self) -> None:
        for label, result in self.results.items():
            try:
                self.trainers[label] = trainer_of(self.recipe, self.weights, result.contender)
            except Exception as error:
                # a library that cannot do a row must not cost the others theirs
                result.failure = reason(error)
                del error
                free_memory()

    def step(self, label: str) -> None:
        self.first_losses.setdefault(label, self.trainers[label].step())

    def uncompiled(self, turns: Turns) -> dict[str, str]:
        if compiler_facts()[0]:
            return {}
        timed = [label for label, seconds in turns.seconds.items() if seconds]
        return {label: NOTHING_COMPILED for label in timed if self.results[label].contender.compiled}

    def other_computations(self) -> dict[str, str]:
        if self.reference.contender.label not in self.first_losses or self.recipe.model.drop_path:
            return {}
        losses = {label: loss.float().item() for label, loss in self.first_losses.items() if label in self.trainers}
        return other_losses(losses, FIRST_STEP_TOLERANCE[self.recipe.run.precision])

    def add_times(self, turns: Turns) -> None:
        base = self.reference.contender.label
        for label, result in self.results.items():
            if not result.failure:
                result.seconds += turns.seconds[label]
                result.ratios += ratios(turns.seconds.get(base, []), turns.seconds[label])
                result.cpu_ratios += ratios(turns.cpu_seconds.get(base, []), turns.cpu_seconds[label])
                result.first_s = max(result.first_s, turns.first_s.get(label, 0.0))

    def close(self) -> None:
        for label, trainer in self.trainers.items():
            before = allocated()
            trainer.close()
            free_memory()
            self.results[label].state_bytes = before - allocated()


def other_losses(first_losses: dict[str, float], tolerance: float) -> dict[str, str]:
    """Of those whose first loss is not the first one's: what to say in the place of figures."""
    (_, expected), *others = first_losses.items()
    return {
        label: f"its first loss is {loss:.5g}, the reference's {expected:.5g}"
        for label, loss in others
        if not abs(loss - expected) <= tolerance * abs(expected)
    }


def measure_memory(result: Result, trainer: BareTrainer | EngineTrainer) -> None:
    try:
        trainer.earlier_passes()
        result.kept_bytes, result.step_bytes = step_memory(trainer.forward, trainer.learn)
    except Exception as error:
        result.failure = reason(error)
        del error
        free_memory()


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


# ---------------------------------------------------------------------------------- what is said of it


def measured(results: list[Result]) -> list[Result]:
    return [result for result in results if result.ratios and not result.failure]


def table(results: list[Result], batch: int, passes: int = 1) -> str:
    """Args: batch: images of a pass.  passes: of a step."""
    on_gpu = any(result.step_bytes for result in results)
    heads = ["", "ratio", *([] if on_gpu else ["ratio in CPU time"]), "images/s", "s a step"]
    heads += [
        "activations an image, MB",
        *(["step, GiB", "weights and moments, GiB"] if on_gpu else []),
        "first step, s",
    ]
    return markdown_table(heads, [cells(result, batch, passes, on_gpu, len(heads)) for result in results])


def cells(result: Result, batch: int, passes: int, on_gpu: bool, count: int) -> list[str]:
    if result.failure or not result.seconds:
        return [result.contender.label, result.failure or "cut off", *[""] * (count - 2)]
    compared = [result.ratios] if on_gpu else [result.ratios, result.cpu_ratios]
    memory = [f"{size / 2**30:.1f}" for size in (result.step_bytes, result.state_bytes)] if on_gpu else []
    return [
        result.contender.label,
        *(spread(values, ".3f") for values in compared),
        f"{batch * passes / statistics.median(result.seconds):.4g}",
        spread(result.seconds, ".4g"),
        f"{result.kept_bytes / batch / 1e6:.1f}",
        *memory,
        f"{result.first_s:.1f}",
    ]


def verdicts(results: list[Result]) -> list[str]:
    """Ours against the fastest peer of the same precision: eager against eager peers, compiled against all.

    And through DeepSpeed, whose weights in 32 bits have their like in autocast's.
    """
    done, lines = measured(results), []
    for mine in (result for result in done if result.contender.library == OURS):
        own = mine.contender
        like = "autocast" if own.precision == "master" else own.precision
        peers = [rival for rival in done if rival.contender.library != OURS and rival.contender.precision == like]
        rivals = [rival for rival in peers if own.compiled or not rival.contender.compiled]
        if rivals:
            fastest = max(rivals, key=lambda rival: rival.ratio)
            which = f"of the {len(rivals)} measured peers" + ("" if own.compiled else " that are not compiled")
            over = f"{mine.ratio / max(fastest.ratios):.2f} to {mine.ratio / min(fastest.ratios):.2f} over its turns"
            times = f"{own.label}: {mine.ratio / fastest.ratio:.2f} times"
            lines.append(f"{times} the fastest {which} ({fastest.contender.label}; {over})")
    return lines


if __name__ == "__main__":
    run(main)
