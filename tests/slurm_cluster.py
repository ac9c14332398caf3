"""A real Slurm of several virtual nodes on one host, private to one test session, gone when the session ends.

Needs the packages slurm-wlm and munge (slurmctld, slurmd, sbatch, munged on the PATH); no root, no system service, no
file outside one temporary folder. Every virtual node is a `slurmd` with its own port; its GPUs are empty files. Node
names do not
resolve: whoever needs an address has to ask Slurm for it.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
START_TIMEOUT_S = 300.0
POLL_S = 0.2
# A machine may be so many times slower than one that is idle; only what fails waits so long.
PATIENCE = 5
# in the environment of a node's daemon and its job steps
NODE = "TEST_NODE"


def search_path() -> str:
    """PATH with the folders where distributions keep daemons, which a plain user's PATH leaves out."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/local/sbin"])


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=search_path()) is None]


@dataclass
class SlurmCluster:
    folder: Path
    num_nodes: int
    # for every command that is to speak with this cluster
    env: dict[str, str]
    # by name: munged, slurmctld, n1, n2, ...
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    def start_node(self, name: str) -> None:
        _daemon(self, name, "slurmd", "-D", "-f", self.env["SLURM_CONF"], "-N", name)

    def kill_node(self, name: str) -> None:
        """End everything on a virtual node at once, as if its power failed: daemon, job steps, batch scripts, tasks."""
        daemon = self.daemons.pop(name)
        # what was being started may come after the first look
        for _ in range(10):
            pids = [pid for pid in _processes_of(self.folder) if _node_of(pid) == name]
            if not pids and daemon.poll() is not None:
                return
            for pid in (*pids, daemon.pid):
                _kill(pid)
            time.sleep(POLL_S / 4)
        raise AssertionError(f"{name} does not die: {pids}")

    def command(
        self, *arguments: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(argument) for argument in arguments],
            cwd=cwd,
            env=self.env | (env or {}),
            text=True,
            capture_output=True,
            timeout=600,
        )

    def sbatch(self, *arguments: str | Path, cwd: Path, env: dict[str, str] | None = None) -> int:
        """Submit; returns the job id. Fails with sbatch's own words."""
        done = self.command("sbatch", "--parsable", *arguments, cwd=cwd, env=env)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def jobs(self, job_id: int | str) -> list[dict[str, str]]:
        """Fields of `scontrol show job`, one dict a job; an array has several."""
        done = self.command("scontrol", "--oneliner", "show", "job", str(job_id))
        assert done.returncode == 0, done.stderr
        return [
            dict(part.split("=", 1) for part in line.split() if "=" in part)
            for line in done.stdout.splitlines()
            if line
        ]

    def states(self, job_id: int) -> list[str]:
        return [job["JobState"] for job in self.jobs(job_id)]

    def wait(self, *job_ids: int, timeout_s: float) -> dict[int, str]:
        """Wait until all are over.

        Args:
            timeout_s: more than an idle machine needs.
        Returns a state for each, for an array the one state all its tasks share or a comma list.
        """
        timeout_s *= PATIENCE
        deadline = time.monotonic() + timeout_s
        while True:
            states = {job_id: self.states(job_id) for job_id in job_ids}
            if all(state in FINISHED for each in states.values() for state in each):
                return {job_id: ",".join(sorted(set(each))) for job_id, each in states.items()}
            assert time.monotonic() < deadline, f"after {timeout_s} s the jobs are {states}"
            time.sleep(POLL_S)


