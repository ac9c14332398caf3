"""Which tars and indexes of a folder of shards its writer may replace or remove: those that its records name.

A record is written before the shard takes its name, so a shard without one is not the writer's, whenever that died.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from peco_ds.data.indexed_tar import index_name
from peco_ds.errors import UserError
from peco_ds.own_files import is_own_tar, own_json

# An index is known by its keys, which are those of every release.
_INDEX = own_json("", "format_version", "tar", "tar_bytes", "samples")


@dataclass(frozen=True)
class ShardWriterOf:
    """A command that writes shards, and by what its tars are known.

    Attributes:
        command: for messages.
        first_ends: what the name of a tar's first member ends in.
    """

    command: str
    first_ends: tuple[str, ...]

    def owns_tar(self, tar: Path, sha256: str | None) -> bool:
        """Whether the tar may be replaced or removed.

        Args:
            sha256: of the record; "" where it cannot be read; None where there is none.
        """
        return sha256 is not None and tar.is_file() and is_own_tar(tar, sha256, first_ends=self.first_ends)

    def refuse_foreign(self, folder: Path, name: str, sha256: str | None, *, index_only: bool = False) -> None:
        """Check the place of a shard before it is written.

        Args:
            sha256: as `owns_tar` takes it.
            index_only: the tar lies elsewhere, and is not written.
        Raises: UserError naming a tar or index that the command has not written.
        """
        tar, index = folder / name, folder / index_name(name)
        if not index_only and os.path.lexists(tar) and not self.owns_tar(tar, sha256):
            raise self._foreign(tar)
        if os.path.lexists(index) and not (index.is_file() and (sha256 is not None or _is_index(index))):
            raise self._foreign(index)

    def _foreign(self, path: Path) -> UserError:
        return UserError(
            f"{path}: stands there already and was not made by {self.command} in this folder; give another folder, or "
            "move it away"
        )


def _is_index(path: Path) -> bool:
    try:
        return _INDEX.knows(path)
    except (OSError, ValueError, RecursionError, MemoryError):
        return False
