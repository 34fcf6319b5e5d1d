"""`label` and `prepare` that are killed, race, or write to a disk that fails: the next run ends in the same bytes."""

from __future__ import annotations

import errno
import io
import json
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_kd.shards import leases
from asr_kd.shards.tarset import Sample, write_index, write_shard
from tests.faults import (
    Job,
    check_closed_folder,
    check_failing_disk,
    check_killed_at_every_call,
    check_no_space_from_any_call,
    check_small_disk,
    check_vanishing,
    killed_with,
    tree,
)

NAMES = ("label", "prepare")


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

    def labelled(output: Path) -> Iterable[Path]:
        return output.glob("*.tar")

    def prepared(output: Path) -> Iterable[Path]:
        """`prepare` has done with a shard when its record is there too."""
        return (path for path in output.glob("*.tar") if (output / ".records" / f"{path.stem}.json").exists())

    jobs = {}
    for name, finished in (("label", labelled), ("prepare", prepared)):
        jobs[name] = Job(commands[name], folder, finished)
        jobs[name].run_undisturbed()
        assert len([path for path in jobs[name].expected if path.endswith(".tar")]) == 3
        assert b"truncated or damaged" in jobs[name].expected["quarantine.jsonl"]
    return jobs


@pytest.mark.parametrize("name", NAMES)
def test_killed_between_any_two_system_calls(jobs: dict[str, Job], name: str, tmp_path: Path) -> None:
    assert check_killed_at_every_call(jobs[name], tmp_path) > 45


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
        process.join(300)
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
    monkeypatch.setattr(leases, "WAIT", 0.005)
    job, rng = jobs["label"], random.Random(0)
    for trial in range(12):
        output, processes = tmp_path / str(trial), []
        for _ in range(4):
            processes.append(job.start(output))
            time.sleep(rng.uniform(0, 0.02))
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [0] * 4, job.said
        assert tree(output) == job.expected


@pytest.mark.parametrize("name", NAMES)
def test_no_space_left_at_any_system_call(jobs: dict[str, Job], name: str, tmp_path: Path) -> None:
    assert check_no_space_from_any_call(jobs[name], tmp_path) > 25


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("code", "words"), [(errno.EROFS, "cannot be written"), (errno.EIO, "Input/output error")])
def test_a_disk_that_fails(jobs: dict[str, Job], name: str, tmp_path: Path, code: int, words: str) -> None:
    check_failing_disk(jobs[name], tmp_path, code, words, range(1, 40, 7))


@pytest.mark.parametrize("name", NAMES)
def test_an_output_folder_that_vanishes(jobs: dict[str, Job], name: str, tmp_path: Path) -> None:
    check_vanishing(jobs[name], tmp_path, range(1, 60, 2))


@pytest.mark.parametrize(
    ("name", "place", "kind", "pattern"),
    [
        ("label", ".", "file", "{output}: is a file, not a folder"),
        ("label", ".leases", "file", "{output}/.leases: is a file, not a folder"),
        ("label", "job.json", "folder", "{output}/job.json: is a folder where a job claim was expected"),
        ("label", "shard-000001.tar", "folder", "{output}/shard-000001.tar: is a folder where a shard was expected"),
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
        job.run(output, killed_with(output / "job.json"))  # the folder is claimed, and nothing else
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
    job.check_complaint(output, status, pattern.format(output=output))
    job.check_finishes(output)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_that_may_not_be_written(jobs: dict[str, Job], name: str, begun: bool, tmp_path: Path) -> None:
    check_closed_folder(jobs[name], tmp_path, begun)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [200, 5000])
def test_a_limit_on_the_size_of_files(jobs: dict[str, Job], name: str, size: int, tmp_path: Path) -> None:
    job, output = jobs[name], tmp_path / "output"
    status = job.run(output, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    job.check_complaint(output, status, ".*larger than a file may be here; see `ulimit -f`")
    job.check_finishes(output)


@pytest.mark.parametrize("name", NAMES)
def test_a_small_disk_and_one_that_may_only_be_read(jobs: dict[str, Job], name: str, tmp_path: Path) -> None:
    check_small_disk(jobs[name], tmp_path, (8, 12, 24, 32))
