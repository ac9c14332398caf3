"""benchmarks.tokenizing: runs at toy size, and its ratios are those of one round's rates."""

import pytest
from benchmark_runs import run_benchmark

from benchmarks import tokenizing

TOY = (
    "tokenizer.channels=8 tokenizer.channel_mults=[1,1,2] tokenizer.blocks_per_level=1 "
    "tokenizer.num_codes=64 tokenizer.vit.width=24 tokenizer.vit.heads=3 tokenizer.vit.depth=1 "
    "tokenizer.vit.decoder_width=24 tokenizer.vit.decoder_heads=3 tokenizer.vit.image_px=32 "
    "tokenizer.vit.patch_px=8 views.tokenizer_px=32 views.count=3 run.micro_batch=2"
).split()


def test_it_runs_and_records_both_ways_and_every_part(tmp_path):
    """Three views in passes of at most two: two passes of two an image, the last filled up where it is compiled."""
    record = tmp_path / "record.md"
    run_benchmark(
        "tokenizing",
        "--rounds",
        "1",
        "--num_images",
        "2",
        "--single_views",
        "2",
        "--record",
        record,
        *TOY,
    )
    text = record.read_text()
    for case in tokenizing.CASES:
        assert f"## {case.name}" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "views/s" not in line]
    assert len(rows) == 2 * 7 and all(float(row.split(" | ")[1]) > 0 for row in rows)
    assert text.count("2 views a pass") == 2 and text.count(tokenizing.OURS) == 2 and "64 codes" in text


def test_ratios_are_taken_round_by_round():
    found = tokenizing.Found("", 4, rates={tokenizing.OURS: [8.0, 30.0, 10.0], tokenizing.ONE_BY_ONE: [4.0, 10.0, 1.0]})
    assert (
        found.ratio(tokenizing.OURS, tokenizing.ONE_BY_ONE) == "3.00 (2.00 to 10.00)"
        and found.median(tokenizing.OURS) == 10.0
    )


@pytest.mark.parametrize(
    "words, told",
    [
        (["--gpu"], "--gpu: torch finds no GPU"),
        (["views.count=0"], "views.count 0: must be at least 1"),
        (["--images", "/nowhere"], "no such folder"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(words, told):
    done = run_benchmark("tokenizing", *words, check=False, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
