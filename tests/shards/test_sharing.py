"""`prepare` by many processes: workers of one command, several commands, and any of them killed; the bytes are those of one."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from pydantic import ValidationError

from asr_kd.errors import UserError
from asr_kd.pipeline import load_pipeline
from asr_kd.shards import leases, ranges, records
from asr_kd.shards import prepare as prepare_module
from asr_kd.shards.leases import WRITER, Leases
from asr_kd.shards.manifests import Manifest
from asr_kd.shards.pool import Processes
from asr_kd.shards.prepare import prepare
from asr_kd.shards.settings import PrepareSettings

FORK = multiprocessing.get_context("fork")
RATE, RANGES = 8000, 9
Job = Callable[..., PrepareSettings]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine ranges of three: whole files and segments, some bad, one range of bad ones alone."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    soundfile.write(folder / "long.flac", rng.normal(0, 0.1, 4 * RATE), RATE)
    lines: list[dict[str, Any]] = []
    for number in range(3 * RANGES):
        line: dict[str, Any] = {"audio": f"u{number}.wav", "text": f"text {number}"}
        soundfile.write(folder / line["audio"], rng.normal(0, 0.1, 800 + number), RATE)
        if number % 4 == 1:
            line = {"audio": "long.flac", "key": f"s{number}", "start": number / 10, "end": number / 10 + 0.2}
        if number in (7, 12, 13, 14, 26):
            (folder / f"u{number}.wav").write_bytes(b"RIFF")
            line = {"audio": f"u{number}.wav", "key": f"bad{number}"}
        lines.append(line)
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "list.jsonl"


@pytest.fixture
def job(source: Path, tmp_path: Path) -> Job:
    def make(**changes: object) -> PrepareSettings:
        values = {
            "manifest": str(source),
            "output": str(tmp_path / "shards"),
            "samples_per_shard": 3,
            "max_bad_share": 0.5,
        }
        return PrepareSettings.model_validate(values | changes)

    return make


def tree(folder: str | Path) -> dict[str, bytes]:
    """All that must be the same whoever worked; a killed process's incomplete files go with the next run."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name not in ("timing.json", "summary.json") and path.suffix != ".tmp"
    }


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    output = tmp_path_factory.mktemp("alone") / "shards"
    prepare(PrepareSettings(manifest=str(source), output=str(output), samples_per_shard=3, max_bad_share=0.5))
    found = tree(output)
    assert len(found) == 8 + RANGES + 4 and found["quarantine.jsonl"].count(b"\n") == 5
    return found


