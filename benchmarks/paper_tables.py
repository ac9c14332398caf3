"""The tables of PeCo's paper as data: rows, published figures, and what makes a row here, at full size and small.

The data stand in reproduce/tables.yaml; the classes of this file say what it may hold. Both scales take the same
recipes and the same settings of an arm. Small scale adds `small`, which shrinks every recipe alike, and after it what
an arm needs to be itself at that size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked

from benchmarks.record import read_checked
from peco_ds.config import PretrainRecipe, ViewSettings
from peco_ds.errors import UserError
from peco_ds.recipe_files import load_recipe

_strict = ConfigDict(extra="forbid")
TABLES = Path(__file__).with_name("reproduce") / "tables.yaml"
STAGES = ("tokenizer", "pretrain", "finetune", "probe")


@checked(frozen=True, config=_strict)
class Judge:
    what: str
    # where the chain of full size looks for it
    weights: str
    settings: list[str] = field(default_factory=list)  # over the tokenizer's recipe


@checked(frozen=True, config=_strict)
class Tokenizer:
    recipe: str = ""  # of train_tokenizer.py
    settings: list[str] = field(default_factory=list)
    judge: str = ""  # one of `judges`; empty: none
    # over the recipe of a pre-training on its codes
    pretrain: list[str] = field(default_factory=list)
    # at small scale, after the common settings
    small: list[str] = field(default_factory=list)
    small_pretrain: list[str] = field(default_factory=list)
    # instead of a recipe: the folder of a published one below the data root, its files, and its kind
    release: str = ""
    files: list[str] = field(default_factory=list)
    planned: str = ""


@checked(frozen=True, config=_strict)
class Arm:
    tokenizer: str
    pretrain: str  # recipe
    settings: list[str] = field(default_factory=list)  # over the recipe of the pre-training
    finetune: list[str] = field(default_factory=list)  # recipes, one after the other
    small: list[str] = field(default_factory=list)  # at small scale, after the common settings of the pre-training


@checked(frozen=True, config=_strict)
class Row:
    row: str  # as the paper calls it
    published: list[float | None]  # a figure a column
    arm: str = ""
    why: str = ""  # it is not made here


@checked(frozen=True, config=_strict)
class Table:
    title: str
    columns: list[str]
    rows: list[Row]
    # top1: of the fine-tuned classifier. tokens: of the tokenizer alone. robustness: of the classifier under attack.
    measures: Literal["top1", "tokens", "robustness", ""] = ""
    # rows that are no part of the table, for comparison at small scale
    beside: list[Row] = field(default_factory=list)
    # at small scale the judges on the command line take the place of the rows' own
    given_judges: bool = False
    full_only: str = ""  # why
    note: str = ""
    ours: str = ""

    def arms(self) -> dict[str, Row]:
        """Rows that can be made here, by arm."""
        return {row.arm: row for row in (*self.rows, *self.beside) if row.arm}


@checked(frozen=True, config=_strict)
class Paper:
    judges: dict[str, Judge]
    tokenizers: dict[str, Tokenizer]
    arms: dict[str, Arm]
    tables: dict[int, Table]
    small: dict[str, list[str]]  # of each of STAGES

    # ------------------------------------------------------------------------------------ settings of full size

    def tokenizer_settings(self, name: str) -> list[str]:
        """Over the recipe of a tokenizer."""
        wanted = self.tokenizers[name]
        judge = self.judges.get(wanted.judge)
        return [*([f"perceptual.weights={judge.weights}", *judge.settings] if judge else []), *wanted.settings]

    def pretrain_settings(self, name: str) -> list[str]:
        """Over the recipe of an arm's pre-training."""
        arm = self.arms[name]
        return [*self.tokenizers[arm.tokenizer].pretrain, *arm.settings]

    # -------------------------------------------------------------------------- names of runs that arms share

    def tokens_of(self, name: str) -> str:
        """The arm whose token shards an arm reads: the first one with the same tokenizer and views."""

        def way(arm: Arm):
            settings = (*self.tokenizers[arm.tokenizer].pretrain, *arm.settings)
            return arm.tokenizer, views(arm.pretrain, settings)

        return self._first(name, way)

    def pretraining_of(self, name: str) -> str:
        """The arm whose pre-training an arm takes."""
        return self._first(name, lambda arm: (arm.tokenizer, arm.pretrain, arm.settings))

    def finetuning_of(self, name: str, number: int) -> str:
        """The arm whose fine-tuning an arm takes as its `number`-th."""

        def way(arm: Arm):
            recipes = arm.finetune[: number + 1]
            return (arm.tokenizer, arm.pretrain, arm.settings, recipes) if len(recipes) > number else None

        return self._first(name, way)

    def _first(self, name: str, way: Callable[[Arm], object]) -> str:
        wanted = way(self.arms[name])
        return next(other for other, arm in self.arms.items() if way(arm) == wanted)


@cache
def views(recipe: str, settings: tuple[str, ...] = ()) -> ViewSettings:
    """That the tokenizer of a pre-training sees."""
    return load_recipe(PretrainRecipe, recipe, list(settings)).recipe.views


@cache
def read_paper(path: Path = TABLES) -> Paper:
    """Raises: UserError if the file is none, or asks for what is not there."""
    paper = read_checked(Paper, path, "benchmarks/reproduce/tables.yaml")
    for name, tokenizer in paper.tokenizers.items():
        _require(bool(tokenizer.recipe) != bool(tokenizer.release), path, f"tokenizer {name}: a recipe or a release")
        _require(tokenizer.judge in ("", *paper.judges), path, f"tokenizer {name}: no judge {tokenizer.judge}")
    for name, arm in paper.arms.items():
        _require(arm.tokenizer in paper.tokenizers, path, f"arm {name}: no tokenizer {arm.tokenizer}")
    for number, table in paper.tables.items():
        for row in (*table.rows, *table.beside):
            where = f"table {number}, row {row.row!r}"
            _require(bool(row.arm) != bool(row.why), path, f"{where}: an arm, or why there is none")
            _require(row.arm in ("", *paper.arms), path, f"{where}: no arm {row.arm}")
            _require(len(row.published) == len(table.columns), path, f"{where}: a figure for each of {table.columns}")
    _require(set(paper.small) == set(STAGES), path, f"small: settings for each of {', '.join(STAGES)}")
    return paper


def _require(holds: bool, path: Path, told: str) -> None:
    if not holds:
        raise UserError(f"{path}: {told}; correct the file")


def published(row: Row) -> list[str]:
    """The figures of a row as a table shows them."""
    return ["-" if value is None else f"{value:.1f}" for value in row.published]
