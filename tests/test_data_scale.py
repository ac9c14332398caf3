"""The data side at sizes that no disk here holds: what grows with samples and shards, by how much, and that numbers
beyond 32 bits stay whole.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings
from test_token_parts import SHARDS as TOKEN_SHARDS
from test_token_parts import parts_of, records

from peco_ds.config import RunSettings
from peco_ds.data import indexed_tar, token_parts
from peco_ds.data.indexed_tar import IndexedTar, ShardSet, write_index
from peco_ds.data.labelled import PADDING, rank_samples
from peco_ds.data.order import SHARDS, WINDOW, SampleOrder, generator, rank_positions
from peco_ds.errors import UserError
from peco_ds.schema import ImageManifest, Shard, read_manifest, sha256_of_file, write_manifest

EPOCHS, BATCH = 800, 256


def shards_of(count: int, size: int) -> ImageManifest:
    return ImageManifest(
        [Shard(f"train-{number:06d}.tar", size, 4096, f"{number:064x}", f"{number:064x}") for number in range(count)],
        count * size,
    )


def work(call) -> int:
    """Python instructions that a call takes: a measure that no busy machine changes."""
    count, before = 0, sys.gettrace()

    def trace(frame, event, _):
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def peak_mb(call) -> float:
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return peak


# ---------------------------------------------------------------------------------- order and position


def plain_order(sizes: list[int], seed: int, window_shards: int, epoch: int) -> list[int]:
    """The definition, sample numbers themselves being permuted."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shards, samples = generator(SHARDS, seed, epoch).permutation(len(sizes)), []
    for window, first in enumerate(range(0, len(sizes), window_shards)):
        mixed = np.concatenate(
            [np.arange(starts[shard], starts[shard + 1]) for shard in shards[first : first + window_shards]]
        )
        samples += generator(WINDOW, seed, epoch, window).permutation(mixed).tolist()
    return samples


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    st.integers(0, 9),
    st.integers(1, 14),
    st.integers(0, EPOCHS),
)
@example([70_000, 3, 1], 1, 2, 799)  # more than 16 bits in a window
@settings(max_examples=60)
def test_the_order_is_that_of_its_definition(sizes, seed, window_shards, epoch):
    order, n = SampleOrder(np.array(sizes), seed, window_shards), sum(sizes)
    assert [order.sample_at(epoch * n + place) for place in range(n)] == plain_order(sizes, seed, window_shards, epoch)