@contextlib.contextmanager
def slurm_cluster(
    num_nodes: int = 2, *, cpus: int = 8, gpus: int = 8, node_timeout_s: int = 300
) -> Iterator[SlurmCluster]:
    """Start a cluster of `num_nodes` nodes n1, n2, ...

    that claim so many CPUs and GPUs each; end all its processes on leaving.

    Args:
        node_timeout_s: a node that is silent for so long is down, and its jobs go back into the queue.

    Raises: RuntimeError with the daemons' last words if the nodes are not idle in time.
    """
    # short: a socket's path may have 107 characters
    folder = Path(tempfile.mkdtemp(prefix="slurm_", dir="/tmp"))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "PECO_"))}
    env |= {"PATH": search_path(), "SLURM_CONF": str(folder / "slurm.conf")}
    cluster = SlurmCluster(folder, num_nodes, env)
    try:
        _configure(folder, num_nodes, cpus, gpus, node_timeout_s, env)
        _start(cluster)
        yield cluster
    finally:
        _stop(cluster)
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path, num_nodes: int, cpus: int, gpus: int, node_timeout_s: int, env: dict[str, str]) -> None:
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    for gpu in range(gpus):
        (folder / f"gpu{gpu}").touch()
    (folder / "state").mkdir()
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    ports = _free_ports(num_nodes + 1)
    lines = [
        "ClusterName=peco_test",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ports[0]}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool.%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd.%n.pid",
        "AuthType=auth/munge",
        # A requeued job waits until its old credential has expired, 120 s by default; less than 5 is not taken.
        f"AuthInfo=socket={folder}/munge.socket,cred_expire=10",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "MpiDefault=none",
        "ReturnToService=2",
        # a node may claim more CPUs than the host has
        "SlurmdParameters=config_overrides",
        "SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=1",
        "KillWait=10",
        f"SlurmdTimeout={node_timeout_s}",
        # finished jobs stay visible to `scontrol show job`
        "MinJobAge=3600",
        "GresTypes=gpu",
    ]
    for number, port in enumerate(ports[1:], start=1):
        gres = f" Gres=gpu:{gpus}" if gpus else ""
        lines.append(
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=65536{gres}"
        )
    lines.append(f"PartitionName=test Nodes=n[1-{num_nodes}] Default=YES MaxTime=INFINITE State=UP")
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    devices = f"NodeName=n[1-{num_nodes}] Name=gpu File={folder}/gpu[0-{gpus - 1}]\n" if gpus else ""
    (folder / "gres.conf").write_text(devices)
    version = (
        subprocess.run(["sinfo", "--version"], env=env, text=True, capture_output=True).stdout.split()[-1].split(".")
    )
    # unknown to older ones; newer ones look for cgroups without being asked
    if (int(version[0]), int(version[1])) >= (24, 5):
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")


def _start(cluster: SlurmCluster) -> None:
    folder, conf = cluster.folder, cluster.env["SLURM_CONF"]

    def wait_for(what: str, ready) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready():
            dead = [name for name, process in cluster.daemons.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                words = {name: (folder / f"{name}.log").read_text()[-800:] for name in cluster.daemons}
                raise RuntimeError(f"no {what} (ended: {dead}); last words: {words}")
            time.sleep(POLL_S)

    sockets = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "seed-file")]
    # The folder may be writable for its owner alone or lie below one that munge finds too open; the key is for this
    # test only.
    _daemon(cluster, "munged", "munged", "--foreground", "--force", f"--key-file={folder}/munge.key", *sockets)
    wait_for("munge socket", (folder / "munge.socket").exists)
    _daemon(cluster, "slurmctld", "slurmctld", "-D", "-c", "-f", conf)
    names = [f"n{number}" for number in range(1, cluster.num_nodes + 1)]
    for name in names:
        cluster.start_node(name)

    def idle() -> bool:
        done = cluster.command("sinfo", "--noheader", "--Node", "--format=%N %t")
        return sorted(done.stdout.split()) == sorted([*names, *["idle"] * len(names)])

    wait_for("idle nodes", idle)


def _daemon(cluster: SlurmCluster, name: str, *arguments: str) -> None:
    with open(cluster.folder / f"{name}.log", "a") as log:
        cluster.daemons[name] = subprocess.Popen(
            arguments,
            env=cluster.env | {NODE: name},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _node_of(pid: int) -> str:
    """The virtual node a process belongs to: job steps have their slurmd's environment, tasks one that Slurm made."""
    environment = _environment(pid)
    return environment.get("SLURMD_NODENAME") or environment.get(NODE, "")


def _stop(cluster: SlurmCluster) -> None:
    if "slurmctld" in cluster.daemons:
        cluster.command("scancel", f"--user={getpass.getuser()}")
    for name in reversed(list(cluster.daemons)):
        cluster.daemons[name].terminate()
    for process in cluster.daemons.values():
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    # a job step may be starting a process while it is being ended
    for _ in range(10):
        left = _processes_of(cluster.folder)
        if not left:
            break
        for pid in left:
            _kill(pid)
        time.sleep(POLL_S)


def _processes_of(folder: Path) -> list[int]:
    """Daemons' children, job steps and tasks: all carry the folder's slurm.conf in their environment."""
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in numbers if _environment(pid).get("SLURM_CONF") == str(folder / "slurm.conf")]


def _environment(pid: int) -> dict[str, str]:
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # ended meanwhile, or another user's
        return {}
    return dict(item.split("=", 1) for item in raw.decode(errors="replace").split("\0") if "=" in item)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
