"""Where a run or a token set stands, read off its folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from peco_ds import run_status
from peco_ds.errors import UserError
from peco_ds.run_status import run_lines, token_lines
from peco_ds.schema import sha256_of_file

REPOSITORY = Path(__file__).resolve().parents[1]
NOW = 2_000_000.0


def append(path: Path, *rows: dict) -> None:
    with open(path, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(os.urandom(2**20))
    (folder / "progress.json").write_text("{}")
    files = {path.name: [path.stat().st_size, sha256_of_file(path)] for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A pre-training that was killed once and now runs: 120 of 400 steps, a row a minute."""
    run = tmp_path / "runs" / "vit"
    run.mkdir(parents=True)
    (run / "settings.yaml").write_text(
        yaml.safe_dump({"stage": "pretrain", "recipe": {"name": "peco_vith14"}, "sources": {}})
    )
    machine = {
        "ranks": 64,
        "zero_stage": 3,
        "host": "node7",
        "total_steps": 400,
        "stop_step": 400,
        "slurm_job": "981",
        "commit": "0123456789abcdef",
    }
    for number, began in ((1, NOW - 2000), (2, NOW - 630)):
        append(
            run / "starts.jsonl",
            {"event": "start", "start": number, "time": began, "startup_s": 30.0, "step": 0, **machine},
        )
    for number in range(1, 7):
        start, second = (1, NOW - 2000 + 60 * number) if number < 3 else (2, NOW - 630 + 30 + 60 * (number - 2))
        row = {
            "step": 20 * number,
            "loss": 7 - number / 10,
            "accuracy": 0.03,
            "images_per_s": 6144.0,
            "step_s": 3.0,
            "data_wait_s": 0.3,
            "skipped_steps": 2,
        }
        append(run / "metrics.jsonl", row | {"bad_images": 5, "time": second, "start": start, "up_s": 30 + 60 * number})
    for step in (60, 100):
        checkpoint(run, step)
    return run


def test_a_running_run_shows_step_measures_speed_time_to_go_checkpoints_and_goodput(run_folder):
    text = "\n".join(run_lines(run_folder, now=NOW - 350))
    assert "pretrain, recipe peco_vith14, 64 ranks, ZeRO-3, on node7, commit 0123456789ab" in text
    assert "step 120 of 400 (30.0 %), loss 6.4, accuracy 0.03, 6144.0 images/s, 0:14:00 to go" in text
    assert (
        "running: last heard of 0:00:10 ago (a row every 60.0 s); 2 starts, Slurm job 981; the one before was killed"
        in text
    )
    assert "checkpoint step_00000100: 1.0 MiB, whole by its sizes" in text
    assert "2 steps skipped, 5 bad images" in text
    assert "goodput " in text and "note:" not in text


def test_a_run_that_went_silent_is_called_stale(run_folder):
    assert "STALE, killed or hung: last heard of 2:00:00 ago" in "\n".join(run_lines(run_folder, now=NOW - 360 + 7200))


def test_a_run_that_lately_made_a_long_evaluation_is_given_the_time_of_another(run_folder):
    # six minutes after the row before
    append(run_folder / "metrics.jsonl", {"step": 140, "step_s": 3.0, "time": NOW, "start": 2, "up_s": 700.0})
    assert "running" in "\n".join(run_lines(run_folder, now=NOW + 1000))
    assert "STALE" in "\n".join(run_lines(run_folder, now=NOW + 1200))


def test_a_clock_behind_the_runs_gives_no_negative_time(run_folder):
    assert "last heard of 0:00:00 ago" in "\n".join(run_lines(run_folder, now=NOW - 10_000))


@pytest.mark.parametrize(
    "code, reason, words",
    [
        (0, "", "the last done at step 400"),
        (75, "", "the last stopped in good order at step 400"),
        (2, "UserError: shard 3 is gone", "the last ended with code 2 at step 400 (UserError: shard 3 is gone)"),
        (76, "", "the last ended with code 76 at step 400"),
    ],
)
def test_how_the_last_start_ended_is_said(run_folder, code, reason, words):
    append(run_folder / "starts.jsonl", {"event": "end", "start": 2, "code": code, "reason": reason, "step": 400})
    assert words in "\n".join(run_lines(run_folder, now=NOW + 1e6))


def test_a_damaged_checkpoint_is_said_and_a_flipped_byte_when_hashes_are_compared(run_folder):
    weights = run_folder / "checkpoints" / "step_00000060" / "weights.pt"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert "DAMAGED" not in "\n".join(run_lines(run_folder, now=NOW))
    verified = "\n".join(run_lines(run_folder, verify=True, now=NOW))
    assert "step_00000060: 1.0 MiB, DAMAGED (weights.pt has changed since it was written)" in verified
    assert "step_00000100: 1.0 MiB, whole, hashes compared" in verified
    weights.write_bytes(whole[:-1])
    assert f"DAMAGED (weights.pt has {2**20 - 1} bytes, {2**20} were written)" in "\n".join(
        run_lines(run_folder, now=NOW)
    )
    weights.unlink()
    assert "DAMAGED (weights.pt is missing)" in "\n".join(run_lines(run_folder, now=NOW))


def test_older_unfinished_and_set_aside_checkpoints_are_counted(run_folder):
    for step in (20, 40):
        checkpoint(run_folder, step)
    (run_folder / "checkpoints" / ".tmp-step_00000120").mkdir()
    (run_folder / "checkpoints" / "set_aside_step_00000110_x").mkdir()
    text = "\n".join(run_lines(run_folder, now=NOW))
    assert text.count("\ncheckpoint step_") == 3
    assert "further checkpoints: 1 older, step_00000120 being written, or left over, 1 set aside" in text


