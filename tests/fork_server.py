"""Starts of an entry at a tenth of their price: one process imports torch and deepspeed once and forks every start.

    server = ForkServer(folder)                                         # about ten seconds, once
    done = server.run("peco_ds/pretrain.py", arguments)                 # as subprocess.run, plainly
    done = server.run("peco_ds/pretrain.py", arguments, ranks=2)        # as torchrun
    ended = server.start("pretrain", arguments, ranks=2, faults=...)    # as srun; how each rank ended
    server.close()

The served process (this file run as a program) plays the launcher. It never runs an OpenMP region and never starts a
thread, so that a fork of it is as good as a fresh process. What a fork cannot show is what happens before the entry's
first line: Python's own options, what an import costs, and the hash seed, which all forks of one server share. Tests of
that start fresh processes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

# Variables of a launcher; a start without one has none of them.
OF_LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
# Read while Python, torch or deepspeed is loaded. A start that wants other values than the server has cannot be forked.
READ_AT_IMPORT = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")
SERVER_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}

# What entries import inside their functions; paid once here instead of at every start.
PRELOADED = (
    "torch.utils.tensorboard",
    "torch.utils.data",
    "torch.distributed.elastic",
    "deepspeed.checkpoint",
    "deepspeed.runtime.engine",
    "timm",
)
# torchrun looks at its ranks so often, and gives them so long between SIGTERM and SIGKILL.
TORCHRUN_GRACE_S, TORCHRUN_TERM_S = 0.1, 30.0


@dataclass(frozen=True)
class EndedRank:
    """How one rank of a start ended.

    Args:
        code: exit code, or minus the signal that ended it.
        by: "itself", "fault" (a signal of the plan), "term" or "kill" (the launcher's).
        after_s: since the first rank of the start ended in failure; 0 for that one, and where none failed.
    """

    code: int
    by: str
    after_s: float


@dataclass(frozen=True)
class Ended:
    """How a start ended: one entry a rank, wall time, and the folder with rank_R.out, rank_R.err and what the ranks'
    injections wrote.
    """

    ranks: list[EndedRank]
    seconds: float
    logs: Path
    timed_out: bool = False

    @property
    def codes(self) -> list[int]:
        return [rank.code for rank in self.ranks]

    @property
    def hung(self) -> bool:
        """Whether a rank stood still until the launcher killed it."""
        return any(rank.by == "kill" for rank in self.ranks)

    def stderr(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.logs.glob("rank_*.err")))

    def stdout(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.logs.glob("rank_*.out")))


class ForkServer:
    """Client of the served process, which it starts when first asked; one start at a time.

    Args:
        folder: for the logs of its starts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = Path(folder), 0
        self._folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen | None = None

    @staticmethod
    def can_fork(environment: dict[str, str]) -> bool:
        """Whether the server was loaded under the values that a start wants of what is read while loading."""
        server = server_environment()
        return all(server.get(name) == value for name, value in environment.items() if name.startswith(READ_AT_IMPORT))

    def run(
        self,
        script: str | Path,
        arguments: list[str],
        *,
        ranks: int = 1,
        environment: dict[str, str],
        timeout_s: float,
    ) -> subprocess.CompletedProcess:
        """Run a file as `python FILE ARGUMENTS` does, a module as `python -m`, or on several ranks as torchrun does.

        Args:
            script: file below the repository, or name of a module.
            environment: all variables of the start, those of a launcher apart.
        Raises: subprocess.TimeoutExpired, with everything that was started ended.
        """
        ended = self._ask(
            {
                "script": str(REPOSITORY / script) if str(script).endswith(".py") else script,
                "arguments": list(map(str, arguments)),
                "ranks": ranks,
                "launched": ranks > 1,
                "environment": {name: value for name, value in environment.items() if name not in OF_LAUNCHERS},
                "timeout_s": timeout_s,
                "grace_s": TORCHRUN_GRACE_S,
                "term_s": TORCHRUN_TERM_S,
            }
        )
        stdout, stderr = ended.stdout(), ended.stderr()
        shutil.rmtree(ended.logs)
        command = [str(script), *map(str, arguments)]
        if ended.timed_out:
            raise subprocess.TimeoutExpired(command, timeout_s, stdout, stderr)
        return subprocess.CompletedProcess(
            command, ended.codes[0] if ranks == 1 else int(any(ended.codes)), stdout, stderr
        )

    def start(
        self,
        stage: str,
        arguments: list[str],
        *,
        ranks: int = 2,
        faults: dict[int, list[dict]] | None = None,
        signals: list[dict] | None = None,
        environment: dict[str, str] | None = None,
        grace_s: float = 30.0,
        term_s: float = 3.0,
    ) -> Ended:
        """Run one start of a stage to its end, as srun does: it waits a grace, then SIGTERM, then SIGKILL.

        Args:
            stage: module of an entry in peco_ds.  arguments: of its command line.
            faults: rank -> what `injection.install` breaks inside of it.  environment: further variables of all ranks.
            signals: [{"at_s", "signal", "ranks"}]: sent from outside, so long after the fork.
            grace_s: between the first failure and SIGTERM to the rest.  term_s: between SIGTERM and SIGKILL.
        """
        return self._ask(
            {
                "script": str(REPOSITORY / "peco_ds" / f"{stage}.py"),
                "arguments": list(map(str, arguments)),
                "ranks": ranks,
                "launched": True,
                "faults": faults or {},
                "signals": signals or [],
                "environment": server_environment() | (environment or {}),
                "grace_s": grace_s,
                "term_s": term_s,
            }
        )

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait(timeout=60)
            self._process.stdout.close()
            self._process = None

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _ask(self, plan: dict) -> Ended:
        self._number += 1
        logs = self._folder / f"start_{self._number:04d}"
        logs.mkdir()
        plan |= {"logs": str(logs)}
        (logs / "plan.json").write_text(json.dumps(plan, indent=1))
        if self._process is None:
            with open(self._folder / "server.err", "w") as errors:
                self._process = subprocess.Popen(
                    [sys.executable, __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=server_environment(),
                    cwd=REPOSITORY,
                )
        try:
            self._process.stdin.write(json.dumps(plan) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BaseException:
            # A test that ran out of its time would leave an answer behind, and the next one would read it.
            self._process.terminate()
            self._process.wait()
            self._process = None
            raise
        if not answer:
            self._process = None
            raise AssertionError(f"the fork server is gone: {(self._folder / 'server.err').read_text()[-3000:]}")
        (logs / "ended.json").write_text(answer)
        reply = json.loads(answer)
        ranks = [EndedRank(**rank) for rank in reply["ranks"]]
        return Ended(ranks, reply["seconds"], logs, reply["timed_out"])


def server_environment() -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PYTEST_"))}
    return {name: value for name, value in ours.items() if name not in OF_LAUNCHERS} | SERVER_ENVIRONMENT


# --- the served process ----------------------------------------------------------------------------------


def preload() -> None:
    import gc
    import importlib
    import traceback

    ours = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for path in sorted((REPOSITORY / "peco_ds").rglob("*.py"))
        if path.stem != "__init__"
    ]
    for name in (*PRELOADED, *ours):
        try:
            importlib.import_module(name)
        except Exception:
            # The start that needs it fails, and says so where it is looked at.
            traceback.print_exc()
    threads = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Threads:"))
    assert threads.split()[1] == "1", f"an import started threads ({threads}); forks of this process would miss them"
    gc.collect()
    # a collection in a fork would copy every page that it only looks at
    gc.freeze()


def free_port() -> int:
    """Below the range from which the kernel serves other connections."""
    for port in range(15000 + os.getpid() % 977 * 16 + time.monotonic_ns() // 1000 % 16, 32000):
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise AssertionError("no free port")


def become_rank(plan: dict, rank: int, port: int) -> None:
    """In the fork: what a launcher's fresh process would be. Does not return."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for stream, name in ((1, "out"), (2, "err")):
        handle = os.open(f"{plan['logs']}/rank_{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, stream)
        os.close(handle)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.environ.clear()
    os.environ.update(plan["environment"])
    if plan["launched"]:
        size = str(plan["ranks"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = [plan["script"], *plan["arguments"]]
    import atexit
    import runpy
    import threading

    import numpy as np

    np.random.seed()
    code, interrupted = 1, False
    try:
        if "faults" in plan:
            sys.path.insert(0, str(REPOSITORY / "tests" / "faults"))
            from injection import install

            install(plan["faults"].get(str(rank), []), rank, Path(plan["logs"]))
        if plan["script"].endswith(".py"):
            sys.path[0] = os.path.dirname(plan["script"])
            runpy.run_path(plan["script"], run_name="__main__")
        else:
            sys.path[0] = str(REPOSITORY)
            runpy.run_module(plan["script"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            sys.stderr.write(f"{end.code}\n")
    except BaseException as error:
        import traceback

        traceback.print_exc()
        interrupted = isinstance(error, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def launch(plan: dict) -> dict:
    """Fork the ranks, send the plan's signals, end what outlives a failure, and tell how each rank ended."""
    port, begun = free_port(), time.monotonic()
    pids: list[int] = []
    try:
        for rank in range(plan["ranks"]):
            pid = os.fork()
            if pid == 0:
                become_rank(plan, rank, port)
            pids.append(pid)
        return wait_for(plan, pids, begun)
    finally:
        # what a rank left behind: loader workers of a killed one, or all where the server is told to end
        for pid in pids:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def wait_for(plan: dict, pids: list[int], begun: float) -> dict:
    ended: dict[int, dict] = {}
    signals = sorted(plan.get("signals", []), key=lambda entry: entry["at_s"])
    struck: dict[int, str] = {}  # rank -> whose SIGKILL or SIGTERM it got
    failed_at, timed_out = None, False
    steps_of_launcher = [
        (plan["grace_s"], signal.SIGTERM, "term"),
        (plan["grace_s"] + plan["term_s"], signal.SIGKILL, "kill"),
    ]
    while len(ended) < len(pids):
        now = time.monotonic()
        if now - begun > plan.get("timeout_s", float("inf")) and not timed_out:
            timed_out = True
            for rank in set(range(len(pids))) - set(ended):
                os.kill(pids[rank], signal.SIGKILL)
        while signals and now - begun >= signals[0]["at_s"]:
            entry = signals.pop(0)
            for rank in set(entry["ranks"]) & set(range(len(pids))) - set(ended):
                os.kill(pids[rank], entry["signal"])
                struck.setdefault(rank, "fault")
        while failed_at is not None and steps_of_launcher and now - failed_at >= steps_of_launcher[0][0]:
            _, number, name = steps_of_launcher.pop(0)
            for rank in set(range(len(pids))) - set(ended):
                os.kill(pids[rank], number)
                struck[rank] = name
        for rank in set(range(len(pids))) - set(ended):
            pid, status = os.waitpid(pids[rank], os.WNOHANG)
            if not pid:
                continue
            code = os.waitstatus_to_exitcode(status)
            if code and failed_at is None:
                failed_at = now
            by_fault = code == -signal.SIGKILL and rank not in struck  # the rank's own injection
            ended[rank] = {
                "code": code,
                "by": "fault" if by_fault else struck.get(rank, "itself"),
                "after_s": round(now - failed_at, 2) if code else 0.0,
            }
        time.sleep(0.01)
    seconds = round(time.monotonic() - begun, 2)
    return {"ranks": [ended[rank] for rank in range(len(pids))], "seconds": seconds, "timed_out": timed_out}


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import writes is no answer
    # an end of the server is an end of what it started
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.path.insert(1, str(REPOSITORY))
    preload()
    sys.path.remove(str(REPOSITORY))
    for line in sys.stdin:
        sys.stdout.flush()
        sys.stderr.flush()
        answers.write(json.dumps(launch(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
