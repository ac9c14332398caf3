"""What fits: GPUs into a batch, images into memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peco_ds.errors import UserError
from peco_ds.planner.chain import read_chain
from peco_ds.planner.fitting import (
    KEPT_FREE,
    DeepSpeedChoice,
    check_gpus,
    gpus_that_divide,
    require_divides,
    require_known,
    room,
    shares,
    shipped,
)
from peco_ds.planner.hardware import find_hardware

H100 = find_hardware("h100")
JSON = {choice.name: choice for choice in shipped()}
PRETRAINING = read_chain("peco_vith14", []).main
FINETUNING = read_chain("finetune_vith14", []).main


@pytest.mark.parametrize(
    "gpus, said",
    [
        (0, "at least 1"),
        (-8, "at least 1"),
        (2048, "up to 1024"),
        (12, "use 8 or 16"),
        (100, "use 64 or 128"),
        (104, "use 64 or 128"),
    ],
)
def test_gpus_that_are_no_machine_are_refused(gpus, said):
    with pytest.raises(UserError, match=said):
        check_gpus(gpus, H100, PRETRAINING)


@pytest.mark.parametrize("gpus", [1, 4, 8, 16, 1024])
def test_part_of_a_node_and_whole_nodes_are_machines(gpus):
    check_gpus(gpus, H100, PRETRAINING)


def test_offload_to_a_disk_is_refused_for_want_of_rates():
    require_known(JSON["zero3_offload.json"])
    with pytest.raises(UserError, match="offload_optimizer.device 'nvme'.*set it to cpu"):
        require_known(
            DeepSpeedChoice("own.json", {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}})
        )


def test_micro_batches_divide_each_gpus_part_of_the_batch():
    assert shares(PRETRAINING, 512) == [1, 2, 4]
    assert shares(PRETRAINING, 24) == []
    assert shares(FINETUNING, 64) == [2, 4, 8, 16], "mixup pairs the images of a pass"


def test_gpus_that_do_not_divide_the_batch_are_refused_with_those_that_do():
    with pytest.raises(UserError, match="not a multiple of it; use 16 or 32"):
        require_divides(PRETRAINING, 24, H100)
    with pytest.raises(UserError, match="mixup pairs them; use 512"):
        require_divides(FINETUNING, 1024, H100)
    assert gpus_that_divide(FINETUNING, 1024, H100) == 512
    assert gpus_that_divide(PRETRAINING, 24, H100) == 16
    assert gpus_that_divide(PRETRAINING, 7, H100) == 4


@pytest.mark.parametrize("name", JSON)
def test_the_largest_micro_batch_is_the_last_that_fits(name):
    found = room(PRETRAINING, H100, 64, JSON[name])
    largest = found.largest_micro_batch
    assert found.used_bytes(largest) <= (1 - KEPT_FREE) * H100.memory_bytes < found.used_bytes(largest + 1)


def test_no_image_fits_where_not_even_the_state_does():
    found = room(PRETRAINING, replace(H100, memory_bytes=5e9), 1, JSON["zero0.json"])
    assert found.largest_micro_batch <= 0


def test_the_files_of_ds_configs_are_offered_and_offload_last():
    assert [choice.stage for choice in shipped()] == [0, 1, 2, 3, 3]
    assert [choice.offloads for choice in shipped()] == [False] * 4 + [True]


def test_a_json_with_a_batch_of_its_own_can_be_planned_with_others():
    written = DeepSpeedChoice(
        "own.json", {**JSON["zero1.json"].raw, "train_batch_size": 4096, "train_micro_batch_size_per_gpu": 64}
    )
    assert room(PRETRAINING, H100, 64, written).state == room(PRETRAINING, H100, 64, JSON["zero1.json"]).state
