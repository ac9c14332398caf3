"""The names that dry runs called before dry_run.py; to be removed with their last caller."""

from __future__ import annotations

from peco_ds.planner.dry_run import dry_run_report, tokenizing_report

__all__ = ["finetune_report", "pretrain_report", "tokenizer_report", "tokenizing_report"]


def pretrain_report(recipe, *, num_samples, num_views, durations, ds_config, assumed=False) -> str:
    return dry_run_report(recipe, ds_config=ds_config, num_samples=None if assumed else num_samples)


def finetune_report(recipe, *, num_samples, num_classes, durations, ds_config, assumed=False) -> str:
    samples = None if assumed else num_samples
    return dry_run_report(recipe, ds_config=ds_config, num_samples=samples, num_classes=num_classes)


def tokenizer_report(recipe, num_samples, durations, *, ds_config=None, assumed=False) -> str:
    return dry_run_report(recipe, ds_config=ds_config or {}, num_samples=None if assumed else num_samples)
