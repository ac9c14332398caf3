"""The measure of the data side's growth: what it reports of a small set, of 10^8 samples, and of what it cannot do."""

from __future__ import annotations

import re

import pytest
from benchmark_runs import run_benchmark

from benchmarks import data_scale


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    return {
        name: data_scale.in_fresh_process(case)
        for name, case in (("few", data_scale.Case(10, 1000)), ("many", data_scale.Case(100_000, 1000)))
    }


def test_a_hundred_million_samples_are_continued_anywhere_in_little_memory(rows):
    assert rows["many"]["peak_mb"] < 1024, "both manifests and the order, beyond the imports"
    for name, seconds in rows["many"]["resumed_s"].items():
        assert seconds < 100 * rows["few"]["resumed_s"][name], f"{name}: ten thousand times the samples"


def test_the_start_of_a_run_grows_no_faster_than_its_shards(rows):
    assert rows["many"]["start_s"] < 10_000 * rows["few"]["start_s"] * 1.5
    assert rows["many"]["open_ms"] < 10 * rows["few"]["open_ms"], "one shard is as large among few as among many"


def test_the_more_workers_share_a_window_the_more_shards_each_opens_for_a_sample(rows):
    opens = rows["many"]["opens"]
    assert opens["8"] == 8 * 16 / 16_000, "every worker opens every shard of a window of 16 once"
    assert opens["8"] < opens["512"] < opens["4096"] <= 1


def test_a_giant_shard_and_repeats_are_measured_too():
    row = data_scale.in_fresh_process(data_scale.Case(40, 100, giant=20_000, window_shards=8, repeats=3))
    assert {"in the giant shard", "last batch of the run"} <= set(row["resumed_s"]) and row["samples_a_second"] > 0


def test_table_record_and_plot_are_written(tmp_path):
    run_benchmark("data_scale", "--largest", "1e5", "--record", tmp_path / "r.md", "--plot", tmp_path / "r.png")
    text = (tmp_path / "r.md").read_text()
    assert "![time and memory against samples](r.png)" in text and (tmp_path / "r.png").stat().st_size > 10_000
    assert [len(re.findall(rf"^\| {shards} x 1000 \|", text, flags=re.MULTILINE)) for shards in (10, 100, 1000)] == [
        2,
        3,
        0,
    ], "of each case a start and a resume, of the largest what workers open"


def test_a_size_that_leaves_no_case_is_refused():
    done = run_benchmark("data_scale", "--largest", "100", check=False)
    assert done.returncode == 2 and "--largest 100" in done.stderr and len(done.stderr.strip().splitlines()) == 1
