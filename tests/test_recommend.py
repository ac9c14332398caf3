"""The recommended settings are the quickest that fit, and no change without a gain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peco_ds.errors import UserError
from peco_ds.planner.chain import read_chain
from peco_ds.planner.estimate import CHECKPOINTING, SAME_SPEED, estimate, fits, recommend
from peco_ds.planner.fitting import shipped
from peco_ds.planner.hardware import find_hardware

H100 = find_hardware("h100")
JSON = {choice.name: choice for choice in shipped()}
PRETRAINING, FINETUNING = read_chain("peco_vith14", []).main, read_chain("finetune_vith14_448", []).main


@pytest.mark.parametrize("gpus", [1, 8, 64, 512])
def test_nothing_that_fits_is_quicker_by_more_than_the_tie(gpus):
    best = recommend(PRETRAINING, H100, gpus, JSON["zero3.json"]).best
    for name in ("zero1.json", "zero2.json", "zero3.json"):
        for kind in CHECKPOINTING:
            stage = PRETRAINING.with_run(activation_checkpointing=kind)
            if fits(stage, H100, gpus, JSON[name]):
                assert best.step_s() <= SAME_SPEED * estimate(stage, H100, gpus, JSON[name]).step_s()
    assert best.room.used_bytes(best.micro_batch) <= H100.memory_bytes


def test_recomputation_goes_where_there_is_memory_and_stays_where_there_is_none():
    lean = FINETUNING.with_run(activation_checkpointing="full")
    assert recommend(lean, H100, 64, JSON["zero1.json"]).best.stage.run.activation_checkpointing == "none"
    cramped = recommend(FINETUNING, replace(H100, memory_bytes=6.5e9), 64, JSON["zero3.json"]).best
    assert cramped.stage.run.activation_checkpointing != "none"


def test_settings_that_are_as_quick_are_left_as_the_recipe_has_them():
    best = recommend(PRETRAINING, H100, 64, JSON["zero3.json"]).best
    assert (best.choice.name, best.micro_batch, best.stage.run.activation_checkpointing) == ("zero3.json", 32, "none")


def test_the_reason_gives_the_step_of_the_other_settings():
    reason = recommend(PRETRAINING, H100, 64, JSON["zero3.json"]).reason
    assert all(
        word in reason for word in ("ZeRO-1", "ZeRO-2", "checkpointing selective", "checkpointing full", "GiB free")
    )


def test_settings_that_overfill_the_host_are_not_recommended():
    poor = replace(H100, host_memory_bytes=20e9)
    for gpus in (1, 8):
        best = recommend(PRETRAINING, poor, gpus, JSON["zero3.json"]).best
        assert best.host_bytes <= poor.host_memory_bytes


def test_where_nothing_fits_the_line_says_what_would():
    with pytest.raises(UserError, match="no setting fits there|what fits there|no number"):
        recommend(PRETRAINING, replace(H100, memory_bytes=2.2e9, host_memory_bytes=1e9), 8, JSON["zero1.json"])
