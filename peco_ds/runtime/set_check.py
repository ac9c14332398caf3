"""Look at the shards of a set when a stage starts: what has changed or gone since its manifest is named then."""

from __future__ import annotations

import os
from typing import Literal

from peco_ds.data.indexed_tar import ShardSet
from peco_ds.data.range_cache import check_cache
from peco_ds.errors import StoreFault, UserError, describe_os_error
from peco_ds.progress_bar import Progress
from peco_ds.runtime.distributed import World, local_size


def check_shared(world: World, *sets: ShardSet, verify: Literal["size", "all"] = "size") -> None:
    """`ShardSet.check_shards`, each rank a share of the shards; a fault found by one rank is raised by all. Collective.

    Every stage that opens an image set calls it once its ranks have met: with "size" this costs one look at each tar,
    and a tar that was indexed in place is hashed where it has another time since. Without it a tar that its owner has
    made anew would pass for so many unreadable images.

    Raises: UserError naming the first shard that is missing, cut short or changed.
    """
    fault: str | StoreFault = ""
    try:
        for access in {shards.access for shards in sets if shards.is_remote}:
            check_cache(access)
        for shards in sets:
            shards.check_shards(range(world.rank, len(shards.manifest.shards), world.size), verify)
        for shards in sets:
            if shards.is_remote and shards.access.staged:
                _stage(world, shards)
    except UserError as error:
        fault = str(error)
    except StoreFault as error:
        fault = error
    except OSError as error:
        fault = describe_os_error(error)
    world.agree(fault)


def _stage(world: World, shards: ShardSet) -> None:
    """Bring a set to the disk of the node; its ranks begin at different places, and no shard is brought twice."""
    num_shards = len(shards.manifest.shards)
    first = int(os.environ.get("LOCAL_RANK", "0")) * num_shards // local_size()
    progress = Progress(num_shards, 0, f"shards of {shards.folder} staged") if world.is_main else None
    try:
        for done in range(num_shards):
            shards.stage((first + done) % num_shards)
            if progress is not None:
                progress.show(done + 1)
    finally:
        if progress is not None:
            progress.close()
