"""Jobs that are killed, race, or write to a disk that fails: at every system call, the next run ends in the same bytes."""

from __future__ import annotations

import builtins
import ctypes
import errno
import functools
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_kd.cli import main
from asr_kd.labeling import job as label_job
from asr_kd.shards.tarset import Sample, write_index, write_shard

NAMES = ("label", "prepare")
FORK = multiprocessing.get_context("fork")  # torch is imported once, and a trial costs milliseconds
CALLS = ("mkdir", "rmdir", "open", "fchmod", "fsync", "link", "rename", "replace", "unlink", "utime")
#: files whose content is of the run and not of the work
OF_THE_RUN = {"timing.json"}

Step = Callable[[str], None]


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
        raw = Raw(file, mode.replace("b", "").replace("t", ""))  # type: ignore[arg-type]
        buffered = io.BufferedRandom(raw, 4096) if "+" in mode else io.BufferedWriter(raw, 4096)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, "utf-8")

    for name in CALLS:
        setattr(os, name, functools.partial(stepping, name, getattr(os, name)))
    io.open = builtins.open = opened  # type: ignore[assignment]


@dataclass
class Job:
    """A command without its output, and what it writes when nobody disturbs it."""

    words: list[str]
    folder: Path
    expected: dict[str, bytes]

    def start(self, output: Path, disturb: Callable[[], object] | None = None) -> BaseProcess:
        """The command in a process of its own, which calls `disturb` before; for what it says see `said`."""

        def work() -> None:
            sys.stdout = sys.stderr = open(self.folder / "said", "w", buffering=1)  # noqa: SIM115
            os.fsync = lambda _: None  # the machine goes on running: what was written is there
            if disturb:
                disturb()
            sys.exit(main([*self.words, f"output={output}"]))

        process = FORK.Process(target=work)
        process.start()
        return process

    def run(self, output: Path, disturb: Callable[[], object] | None = None) -> int:
        """Exit status; negative where a signal ended it."""
        process = self.start(output, disturb)
        process.join(60)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode

    @property
    def said(self) -> str:
        """All that the command wrote for a person when it ran last."""
        return (self.folder / "said").read_text()

    def check_whole(self, output: Path) -> dict[str, tuple[int, int]]:
        """Whatever has its final name has its final content; which shards are there, as inode and time of writing."""
        for name, data in tree(output).items():
            if not name.rpartition("/")[2].startswith(".") and not name.startswith(".leases/"):
                assert self.expected[name] == data, f"{name} is torn"
        finished = [path for path in output.glob("*.tar") if self.is_finished(path)]
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished}

    def is_finished(self, shard: Path) -> bool:
        """`prepare` has done with a shard when its record is there too."""
        return self.words[0] == "label" or (shard.parent / ".records" / f"{shard.stem}.json").exists()

    def check_finishes(self, output: Path) -> None:
        """The same command makes what is missing, leaves what is there, and clears up."""
        before = self.check_whole(output)
        assert self.run(output) == 0, self.said
        assert before.items() <= self.check_whole(output).items(), "a finished shard was made again"
        assert tree(output) == self.expected, sorted(tree(output).keys() ^ self.expected.keys())


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in OF_THE_RUN
    }


