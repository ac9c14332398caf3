"""A table of PeCo's paper at full size: the commands that make its rows, and what the planner says they cost."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from benchmarks.paper_tables import Arm, Paper, Row, Table, published, read_paper, views
from benchmarks.record import markdown_table
from peco_ds.errors import UserError
from peco_ds.planner.bill import make_bill
from peco_ds.planner.bill_text import figure, ranged
from peco_ds.planner.chain import DEFAULT_JSON, Chain, read_chain
from peco_ds.planner.estimate import Estimate, estimate, recommend
from peco_ds.planner.fitting import gpus_that_divide, shipped
from peco_ds.planner.hardware import find_hardware
from peco_ds.planner.stages import Stage

HARDWARE = "h100"
# of the commands, and for their GPU-hours
GPUS = 8
BILLED_GPUS = (8, 64, 256)
# tables with pre-trainings of 800 epochs and those beside them
BILLED_TABLES = (1, 2, 8)
# the paper's classifier of reconstructions
CLASSIFIER = "deit_tiny_patch16_224.fb_in1k"
ATTACKS = ("bim", "mim")
EXPORT = "export PECO_DATA_ROOT=/data/imagenet"
IMAGES = """python peco_ds/pack_images.py --images /raw/ILSVRC2012/train --out $PECO_DATA_ROOT/images/train
python peco_ds/pack_images.py --images /raw/ILSVRC2012/val --synsets LOC_val_solution.csv \\
    --out $PECO_DATA_ROOT/images/val"""
EVALUATE = f"torchrun --nproc_per_node {GPUS} peco_ds/evaluate.py"


@dataclass(frozen=True)
class Step:
    """A run of the chain, shared by all rows that need it.

    Args:
        name: of what it makes; the same run has the same name in every table.
        kind: of stage, as the planner says it; "" costs nothing worth telling.
        command: for one node.  launcher: the same under Slurm, "" where no launcher does it.
    """

    name: str
    kind: str
    command: str
    launcher: str = ""
    gpu_hours: float = 0.0


def steps_of(arm: str, measures: str, paper: Paper | None = None) -> list[Step]:
    """What makes a row, from the tokenizer to its figure.

    Raises: UserError as `read_chain`.
    """
    paper = paper or read_paper()
    wanted = paper.arms[arm]
    tokenizer = paper.tokenizers[wanted.tokenizer]
    hours = {made.stage.kind: made.gpu_hours() for made in costs(arm) if made.stage.kind != "fine-tuning"}
    found = [_tokenizer_step(wanted.tokenizer, hours.get("tokenizer", 0.0), paper)]
    if measures == "tokens":
        return [*found, _codes_step(wanted, paper)]
    release = f"data.tokenizer={tokenizer.release or f'$PWD/runs/tokenizer_{wanted.tokenizer}/tokenizer'}"
    settings = _words(paper.pretrain_settings(arm))
    tokens, run = paper.tokens_of(arm), paper.pretraining_of(arm)
    asked = f"--recipe {wanted.pretrain} {release} data.tokens=tokens/{tokens}"
    finish = f"sbatch launchers/tokenize_finish.sbatch {asked}{settings}"
    found += [
        Step(
            f"tokens of {tokens}",
            "tokenizing",
            f"deepspeed peco_ds/tokenize_shards.py {asked}{settings}",
            f"sbatch launchers/tokenize.sbatch {asked}{settings}\n{finish}",
            hours["tokenizing"],
        ),
        Step(
            f"pre-training {run}",
            "pre-training",
            f"deepspeed peco_ds/pretrain.py --out runs/{run} {asked}{settings}",
            f"sbatch launchers/pretrain_{size_of(wanted.pretrain)}.sbatch --out runs/{run} {asked}{settings}",
            hours["pre-training"],
        ),
    ]
    made, tuned = f"runs/{run}", [each for each in costs(arm) if each.stage.kind == "fine-tuning"]
    for number, recipe in enumerate(wanted.finetune):
        run = f"finetune_{paper.finetuning_of(arm, number)}"
        asked = f"--recipe {recipe} --out runs/{run} init.weights={made}"
        launcher = f"finetune_{size_of(recipe)}{'_448' if recipe.endswith('_448') else ''}"
        command, slurm = f"deepspeed peco_ds/finetune.py {asked}", f"sbatch launchers/{launcher}.sbatch {asked}"
        found.append(Step(f"fine-tuning {run}", "fine-tuning", command, slurm, tuned[number].gpu_hours()))
        made = f"runs/{run}"
    found.append(_evaluation_step(made, "top1"))
    if measures == "robustness":
        attacked = [(name, f" --attack {name} --epsilon 2/255 --steps 20") for name in ATTACKS]
        found += [_evaluation_step(made, name, options) for name, options in attacked]
    return found


def _tokenizer_step(name: str, gpu_hours: float, paper: Paper) -> Step:
    wanted = paper.tokenizers[name]
    if wanted.release:
        files = f"python -m peco_ds.import_tokenizer {' '.join(wanted.files)} --out $PECO_DATA_ROOT/{wanted.release}"
        return Step(f"tokenizer {name}", "", files)
    run = f"--recipe {wanted.recipe} --out runs/tokenizer_{name}{_words(paper.tokenizer_settings(name))}"
    command = f"deepspeed peco_ds/train_tokenizer.py {run}"
    return Step(f"tokenizer {name}", "tokenizer", command, f"sbatch launchers/train_tokenizer.sbatch {run}", gpu_hours)


def _codes_step(arm: Arm, paper: Paper) -> Step:
    """What the codes of a tokenizer mean."""
    name, tokenizer = arm.tokenizer, paper.tokenizers[arm.tokenizer]
    target, out = f"runs/tokenizer_{name}", f"runs/tokenizer_{name}/evaluation.json"
    options = f"--train_images $PECO_DATA_ROOT/images/train --classifier {CLASSIFIER}"
    if tokenizer.release:
        # its views are those of the pre-training on its codes
        target, out = f"$PECO_DATA_ROOT/{tokenizer.release}", f"{tokenizer.release}_evaluation.json"
        options = f"--image_px {views(arm.pretrain).tokenizer_px} {options}"
    images = "--images $PECO_DATA_ROOT/images/val"
    return Step(
        f"codes of {name}",
        "",
        f"{EVALUATE} {target} {images} {options} --out {out}",
        f"sbatch launchers/evaluate.sbatch {target} {options} --out {out}",
    )


def _evaluation_step(run: str, name: str, options: str = "") -> Step:
    out = f"--out {run}/{name}.json"
    return Step(
        f"{name} of {run}",
        "",
        f"{EVALUATE} {run} --images $PECO_DATA_ROOT/images/val{options} {out}",
        f"sbatch launchers/evaluate.sbatch {run}{options} {out}",
    )


def size_of(recipe: str) -> str:
    """vitb, vitl or vith."""
    found = re.search(r"vit[blh]", recipe)
    assert found, recipe
    return found[0]


def _words(settings: Iterable[str]) -> str:
    return "".join(f" {shlex.quote(setting)}" for setting in settings)


# ------------------------------------------------------------------------------------------------ costs


@cache
def chain_of(arm: str) -> Chain:
    """The stages of an arm."""
    paper = read_paper()
    wanted, tokenizer = paper.arms[arm], paper.tokenizers[paper.arms[arm].tokenizer]
    others = [f"{tokenizer.recipe}:{setting}" for setting in paper.tokenizer_settings(wanted.tokenizer)]
    return read_chain(
        wanted.pretrain,
        [*paper.pretrain_settings(arm), *others],
        tokenizer=tokenizer.recipe or tokenizer.planned,
        finetune=wanted.finetune,
    )


def costs(arm: str) -> list[Estimate]:
    """Of every stage of an arm, with the recipes' own settings, on `GPUS` GPUs."""
    return [_as_written(stage) for stage in chain_of(arm).stages]


