"""Who works on which shard, or alone on a folder: leases that any number of processes take from one folder, without a coordinator.

A lease is a file (or an object of a store) that its holder keeps fresh. Whoever finds one whose holder is dead, or has not been heard of for a while,
takes it over. Leases of shards only keep work from being done twice: what is published is the same whoever made it, and published
whole, so such a lease lost or held twice costs time and nothing else. A `sole_writer` looks whether its lease is still its own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from asr_kd.errors import UserError
from asr_kd.files import Place, check_there, clear_errors, create, names_in, place
from asr_kd.objects import ObjectPath

#: seconds without a sign of life after which a lease counts as abandoned, where its holder cannot be looked up
PATIENCE = 60.0
#: stop after this many consecutive leases held by others: they have gone over the rest as well
REFUSALS = 16
#: seconds between looks at items that other processes are working on
WAIT = 0.5
#: folders of leases in an output folder: of the one process that may write there, of those that share the work, and of the one of them that ends it
WRITER, SHARED, ENDING = ".writer", ".leases", ".ending"
A = TypeVar("A")
Items = TypeVar("Items", bound=Sequence[Any])


class Leases:
    """The leases of one process in a folder; leaving the context gives them back.

    All that work together share the folder; it is made when missing, in a folder that is there.

    Clocks of several machines are never compared: a lease is abandoned when *this* process has seen it unchanged for
    `patience` seconds of its own clock, or when its holder was a process of this machine that is gone.
    """

    def __init__(self, folder: Place | str, patience: float = PATIENCE) -> None:
        self.folder, self.patience = place(folder), patience
        pid = os.getpid()
        self._me = {"host": socket.gethostname(), "pid": pid, "started": _started(pid), "space": _space()}
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

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._heart.join()
        # not empty: others are still at work; a store that is gone: what is left there will count as abandoned
        with contextlib.suppress(OSError, UserError):
            for name in list(
                names_in(self.folder)
            ):  # as the folder has it: an interrupt may have come while one was taken
                if self.holds(name):
                    (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()

    def take(self, name: str) -> bool:
        """Take the lease of this name, also from one who is gone; False while another holds it."""
        path = self.folder / name
        if not self._create(path) and not (self._state(path) == "dead" and self._remove(path) and self._create(path)):
            return False
        self._held.add(path)
        return True

    def free(self, items: Iterable[A], name: Callable[[A], str], done: Callable[[A], bool]) -> Iterator[A]:
        """The items that are not `done` and whose lease could be taken, as they are asked for; ends early among those of others."""
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

    def share(
        self,
        left: Items,
        name: Callable[[Any], str],
        done: Callable[[Any], bool],
        missing: Callable[[Items], Items],
        work: Callable[[Iterator[Any]], Iterable[Any]],
    ) -> None:
        """Do what is left to do, together with all other processes that do the same; returns when nothing is.

        Args:
            name: of an item's lease.
            done: whether what an item stands for is published.
            missing: which of the items are not done, by whomever.
            work: does items one by one, as it takes them; yields each when it is published.
        """
        first = 0
        while left:
            own = 0
            for item in work(self.free(itertools.chain(left[first:], left[:first]), name, done)):
                self.give_back(name(item))
                own += 1
            left = missing(left)
            if left and not own:  # others hold all the leases
                time.sleep(WAIT)
            first = random.randrange(len(left)) if left else 0  # start where others are unlikely to be
        self.clear()

    def give_back(self, name: str) -> None:
        """Let others take it."""
        path = self.folder / name
        with self._changing:  # a sign of life that is under way would bring the object back
            self._held.discard(path)
        path.unlink(missing_ok=True)

    def holds(self, name: str) -> bool:
        """Whether the lease of this name is still this process's."""
        return self._holder(self.folder / name).get("holder") == self._me["holder"]

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

    def wait_for_death(self, name: str, busy: str) -> None:
        """Return once nobody living holds the lease of this name: at once, or when a holder on another machine has been silent for `patience`.

        It raises UserError as soon as it is known that the holder lives: `busy`, and who it is.
        """
        path, asked = self.folder / name, False
        while (state := self._state(path)) not in ("free", "dead"):
            holder = self._holder(path)
            who = f"process {holder.get('pid', '?')} on {holder.get('host', 'another machine')}"
            if state == "alive":
                raise UserError(f"{busy} {who}; wait for its end, or stop it")
            if not asked:
                print(f"{busy} {who}; looking for {self.patience:.0f} s whether it lives", file=sys.stderr)
            asked = True
            time.sleep(min(0.5, self.patience / 10))

    def check(self, name: str) -> None:
        """Raise UserError when the lease of this name is not this process's any more, or its folder is gone."""
        if self.holds(name):
            return
        holder = self._holder(self.folder / name)
        check_there(self.folder.parent)
        who = f"process {holder['pid']} on {holder['host']} has" if {"pid", "host"} <= holder.keys() else "somebody has"
        raise UserError(f"{self.folder.parent}: {who} taken this folder over or cleared it; this process stops")

    def _holder(self, path: Place) -> dict[str, Any]:
        """Who holds a lease, as its file says; empty when there is none, or it is damaged."""
        try:
            holder = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}

    def _state(self, path: Place) -> Literal["free", "dead", "alive", "silent"]:
        """Of a lease; `silent`: its holder is on another machine and has given no sign of life yet."""
        try:
            data = path.read_bytes()
            # when it was last changed; of an object, the content tells
            state = (data, 0 if isinstance(path, ObjectPath) else path.stat().st_mtime_ns)
        except FileNotFoundError:
            return "free"
        with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged
            holder = json.loads(data)
            if holder["host"] == self._me["host"] and holder["space"] == self._me["space"] and self._me["started"]:
                return "alive" if _started(holder["pid"]) == holder["started"] else "dead"
        known, since = self._seen.get(path, (None, 0.0))
        if known != state:
            self._seen[path] = (state, time.monotonic())
            return "alive" if known else "silent"
        return "dead" if time.monotonic() - since > self.patience else "silent"

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
        if path in self._seen:
            self._seen[aside] = self._seen.pop(path)
        try:
            if self._state(aside) == "dead":
                return True
            with contextlib.suppress(OSError):  # another was faster, and what was moved is its new lease
                os.link(aside, path)
            return False
        finally:
            self._seen.pop(aside, None)
            aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(self.patience / 4):
            self._beats += 1
            for path in list(self._held):
                with self._changing, contextlib.suppress(OSError, UserError):
                    if path not in self._held:
                        continue
                    if isinstance(path, ObjectPath):
                        path.write(json.dumps({**self._me, "beats": self._beats}).encode())
                    else:
                        os.utime(path)


