"""Page-locked host memory of exactly the size that is asked for.

torch's own allocator of pinned memory rounds every tensor up to a power of two, which for the flat tensors of ZeRO's
partitions is up to twice what a save copies.
"""

from __future__ import annotations

import logging
import mmap
import weakref

import torch

logger = logging.getLogger("peco_ds")

# Below it a power of two costs little, and a page of one's own much.
SMALLEST_BYTES = 2**20


def host_buffer(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor in host memory, page-locked where there is a GPU; in pageable memory where the system
    locks no more pages, so that copies to it are slower and wait.
    """
    if not torch.cuda.is_available():
        return torch.empty(shape, dtype=dtype)
    num_bytes = shape.numel() * dtype.itemsize
    if num_bytes < SMALLEST_BYTES:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    # Whole pages of its own: two locked ranges must not share one.
    memory = mmap.mmap(-1, num_bytes)
    buffer = torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
    error = _register(buffer.data_ptr(), num_bytes)
    if error:
        logger.warning("%d MiB of host memory for saves cannot be page-locked (CUDA error %d)", num_bytes >> 20, error)
    else:
        # Before its pages go back to the system; the pages live as long as the storage does.
        weakref.finalize(buffer.untyped_storage(), _unregister, buffer.data_ptr()).atexit = False
    return buffer


def _register(address: int, num_bytes: int) -> int:
    """CUDA's error, 0: none."""
    return int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
