"""Jobs that are killed, race, or write to a disk that fails: at every system call, the next run ends in the same bytes."""

from __future__ import annotations

import builtins
import errno
import functools
import io
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_kd.cli import main
from asr_kd.shards.tarset import Sample, write_index, write_shard

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
        buffered = io.BufferedWriter(raw, 1024)
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

    def start(self, output: Path, step: Step | None = None) -> BaseProcess:
        """The command in a process of its own; what it says goes to `said`."""

        def work() -> None:
            sys.stdout = sys.stderr = open(f"{output}.said", "w", buffering=1)  # noqa: SIM115
            os.fsync = lambda _: None  # the machine goes on running: what was written is there
            if step:
                through(step)
            sys.exit(main([*self.words, f"output={output}"]))

        process = FORK.Process(target=work)
        process.start()
        return process

    def run(self, output: Path, step: Step | None = None) -> int:
        """Exit status; negative where a signal ended it."""
        process = self.start(output, step)
        process.join(60)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode

    def said(self, output: Path) -> str:
        return Path(f"{output}.said").read_text()

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
        assert self.run(output) == 0, self.said(output)
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
        assert job.run(output) == 0, job.said(output)
        job.expected = tree(output)
        assert len([path for path in job.expected if path.endswith(".tar")]) == 3
        assert b"truncated or damaged" in job.expected["quarantine.jsonl"]
        jobs[name] = job
    return jobs


def killed_at(number: int) -> Step:
    """Dies before the system call of this number."""
    calls = iter(range(1, 1 << 30))

    def step(_: str) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return step


@pytest.mark.parametrize("name", ["label", "prepare"])
def test_killed_between_any_two_system_calls(jobs: dict[str, Job], name: str, tmp_path: Path) -> None:
    job = jobs[name]
    for number in range(1, 1000):
        output = tmp_path / str(number)
        status = job.run(output, killed_at(number))
        if status == 0:
            break
        assert status == -signal.SIGKILL, job.said(output)
        job.check_finishes(output)
    print(number)
    assert number > 60


@pytest.mark.parametrize("name", ["label", "prepare"])
def test_killed_at_random_moments(jobs: dict[str, Job], name: str, tmp_path: Path) -> None:
    job = jobs[name]
    rng = random.Random(0)
    kills = 0
    for trial in range(8):
        output = tmp_path / str(trial)
        finished: dict[str, tuple[int, int]] = {}
        while True:
            process = job.start(output)
            process.join(rng.uniform(0.01, 0.08))
            process.kill()
            process.join(60)
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL, job.said(output)
            kills += 1
            now = job.check_whole(output)
            assert finished.items() <= now.items(), "a finished shard was made again"
            finished = now
        job.check_finishes(output)
    assert kills > 8


def failing_from(number: int, code: int, where: set[str], last: float = math.inf) -> Step:
    calls = iter(range(1, 1 << 30))

    def step(name: str) -> None:
        if name in where and number <= next(calls) <= last:
            raise OSError(code, os.strerror(code))

    return step

TAKES_SPACE = {"mkdir", "open", "write", "fsync", "link"}

@pytest.mark.parametrize("name", ["label", "prepare"])
def test_no_space_left_at_any_system_call(jobs: dict[str, Job], name: str, tmp_path: Path) -> None:
    job = jobs[name]
    said = {}
    for number in range(1, 1000):
        output = tmp_path / str(number)
        status = job.run(output, failing_from(number, errno.ENOSPC, TAKES_SPACE))
        if status == 0:
            break
        said[number] = status, job.said(output)
        try:
            job.check_finishes(output)
        except BaseException as e:
            said[number] = said[number], str(e)[:200]
    for k, v in said.items(): print(k, v)
    assert 0
