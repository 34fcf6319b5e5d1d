"""webdataset in a process that must start without torch."""

from __future__ import annotations

import functools
import sys
import threading
from types import ModuleType


class _NoTorch:
    """Looked at before any other finder of modules: for one thread there is no torch."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, name: str, *_: object) -> None:
        if name == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(name)


@functools.cache
def webdataset() -> ModuleType:
    """webdataset as it is where torch is not installed, unless one of them is here already.

    It imports torch wherever it finds it (1.6 s and 450 MB for each process that decodes shards, against 0.02 s and 3 MB), for
    classes that neither its writer nor its grouping needs. Whoever imports it elsewhere gets a whole one.
    """
    if {"torch", "webdataset"} & sys.modules.keys():
        import webdataset

        return webdataset
    finder = _NoTorch()
    sys.meta_path.insert(0, finder)
    try:
        import webdataset
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "webdataset"]:
            del sys.modules[name]
    return webdataset
