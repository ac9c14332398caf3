"""The meter: means over steps that count, counters of the run, windows that a restart divides, rows that are there
once.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from peco_ds.config import RunSettings
from peco_ds.durations import Durations
from peco_ds.errors import EXIT_DONE, EXIT_REQUEUE, UserError
from peco_ds.runtime.metrics import Meter, read_evaluation, read_metrics
from peco_ds.runtime.run import close_after, peak_flops
from peco_ds.runtime.timeline import STARTS_FILE, goodput, read_rows

LOSSES = torch.rand(64, 2, generator=torch.Generator().manual_seed(0)) * 7  # [steps, ranks]
DURATIONS = Durations(total_steps=40, warmup_steps=0, checkpoint_steps=0, stop_step=40)


class Engine:
    def get_global_grad_norm(self):
        return 0.5


@dataclass
class Ranks:
    """Several ranks' collectives within one process: what each rank contributes is put in beforehand."""

    rank: int = 0
    size: int = 1
    # objects that the other ranks gather, for the next log
    others: list = field(default_factory=list)
    sums: torch.Tensor | None = None  # of the other ranks, for the next log
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor):
        return tensor if self.sums is None else tensor + self.sums

    def gather_objects(self, value):
        return [value, *self.others]


_meters: list[Meter] = []


@pytest.fixture(autouse=True)
def closed_meters():
    """Files of meters that a test leaves open, as a killed run does, are closed after it."""
    yield
    while _meters:
        made = _meters.pop()
        if made._file is not None:
            made._file.close()


def meter(folder, world=None, *, first_step=0, every=10, **options) -> Meter:
    run = RunSettings(global_batch=8, log_every_steps=every)
    _meters.append(
        Meter(folder, world or Ranks(), first_step=first_step, durations=DURATIONS, run=run, num_samples=80, **options)
    )
    return _meters[-1]


def train(meter: Meter, steps, *, skip=(), passes: int = 2) -> None:
    for done in steps:
        for micro in range(passes):
            meter.add(
                LOSSES[done, micro % 2] if done not in skip else torch.tensor(float("nan")),
                {"accuracy": LOSSES[done, 1 - micro % 2] / 7},
            )
        meter.close_step(done, Engine(), 1e-3, applied=done not in skip, skipped=sum(step <= done for step in skip))


