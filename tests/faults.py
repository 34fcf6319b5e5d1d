"""Jobs that are killed or write to a disk that fails: at every system call, the next run ends in the same bytes."""

from __future__ import annotations

import builtins
import ctypes
import errno
import functools
import io
import itertools
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from asr_kd.cli import main

FORK = multiprocessing.get_context("fork")  # torch is imported once, and a trial costs milliseconds
CALLS = ("mkdir", "rmdir", "open", "fchmod", "fsync", "link", "rename", "replace", "unlink", "utime")
#: files whose content is of the run and not of the work
OF_THE_RUN = {"timing.json", "summary.json"}

#: folders that are gone when a job is done
OF_THE_WORK = (".leases/", ".writer/", ".ending/", ".plan/")

Step = Callable[[str], None]
Disturb = Callable[[], object]


def through(step: Step) -> None:
    """From here on, this process calls `step` with the name of every system call that changes a folder, before it.

    Files are written in small pieces, so that there is much between two pieces. Nothing is put back: this is for a process
    that does one job and ends.
    """

    def stepping(name: str, real: Callable[..., object], *arguments: object, **options: object) -> object:
        step(name)
        return real(*arguments, **options)

    class Raw(io.FileIO):
        def write(self, data: object) -> int:
            step("write")
            return super().write(data)  # type: ignore[arg-type]

    real_open = io.open

    def opened(file: object, mode: str = "r", *rest: object, **options: object) -> object:
        if not set(mode) & set("wxa"):
            return real_open(file, mode, *rest, **options)  # type: ignore[call-overload]
        if not isinstance(file, int):
            step("open")
        raw = Raw(file, mode.replace("b", "").replace("t", ""), opener=options.get("opener"))  # type: ignore[arg-type]
        buffered = io.BufferedRandom(raw, 4096) if "+" in mode else io.BufferedWriter(raw, 4096)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, "utf-8")

    for name in CALLS:
        setattr(os, name, functools.partial(stepping, name, getattr(os, name)))
    io.open = builtins.open = opened  # type: ignore[assignment]


@dataclass
class Job:
    """A command without its output, and what it writes when nobody disturbs it.

    Attributes:
        folder: of what it says.
        finished: the files in an output folder that no later run may make again.
        still: called in its process first, to take out what differs from run to run.
    """

    words: list[str]
    folder: Path
    finished: Callable[[Path], Iterable[Path]]
    still: Disturb = lambda: None
    expected: dict[str, bytes] = field(default_factory=dict)

    def start(self, output: Path, disturb: Disturb | None = None) -> BaseProcess:
        """The command in a process of its own, which calls `disturb` before; for what it says see `said`."""

        def work() -> None:
            sys.stdout = sys.stderr = open(self.folder / "said", "w", buffering=1)  # noqa: SIM115
            os.fsync = lambda _: None  # the machine goes on running: what was written is there
            self.still()
            if disturb:
                disturb()
            sys.exit(main([*self.words, f"output={output}"]))

        process = FORK.Process(target=work)
        process.start()
        return process

    def run(self, output: Path, disturb: Disturb | None = None) -> int:
        """Exit status; negative where a signal ended it."""
        process = self.start(output, disturb)
        process.join(300)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode

    @property
    def said(self) -> str:
        """All that the command wrote for a person when it ran last."""
        return (self.folder / "said").read_text()

    def run_undisturbed(self) -> None:
        """Learn what it writes."""
        output = self.folder / f"{self.words[0]}-undisturbed"
        assert self.run(output) == 0, self.said
        self.expected = tree(output)

    def check_whole(self, output: Path) -> dict[str, tuple[int, int]]:
        """Whatever has its final name has its final content; what is finished, as inode and time of writing."""
        for name, data in tree(output).items():
            if not name.rpartition("/")[2].startswith(".") and not name.startswith(OF_THE_WORK):
                assert self.expected[name] == data, f"{name} is torn"
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in self.finished(output)}

    def check_finishes(self, output: Path) -> None:
        """The same command makes what is missing, leaves what is there, and clears up."""
        before = self.check_whole(output)
        assert self.run(output) == 0, self.said
        assert before.items() <= self.check_whole(output).items(), "what was finished was made again"
        assert tree(output) == self.expected, sorted(tree(output).keys() ^ self.expected.keys())

    def check_complaint(self, output: Path, status: int, pattern: str) -> None:
        """One sentence with status 2, and nothing torn."""
        said = [line for line in self.said.splitlines() if line.startswith("asr-kd ")]
        assert status == 2 and len(said) == 1 and "Traceback" not in self.said, self.said
        assert re.search(f"^asr-kd {self.words[0]}: {pattern}", said[0]), said[0]
        self.check_whole(output)


