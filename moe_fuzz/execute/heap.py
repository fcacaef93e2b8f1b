"""What the allocator of the C library does with freed memory. Worker side.

Judging makes and drops arrays of some megabytes by the hundred. Memory that goes back to the system each time comes
back page by page, zeroed: a sixth of the time of a case of experts.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_… of malloc.h
#: Bytes; glibc takes no more. The largest array of a batch has 8 MiB (checks/experts/slots.py).
_FROM_THE_HEAP = 32 << 20
_KEPT = 256 << 20  # bytes at the end of the heap


def keep_freed_memory() -> bool:
    """Arrays come from the heap, and what is freed stays there for the next. False where the library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, _FROM_THE_HEAP) and mallopt(_TRIM_THRESHOLD, _KEPT))
