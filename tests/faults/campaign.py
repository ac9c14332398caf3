"""Seeded faults against real runs of several ranks, and the promises that must hold after every start.

Long version, on two cores about ten minutes:

    python -m tests.faults.campaign --kills 120 --seed 0 --out report.md

Runs are started, killed, stopped, stalled, fed with NaN, their disks filled, their checkpoints damaged and their sets
read from a server that fails; each is started again until it is done. After every start the judge looks at the run
folder alone:

- a committed checkpoint (renamed, with its manifest) still verifies, unless the plan damaged it or retention removed
it;
- a start continues the newest checkpoint that verifies, never a damaged one, and says so where it passes one over;
- when one rank dies, the others end by themselves or at SIGTERM within a bound, not in success; none hangs;
- every batch of every start holds the sample keys of the uninterrupted run at that step, in order;
- in the end metrics.jsonl has every step once. At the same number of ranks its losses are those of the uninterrupted
run bit for bit; else within a tolerance.

Then the disk fails under every stage that this does not run, at many of its writes (tests/faults/endings.py).

The table at the end, also written to --out, has a row a scenario; promises that were broken are listed below it with
the plan that breaks them, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[depth]) for depth in (0, 1, 2)]

from fork_server import REPOSITORY, Ended, ForkServer
from injection import SAVE_CALLS

from benchmarks.web_server import WebServer
from peco_ds.own_files import markdown_mark, own_markdown, refuse_foreign, written_whole

TABLE = own_markdown("tests.faults.campaign", older=lambda text: "\nBroken promises: " in text)

STEPS = 12
KEEP_LAST = 3
# relative, float32, no stochastic depth: sums over ranks are taken in another order
ELASTIC_TOLERANCE = 1e-5
# of the launcher before SIGTERM; longer where the machine is slow
GRACE_S = 8.0
# So many times that between SIGTERM and SIGKILL. Only a rank that hangs comes to it, so it may be far beyond what the
# slowest machine needs.
UNTIL_KILLED = 15

EXIT_BAD_INPUT, EXIT_REQUEUE, EXIT_INTERRUPTED = 2, 75, 76


@dataclass(frozen=True)
class Stage:
    """An entry with a recipe that its small sets fit."""

    entry: str
    recipe: str
    overrides: tuple[str, ...]
    # override that makes random states matter, so that a resume that loses them shows
    stochastic: str


@dataclass
class Row:
    """What a scenario came to."""

    name: str
    faults: int = 0
    kills: int = 0
    kills_in_save: int = 0
    starts: int = 0
    resumed: int = 0  # starts that continued a checkpoint
    committed: int = 0
    lost: int = 0
    damaged: int = 0
    accepted: int = 0
    worst: float = 0.0
    hangs: int = 0
    seconds: float = 0.0
    codes: Counter = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    def add(self, other: Row) -> None:
        for name in (
            "faults",
            "kills",
            "kills_in_save",
            "starts",
            "resumed",
            "committed",
            "lost",
            "damaged",
            "accepted",
            "hangs",
            "seconds",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.worst = max(self.worst, other.worst)
        self.codes += other.codes
        self.broken += other.broken


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run: what every interrupted one must come to."""

    # (rank, function) -> how often it touched a checkpoint in the making; of a whole run
    calls: Counter
    losses: list[float]
    evaluations: list[dict]
    # step -> keys of each slice of the global batch; {} where a stage's batches name none
    keys: dict[int, list[list[str]]]
    seconds: float


def patience_s(reference: Reference | None) -> float:
    """How long to wait for something that takes a second on a machine that is idle."""
    return max(GRACE_S, 2 * reference.seconds) if reference else 60.0


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def fault_of(checkpoint: Path) -> str:
    """What is wrong with a sealed checkpoint, "" if it is whole.

    Written apart from the product's own check, which is under trial.
    """
    try:
        files = json.loads((checkpoint / "manifest.json").read_bytes())["files"]
        for name, (size, sha256) in files.items():
            data = (checkpoint / name).read_bytes()
            if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
                return f"{name} is not what was sealed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "" if files else "an empty manifest"


def checkpoints_of(run: Path) -> dict[int, Path]:
    """Step -> folder of everything that bears a checkpoint's final name."""
    return {
        int(path.name[5:]): path
        for path in (run / "checkpoints").glob("step_*")
        if re.fullmatch(r"step_\d{8}", path.name)
    }


def evaluations_of(run: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "time"} for row in rows_of(run / "evaluation.jsonl")]


def keys_of(logs: Path) -> dict[int, dict[int, list[str]]]:
    """Step -> slice of the global batch -> sample keys, as the ranks of one start took them."""
    found: dict[int, dict[int, list[str]]] = {}
    size = {row["rank"]: row["world_size"] for row in rows_of(logs / "resumed.jsonl")}
    for path in sorted(logs.glob("keys_*.jsonl")):
        for row in rows_of(path):
            found.setdefault(row["step"], {})[row["micro"] * size[row["rank"]] + row["rank"]] = row["keys"]
    return found


