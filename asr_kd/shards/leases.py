"""Who works on which shard: leases that any number of processes take from one folder, without a coordinator.

A lease is a file (or an object of a store) that its holder keeps fresh. Whoever finds one whose holder is dead, or has not been heard of for a while,
takes it over. Leases only keep work from being done twice: what is published is the same whoever made it, and published
whole, so a lease lost or held twice costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from asr_kd.errors import UserError
from asr_kd.files import Place, check_there, clear_errors, create, names_in, place
from asr_kd.objects import ObjectPath

#: seconds without a sign of life after which a lease counts as abandoned, where its holder cannot be looked up
PATIENCE = 60.0
#: leases in a row that others hold, after which they have gone over the rest as well
REFUSALS = 16
A = TypeVar("A")


class Leases:
    """The leases of one process in a folder; leaving the context gives them back.

    Clocks of several machines are never compared: a lease is abandoned when *this* process has seen it unchanged for
    `patience` seconds of its own clock, or when its holder was a process of this machine that is gone.

    Args:
        folder: shared by all that work together; made when missing, in a folder that is there.
    """

    def __init__(self, folder: Place | str, patience: float = PATIENCE) -> None:
        self.folder, self.patience = place(folder), patience
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        self._me["holder"] = uuid.uuid4().hex  # two in a process are two
        self._held: set[Place] = set()
        self._seen: dict[Place, tuple[object, float]] = {}
        self._beats, self._changing = 0, threading.Lock()
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Leases:
        self._make_folder()
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._heart.join()
        # not empty: others are still at work; a store that is gone: what is left there will count as abandoned
        with contextlib.suppress(OSError, UserError):
            for path in list(self._held):
                self.give_back(path.name)
            self.folder.rmdir()

    def take(self, name: str) -> bool:
        """Take the lease of this name, also from one who is gone; False while another holds it."""
        path = self.folder / name
        if not self._create(path) and not (self._abandoned(path) and self._remove(path) and self._create(path)):
            return False
        self._held.add(path)
        return True

    def free(self, items: Iterable[A], name: Callable[[A], str], done: Callable[[A], bool]) -> Iterator[A]:
        """The items that are not done and whose lease could be taken, each as it is asked for; ends early among those of others.

        Args:
            name: of an item's lease; done: whether what it stands for is published.
        """
        refusals = 0
        for item in items:
            if done(item) or not self.take(name(item)):
                refusals += 1
                if refusals == REFUSALS:
                    return
            elif done(item):  # finished, and its lease given back, between the two looks
                self.give_back(name(item))
            else:
                refusals = 0
                yield item

    def give_back(self, name: str) -> None:
        """Let others take it."""
        path = self.folder / name
        with self._changing:  # a sign of life that is under way would bring the object back
            self._held.discard(path)
        path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all leases, also those of the dead, when there is nothing left to do."""
        self._held.clear()
        with contextlib.suppress(FileNotFoundError):  # another process has just done the same, and removed the folder
            for name in list(names_in(self.folder)):
                (self.folder / name).unlink(missing_ok=True)

    def _create(self, path: Place) -> bool:
        try:
            return create(path, json.dumps(self._me))
        except FileNotFoundError:  # another process has just finished everything and removed the folder
            self._make_folder()
            return False

    def _make_folder(self) -> None:
        check_there(self.folder.parent)
        with clear_errors(self.folder / "any"):
            self.folder.mkdir(exist_ok=True)

    def _abandoned(self, path: Place) -> bool:
        try:
            text = path.read_text()
            state = (_time(path), text)
            holder = json.loads(text)
            if holder["host"] == self._me["host"] and _started(holder["pid"]) != holder["started"]:
                return True
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError):
            state = (_time(path), "damaged")
        known, since = self._seen.get(path, (None, 0.0))
        if known != state:
            self._seen[path] = (state, time.monotonic())
            return False
        return time.monotonic() - since > self.patience

    def _remove(self, path: Place) -> bool:
        """Remove an abandoned lease; of several that try, one succeeds, or in a store nearly always one."""
        if isinstance(path, ObjectPath):
            path.unlink(missing_ok=True)
            return True
        aside = path.with_name(f".{uuid.uuid4().hex}")
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return False
        aside.unlink(missing_ok=True)
        return True

    def _beat(self) -> None:
        while not self._ended.wait(self.patience / 4):
            self._beats += 1
            for path in list(self._held):
                with self._changing, contextlib.suppress(OSError, UserError):
                    if path in self._held:
                        self._refresh(path)

    def _refresh(self, path: Place) -> None:
        if isinstance(path, ObjectPath):
            path.write(json.dumps({**self._me, "beats": self._beats}).encode())
        else:
            os.utime(path)


def _time(path: Place) -> int:
    """When a lease was last changed; of an object, whose content tells, always 0."""
    return 0 if isinstance(path, ObjectPath) else path.stat().st_mtime_ns


def _started(pid: int) -> str | None:
    """When a process of this machine began, in ticks since boot, or None when there is none that lives (Linux)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # a zombie is dead, only not yet buried
    except (OSError, IndexError):
        return None
