"""A source that is a list of sets: as if their shards lay in one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from asr_kd.errors import UserError
from asr_kd.models.acoustic import load_checkpoint
from asr_kd.models.origin import score_of
from asr_kd.selection.job import select
from asr_kd.selection.settings import SelectionSettings
from asr_kd.shards.indexing import index
from asr_kd.shards.manifest import write_transcripts
from asr_kd.shards.settings import IndexSettings
from asr_kd.shards.tarset import read_index, write_index
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from tests.training.conftest import sample, write_audio
from tests.training.test_trainer import published

Job = Callable[..., TrainSettings]


@pytest.fixture
def parts(audio: str, tmp_path: Path) -> list[str]:
    """The first shard of the tones in a set of its own, and the others in another, under names that begin anew."""
    for folder, shards in (("a", read_index(audio)[:1]), ("b", read_index(audio)[1:])):
        (tmp_path / folder).mkdir()
        infos = []
        for number, info in enumerate(shards):
            name = f"shard-00000{number}.tar"
            shutil.copyfile(Path(audio) / info.name, tmp_path / folder / name)
            infos.append(type(info)(name, info.samples, info.seconds, info.bytes, info.sha256))
        write_index(tmp_path / folder, infos)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.fixture
def answers(audio: str, targets: str, parts: list[str], tmp_path: Path) -> str:
    """The targets of the tones, under the names that the shards have in the joined set."""
    names = {info.sha256: info.name for info in read_index(parts)}
    (tmp_path / "answers").mkdir()
    for info in read_index(audio):
        shutil.copyfile(Path(targets) / info.name, tmp_path / "answers" / names[info.sha256])
    return str(tmp_path / "answers")


def test_several_sets_teach_what_one_of_all_their_shards_does(
    job: Job, parts: list[str], answers: str, tmp_path: Path
) -> None:
    index(IndexSettings.model_validate({"audio": parts, "output": str(tmp_path / "set")}))
    runs = []
    for name, source in {
        "one": {"ctc": 0.5},
        "list": {"ctc": 0.5, "audio": parts, "targets": answers},
        "joined": {"ctc": 0.5, "audio": str(tmp_path / "set"), "targets": answers},
    }.items():
        train(job(source=source, output=str(tmp_path / name)))
        runs.append(published(tmp_path / name))
    for file in ("last/state.safetensors", "best/model.safetensors"):
        assert runs[0][file] == runs[1][file] == runs[2][file]
    claim = json.loads((tmp_path / "list" / "job.json").read_text())["settings"]
    assert claim["phases"][0]["sources"][0]["audio"] == parts
    assert claim["data"][" + ".join(parts)] == read_index(parts).hash


def test_it_goes_on_and_takes_a_list_of_utterances(
    job: Job, parts: list[str], answers: str, tmp_path: Path, resumed: Callable[..., None]
) -> None:
    only = tmp_path / "only.jsonl"
    select(SelectionSettings.model_validate({"audio": parts, "output": str(only), "targets": answers, "share": 0.7}))
    source = {"audio": parts, "targets": answers, "only": str(only)}
    whole, broken = (job(source=source, output=str(tmp_path / name)) for name in ("whole", "broken"))
    train(whole)
    resumed(broken, after=2)
    names = [published(tmp_path / name)["last/state.safetensors"] for name in ("whole", "broken")]
    assert names[0] == names[1]


def test_transcripts_that_two_utterances_would_share_are_refused(job: Job, audio: str, tmp_path: Path) -> None:
    other = write_audio(tmp_path / "other", [[sample("v0", "ab", 50), sample("u5", "b", 51)]])
    source = {"targets": None, "soft": 0.0, "ctc": 1.0, "transcripts": str(tmp_path / "texts.jsonl")}
    write_transcripts(tmp_path / "texts.jsonl", [("u4", "ab"), ("u5", "ba"), ("v0", "a")])
    with pytest.raises(
        UserError,
        match=r"^transcripts \S+/texts\.jsonl: u5 is the key of two utterances, in \S+/audio/shard-000001\.tar and in "
        r"\S+/other/shard-000000\.tar, and texts go by the key alone",
    ):
        train(job(source={**source, "audio": [audio, other]}))
    assert not (tmp_path / "run").exists()
    # what has no text is not learned from, whoever else has its key
    write_transcripts(tmp_path / "texts.jsonl", [("u4", "ab"), ("v0", "a")])
    train(job(source={**source, "audio": [audio, other]}, max_bad_share=1.0))


def test_a_development_set_may_be_several(job: Job, audio: str, parts: list[str], tmp_path: Path) -> None:
    found = []
    for name, development in (("one", audio), ("several", parts)):
        train(job(development=development, output=str(tmp_path / name)))
        found.append(published(tmp_path / name)["best/model.safetensors"])
    assert found[0] == found[1]
    score = score_of(load_checkpoint(tmp_path / "several").training)
    assert score is not None and score.audio == " + ".join(parts)
