"""Evaluation that is killed, shared by several processes, or finds what others left: the next run ends in the same bytes."""

from __future__ import annotations

import itertools
import json
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

from asr_kd.errors import UserError
from asr_kd.evaluation import sharing
from asr_kd.evaluation.job import evaluate
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.objects import ObjectPath
from asr_kd.shards import leases

Job = Callable[..., EvalSettings]
FORK = multiprocessing.get_context("fork")
COUNT = 6  # shards of two utterances


@pytest.fixture
def job(checkpoints: dict[str, Path], sets: dict[str, str], tmp_path: Path) -> Job:
    def make(output: str = "report", **changes: Any) -> EvalSettings:
        values = {
            "systems": {name: str(folder) for name, folder in checkpoints.items()}, "audio": sets, "teacher": "teacher",
            "output": str(tmp_path / output), "bootstrap": 50, "device": "cpu", "max_bad_share": 0.5,
        }  # fmt: skip
        return EvalSettings.model_validate(values | changes)

    return make


def scores(settings: EvalSettings) -> dict[str, Any]:
    """All that is published but what it cost: by name, bytes, and the report without costs and its own place."""
    output = Path(settings.output)
    files: dict[str, Any] = {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and not path.name.endswith((".costs.json", ".html", ".md"))
    }
    report = json.loads(files["report.json"])
    for system in report["systems"].values():
        for key in [key for key in system if "real_time_factor" in key]:
            del system[key]
    del report["settings"]["output"], report["settings"]["workers"]
    return files | {"report.json": report}


