"""Workers that items are given to, and what is done when one dies: processes of this machine, or actors of a cluster (`ray_crew.py`).

The process that gives out, the driver, holds the leases and counts; workers end with it. What a worker makes does not depend on which one it is.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from asr_kd.errors import UserError
from asr_kd.files import Place
from asr_kd.progress import Progress
from asr_kd.shards.stream import serve_parent

#: workers that may die over one item, or over their start, before the job fails
ATTEMPTS = 3
# spawn, not fork: a fork of a process with threads may hang
SPAWN = multiprocessing.get_context("spawn")
#: seconds between updates of the progress when nothing happens
TICK = 5.0
A = TypeVar("A")


#: in place of a result: the worker has died
LOST = object()


class Worker(Protocol):
    """What works, made where it is to work."""

    def load(self) -> Any:
        """Make it ready."""

    def do(self, item: Any) -> Any:
        """Do an item; one that is done already, by a worker that died before it could say so, is not done again."""


class Crew(ABC):
    """Where workers are, and how they are reached. A call is known by any object; calls of one worker may be several."""

    @abstractmethod
    def start(self) -> tuple[Any, Any]:
        """A new worker, and the call that makes it ready."""

    @abstractmethod
    def give(self, worker: Any, item: Any) -> Any:
        """The call of a worker to do an item."""

    @abstractmethod
    def over(self, calls: Sequence[Any], seconds: float) -> Iterator[tuple[Any, Any]]:
        """Those of the calls that are over, as soon as there are any, or none after that time, with what they gave, or `LOST`.

        What a worker raised is raised.
        """

    @abstractmethod
    def end(self, worker: Any) -> None:
        """End a worker, whatever it does, also one that is gone."""

    def close(self) -> None:  # noqa: B027  # most have nothing to do
        """Let go of what workers have in common, when all have ended."""


@dataclass(frozen=True)
class Work(Generic[A]):
    """What a pool says and does about its items.

    Attributes:
        verb: of the job.
        name: what the names of an item's files begin with.
        folders: where they are.
        deadly: the sentence about an item that has killed so many workers.
        unable: the sentence when so many in a row have died before they were ready.
        room: what a worker takes up, where it may have to wait for it.
    """

    verb: str
    name: Callable[[A], str]
    folders: tuple[Place, ...]
    deadly: Callable[[A, int], str]
    unable: Callable[[int], str]
    room: str = "room"


@dataclass(eq=False)
class _Member(Generic[A]):
    """The driver's side of a worker.

    Attributes:
        loading: the call that makes it ready.
        since: when it was ready; None before.
        items: its calls under way.
        suspect: whether its only item is one that other workers died over.
    """

    worker: Any
    loading: Any
    since: float | None = None
    items: dict[Any, A] = field(default_factory=dict)
    suspect: bool = False
    ended: bool = False


class Pool(Generic[A]):
    """`least` to `most` workers: it grows while items wait, and ends idle workers.

    Args:
        in_flight: items that a worker has at a time.

    Attributes:
        loaded: what the calls that made workers ready have given.
    """

    def __init__(
        self, crew: Crew, work: Work[A], progress: Progress, least: int, most: int | None, in_flight: int
    ) -> None:
        self.crew, self.work, self.progress, self.in_flight = crew, work, progress, in_flight
        self.least, self.most = least, most or math.inf
        self.loaded: set[Any] = set()
        self.members: list[_Member[A]] = []
        self._strikes: Counter[str] = Counter()
        self._failed_starts = 0
        self._worked = 0.0

    def close(self) -> None:
        """End all workers."""
        for member in self.members:
            self._end(member)
        self.crew.close()

    @property
    def worked(self) -> float:
        """Seconds that all workers together were there, once they have ended."""
        return self._worked

    def run(self, free: Iterator[A]) -> Iterator[tuple[A, Any]]:
        """Have the items done, taken one by one as work proceeds; yields each with its result.

        A worker's exception is raised here, and a UserError when an item, or their start, kills `ATTEMPTS` workers.
        """
        again: list[A] = []  # of workers that died; each goes to a worker alone, to find the one that kills
        following = list(_next(free))
        while following or again or any(member.items for member in self.members):
            for room in range(self.in_flight):  # the least busy first
                for member in self.members:
                    if member.since is None or member.suspect or len(member.items) != room:
                        continue
                    if again and not member.items:
                        self._give(member, again.pop(), suspect=True)
                    elif following:
                        self._give(member, following.pop())
                        following += _next(free)
            self.resize(bool(following or again))
            yield from self._finished(again)

    def _finished(self, again: list[A]) -> Iterator[tuple[A, Any]]:
        """Wait for results and yield the finished items; items to do again are added to `again`."""
        waiting = {call: member for member in self.members for call in member.items}
        waiting |= {member.loading: member for member in self.members if member.since is None and not member.ended}
        for call, result in self.crew.over(list(waiting), TICK):
            member = waiting[call]
            item = [member.items.pop(call)] if call in member.items else []
            if result is LOST:
                again += item
                self._lose(member, item)
            elif not item:
                member.since, self._failed_starts = time.perf_counter(), 0
                self.loaded.add(result)
            else:
                member.suspect = False
                self._strikes.pop(self.work.name(item[0]), None)
                yield item[0], result
        self.members = [member for member in self.members if member.items or not member.ended]
        ready = sum(member.since is not None for member in self.members)
        self.progress.advance(0, note=f"workers: {ready}" if ready else f"waiting for a worker with {self.work.room}")

    def _lose(self, member: _Member[A], item: list[A]) -> None:
        """Count the item, or the start, at which a worker died; `resize` replaces it."""
        if not member.ended:
            self._end(member)
            print(f"{self.work.verb}: a worker was lost; its shards are given out again", file=sys.stderr)
        if not item:
            self._failed_starts += 1
            if self._failed_starts == ATTEMPTS:
                raise UserError(self.work.unable(ATTEMPTS))
            return
        name = self.work.name(item[0])
        for folder in self.work.folders:  # an object store has no incomplete files
            for torn in folder.glob(f".{name}.*.tmp") if isinstance(folder, Path) else ():
                torn.unlink(missing_ok=True)
        self._strikes[name] += 1
        if self._strikes[name] == ATTEMPTS:
            raise UserError(self.work.deadly(item[0], ATTEMPTS))

    def _give(self, member: _Member[A], item: A, suspect: bool = False) -> None:
        member.suspect = suspect
        member.items[self.crew.give(member.worker, item)] = item

    def resize(self, queued: bool) -> None:
        """While items are queued ask for more workers, at most doubling those that are ready; else end idle ones."""
        ready = sum(member.since is not None for member in self.members)
        # workers without room do no harm: they wait, and end with the queue
        most = min(self.most, ready + max(self.least, ready)) if queued else 0
        while len(self.members) < max(self.least, most):
            self.members.append(_Member(*self.crew.start()))
        for member in [] if queued else sorted(self.members, key=lambda member: member.since is not None):
            if not member.items and len(self.members) > self.least:
                self._end(member)
                self.members.remove(member)

    def _end(self, member: _Member[A]) -> None:
        if member.since is not None:
            self._worked += time.perf_counter() - member.since
        member.since, member.ended = None, True
        self.crew.end(member.worker)


def _next(free: Iterator[A]) -> Iterator[A]:
    """The next item, if there is one."""
    for item in free:
        yield item
        return


class Processes(Crew):
    """Processes of this machine, which end when they are ended, or their parent is killed.

    Args:
        make: makes a worker there; it is sent there.
    """

    def __init__(self, make: Callable[[], Worker]) -> None:
        self._make = make
        self._calls: dict[Connection, deque[object]] = {}  # answers come in the order of the calls
        self._answers: dict[object, Any] = {}

    def start(self) -> tuple[Any, Any]:
        mine, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=_serve, args=(theirs, self._make))
        process.start()
        theirs.close()
        loading = object()
        self._calls[mine] = deque([loading])
        return (process, mine), loading

    def give(self, worker: Any, item: Any) -> Any:
        _, mine = worker
        call = object()
        self._calls[mine].append(call)
        with contextlib.suppress(OSError):  # it has died; who waits for the call learns it
            mine.send(item)
        return call

    def over(self, calls: Sequence[Any], seconds: float) -> Iterator[tuple[Any, Any]]:
        for mine in multiprocessing.connection.wait([mine for mine in self._calls if self._calls[mine]], seconds):
            assert isinstance(mine, Connection)
            try:
                result, error = mine.recv()
            except (EOFError, OSError):
                yield from [(call, LOST) for call in self._calls.pop(mine)]
                continue
            if error is not None:
                raise error
            yield self._calls[mine].popleft(), result

    def end(self, worker: Any) -> None:
        process, mine = worker
        process.kill()
        process.join()
        mine.close()
        self._calls.pop(mine, None)


def _serve(driver: Connection, make: Callable[[], Worker]) -> None:
    """What a process of `Processes` does: items, one by one, until it is ended."""
    serve_parent(niceness=0)
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            worker = make()
            answer = worker.load()
            while True:
                driver.send((answer, None))
                answer = worker.do(driver.recv())
        except (UserError, OSError) as error:
            driver.send((None, error))
        except Exception:  # a defect is told with its place, which an exception that is sent leaves behind
            driver.send((None, RuntimeError(traceback.format_exc())))
