"""What is left of something that failed: one line, and no memory.

Nothing here needs more than Python's own library.
"""

from __future__ import annotations

import gc
import sys

OUT_OF_MEMORY = "out of memory"
LONGEST_REASON = 300


def reason(error: BaseException) -> str:
    """One line that says why something failed."""
    kind = type(error).__name__
    # torch's; its class is not at hand where torch is missing
    if kind == "OutOfMemoryError":
        return OUT_OF_MEMORY
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{kind}: {first}"[:LONGEST_REASON]


def free_memory() -> None:
    """Of what nothing holds any more."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()
