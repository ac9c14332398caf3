"""A checkpoint folder: whole or not there, verified by its manifest, kept and removed by two cadences."""

import errno
import json
import threading

import pytest
import torch

from peco_ds.config import CheckpointSettings, PretrainRecipe, ScheduleSettings
from peco_ds.durations import resolve_durations
from peco_ds.runtime.checkpoint import writer as background_writer
from peco_ds.runtime.checkpoint.files import (
    FOLDER,
    LATEST,
    MANIFEST,
    PROGRESS,
    UNIVERSAL,
    commit,
    list_checkpoints,
    newest_whole,
    rank_name,
    remove_leftovers,
    retain,
    tag_of,
    verify,
)
from peco_ds.runtime.checkpoint.writer import BackgroundWriter, HostCopies, write_hashed
from peco_ds.schema import sha256_of_file


def make(run_folder, step, content=b"weights"):
    temporary = run_folder / FOLDER / f".tmp-{tag_of(step)}"
    temporary.mkdir(parents=True)
    for name, data in (
        (PROGRESS, b'{"world_size": 1, "zero_stage": 0}'),
        ("mp_rank_00_model_states.pt", content),
        (rank_name(0), b"random states"),
    ):
        (temporary / name).write_bytes(data)
    files = {path.name: [path.stat().st_size, sha256_of_file(path)] for path in temporary.iterdir()}
    commit(temporary, run_folder / FOLDER / tag_of(step), files)
    return run_folder / FOLDER / tag_of(step)


def settle():
    for thread in threading.enumerate():
        if thread.name == "remove checkpoint":
            thread.join()


def test_a_committed_folder_is_whole_and_the_latest(tmp_path):
    folder = make(tmp_path, 7)
    assert verify(folder) == "" and newest_whole(tmp_path) == folder
    assert (tmp_path / FOLDER / LATEST).read_text() == folder.name
    assert not list((tmp_path / FOLDER).glob(".tmp*"))


@pytest.mark.parametrize("name", ("mp_rank_00_model_states.pt", PROGRESS, MANIFEST))
@pytest.mark.parametrize("damage", ("flip", "cut", "remove"))
def test_damage_to_any_file_is_seen_and_the_older_one_taken(tmp_path, name, damage):
    older, newer = make(tmp_path, 3), make(tmp_path, 6)
    path = newer / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(
            bytes([data[0] ^ 1]) + data[1:]
            if damage == "flip"
            else data[:-1]
            if name != MANIFEST
            else data[: len(data) // 2]
        )
    assert newest_whole(tmp_path) == older
    assert name in verify(newer) and list_checkpoints(tmp_path) == [newer, older]


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path):
    folder = make(tmp_path, 3)
    manifest = json.loads((folder / MANIFEST).read_text())
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    manifest["files"]["../../outside"] = [1, sha256_of_file(outside)]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "../../outside" in verify(folder)


@pytest.mark.parametrize("name", ("mp_rank_00_model_states.pt", PROGRESS, "rank_00000.pt"))
def test_a_manifest_that_leaves_a_part_out_is_not_whole(tmp_path, name):
    folder = make(tmp_path, 3)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][name]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / name).unlink()
    assert verify(folder) and newest_whole(tmp_path) is None


def test_the_newest_few_and_the_permanent_ones_are_kept(tmp_path):
    for step in range(1, 11):
        make(tmp_path, step)
        (tmp_path / FOLDER / UNIVERSAL / tag_of(step)).mkdir(parents=True)
        retain(tmp_path / FOLDER, CheckpointSettings(keep_last=2, keep_every_steps=4))
    settle()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [tag_of(step) for step in (10, 9, 8, 4)]
    assert {folder.name for folder in (tmp_path / FOLDER / UNIVERSAL).iterdir()} == {
        tag_of(step) for step in (10, 9, 8, 4)
    }
    assert not list((tmp_path / FOLDER).glob(".old*"))