def test_a_window_late_in_a_run_of_eighty_milliard_positions_is_each_of_its_samples_once():
    order, n = SampleOrder(np.full(10_000, 10_000), seed=0, window_shards=2), 10**8
    for first in (0, EPOCHS // 2 * n + 20_000 * 1234, EPOCHS * n - 20_000):
        samples = [order.sample_at(position) for position in range(first, first + 20_000)]
        assert len(set(samples)) == 20_000 and len({sample // 10_000 for sample in samples}) == 2
        assert min(samples) >= 0 and max(samples) < n
    assert order.epoch_of(EPOCHS * n - 1) == EPOCHS - 1


def test_the_positions_of_the_last_step_are_whole_numbers_beyond_32_bits():
    run = RunSettings(global_batch=2048, micro_batch=4)
    steps = EPOCHS * 10**8 // 2048
    ranks = [list(rank_positions(run, rank, 512, first_step=steps - 1, last_step=steps)) for rank in range(512)]
    assert np.concatenate([positions for passes in ranks for positions in passes]).tolist() == list(
        range((steps - 1) * 2048, steps * 2048)
    )


def first_batch(sizes: np.ndarray, position: int, window_shards: int = 16) -> None:
    order = SampleOrder(sizes, 0, window_shards)
    for place in range(position, position + BATCH):
        order.sample_at(place)


@pytest.mark.parametrize("place", (0.0, 0.5, 0.999_999_99, 799.5))
def test_a_resume_among_ten_thousand_times_the_samples_costs_little_more(place):
    few, many = np.full(10, 1000), np.full(100_000, 1000)
    of_many, of_few = (work(lambda: first_batch(sizes, int(place * sizes.sum()))) for sizes in (many, few))
    assert of_many < 2 * of_few, "for ten thousand times the shards"
    assert peak_mb(lambda: first_batch(many, int(place * many.sum()))) < 16


def test_a_large_window_takes_four_bytes_a_sample():
    sizes = np.full(1000, 10_000)
    assert peak_mb(lambda: first_batch(sizes, 5_000_000, window_shards=300)) < 3_000_000 * 4 / 2**20 * 1.1


def test_a_sample_is_found_in_a_hundred_thousand_shards_as_fast_as_in_a_hundred():
    few, many = (ShardSet("nowhere", shards_of(count, 1000)) for count in (100, 100_000))
    assert [many.locate(sample) for sample in (0, 999, 1000, 99_999_999)] == [(0, 0), (0, 999), (1, 0), (99_999, 999)]
    ask = lambda shards: [shards.locate(sample * 7919 % shards.num_samples) for sample in range(1000)]  # noqa: E731
    assert work(lambda: ask(many)) < 4 * work(lambda: ask(few))


def test_a_ranks_share_of_an_evaluation_takes_no_memory_for_the_whole_set():
    assert peak_mb(lambda: rank_samples(10**8, 700, 1024, 64)) < 4
    found = np.concatenate([rank_samples(1003, rank, 8, 32).ravel() for rank in range(8)])
    assert found[found != PADDING].tolist() == list(range(1003))


# ------------------------------------------------------------------------------------------- manifests


def test_a_manifest_takes_time_in_proportion_to_its_shards(tmp_path):
    taken = {}
    for count in (200, 2_000):
        (tmp_path / str(count)).mkdir()
        write_manifest(tmp_path / str(count), shards_of(count, 1000))
        taken[count] = work(lambda: read_manifest(tmp_path / str(count), ImageManifest).fingerprint())
    assert taken[2_000] < 10 * taken[200] * 1.1


def test_a_fingerprint_is_made_once():
    manifest = shards_of(2_000, 1000)
    first = work(manifest.fingerprint)
    assert work(manifest.fingerprint) < first / 20


# ---------------------------------------------------------------------------------------------- shards


def write_set(folder, count: int) -> ShardSet:
    """Shards that are there by name and size alone."""
    folder.mkdir()
    for number in range(count):
        (folder / f"train-{number:06d}.tar").write_bytes(bytes(4096))
        (folder / f"train-{number:06d}.index.json").touch()
    return ShardSet(folder, shards_of(count, 10))


def test_shards_are_asked_after_many_at_once_and_the_first_fault_is_named(tmp_path, monkeypatch):
    shards, real, lock, at_once = (
        write_set(tmp_path / "set", 40),
        indexed_tar._existing_status,
        threading.Lock(),
        [0, 0],
    )

    def slow(path, what):
        with lock:
            at_once[0] += 1
            at_once[1] = max(at_once)
        time.sleep(0.005)
        with lock:
            at_once[0] -= 1
        return real(path, what)

    monkeypatch.setattr(indexed_tar, "_existing_status", slow)
    shards.check("size")
    assert at_once[1] > 4
    (shards.folder / "train-000031.tar").unlink()
    (shards.folder / "train-000007.tar").write_bytes(b"short")
    with pytest.raises(UserError, match="train-000007.tar: shard is cut short"):
        shards.check("size")


def packed(folder, samples: int):
    """A tar of so many small samples, its index, and the index's hash."""
    import io
    import tarfile

    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(samples):
            for extension in ("jpg", "cls"):
                content = f"{number} {extension}".encode()
                member = tarfile.TarInfo(f"folder é/{number:05d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    write_index(folder / "a.tar", folder / "a.index.json")
    return folder / "a.tar", folder / "a.index.json", sha256_of_file(folder / "a.index.json")


def everything(tar: IndexedTar) -> list:
    return [(tar.key(number), tar.extensions(number), tar.read(number)) for number in range(len(tar))]


def test_an_index_that_the_manifest_vouches_for_reads_as_one_looked_at_from_end_to_end(tmp_path):
    tar, index, sha256 = packed(tmp_path, 50)
    vouched = everything(IndexedTar(tar, index, sha256))
    assert vouched == everything(IndexedTar(tar, index)) and len(vouched) == 50
    assert vouched[7] == ("folder é/00007", ["jpg", "cls"], {"jpg": b"7 jpg", "cls": b"7 cls"})
    # another layout, as another program may write it
    index.write_text(json.dumps(json.loads(index.read_text()), indent=2))
    assert everything(IndexedTar(tar, index, sha256_of_file(index))) == vouched


@given(st.data())
@settings(max_examples=150)
def test_an_index_damaged_before_it_was_vouched_for_is_refused_or_says_the_same(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "vouched"
    if not folder.exists():
        folder.mkdir()
        packed(folder, 4)
    tar, good = folder / "a.tar", (folder / "a.index.json").read_bytes()
    place, pieces = (
        data.draw(st.integers(0, len(good) - 1)),
        [
            b"",
            b"\n",
            b'"',
            b"{",
            b"}",
            b",",
            b"7",
            b"-1",
            b"[]",
            b'"key": "x",',
            b'\n  },\n  {\n   "key":',
            b"NaN",
            b"\xff",
        ],
    )
    bad = good[:place] + data.draw(st.sampled_from(pieces)) + good[place + data.draw(st.integers(0, 3)) :]
    index = folder / "b.index.json"
    index.write_bytes(bad)

    def outcome(sha256: str):
        try:
            return everything(IndexedTar(tar, index, sha256))
        except UserError as error:
            assert "\n" not in str(error)
            return None

    # a layout that is ours in part is refused, valid as its JSON may be
    assert outcome(sha256_of_file(index)) in (None, outcome(""))


def test_opening_a_shard_parses_no_sample_that_is_not_read(tmp_path):
    """Among thousands of workers each reads a few samples of a shard it opens."""
    tar, index, sha256 = packed(tmp_path, 3000)
    vouched = lambda: IndexedTar(tar, index, sha256).read(1234)  # noqa: E731
    whole = lambda: IndexedTar(tar, index).read(1234)  # noqa: E731
    assert work(vouched) < work(whole) / 4


def test_a_token_set_in_the_making_is_looked_through_at_its_start_and_its_end_however_many_its_shards(
    tmp_path, monkeypatch
):
    looked, real = [], token_parts.find_temporary_files
    monkeypatch.setattr(
        token_parts, "find_temporary_files", lambda folder, *names: looked.append(folder) or real(folder, *names)
    )
    tmp_path.joinpath(".shard-000001.tar.99999-abc.tmp").touch()  # of a writer that is dead
    parts = parts_of(tmp_path)
    for number in range(TOKEN_SHARDS):
        parts.write(number, records(number))
    parts.finish()
    assert len(looked) == 4 and not list(tmp_path.rglob("*.tmp")), "the set and the folder of its parts, twice each"