@cache
def _as_written(stage: Stage) -> Estimate:
    hardware = find_hardware(HARDWARE)
    choice = next(choice for choice in shipped() if choice.name == DEFAULT_JSON[stage.kind])
    count = gpus_that_divide(stage, GPUS, hardware)
    try:
        return estimate(stage, hardware, count, choice)
    except UserError:
        # it does not fit as its recipe is written
        return recommend(stage, hardware, count, choice).best


# A stage that chains share is estimated once.
_recommended: dict[tuple[Stage, int], Estimate] = {}


def recommended(arm: str, gpus: int) -> list[Estimate]:
    """Of every stage of an arm, with the settings that are recommended for so many GPUs."""
    chain = chain_of(arm)
    new = tuple(stage for stage in chain.stages if stage is chain.main or (stage, gpus) not in _recommended)
    if len(new) > 1 or (chain.main, gpus) not in _recommended:
        # The GPUs are those of the main stage; the others take as many as they can use.
        bill = make_bill(Chain(new, chain.main), find_hardware(HARDWARE), gpus, as_written=False)
        _recommended.update({(stage, gpus): made.best for stage, made in zip(new, bill.recommended)})
    return [_recommended[stage, gpus] for stage in chain.stages]


# ------------------------------------------------------------------------------------------------ texts