@contextlib.contextmanager
def sole_writer(folder: Place | str, patience: float = PATIENCE) -> Iterator[Callable[[], None]]:
    """Be the only process that writes into a folder, which is there: on this machine and on all that share it.

    Yields:
        what looks whether it still is, and raises UserError when the folder is gone or was taken over by others.

    Raises:
        UserError: when another process writes there; it is named. One that is dead is followed at once, on another
            machine when it has been silent for `patience` seconds.
    """
    folder = place(folder)
    with Leases(folder / WRITER, patience) as leases:
        while True:
            leases.wait_for_death("writer", f"{folder}: is being written by")
            if leases.take("writer"):
                break
        try:
            yield lambda: leases.check("writer")
        finally:
            with contextlib.suppress(OSError, UserError):
                if leases.holds("writer"):
                    leases.clear()


def clear_leases(folder: Place) -> None:
    """Remove what killed processes left of the work that is shared in a folder, when all of it is done."""
    for name in (SHARED, ENDING):
        if (folder / name).exists():
            with Leases(folder / name) as leases:
                leases.clear()


def check_unowned(folder: Place) -> None:
    """Refuse to share the work in a folder that one process has to itself, with a UserError that names it."""
    if (folder / WRITER).exists():
        Leases(folder / WRITER).wait_for_death("writer", f"{folder}: is being written by")


def check_unused(folder: Place) -> None:
    """Refuse to touch a folder that processes share the work in, with a UserError that names one of them."""
    for leases in (Leases(folder / SHARED), Leases(folder / ENDING)):
        for name in sorted(name for name in names_in(leases.folder) if not name.startswith(".")):
            leases.wait_for_death(name, f"{folder}: is being written by")


def _started(pid: int) -> str | None:
    """When a process of this machine began, in ticks since boot, or None when there is none that lives (Linux)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # a zombie is dead, only not yet buried
    except (OSError, IndexError):
        return None


def _space() -> str:
    """What the process numbers of this process belong to: a boot, and in it a container; empty where that is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
