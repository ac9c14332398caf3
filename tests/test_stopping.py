"""Signals where users send them: Ctrl-C to a plain process, an end of the `deepspeed` command itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from fork_server import free_port

from peco_ds.runtime.checkpoint.files import list_checkpoints
from peco_ds.runtime.metrics import read_metrics

DEEPSPEED = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]


def events(out: Path, kind: str) -> list[dict]:
    path = out / "starts.jsonl"
    return (
        [row for row in map(json.loads, path.read_text().splitlines()) if row["event"] == kind]
        if path.is_file()
        else []
    )


def wait_until(condition, log: Path, process: subprocess.Popen | None = None) -> None:
    """Until it holds. Fails with the log after ten minutes, or once the process has ended without it."""
    for _ in range(6000):
        ended = process is not None and process.poll() is not None
        if condition():
            return
        if ended:
            break
        time.sleep(0.1)
    raise AssertionError(log.read_text()[-4000:])


def heed_signals() -> None:
    """Tests may run under nohup or in a shell's background, where these are ignored, and so would be in what they
    start.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("launcher", "number", "code"),
    (
        ([sys.executable], signal.SIGINT, 75),
        ([sys.executable], signal.SIGHUP, 75),
        (DEEPSPEED, signal.SIGTERM, None),
        (DEEPSPEED, signal.SIGKILL, None),
    ),
)
def test_a_run_saves_and_ends_in_good_order(small_sets, tmp_path, launcher, number, code):
    out = tmp_path / "run"
    command = [
        *launcher,
        "peco_ds/pretrain.py",
        "--recipe",
        "peco_vitb16",
        "--deepspeed_config",
        "ds_configs/zero1.json",
        "--out",
        out,
        *small_sets.overrides,
        "schedule.steps=100000",
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with open(tmp_path / "log", "wb") as log:
        # of its own session: the signal is for the one process that a user knows the number of
        process = subprocess.Popen(
            [*map(str, command)],
            cwd=REPOSITORY,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=heed_signals,
        )
        try:
            wait_until(lambda: len(read_metrics(out)) > 3, tmp_path / "log", process)
            process.send_signal(number)
            # The ranks may outlive the launcher.
            wait_until(lambda: events(out, "end"), tmp_path / "log")
            ended = process.wait(timeout=600)
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    end = events(out, "end")[-1]
    assert end["code"] == 75 and list_checkpoints(out)[0].name == f"step_{end['step']:08d}"
    assert code is None or ended == code
    assert "start the same command again to go on" in (tmp_path / "log").read_text()