class Run:
    """One run folder, started as often as it takes; judges every start.

    Args:
        reference: what the run must come to.  row: where faults, starts and broken promises are counted.
    """

    def __init__(
        self,
        server: ForkServer,
        folder: Path,
        stage: Stage,
        row: Row,
        reference: Reference | None,
        *,
        overrides: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.stage, self.row, self.reference = folder, stage, row, reference
        self.overrides, self._server = overrides, server
        self._grace_s = patience_s(reference)
        self._committed: set[int] = set()
        self._damaged: dict[int, str] = {}  # step -> what the plan did to it
        self._starts: list[Path] = []

    def start(
        self,
        *,
        zero: int,
        ranks: int = 2,
        faults: dict | None = None,
        signals: list | None = None,
        codes: Callable[[list[int]], bool] | None = None,
        grace_s: float | None = None,
        term_s: float | None = None,
    ) -> Ended:
        """One start and its judgement.

        Args:
            faults, signals, grace_s, term_s: as `ForkServer.start`.
            codes: whether the ranks' exit codes are as promised; left out: the start has to succeed, or where a rank
                was killed, no rank hangs or pretends.
        """
        expected = max((step for step, path in checkpoints_of(self.folder).items() if not fault_of(path)), default=0)
        newer = sorted(step for step in self._damaged if step > expected)
        config = REPOSITORY / "ds_configs" / f"zero{zero}.json"
        arguments = [
            "--recipe",
            self.stage.recipe,
            "--deepspeed_config",
            config,
            "--out",
            self.folder,
            *self.stage.overrides,
            *self.overrides,
        ]
        ended = self._server.start(
            self.stage.entry,
            arguments,
            ranks=ranks,
            faults=faults,
            signals=signals,
            grace_s=grace_s or self._grace_s,
            term_s=term_s or UNTIL_KILLED * self._grace_s,
        )
        self._starts.append(ended.logs)
        struck = rows_of(ended.logs / "struck.jsonl")
        killed = any(rank.code == -signal.SIGKILL and rank.by == "fault" for rank in ended.ranks)
        self.row.starts += 1
        self.row.faults += max(len({json.dumps(entry["fault"]) for entry in struck}), int(bool(signals)))
        self.row.kills += killed
        in_save = any(
            entry["fault"]["kind"] == "call" and entry["fault"]["function"] != "shutil.rmtree" for entry in struck
        )
        # left-overs of earlier starts are gone by then
        torn = any((self.folder / "checkpoints").glob(".tmp-step_*")) and (ended.logs / "resumed.jsonl").is_file()
        self.row.kills_in_save += killed and (in_save or torn)
        self.row.codes += Counter(ended.codes)
        self._judge_start(ended, expected, newer)
        self._judge_codes(ended, killed, codes)
        self._judge_checkpoints(ended)
        self._judge_keys(ended)
        return ended

    def damage_newest(self, rng: random.Random) -> None:
        """Flip a byte of, cut or remove one file of the newest checkpoint."""
        folder = checkpoints_of(self.folder)[max(self._committed)]
        victim = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        data, kind = bytearray(victim.read_bytes()), rng.choice(("flip", "truncate", "remove"))
        if kind == "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            victim.write_bytes(data)
        elif kind == "truncate":
            victim.write_bytes(data[: rng.randrange(len(data))])
        else:
            victim.unlink()
        step = max(self._committed)
        self._damaged[step] = f"{kind} {victim.name}"
        self._committed.discard(step)
        self.row.faults += 1
        self.row.damaged += 1

    @property
    def whole(self) -> int:
        return len(self._committed)

    def finish(self, *, zero: int, ranks: int = 2, tolerance: float = 0.0) -> None:
        """Start without faults until done, and compare the whole run with the reference."""
        self.start(zero=zero, ranks=ranks)
        self.compare(tolerance)

    def compare(self, tolerance: float = 0.0, *, skipped: frozenset[int] = frozenset()) -> None:
        """The metrics and evaluations of the finished run against the reference.

        Args:
            skipped: steps (from 1) that the plan spoilt; a run is compared up to the first of them and must count them.
        """
        try:
            rows = rows_of(self.folder / "metrics.jsonl")
        except ValueError as error:
            self._broken(f"metrics.jsonl is not readable: {error}")
            return
        if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
            self._broken(f"metrics.jsonl has steps {[row['step'] for row in rows]}")
            return
        if STEPS not in self._committed:
            self._broken(f"the finished run has no checkpoint of step {STEPS}")
        until = min(skipped, default=STEPS + 1) - 1
        pairs = [(row["loss"], loss) for row, loss in zip(rows[:until], self.reference.losses)]
        worst = max((abs(ours - true) / abs(true) for ours, true in pairs), default=0.0)
        self.row.worst = max(self.row.worst, worst)
        if worst > tolerance:
            first = next(number for number, (ours, true) in enumerate(pairs, 1) if ours != true)
            self._broken(f"losses differ by {worst:.1e} from the uninterrupted run, from step {first} on")
        if skipped and rows[-1]["skipped_steps"] != len(skipped):
            self._broken(f"{rows[-1]['skipped_steps']} skipped steps are counted, {len(skipped)} were spoilt")
        # a tokenizer is also measured at every start
        moments = {row["step"] for row in self.reference.evaluations}
        if (
            not tolerance
            and not skipped
            and [row for row in evaluations_of(self.folder) if row["step"] in moments] != self.reference.evaluations
        ):
            self._broken("evaluation.jsonl is not that of the uninterrupted run")

    def expect_saved_to_the_last_step(self) -> None:
        """After a stop in good order."""
        last = max((row["step"] for row in rows_of(self.folder / "metrics.jsonl")), default=0)
        if max(self._committed, default=0) != last:
            self._broken(
                f"stopped in good order after step {last}, but the newest checkpoint is "
                f"{max(self._committed, default=0)}"
            )

    def expect_one_line(self, ended: Ended, *words: str) -> None:
        """What the user reads of a start that ended with bad input: a line that begins with error:, no traceback."""
        errors = [line for line in ended.stderr().splitlines() if line.startswith("error: ")]
        if not errors or "Traceback" in ended.stderr():
            self._broken(f"no clear error line: {ended.stderr()[-300:]!r}")
        for word in words:
            if errors and word not in errors[0]:
                self._broken(f"the error line does not tell {word!r}: {errors[0]}")

    def expect_store_fault(self, ended: Ended, words: str) -> None:
        """Of one rank at least; the others may have lost it first."""
        errors = [line for line in ended.stderr().splitlines() if line.startswith("error: ")]
        if "Traceback" in ended.stderr() or not any(words in line for line in errors):
            self._broken(f"no line tells {words!r}: {errors or ended.stderr()[-300:]!r}")

    def expect_stack_dump(self) -> None:
        """Of at least one rank: the first to dump ends itself, and the others then lose it instead of waiting
        further.
        """
        dumps = "".join(path.read_text() for path in (self.folder / "logs").glob("rank_*.stacks.txt"))
        if "Thread" not in dumps:
            self._broken("no rank dumped its stacks")

    def _judge_start(self, ended: Ended, expected: int, passed_over: list[int]) -> None:
        self.row.resumed += any(row["first_step"] for row in rows_of(ended.logs / "resumed.jsonl"))
        for row in rows_of(ended.logs / "resumed.jsonl"):
            first = row["first_step"]
            if first in self._damaged and first > expected:
                self.row.accepted += 1
                self._broken(f"rank {row['rank']} continued damaged step {first} ({self._damaged[first]})")
            elif first != expected:
                self.row.lost += first < expected
                self._broken(f"rank {row['rank']} began at step {first}, the newest whole checkpoint was {expected}")
        if rows_of(ended.logs / "resumed.jsonl"):
            for step in passed_over:
                if f"step_{step:08d}" not in ended.stderr():
                    self._broken(f"damaged step {step} ({self._damaged[step]}) was passed over without a word")

    def _judge_codes(self, ended: Ended, killed: bool, codes) -> None:
        if ended.hung and not (codes and codes(ended.codes)):
            self.row.hangs += 1
            self._broken(f"a rank hung: {ended.ranks}")
        if codes is not None:
            if not codes(ended.codes):
                self._broken(f"exit codes {ended.codes}: {ended.stderr()[-300:]!r}")
        elif not killed and any(ended.codes):
            self._broken(f"exit codes {ended.codes}: {ended.stderr()[-300:]!r}")
        elif killed:
            complete = STEPS in checkpoints_of(self.folder)
            for rank in ended.ranks:
                if rank.by == "fault":
                    continue
                if rank.code == 0 and not complete:
                    self._broken("a rank ended in success though another was killed and steps are missing")
                if rank.code not in (0, EXIT_INTERRUPTED, -signal.SIGTERM):
                    self._broken(f"a rank that lost another ended with {rank.code}: {ended.stderr()[-300:]!r}")
                if rank.by == "kill":
                    self._broken(f"a rank outlived the death of another by {rank.after_s} s")

    def _judge_checkpoints(self, ended: Ended) -> None:
        present = checkpoints_of(self.folder)
        renamed = {row["step"] for row in rows_of(ended.logs / "committed.jsonl")}
        self._damaged = {step: what for step, what in self._damaged.items() if step in present and step not in renamed}
        whole = {step for step, path in present.items() if not fault_of(path)}
        for step, path in present.items():
            if step not in whole and step not in self._damaged:
                self.row.lost += 1
                self._broken(f"step {step} bears its final name, but {fault_of(path)}")
        known = self._committed | renamed
        for step in sorted(known - whole - set(present)):
            # else retention may have removed it
            if len([newer for newer in known | set(present) if newer > step]) < KEEP_LAST:
                self.row.lost += 1
                self._broken(f"committed step {step} is gone; there are {sorted(whole)}")
        self.row.committed += len(renamed)
        self._committed = whole

    def _judge_keys(self, ended: Ended) -> None:
        for step, slices in keys_of(ended.logs).items() if self.reference else ():
            for number, keys in slices.items():
                if step < STEPS and keys != self.reference.keys[step][number]:
                    self._broken(
                        f"slice {number} of the global batch of step {step} holds {keys}, the uninterrupted run "
                        f"had {self.reference.keys[step][number]}"
                    )
                    return

    def _broken(self, what: str) -> None:
        plan = self._starts[-1] / "plan.json"
        self.row.broken.append(f"{self.folder.name}, start {len(self._starts)} ({plan}): {what}")


# --- scenarios -------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """What a scenario works with: its own server, generator and folder, and the reference runs of all."""

    server: ForkServer
    rng: random.Random
    folder: Path
    row: Row
    references: References
    number: int = 0

    def run(self, stage: Stage, zero: int, *overrides: str, stochastic: bool = True) -> Run:
        """A new run folder, with the reference that a run of two ranks under this ZeRO stage has to equal."""
        self.number += 1
        common = (*(stage.stochastic.split() if stochastic else ()), *overrides)
        reference = self.references.of(self.server, stage, zero, stochastic)
        return Run(self.server, self.folder / f"run_{self.number}", stage, self.row, reference, overrides=common)


class References:
    """Uninterrupted runs of two ranks, each made once.

    Args:
        folder: for their run folders.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._made = folder, {}
        self._lock = threading.Lock()

    def of(self, server: ForkServer, stage: Stage, zero: int, stochastic: bool) -> Reference:
        with self._lock:
            name = f"{stage.entry}_zero{zero}" + ("" if stochastic else "_elastic")
            if name not in self._made:
                self._made[name] = self._make(
                    server, stage, zero, stage.stochastic.split() if stochastic else ELASTIC, self._folder / name
                )
            return self._made[name]

    @staticmethod
    def _make(server: ForkServer, stage: Stage, zero: int, overrides, folder: Path) -> Reference:
        run = Run(server, folder, stage, row := Row("reference"), None, overrides=tuple(overrides))
        listen = [{"kind": "call", "function": name, "nth": 1, "do": "note"} for name in SAVE_CALLS]
        ended = run.start(zero=zero, faults={0: listen, 1: listen})
        assert not row.broken, row.broken
        calls = Counter((entry["rank"], entry["fault"]["function"]) for entry in rows_of(ended.logs / "struck.jsonl"))
        keys = {step: [slices[number] for number in sorted(slices)] for step, slices in keys_of(ended.logs).items()}
        losses = [line["loss"] for line in rows_of(folder / "metrics.jsonl")]
        assert len(losses) == STEPS and len(set(losses)) > STEPS // 2, losses
        return Reference(calls, losses, evaluations_of(folder), keys, ended.seconds)


ELASTIC = ("run.micro_batch=2",)  # so that four ranks divide the global batch


def point_in_save(scene: Scene, reference: Reference, rank: int) -> dict:
    """A fault-to-be at a random call of this rank inside its first saves."""
    function = scene.rng.choice(sorted(name for number, name in reference.calls if number == rank))
    of_two_saves = max(1, round(reference.calls[rank, function] / (STEPS / 2) * 2))
    when = scene.rng.choice(("before", "after", "torn") if function == "torch.save" else ("before", "after"))
    return {"kind": "call", "function": function, "nth": scene.rng.randint(1, of_two_saves), "when": when}


def some_ranks(scene: Scene) -> list[int]:
    return scene.rng.choice(([0], [1], [0, 1]))


def kills(scene: Scene, stage: Stage, zero: int, most: int = 8) -> None:
    """SIGKILL at random instants and inside saves, start after start, until the run is done."""
    run, rng = scene.run(stage, zero), scene.rng
    for _ in range(most):
        ranks = some_ranks(scene)
        if rng.random() < 0.6:
            ended = run.start(
                zero=zero,
                faults={rank: [{**point_in_save(scene, run.reference, rank), "do": "kill"}] for rank in ranks},
            )
        else:
            ended = run.start(
                zero=zero,
                signals=[
                    {"at_s": rng.uniform(0.1, 1.0) * run.reference.seconds, "signal": signal.SIGKILL, "ranks": ranks}
                ],
            )
        if not any(ended.codes):
            run.compare()
            return
    run.finish(zero=zero)


def stops(scene: Scene, stage: Stage, zero: int, most: int = 5) -> None:
    """SIGTERM and SIGUSR2 to all ranks or one, inside a step or at a random instant.

    Half the time a second one, during the save.
    """
    run, rng = scene.run(stage, zero), scene.rng
    for number in range(most):
        signals, faults, codes, ranks = [], {}, stopped_in_good_order, some_ranks(scene)
        warning = rng.choice((signal.SIGTERM, signal.SIGUSR2))
        first = max(checkpoints_of(run.folder), default=0)
        if number % 2 == 0 and first < STEPS - 2:  # where the answer is certain
            step = rng.randint(first, min(first + 3, STEPS - 2))
            faults = {rank: [{"kind": "batch", "step": step, "do": "signal", "number": warning}] for rank in ranks}
            codes = requeued
        else:
            signals = [{"at_s": rng.uniform(0.3, 1.0) * run.reference.seconds, "signal": warning, "ranks": ranks}]
        if rng.random() < 0.5:
            again = {
                "kind": "call",
                "function": "torch.save",
                "nth": rng.randint(1, 6),
                "do": "signal",
                "number": rng.choice((signal.SIGTERM, signal.SIGUSR2)),
            }
            faults = {rank: [*faults.get(rank, []), again] for rank in ranks}
        ended = run.start(zero=zero, faults=faults, signals=signals, codes=codes)
        if not any(ended.codes):
            run.compare()
            return
        if requeued(ended.codes):
            run.expect_saved_to_the_last_step()
    run.finish(zero=zero)


def requeued(codes: list[int]) -> bool:
    return set(codes) == {EXIT_REQUEUE}


def interrupted(codes: list[int]) -> bool:
    """To be started again later, which launchers do; the launcher may end a rank that waits for another."""
    return EXIT_INTERRUPTED in codes and set(codes) <= {EXIT_INTERRUPTED, -signal.SIGTERM}


def stopped_in_good_order(codes: list[int]) -> bool:
    """All done, all to be requeued, or struck before the handlers were there: then nobody pretends to be done."""
    too_early = {-signal.SIGTERM, -signal.SIGUSR2}
    return set(codes) in ({0}, {EXIT_REQUEUE}) or (
        bool(set(codes) & too_early) and set(codes) <= {EXIT_INTERRUPTED, *too_early}
    )


def damaged(scene: Scene, stage: Stage, zero: int, most: int = 4) -> None:
    """The newest checkpoint's files are flipped, cut and removed between starts."""
    run, rng = scene.run(stage, zero), scene.rng
    for _ in range(most):
        first = max(checkpoints_of(run.folder), default=0)
        run.start(
            zero=zero,
            faults={
                rng.randrange(2): [{"kind": "batch", "step": min(STEPS - 1, first + rng.randint(5, 7)), "do": "kill"}]
            },
        )
        if run.whole > 1:
            run.damage_newest(rng)
    assert scene.row.damaged, "no start left two checkpoints to damage one of"
    run.finish(zero=zero)


def failed_save(codes: list[int]) -> bool:
    return EXIT_BAD_INPUT in codes and set(codes) <= {EXIT_BAD_INPUT, EXIT_INTERRUPTED, -signal.SIGTERM}


def full_disk(scene: Scene, stage: Stage, zero: int, most: int = 4) -> None:
    """Writing a checkpoint fails for want of space, in one rank, at a random call.

    Or the system cuts its files short.
    """
    run, rng = scene.run(stage, zero), scene.rng
    for number in range(most):
        rank = rng.randrange(2)
        if number % 2:
            fault = {
                "kind": "call",
                "function": "torch.save",
                "nth": rng.randint(1, 4),
                "do": "file_limit",
                "bytes": 100_000,
            }
        else:
            fault = {**point_in_save(scene, run.reference, rank), "do": "full_disk", "when": "before"}
            if fault["function"] == "shutil.rmtree":  # removing needs no space
                fault["function"] = "torch.save"
        ended = run.start(zero=zero, faults={rank: [fault]}, codes=failed_save, grace_s=0.5)
        run.expect_one_line(ended)
    run.finish(zero=zero)


def full_file_system(scene: Scene, stage: Stage, zero: int) -> None:
    """The checkpoints lie on a small file system of their own, with room for half a checkpoint more.

    Needs the right to mount.
    """
    run = scene.run(stage, zero)
    place = run.folder / "checkpoints"
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=True)
    try:
        run.start(zero=zero, faults={0: [{"kind": "batch", "step": 5, "do": "kill"}]})
        usage = os.statvfs(place)
        used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
        subprocess.run(["mount", "-o", f"remount,size={used + used // max(1, run.whole) // 2}", place], check=True)
        scene.row.faults += 1
        # the second start finds the disk as full as the first
        for _ in range(2):
            ended = run.start(zero=zero, codes=failed_save, grace_s=0.5)
            run.expect_one_line(ended)
        subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
        run.finish(zero=zero)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
        return done.returncode == 0 and subprocess.run(["umount", place], capture_output=True).returncode == 0


