"""What a training asks of an object store: requests and bytes an epoch, streamed, cached or staged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from peco_ds.planner.data_side import SOURCE_BYTES, token_bytes
from peco_ds.planner.estimate import Estimate
from peco_ds.remote_paths import GAP_BYTES, REQUEST_BYTES
from peco_ds.schema import ImageManifest, TokenManifest

# Of a set that is not packed yet: pack_images.py's usual number of samples a shard, what a tar holds of an image beside
# its bytes (headers, class), and bytes that an index has of a sample.
SHARD_SAMPLES, TAR_ROOM_BYTES, INDEX_SAMPLE_BYTES = 1000, 2048, 200


@dataclass(frozen=True)
class StoredSet:
    """Sizes of a set of shards.

    Args:
        sample_bytes: room that a sample takes in its tar, in the mean.
    """

    name: str
    samples: int
    shards: int
    sample_bytes: float

    @property
    def bytes(self) -> float:
        return self.samples * self.sample_bytes


@dataclass(frozen=True)
class StoreCosts:
    """Of one set.

    Attributes:
        requests, bytes: of all processes together in an epoch without a cache. Each reads the index of each shard.
        run_bytes: of all epochs, where each node keeps what it has read.
        staged_requests, staged_bytes: of bringing whole shards to every node, once.
    """

    stored: StoredSet
    requests: float
    bytes: float
    run_bytes: float
    staged_requests: float
    staged_bytes: float


def set_of(name: str, manifest: ImageManifest | TokenManifest) -> StoredSet:
    """Of a set that is there."""
    size = sum(shard.bytes for shard in manifest.shards)
    return StoredSet(name, manifest.samples, len(manifest.shards), size / max(1, manifest.samples))


def assumed_sets(stage) -> list[StoredSet]:
    """Images, and the tokens of a pre-training that reads them, from the recipe's sizes and ImageNet's mean image."""
    samples, recipe = stage.num_samples, stage.recipe
    shards = max(1, ceil(samples / SHARD_SAMPLES))
    sets = [StoredSet("images", samples, shards, SOURCE_BYTES + TAR_ROOM_BYTES)]
    if stage.kind == "pre-training" and recipe.data.tokens != "online":
        views = recipe.views
        sets.append(StoredSet("tokens", samples, shards, token_bytes(views.count, recipe.model.grid**2, views.topk)[1]))
    return sets


def requests_of(stored: StoredSet, batch: int, window_shards: int) -> tuple[float, float]:
    """(requests, bytes) of one epoch without a cache: batches drawn from windows of so many shards.

    A sample goes with the request of the one before it in its tar, if the batch has one within the gap that is read
    over; each other sample of the window is in the batch with the same probability.
    """
    window = min(stored.samples, window_shards * stored.samples / stored.shards)
    share = (min(batch, window) - 1) / max(1.0, window - 1)
    reach = 1 + int(GAP_BYTES / stored.sample_bytes)
    alone, gap_bytes = 1.0, 0.0
    for places in range(1, reach + 1):
        # Of the samples of a shard, so many have none so far before them.
        inner = max(0.0, 1 - places * stored.shards / stored.samples)
        gap_bytes += alone * share * (places - 1) * stored.sample_bytes * inner
        alone *= 1 - share
    size = stored.samples * (stored.sample_bytes + gap_bytes)
    # The first samples of a shard have fewer before them.
    firsts = stored.samples / batch * min(window_shards, stored.shards) * (1 - alone - reach * share * alone)
    return max(stored.samples * alone + max(0.0, firsts), size / REQUEST_BYTES), size


def store_costs(made: Estimate, sets: Sequence[StoredSet]) -> list[StoreCosts]:
    """Of a training stage, an entry a set; validation is left out.

    Args:
        made: its estimate, which has the micro-batch, the GPUs and the nodes.
    """
    data = made.stage.recipe.data
    epochs = made.stage.images / max(1, made.stage.num_samples)
    processes, nodes = made.gpus * max(1, data.num_workers), made.nodes
    found = []
    for stored in sets:
        requests, size = requests_of(stored, made.micro_batch, data.shuffle_window_shards)
        # Samples of a shard are spread over all processes, so each of them opens it. With a cache, each node does.
        index_bytes = stored.samples * INDEX_SAMPLE_BYTES
        requests += stored.shards * processes
        size += index_bytes * processes
        # A node reads another part of the set in every epoch, until it has all of it.
        seen = nodes * (1 - (1 - 1 / nodes) ** epochs) if nodes > 1 else min(1.0, epochs)
        staged = stored.shards * (2 + max(0, ceil(stored.bytes / stored.shards / REQUEST_BYTES) - 1))
        found.append(
            StoreCosts(
                stored,
                requests,
                size,
                seen * stored.bytes + index_bytes * nodes,
                staged * nodes,
                (stored.bytes + index_bytes) * nodes,
            )
        )
    return found


def store_lines(made: Estimate, sets: Sequence[StoredSet], *, assumed: bool) -> list[str]:
    """For people.

    Args:
        assumed: no set was read.
    """
    costs, nodes = store_costs(made, sets), made.nodes
    source = f"assumed: {SOURCE_BYTES / 1e3:.0f} kB an image" if assumed else "by the manifests"
    on = f"{made.gpus} GPUs, {nodes} node{'s' if nodes > 1 else ''}, micro-batch {made.micro_batch}"
    lines = [f"{made.stage.name} from an object store ({on}; sizes {source}), all processes together:"]
    for cost in costs:
        stored = cost.stored
        lines += [
            f"  {stored.name}: {stored.samples:,} samples in {stored.shards:,} shards, {_bytes(stored.bytes)}",
            f"    streamed: {_count(cost.requests)} requests, {_bytes(cost.bytes)} an epoch",
            f"    data.cache, all epochs together: {_bytes(cost.run_bytes)}",
            f"    whole shards (data.cache_whole_shards, PECO_STAGE_DIR), once: {_count(cost.staged_requests)} "
            f"requests, {_bytes(cost.staged_bytes)}; {_bytes(stored.bytes)} of disk a node",
        ]
    requests, size = sum(cost.requests for cost in costs), sum(cost.bytes for cost in costs)
    lines.append(f"  together, streamed: {_count(requests)} requests and {_bytes(size)} an epoch")
    return lines


def store_facts(made: Estimate, sets: Sequence[StoredSet]) -> dict:
    """Plain values, for JSON."""
    return {
        cost.stored.name: {
            "samples": cost.stored.samples,
            "shards": cost.stored.shards,
            "set_bytes": round(cost.stored.bytes),
            "epoch_requests": round(cost.requests),
            "epoch_bytes": round(cost.bytes),
            "cached_run_bytes": round(cost.run_bytes),
            "staged_requests": round(cost.staged_requests),
            "staged_bytes": round(cost.staged_bytes),
        }
        for cost in store_costs(made, sets)
    }


def _count(value: float) -> str:
    return f"{value / 1e6:,.2f} million" if value >= 1e6 else f"{value:,.0f}"


def _bytes(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"
