"""Every stage ends in good order: one line that begins with `error:`, code 2, no half file, no figure lost."""

import argparse
import errno
import io
import os
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_CLASSIFIER, run_stage
from PIL import Image
from tqdm import tqdm

from benchmarks.record import markdown_table, publish
from peco_ds import command_line, evaluate
from peco_ds.convert.release import Release, write_files
from peco_ds.data.labelled import labelled_sets
from peco_ds.data.token_shards import TokenRecord, write_token_shard
from peco_ds.errors import EXIT_BAD_INPUT, EXIT_DONE, UserError
from peco_ds.models.weight_files import made_here, save_tensors
from peco_ds.own_files import written_whole
from peco_ds.runtime.checkpoint.files import list_checkpoints, newest_whole
from peco_ds.schema import VIEW_COLUMNS, write_json
from peco_ds.user_paths import check_folder_takes_files


@contextmanager
def files_of_at_most(num_bytes: int):
    """The system refuses to let a file grow further, as a full disk does; the process's own limit needs no disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def ending(main, capsys) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command_line.run(main, [])
    return ended.value.code, *capsys.readouterr()


def failing(error: Exception):
    def main(_argv):
        raise error

    return main


def records(keys: list[str], size: int = 16):
    for key in keys:
        codes = np.zeros((1, size), np.uint16)
        yield TokenRecord(key, codes, np.ones((1, len(VIEW_COLUMNS)), np.float32))


# ------------------------------------------------------------------------------------ a disk that is full


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE])
def test_what_a_disk_says_is_one_line_also_where_it_names_no_file(capsys, number):
    code, _, err = ending(failing(OSError(number, os.strerror(number))), capsys)
    assert (code, err.count("\n")) == (EXIT_BAD_INPUT, 1) and err.startswith(f"error: {os.strerror(number)}")


def test_an_error_of_the_program_keeps_its_traceback(capsys):
    code, _, err = ending(failing(OSError("no number")), capsys)
    assert code == 1 and "Traceback" in err


@pytest.mark.parametrize("write", ["json", "tensors", "text"])
def test_a_file_that_does_not_fit_leaves_the_old_one_and_no_draft_and_is_named(tmp_path, write):
    path = tmp_path / "file"
    path.write_text("before")

    def attempt():
        if write == "json":
            write_json(path, ["x" * 100_000])
            return
        with written_whole(path) as temporary:
            if write == "tensors":
                save_tensors({"w": torch.zeros(100_000)}, temporary)
            else:
                temporary.write_text("x" * 100_000)

    with files_of_at_most(20_000), pytest.raises(OSError) as caught:
        attempt()
    assert caught.value.filename == str(path) and caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == ["file"] and path.read_text() == "before"


def test_tensors_say_who_wrote_them(tmp_path):
    save_tensors({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert made_here(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"none")
    assert not made_here(tmp_path / "b.safetensors") and not made_here(tmp_path / "c.safetensors")


@pytest.mark.parametrize("weights", ["model.safetensors", "model.pth"])
def test_a_release_that_does_not_fit_leaves_the_old_one_whole_and_no_half_of_a_new_one(tmp_path, weights):
    def release(size: int) -> Release:
        return Release("timm", {weights: {"w": torch.ones(size)}}, {"config.json": {"architecture": "a"}}, "")

    for out in (tmp_path / "empty", tmp_path / "old"):
        if out.name == "old":
            write_files(out, release(2), "# Card\n")
        before = {path.name: path.read_bytes() for path in out.glob("*")}
        with files_of_at_most(50_000), pytest.raises(OSError) as caught:
            write_files(out, release(100_000), "# Card\n")
        assert Path(str(caught.value.filename)).name == weights
        assert {path.name: path.read_bytes() for path in out.glob(".*")} == {}
        assert {path.name: path.read_bytes() for path in out.glob("*")} == before
    assert not (tmp_path / "empty").exists()


def test_a_token_shard_that_does_not_fit_leaves_nothing(tmp_path):
    with files_of_at_most(30_000), pytest.raises(OSError):
        write_token_shard(tmp_path, "a.tar", records([f"k{number}" for number in range(30)], 4000))
    assert os.listdir(tmp_path) == []


def test_two_images_of_one_key_are_named_with_their_shard_and_the_way_to_mend_it(tmp_path):
    with pytest.raises(UserError, match=r"image shard a.tar: two images have the key 'k'; make the image set again"):
        write_token_shard(tmp_path, "a.tar", records(["k", "l", "k"]))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_takes_no_file_is_found_before_the_work(tmp_path):
    check_folder_takes_files(tmp_path)
    with files_of_at_most(100), pytest.raises(UserError, match="--out x: cannot be written .*make room"):
        check_folder_takes_files(tmp_path, "--out x")
    with pytest.raises(UserError, match="cannot be written"):
        check_folder_takes_files(tmp_path / "vanished")
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------- figures are not lost


@pytest.mark.parametrize("fault", ["full", "vanished"])
def test_an_evaluation_says_its_figures_though_they_cannot_be_written(tmp_path, capsys, fault):
    folder = tmp_path / "results"
    folder.mkdir()
    args = argparse.Namespace(out=folder / "e.json", weights="auto", target="t", shown_target="t")
    if fault == "vanished":
        folder.rmdir()
    with files_of_at_most(10 if fault == "full" else 10**9):
        code, out, err = ending(
            lambda _argv: evaluate.tell(args, {"settings": {}, "quality": {"top1": 71.25}}, "top-1 71.25"), capsys
        )
    assert code == EXIT_BAD_INPUT and err.count("\n") == 1 and err.startswith(f"error: {folder / 'e.json'}: ")
    lines = out.splitlines()
    assert lines[0] == "top-1 71.25" and '"top1": 71.25' in lines[1] and out.endswith("\n")
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_benchmark_prints_its_tables_though_the_record_cannot_be_written(tmp_path, capsys):
    args = argparse.Namespace(record=tmp_path / "r.md", command="python -m benchmarks.some")
    with files_of_at_most(10), pytest.raises(OSError):
        publish(args, "Title", markdown_table(["a"], [["41.5"]]))
    assert "| 41.5 |" in capsys.readouterr().out and os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------ the line of an error


class Stream(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("error", [UserError("bad"), OSError(errno.ENOSPC, "full")])
def test_the_line_of_an_error_begins_a_line_whatever_bar_is_open(monkeypatch, is_terminal, stays, error):
    stream = Stream(is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    bars = [tqdm(total=10, desc=name, leave=stays, mininterval=0, file=stream) for name in ("outer", "inner")]
    bars[0].update(3)
    with pytest.raises(SystemExit):
        command_line.run(failing(error), [])
    lines = stream.getvalue().split("\n")
    assert [line for line in lines if "error:" in line] == [line for line in lines if line.startswith("error: ")]
    assert lines[-2].startswith("error: ") and lines[-1] == ""


# --------------------------------------------------------------------------------------- few and bad images


def image_tree(folder: Path, classes: int, each: int) -> Path:
    rng = np.random.default_rng(0)
    for label in range(classes):
        for number in range(each):
            path = folder / f"class{label}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
    return folder


def packed(folder: Path, out: Path) -> Path:
    run_stage("pack_images", "--images", folder, "--labels", "folders", "--out", out, "--workers", 1)
    return out


def test_one_class_is_refused_before_anything_is_trained(tmp_path):
    images = packed(image_tree(tmp_path / "raw", classes=1, each=3), tmp_path / "set")
    with pytest.raises(UserError, match="of one class, 'class0', so there is nothing to tell apart"):
        labelled_sets(images, images)
    for stage, recipe in (("finetune", "finetune_vitb16"), ("linear_probe", "probe_vitb16")):
        settings = [f"data.images={images}", f"data.val_images={images}", "init.weights=none.pth"]
        done = run_stage(stage, "--recipe", recipe, "--out", tmp_path / "run", *settings, check=False)
        assert done.returncode == EXIT_BAD_INPUT and "nothing to tell apart" in done.stderr
        assert not (tmp_path / "run").exists()


def finetuning(tmp_path: Path, train: Path, val: Path, *settings: str):
    named = [f"data.images={train}", f"data.val_images={val}", "init.weights=", "run.global_batch=4"]
    own = ["schedule.steps=4", "checkpoint.every_steps=2"]
    arguments = ["--recipe", "finetune_vitb16", "--out", tmp_path / "run", *SMALL_CLASSIFIER, *named, *own, *settings]
    return run_stage("finetune", *arguments, check=False)


def test_a_validation_image_that_cannot_be_read_costs_no_checkpoint(tmp_path):
    train = packed(image_tree(tmp_path / "raw", classes=2, each=4), tmp_path / "train")
    val = packed(image_tree(tmp_path / "raw_val", classes=2, each=2), tmp_path / "val")
    tar = val / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    at = data.find(b"\xff\xd8\xff")
    data[at + 50 : at + 400] = bytes(350)
    tar.write_bytes(data)
    # An epoch has two steps.
    done = finetuning(tmp_path, train, val, "evaluation.every_epochs=1")
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and "unreadable image" in errors[0]
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step_00000002"]
    assert newest_whole(tmp_path / "run") is not None


def test_one_image_of_each_class_is_enough_to_train_and_one_to_be_measured(tmp_path):
    train = packed(image_tree(tmp_path / "raw", classes=2, each=1), tmp_path / "train")
    done = finetuning(tmp_path, train, train)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "on 2 images" in done.stdout
