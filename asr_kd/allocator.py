"""The C library's memory allocator, set for tensors that come and go with every batch."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for its next tensors.

    As it stands glibc gives large blocks back when they are freed, and the kernel clears every page of them anew at the next
    batch (training/README.md has figures). What the process holds stays at its height instead. Where the C library has no
    `mallopt` nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _MOST)
        mallopt(_MMAP_THRESHOLD, _MOST)