def test_what_a_start_took_its_time_for_is_said_by_phase(run_folder):
    started = {
        "event": "start",
        "start": 3,
        "time": NOW,
        "startup_s": 61.0,
        "phases_s": {"imports": 9.5, "checkpoint": 0.01, "model": 51.0},
    }
    append(run_folder / "starts.jsonl", started)
    assert "start-up 61.0 s (imports 9.5 s, model 51.0 s)" in run_lines(run_folder, now=NOW + 70)
    append(
        run_folder / "starts.jsonl", {"event": "first_step", "start": 3, "up_s": 70.0, "batch_s": 1.5, "step_s": 7.5}
    )
    assert "start-up 61.0 s (imports 9.5 s, model 51.0 s); first batch 1.5 s, first step 7.5 s" in run_lines(
        run_folder, now=NOW + 70
    )


JUNK = [
    b"",
    b"\xff\x00\xfe",
    b"[1, 2",
    b"[" * 50_000,
    b"{}",
    b"null",
    b'{"step": {}, "files": 3, "recipe": 7, "shards": 1}',
    b'{"event": "start", "start": []}\n',
    b"!!python/object:os.system x",
]


@pytest.mark.parametrize(
    "name",
    ["settings.yaml", "metrics.jsonl", "starts.jsonl", "evaluation.jsonl", "checkpoints/step_00000100/manifest.json"],
)
def test_a_damaged_file_never_ends_in_a_traceback_and_the_rest_is_still_told(run_folder, name):
    path = run_folder / name
    whole = path.read_bytes() if path.exists() else b'{"step": 100, "top1": 50.0}\n'
    for damaged in (*JUNK, whole[: len(whole) // 2], whole[:-5], whole.replace(b":", b";")):
        path.write_bytes(damaged)
        lines = run_lines(run_folder, now=NOW, verify=True)
        assert any("step_00000060: 1.0 MiB, whole" in line for line in lines)
    path.unlink()
    path.mkdir()
    assert len(run_lines(run_folder, now=NOW)) > 3


def test_damage_is_said(run_folder):
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 140, "lo')
    (run_folder / "settings.yaml").write_text("stage: [")
    text = "\n".join(run_lines(run_folder, now=NOW))
    assert (
        "note: the last line of metrics.jsonl is half written" in text and "note: settings.yaml is not readable" in text
    )
    assert "step 120 of 400" in text


def token_set(folder: Path, done: int, of: int | None) -> Path:
    (folder / ".parts").mkdir(parents=True)
    for number in range(done):
        tar = folder / f"train-{number:06d}.tar"
        tar.write_bytes(bytes(1000))
        part = {"made_from": "x", "unreadable": number, "shard": {"name": tar.name, "samples": 24, "bytes": 1000}} | (
            {"of": of} if of else {}
        )
        (folder / ".parts" / f"{tar.stem}.json").write_text(json.dumps(part))
    return folder


def test_a_token_set_in_the_making_shows_how_many_shards_are_done(tmp_path):
    folder = token_set(tmp_path / "tokens", 3, of=8)
    assert token_lines(folder) == ["unfinished token set: 3 of 8 shards done, 72 images, 3 of them unreadable"]
    (folder / "train-000001.tar").write_bytes(b"")
    (folder / ".parts" / "train-000002.json").write_text("{")
    lines = token_lines(folder)
    assert (
        lines[0] == "unfinished token set: 1 of 8 shards done, 24 images" and "2 shards are damaged or gone" in lines[1]
    )


def test_a_finished_token_set_says_so(tmp_path):
    folder = token_set(tmp_path / "tokens", 3, of=None)
    assert token_lines(folder)[0].startswith("unfinished token set: 3 shards done")
    (folder / "manifest.json").write_text(
        json.dumps({"kind": "tokens", "shards": [1, 2, 3], "samples": 72, "num_views": 4})
    )
    assert token_lines(folder) == ["token set, finished: 3 shards, 72 images, 4 views each"]


def test_a_folder_that_is_neither_is_refused_in_one_line_before_anything_is_printed(run_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=folder.name):
            run_status.main([str(run_folder), str(folder)])
    assert capsys.readouterr().out == ""


def test_the_launcher_reads_a_copy_without_slurm_or_torch(run_folder, tmp_path):
    moved = shutil.copytree(run_folder, tmp_path / "a copy")
    tokens = token_set(tmp_path / "tokens", 1, of=2)
    (tmp_path / "no_torch" / "torch").mkdir(parents=True)
    (tmp_path / "no_torch" / "torch" / "__init__.py").write_text("raise ImportError('torch was imported')")
    env = {"PATH": "/usr/bin:/bin", "PECO_VENV": sys.prefix, "PYTHONPATH": str(tmp_path / "no_torch")}
    shown = subprocess.run(
        ["bash", REPOSITORY / "launchers" / "status.sh", moved, tokens],
        env=env,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert shown.returncode == 0, shown.stderr
    assert "step 120 of 400" in shown.stdout and "1 of 2 shards done" in shown.stdout
    refused = subprocess.run(
        ["bash", REPOSITORY / "launchers" / "status.sh", tmp_path / "x"],
        env=env,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and "no such folder" in refused.stderr


def test_file_names_are_those_that_training_and_tokenizing_write():
    from peco_ds.data import token_parts
    from peco_ds.runtime import run_folder
    from peco_ds.runtime.checkpoint import files as checkpoint_files

    assert (run_status.SETTINGS, run_status.CHECKPOINTS, run_status.PARTS) == (
        run_folder.SETTINGS,
        checkpoint_files.FOLDER,
        token_parts.PARTS,
    )
    assert run_status.MANIFEST_NAME == checkpoint_files.MANIFEST