def parts(settings: EvalSettings) -> dict[str, tuple[int, int]]:
    """The parts that are there, as inode and time of writing."""
    found = Path(settings.output).glob("parts/*/shard-*[0-9].jsonl")
    return {f"{path.parent.name}/{path.name}": (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def start(settings: EvalSettings, log: Path, seconds: float = 0.0) -> BaseProcess:
    """A process at the job, each shard slowed down, and noted in `log` when it is published."""

    def work() -> None:
        real = sharing.write_part

        def noted(path: Path, *arguments: Any) -> None:
            time.sleep(seconds)
            real(path, *arguments)
            with open(log, "a") as file:
                file.write(f"{path.parent.name}/{path.name}\n")

        sharing.write_part = noted  # type: ignore[assignment]
        leases.WAIT = 0.01
        evaluate(settings)

    process = FORK.Process(target=work)
    process.start()
    return process


def test_killed_at_any_moment_it_goes_on_with_what_is_missing(job: Job, tmp_path: Path) -> None:
    evaluate(job("alone"))
    expected, rng = scores(job("alone")), random.Random(0)
    settings, before = job(), {}
    for number in range(12):
        process = start(settings, tmp_path / "log", 0.02)
        process.join(rng.uniform(0.05, 0.4))
        process.kill()
        process.join(300)
        now = parts(settings)
        assert before.items() <= now.items(), "a finished shard was done again"
        before = now
        if process.exitcode == 0:
            assert scores(settings) == expected
            settings, before = job(str(number)), {}
    evaluate(settings)
    assert before.items() <= parts(settings).items()
    assert scores(settings) == expected
    assert not list(Path(settings.output).rglob(".*"))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_shards_and_none_is_done_twice(job: Job, tmp_path: Path, count: int) -> None:
    evaluate(job("alone"))
    processes = [start(job(), tmp_path / "log", 0.05) for _ in range(count)]
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    assert sorted((tmp_path / "log").read_text().split()) == sorted(parts(job()))
    assert len(parts(job())) == COUNT
    assert scores(job()) == scores(job("alone"))


def test_what_others_do_counts_as_done(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(job("alone"))
    capsys.readouterr()
    settings, write = job(), sharing.write_part

    def others_too(path: Path, *arguments: Any) -> None:
        write(path, *arguments)
        shutil.copytree(Path(job("alone").output) / "parts" / "noisy", path.parent.parent / "noisy", dirs_exist_ok=True)

    monkeypatch.setattr(sharing, "write_part", others_too)
    monkeypatch.setattr("asr_kd.progress.LOG_EVERY_SECONDS", 0.0)
    evaluate(settings)
    assert scores(settings) == scores(job("alone"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval: ")]
    counts = [int(line.split()[1]) for line in lines]
    assert counts[-1] == 2 * COUNT
    # each when it is found, and not all at the end
    assert all(0 <= after - before <= 2 for before, after in itertools.pairwise(counts))


def test_one_that_is_killed_is_replaced_by_the_other(job: Job, tmp_path: Path) -> None:
    evaluate(job("alone"))
    doomed, survivor = (start(job(), tmp_path / "log", 0.1) for _ in range(2))
    while not parts(job()):
        time.sleep(0.01)
    assert doomed.pid is not None
    os.kill(doomed.pid, signal.SIGKILL)
    for process in (doomed, survivor):
        process.join(300)
    assert survivor.exitcode == 0
    for torn in Path(job().output).rglob(".*.tmp"):  # newer than the survivor: the next run clears it away
        torn.unlink()
    assert scores(job()) == scores(job("alone"))


def test_any_number_of_workers_gives_the_same_bytes(job: Job) -> None:
    changes: dict[str, Any] = {"decoder": "beam", "beam": 3, "batch_frames": 40}
    evaluate(job("none", **changes))
    evaluate(job("one", workers=1, **changes))
    assert scores(job("none", **changes)) == scores(job("one", **changes))


def test_lines_say_where_they_are_from(job: Job) -> None:
    evaluate(job())
    lines = [json.loads(line) for line in (Path(job().output) / "utterances.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * (2 * COUNT - 1)
    assert [line["set"] for line in lines] == ["clean"] * 10 + ["noisy"] * 12
    first = lines[0]
    assert (first["shard"], first["seconds"], first["fields"]) == ("shard-000000.tar", 0.5, {"snr": 0})
    assert all(line["same_as_teacher"] for line in lines if line["system"] == "teacher")
    for line in lines:
        spelled = "".join(piece for piece, *_ in line["tokens"]).replace("▁", " ").replace("<unk>", " ⁇ ")
        assert spelled.split() == line["hypothesis"].split()
        assert " ".join(word for word, *_ in line["times"]).split() == line["hypothesis"].split()
    (bad,) = (Path(job().output) / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(bad).items() >= {"key": "u3", "set": "clean", "shard": "shard-000001.tar"}.items()


def test_a_checkpoint_or_audio_that_changed_is_scored_again(
    job: Job, checkpoints: dict[str, Path], sets: dict[str, str], tmp_path: Path
) -> None:
    folders = {name: shutil.copytree(folder, tmp_path / name) for name, folder in checkpoints.items()}
    audio = shutil.copytree(sets["clean"], tmp_path / "audio")
    settings = job(systems={name: str(folder) for name, folder in folders.items()}, audio=str(audio))
    evaluate(settings)
    first = parts(settings)
    assert {name.partition("/")[0] for name in first} == {"audio"}
    evaluate(settings)
    assert parts(settings) == first
    for folder in (audio, Path(sets["noisy"])):
        index = json.loads((folder / "index.json").read_text())
        if folder != audio:
            (audio / "shard-000001.tar").write_bytes((folder / "shard-000001.tar").read_bytes())
            other = index["shards"][1]
    index = json.loads((audio / "index.json").read_text())
    index["shards"][1] = other
    (audio / "index.json").write_text(json.dumps(index))
    evaluate(settings)
    second = parts(settings)
    assert [name for name in sorted(first) if first[name] != second[name]] == ["audio/shard-000001.jsonl"]
    shutil.rmtree(folders["student"])
    shutil.copytree(checkpoints["teacher"], folders["student"])
    evaluate(settings)
    assert not set(parts(settings).values()) & set(second.values())


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data.replace(b'"words": 1', b'"words": 2'), lambda data: b"", lambda data: b"[]"]
)  # fmt: skip
def test_a_damaged_part_is_named(job: Job, damage: Callable[[bytes], bytes]) -> None:
    evaluate(job())
    expected = scores(job())
    path = Path(job().output) / "parts" / "clean" / "shard-000001.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        UserError, match=r"parts/clean/shard-000001\.jsonl: is damaged; remove it and run the command again"
    ):
        evaluate(job())
    path.unlink()
    evaluate(job())
    assert scores(job()) == expected


@pytest.mark.parametrize("content", ["", "[]", '{"seconds": 1, "systems": {"teacher": {}}}'])
def test_damaged_costs_are_named(job: Job, content: str) -> None:
    evaluate(job())
    path = Path(job().output) / "parts" / "noisy" / "shard-000002.costs.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"parts/noisy/shard-000002\.costs\.json: "):
        evaluate(job())
    path.unlink()
    with pytest.raises(UserError, match=r"costs\.json: is gone; remove shard-000002\.jsonl beside it too"):
        evaluate(job())
    (path.parent / "shard-000002.jsonl").unlink()
    evaluate(job())


def test_output_in_an_object_store(job: Job, s3: Any) -> None:
    evaluate(job("here"))
    settings = job().model_copy(update={"output": f"{s3.url}/report"})
    evaluate(settings)
    stored = s3.content(settings.output)
    for name, data in scores(job("here")).items():
        assert name == "report.json" or stored[name] == data
    assert not [name for name in stored if name.startswith(".leases")]
    (ObjectPath.parse(settings.output) / "parts" / "noisy" / "shard-000001.jsonl").unlink()
    s3.requests.clear()
    evaluate(settings)
    written = [path for method, path in s3.requests if method == "PUT" and "/parts/" in path]
    assert {path.rpartition("/")[2] for path in written} == {"shard-000001.costs.json", "shard-000001.jsonl"}
    again = s3.content(settings.output)
    assert {name: again[name] for name in again if name.endswith(".jsonl")} == {
        name: stored[name] for name in stored if name.endswith(".jsonl")
    }
