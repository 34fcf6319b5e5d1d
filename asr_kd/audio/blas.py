"""One thread for numpy's small matrix products, in commands and in Python programs.

OpenBLAS, which comes with numpy, uses a thread a core for each of them, which costs more than it saves and slows down a job's
other threads. Two calls of its C interface do what `threadpoolctl` does for every library, without another dependency.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

_changing = threading.Lock()
_inside, _before = 0, 0


@contextmanager
def one_thread() -> Iterator[None]:
    """While any thread is in this context, numpy's matrix products use one thread; afterwards as before. Also a decorator."""
    global _inside, _before
    found = _openblas()
    if found is None:
        yield
        return
    get, put = found
    with _changing:
        if not _inside:
            _before = get()
            put(1)
        _inside += 1
    try:
        yield
    finally:
        with _changing:
            _inside -= 1
            if not _inside:
                put(_before)


@functools.cache
def _openblas() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """Getter and setter for the number of threads of the OpenBLAS in numpy's package; None with another library."""
    package = Path(np.__file__).parent
    for path in [*package.parent.glob("numpy.libs/*openblas*"), *package.glob(".dylibs/*openblas*")]:
        library = ctypes.CDLL(str(path))  # already loaded by numpy: the same instance
        for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
            get = getattr(library, f"{prefix}openblas_get_num_threads{suffix}", None)
            put = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
            if get and put:
                return get, put
    return None