def stalls(scene: Scene, stage: Stage, zero: int, kinds: tuple[str, ...] = ("sleep", "stop")) -> None:
    """One rank stands still inside a step: asleep, stopped for good, stopped for a while."""
    timeout_s = patience_s(scene.references.of(scene.server, stage, zero, True))
    run, rng = scene.run(stage, zero, f"run.hang_timeout_s={timeout_s}"), scene.rng
    for do in kinds:
        rank, first = rng.randrange(2), max(checkpoints_of(run.folder), default=0)
        fault = {"kind": "batch", "step": first + rng.randint(2, 4), "do": do, "seconds": 3600}
        # A process that was stopped answers to SIGKILL alone; the launcher's is no hang of ours.
        by_launcher = (-signal.SIGKILL,) if do == "stop" else ()
        run.start(
            zero=zero,
            faults={rank: [fault]},
            codes=lambda codes: codes[1 - rank] == EXIT_INTERRUPTED and codes[rank] in (EXIT_INTERRUPTED, *by_launcher),
            term_s=timeout_s if do == "stop" else None,
        )
        run.expect_stack_dump()
    at_s = 0.8 * run.reference.seconds
    run.start(
        zero=zero,
        signals=[
            {"at_s": at_s, "signal": signal.SIGSTOP, "ranks": [1]},
            {"at_s": at_s + 1.0, "signal": signal.SIGCONT, "ranks": [1]},
        ],
    )
    run.compare()


