"""The benchmark of remote data at toy size: it runs as a user starts it, and counts what is asked of the server."""

from __future__ import annotations

import re

import pytest
from benchmark_runs import run_benchmark

from benchmarks import remote_data as benchmark


def test_a_run_of_a_few_images_has_every_way_with_its_requests_and_bytes(real_data, tmp_path):
    for number, path in enumerate(real_data.imagenet[:16]):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / f"{number}.jpg").symlink_to(path)
    record = tmp_path / "record.md"
    sizes = ("--num_images", 16, "--shard", 8, "--rounds", 1, "--latency_ms", 1)
    small = ("run.global_batch=8", "run.micro_batch=8", "data.num_workers=0")
    done = run_benchmark("remote_data", "--images", tmp_path / "raw", *sizes, "--record", record, *small)
    text = record.read_text()
    assert text.strip() in done.stdout
    assert "16 images in 2 shards" in text and "python -m benchmarks.remote_data --images" in text
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in text.splitlines() if "| " in line)}
    requests = {way: int(rows[way][4]) for way in benchmark.WAYS}
    megabytes = {way: float(rows[way][5]) for way in benchmark.WAYS}
    assert requests[benchmark.DISK] == 0 and megabytes[benchmark.DISK] == 0
    # two manifests, two indexes of each set, and all members in a few requests
    assert 2 <= requests[benchmark.WARM] < requests[benchmark.STREAMED] <= 2 + 4 + 32
    size = float(re.search(r"2 shards, ([\d.]+) MB", text)[1])
    assert 0.9 * size < megabytes[benchmark.STREAMED] < 1.2 * size + 1
    assert megabytes[benchmark.WARM] < 0.1 * size < megabytes[benchmark.COLD]
    assert megabytes[benchmark.WHOLE] == pytest.approx(size, rel=0.2)


def test_the_ratio_is_of_rates_round_by_round():
    found = {way: benchmark.Epochs([100.0, 200.0], [1, 1], [10, 10], [50.0, 60.0]) for way in benchmark.WAYS}
    found[benchmark.STREAMED].images_s = [50.0, 150.0]
    assert "| streamed | 100 | 0.62 (0.50 to 0.75) | 1 | 0.0 | 60 |" in benchmark.table(found)
