"""Sixteen ranks for real: the same global batches as one rank has, one committed checkpoint, on with it bit for bit or
on four ranks. Four launches run all cases.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, run_stage

from peco_ds.runtime.checkpoint.consolidate import fp32_weights
from peco_ds.runtime.checkpoint.files import list_checkpoints, rank_name, verify
from peco_ds.runtime.checkpoint.pickles import load_known
from peco_ds.runtime.metrics import read_metrics

RANKS, STEPS, STOP, BATCH, MICRO = 16, 6, 3, 32, 2
STOCHASTIC = ["model.drop_path=0.3"]  # every rank draws its own


@pytest.fixture(scope="module")
def runs(small_sets, tmp_path_factory) -> Path:
    """Folder of run folders; beside each NAME, NAME.keys.RANKS.RANK with the images of every pass of a rank."""
    folder = tmp_path_factory.mktemp("many_ranks")
    fixed = [
        "--recipe",
        "peco_vitb16",
        "--deepspeed_config",
        str(REPOSITORY / "ds_configs" / "zero3.json"),
        *small_sets.overrides,
    ]
    fixed += [
        f"run.global_batch={BATCH}",
        f"run.micro_batch={MICRO}",
        f"schedule.steps={STEPS}",
        f"checkpoint.every_steps={STOP}",
    ]

    def launch(ranks: int, cases: dict[str, list[str]], names: list[str] | None = None) -> None:
        listing = folder / f"cases_{ranks}.json"
        listed = [
            {
                "stage": "pretrain",
                "arguments": [*fixed, "--out", str(folder / name), *extra],
                "keys": str(folder / f"{name}.keys.{ranks}"),
                "unwritten": True,
            }
            for name, extra in zip(names or cases, cases.values())
        ]
        listing.write_text(json.dumps(listed))
        run_stage("tests/many_runs.py", listing, ranks=ranks, timeout_s=1800)
        assert json.loads(listing.with_name(listing.name + ".codes").read_text()) == [0] * len(listed)

    stop = [f"schedule.stop_at_step={STOP}"]
    launch(1, {"of_1": []})
    launch(2, {"of_2": []})
    sixteen = {"of_16": [], "handed_on": stop, "whole": STOCHASTIC, "half": [*STOCHASTIC, *stop], "rest": STOCHASTIC}
    launch(RANKS, sixteen, names=["of_16", "handed_on", "whole", "stopped", "stopped"])
    launch(4, {"handed_on": []})
    return folder


def global_batches(folder: Path, name: str, ranks: int) -> list[list[str]]:
    """Keys of each optimiser step, micro-step by micro-step over the ranks."""
    passes = [
        [json.loads(line) for line in (folder / f"{name}.keys.{ranks}.{rank}").read_text().splitlines()]
        for rank in range(ranks)
    ]
    slices = [keys for each in zip(*passes, strict=True) for keys in each]
    a_step = BATCH // MICRO
    return [sum(slices[first : first + a_step], []) for first in range(0, len(slices), a_step)]


def losses(folder: Path, name: str) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / name)]


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    assert len(ours) == len(theirs) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs))


def tensors_of(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that the ranks wrote, by file and place."""

    def walk(value, place: str) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(value, torch.Tensor):
            yield place, value
        elif isinstance(value, (dict, list, tuple)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(item, f"{place}/{key}")

    for path in sorted(checkpoint.glob("*.pt")):
        yield from walk(load_known(path), path.name)


def test_sixteen_ranks_train_on_the_images_of_one_rank_in_its_order(runs):
    alone = global_batches(runs, "of_1", 1)
    assert len(alone) == STEPS and all(len(set(keys)) == BATCH for keys in alone)
    assert global_batches(runs, "of_16", RANKS) == alone == global_batches(runs, "of_2", 2)


def test_sixteen_ranks_have_the_losses_of_one_and_of_two(runs):
    # float32; measured worst case 1.3e-7: sums over ranks are taken in another order
    assert largest_difference(losses(runs, "of_16"), losses(runs, "of_1")) < 2e-6
    assert largest_difference(losses(runs, "of_16"), losses(runs, "of_2")) < 2e-6


def test_the_checkpoint_of_sixteen_ranks_is_committed_with_every_part_and_its_hash(runs):
    newest, older = list_checkpoints(runs / "of_16")
    assert (newest.name, older.name) == (f"step_{STEPS:08d}", f"step_{STOP:08d}")
    assert (newest.parent / "latest").read_text().strip() == newest.name
    files = json.loads((newest / "manifest.json").read_text())["files"]
    assert {path.name for path in newest.iterdir()} == {*files, "manifest.json"}, (
        "a part is missing, or a file is not vouched for"
    )
    for name, (num_bytes, sha256) in files.items():
        content = (newest / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (num_bytes, sha256)
    assert sum(name.endswith("_optim_states.pt") for name in files) == RANKS and all(
        rank_name(rank) in files for rank in range(RANKS)
    )
    progress = json.loads((newest / "progress.json").read_text())
    assert (progress["world_size"], progress["step"], progress["cursor"]["samples"]) == (RANKS, STEPS, STEPS * BATCH)
    assert not list(newest.parent.glob(".tmp-*")) and verify(newest) == ""


def test_a_checkpoint_that_misses_the_part_of_one_of_sixteen_ranks_is_not_whole(runs, tmp_path):
    copy = tmp_path / "step_00000006"
    shutil.copytree(list_checkpoints(runs / "of_16")[0], copy)
    (copy / "zero_pp_rank_11_mp_rank_00_optim_states.pt").unlink()
    assert "zero_pp_rank_11" in verify(copy)


def test_sixteen_ranks_that_stop_and_go_on_end_bit_for_bit_as_if_they_had_not(runs):
    whole, stopped = (list_checkpoints(runs / name)[0] for name in ("whole", "stopped"))
    assert [row["step"] for row in read_metrics(runs / "stopped")] == list(range(1, STEPS + 1))
    assert losses(runs, "stopped") == losses(runs, "whole")
    weights = [fp32_weights(folder) for folder in (whole, stopped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # Padding included, which ZeRO-3 leaves unwritten.
    states = [dict(tensors_of(folder)) for folder in (whole, stopped)]
    assert (
        states[0].keys() == states[1].keys()
        and sum("exp_avg_sq" in name for name in states[0]) >= RANKS
        and sum("random" in name for name in states[0]) >= 2 * RANKS
    )
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    assert global_batches(runs, "stopped", RANKS) == global_batches(runs, "whole", RANKS)


def test_four_ranks_take_over_from_sixteen_with_the_same_global_batches_and_losses(runs):
    taken_over = global_batches(runs, "handed_on", RANKS) + global_batches(runs, "handed_on", 4)
    assert taken_over == global_batches(runs, "of_1", 1)
    assert largest_difference(losses(runs, "handed_on"), losses(runs, "of_1")) < 2e-6
    progress = json.loads((list_checkpoints(runs / "handed_on")[0] / "progress.json").read_text())
    assert (progress["world_size"], progress["cursor"]["samples"]) == (4, STEPS * BATCH)
