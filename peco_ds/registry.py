"""What a recipe names and anyone may add to: objectives, kinds of tokenizer, families of frozen networks.

A descriptor says in plain Python what settings, planner, dry runs and model cards ask; it makes the network or the loss
only when that is called for, so a misspelt key still answers before torch is imported.

How to add an objective, a tokenizer, a judge or teacher, without an edit of this package: write one Python file, and
name it in the environment of every stage that meets the name (of a tokenizer, also `tokenize_shards.py`):

    # my_objective.py
    import torch.nn.functional as F
    from peco_ds.registry import OBJECTIVES, ObjectiveKind
    from peco_ds.schema import IGNORED

    def smooth(settings):
        amount = settings.option("amount")

        def objective(outputs, targets):
            logits, codes = outputs.logits.flatten(0, 1).float(), targets.codes.flatten()
            loss = F.cross_entropy(logits, codes, label_smoothing=amount, ignore_index=IGNORED)
            return loss, {"tokens/logit_deviation": logits.detach().std()}

        return objective

    OBJECTIVES.add("smooth", ObjectiveKind(build=smooth, options={"amount": 0.1}))

    PECO_EXTENSIONS=my_objective.py deepspeed peco_ds/pretrain.py objective.name=smooth objective.options.amount=0.2

PECO_EXTENSIONS holds files, or names of installed modules, with the system's path separator between them. Each is run
once, when a name is first looked up. Of several nodes, each must see the variable: `srun` passes it on, DeepSpeed's own
launcher does for what `~/.deepspeed_env` lists. What a descriptor leaves out has a default: an objective without `cost`
counts as free, a tokenizer without `cost` trains without MFU, and its dry run says so.

- An objective: `OBJECTIVES.add(name, ObjectiveKind(...))`; recipes name it as `objective.name`.
- A tokenizer: a subclass of `models.image_tokenizer.CodebookTokenizer`, `TOKENIZERS.add(name, TokenizerKind(...))`;
  recipes name it as `tokenizer.kind`.
- A judge or teacher: a subclass of `models.feature_nets.FeatureNet` and `FEATURE_NETS.add(name,
  FeatureNetFamily(...))`; a family recognises its own in `perceptual.weights` and `.architecture`, or `teacher`'s.

Inside the package it is the same: one file, and one line in a table at the end of this one. There a descriptor that
needs more than the table's line has a file of its own in `kinds/`, without torch, and names its network by `later`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from peco_ds.errors import UserError
from peco_ds.user_paths import expand_path

EXTENSIONS = "PECO_EXTENSIONS"
Option = bool | int | float | str
_Kind = TypeVar("_Kind")


def later(name: str) -> Callable[..., Any]:
    """The function or class "module:name", imported when it is first called."""

    def call(*args, **kwargs):
        return _import(name)(*args, **kwargs)

    return call


def _import(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _nothing(*_) -> None:
    return None


# ----------------------------------------------------------------------------------------- descriptors


@dataclass(frozen=True)
class ObjectiveKind:
    """An objective of masked pre-training.

    Args:
        build: ObjectiveSettings -> `objective(outputs, targets) -> loss, stats`, as `peco_ds.objectives` describes it.
        soft_codes: it learns from soft codes, so views.topk has to be set.
        tags: TensorBoard tags of its stats. One that is not named here goes under loss/, or where the slash in its name
            says.
        options: name -> default of settings of its own: `objective.options.NAME` in a recipe, `settings.option(NAME)`.
        check: recipe -> None; raises UserError for settings that it cannot work with.
        words: recipe -> what a model card says beyond its name and the number of codes; "" for nothing.
        cost: recipe -> costs.ObjectiveCost, what it computes beside a cross-entropy with hard codes; None: no more.
    """

    build: Callable[[Any], Callable]
    soft_codes: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)
    check: Callable[[Any], None] = _nothing
    words: Callable[[Any], str] = lambda recipe: ""
    cost: Callable[[Any], Any] = _nothing


@dataclass(frozen=True)
class Release:
    """How a kind of tokenizer was released by others.

    Args:
        signs: names of tensors that are all there in a file of this kind, and not in one of another.
        files: what to give, for a message.
        read: the file's tensors -> settings and a state dict of our tokenizer.
        licence: of the weights, as `origin` states it.
        judge: settings -> what the tokenizer learnt from, as text values for its card: judge and judge_licence.
        left_out: beginnings of the names of tensors that only its training needs.
        objects: what the files' pickles name beside tensors; none of it is run.
        join: of a kind released in several files: [(path, tensors)] -> the tensors of all.
        planned: settings of the released one, for plans of a pre-training that takes it.
    """

    signs: tuple[str, ...]
    files: str
    read: Callable[[dict], tuple[Any, dict]]
    origin: str
    licence: str
    judge: Callable[[Any], dict[str, str]]
    left_out: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    join: Callable[[list[tuple[Path, dict]]], dict] | None = None
    planned: Any = None


@dataclass(frozen=True)
class TokenizerKind:
    """A kind of tokenizer. Its functions take TokenizerSettings.

    Args:
        network: (settings, seed=) -> `models.image_tokenizer.ImageTokenizer` with fresh weights.
        learns_from: judge: images, judged by `perceptual`; teacher: the features of `teacher`; None: it is not trained
            here.
        objective: (recipe, frozen) -> `objective(outputs, images_11, step) -> loss, stats`; None: that of its
            `learns_from`.
        stride_px: side of the square of pixels that a code stands for.
        only_px: the one size of image that it can look at; None: every multiple of the stride.
        options: name -> default of settings of its own: `tokenizer.options.NAME` in a recipe, `settings.option(NAME)`.
        check: (settings, section) -> None; raises UserError for settings that describe no network.
        decoder_optional: tokenizer.decoder may be false.
        tensors: the least number of tensors that a file of these settings holds; a damaged card may ask for millions.
        cost: (settings, image_px) -> costs.TokenizerCost; None: not told, so neither MFU nor memory is known.
        release: how others released it; None: import_tokenizer.py knows no files of this kind.
    """

    network: Callable[..., Any]
    learns_from: Literal["judge", "teacher"] | None = "judge"
    objective: Callable[[Any, Any], Callable] | None = None
    stride_px: Callable[[Any], int] = lambda settings: 2 ** (len(settings.channel_mults) - 1)
    only_px: Callable[[Any], int | None] = _nothing
    options: Mapping[str, Option] = field(default_factory=dict)
    check: Callable[[Any, str], None] = _nothing
    decoder_optional: bool = False
    tensors: Callable[[Any], int] = lambda settings: 0
    cost: Callable[[Any, int], Any] | None = None
    release: Release | None = None


@dataclass(frozen=True)
class FeatureNetFamily:
    """A family of frozen networks that judge or teach. `weights` and `architecture` are the recipe's texts.

    Args:
        recognises: (weights, architecture) -> whether they name one of this family; asked without a network too.
        load: (weights, architecture, image_px=, section=) -> `models.feature_nets.FeatureNet`.
        cost: (weights, architecture, image_px) -> costs.FrozenCost; None: not told, and counted as free, which plans
            say.
    """

    recognises: Callable[[str, str], bool]
    load: Callable[..., Any]
    cost: Callable[[str, str, int], Any] = _nothing


# ------------------------------------------------------------------------------------------ registries


class Registry(Mapping[str, _Kind], Generic[_Kind]):
    """Name -> descriptor, in the order of the table and then of the calls of `add`.

    Args:
        setting: the one that names a descriptor.
        table: descriptors, or where they are: "module:name".
    """

    def __init__(self, setting: str, table: dict[str, _Kind | str]) -> None:
        self._setting, self._entries = setting, dict(table)

    def add(self, name: str, kind: _Kind) -> None:
        """Add a descriptor. Raises: UserError if the name is taken."""
        if name in self._entries:
            raise UserError(f"{self._setting} {name}: is there already; give yours another name")
        self._entries[name] = kind

    def named(self, name: str, setting: str = "") -> _Kind:
        """The descriptor of that name. Raises: UserError naming the setting and the nearest name, if there is none."""
        if name in self:
            return self[name]
        known = list(self)
        close = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5)
        raise UserError(
            f"{setting or self._setting} {name[:100]!r}: there are {', '.join(known)}"
            + (f"; did you mean {close[0]!r}?" if close else f"; name the file of another one in {EXTENSIONS}")
        )

    def in_use(self) -> list[_Kind]:
        """Those that were looked up, and those that need no import."""
        return [entry for entry in self._entries.values() if not isinstance(entry, str)]

    def __getitem__(self, name: str) -> _Kind:
        load_extensions()
        entry = self._entries[name]
        if isinstance(entry, str):
            entry = self._entries[name] = _import(entry)
        return entry

    def __iter__(self) -> Iterator[str]:
        load_extensions()
        return iter(list(self._entries))

    def __len__(self) -> int:
        load_extensions()
        return len(self._entries)


_extensions: dict[str, Path] = {}


def load_extensions() -> dict[str, Path]:
    """Run each entry of PECO_EXTENSIONS once.

    Returns: what was run, with its files.
    Raises: UserError if a file is not there or a module is not installed. What a file raises of its own passes through.
    """
    for entry in filter(None, os.environ.get(EXTENSIONS, "").split(os.pathsep)):
        if entry not in _extensions:
            # The entry is marked first, because a file may look names up while it runs.
            _extensions[entry] = Path()
            try:
                _extensions[entry] = _run(entry)
            except BaseException:
                del _extensions[entry]
                raise
    return dict(_extensions)


def _run(entry: str) -> Path:
    path = expand_path(entry)
    if path.suffix == ".py" and not path.is_file():
        raise UserError(f"{EXTENSIONS} {entry}: no such file; correct the path")
    if path.suffix == ".py":
        name = f"peco_extension_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return path
    if importlib.util.find_spec(entry) is None:
        raise UserError(f"{EXTENSIONS} {entry}: neither a .py file nor an installed module; correct it")
    return Path(importlib.import_module(entry).__file__ or "")


# ------------------------------------------------------------------------------------------ the tables

OBJECTIVES: Registry[ObjectiveKind] = Registry(
    "objective.name",
    {
        "hard_tokens": ObjectiveKind(later("peco_ds.objectives.hard_tokens:build")),
        "multi_choice": "peco_ds.kinds.multi_choice:KIND",
    },
)
TOKENIZERS: Registry[TokenizerKind] = Registry(
    "tokenizer.kind",
    {
        "vqgan": "peco_ds.kinds.vqgan:KIND",
        "vqkd": "peco_ds.kinds.vqkd:KIND",
        "vqvit": "peco_ds.kinds.vqvit:KIND",
        "gumbel": "peco_ds.kinds.gumbel:KIND",
        "dvae": "peco_ds.kinds.dvae:KIND",
    },
)
# The last that recognises its own is taken; ViTs take what is left.
FEATURE_NETS: Registry[FeatureNetFamily] = Registry(
    "family", {"vit": "peco_ds.kinds.vit:FAMILY", "conv": "peco_ds.kinds.conv:FAMILY"}
)


def family_of(weights: str, architecture: str) -> FeatureNetFamily:
    """The family of a frozen network, by what a recipe says of it."""
    return next(kind for kind in reversed(list(FEATURE_NETS.values())) if kind.recognises(weights, architecture))


def kinds_learning_from(what: Literal["judge", "teacher"]) -> list[str]:
    """Names of the kinds of tokenizer that are trained with a judge, or with a teacher."""
    return [name for name, kind in TOKENIZERS.items() if kind.learns_from == what]


def check_options(given: Mapping[str, Option], declared: Mapping[str, Option], setting: str) -> None:
    """Check options. Raises: UserError if one is not declared, or of another type than its default."""
    for name, value in given.items():
        if name not in declared:
            raise UserError(f"{setting}.{name[:100]}: is not declared; there are {', '.join(declared) or 'none'}")
        default = declared[name]
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise UserError(f"{setting}.{name} {value!r}: must be {type(default).__name__}, as its default {default!r}")


def stat_tags() -> dict[str, str]:
    """TensorBoard tags of the statistics that the objectives in use give."""
    return {name: tag for kind in OBJECTIVES.in_use() for name, tag in kind.tags.items()}
