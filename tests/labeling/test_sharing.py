from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from asr_kd.labeling import job as job_module
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.shards.tarset import Sample, read_index, read_shard, write_index, write_shard

Job = Callable[..., LabelSettings]
FORK = multiprocessing.get_context("fork")
COUNT = 8


@pytest.fixture(scope="module")
def many(audio: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight shards of three utterances."""
    folder = tmp_path_factory.mktemp("many")
    samples = [sample for info in read_index(audio) for sample in read_shard(audio / info.name)]
    shards = [
        [Sample(f"n{number}-{item}", samples[(number + item) % 12].audio, "flac", {}) for item in range(3)]
        for number in range(COUNT)
    ]
    infos = [write_shard(folder / f"shard-{number:06d}.tar", shard) for number, shard in enumerate(shards)]
    write_index(folder, infos)
    return str(folder)


def published(folder: str | Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in Path(folder).iterdir()
        if path.name not in ("timing.json", "summary.json")
    }


def start(settings: LabelSettings, count: int, log: Path, seconds: float) -> list[BaseProcess]:
    """Processes at the same job, each shard slowed down and noted in `log`."""

    def work() -> None:
        real = job_module.label_shard

        def noted(*arguments: object) -> object:
            time.sleep(seconds)
            published = real(*arguments)  # type: ignore[arg-type]
            with open(log, "a") as file:
                file.write(f"{published.result()[0].name}\n")
            return published

        job_module.label_shard = noted  # type: ignore[assignment]
        label(settings)

    processes: list[BaseProcess] = [FORK.Process(target=work) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_shards_and_none_is_done_twice(job: Job, many: str, tmp_path: Path, count: int) -> None:
    label(job(audio=many, output=str(tmp_path / "alone")))
    settings = job(audio=many)
    for process in start(settings, count, tmp_path / "log", 0.05):
        process.join(300)
        assert process.exitcode == 0
    assert sorted((tmp_path / "log").read_text().split()) == [f"shard-{number:06d}.tar" for number in range(COUNT)]
    assert published(settings.output) == published(tmp_path / "alone")


def test_what_others_do_counts_as_done(
    job: Job, many: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    label(job(audio=many, output=str(tmp_path / "alone")))
    capsys.readouterr()
    settings, real = job(audio=many), job_module.label_shard

    def others_too(*arguments: Any) -> object:
        for path in sorted((tmp_path / "alone").glob("*.tar"))[-3:]:
            shutil.copy(path, Path(settings.output) / path.name)
        return real(*arguments)

    monkeypatch.setattr(job_module, "label_shard", others_too)
    monkeypatch.setattr("asr_kd.progress.LOG_EVERY_SECONDS", 0.0)
    label(settings)
    assert published(settings.output) == published(tmp_path / "alone")
    counts = [int(line.split()[1]) for line in capsys.readouterr().err.splitlines() if line.startswith("label: ")]
    assert counts[-1] == 3 * COUNT
    # each when it is found, and not all at the end
    assert all(0 <= after - before <= 3 for before, after in itertools.pairwise(counts))


def test_killed_processes_are_replaced_by_the_others(job: Job, many: str, tmp_path: Path) -> None:
    label(job(audio=many, output=str(tmp_path / "alone")))
    rng = random.Random(0)
    for trial in range(4):
        settings = job(audio=many, output=str(tmp_path / f"trial-{trial}"))
        doomed, survivor = start(settings, 2, tmp_path / f"log-{trial}", 0.03)
        time.sleep(rng.uniform(0.0, 0.4))
        assert doomed.pid is not None
        os.kill(doomed.pid, signal.SIGKILL)
        survivor.join(300)
        doomed.join(300)
        assert survivor.exitcode == 0
        for torn in Path(settings.output).glob(".*.tmp"):  # newer than the survivor: the next run clears it away
            torn.unlink()
        assert published(settings.output) == published(tmp_path / "alone")