def spoilt_batch(scene: Scene, stage: Stage, zero: int) -> None:
    """In a resumed start one rank's images of one step are NaN: the step is skipped by all, counted, and the run goes
    on, also over a kill.
    """
    run, rng = scene.run(stage, zero), scene.rng
    rank = rng.randrange(2)
    run.start(zero=zero, faults={rank: [{"kind": "batch", "step": 4, "do": "kill"}]})
    step = max(checkpoints_of(run.folder), default=0) + rng.choice((0, 2))
    fault = {"kind": "batch", "step": step, "do": "nan"}
    run.start(zero=zero, faults={rank: [fault, {"kind": "batch", "step": step + 4, "do": "kill"}]})
    run.start(zero=zero, faults={rank: [fault]})
    run.compare(skipped=frozenset({step + 1}))


def spoilt_for_good(scene: Scene, stage: Stage, zero: int) -> None:
    """From a step on every batch of one rank is NaN: the run ends in one line that names it."""
    run, rng = scene.run(stage, zero, "run.max_skipped_steps=2"), scene.rng
    rank = rng.randrange(2)
    ended = run.start(
        zero=zero,
        faults={rank: [{"kind": "batch", "step": rng.randint(3, 6), "for_good": True, "do": "nan"}]},
        codes=failed_save,
        grace_s=0.5,
    )
    run.expect_one_line(ended, f"rank {rank}")


