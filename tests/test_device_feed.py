"""A batch is counted, checked and finished in its turn, however early it was begun."""

import multiprocessing
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from peco_ds.data import device_feed
from peco_ds.data.device_feed import SideStream, device_batches, prepared_batches
from peco_ds.data.image_set import BadImages
from peco_ds.data.workers import RawBatch
from peco_ds.errors import UserError

CPU = torch.device("cpu")


class Journal(list):
    """What happened, in order: ("read" | "begun" | "counted" | "finished" | "used" | "closed", batch number)."""

    def raws(self, count: int, fault_at: int | None = None):
        try:
            for number in range(count):
                if number == fault_at:
                    raise UserError(f"batch {number} cannot be read; repair it")
                self.append(("read", number))
                yield RawBatch(slice_number=number, keys=[str(number)])
        finally:
            self.append(("closed", count))

    def prepare(self, raw: RawBatch) -> tuple:
        self.append(("begun", raw.slice_number))
        return (torch.tensor(raw.slice_number),)

    def in_turn(self, raw: RawBatch) -> None:
        self.append(("counted", raw.slice_number))

    def finish(self, ready: tuple, raw: RawBatch) -> int:
        self.append(("finished", raw.slice_number))
        assert int(ready[0]) == raw.slice_number
        return raw.slice_number

    def batches(self, lane, count=4, fault_at=None):
        return prepared_batches(self.raws(count, fault_at), self.prepare, self.finish, lane=lane, in_turn=self.in_turn)

    def of(self, what: str) -> list[int]:
        return [number for event, number in self if event == what]


class StandIn:
    """A side stream's place on a machine without one: begins at once, hands over what it was given."""

    def begin(self, prepare, raw):
        return prepare(raw), "event"

    def hand_over(self, begun):
        return begun[0]


@pytest.mark.parametrize("lane", [None, StandIn()], ids=["cpu", "ahead"])
def test_batches_come_in_order_and_each_is_counted_and_finished_once_in_its_turn(lane):
    journal = Journal()
    for number in journal.batches(lane):
        journal.append(("used", number))
    assert journal.of("used") == journal.of("begun") == journal.of("read") == [0, 1, 2, 3]
    turns = [(event, number) for event, number in journal if event in ("counted", "finished", "used")]
    assert turns == [(event, number) for number in range(4) for event in ("counted", "finished", "used")]


def test_the_next_batch_is_begun_before_the_step_and_only_the_next_one():
    journal = Journal()
    for number in journal.batches(StandIn()):
        assert max(journal.of("begun")) == min(number + 1, 3)
        journal.append(("used", number))


def test_on_a_cpu_nothing_is_read_before_its_turn():
    journal = Journal()
    for number in journal.batches(None):
        assert max(journal.of("read")) == number


@pytest.mark.parametrize("lane", [None, StandIn()], ids=["cpu", "ahead"])
def test_a_fault_is_raised_in_the_turn_of_its_batch(lane):
    journal = Journal()
    batches = journal.batches(lane, fault_at=2)
    assert [next(batches), next(batches)] == [0, 1]
    assert journal.of("counted") == [0, 1]
    with pytest.raises(UserError, match="batch 2 cannot be read"):
        next(batches)
    assert journal.of("counted") == [0, 1]


def test_a_fault_of_the_preparation_is_raised_in_its_turn_too():
    journal = Journal()

    def prepare(raw):
        assert raw.slice_number < 1, "ours"
        return journal.prepare(raw)

    batches = prepared_batches(journal.raws(3), prepare, journal.finish, lane=StandIn())
    assert next(batches) == 0
    with pytest.raises(AssertionError, match="ours"):
        next(batches)


def test_unreadable_images_of_a_batch_that_was_only_begun_are_in_no_checkpoint():
    counts = {}
    for name, lane in (("in turn", None), ("ahead", StandIn())):
        bad, seen = BadImages(max_share=1.0), []
        raws = (RawBatch(keys=["a", "b"], bad=[f"image {number}"]) for number in range(5))
        for _ in prepared_batches(raws, lambda raw: raw.keys, lambda keys, raw: keys, lane=lane, in_turn=bad.add_batch):
            seen.append(bad.state())
        counts[name] = seen
    assert counts["ahead"] == counts["in turn"] == [{"count": number, "read": 2 * number} for number in range(1, 6)]


def test_too_many_unreadable_images_end_the_run_at_the_batch_that_has_them():
    bad = BadImages(max_share=0.0)
    raws = (RawBatch(keys=["a"] * 20, bad=[f"image {number}"] * (11 * (number == 2))) for number in range(4))
    batches = prepared_batches(
        raws, lambda raw: raw.keys, lambda keys, raw: keys, lane=StandIn(), in_turn=bad.add_batch
    )
    next(batches), next(batches)
    with pytest.raises(UserError, match="11 of 60 readings"):
        next(batches)


@pytest.mark.parametrize("lane", [None, StandIn()], ids=["cpu", "ahead"])
def test_closing_the_batches_closes_their_source(lane):
    journal = Journal()
    batches = journal.batches(lane)
    next(batches)
    assert not journal.of("closed")
    batches.close()
    assert journal.of("closed") == [4]


def make_numbers(places: np.ndarray) -> RawBatch:
    return RawBatch(samples=torch.from_numpy(places))


def test_stopping_in_the_middle_leaves_no_process():
    batches = device_batches(
        make_numbers,
        [np.array([n]) for n in range(100)],
        lambda raw: raw.samples,
        lambda samples, _: int(samples[0]),
        num_workers=2,
        device=CPU,
    )
    assert [next(batches), next(batches)] == [0, 1]
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


class RecordedCuda:
    """Stands for torch.cuda: notes what is asked of streams and events, and in which stream."""

    def __init__(self, notes: list) -> None:
        self.notes, self.current = notes, "step"
        outer = self

        class Stream:
            def __init__(self, _device) -> None:
                self.name = "side"

            def record_event(self):
                outer.notes.append(f"event recorded on {self.name}")
                return "event"

        class Consumer:
            def wait_event(self, event) -> None:
                outer.notes.append(f"step waits for {event}")

        self.Stream, self._consumer = Stream, Consumer()

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def current_stream(self, _device):
        return self._consumer


class OnDevice(torch.Tensor):
    """A tensor that says it lies on a GPU, and notes for which stream it is kept."""

    notes: list = []
    device = torch.device("cuda", 0)

    def record_stream(self, stream) -> None:
        self.notes.append("kept for the step")


def test_the_side_stream_prepares_the_step_waits_for_it_and_every_tensor_is_kept_for_the_step(monkeypatch):
    notes: list[str] = []
    cuda = RecordedCuda(notes)
    monkeypatch.setattr(device_feed.torch, "cuda", cuda)
    monkeypatch.setattr(OnDevice, "notes", notes)
    lane = SideStream(torch.device("cuda", 0))

    def prepare(raw):
        notes.append(f"prepared on {cuda.current}")
        images, codes = (torch.zeros(2).as_subclass(OnDevice) for _ in range(2))
        return images, (codes, torch.zeros(2))  # the last one stays on the host

    ready = lane.hand_over(lane.begin(prepare, RawBatch()))
    assert len(ready) == 2 and cuda.current == "step"
    assert notes == [
        "prepared on side",
        "event recorded on side",
        "step waits for event",
        "kept for the step",
        "kept for the step",
    ]
