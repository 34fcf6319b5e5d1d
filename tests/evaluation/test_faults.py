"""`eval` that is killed or writes to a disk that fails: the next run ends in the same bytes."""

from __future__ import annotations

import errno
import functools
import itertools
import resource
import time
from collections.abc import Iterable
from pathlib import Path

import jinja2
import pytest
import yaml

from asr_kd.cli import main
from tests.evaluation.conftest import TEXTS, speech, write_shards
from tests.faults import (
    Job,
    check_closed_folder,
    check_failing_disk,
    check_killed_at_every_call,
    check_no_space_from_any_call,
    check_small_disk,
    check_vanishing,
    killed_at,
)


def prepare(cache: Path) -> None:
    """What is measured comes out the same in every run, and the page's template is compiled once."""
    jinja2.Environment = functools.partial(  # type: ignore[assignment, misc]
        jinja2.Environment, bytecode_cache=jinja2.FileSystemBytecodeCache(str(cache))
    )
    ticks = itertools.count(0.0)
    time.perf_counter = lambda: next(ticks)


def parts(output: Path) -> Iterable[Path]:
    return output.glob("parts/*/shard-*[0-9].jsonl")


@pytest.fixture(scope="module")
def job(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two shards of two short utterances each, one of them bad, and one system."""
    folder = tmp_path_factory.mktemp("job")
    samples = [speech(f"u{number}", 0, text=TEXTS[number % 3], speaker="s") for number in range(4)]
    samples[1].audio = samples[1].audio[:500]
    audio = write_shards(folder / "audio", [samples[:2], samples[2:]])
    settings = {
        "systems": {"student": str(checkpoints["student"])}, "audio": str(audio), "bootstrap": 3, "device": "cpu",
        "max_bad_share": 0.5,
    }  # fmt: skip
    (folder / "eval.yaml").write_text(yaml.safe_dump(settings))
    words = ["eval", str(folder / "eval.yaml")]
    assert main([*words, f"output={folder / 'here'}"]) == 0  # what it imports on its way is imported once
    job = Job(words, folder, parts, functools.partial(prepare, folder))
    job.run_undisturbed()
    assert job.expected.keys() > {"report.json", "report.html", "report.md", "utterances.jsonl", "quarantine.jsonl"}
    assert b"truncated or damaged" in job.expected["quarantine.jsonl"]
    assert len(list(parts(folder / "eval-undisturbed"))) == 2
    return job


def test_killed_between_any_two_system_calls(job: Job, tmp_path: Path) -> None:
    assert check_killed_at_every_call(job, tmp_path) > 60


def test_no_space_left_at_any_system_call(job: Job, tmp_path: Path) -> None:
    assert check_no_space_from_any_call(job, tmp_path, 2) > 40


@pytest.mark.parametrize(("code", "words"), [(errno.EROFS, "cannot be written"), (errno.EIO, "Input/output error")])
def test_a_disk_that_fails(job: Job, tmp_path: Path, code: int, words: str) -> None:
    check_failing_disk(job, tmp_path, code, words, range(1, 50, 9))


def test_an_output_folder_that_vanishes(job: Job, tmp_path: Path) -> None:
    check_vanishing(job, tmp_path, range(1, 80, 5))


@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_that_may_not_be_written(job: Job, begun: bool, tmp_path: Path) -> None:
    check_closed_folder(job, tmp_path, begun)


@pytest.mark.parametrize("size", [200, 1000, 5000])
def test_a_limit_on_the_size_of_files(job: Job, size: int, tmp_path: Path) -> None:
    status = job.run(tmp_path / "output", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    job.check_complaint(tmp_path / "output", status, ".*larger than a file may be here; see `ulimit -f`")
    job.check_finishes(tmp_path / "output")


def test_a_small_disk_and_one_that_may_only_be_read(job: Job, tmp_path: Path) -> None:
    check_small_disk(job, tmp_path, (8, 16, 24, 40))


@pytest.mark.parametrize(
    ("place", "pattern"),
    [
        (".", "{output}: is a file, not a folder"),
        (".leases", "{output}/.leases: is a file, not a folder"),
        ("parts", "{output}/parts.*: is a file, not a folder"),
        ("parts/audio", "{output}/parts/audio: is a file, not a folder"),
        ("job.json/", "{output}/job.json: is a folder where a job claim was expected"),
        ("parts/audio/shard-000001.jsonl/", "{output}/parts/audio/shard-000001.jsonl: is a folder where a"),
        ("parts/audio/shard-000001.costs.json/", "{output}/parts/audio/shard-000001.costs.json: is a folder where a"),
        ("utterances.jsonl/", "{output}/utterances.jsonl: is a folder where a file belongs"),
        ("quarantine.jsonl/", "{output}/quarantine.jsonl: is a folder where a file belongs"),
        ("report.md/", "{output}/report.md: is a folder where a file belongs"),
        ("report.html/", "{output}/report.html: is a folder where a file belongs"),
        ("report.json/", "{output}/report.json: is a folder where a file belongs"),
    ],
)
def test_a_file_in_the_place_of_a_folder_and_the_reverse(job: Job, place: str, pattern: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    obstacle = output / place
    if place not in (".", "job.json/"):
        job.run(output, killed_at(6))  # the folder is claimed, and nothing else
    if obstacle.is_dir():
        obstacle.rmdir()
    obstacle.parent.mkdir(exist_ok=True, parents=True)
    if place.endswith("/"):
        obstacle.mkdir()
    else:
        obstacle.touch()
    status = job.run(output)
    if place.endswith("/"):
        obstacle.rmdir()
    else:
        obstacle.unlink()
    job.check_complaint(output, status, pattern.format(output=output))
    job.check_finishes(output)