def script(number: int, paper: Paper | None = None) -> str:
    """The chain of a table as a shell script; what Slurm would be told stands in comments."""
    paper = paper or read_paper()
    table = paper.tables[number]
    lines = [f"# Table {number} of PeCo's paper: {table.title}"]
    lines += [f"# {line}" for line in textwrap.wrap(table.note, 118)]
    rows = [(row, steps_of(row.arm, table.measures, paper)) for row in table.rows if row.arm]
    for row in table.rows:
        lines.append(f"#   {row.row}: {', '.join(_figures(table, row))}{f' ({row.why})' if row.why else ''}")
    if not rows:
        return "\n".join(lines) + "\n"
    distinct = {step.name: step for _, steps in rows for step in steps}
    total = sum(step.gpu_hours for step in distinct.values())
    lines += [
        f"# {figure(total)} GPU-hours in all, predicted for {GPUS} {HARDWARE.upper()} and the recipes' own settings; "
        "a run that rows share stands once.",
        "",
        EXPORT,
        IMAGES,
        "# Slurm: sbatch launchers/prepare_data.sbatch --images /raw/ILSVRC2012/train",
    ]
    written: set[str] = set()
    for row, steps in rows:
        lines += ["", f"# {row.row}: published {', '.join(_figures(table, row))}"]
        for step in steps:
            if step.name in written:
                lines.append(f"# {step.name}: as above")
                continue
            written.add(step.name)
            lines.append(f"# {step.name}" + (f": {figure(step.gpu_hours)} GPU-hours" if step.gpu_hours else ""))
            lines.append(step.command)
            lines += [f"# Slurm: {line}" for line in step.launcher.splitlines()]
    return "\n".join(lines) + "\n"


def _figures(table: Table, row: Row) -> list[str]:
    return [f"{column} {value}" for column, value in zip(table.columns, published(row))]


def table_page(number: int, paper: Paper) -> str:
    """A table for the documentation: rows, published figures, recipes and settings, GPU-hours."""
    table = paper.tables[number]
    made = {row.row: facts(row.arm, table.measures, paper) for row in table.rows if row.arm}
    if not made:
        rows = [[row.row, *published(row), row.why] for row in table.rows]
        body = markdown_table(["row", *table.columns, "here"], rows)
        return "\n\n".join([f"## Table {number}: {table.title}", body, *([_wrapped(table.note)] if table.note else [])])
    first, *others = made.values()
    shared = [fact for fact in first if others and all(fact in other for other in others)]
    distinct: dict[str, Step] = {}
    rows = []
    for row in table.rows:
        own, hours = row.why, "-"
        if row.arm:
            steps = steps_of(row.arm, table.measures, paper)
            distinct |= {step.name: step for step in steps}
            own = ", ".join(fact for fact in made[row.row] if fact not in shared) or "these alone"
            hours = _hours(steps)
        rows.append([row.row, *published(row), own, hours])
    after = [f"All rows: {', '.join(shared)}." if shared else ""]
    after += [f"GPU-hours of all rows, a run that they share counted once: {_hours(distinct.values())}."]
    after += [f"At full scale only: {table.full_only}." if table.full_only else "", table.note, table.ours]
    text = [
        f"## Table {number}: {table.title}",
        f"```\npython -m benchmarks.reproduce --table {number} --scale full\n```",
    ]
    text.append(markdown_table(["row", *table.columns, "made by", "GPU-hours"], rows))
    return "\n\n".join([*text, _wrapped(" ".join(filter(None, after)))])