def tree(folder: Path) -> dict[str, bytes]:
    """Content by name, below a folder that may be called anything."""
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(os.fsencode(folder), b"OUTPUT")
        for path in folder.rglob("*")
        if path.is_file() and not any(name in path.name for name in OF_THE_RUN)  # also a file that is half written
    }


def killed_at(number: int) -> Disturb:
    """Dies before the system call of this number; fsync, which changes nothing here, is none."""
    calls = itertools.count(1)

    def step(name: str) -> None:
        if name != "fsync" and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: through(step)


def killed_with(file: Path) -> Disturb:
    """Dies before the system call that follows when the file is there."""

    def step(_: str) -> None:
        if file.exists():
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: through(step)


def failing_from(number: int, code: int) -> Disturb:
    """From the call of this number on, nothing that takes space succeeds."""
    calls = itertools.count(1)

    def step(name: str) -> None:
        if name in ("mkdir", "open", "write", "fsync", "link") and next(calls) >= number:
            raise OSError(code, os.strerror(code))

    return lambda: through(step)


def vanishing_at(number: int, output: Path) -> Disturb:
    """The output folder is gone, to `output.elsewhere`, before the call of this number."""
    calls = itertools.count(1)

    def step(_: str) -> None:
        if next(calls) == number and output.exists():
            output.rename(f"{output}.elsewhere")

    return lambda: through(step)


def like_anybody() -> None:
    """From here on root obeys permissions: without capabilities."""
    version, this_process = 0x20080522, 0
    ctypes.CDLL(None).capset(struct.pack("Ii", version, this_process), bytes(24))


def check_killed_at_every_call(job: Job, folder: Path) -> int:
    """Kill it before each system call in turn; returns how many there are."""
    for number in itertools.count(1):
        output = folder / str(number)
        status = job.run(output, killed_at(number))
        if status == 0:
            return number
        assert status == -signal.SIGKILL, job.said
        job.check_finishes(output)
    raise AssertionError


def check_no_space_from_any_call(job: Job, folder: Path, step: int = 1) -> int:
    """Let the disk be full from each system call on in turn, or every `step`th; returns how many there are."""
    for number in itertools.count(1, step):
        output = folder / str(number)
        status = job.run(output, failing_from(number, errno.ENOSPC))
        if status == 0:
            return number
        job.check_complaint(output, status, f"{output}/.*: no space left on the device; free some and run the command")
        job.check_finishes(output)
    raise AssertionError


def check_failing_disk(job: Job, folder: Path, code: int, words: str, calls: Iterable[int]) -> None:
    """Let every write fail from some calls on."""
    for number in calls:
        output = folder / str(number)
        job.check_complaint(output, job.run(output, failing_from(number, code)), f"{output}.*: {words}")
        job.check_finishes(output)


def check_vanishing(job: Job, folder: Path, calls: Iterable[int]) -> None:
    """Move the output folder away before some calls."""
    for number in calls:
        output = folder / str(number)
        if status := job.run(output, vanishing_at(number, output)):
            job.check_complaint(output, status, rf"{output}.*(is gone|No such file|no such)")
            job.check_finishes(output)
        else:
            whole = (
                output if output.exists() else Path(f"{output}.elsewhere")
            )  # it vanished when all was done but the lease
            found = {name: content for name, content in tree(whole).items() if not name.startswith(OF_THE_WORK)}
            assert found == job.expected, "it says that all is well, and is not"


def check_closed_folder(job: Job, folder: Path, begun: bool) -> None:
    """A folder that may not be written, before the job or after it has begun."""
    output = folder / "closed" / "output"
    output.parent.mkdir()
    if begun:
        job.run(output, killed_at(30))
    closed = output if begun else output.parent
    closed.chmod(0o555)
    status = job.run(output, like_anybody)
    closed.chmod(0o755)
    job.check_complaint(output, status, ".*cannot be written .Permission denied.; choose a folder you may write to")
    job.check_finishes(output)


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """A disk of its own at `folder`; yields what mounts it again with other options."""

    def mount(*arguments: str) -> None:
        if subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode:
            pytest.skip("file systems cannot be mounted here")

    mount("-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder))
    try:
        yield lambda options: mount("-o", f"remount,{options}", str(folder))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def check_small_disk(job: Job, folder: Path, kilobytes: Iterable[int]) -> None:
    """A disk too small, of several sizes, then one that may only be read, then a large one."""
    output = folder / "output"
    with small_disk(folder) as remount:
        for size in kilobytes:
            remount(f"size={size}k")
            job.check_complaint(output, job.run(output), f"{output}.*: no space left on the device; free some and")
        remount("ro,size=1m")
        job.check_complaint(output, job.run(output), f"{output}.*: cannot be written .Read-only file system.")
        remount("rw")
        job.check_finishes(output)
