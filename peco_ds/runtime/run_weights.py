"""Read a training run's weights in the canonical form, from its newest whole checkpoint or from a named one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError

from peco_ds.config import Average, DetectRecipe, FinetuneRecipe, PretrainRecipe, SegmentRecipe
from peco_ds.errors import UserError
from peco_ds.models.beit_weights import JUDGE_LICENCE, TOKENIZER_LICENCE, BeitWeights
from peco_ds.models.detector_weights import DetectorWeights
from peco_ds.models.image_statistics import FACT
from peco_ds.models.segmenter_weights import SegmenterWeights
from peco_ds.registry import OBJECTIVES
from peco_ds.runtime.checkpoint.consolidate import fp32_weights, has_ema
from peco_ds.runtime.checkpoint.files import (
    FOLDER,
    PROGRESS,
    Progress,
    list_checkpoints,
    newest_whole,
    read_progress,
    verify,
)
from peco_ds.runtime.metrics import read_evaluation, read_metrics
from peco_ds.runtime.run_folder import PROVENANCE, SETTINGS, read_provenance, read_settings

# Names of a card -> of a row of evaluation.jsonl.
_SCORES = {"mIoU": "miou", "aAcc": "aacc", "mAcc": "macc"}
_SCORES_OF_DETECTION = {"box AP": "box_ap", "mask AP": "mask_ap"}
# The prefix of a masked image model's backbone; a classifier has the canonical names already.
_PREFIX = "backbone."
# Further tensors of a masked image model whose head works on the backbone's tokens.
_HEAD_NAMES = ("mask_token", "lm_head.weight", "lm_head.bias")
_RECIPES = {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe, "segment": SegmentRecipe, "detect": DetectRecipe}
# Stages whose weights are a BEiT, with or without a head.
_OF_BEIT = ("pretrain", "finetune")


def read_run(path: Path, average: Average = "auto") -> BeitWeights:
    """float32 weights of a run of pretrain.py or finetune.py.

    Args:
        path: the run folder, or one of its checkpoints/step_N.
        average: the moving average of a fine-tuning run or its last weights; auto: the average where the run kept one.
    Raises: UserError if there is no whole checkpoint, if it is a run of another stage, or if it kept no average.
    """
    run_folder, checkpoint = find_checkpoint(Path(path).resolve())
    recipe = _recipe_of(checkpoint)
    if average == "ema" and not has_ema(checkpoint):
        raise UserError(f"{checkpoint}: the run kept no moving average (ema.decay=0); take the raw weights")
    averaged = average != "raw" and has_ema(checkpoint)
    tensors = fp32_weights(checkpoint, average=averaged)
    progress, provenance = read_progress(checkpoint), read_provenance(checkpoint)
    source = f"{recipe.name}, {checkpoint.name}" + (", moving average" if averaged else "")
    facts = _facts(recipe, progress, provenance, run_folder, averaged)
    if isinstance(recipe, FinetuneRecipe):
        needed = {"classes", "mean", "std"}
        if not needed <= provenance.keys():
            raise UserError(
                f"{checkpoint / PROVENANCE}: does not tell {', '.join(sorted(needed - provenance.keys()))}; "
                "restore it, or give another checkpoint"
            )
        classes = provenance["classes"]
        statistics = {name: tuple(provenance[name]) for name in ("mean", "std")}
        return BeitWeights(
            "classifier",
            recipe.model,
            tensors,
            source,
            classes=tuple(classes),
            crop=recipe.evaluation.crop,
            facts=facts,
            **statistics,
        )
    kept = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(_PREFIX) or name in _HEAD_NAMES
    }
    kind: Literal["mim", "features"] = "mim" if "mask_token" in kept else "features"
    facts |= _left_out(tensors.keys() - {_PREFIX + name for name in kept} - set(_HEAD_NAMES))
    return BeitWeights(kind, recipe.model, kept, source, facts=facts)


def stage_of(path: Path) -> str | None:
    """The stage of the run whose folder, or one of whose checkpoints, a path is; None: it is none of these."""
    return read_settings(path)["stage"] if (path / SETTINGS).is_file() else None


def read_segmenter_run(path: Path) -> SegmenterWeights:
    """float32 weights of a run of segment.py.

    Args:
        path: the run folder, or one of its checkpoints/step_N.
    Raises: UserError if there is no whole checkpoint, or its records do not tell classes and statistics.
    """
    run_folder, checkpoint = find_checkpoint(Path(path).resolve(), ("segment",))
    recipe, progress, provenance = _recipe_of(checkpoint), read_progress(checkpoint), read_provenance(checkpoint)
    _check_told(checkpoint, provenance, "classes", "mean", "std")
    return SegmenterWeights(
        recipe.model,
        recipe.segmenter,
        _dense_tensors(checkpoint),
        f"{recipe.name}, {checkpoint.name}",
        tuple(provenance["classes"]),
        tuple(provenance["mean"]),
        tuple(provenance["std"]),
        _dense_facts(recipe, progress, provenance, run_folder, _SCORES),
        evaluation=recipe.evaluation,
    )


def read_detector_run(path: Path) -> DetectorWeights:
    """float32 weights of a run of detect.py.

    Args:
        path: the run folder, or one of its checkpoints/step_N.
    Raises: UserError if there is no whole checkpoint, or its records do not tell categories and statistics.
    """
    run_folder, checkpoint = find_checkpoint(Path(path).resolve(), ("detect",))
    recipe, progress, provenance = _recipe_of(checkpoint), read_progress(checkpoint), read_provenance(checkpoint)
    _check_told(checkpoint, provenance, "classes", "category_ids", "mean", "std")
    return DetectorWeights(
        recipe.model,
        recipe.detector,
        _dense_tensors(checkpoint),
        f"{recipe.name}, {checkpoint.name}",
        tuple(provenance["classes"]),
        tuple(provenance["category_ids"]),
        short_px=recipe.augment.short_px,
        long_px=recipe.augment.long_px,
        square_px=recipe.augment.long_px if recipe.augment.kind == "scale_jitter" else 0,
        mean=tuple(provenance["mean"]),
        std=tuple(provenance["std"]),
        facts=_dense_facts(recipe, progress, provenance, run_folder, _SCORES_OF_DETECTION),
    )


def _check_told(checkpoint: Path, provenance: dict, *names: str) -> None:
    missing = sorted(set(names) - provenance.keys())
    if missing:
        raise UserError(
            f"{checkpoint / PROVENANCE}: does not tell {', '.join(missing)}; restore it, or give another checkpoint"
        )


def _dense_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    # Consolidated buffers are float32, this one among them.
    return {
        name: tensor.long() if name.endswith("num_batches_tracked") else tensor
        for name, tensor in fp32_weights(checkpoint).items()
    }


def _dense_facts(recipe, progress: Progress, provenance: dict, run_folder: Path, scores: dict[str, str]) -> dict:
    """For the card of a segmenter or detector.

    Args:
        scores: name of a card -> of a row of evaluation.jsonl.
    """
    facts = {
        "recipe": recipe.name,
        "optimiser steps": f"{progress.step}",
        "images seen": f"{progress.cursor.samples}",
        "images": f"{provenance.get('num_samples', '?')} images, fingerprint "
        f"`{provenance.get('images_fingerprint', '?')}`",
        "started from": provenance.get("init", "scratch"),
    }
    measured = [row for row in read_evaluation(run_folder) if row["step"] == progress.step]
    facts |= {name: f"{measured[-1][key]:.2f}" for name, key in scores.items() if measured and key in measured[-1]}
    facts |= _licences_of_origin(provenance.get("init_facts", {}))
    facts["code"] = f"peco_ds, commit `{provenance.get('commit', '?')}`"
    return facts


def _left_out(names: set[str]) -> dict[str, str]:
    """For the model card: the parts of a masked image model that only its pre-training needs."""
    parts = {
        part: sum(name.startswith(f"{part}.") for name in names)
        for part in sorted({name.split(".")[0] for name in names})
    }
    return (
        {
            "left out": ", ".join(f"{part} ({count} tensors)" for part, count in parts.items())
            + ", which only pre-training needs"
        }
        if parts
        else {}
    )


def _recipe_of(checkpoint: Path):
    recorded = read_settings(checkpoint)
    if recorded["stage"] not in _RECIPES:
        raise UserError(f"{checkpoint}: of a run of {recorded['stage']}; give a run of pretrain.py or finetune.py")
    try:
        return TypeAdapter(_RECIPES[recorded["stage"]]).validate_python(recorded["recipe"])
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{checkpoint / SETTINGS}: recipe.{'.'.join(map(str, first['loc']))}: {first['msg']}; restore "
            "it, or give another checkpoint"
        ) from None


def find_checkpoint(path: Path, stages: tuple[str, ...] = _OF_BEIT) -> tuple[Path, Path]:
    """(run folder, checkpoint folder) of what the user named.

    Args:
        stages: that may have made the run.
    A checkpoint that was moved elsewhere is its own run folder: it holds the run's records.

    Raises: UserError if there is no whole checkpoint of such a run.
    """
    single = (path / PROGRESS).is_file()
    run_folder = path.parent.parent if path.parent.name == FOLDER else path
    stage = read_settings(path if single else run_folder)["stage"]
    if stage not in stages:
        raise UserError(
            f"{run_folder}: a run of {stage}; give a run of pretrain.py or finetune.py (a tokenizer's "
            "release lies in its run folder already)"
        )
    if single:
        fault = verify(path)
        if fault:
            raise UserError(f"{path}: damaged ({fault}); give an older checkpoint of the run")
        return run_folder, path
    checkpoint = newest_whole(run_folder)
    if checkpoint is None:
        raise UserError(
            f"{run_folder}: {len(list_checkpoints(run_folder))} checkpoints, none of them whole; let the "
            "run reach a checkpoint first"
        )
    return run_folder, checkpoint


def _objective(recipe: PretrainRecipe) -> str:
    """The objective of the run, in words."""
    objective, mask, encoding, aggregation = (
        recipe.objective,
        recipe.mask,
        recipe.encoding,
        recipe.aggregation,
    )
    parts = [objective.name, f"{objective.num_codes} codes"]
    # Weights are converted even where the file of an objective from outside is missing.
    kind = OBJECTIVES.get(objective.name)
    parts += [words] if kind and (words := kind.words(recipe)) else []
    parts.append(
        f"{'' if mask.exact else 'at most '}{mask.count} of {recipe.model.grid**2} patches masked ({mask.kind})"
    )
    if encoding.kind == "visible":
        parts.append(f"encoder of visible patches alone, decoder {encoding.decoder_width} x {encoding.decoder_depth}")
    if aggregation.early_block:
        parts.append(f"second branch from block {aggregation.early_block}")
    return ", ".join(parts)


def _facts(
    recipe: PretrainRecipe | FinetuneRecipe, progress: Progress, provenance: dict, run_folder: Path, averaged: bool
) -> dict[str, str]:
    """The facts for a model card: name -> text."""
    facts = {"recipe": recipe.name, "optimiser steps": f"{progress.step}", "images seen": f"{progress.cursor.samples}"}
    facts["images"] = (
        f"{provenance.get('num_samples', '?')} images, fingerprint `{provenance.get('images_fingerprint', '?')}`"
    )
    if isinstance(recipe, PretrainRecipe):
        tokenizer = provenance.get("tokenizer", {})
        facts["objective"] = _objective(recipe)
        facts["tokenizer"] = f"fingerprint `{provenance.get('tokenizer_fingerprint', '?')}`"
        facts["tokenizer's judge"] = tokenizer.get("judge", "not recorded")
        facts |= {
            name: tokenizer[key]
            for name, key in ((TOKENIZER_LICENCE, "licence"), (JUDGE_LICENCE, "judge_licence"))
            if tokenizer.get(key) and isinstance(tokenizer[key], str)
        }
        measured, names = (
            [row for row in read_metrics(run_folder) if row["step"] <= progress.step and row.get("loss") is not None],
            ("loss", "accuracy"),
        )
    else:
        facts["started from"] = provenance.get("init", "scratch")
        facts["weights"] = f"moving average, decay {recipe.ema.decay}" if averaged else "raw, no moving average"
        prefix = "ema_" if averaged else ""
        measured, names = (
            [row for row in read_evaluation(run_folder) if row["step"] == progress.step],
            (f"{prefix}top1", f"{prefix}top5"),
        )
    facts |= {
        name.replace("ema_", ""): f"{measured[-1][name]:.4f}"
        for name in names
        if measured and isinstance(measured[-1].get(name), (int, float))
    }
    facts |= {
        f"{name} of what it started from": text
        for name, text in provenance.get("init_facts", {}).items()
        if name in ("recipe", "tokenizer", "tokenizer's judge", "images seen", FACT)
    }
    facts |= _licences_of_origin(provenance.get("init_facts", {}))
    facts["code"] = f"peco_ds, commit `{provenance.get('commit', '?')}`"
    return facts


def _licences_of_origin(init_facts: dict[str, str]) -> dict[str, str]:
    """The terms of the weights that a run started from, over any number of runs: a fine-tuning of a fine-tuning is
    still bound by its tokenizer's terms.
    """
    names = {f"{name} of what it started from": name for name in (TOKENIZER_LICENCE, JUDGE_LICENCE)}
    found = {fact: init_facts.get(name) or init_facts.get(fact) for fact, name in names.items()}
    return {fact: text for fact, text in found.items() if text and isinstance(text, str)}
