"""The measure of growth with ranks: what it reports of a start that was made, and what it refuses."""

from __future__ import annotations

from benchmark_runs import run_benchmark

from benchmarks import many_ranks

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def row_of(text: str, ranks: int) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, values = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (lines[0], next(line for line in lines if line.startswith(f"| {ranks} ")))
    )
    return {name: float(value) for name, value in zip(head, values, strict=True)}


def test_time_that_grows_as_the_ranks_do_shows_as_one_a_rank():
    start = dict.fromkeys(many_ranks.PHASES, 1.0)
    found = {
        2: [start | {"first step": 9.0, "step": 0.5, "save": 0.2, "cpu": 6.0, "files": 10, "mb": 1.0}],
        8: [start | {"first step": 36.0, "step": 2.0, "save": 1.6, "cpu": 6.0, "files": 28, "mb": 1.5}],
    }
    row = row_of(many_ranks.table(found), 8)
    assert (row["to the first step s"], row["of the fewest"], row["save a rank, of the fewest"], row["files"]) == (
        36.0,
        1.0,
        2.0,
        28,
    )


def test_a_start_of_two_ranks_is_measured_to_its_last_save(tmp_path):
    run_benchmark("many_ranks", "--ranks", 2, "--record", tmp_path / "r.md", "--plot", tmp_path / "r.png", **ONE_THREAD)
    row = row_of((tmp_path / "r.md").read_text(), 2)
    assert (
        min(row[name] for name in ("imports s", "engine s", "to the first step s", "step s", "processor s a rank")) > 0
    )
    assert row["files"] == 2 * 3 + 4, (
        "weights, optimiser and counters of each rank; progress, settings, provenance and the script that reads them"
    )
    assert (tmp_path / "r.png").stat().st_size > 5000


def test_ranks_that_cannot_share_the_batch_are_refused():
    done = run_benchmark("many_ranks", "--ranks", 3, 4, check=False)
    assert done.returncode == 2 and "--ranks 3" in done.stderr and len(done.stderr.strip().splitlines()) == 1
