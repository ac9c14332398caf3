"""What an epoch asks of an object store, against the requests that the reader would make."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from peco_ds.data import remote_tar
from peco_ds.data.order import SampleOrder
from peco_ds.data.remote_tar import Span, joined
from peco_ds.plan import main
from peco_ds.planner import store_costs as costs
from peco_ds.planner.bill import make_bill
from peco_ds.planner.chain import read_chain
from peco_ds.planner.hardware import find_hardware
from peco_ds.planner.store_costs import StoredSet, assumed_sets, requests_of, set_of
from peco_ds.schema import ImageManifest, Shard, write_manifest

H100 = find_hardware("h100")


def counted(stored: StoredSet, batch: int, window: int) -> tuple[int, int]:
    """Requests and bytes of an epoch of real batches, as the reader joins them."""
    size, order = (
        int(stored.sample_bytes),
        SampleOrder(np.full(stored.shards, stored.samples // stored.shards), 0, window),
    )
    each, requests, bytes_read = stored.samples // stored.shards, 0, 0
    for first in range(0, stored.samples, batch):
        by_shard: dict[int, list[Span]] = {}
        for position in range(first, min(first + batch, stored.samples)):
            shard, place = divmod(order.sample_at(position), each)
            by_shard.setdefault(shard, []).append(Span(place * size, size, 0))
        found = [request for spans in by_shard.values() for request in joined(spans)]
        requests, bytes_read = requests + len(found), bytes_read + sum(length for _, length, _ in found)
    return requests, bytes_read


@pytest.mark.parametrize(
    ("sample_bytes", "batch", "window"), [(117_000, 64, 4), (117_000, 16, 1), (2_000, 64, 4), (30_000, 256, 2)]
)
def test_predicted_requests_and_bytes_are_those_the_reader_makes(sample_bytes, batch, window):
    stored = StoredSet("images", 8_000, 8, sample_bytes)
    requests, size = requests_of(stored, batch, window)
    true_requests, true_size = counted(stored, batch, window)
    # measured: within 2 %; what remains is the ends of shards and of windows
    assert requests == pytest.approx(true_requests, rel=0.05)
    assert size == pytest.approx(true_size, rel=0.05)


def test_the_planner_and_the_reader_agree_on_gaps_and_requests():
    assert (costs.GAP_BYTES, costs.REQUEST_BYTES) == (remote_tar.GAP_BYTES, remote_tar.REQUEST_BYTES)


def of(gpus: int, *overrides: str):
    bill = make_bill(read_chain("peco_vitb16", list(overrides)), H100, gpus)
    sets = assumed_sets(bill.main.stage)
    return bill.main, dict(zip((stored.name for stored in sets), costs.store_costs(bill.main, sets)))


def test_pre_training_reads_images_and_tokens_and_other_stages_images_alone():
    _, both = of(8)
    assert set(both) == {"images", "tokens"}
    assert set(of(8, "data.tokens=online")[1]) == {"images"}
    bill = make_bill(read_chain("finetune_vitb16", []), H100, 8)
    assert [stored.name for stored in assumed_sets(bill.main.stage)] == ["images"]
    assert 1_281_167 * 115_000 < both["images"].stored.bytes < both["images"].bytes


def test_a_cache_saves_epochs_and_more_nodes_cost_more():
    one, eight = of(8)[1]["images"], of(64)[1]["images"]
    made, _ = of(8)
    epochs = made.stage.images / made.stage.num_samples
    assert one.run_bytes < 1.1 * one.stored.bytes < epochs * one.bytes
    assert eight.run_bytes == pytest.approx(8 * one.run_bytes, rel=0.05)
    assert eight.staged_bytes == 8 * one.staged_bytes and eight.staged_requests == 8 * one.staged_requests
    assert eight.stored.shards * 64 < eight.requests - 1.2e6, "each process opens each shard"


def test_a_set_that_is_there_counts_by_its_manifest(tmp_path, capsys):
    shards = [Shard(f"{number}.tar", 40_000, 10**9, "0" * 64, "0" * 64) for number in range(3)]
    manifest = ImageManifest(shards=shards, samples=120_000)
    assert set_of("images", manifest) == StoredSet("images", 120_000, 3, 25_000)
    write_manifest(tmp_path, manifest)
    fine_tuning = ["--recipe", "finetune_vitb16", "--gpus", "8"]
    assert main([*fine_tuning, "--store", f"data.images={tmp_path}", "--json", str(tmp_path / "plan.json")]) == 0
    text = capsys.readouterr().out
    assert "images: 120,000 samples in 3 shards, 3.0 GB" in text and "sizes by the manifests" in text
    facts = json.loads((tmp_path / "plan.json").read_text())["store"][0]["images"]
    assert facts["set_bytes"] == 3 * 10**9 and facts["epoch_requests"] >= 3
    assert main(fine_tuning) == 0
    assert "object store" not in capsys.readouterr().out


def test_a_url_is_planned_with_its_costs_by_itself(capsys):
    # nothing listens there: no set is read where --samples tells its size
    assert main("--recipe peco_vitb16 --gpus 8 --samples 3e6 data.root=http://127.0.0.1:9".split()) == 0
    text = capsys.readouterr().out
    assert "from an object store (8 GPUs, 1 node" in text and "sizes assumed: 115 kB an image" in text
    assert "images: 3,000,000 samples in 3,000 shards" in text and "tokens: 3,000,000" in text


def test_a_larger_gap_costs_bytes_and_saves_requests(monkeypatch):
    stored = StoredSet("tokens", 100_000, 100, 2_000)
    requests, size = requests_of(stored, 256, 4)
    monkeypatch.setattr(costs, "GAP_BYTES", 0)
    more, less = requests_of(stored, 256, 4)
    assert more > 1.5 * requests and less < size
    assert requests_of(replace(stored, samples=1, shards=1), 256, 4) == (1, 2_000)