@pytest.fixture(scope="module")
def jobs(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """`label` and `prepare` of three shards of two utterances each, one of them bad."""
    folder = tmp_path_factory.mktemp("jobs")
    samples = []
    for number in range(6):
        sound = io.BytesIO()
        soundfile.write(sound, np.random.default_rng(number).normal(0, 0.1, 1600 + 100 * number), 8000, format="FLAC")
        samples.append(Sample(f"u{number}", sound.getvalue(), "flac", {"seconds": 0.2}))
    samples[3].audio = samples[3].audio[:500]
    (folder / "audio").mkdir()
    infos = [
        write_shard(folder / "audio" / f"shard-{number:06d}.tar", samples[2 * number : 2 * number + 2])
        for number in range(3)
    ]
    write_index(folder / "audio", infos)
    lines = []
    for sample in samples:
        (folder / f"{sample.key}.flac").write_bytes(sample.audio)
        lines.append(json.dumps({"audio": f"{sample.key}.flac", "text": "one"}) + "\n")
    (folder / "list.jsonl").write_text("".join(lines))
    commands = {
        "label": ["label", f"teacher={teacher}", f"audio={folder / 'audio'}", "device=cpu", "max_bad_share=0.5"],
        "prepare": ["prepare", f"manifest={folder / 'list.jsonl'}", "samples_per_shard=2", "max_bad_share=0.5"],
    }
    jobs = {}
    for name, words in commands.items():
        job = Job(words, folder, {})
        output = folder / f"{name}-undisturbed"
        assert job.run(output) == 0, job.said
        job.expected = tree(output)
        assert len([path for path in job.expected if path.endswith(".tar")]) == 3
        assert b"truncated or damaged" in job.expected["quarantine.jsonl"]
        jobs[name] = job
    return jobs


def killed_at(number: int) -> Callable[[], None]:
    """Dies before the system call of this number."""
    calls = itertools.count(1)

    def step(_: str) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: through(step)


@pytest.mark.parametrize("name", NAMES)
def test_killed_between_any_two_system_calls(jobs: dict[str, Job], name: str, tmp_path: Path) -> None:
    job = jobs[name]
    for number in itertools.count(1):
        output = tmp_path / str(number)
        status = job.run(output, killed_at(number))
        if status == 0:
            break
        assert status == -signal.SIGKILL, job.said
        job.check_finishes(output)
    assert number > 45


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_random_moments(jobs: dict[str, Job], name: str, tmp_path: Path) -> None:
    job = jobs[name]
    rng = random.Random(0)
    began = time.monotonic()
    job.run(tmp_path / "timed")
    usual = time.monotonic() - began
    output, finished = tmp_path / "first", dict[str, tuple[int, int]]()
    for moment in range(40):
        process = job.start(output)
        process.join(rng.uniform(0, 1.1 * usual))
        process.kill()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL), job.said
        now = job.check_whole(output)
        assert finished.items() <= now.items(), "a finished shard was made again"
        finished = now
        if process.exitcode == 0:
            assert tree(output) == job.expected
            output, finished = tmp_path / str(moment), {}
    job.check_finishes(output)


