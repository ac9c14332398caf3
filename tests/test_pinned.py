"""Host memory of saves: of the size that is asked for, locked once and released with the tensor."""

import gc
import logging

import pytest
import torch

from peco_ds.runtime.checkpoint import pinned
from peco_ds.runtime.checkpoint.pinned import SMALLEST_BYTES, host_buffer


class Cuda:
    """CUDA's page-locking, as far as it is asked here: address -> bytes."""

    def __init__(self, error: int = 0) -> None:
        self.locked, self.error = {}, error

    def cudaHostRegister(self, address: int, num_bytes: int, _flags: int) -> int:
        if not self.error:
            self.locked[address] = num_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> None:
        del self.locked[address]


@pytest.fixture
def cuda(monkeypatch):
    found = Cuda()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_as_many_bytes_are_locked_as_the_tensor_has_and_released_with_its_last_view(cuda, dtype):
    elements = SMALLEST_BYTES + 1234
    buffer = host_buffer(torch.Size((2, elements)), dtype)
    assert buffer.shape == (2, elements) and buffer.dtype == dtype and buffer.is_contiguous()
    assert cuda.locked == {buffer.data_ptr(): buffer.nbytes}
    assert buffer.data_ptr() % 4096 == 0, "no page is shared"
    values = torch.arange(2 * elements).view(2, -1).to(dtype)
    assert buffer.copy_(values, non_blocking=True) is buffer and torch.equal(buffer, values)
    row = buffer[1]
    del buffer
    gc.collect()
    assert cuda.locked and torch.equal(row, values[1])
    del row
    gc.collect()
    assert not cuda.locked


def test_memory_that_is_not_locked_is_used_all_the_same_and_said(cuda, caplog):
    cuda.error = 2
    logger = logging.getLogger("peco_ds")
    logger.addHandler(caplog.handler)
    buffer = host_buffer(torch.Size((SMALLEST_BYTES,)), torch.float32)
    logger.removeHandler(caplog.handler)
    buffer.fill_(1)
    assert "4 MiB of host memory for saves cannot be page-locked (CUDA error 2)" in caplog.text
    del buffer
    gc.collect()


def test_small_tensors_are_left_to_torchs_own_allocator(cuda, monkeypatch):
    asked = []
    plain = torch.empty

    def empty(shape, *, dtype, pin_memory=False):
        asked.append(pin_memory)
        return plain(shape, dtype=dtype)

    monkeypatch.setattr(pinned.torch, "empty", empty)
    assert host_buffer(torch.Size(()), torch.float32).shape == ()
    assert asked == [True] and not cuda.locked


def test_without_a_gpu_nothing_is_locked():
    assert not host_buffer(torch.Size((SMALLEST_BYTES,)), torch.float32).is_pinned()
