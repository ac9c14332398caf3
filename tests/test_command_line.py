"""What a rank's end tells the launcher: the loss of other ranks is no fault of this one, and nothing waits for those
that are gone.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peco_ds.command_line import lost_ranks
from peco_ds.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED

REPOSITORY = Path(__file__).resolve().parents[1]
# What has not ended by then hangs; no machine is so slow.
HANGS_S = 600.0

RANK = """
import logging, os, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from pathlib import Path
from peco_ds.command_line import run
from peco_ds.errors import UserError
from peco_ds.runtime.rank_log import log_to
from peco_ds.runtime.watchdog import Watchdog

def main(argv):
    run_folder, ending = sys.argv[1:3]
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    log_to(run_folder, rank)
    watchdog = Watchdog(2.0 if ending == "stall" and rank == 0 else 0, Path(run_folder) / "stacks.txt", rank=rank)
    value = torch.ones(1)
    dist.all_reduce(value)
    watchdog.beat(1)
    Path(run_folder, f"joined_{rank}").touch()
    if ending == "done":
        return 0
    if rank == 1:
        if ending == "bad input":
            raise UserError("a value, a reason; a remedy")
        if ending == "fault":
            assert False, "ours"
        time.sleep(3600)
    for step in range(100):
        dist.all_reduce(value)

run(main)
"""


class Ranks:
    """Two ranks joined over gloo."""

    def __init__(self, folder: Path, ending: str) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", RANK, str(folder), ending]
        self.processes = [
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**environment, "RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]

    def wait_until_joined(self) -> None:
        deadline = time.monotonic() + HANGS_S
        while not all((self.folder / f"joined_{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline and all(process.poll() is None for process in self.processes)
            time.sleep(0.05)

    def end(self, rank: int) -> tuple[int, str]:
        _, error = self.processes[rank].communicate(timeout=HANGS_S)
        return self.processes[rank].returncode, error

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def ranks(tmp_path):
    started = []

    def start(ending: str) -> Ranks:
        started.append(Ranks(tmp_path, ending))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_a_rank_whose_peer_is_killed_says_so_in_one_line_and_asks_to_be_started_again(ranks, tmp_path):
    pair = ranks("killed")
    pair.wait_until_joined()
    pair.processes[1].send_signal(signal.SIGKILL)
    code, error = pair.end(0)
    assert code == EXIT_INTERRUPTED
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "rank 0: lost the other ranks (" in lines[0] and "newest checkpoint stands" in lines[0]
    assert "Traceback" not in error and "gloo/transport" not in lines[0]
    log = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert "Traceback" in log and "all_reduce" in log


def test_a_rank_whose_peer_hangs_in_a_collective_is_ended_by_the_watchdog_and_its_stack_names_the_collective(
    ranks, tmp_path
):
    pair = ranks("stall")
    code, error = pair.end(0)
    assert code == EXIT_INTERRUPTED and "nothing has moved" in error
    assert "all_reduce" in (tmp_path / "stacks.txt").read_text()


@pytest.mark.parametrize("ending, other_code", [("fault", EXIT_FAULT), ("bad input", EXIT_BAD_INPUT)])
def test_a_rank_that_fails_by_itself_keeps_its_own_code_and_the_others_follow(ranks, ending, other_code):
    pair = ranks(ending)
    assert pair.end(1)[0] == other_code
    # by itself: nobody here ends it, and a collective would wait for as long as this test does
    assert pair.end(0)[0] == EXIT_INTERRUPTED


def test_ranks_that_are_done_leave_with_0(ranks):
    pair = ranks("done")
    assert [pair.end(rank)[0] for rank in range(2)] == [EXIT_DONE, EXIT_DONE]


@pytest.mark.parametrize(
    "words, reason",
    [
        (
            "[/x/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.1]:268: Connection reset by peer. "
            "This is typically caused by a remote worker",
            "Read error [10.0.0.1]:268: Connection reset by peer",
        ),
        (
            "[enforce fail at /x/gloo/transport/tcp/pair.cc:598] Connection closed by peer [10.0.0.1]:268",
            "Connection closed by peer [10.0.0.1]:268",
        ),
        (
            "[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete",
            "Timed out waiting 4000ms for recv operation to complete",
        ),
    ],
)
def test_what_gloo_says_is_told_by_its_words_also_behind_another_exception(words, reason):
    import torch.distributed  # noqa: F401  what a stage that lost a rank had imported

    assert lost_ranks(RuntimeError(words)) == reason
    outer = KeyError("what came of it")
    outer.__cause__ = RuntimeError(words)
    assert lost_ranks(outer) == reason


def test_types_of_torch_distributed_are_known_and_other_faults_are_not_taken_for_them():
    import torch.distributed as dist

    assert "NCCL" in lost_ranks(
        dist.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:2000, remote process exited or there was a network error"
        )
    )
    assert lost_ranks(dist.DistNetworkError("")) == "DistNetworkError"
    assert lost_ranks(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == ""
    assert lost_ranks(ValueError("Connection closed by peer")) == ""


COMPILES = """
import sys
from peco_ds.command_line import run

def main(argv):
    import torch
    def breaks(x):
        torch._dynamo.graph_break()
        return x

    torch.compile(breaks, fullgraph=True, backend="eager")(torch.ones(3))

run(main)
"""


def test_a_compiler_that_fails_is_one_line_with_the_way_round_it(tmp_path):
    (tmp_path / "compiles.py").write_text(COMPILES)
    done = subprocess.run(
        [sys.executable, tmp_path / "compiles.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert done.returncode == EXIT_BAD_INPUT
    assert (
        done.stderr.count("\n") == 1
        and done.stderr.startswith("error: torch.compile failed (")
        and "run.compile=none" in done.stderr
    )


SPEAKS = """
import logging, sys
from pathlib import Path
from peco_ds.command_line import run
from peco_ds.errors import UserError, notice

NAME = "\\u00e9t\\u00e9\\x1b[2J\\nerror: of\\u202egnp.x"

def main(argv):
    sys.stdout.write("packed: \\u00e9t\\u00e9\\udc80\\n")
    logging.getLogger("peco_ds").warning("sample %s", NAME)
    notice(f"sample {NAME}")
    raise UserError(f"sample {NAME}: bad")

run(main)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_is_shown_in_any_terminal_and_gives_it_no_orders(tmp_path, encoding):
    """What has no sign there, and what a terminal would obey, is shown in escapes: no line is forged."""
    (tmp_path / "speaks.py").write_text(SPEAKS)
    done = subprocess.run(
        [sys.executable, tmp_path / "speaks.py"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    name = {"ascii": "\\xe9t\\xe9"}.get(encoding, "été")
    assert done.stdout.decode(encoding) == f"packed: {name}\\udc80\n"
    lines = done.stderr.decode(encoding).splitlines()
    assert [line.split()[0] for line in lines] == ["sample", "note:", "error:"]
    assert all("\\x1b[2J" in line and "\\u202e" in line and "\x1b" not in line for line in lines), lines