def test_what_a_kill_left_behind_goes_at_the_next_start_and_nothing_else(tmp_path):
    folder = make(tmp_path, 3)
    for name in (".tmp-step_00000004", ".old-step_00000002-1-2", f"{UNIVERSAL}/.tmp-step_00000003"):
        (tmp_path / FOLDER / name).mkdir(parents=True)
        (tmp_path / FOLDER / name / "half").write_bytes(b"x")
    remove_leftovers(tmp_path / FOLDER)
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {folder.name, LATEST, UNIVERSAL}
    assert not list((tmp_path / FOLDER / UNIVERSAL).iterdir())


def test_permanent_checkpoints_are_saved_at_their_own_cadence_beside_the_frequent_ones():
    recipe = PretrainRecipe(
        schedule=ScheduleSettings(steps=20), checkpoint=CheckpointSettings(every_steps=6, keep_every_steps=8)
    )
    durations = resolve_durations(recipe, 10_000)
    assert [step for step in range(1, 21) if durations.save_after(step)] == [6, 8, 12, 16, 18, 20]


def test_what_changes_after_the_copy_does_not_reach_the_file(tmp_path):
    """The loop trains on while the thread writes.

    A second save takes the same memory and must not disturb what it holds.
    """
    copies, weights = HostCopies(), torch.arange(100_000.0)
    state = {"groups": [weights[:50_000], weights[50_000:]], "step": 3, "nested": ({"moment": weights.view(10, -1)},)}
    for value in (1.0, 2.0):
        weights.fill_(value)
        copies.save(state, str(tmp_path / f"part_{value:.0f}.pt"))
        files = copies.take()
        weights.fill_(-1.0)
        writer = BackgroundWriter(tmp_path, files)
        writer.wait()
        assert not writer.fault
        read = torch.load(tmp_path / f"part_{value:.0f}.pt", weights_only=True)
        assert read["step"] == 3 and all(
            bool((part == value).all()) for part in (*read["groups"], read["nested"][0]["moment"])
        )
        # a slice is written as what it is, not with the whole storage behind it
        assert (tmp_path / f"part_{value:.0f}.pt").stat().st_size < 2.2 * weights.numel() * 4


def test_the_hash_on_the_way_is_the_hash_of_the_file(tmp_path):
    num_bytes, sha256 = write_hashed(tmp_path / "x.pt", {"a": torch.randn(1000, 7), "b": [1, "two"]})
    assert (tmp_path / "x.pt").stat().st_size == num_bytes and sha256_of_file(tmp_path / "x.pt") == sha256


def test_a_write_that_breaks_in_any_way_is_no_checkpoint(tmp_path):
    writer = BackgroundWriter(tmp_path, {"x.pt": threading.Lock()})  # cannot be pickled
    writer.wait()
    assert "TypeError" in writer.fault and not writer.written


def test_a_class_that_a_resume_would_refuse_is_refused_when_it_is_written(tmp_path):
    writer = BackgroundWriter(tmp_path, {"x.pt": {"odd": CheckpointSettings()}})
    writer.wait()
    assert "CheckpointSettings" in writer.fault


def test_what_is_no_tensor_is_copied_too(tmp_path):
    class Scale:
        value = 1

    scale, copies = Scale(), HostCopies()
    copies.save({"scale": scale}, "x.pt")
    scale.value = 2
    assert copies.take()["x.pt"]["scale"].value == 1


def test_a_file_system_that_stumbles_once_is_given_time(tmp_path, monkeypatch):
    calls = []

    def stumbling(path, content):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        return write_hashed(path, content)

    monkeypatch.setattr(background_writer, "write_hashed", stumbling)
    writer = BackgroundWriter(tmp_path, {"x.pt": torch.ones(3)})
    writer.wait()
    assert not writer.fault and len(calls) == 2


def test_a_write_that_fails_is_told_not_raised_in_a_thread(tmp_path):
    writer = BackgroundWriter(tmp_path / "missing", {"x.pt": torch.ones(3)})
    writer.wait()
    assert "x.pt" in writer.fault and "No such file" in writer.fault and not writer.written