def start(settings: PrepareSettings, count: int, log: Path, seconds: float) -> list[BaseProcess]:
    """Commands at the same output, each range slowed down and noted in `log`."""

    def work() -> None:
        real = prepare_module._Preparation._make

        def noted(self: Any, number: int) -> float:
            time.sleep(seconds)
            length = real(self, number)
            with open(log, "a") as file:
                file.write(f"{number}\n")
            return length

        prepare_module._Preparation._make = noted  # type: ignore[method-assign]
        prepare(settings)

    processes: list[BaseProcess] = [FORK.Process(target=work) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (leases, ranges):
        monkeypatch.setattr(module, "WAIT", 0.02)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_write_the_bytes_of_one(
    job: Job, expected: dict[str, bytes], workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(job(workers=workers))
    assert tree(job().output) == expected
    assert "27 utterances in = 22 written + 5 quarantined" in capsys.readouterr().out
    timing = json.loads((Path(job().output) / "timing.json").read_text())
    assert timing["shards"] == RANGES and 0 < timing["workers"] <= workers


@pytest.mark.parametrize("count", [2, 4])
def test_commands_share_the_ranges_and_none_is_made_twice(
    job: Job, expected: dict[str, bytes], tmp_path: Path, count: int
) -> None:
    for process in start(job(), count, tmp_path / "log", 0.02):
        process.join(300)
        assert process.exitcode == 0
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(RANGES))
    assert tree(job().output) == expected


def test_a_worker_that_is_killed_is_replaced(
    job: Job, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed: list[Any] = []
    real = Processes.over

    def killing(self: Processes, calls: Any, seconds: float) -> Iterator[tuple[Any, Any]]:
        for call, result in real(self, calls, seconds):
            if isinstance(result, float) and not killed:  # the first range is made, and others are under way
                killed.extend(multiprocessing.active_children())
                for process in killed:
                    process.kill()
            yield call, result

    monkeypatch.setattr(Processes, "over", killing)
    prepare(job(workers=2))
    assert tree(job().output) == expected
    assert len(killed) == 2
    assert "a worker was lost; its shards are given out again" in capsys.readouterr().err
    assert not list(Path(job().output).rglob("*.tmp"))


def test_commands_that_are_killed_are_followed_by_the_others(
    job: Job, expected: dict[str, bytes], tmp_path: Path
) -> None:
    rng = random.Random(0)
    for trial in range(4):
        settings = job(output=str(tmp_path / f"trial-{trial}"))
        doomed, survivor = start(settings, 2, tmp_path / f"log-{trial}", 0.02)
        time.sleep(rng.uniform(0.0, 0.3))
        assert doomed.pid is not None
        os.kill(doomed.pid, signal.SIGKILL)
        for process in (survivor, doomed):
            process.join(300)
        assert survivor.exitcode == 0
        assert tree(settings.output) == expected


def test_no_more_workers_start_than_there_is_work(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    real = Processes.start
    monkeypatch.setattr(Processes, "start", lambda self: started.append(self) or real(self))
    prepare(job(workers=50, samples_per_shard=27))
    assert len(started) == 1


def test_what_is_there_is_read_from_no_manifest_and_made_by_nobody(
    job: Job, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(job())
    capsys.readouterr()
    monkeypatch.setattr(Manifest, "read", lambda *_: pytest.fail("read for nothing"))
    monkeypatch.setattr(prepare_module._Preparation, "_make", lambda *_: pytest.fail("made for nothing"))
    prepare(job(workers=3))
    assert tree(job().output) == expected
    assert "27 utterances in = 22 written + 5 quarantined" in capsys.readouterr().out


@pytest.mark.parametrize("few", [1, 100])  # ranges are looked up in a listing, or one by one
@pytest.mark.parametrize(
    "lost",
    ["shard-000003.tar", ".records/shard-000004.json", "index.json", "quarantine.jsonl", ".records/outcome.json"],
)
def test_what_is_lost_is_made_again(
    job: Job, expected: dict[str, bytes], lost: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "FEW", few)
    prepare(job())
    (Path(job().output) / lost).unlink()
    made: list[int] = []
    real = prepare_module._Preparation._make
    monkeypatch.setattr(
        prepare_module._Preparation, "_make", lambda self, number: made.append(number) or real(self, number)
    )
    prepare(job())
    assert made == ([3] if lost.endswith(".tar") else [])
    # beside an index that is whole nobody asks for a record
    assert tree(job().output) == {
        name: data for name, data in expected.items() if "/shard-000004" not in lost or name != lost
    }


def test_a_damaged_index_is_written_again(job: Job, expected: dict[str, bytes]) -> None:
    prepare(job())
    (Path(job().output) / "index.json").write_text("{")
    prepare(job())
    assert tree(job().output) == expected


def test_a_stricter_share_takes_the_index_away_and_a_looser_one_brings_it_back(
    job: Job, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(job())
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"5 of 27 utterances cannot be used, more than max_bad_share 0.1 .first: bad7: "
        ):
            prepare(job(max_bad_share=0.1))
        assert not (Path(job().output) / "index.json").exists()
    monkeypatch.setattr(prepare_module, "write_shard", lambda *_: pytest.fail("made for nothing"))
    prepare(job())
    assert tree(job().output) == expected


def test_a_manifest_that_changes_between_two_runs_is_refused_by_name(
    job: Job, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "list.jsonl"
    mine.write_text(source.read_text().replace('"audio": "', f'"audio": "{source.parent}/'))
    os.utime(mine, (1e9, 1e9))

    def dying(self: object, number: int) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(prepare_module._Preparation, "_make", dying)
        prepare(job(manifest=str(mine)))
    mine.write_text(mine.read_text().replace("text 3", "text 4"))
    with pytest.raises(
        UserError,
        match=r"shards: belongs to other settings \(manifest: /.*/list\.jsonl does not hold what this output was made from\)",
    ):
        prepare(job(manifest=str(mine)))


def test_an_output_of_an_earlier_version_is_gone_on_with(job: Job, expected: dict[str, bytes], tmp_path: Path) -> None:
    """It has no plan; killed, it had a lease of its own."""
    prepare(job())
    output = Path(job().output)
    for name in (
        "index.json",
        "quarantine.jsonl",
        "timing.json",
        ".records/outcome.json",
        "shard-000005.tar",
        ".records/shard-000005.json",
    ):
        (output / name).unlink()
    lease = output / WRITER / "writer"
    lease.parent.mkdir()
    with Leases(tmp_path / "leases") as mine:
        lease.write_text(json.dumps({**mine._me, "pid": 2**30}))
    prepare(job(workers=2))
    shutil.rmtree(lease.parent)
    assert tree(output) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "greater than or equal to 1"),
        ({"max_workers": 2}, "max_workers belongs to engine ray alone"),
        ({"engine": "ray", "workers": 2}, "workers belongs to engine local alone"),
        ({"engine": "ray", "min_workers": 3, "max_workers": 2}, "max_workers 2 must not be below min_workers 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(job: Job, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        job(**changes)


def test_who_works_is_no_part_of_a_stage(job: Job, tmp_path: Path) -> None:
    """Its settings file is that of earlier versions, and another number of workers makes nothing stale."""
    assert not PrepareSettings.sharing & job().model_dump().keys()
    assert job(workers=2).model_dump()["workers"] == 2
    fingerprints = set()
    for more in ("", ", workers: 4", ", engine: ray, min_workers: 2"):
        file = tmp_path / "pipeline.yaml"
        file.write_text(
            f"variables: {{run: {tmp_path}/run}}\nstages:\n  a: {{verb: prepare, settings: {{manifest: m, output: '${{run}}/a'{more}}}}}\n"
        )
        fingerprints.add(load_pipeline(file, [])[1][0].fingerprint)
    assert len(fingerprints) == 1
