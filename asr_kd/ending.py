"""How a command ends: the exit statuses of all verbs, and requests to stop by Ctrl-C or SIGTERM."""

from __future__ import annotations

import enum
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from asr_kd.errors import UserError

#: signals within this many seconds count as one request: `timeout` sends SIGTERM to a process and to its group
SAME = 1.0


class Status(enum.IntEnum):
    """Exit statuses, the same for every verb."""

    DONE = 0
    #: `verify` found a difference, or the condition of `--fail-if` is true
    DOES_NOT_HOLD = 1
    #: what the user can fix: input, settings, space, access
    MISTAKE = 2
    #: of the program itself, with a traceback
    DEFECT = 3
    #: SIGINT; like the next one: the same command goes on where it stopped
    INTERRUPTED = 128 + signal.SIGINT
    #: SIGTERM, as schedulers send it
    TERMINATED = 128 + signal.SIGTERM
    #: the reader of the output has closed it
    NOBODY_READS = 141


class Stopped(UserError):
    """A job has stopped because it was asked to, and everything needed to resume is on disk; `status` is the command's exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = Status(status)


#: signals received since `interruptible` was entered
_asked: list[int] = []


@contextmanager
def _handled(ask: Callable[[int, Any], None], *numbers: signal.Signals) -> Iterator[None]:
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[Callable[[], Status]]:
    """Within this context Ctrl-C and SIGTERM raise KeyboardInterrupt; yields a function that gives the exit status.

    An exception that is raised while C code calls Python is lost, so a later signal raises again, and `stop_if_asked` checks
    between two pieces of work.
    """
    last = 0.0

    def ask(number: int, _: object) -> None:
        nonlocal last
        _asked.append(number)
        if (now := time.monotonic()) - last > SAME:
            last = now
            raise KeyboardInterrupt  # not a subclass, which Ray would not pass on

    _asked.clear()
    # a background job of a shell ignores Ctrl-C
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    try:
        with _handled(ask, signal.SIGTERM, *([] if ignored else [signal.SIGINT])):
            yield lambda: Status(128 + (_asked[0] if _asked else signal.SIGINT))
    finally:
        _asked.clear()


def stop_if_asked() -> None:
    """Raise KeyboardInterrupt if this process was asked to stop; to be called between two pieces of work."""
    if _asked:
        raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Within this context Ctrl-C and SIGTERM do not end the process; yields a function that gives the status to stop with, or 0."""
    asked: list[int] = []
    with _handled(lambda number, _: asked.append(number), signal.SIGTERM, signal.SIGINT):
        yield lambda: 128 + asked[0] if asked else 0
