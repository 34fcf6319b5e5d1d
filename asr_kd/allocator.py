"""The C library's memory allocator, set for tensors that come and go with every batch."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process keep freed memory for its next tensors.

    By default glibc returns large blocks to the kernel when they are freed, and the kernel clears every page again for the next
    batch. With this the process stays at its peak size. Without `mallopt` in the C library nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _MOST)
        mallopt(_MMAP_THRESHOLD, _MOST)