def judges_page(paper: Paper) -> str:
    """The judges by name."""
    lines = []
    for name, judge in paper.judges.items():
        settings = " ".join([f"perceptual.weights={judge.weights}", *judge.settings])
        lines.append(f"- `{name}`: {judge.what}\n  `{settings}`")
    return "\n".join(["Judges:", "", *lines])


def facts(arm: str, measures: str, paper: Paper) -> list[str]:
    """Recipes of a row, and what is set over them."""
    wanted = paper.arms[arm]
    tokenizer = paper.tokenizers[wanted.tokenizer]
    found = [f"`{tokenizer.recipe}`"] if tokenizer.recipe else ["a published tokenizer"]
    found += [f"judge `{tokenizer.judge}`"] if tokenizer.judge else []
    found += _quoted(tokenizer.settings)
    if measures != "tokens":
        found += _quoted([wanted.pretrain, *paper.pretrain_settings(arm), *wanted.finetune])
    return list(dict.fromkeys(found))


def _quoted(words: Iterable[str]) -> list[str]:
    return [f"`{word}`" for word in words]


def _hours(steps: Iterable[Step]) -> str:
    total = sum(step.gpu_hours for step in steps)
    return figure(total) if total else "-"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def bill_page(paper: Paper | None = None) -> str:
    """What the pre-trainings of Tables 1, 2 and 8 and all that belongs to them cost, at several numbers of GPUs."""
    paper = paper or read_paper()
    rows = [(number, row) for number in BILLED_TABLES for row in paper.tables[number].rows]
    made = [(number, row) for number, row in rows if row.arm]
    shared: dict[str, list[str]] = {}
    for number, row in made:
        shared.setdefault(paper.pretraining_of(row.arm), []).append(f"{row.row} (Table {number})")
    stages: dict[str, dict[int, Estimate]] = {}
    for _, row in made:
        for name, estimates in _stages(row.arm, paper):
            stages.setdefault(name, estimates)
    order = ("tokenizer", "tokenizing", "pre-training", "fine-tuning")
    named = sorted(stages, key=lambda name: order.index(stages[name][GPUS].stage.kind))
    lines = [[name, *(figure(stages[name][gpus].gpu_hours()) for gpus in BILLED_GPUS)] for name in named]
    for what, quantity in (
        ("**all, GPU-hours**", Estimate.gpu_hours),
        ("**all, days, one after the other**", lambda estimate, pace: estimate.hours(pace) / 24),
    ):
        sums = [
            ranged(lambda pace: sum(quantity(found[gpus], pace) for found in stages.values())) for gpus in BILLED_GPUS
        ]
        lines.append([what, *sums])
    missing = [f"{row.row} (Table {number}, {row.why})" for number, row in rows if not row.arm]
    about = [
        f"Tables {', '.join(map(str, BILLED_TABLES[:-1]))} and {BILLED_TABLES[-1]} have {len(rows)} rows, and "
        f"{len(shared)} distinct pre-trainings make {len(made)} of them:",
        *(f"- `{name}`: {', '.join(rows)}" for name, rows in shared.items()),
    ]
    after = f"Not made here: {', '.join(missing)}." if missing else ""
    heads = ["GPU-hours of", *(f"{gpus} {HARDWARE.upper()}" for gpus in BILLED_GPUS)]
    return "\n\n".join(filter(None, [about[0], "\n".join(about[1:]), after, markdown_table(heads, lines)]))


def _stages(arm: str, paper: Paper) -> Iterator[tuple[str, dict[int, Estimate]]]:
    """Names of the stages of an arm, and their estimates by number of GPUs."""
    estimates = {gpus: recommended(arm, gpus) for gpus in BILLED_GPUS}
    named = [step.name for step in steps_of(arm, "top1", paper) if step.kind]
    for place, name in enumerate(named):
        yield name, {gpus: found[place] for gpus, found in estimates.items()}
