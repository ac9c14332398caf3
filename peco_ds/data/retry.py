"""Read records of a network file system that may fail for a moment: a few more tries before an error counts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress

from peco_ds.data.indexed_tar import ShardSet

logger = logging.getLogger("peco_ds")

# Pauses before each further try.
WAITS_S = (0.2, 1.0, 5.0)


class UnreadableRecord(Exception):
    """Every try to read the bytes failed; the message names shard and reason."""


def read_with_retries(
    shards: ShardSet, sample: int, extensions: Iterable[str] | None = None
) -> tuple[str, dict[str, bytes]]:
    """As `ShardSet.read`, tried again after a pause where the system reports an error (EIO, ESTALE, ETIMEDOUT, ...).

    A store's requests are repeated where they are made (`remote_paths.py`).

    Raises: UnreadableRecord when no try has helped; DamagedRecord, UserError and StoreFault at once, as
        `ShardSet.read`.
    """
    waits_s = iter(WAITS_S)
    while True:
        try:
            return shards.read(sample, extensions)
        except OSError as error:
            number, _ = shards.locate(sample)
            shard = shards.manifest.shards[number].name
            reason = error.strerror or os.strerror(error.errno or 0)
            wait_s = next(waits_s, None)
            if wait_s is None:
                raise UnreadableRecord(
                    f"{shards.folder / shard}: {reason}, {len(WAITS_S) + 1} times in {sum(WAITS_S):g} s"
                ) from None
            logger.warning("%s: %s; read again in %g s", shards.folder / shard, reason, wait_s)
        time.sleep(wait_s)
        _open_anew(shards, sample)


def _open_anew(shards: ShardSet, sample: int) -> None:
    """Close the shard, so that the next read opens it again: a stale handle never recovers."""
    # An error here is met again by the next try.
    with suppress(OSError):
        shards.open_shard(shards.locate(sample)[0]).close()