def dead_worker(scene: Scene, stage: Stage, zero: int) -> None:
    """A loader worker is killed in mid-run: no batch is lost or changed."""
    run, rng = scene.run(stage, zero, "data.num_workers=1"), scene.rng
    run.start(
        zero=zero,
        faults={rng.randrange(2): [{"kind": "batch", "step": rng.randint(1, STEPS - 5), "do": "kill_worker"}]},
    )
    run.compare()


def clock_and_host(scene: Scene, stage: Stage, zero: int) -> None:
    """A run that is requeued on other nodes, whose clocks stand an hour back, then two ahead."""
    run = scene.run(stage, zero)
    for number, offset_s in enumerate((0, -3600, 7200)):
        moved = [{"kind": "clock", "offset_s": offset_s}, {"kind": "host", "name": f"node{number}"}]
        kill = {"kind": "batch", "step": 3 + 3 * number, "do": "kill"}
        run.start(zero=zero, faults={0: [*moved, kill], 1: moved})
        scene.row.faults += 1
    run.finish(zero=zero)


def elastic(scene: Scene, stage: Stage, zero: int, most: int = 4) -> None:
    """Every start after a kill has another number of ranks or another ZeRO stage."""
    run, rng = scene.run(stage, zero, *ELASTIC, stochastic=False), scene.rng
    ranks = None
    # the last start is under ZeRO-3: DeepSpeed's traps lie on the way there
    for number in reversed(range(most + 1)):
        ranks, zero = rng.choice([other for other in (1, 2, 4) if other != ranks]), 1 if number % 2 else 3
        if not number:
            run.finish(zero=zero, ranks=ranks, tolerance=ELASTIC_TOLERANCE)
            return
        first = max(checkpoints_of(run.folder), default=0)
        kill = {"kind": "batch", "step": min(STEPS - 1, first + rng.randint(3, 5)), "do": "kill"}
        run.start(zero=zero, ranks=ranks, faults={rng.randrange(ranks): [kill]})


