from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest


@pytest.fixture
def dying_at_publish(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """Within it the job is interrupted in place of publishing its file of this number, from 0 on; that it is, is asserted."""

    @contextmanager
    def within(stop: int) -> Iterator[None]:
        published = iter(range(100))

        def dying(old: Any, new: Any, real: Any) -> None:
            if next(published) == stop:
                raise KeyboardInterrupt
            real(old, new)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            for name in ("replace", "link"):
                patched.setattr(os, name, functools.partial(dying, real=getattr(os, name)))
            yield

    return within
