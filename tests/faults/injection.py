"""What a plan breaks inside one rank, and what the rank notes down for the judge.

Both are patches of the forked process, never hooks in the product.

A fault is a dict with "kind":

    {"kind": "call", "function": NAME of SAVE_CALLS, "nth": 3, "when": "before" | "torn" | "after", "do": "kill" |
    "full_disk" | "file_limit" | "signal" | "note", "number": 15}
        at the nth call that touches a checkpoint being written (or "match", another pattern); "full_disk" stays so for
        all later calls of the function
    {"kind": "batch", "step": 7, "micro": 0, "for_good": false, "do": "kill" | "signal" | "sleep" | "stop" | "nan" |
    "kill_worker", "seconds": 3600, "number": 15}
        when the loop takes the batch of that optimiser step (counted from 0 over the whole run)
    {"kind": "disk", "folder": PATH, "nth": 3, "do": "full_disk" | "read_only" | "vanish" | "note"}
        from the nth time on that something below the folder is made, opened for writing, renamed or flushed; "vanish"
        removes the folder that once
    {"kind": "clock", "offset_s": -3600}, {"kind": "host", "name": "node7"}

Noted, one JSON object a line, in the start's logs: committed.jsonl (checkpoints renamed to their final name),
resumed.jsonl (first step), keys_R.jsonl (sample keys of each batch that the loop took), struck.jsonl (faults that came
to pass).
"""

from __future__ import annotations

import _io
import builtins
import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

# Where a checkpoint is made or unmade, by the names that any way of saving has to call: function -> which argument is
# the path, pattern of paths that count.
SAVE_CALLS = {
    "torch.save": (1, r"/checkpoints/\.tmp-"),
    "os.fsync": (0, r"/checkpoints(/|$)"),
    "sha256_of_file": (0, r"/checkpoints/\.tmp-"),
    "write_json": (0, r"/checkpoints/\.tmp-"),
    # the commit, and the first half of a removal
    "os.rename": (1, r"/checkpoints/(step_\d{8}|\.old-[^/]*)$"),
    "os.replace": (1, r"/checkpoints/(latest$|\.tmp-)"),
    "shutil.rmtree": (0, r"/checkpoints/"),  # left-overs and retention
}
COMMITTED = re.compile(r"/checkpoints/step_\d{8}$")


def install(faults: list[dict], rank: int, logs: Path) -> None:
    """Patch this process. Called in the fork, before the entry's main."""
    notes = Notes(rank, logs)
    watch_commits(notes)
    watch_batches(notes, [fault for fault in faults if fault["kind"] == "batch"])
    for fault in faults:
        if fault["kind"] == "call":
            break_call(notes, fault)
        elif fault["kind"] == "disk":
            break_disk(notes, fault)
        elif fault["kind"] == "clock":
            true_time, offset_s = time.time, fault["offset_s"]
            time.time = lambda: true_time() + offset_s
        elif fault["kind"] == "host":
            socket.gethostname = lambda name=fault["name"]: name
        else:
            assert fault["kind"] == "batch", fault


class Notes:
    """Lines that are on disk before the next instruction runs: the next one may be a SIGKILL."""

    def __init__(self, rank: int, logs: Path) -> None:
        self.rank, self._logs = rank, logs

    def write(self, name: str, entry: dict) -> None:
        handle = os.open(self._logs / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, (json.dumps({"rank": self.rank, **entry}) + "\n").encode())
        os.close(handle)


# --- functions -------------------------------------------------------------------------------------------


def path_of(argument) -> str:
    """Path behind what a writing function was given: a path, a descriptor, a file, or an object around a file."""
    if isinstance(argument, (str, Path)):
        return str(argument)
    if not isinstance(argument, int) and not hasattr(argument, "fileno"):
        argument = next((inner for inner in vars(argument).values() if hasattr(inner, "fileno")), None)
    try:
        handle = argument if isinstance(argument, int) else argument.fileno()
        return os.readlink(f"/proc/self/fd/{handle}")
    except (AttributeError, OSError, ValueError):
        return ""


def wrap(function: str, make: Callable[[Callable], Callable]) -> None:
    """Put `make(original)` in the place of a function: in its module if a dotted name, else in every module of ours
    that imported it.
    """
    module_name, _, name = function.rpartition(".")
    if module_name:
        module = sys.modules[module_name]
        setattr(module, name, make(getattr(module, name)))
        return
    from peco_ds import schema

    original = getattr(schema, name)
    wrapped = make(original)
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("peco_ds") and getattr(module, name, None) is original:
            setattr(module, name, wrapped)


def watch_commits(notes: Notes) -> None:
    def make(original):
        def renaming(source, target, **options):
            original(source, target, **options)
            if COMMITTED.search(str(target)):
                notes.write("committed.jsonl", {"step": int(str(target)[-8:])})

        return renaming

    for function in ("os.rename", "os.replace"):
        wrap(function, make)


