"""Records are fetched and written beside the device's work: in order, whole or not at all, and no fault is lost."""

import threading

import numpy as np
import pytest
import torch

from peco_ds.data.loaders import Codes, ViewsBatch
from peco_ds.data.token_shards import TokenRecord
from peco_ds.errors import UserError
from peco_ds.runtime.token_records import ShardWriter, record_batches
from peco_ds.schema import NO_CODE, VIEW_COLUMNS


def batch(first: int, images: int, views: int = 3) -> ViewsBatch:
    rows = np.full((images, views, len(VIEW_COLUMNS)), first, np.float32)
    return ViewsBatch(
        [f"k{first + place}" for place in range(images)],
        rows,
        torch.arange(images * views).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) + 100.0 * first,
    )


def codes_like(images_11: torch.Tensor) -> Codes:
    value = images_11[:, 0, 0, :1].long()
    return Codes(value + torch.arange(4), (value + torch.arange(4)).unsqueeze(-1), torch.full((len(value), 4, 1), 0.5))


def test_a_record_holds_its_own_images_codes_view_by_view():
    records = [record for made in record_batches([batch(0, 2), batch(2, 1)], codes_like) for record in made]
    assert [record.key for record in records] == ["k0", "k1", "k2"]
    assert (
        records[1].codes.tolist() == [[view + patch for patch in range(4)] for view in (3, 4, 5)]
        and records[1].codes.dtype == np.uint16
    )
    assert records[2].codes[:, 0].tolist() == [200, 201, 202] and (records[2].views == 2).all()
    assert (
        records[2].topk_codes.shape == records[2].topk_probs.shape == (3, 4, 1)
        and records[2].topk_probs.dtype == np.float16
    )


def test_the_largest_code_that_can_be_stored_is():
    record = next(record_batches([batch(0, 1, views=1)], lambda images: Codes(torch.full((1, 4), 65535))))[0]
    assert record.codes.tolist() == [[65535] * 4] and record.topk_codes is None


def test_the_next_batch_is_under_way_before_one_is_waited_for():
    events = []
    for made in record_batches(
        [batch(number, 1) for number in range(3)], lambda images: events.append("queued") or codes_like(images)
    ):
        events.append(made[0].key)
    assert events == ["queued", "queued", "k0", "queued", "k1", "k2"]


def test_what_the_next_batch_breaks_on_does_not_cost_the_one_before_it():
    def codes(images):
        if images.flatten()[0] >= 200:
            raise UserError("the third cannot be read")
        return codes_like(images)

    handed_out = []
    with pytest.raises(UserError, match="the third"):
        for made in record_batches([batch(number, 1) for number in range(4)], codes):
            handed_out.append(made[0].key)
    assert handed_out == ["k0", "k1"]


def test_soft_codes_that_are_not_finite_are_not_recorded():
    def codes(images):
        found = codes_like(images)
        found.topk_probs[-1, 2, 0] = float("nan")
        return found

    with pytest.raises(UserError, match="not finite, first among k0, k1"):
        next(record_batches([batch(0, 2)], codes))


def test_an_image_without_codes_is_not_recorded_and_named():
    def codes(images):
        found = codes_like(images)
        found.codes[4:, 1] = NO_CODE
        return found

    with pytest.raises(UserError, match="not finite on 1 of a batch of 2 images, first k1, so they have no codes"):
        next(record_batches([batch(0, 2)], codes))


class Disk:
    """Takes the place of TokenParts: what was written whole, by shard; `open` holds it up."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.written, self.dropped, self.fault, self.open = {}, [], fault, threading.Event()
        self.open.set()

    def write(self, number: int, records) -> None:
        keys = []
        try:
            for record in records:
                assert self.open.wait(20)
                if self.fault:
                    raise self.fault
                keys.append(record.key)
        except BaseException:
            self.dropped.append(number)
            raise
        self.written[number] = keys


def records(*keys: str) -> list[TokenRecord]:
    return [TokenRecord(key, np.zeros((1, 4), np.uint16), np.ones((1, len(VIEW_COLUMNS)), np.float32)) for key in keys]


def test_shards_are_written_in_order_and_all_are_there_at_the_end():
    disk = Disk()
    with ShardWriter(disk) as writer:
        writer.put(4, records("a", "b"))
        writer.put(4, records("c"))
        writer.end(4)
        writer.end(5)  # a shard without images
        writer.put(7, records("d"))
        writer.end(7)
    assert (
        disk.written == {4: ["a", "b", "c"], 5: [], 7: ["d"]} and list(disk.written) == [4, 5, 7] and not disk.dropped
    )


def test_a_slow_disk_holds_nobody_up_until_some_batches_wait_for_it():
    disk = Disk()
    disk.open.clear()
    with ShardWriter(disk) as writer:
        for number in range(ShardWriter.AHEAD):
            writer.put(0, records(f"k{number}"))  # returns, though nothing can be written
        assert not disk.written
        disk.open.set()
        writer.end(0)
    assert disk.written == {0: [f"k{number}" for number in range(ShardWriter.AHEAD)]}


def test_a_stop_in_the_middle_drops_the_shard_in_hand_and_keeps_those_that_were_ended():
    disk = Disk()
    with pytest.raises(KeyboardInterrupt), ShardWriter(disk) as writer:
        writer.put(0, records("a"))
        writer.end(0)
        writer.put(1, records("b"))
        raise KeyboardInterrupt
    assert disk.written == {0: ["a"]} and disk.dropped == [1]


@pytest.mark.parametrize(
    "fault", [UserError("7 records for 9 images"), OSError(28, "No space left on device", "x.tar")]
)
def test_what_the_writing_breaks_on_ends_the_loop_that_feeds_it(fault):
    disk = Disk(fault)
    with pytest.raises(type(fault)) as raised, ShardWriter(disk) as writer:
        for number in range(1000):
            writer.put(0, records(f"k{number}"))
    assert raised.value is fault and number < 999 and not disk.written


def test_a_fault_in_the_last_shard_is_raised_at_the_end():
    with pytest.raises(UserError, match="damaged"), ShardWriter(Disk(UserError("damaged"))) as writer:
        writer.put(0, records("a"))
        writer.end(0)


def test_a_loop_that_had_nothing_to_write_starts_no_thread():
    before = threading.active_count()
    with ShardWriter(Disk()):
        assert threading.active_count() == before
