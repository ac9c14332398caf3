"""Starts of a training stage at a tenth of their price: one process imports everything once and forks the ranks of
every start.

    zygote = Zygote(folder)                                      # about ten seconds, once
    ended = zygote.start("pretrain", arguments, ranks=2)          # two to three seconds for a tiny model
    zygote.close()

The served process (this file run as a program) plays the launcher as srun does: when a rank fails it waits a grace,
then sends SIGTERM, then SIGKILL. It never runs an OpenMP region and never starts a thread, so that a fork of it is as
good as a fresh process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

# What the entries import inside their functions; paid once here instead of at every start.
PRELOADED_FOLDERS = ("data", "models", "objectives", "runtime")
PRELOADED = (
    *(
        "peco_ds.pretrain",
        "peco_ds.finetune",
        "peco_ds.convert.initialize",
        "peco_ds.convert.read",
        "peco_ds.evaluation.classification",
    ),
    *(
        "torch.utils.tensorboard",
        "torch.utils.data",
        "torch.distributed.elastic",
        "deepspeed.checkpoint",
        "deepspeed.runtime.engine",
    ),
)


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


class Zygote:
    """Client of the served process; one start at a time.

    Args:
        folder: for the logs of its starts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = Path(folder), 0
        self._folder.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PYTEST_"))}
        for name in (
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "LOCAL_SIZE",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        ):
            environment.pop(name, None)
        environment |= {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        self._errors = open(self._folder / "zygote.err", "w")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            cwd=REPOSITORY,
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
        """Run one start of a stage to its end.

        Args:
            stage: module of an entry in peco_ds.  arguments: of its command line.
            faults: rank -> what `injection.install` breaks inside of it.  environment: further variables of all ranks.
            signals: [{"at_s", "signal", "ranks"}]: sent from outside, so long after the fork.
            grace_s: between the first failure and SIGTERM to the rest.  term_s: between SIGTERM and SIGKILL.
        """
        self._number += 1
        logs = self._folder / f"start_{self._number:04d}"
        logs.mkdir()
        plan = {
            "stage": stage,
            "arguments": list(map(str, arguments)),
            "ranks": ranks,
            "faults": faults or {},
            "signals": signals or [],
            "logs": str(logs),
        }
        plan |= {"environment": environment or {}, "grace_s": grace_s, "term_s": term_s}
        (logs / "plan.json").write_text(json.dumps(plan, indent=1))
        self._process.stdin.write(json.dumps(plan) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the zygote is gone: {(self._folder / 'zygote.err').read_text()[-3000:]}"
        (logs / "ended.json").write_text(answer)
        reply = json.loads(answer)
        return Ended([EndedRank(**rank) for rank in reply["ranks"]], reply["seconds"], logs)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_) -> None:
        self.close()


# --- the served process ----------------------------------------------------------------------------------


def preload() -> None:
    import gc
    import importlib

    folders = [REPOSITORY / "peco_ds" / name for name in PRELOADED_FOLDERS]
    ours = [
        f"peco_ds.{path.parent.name}.{path.stem}"
        for folder in folders
        for path in sorted(folder.glob("*.py"))
        if path.stem != "__init__"
    ]
    for name in (*PRELOADED, *ours):
        importlib.import_module(name)
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
    for stream, name in ((1, "out"), (2, "err")):
        handle = os.open(f"{plan['logs']}/rank_{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, stream)
        os.close(handle)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(plan["ranks"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    os.environ.update(plan["environment"])
    sys.argv = [f"peco_ds/{plan['stage']}.py", *plan["arguments"]]
    import atexit
    import importlib
    import threading

    from injection import install

    from peco_ds.command_line import run

    code = 1
    try:
        install(plan["faults"].get(str(rank), []), rank, Path(plan["logs"]))
        run(importlib.import_module(f"peco_ds.{plan['stage']}").main, plan["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(plan: dict) -> dict:
    """Fork the ranks, send the plan's signals, end what outlives a failure, and tell how each rank ended."""
    port, begun = free_port(), time.monotonic()
    pids = []
    for rank in range(plan["ranks"]):
        pid = os.fork()
        if pid == 0:
            become_rank(plan, rank, port)
        pids.append(pid)
    ended: dict[int, dict] = {}
    signals = sorted(plan["signals"], key=lambda entry: entry["at_s"])
    struck: dict[int, str] = {}  # rank -> whose SIGKILL or SIGTERM it got
    failed_at = None
    steps_of_launcher = [
        (plan["grace_s"], signal.SIGTERM, "term"),
        (plan["grace_s"] + plan["term_s"], signal.SIGKILL, "kill"),
    ]
    while len(ended) < len(pids):
        now = time.monotonic()
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
    seconds = time.monotonic() - begun
    # loader workers that a killed rank left behind
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return {"ranks": [ended[rank] for rank in range(len(pids))], "seconds": round(seconds, 2)}


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import writes is no answer
    sys.path[:0] = [str(REPOSITORY)]
    preload()
    for line in sys.stdin:
        answers.write(json.dumps(launch(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
