"""A temporary_file belongs to its writer while the writer lives; afterwards it is anybody's to remove."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peco_ds.data.atomic_files import lock_file, remove_leftovers, temporary_file

REPOSITORY = Path(__file__).resolve().parents[1]


def start(body: str) -> subprocess.Popen:
    """Another process that says when it has done `body`, then waits."""
    code = f"import time\nfrom pathlib import Path\nfrom peco_ds.data.atomic_files import lock_file, temporary_file\n{body}\n"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_living_writers_draft_is_left_alone_and_a_dead_ones_is_removed(tmp_path):
    writer = start(
        f"with temporary_file(Path({str(tmp_path / 'a.tar')!r})) as file:\n    file.write(b'half')\n    "
        "file.flush()\n    print('ready', flush=True)\n    time.sleep(60)"
    )
    (tmp_path / ".b.tar.elsewhere.1.tmp").write_bytes(b"another file's")
    remove_leftovers(tmp_path, ["a.tar"])
    assert len(list(tmp_path.glob(".a.tar.*.tmp"))) == 1
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    remove_leftovers(tmp_path, ["a.tar"])
    assert [path.name for path in tmp_path.iterdir()] == [".b.tar.elsewhere.1.tmp"]


def test_a_draft_that_is_not_renamed_goes_and_one_that_is_stays(tmp_path):
    with pytest.raises(ZeroDivisionError), temporary_file(tmp_path / "a") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with temporary_file(tmp_path / "a") as file:
        file.write(b"whole")
        file.flush()
        os.replace(file.name, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"whole"


def test_a_lock_is_held_by_one_process_and_falls_to_the_next_when_its_holder_is_killed(tmp_path):
    holder = start(
        f"with lock_file(Path({str(tmp_path / 'lock')!r}), wait=False) as nobody_else:\n    assert "
        "nobody_else\n    print('ready', flush=True)\n    time.sleep(60)"
    )
    with lock_file(tmp_path / "lock", wait=False) as nobody_else:
        assert not nobody_else
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with lock_file(tmp_path / "lock", wait=False) as nobody_else:
        assert nobody_else
