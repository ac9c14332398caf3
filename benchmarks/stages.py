"""The package's stages as commands of a benchmark."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from peco_ds.errors import UserError
from peco_ds.own_files import own_json, refuse_foreign, written_whole

# Of a stage that is done.
OWN_RECORD = own_json("benchmarks", "command", "seconds")
# What a process writes of itself when it joins a group.
OF_A_RANK = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
STAGES = Path(__file__).resolve().parent.parent / "peco_ds"


def launcher(name: str, ranks: int) -> list[str]:
    """How a command begins: python, torchrun or deepspeed, on this machine."""
    if name == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    if name == "deepspeed":
        # its own default port may be another run's
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        words = ["--master_port", port, "--num_gpus", str(ranks)]
        return [sys.executable, "-m", "deepspeed.launcher.runner", *words]
    return [sys.executable]


def without_ranks() -> dict[str, str]:
    """The environment for a process that is no rank of this one's group, whose port is taken."""
    return {name: value for name, value in os.environ.items() if name not in OF_A_RANK}


def call(command: list, env: dict[str, str] | None = None, timeout_s: float | None = None) -> str:
    """Run a command to its end.

    Returns: what it wrote to standard output.
    Raises: UserError with the end of its output if it fails.
    """
    words = [str(word) for word in command]
    env = without_ranks() if env is None else env
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=timeout_s)
    if done.returncode:
        raise ended(words, done.returncode, done.stdout + done.stderr)
    return done.stdout


def ended(command: list[str], code: int | None, output: str) -> UserError:
    """What to raise for a command that ended as it should not."""
    tail = " ".join(output.split())[-600:]
    return UserError(f"{shlex.join(command)}: exit code {code}; its output ends in: {tail}")


class Stages:
    """Commands that each run once and leave log, command and seconds in OUT/log.

    What is finished is not run again when the benchmark continues. A stage that was run with another command before is
    refused: results of two settings would stand in one table.

    Args:
        out: an absolute folder.
        ranks: of the stages that train or tokenize; 1: plain python, more: the deepspeed launcher.
        threads: of each process; 0: torch's own choice.
        jobs: commands at a time; the caller's threads wait for each other.
        announce: what to say of a command that begins, by its name.
    """

    def __init__(
        self,
        out: Path,
        *,
        ranks: int,
        deepspeed_config: str,
        threads: int = 0,
        jobs: int = 1,
        announce: Callable[[str], str] = str,
    ) -> None:
        self.out, self._announce = out, announce
        self._launcher = [sys.executable] if ranks == 1 else ["deepspeed", "--num_gpus", str(ranks)]
        self._engine = ["--deepspeed_config", deepspeed_config]
        self._environ = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        self._room = threading.Semaphore(jobs)
        self._of_names, self._lock = {}, threading.Lock()
        # nothing is started after a stage that failed, or that Ctrl-C ended
        self._failed = threading.Event()
        (out / "log").mkdir(parents=True, exist_ok=True)

    def train(self, name: str, stage: str, recipe: str | Path, out: Path, *settings: str) -> None:
        self.ranks(name, stage, "--recipe", recipe, *self._engine, "--out", out, f"data.root={self.out}", *settings)

    def ranks(self, name: str, stage: str, *arguments) -> None:
        self._command(name, [*self._launcher, STAGES / stage, *arguments])

    def pack(self, name: str, images: Path, out: Path) -> None:
        """Image shards of a folder of class folders."""
        self.python(name, "pack_images.py", "--images", images, "--out", out, "--samples_per_shard", 500)

    def python(self, name: str, stage: str, *arguments) -> None:
        self._command(name, [sys.executable, STAGES / stage, *arguments])

    def _command(self, name: str, command: list) -> None:
        """Ends the benchmark with the stage's exit code where it is not 0."""
        with self._lock:
            alone = self._of_names.setdefault(name, threading.Lock())
        with alone, self._room:
            self._run_once(name, [str(word) for word in command])

    def _run_once(self, name: str, command: list[str]) -> None:
        record, text = self.out / "log" / f"{name}.json", shlex.join(command)
        refuse_foreign(record, OWN_RECORD)
        if record.exists():
            before = json.loads(record.read_text())["command"]
            if before != text:
                sys.stderr.write(
                    f"error: {record}: {name} was run with another command; give another --out, or remove that "
                    f"record and what it made\nthen: {before}\nnow:  {text}\n"
                )
                sys.exit(2)
            return
        if self._failed.is_set():
            sys.exit(1)
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {self._announce(name)}\n")
        sys.stdout.flush()
        begun = time.perf_counter()
        path = self.out / "log" / f"{name}.log"
        with open(path, "a") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=self._environ).returncode
        if code:
            self._failed.set()
            last = path.read_text(errors="replace").splitlines()[-1:]
            sys.stderr.write(f"{name} ended with {code}; {path} ends in: {''.join(last)}\n")
            sys.exit(code)
        done = {"command": text, "seconds": round(time.perf_counter() - begun, 1)}
        with written_whole(record, OWN_RECORD) as temporary:
            temporary.write_text(json.dumps(done) + "\n")

    def records(self) -> dict[str, dict]:
        """Command and seconds of everything that was run, by name."""
        return {path.stem: json.loads(path.read_text()) for path in sorted((self.out / "log").glob("*.json"))}