def break_call(notes: Notes, fault: dict) -> None:
    position, pattern = SAVE_CALLS[fault["function"]]
    pattern = re.compile(fault.get("match", pattern))
    lock, calls = threading.Lock(), [0]  # a save may be written by a thread

    def make(original):
        def broken(*arguments, **options):
            path = path_of(arguments[position]) if len(arguments) > position else ""
            if not pattern.search(path):
                return original(*arguments, **options)
            with lock:
                calls[0] += 1
                number = calls[0]
            lasting = fault["do"] in ("full_disk", "file_limit", "note")
            if number < fault["nth"] or (number > fault["nth"] and not lasting):
                return original(*arguments, **options)
            return strike(original, arguments, options, path)

        return broken

    def strike(original, arguments, options, path):
        result = None
        if fault.get("when", "before") != "before":
            result = original(*arguments, **options)
        if fault.get("when") == "torn" and os.path.isfile(path):
            os.truncate(path, os.path.getsize(path) // 2)
        notes.write("struck.jsonl", {"fault": fault, "path": path})
        if fault["do"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault["do"] == "signal":
            os.kill(os.getpid(), fault["number"])
        elif fault["do"] == "full_disk":
            # a write or an fsync does not tell its file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([path] if position else []))
        elif fault["do"] == "file_limit":
            # the system itself then cuts files short, also those that C++ writes
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
        return original(*arguments, **options) if fault.get("when", "before") == "before" else result

    wrap(fault["function"], make)


def break_disk(notes: Notes, fault: dict) -> None:
    """A disk whose every write fails from some moment on, or whose folder goes. Reading is left alone."""
    folder, lock, writes = os.path.abspath(fault["folder"]), threading.Lock(), [0]
    number = {"full_disk": errno.ENOSPC, "read_only": errno.EROFS}.get(fault["do"])

    def look(path) -> None:
        path = os.path.abspath(path_of(path) or "/") if not isinstance(path, bytes) else ""
        if path != folder and not path.startswith(folder + os.sep):
            return
        with lock:
            writes[0] += 1
            count = writes[0]
        if count < fault["nth"]:
            return
        notes.write("struck.jsonl", {"fault": fault, "path": path})
        if number:
            raise OSError(number, os.strerror(number), path)
        if fault["do"] == "vanish" and count == fault["nth"]:
            shutil.rmtree(folder, ignore_errors=True)

    def before(function, position: int, is_write: Callable[..., bool] = lambda *_, **__: True):
        def broken(*arguments, **options):
            if len(arguments) > position and is_write(*arguments, **options):
                look(arguments[position])
            return function(*arguments, **options)

        return broken

    def opens_to_write(_path, mode="r", *_, **__) -> bool:
        return isinstance(mode, str) and bool(set(mode) & set("wax+"))

    def makes(_path, flags=0, *_, **__) -> bool:
        return bool(flags & (os.O_WRONLY | os.O_RDWR))

    opened = before(io.open, 0, opens_to_write)
    builtins.open = io.open = _io.open = opened
    os.open = before(os.open, 0, makes)
    os.mkdir, os.fsync = before(os.mkdir, 0), before(os.fsync, 0)
    os.rename, os.replace = before(os.rename, 1), before(os.replace, 1)


# --- batches ---------------------------------------------------------------------------------------------


def watch_batches(notes: Notes, faults: list[dict]) -> None:
    """Note the first step and the keys of every batch, and break the batches that the plan names."""
    from peco_ds.data import labelled, loaders, order

    true_positions = order.rank_positions
    place = {"step": 0, "micro_steps": 1, "trains": False}

    def positions(run, rank, world_size, *, first_step, last_step):
        # else the codebook's first look at the data, which is no step
        trains = last_step < sys.maxsize
        place.update(step=first_step, micro_steps=run.global_batch // (run.micro_batch * world_size), trains=trains)
        if trains:
            notes.write(
                "resumed.jsonl", {"first_step": first_step, "world_size": world_size, "micro_batch": run.micro_batch}
            )
        return true_positions(run, rank, world_size, first_step=first_step, last_step=last_step)

    order.rank_positions = positions
    for module, name in ((loaders, "masked_batches"), (loaders, "crop_batches"), (labelled, "training_batches")):
        original = getattr(module, name)

        def watched(*arguments, original=original, **options):
            batches = original(*arguments, **options)
            number = 0
            while True:
                step, micro = place["step"] + number // place["micro_steps"], number % place["micro_steps"]
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                if place["trains"] and hasattr(batch, "keys"):
                    notes.write(f"keys_{notes.rank}.jsonl", {"step": step, "micro": micro, "keys": list(batch.keys)})
                for fault in faults:
                    if place["trains"] and due(fault, step, micro):
                        notes.write("struck.jsonl", {"fault": fault, "step": step})
                        batch = break_batch(fault, batch)
                number += 1
                yield batch

        setattr(module, name, watched)


def due(fault: dict, step: int, micro: int) -> bool:
    return micro == fault.get("micro", 0) and (
        step >= fault["step"] if fault.get("for_good") else step == fault["step"]
    )


def break_batch(fault: dict, batch):
    if fault["do"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault["do"] == "signal":
        os.kill(os.getpid(), fault["number"])
    elif fault["do"] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault["do"] == "sleep":
        time.sleep(fault["seconds"])
    elif fault["do"] == "kill_worker":
        import multiprocessing

        workers = multiprocessing.active_children()
        assert workers, "the plan kills a loader worker, but this rank has none; set data.num_workers"
        # not waited for: its death shows somewhere in the step that follows, as it would by itself
        os.kill(workers[0].pid, signal.SIGKILL)
    elif fault["do"] == "nan":
        return batch._replace(images_norm=torch.full_like(batch.images_norm, float("nan")))
    return batch
