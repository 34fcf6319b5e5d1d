"""The label job with its audio, its teacher and its output in an object store."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from asr_kd.errors import UserError
from asr_kd.labeling import job as job_module
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.objects import ObjectPath
from asr_kd.shards.leases import Leases
from asr_kd.shards.tarset import Sample, read_index, read_shard, write_index, write_shard

Job = Callable[..., LabelSettings]
S3 = Any
#: a fork of this process would share its connections to the store
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["asr_kd.labeling.job", "s3fs"])
COUNT = 5


@pytest.fixture(scope="module")
def many(audio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    samples = [sample for info in read_index(audio) for sample in read_shard(audio / info.name)]
    shards = [
        [Sample(f"n{number}-{item}", samples[(number + item) % 12].audio, "flac", {}) for item in range(2)]
        for number in range(COUNT)
    ]
    write_index(folder, [write_shard(folder / f"shard-{number:06d}.tar", shard) for number, shard in enumerate(shards)])
    return folder


@pytest.fixture
def stored(s3: S3, job: Job, many: Path, teacher: Path, quick: None) -> Callable[..., LabelSettings]:
    """Settings of a job that lies in the store with all that it needs."""
    audio, teacher_url = s3.upload(many, "audio"), s3.upload(teacher, "teacher")
    s3.requests.clear()
    return lambda **changes: job(**{"audio": audio, "teacher": teacher_url, "output": f"{s3.url}/targets", **changes})


@pytest.fixture
def expected(job: Job, many: Path, tmp_path: Path) -> dict[str, bytes]:
    """What the same job writes on a local disk."""
    label(job(audio=str(many), output=str(tmp_path / "local")))
    return {
        path.name: path.read_bytes()
        for path in (tmp_path / "local").iterdir()
        if path.name not in ("timing.json", "summary.json")
    }


def published(s3: S3, settings: LabelSettings) -> dict[str, bytes]:
    return {name: data for name, data in s3.content(settings.output).items() if name != "timing.json"}


#: label, with every shard slowed down, and requests tried again at once
SLOW_JOB = """
import os, time
os.environ.update(environment)
from asr_kd import objects
from asr_kd.labeling.settings import LabelSettings
from asr_kd.errors import UserError
from asr_kd.labeling import job
objects.PAUSE = 0.001
real = job.label_shard
def slow(*arguments):
    time.sleep(0.1)
    return real(*arguments)
job.label_shard = slow
try:
    job.label(LabelSettings.model_validate_json(settings))
except UserError as error:
    said.send(str(error))
else:
    said.send("done")
