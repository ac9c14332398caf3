"""The short version of the disks that fail: two of each stage's writes, the last one among them."""

from __future__ import annotations

import shutil
from pathlib import Path

import endings
import pytest
from conftest import fork_server

from peco_ds.data.indexed_tar import index_name
from peco_ds.errors import EXIT_BAD_INPUT
from peco_ds.runtime.checkpoint.files import newest_whole
from peco_ds.schema import IMAGE_EXTENSIONS, read_json

STAGES = ("linear_probe", "evaluate", "tokenize_shards", "train_tokenizer", "segment", "detect", "convert_checkpoint")


@pytest.fixture(scope="module")
def tasks(small_sets, labelled_sets, tmp_path_factory):
    made = endings.make_tasks(tmp_path_factory.mktemp("tasks"), small_sets.overrides, labelled_sets.overrides)
    return {task.stage: task for task in made}


def damaged(shard: Path) -> None:
    """Zeros in the middle of the first image of a shard."""
    members = read_json(shard.with_name(index_name(shard.name)))["samples"][0]["members"]
    offset, size, _ = next(span for extension, span in members.items() if extension in IMAGE_EXTENSIONS)
    data = bytearray(shard.read_bytes())
    data[offset + size // 4 : offset + size // 2] = bytes(size // 2 - size // 4)
    shard.write_bytes(data)


@pytest.mark.parametrize("stage", ["segment", "detect", "linear_probe"])
def test_a_bad_image_to_measure_on_is_named_after_the_checkpoint_that_was_due(stage, tasks, tmp_path):
    task = tasks[stage]
    root = Path(next(a for a in task.arguments if a.startswith("data.root=")).partition("=")[2])
    shutil.copytree(root / "images" / "val", tmp_path / "val")
    damaged(sorted((tmp_path / "val").glob("*.tar"))[0])
    arguments = [argument.format(out=tmp_path) for argument in task.arguments]
    every = {"segment": ["evaluation.every_steps=1"], "detect": ["evaluation.every_epochs=0.25"]}.get(stage, [])
    ended = fork_server().start(stage, [*arguments, f"data.val_images={tmp_path / 'val'}", *every], ranks=1)
    errors = [line for line in ended.stderr().splitlines() if "error:" in line]
    assert ended.codes == [EXIT_BAD_INPUT] and len(errors) == 1, ended.stderr()
    assert errors[0].startswith("error: ") and "CRC-32 differs" in errors[0] and "Traceback" not in ended.stderr()
    if every:
        # Detection measures after its first epoch, of four steps.
        assert newest_whole(tmp_path / "run") is not None


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fails_is_one_line_costs_no_figure_and_is_made_good_by_the_next_start(stage, tasks, tmp_path):
    trial = endings.try_disks(fork_server(), tasks[stage], tmp_path, seed=0, most=2)
    assert trial.broken == []
    assert trial.faults and trial.writes > 1, "nothing was tried"