def reloaded(state: dict) -> dict:
    """A state after a trip through a file, read without unpickling anything but plain values."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_first_step_of_a_start_tells_apart_waiting_for_its_images_and_computing(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("peco_ds.runtime.metrics.time.perf_counter", lambda: now[0])

    def batches():
        while True:
            now[0] += 2.0
            yield None

    found = meter(tmp_path)
    with found.paused("evaluation"):
        # before the first batch is asked for: no part of the step
        now[0] += 100.0
    given = batches()
    for done in (1, 2):
        for _ in range(2):
            found.next(given)
            now[0] += 30.0
        found.close_step(done, Engine(), 1e-3)
    (event,) = [row for row in read_rows(tmp_path / STARTS_FILE)[0] if row["event"] == "first_step"]
    assert (event["start"], event["batch_s"], event["step_s"]) == (1, 4.0, 60.0)


def test_a_row_has_the_means_since_the_row_before(tmp_path):
    train(meter(tmp_path), range(1, 21))
    first, second = read_metrics(tmp_path)
    assert [first["step"], second["step"], second["images"], second["epoch"]] == [10, 20, 160, 2.0]
    assert second["loss"] == pytest.approx(float(LOSSES[11:21].mean())) and second["accuracy"] == pytest.approx(
        float(LOSSES[11:21].mean() / 7)
    )
    assert second["grad_norm"] == 0.5 and second["time"] >= first["time"] > 1e9 and second["up_s"] >= first["up_s"]
    assert not {"save_s", "evaluation_s"} & second.keys()


def test_steps_that_were_skipped_are_counted_and_leave_the_means_alone(tmp_path):
    train(meter(tmp_path), range(1, 31), skip=(3, 9, *range(11, 21)))
    rows = read_metrics(tmp_path)
    kept = [step for step in range(1, 11) if step not in (3, 9)]
    assert rows[0]["loss"] == pytest.approx(float(LOSSES[kept].mean()))
    assert [row["skipped_steps"] for row in rows] == [2, 12, 12]
    assert rows[1]["loss"] is None and "accuracy" not in rows[1]
    assert rows[2]["loss"] == pytest.approx(float(LOSSES[21:31].mean()))


def test_a_window_without_any_step_shows_on_the_progress_line(tmp_path, capsys):
    train(meter(tmp_path), range(1, 11), skip=range(1, 11))
    assert "no step applied" in capsys.readouterr().out


def test_nothing_is_read_from_the_device_in_a_step_that_does_not_log(tmp_path, monkeypatch):
    running = meter(tmp_path)

    def refuse(*_):
        raise AssertionError("read from the device")

    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    train(running, range(1, 10), skip=(4,))
    monkeypatch.undo()
    train(running, [10])
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("stop", [1, 7, 10, 19, 33])
def test_a_run_resumed_within_a_window_logs_the_same_numbers_as_one_that_never_stopped(tmp_path, stop):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
    train(meter(whole), range(1, 41), skip=(8, 15))
    first = meter(halves)
    train(first, range(1, stop + 1), skip=(8, 15))
    state = reloaded(first.state())
    # steps beyond its last checkpoint, then killed
    train(first, range(stop + 1, min(stop + 15, 41)), skip=(8, 15))
    second = meter(halves, first_step=stop)
    second.load_state([state])
    train(second, range(stop + 1, 41), skip=(8, 15))
    names = ("step", "loss", "accuracy", "skipped_steps", "images", "epoch")
    assert [[row.get(name) for name in names] for row in read_metrics(halves)] == [
        [row.get(name) for name in names] for row in read_metrics(whole)
    ]
    assert read_metrics(halves)[-1]["start"] == 2


def test_parts_of_two_ranks_are_one_window_on_one_rank(tmp_path):
    parts = []
    for rank in range(2):
        running = meter(tmp_path / "unused", Ranks(rank=1))  # no rank 0: nothing is written
        for step in range(1, 6):
            running.add(LOSSES[step, rank], {})
            running.close_step(step, Engine(), 1e-3)
        parts.append(running.state())
    alone = meter(tmp_path, first_step=5)
    alone.load_state(parts)
    for step in range(6, 11):
        for rank in range(2):
            alone.add(LOSSES[step, rank], {})
        alone.close_step(step, Engine(), 1e-3)
    (row,) = read_metrics(tmp_path)
    assert row["loss"] == pytest.approx(float(LOSSES[1:11].mean()))


def test_a_rank_that_took_over_nothing_agrees_with_one_that_did(tmp_path):
    world = Ranks(
        size=2, others=[(["accuracy", "loss", "psnr"], {"bad_images": 4})], sums=torch.tensor([1.0, 2.0, 3.0, 4.0])
    )
    main = meter(tmp_path, world, first_step=9, counters={"bad_images": lambda: 3})
    main.load_state([])
    train(main, [10])
    (row,) = read_metrics(tmp_path)
    assert row["psnr"] == pytest.approx(3.0 / 6) and row["bad_images"] == 7


def test_counters_are_asked_for_at_every_row_and_summed_over_ranks(tmp_path):
    world, bad = Ranks(size=2, others=[([], {"bad_images": 10})]), [3]
    running = meter(tmp_path, world, counters={"bad_images": lambda: bad[0]})
    train(running, range(1, 12))
    bad[0] = 4
    train(running, range(12, 21))
    assert [row["bad_images"] for row in read_metrics(tmp_path)] == [13, 14]


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_every_step_is_there_once_after_kills_in_the_middle_of_a_line(tmp_path, cut):
    # each from a checkpoint whose rows were on disk
    for resumed in (0, 4, 2, 8):
        running = meter(tmp_path, every=1, first_step=resumed)
        train(running, range(resumed + 1, resumed + 8))
        with open(tmp_path / "metrics.jsonl", "rb+") as file:
            whole = file.read()
            file.truncate(len(whole) - cut)
    train(meter(tmp_path, every=1, first_step=14), range(15, 18))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 18))


def test_a_checkpoints_rows_are_on_disk_before_it_is_written(tmp_path, monkeypatch):
    running = meter(tmp_path)
    train(running, range(1, 11))
    synced = []
    monkeypatch.setattr("peco_ds.runtime.timeline.os.fsync", synced.append)
    running.state()
    assert synced == [running._file.fileno()]


def test_pauses_are_no_training_time_and_stand_in_the_row_by_kind(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(
        "peco_ds.runtime.metrics.time",
        SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0], time=lambda: 1e9 + now[0]),
    )
    running = meter(tmp_path)
    for step in range(1, 11):
        now[0] += 1.0
        train(running, [step])
        with running.paused("save"):
            now[0] += 2.0 if step in (4, 10) else 0.0
            state = running.state() if step == 4 else {}
        with running.paused("evaluation"):
            now[0] += 5.0 if step == 6 else 0.0
        if step == 4:
            assert state["elapsed_s"] == pytest.approx(4.0), "the save in hand counted as training"
    running.close(EXIT_REQUEUE)
    (row,) = read_metrics(tmp_path)
    assert (row["step_s"], row["images_per_s"]) == (pytest.approx(1.0), pytest.approx(8.0))
    assert (row["save_s"], row["evaluation_s"]) == (pytest.approx(2.0), pytest.approx(5.0))
    found = goodput(tmp_path)
    assert (found.save_s, found.evaluation_s) == (pytest.approx(4.0), pytest.approx(5.0)), (
        "the save after the last row is in the end's"
    )


def test_how_a_start_ended_is_recorded_with_the_reason(tmp_path, capsys):
    train(meter(tmp_path), range(1, 6))
    running = meter(tmp_path, first_step=4)
    train(running, range(5, 8))
    running.close(EXIT_REQUEUE)
    running.close(EXIT_REQUEUE)
    close_after(meter(tmp_path, first_step=7), UserError("shard 3:\nis gone"))
    lost = RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:4242")
    close_after(meter(tmp_path, first_step=7), lost)
    events = read_rows(tmp_path / STARTS_FILE)[0]
    ends = [
        (event["start"], event["code"], event["step"], event["reason"]) for event in events if event["event"] == "end"
    ]
    assert ends[:2] == [(2, 75, 7, ""), (3, 2, 7, "UserError: shard 3: is gone")]
    assert ends[2][:3] == (4, 76, 7) and "Connection closed by peer" in ends[2][3]
    assert capsys.readouterr().out.count("goodput ") == 3


def test_a_full_disk_ends_the_run_in_one_line_that_names_the_file(tmp_path):
    running = meter(tmp_path)
    train(running, range(1, 10))
    running._file.close()
    running._file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(UserError, match="/dev/full: cannot be written .No space left"):
        train(running, [10])


def test_a_disk_that_takes_neither_a_checkpoint_nor_the_end_of_the_run_leaves_the_first_error_standing(
    tmp_path, monkeypatch, caplog
):
    running = meter(tmp_path)
    monkeypatch.setattr("peco_ds.runtime.metrics.STARTS_FILE", "/dev/full")
    close_after(running, UserError("step_00000010 cannot be written"))
    assert "/dev/full" in caplog.text, "the second error is told, and not raised in the place of the first"


def test_a_tensorboard_that_cannot_be_written_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    running = meter(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(running._tensorboard, "add_scalar", full)
    train(running, range(1, 21))
    running.close(EXIT_DONE)
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20]
    assert caplog.text.count("TensorBoard cannot be written") == 1


def test_an_evaluation_of_the_moment_of_the_start_is_made_again_and_older_ones_stay(tmp_path):
    running = meter(tmp_path)
    for step in (0, 10, 20, 30):
        running.evaluation(step, {"top1": float(step)})
    meter(tmp_path, first_step=20).evaluation(20, {"top1": 99.0})
    assert read_evaluation(tmp_path) == [
        {"step": 0, "top1": 0.0},
        {"step": 10, "top1": 10.0},
        {"step": 20, "top1": 99.0},
    ]


def test_shares_of_the_wall_time_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    running = meter(tmp_path, counters={"bad_images": lambda: 1})
    train(running, range(1, 11), skip=range(1, 11))
    running.close(EXIT_DONE)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        f"goodput/{name}" for name in ("useful", "data_wait", "save", "evaluation", "startup", "lost", "restart")
    } <= tags
    assert {"optim/skipped_steps", "data/bad_images", "time/step_s"} <= tags and not {
        "loss/total",
        "loss/time",
        "loss/up_s",
    } & tags


# ------------------------------------------------------------------------------ model FLOP utilisation


def test_utilisation_is_flops_over_the_peak_of_all_gpus_and_stands_in_row_and_line(tmp_path, capsys):
    train(meter(tmp_path, every=2, training_flops=50.0, peak_flops=1e6), [1, 2])
    row = read_metrics(tmp_path)[-1]
    assert row["mfu"] == pytest.approx(row["images_per_s"] * 50.0 / 1e6)
    assert f"MFU {row['mfu']:.1%}" in capsys.readouterr().out


def test_no_utilisation_is_given_without_a_gpu_whose_peak_is_known(tmp_path, monkeypatch):
    train(meter(tmp_path, every=2, training_flops=50.0), [1, 2])
    assert "mfu" not in read_metrics(tmp_path)[-1]
    gpus = Ranks(size=4)
    gpus.device = torch.device("cuda")
    for name, known in (("NVIDIA H100 80GB HBM3", True), ("Tesla P4", False)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        assert peak_flops(gpus, "bf16") == (4 * 989.4e12 if known else 0.0)


# ---------------------------------------------------------------------------- statistics of an objective


@pytest.mark.parametrize(
    ("stats", "words"),
    (
        ({"loss": torch.tensor(1.0)}, "'loss': rows of metrics.jsonl have one"),
        ({"lr": torch.tensor(1.0)}, "'lr': rows of metrics.jsonl have one"),
        ({"accuracy": 0.5}, "'accuracy': is float; give a scalar tensor"),
        ({"accuracy": torch.ones(3)}, r"'accuracy': is shape \(3,\); give a scalar tensor"),
    ),
)
def test_a_statistic_that_would_hide_another_or_is_no_scalar_is_refused(tmp_path, stats, words):
    with pytest.raises(UserError, match=words):
        meter(tmp_path).add(torch.tensor(1.0), stats)