"""


@dataclass
class Run:
    """A process that labels."""

    process: BaseProcess
    said: Connection

    @classmethod
    def start(cls, settings: LabelSettings) -> Run:
        mine, theirs = CLEAN.Pipe(duplex=False)
        names = {"environment": dict(os.environ), "settings": settings.model_dump_json(), "said": theirs}
        process = CLEAN.Process(target=exec, args=(SLOW_JOB, names))
        process.start()
        theirs.close()
        return cls(process, mine)

    def wait(self) -> str:
        """`done`, or the sentence with which it failed."""
        assert self.said.poll(300)
        said = self.said.recv()
        self.process.join(300)
        return said


def shards_of(s3: S3, settings: LabelSettings) -> set[str]:
    return {name for name in ObjectPath.parse(settings.output).names() if name.endswith(".tar")}


def puts(s3: S3) -> list[str]:
    return [path.rpartition("/")[2] for method, path in s3.requests if method == "PUT" and path.endswith(".tar")]


def test_a_store_holds_the_bytes_of_a_local_disk(s3: S3, stored: Job, expected: dict[str, bytes]) -> None:
    label(stored())
    assert published(s3, stored()) == expected
    gets = [path for method, path in s3.requests if method == "GET" and "/audio/shard" in path]
    assert len(gets) == COUNT and len(set(gets)) == COUNT  # no audio shard came twice
    before = published(s3, stored())
    s3.requests.clear()
    label(stored())  # nothing is left to do
    assert published(s3, stored()) == before and not [path for path in puts(s3) if "targets/shard" in path]


def test_a_job_starts_with_one_listing(s3: S3, stored: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "FEW", 2)
    infos = read_index(stored().audio)
    label(stored())
    output = ObjectPath.parse(stored().output)
    (output / "shard-000004.tar").unlink()
    s3.requests.clear()
    assert [info.name for info in job_module.missing(infos, output)] == ["shard-000004.tar"]
    assert len(s3.requests) == 1


def test_killed_by_sigkill_and_started_again(s3: S3, stored: Job, expected: dict[str, bytes]) -> None:
    settings = stored()
    # while a shard is on its way, and when it is there but the process does not know
    for number, on_its_way, done in ((1, True, 1), (2, False, 3), (3, True, 3)):
        runs: list[Run] = []

        def kill(runs: list[Run] = runs) -> None:
            os.kill(int(runs[0].process.pid or 0), signal.SIGKILL)

        def killing(
            method: str, path: str, number: int = number, on_its_way: bool = on_its_way, kill: Callable[[], None] = kill
        ) -> Any:
            if method != "PUT" or not path.endswith(f"/targets/shard-{number:06d}.tar"):
                return None
            if on_its_way:
                kill()
            return "cut" if on_its_way else kill

        s3.fault = killing
        runs.append(Run.start(settings))
        runs[0].process.join(300)
        assert runs[0].process.exitcode == -signal.SIGKILL
        s3.fault = lambda *_: None
        assert shards_of(s3, settings) == {f"shard-{number:06d}.tar" for number in range(done)}
    s3.requests.clear()
    label(settings)
    assert published(s3, settings) == expected
    assert len([path for method, path in s3.requests if method == "PUT" and "/targets/shard" in path]) == COUNT - done


def test_processes_share_the_shards(s3: S3, stored: Job, expected: dict[str, bytes]) -> None:
    settings = stored()
    runs = [Run.start(settings) for _ in range(2)]
    assert [run.wait() for run in runs] == ["done", "done"]
    assert published(s3, settings) == expected
    written = [path for method, path in s3.requests if method == "PUT" and "/targets/shard" in path]
    assert len(written) == COUNT  # none twice


def test_a_server_in_trouble_is_asked_again(s3: S3, stored: Job, expected: dict[str, bytes]) -> None:
    settings = stored()
    faults = itertools.cycle([None, None, 500, None, "cut", None, 503, None, None, "lose the answer", "cut the answer"])
    s3.fault = lambda *_: next(faults)
    label(settings)
    s3.fault = lambda *_: None
    assert published(s3, settings) == expected


@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_a_server_that_dies_leaves_nothing_torn(s3: S3, stored: Job, expected: dict[str, bytes], method: str) -> None:
    settings = stored()
    dead = False

    def dying(asked: str, path: str) -> str | None:
        nonlocal dead
        folder = "/targets/shard" if method == "PUT" else "/audio/shard"
        dead = dead or (asked == method and f"{folder}-000002.tar" in path)
        return "cut" if dead else None

    s3.fault = dying
    said = Run.start(settings).wait()
    assert re.search(r"^s3://\S+: the store failed 10 times, at last with: .*; see that it can be reached", said)
    s3.fault = lambda *_: None
    there = {name: data for name, data in published(s3, settings).items() if re.fullmatch(r"[\w-]+\.tar", name)}
    assert there == {name: expected[name] for name in there} and "shard-000002.tar" not in there
    assert "report.json" not in published(s3, settings)
    assert Run.start(settings).wait() == "done"
    assert published(s3, settings) == expected


def test_a_lease_has_one_holder_and_gives_signs_of_life(s3: S3) -> None:
    folder = f"{s3.url}/leases"
    with Leases(folder, patience=0.2) as one, Leases(folder, patience=0.2) as other:
        assert one.take("a") and not other.take("a") and other.take("b")
        first = s3.content(folder)["a"]
        time.sleep(0.3)
        assert s3.content(folder)["a"] != first and not other.take("a")
        one.give_back("a")
        assert other.take("a")
    assert s3.content(folder) == {}


def test_a_lease_of_another_machine_is_free_when_it_stays_silent(s3: S3) -> None:
    folder = ObjectPath.parse(f"{s3.url}/leases")
    with Leases(folder, patience=0.3) as mine:
        for beat in range(4):
            (folder / "a").write(json.dumps({"host": "elsewhere", "pid": 1, "started": "2", "beats": beat}).encode())
            assert not mine.take("a")
            time.sleep(0.1)
        time.sleep(0.4)
        assert mine.take("a")


def test_audio_that_changed_under_the_index_is_refused(s3: S3, stored: Job) -> None:
    path = ObjectPath.parse(stored().audio) / "shard-000001.tar"
    whole = path.read_bytes()
    path.write(whole[:600] + b"?" + whole[601:])
    with pytest.raises(UserError, match=r"s3://.*shard-000001\.tar: its SHA-256 differs from index\.json"):
        label(stored())
    path.unlink()
    with pytest.raises(UserError, match=r"s3://.*shard-000001\.tar: this shard is in index\.json, but not there"):
        label(stored())


def test_no_local_copies_are_left(s3: S3, stored: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "copies"))
    label(stored())
    assert os.listdir(tmp_path / "copies") == []
