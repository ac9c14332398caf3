"""Write checkpoint files beside training: the loop waits for a copy to host memory only, a thread does the rest.

`HostCopies` replaces DeepSpeed's checkpoint engine, the object to which its `save_checkpoint` passes every file's
content.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from peco_ds.errors import describe_os_error
from peco_ds.runtime.checkpoint.files import Files
from peco_ds.runtime.checkpoint.pickles import load_known, refuse_foreign_classes
from peco_ds.runtime.checkpoint.pinned import host_buffer

_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY}


class HostCopies(CheckpointEngine):
    """Collects the files that DeepSpeed would write, their tensors copied to host memory; `take` hands them over.

    The next save uses the copies' memory again: as much as this rank's part of a checkpoint, pinned where there is a
    GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[str, object] = {}
        self._buffers: dict[tuple, torch.Tensor] = {}

    def create(self, info) -> None:
        pass

    def commit(self, info) -> bool:
        return True

    def load(self, path: str, map_location=None):
        return load_known(Path(path))

    def preserves_storage_sharing(self) -> bool:
        # Every tensor is copied by itself, so DeepSpeed need not clone slices of its flat buffers first.
        return False

    def save(self, state_dict, path: str) -> None:
        """Keep a copy of what the file `path` will hold, as of now."""
        name = Path(path).name
        self._files[name] = self._copied(state_dict, (name,))

    def take(self) -> dict[str, object]:
        """File name -> content of everything saved since the last call, ready to be written."""
        if torch.cuda.is_available():
            # The copies run asynchronously.
            torch.cuda.synchronize()
        files, self._files = self._files, {}
        return files

    def _copied(self, value, place: tuple):
        if isinstance(value, torch.Tensor):
            return self._host_copy(value.detach(), place)
        if isinstance(value, dict):
            kind = OrderedDict if isinstance(value, OrderedDict) else dict
            return kind((key, self._copied(item, (*place, key))) for key, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(self._copied(item, (*place, index)) for index, item in enumerate(value))
        # The loss scaler of fp16 is an object that the next step changes.
        return copy.deepcopy(value)

    def _host_copy(self, tensor: torch.Tensor, place: tuple) -> torch.Tensor:
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[place] = host_buffer(tensor.shape, tensor.dtype)
        return buffer.copy_(tensor, non_blocking=True)


class BackgroundWriter:
    """One thread that writes, fsyncs and hashes one rank's files of one checkpoint.

    Args:
        folder: exists already.
        files: name -> what torch.save is to write.
        prepare: called first, in the thread; returns further files it wrote.
    """

    def __init__(self, folder: Path, files: dict[str, object], prepare: Callable[[], Files] = dict) -> None:
        self._folder, self._files, self._prepare = folder, files, prepare
        self.written: Files = {}
        self.fault = "the writer ended before it was done"
        self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self.written |= _patiently(self._prepare)
            for name, content in self._files.items():
                self.written[name] = _patiently(lambda: write_hashed(self._folder / name, content))  # noqa: B023
                # Checked now, not only when a resume needs the file.
                refuse_foreign_classes(self._folder / name)
            self.fault = ""
        except OSError as error:
            self.fault = describe_os_error(error)
        except Exception as error:
            # Any error counts: a checkpoint with a missing part must not be committed.
            self.fault = f"{self._folder}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            self._files = {}


def _patiently(write: Callable):
    """Retry where a file system fails for a moment; raise at once where it is full."""
    for pause_s in (1.0, 5.0, None):
        try:
            return write()
        except OSError as error:
            if pause_s is None or error.errno not in _PASSING:
                raise
        time.sleep(pause_s)


def write_hashed(path: Path, content) -> list:
    """torch.save through to the disk. Returns: [bytes, sha256] of the file."""
    with open(path, "wb") as file:
        target = _HashedFile(file)
        torch.save(content, target)
        file.flush()
        os.fsync(file.fileno())
    return [target.num_bytes, target.sha256.hexdigest()]


class _HashedFile:
    """Hashes while it writes, so that gigabytes need not be read back; torch writes its zip from front to back."""

    def __init__(self, file) -> None:
        self._file = file
        self.sha256, self.num_bytes = hashlib.sha256(), 0

    def write(self, data) -> int:
        written = self._file.write(data)
        self.sha256.update(data)
        self.num_bytes += len(memoryview(data).cast("B"))
        return written

    def flush(self) -> None:
        self._file.flush()