def test_processes_at_one_output_do_not_get_into_each_others_way(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They begin and end at nearly the same moment: what one clears up another may be just about to use."""
    monkeypatch.setattr(label_job, "WAIT", 0.005)
    job, rng = jobs["label"], random.Random(0)
    for trial in range(12):
        output, processes = tmp_path / str(trial), []
        for _ in range(4):
            processes.append(job.start(output))
            time.sleep(rng.uniform(0, 0.02))
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 4, job.said
        assert tree(output) == job.expected


def failing_from(number: int, code: int) -> Callable[[], None]:
    """From the call of this number on, nothing that takes space succeeds."""
    calls = itertools.count(1)

    def step(name: str) -> None:
        if name in ("mkdir", "open", "write", "fsync", "link") and next(calls) >= number:
            raise OSError(code, os.strerror(code))

    return lambda: through(step)


def check_complaint(job: Job, output: Path, status: int, pattern: str) -> None:
    """One sentence with status 2, and nothing torn."""
    said = [line for line in job.said.splitlines() if line.startswith("asr-kd ")]
    assert status == 2 and len(said) == 1 and "Traceback" not in job.said, job.said
    assert re.search(f"^asr-kd {job.words[0]}: {pattern}", said[0]), said[0]
    job.check_whole(output)


@pytest.mark.parametrize("name", NAMES)
def test_no_space_left_at_any_system_call(jobs: dict[str, Job], name: str, tmp_path: Path) -> None:
    job = jobs[name]
    for number in itertools.count(1):
        output = tmp_path / str(number)
        status = job.run(output, failing_from(number, errno.ENOSPC))
        if status == 0:
            break
        check_complaint(job, output, status, f"{output}/.*: no space left on the device; free some and run the command")
        job.check_finishes(output)
    assert number > 25


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("code", "words"), [(errno.EROFS, "cannot be written"), (errno.EIO, "Input/output error")])
def test_a_disk_that_fails(jobs: dict[str, Job], name: str, tmp_path: Path, code: int, words: str) -> None:
    job = jobs[name]
    for number in range(1, 40, 7):
        output = tmp_path / str(number)
        check_complaint(job, output, job.run(output, failing_from(number, code)), f"{output}/.*: {words}")
        job.check_finishes(output)


@pytest.mark.parametrize("name", NAMES)
def test_an_output_folder_that_vanishes(jobs: dict[str, Job], name: str, tmp_path: Path) -> None:
    job = jobs[name]
    for number in range(1, 60, 2):
        output = tmp_path / str(number)
        calls = itertools.count(1)

        def step(_: str, number: int = number, output: Path = output, calls: Iterator[int] = calls) -> None:
            if next(calls) == number and output.exists():
                output.rename(f"{output}.elsewhere")

        status = job.run(output, functools.partial(through, step))
        if status:
            check_complaint(job, output, status, rf"{output}.*(is gone|No such file|no such)")
            job.check_finishes(output)
        else:
            assert tree(output) == job.expected, "it says that all is well, and is not"


@pytest.mark.parametrize(
    ("name", "place", "kind", "pattern"),
    [
        ("label", ".", "file", "{output}: is a file, not a folder"),
        ("label", ".leases", "file", "{output}/.leases: is a file, not a folder"),
        ("label", "job.json", "folder", "{output}/job.json: is a folder where a job claim was expected"),
        ("label", "shard-000001.tar", "folder", "{output}/shard-000001.tar: this shard cannot be read .Is a directory"),
        ("label", "quarantine.jsonl", "folder", "{output}/quarantine.jsonl: is a folder where a file belongs"),
        ("label", "report.json", "folder", "{output}/report.json: is a folder where a file belongs"),
        ("prepare", ".", "file", "{output}: is a file, not a folder"),
        ("prepare", ".records", "file", "{output}/.records: is a file, not a folder"),
        ("prepare", "shard-000001.tar", "folder", "{output}/shard-000001.tar: is a folder where a file belongs"),
        ("prepare", "index.json", "folder", "{output}/index.json: is a folder where a file belongs"),
    ],
)
def test_a_file_in_the_place_of_a_folder_and_the_reverse(
    jobs: dict[str, Job], name: str, place: str, kind: str, pattern: str, tmp_path: Path
) -> None:
    job, output = jobs[name], tmp_path / "output"
    if place not in (".", "job.json"):
        job.run(output, killed_at(6))  # the folder is claimed, and nothing else
        shutil.rmtree(output / ".leases", ignore_errors=True)
    obstacle = output / place
    obstacle.parent.mkdir(exist_ok=True)
    if kind == "folder":
        obstacle.mkdir()
    else:
        obstacle.touch()
    status = job.run(output)
    if kind == "folder":
        obstacle.rmdir()
    else:
        obstacle.unlink()
    check_complaint(job, output, status, pattern.format(output=output))
    job.check_finishes(output)


def like_anybody() -> None:
    """From here on root obeys permissions: without capabilities."""
    version, this_process = 0x20080522, 0
    ctypes.CDLL(None).capset(struct.pack("Ii", version, this_process), bytes(24))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_that_may_not_be_written(jobs: dict[str, Job], name: str, begun: bool, tmp_path: Path) -> None:
    job, output = jobs[name], tmp_path / "closed" / "output"
    output.parent.mkdir()
    if begun:
        job.run(output, killed_at(30))
    closed = output if begun else output.parent
    closed.chmod(0o555)
    status = job.run(output, like_anybody)
    closed.chmod(0o755)
    check_complaint(job, output, status, ".*cannot be written .Permission denied.; choose a folder you may write to")
    job.check_finishes(output)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [200, 5000])
def test_a_limit_on_the_size_of_files(jobs: dict[str, Job], name: str, size: int, tmp_path: Path) -> None:
    job, output = jobs[name], tmp_path / "output"
    status = job.run(output, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    check_complaint(job, output, status, ".*larger than a file may be here; see `ulimit -f`")
    job.check_finishes(output)


def mount(*arguments: str) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")


@pytest.mark.parametrize("name", NAMES)
def test_a_small_disk_and_one_that_may_only_be_read(jobs: dict[str, Job], name: str, tmp_path: Path) -> None:
    job = jobs[name]
    mount("-t", "tmpfs", "-o", "size=4k", "tmpfs", str(tmp_path))
    try:
        output = tmp_path / "output"
        for size in (8, 12, 24, 32):
            mount("-o", f"remount,size={size}k", str(tmp_path))
            check_complaint(job, output, job.run(output), f"{output}.*: no space left on the device; free some and")
        mount("-o", "remount,ro,size=1m", str(tmp_path))
        check_complaint(job, output, job.run(output), f"{output}.*: cannot be written .Read-only file system.")
        mount("-o", "remount,rw", str(tmp_path))
        job.check_finishes(output)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