# Of a store that fails: its answers, in turn.
STORE_ANSWERS = ("503", "403", "cut", "hang up")


class FailingStore:
    """The sets of a stage behind a web server that fails: one request of `every`, all of them for a while, or for good.

    Attributes:
        failed: requests that were not answered as they should be.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.server, self.failed, self._every, self._asked = WebServer(folder), 0, every, 0
        self.away, self._lock = False, threading.Lock()
        self._gone_at, self._gone_s = 0, 0.0
        self.server.fault = self._fault

    def go_away(self, after: int, seconds: float) -> None:
        """Be killed when so many more requests have come, and started again later."""
        self._gone_at, self._gone_s = self._asked + after, seconds

    def _fault(self, handler) -> bool:
        with self._lock:
            self._asked += 1
            number = self._asked
        if number == self._gone_at:
            threading.Thread(target=self._restart, daemon=True).start()
        if not self.away and number % self._every:
            return False
        self.failed += 1
        answer = "503" if self.away else STORE_ANSWERS[number // self._every % len(STORE_ANSWERS)]
        if answer == "cut":
            handler.answer(206, b"x" * 1000, {"Content-Range": "bytes 0-999/5000"}, cut=300)
        elif answer == "hang up":
            handler.close_connection = True
        else:
            handler.answer(int(answer))
        return True

    def _restart(self) -> None:
        self.server.stop()
        time.sleep(self._gone_s)
        self.failed += 1
        self.server.start()


def store_faults(scene: Scene, stage: Stage, zero: int) -> None:
    """The sets come from a web server of which one request in twenty fails, which is killed and started again in
    mid-epoch, stays away, and has a shard replaced; the run is killed in between. No image is another's: the losses are
    those of the run from a disk.
    """
    served = scene.folder / "served"
    root = Path(stage.overrides[0].partition("=")[2])
    for name in ("images", "tokens"):
        if (root / name).is_dir():
            shutil.copytree(root / name, served / name)
    store = FailingStore(served, every=20)
    # The reference reads the same images from a disk.
    run = scene.run(stage, zero, f"data.root={store.server.url}", "data.store_retry_s=60", "data.store_requests=2")
    brief = Run(
        scene.server,
        run.folder,
        stage,
        scene.row,
        run.reference,
        overrides=(*run.overrides, "data.store_retry_s=1"),
    )
    try:
        rank = scene.rng.randrange(2)
        run.start(zero=zero, faults={rank: [{"kind": "batch", "step": scene.rng.randint(3, 5), "do": "kill"}]})
        store.away = True
        ended = brief.start(zero=zero, codes=interrupted)
        run.expect_store_fault(ended, "for 1 s; start again when the store answers")
        store.away = False
        shard = scene.rng.choice(sorted((served / "images" / "train").glob("*.tar")))
        whole = shard.read_bytes()
        # of the same size, so that only the bytes tell
        shard.write_bytes(bytes(byte ^ 1 for byte in whole))
        ended = brief.start(zero=zero, codes=interrupted)
        run.expect_store_fault(ended, f"{shard.name}: ")
        shard.write_bytes(whole)
        store.go_away(after=30, seconds=2.0)
        run.finish(zero=zero)
    finally:
        store.server.stop()
    scene.row.faults += store.failed


# --- the campaign ----------------------------------------------------------------------------------------


COMMON = f"schedule.steps={STEPS} checkpoint.every_steps=2 checkpoint.keep_last={KEEP_LAST}".split()
SMALL_TOKENIZER = (
    "views.tokenizer_px=32 data.val_images= data.holdout=7 data.num_workers=0 "
    "tokenizer.channels=16 tokenizer.channel_mults=[1,1,2,2] tokenizer.blocks_per_level=1 "
    "tokenizer.z_channels=16 "
    "tokenizer.num_codes=32 tokenizer.code_dim=8 tokenizer.l2_normalized=true "
    "tokenizer.decay=0.9 tokenizer.revive_below=0.5 tokenizer.kmeans_vectors=256 "
    "optim.lr=2e-3 schedule.epochs=null schedule.warmup_epochs=null schedule.warmup_steps=1 "
    "run.precision=fp32 run.global_batch=8 run.micro_batch=4 run.log_every_steps=1 "
    "evaluation.every_steps=6 perceptual.weight=0 checkpoint.every_epochs=null"
).split()


def stages_on(small: list[str], labelled: list[str]) -> dict[str, Stage]:
    """The three training entries on the sets of tests/conftest.py.

    Args:
        small, labelled: overrides of SmallSets and LabelledSets; the first one of each is data.root.
    """
    return {
        "pretrain": Stage("pretrain", "peco_vitb16", (*small, *COMMON), "model.drop_path=0.3"),
        "finetune": Stage(
            "finetune", "finetune_vitb16", (*labelled, *COMMON, "evaluation.every_epochs=0.5"), "model.drop_path=0.2"
        ),
        "train_tokenizer": Stage("train_tokenizer", "peco_tokenizer", (small[0], *SMALL_TOKENIZER, *COMMON), ""),
    }


def make_stages(folder: Path) -> dict[str, Stage]:
    """Sets built under a folder, or those that an earlier campaign left there."""
    from conftest import find_real_data, make_labelled_sets, make_small_sets

    overrides = []
    for name, make in (("small_sets", make_small_sets), ("labelled_sets", make_labelled_sets)):
        listing = folder / f"{name}.json"
        if not listing.is_file():
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir(parents=True)
            listing.write_text(json.dumps(make(find_real_data(), folder / name).overrides))
        overrides.append(json.loads(listing.read_text()))
    return stages_on(*overrides)


CHAINS = (("pretrain", 3), ("finetune", 1), ("pretrain", 1), ("finetune", 3), ("train_tokenizer", 1))
SCENARIOS = (
    stops,
    damaged,
    full_disk,
    full_file_system,
    stalls,
    spoilt_batch,
    spoilt_for_good,
    dead_worker,
    clock_and_host,
    elastic,
    store_faults,
)


class Campaign:
    """Jobs of (name, number, scenario, stage, ZeRO stage), worked off by lanes; a lane has a server of its own."""

    def __init__(self, folder: Path, stages: dict[str, Stage], *, seed: int, target_kills: int, only: str = "") -> None:
        self._folder, self._stages, self._seed, self._target = folder, stages, seed, target_kills
        self._references = References(folder / "references")
        self.rows: dict[str, Row] = {}
        self._lock = threading.Lock()
        self._jobs: queue.Queue = queue.Queue()
        self._chains = 0
        scenarios = [scenario for scenario in SCENARIOS if scenario is not full_file_system or may_mount()]
        for scenario in scenarios:
            for entry, zero in CHAINS[:2]:
                if not only or re.search(only, scenario.__name__):
                    self._jobs.put((scenario, entry, zero, 0))

    def work(self, lane: int) -> None:
        with ForkServer(self._folder / f"lane_{lane}") as server:
            while (job := self._next()) is not None:
                self._do(server, *job)

    def _next(self):
        with self._lock:
            if sum(row.kills for row in self.rows.values()) < self._target and not (
                self._chains % 3 == 2 and not self._jobs.empty()
            ):
                entry, zero = CHAINS[self._chains % len(CHAINS)]
                self._chains += 1
                return kills, entry, zero, self._chains
            try:
                return self._jobs.get_nowait()
            except queue.Empty:
                return None

    def _do(self, server: ForkServer, scenario, entry: str, zero: int, number: int) -> None:
        name = f"{scenario.__name__.replace('_', ' ')}, {entry} ZeRO-{zero}"
        row, begun = Row(name), time.monotonic()
        folder = self._folder / f"{scenario.__name__}_{entry}_{zero}_{number}"
        scene = Scene(server, random.Random(f"{self._seed} {name} {number}"), folder, row, self._references)
        try:
            scenario(scene, self._stages[entry], zero)
        except Exception as error:
            row.broken.append(f"{name} {number}: {type(error).__name__}: {error}")
        row.seconds = time.monotonic() - begun
        with self._lock:
            self.rows.setdefault(name, Row(name)).add(row)
        sys.stdout.write(
            f"{name} {number}: {row.starts} starts, {row.faults} faults, {row.seconds:.0f} "
            f"s{', BROKEN' if row.broken else ''}\n"
        )
        sys.stdout.flush()
        if not row.broken:
            shutil.rmtree(folder, ignore_errors=True)


# So many of each stage's writes.
DISK_FAULTS = 12


def failing_disks(work: Path, stages: dict[str, Stage], seed: int) -> dict[str, Row]:
    """A row a stage of `endings.try_disks`."""
    from endings import make_tasks, try_disks

    folder, rows = Path(tempfile.mkdtemp(prefix="disks_", dir=work)), {}
    tasks = make_tasks(folder / "sets", list(stages["pretrain"].overrides), list(stages["finetune"].overrides))
    with ForkServer(folder / "server") as server:
        for task in tasks:
            begun, name = time.monotonic(), f"failing disks, {task.stage}"
            trial = try_disks(server, task, folder / task.stage, seed=seed, most=DISK_FAULTS)
            rows[name] = Row(name, faults=trial.faults, starts=trial.starts, codes=trial.codes, broken=trial.broken)
            rows[name].seconds = time.monotonic() - begun
            sys.stdout.write(f"{name}: {trial.starts} starts, {trial.faults} faults{', BROKEN' * bool(trial.broken)}\n")
            sys.stdout.flush()
    return rows


def table(rows: list[Row], seed: int, seconds: float) -> str:
    """Markdown: a row a scenario, a sum, and what was broken."""
    total = Row("all")
    for row in rows:
        total.add(row)
    header = (
        "scenario",
        "faults",
        "starts",
        "resumed",
        "kills",
        "of them in a save",
        "committed",
        "lost",
        "damaged",
        "accepted",
        "worst loss difference",
        "hangs",
        "seconds",
        "exit codes",
    )
    lines = [f"# Fault injection, seed {seed}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in (*rows, total):
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(row.codes.items()))
        values = (
            row.name,
            row.faults,
            row.starts,
            row.resumed,
            row.kills,
            row.kills_in_save,
            row.committed,
            row.lost,
            row.damaged,
            row.accepted,
            f"{row.worst:.1e}" if row.worst else "0",
            row.hangs,
            f"{row.seconds:.0f}",
            codes,
        )
        lines.append(f"| {' | '.join(map(str, values))} |")
    tried = "" if may_mount() else " Mounting is not permitted here: full file system was left out."
    lines += [
        "",
        f"{total.kills} kills, {total.kills_in_save} of them inside a save, in {total.starts} starts "
        f"and {seconds:.0f} s of wall time.{tried}",
    ]
    lines += ["", f"Broken promises: {len(total.broken)}", *(f"- {text}" for text in total.broken)]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kills", type=int, default=120, help="at least so many starts are killed (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=2, help="starts side by side (default: %(default)s)")
    parser.add_argument("--only", default="", help="regular expression of scenario names; kills are told by --kills")
    parser.add_argument(
        "--work",
        type=Path,
        default=None,
        help="folder for sets and runs; kept, sets are used again (default: a temporary one)",
    )
    parser.add_argument("--out", type=Path, default=None, help="the table as Markdown")
    args = parser.parse_args(argv)
    if args.out is not None:
        refuse_foreign(args.out, TABLE)
    begun = time.monotonic()
    work = (args.work or Path(tempfile.mkdtemp(prefix="peco_faults_"))).resolve()
    stages = make_stages(work)
    campaign = Campaign(
        Path(tempfile.mkdtemp(prefix="runs_", dir=work)),
        stages,
        seed=args.seed,
        target_kills=args.kills,
        only=args.only,
    )
    lanes = [threading.Thread(target=campaign.work, args=(lane,)) for lane in range(args.lanes)]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    if not args.only or re.search(args.only, "failing_disks"):
        campaign.rows |= failing_disks(work, stages, args.seed)
    rows = sorted(campaign.rows.values(), key=lambda row: row.name)
    text = table(rows, args.seed, time.monotonic() - begun)
    sys.stdout.write(text)
    if args.out is not None:
        with written_whole(args.out, TABLE) as temporary:
            temporary.write_text(text + markdown_mark(TABLE.maker))
    return int(any(row.broken for row in rows))


if __name__ == "__main__":
    sys.exit(main())
