"""One thread for numpy's small matrix products, whoever calls: a command or a Python program.

OpenBLAS, which comes with numpy, gives each of them a thread a core, which takes several times longer than it saves and crowds out a job's other
threads. Two calls of its C interface do here what `threadpoolctl` would do for every library there is, so that nothing more is depended upon.
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
    """While open in any thread, numpy's matrix products take one thread each; afterwards as many as before. Also a decorator."""
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
    """What tells and sets the number of threads of the OpenBLAS in numpy's own package; None with another library."""
    package = Path(np.__file__).parent
    for path in [*package.parent.glob("numpy.libs/*openblas*"), *package.glob(".dylibs/*openblas*")]:
        library = ctypes.CDLL(str(path))  # loaded already: the same one
        for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
            get = getattr(library, f"{prefix}openblas_get_num_threads{suffix}", None)
            put = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
            if get and put:
                return get, put
    return None
