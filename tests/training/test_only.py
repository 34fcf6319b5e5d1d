"""A source that learns from the utterances of a list alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asr_kd.decoding import pseudo_labels
from asr_kd.decoding.settings import TranscribeSettings
from asr_kd.decoding.transcribe import transcribe_shards
from asr_kd.decoding.whisper import Heard
from asr_kd.errors import UserError
from asr_kd.selection.job import select
from asr_kd.selection.settings import SelectionSettings
from asr_kd.shards.tarset import read_index
from asr_kd.training.batches import Lane, PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.sources import Source
from asr_kd.training.texts import check_source
from asr_kd.training.trainer import train
from asr_kd.units import Units
from tests.training.test_sources import MIXED, contents, utterances, whole_job
from tests.training.test_trainer import published, rewritten

Job = Callable[..., TrainSettings]
KEPT = ("u1", "u2", "u7")
SECONDS = (1.2, 0.72, 1.2)


def listed(audio: str, path: Path, those: tuple[str, ...] | None = None, **changes: Any) -> str:
    """The list of all utterances, or one that keeps these alone; `changes` are of its second line."""
    select(SelectionSettings(audio=audio, output=str(path)))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line if those is None else {**line, "kept": line["key"] in those} for line in lines]
    lines[1] |= changes
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def three(audio: str, tmp_path: Path) -> str:
    """A list that keeps two utterances of the first shard, none of the second, one of the third."""
    return listed(audio, tmp_path / "three.jsonl", KEPT)


def test_a_list_of_all_changes_no_bit(job: Job, units: Units, audio: str, tmp_path: Path) -> None:
    everything = listed(audio, tmp_path / "all.jsonl")
    noise = {"augment": {"noise": {}, "time_masks": 1}}
    for lanes in (1, 2, 6):
        with_list = job(source={"only": everything, **noise}, lanes=lanes, **MIXED)
        without = job(source=noise, lanes=lanes, **MIXED)
        assert contents(whole_job(with_list, units)) == contents(whole_job(without, units))
        assert PhaseStream(with_list, 0, units).seconds == PhaseStream(without, 0, units).seconds
    runs = []
    for name, source in (("with", {"only": everything}), ("without", {})):
        train(job(source=source, output=str(tmp_path / name)))
        runs.append(published(tmp_path / name))
    for file in ("last/state.safetensors", "best/model.safetensors"):
        assert runs[0][file] == runs[1][file]
    told = [{**line, "utterances_left_out": 0} for line in runs[1]["metrics.jsonl"] if "loss" in line]
    assert [line for line in runs[0]["metrics.jsonl"] if "loss" in line] == told


def test_runs_without_a_list_are_claimed_as_before(job: Job, tmp_path: Path) -> None:
    train(job())
    claim = json.loads((tmp_path / "run" / "job.json").read_text())["settings"]
    assert "only" not in claim and "only" not in claim["phases"][0]["sources"][0]


@pytest.mark.parametrize("cached", [False, True])
def test_those_of_the_list_are_heard_and_counted(
    cached: bool, job: Job, units: Units, audio: str, three: str, tmp_path: Path
) -> None:
    changes = {"feature_cache": str(tmp_path / "cache")} if cached else {}
    settings = job(source={"only": three}, phase={"passes": 4}, **MIXED, **changes)
    batches = whole_job(settings, units)
    assert len(utterances(batches)) == 3 and set(utterances(batches).values()) == {4}
    assert utterances(batches).keys() <= utterances(whole_job(job(**MIXED, **changes), units)).keys()
    stream = PhaseStream(settings, 0, units)
    assert stream.seconds == pytest.approx(4 * sum(SECONDS))
    assert sum(batch.seconds for batch in batches) == pytest.approx(stream.seconds, rel=0.1)
    assert (stream.sources[0].utterances, stream.sources[0].chosen and stream.sources[0].chosen.left_out) == (3, 7)
    # hours ask for as many more passes of the list
    more = job(source={"only": three}, phase={"passes": 1, "hours_at_least": 9.9 * sum(SECONDS) / 3600}, **MIXED)
    assert PhaseStream(more, 0, units).passes == 10
    sliced = whole_job(
        job(source={"only": three}, phase={"passes": None, "hours": sum(SECONDS) / 3600}, **MIXED), units
    )
    assert contents(sliced) == contents(batches)[: len(sliced)] and len(utterances(sliced)) == 3


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("lanes", [6, 12])
def test_any_number_of_processes_and_going_on(lanes: int, ranks: int, job: Job, units: Units, three: str) -> None:
    settings = job(source={"only": three, "augment": {"time_masks": 1}}, phase={"passes": 3}, lanes=lanes, **MIXED)
    batches = whole_job(settings, units)
    assert set(
        utterances(whole_job(job(source={"only": three}, phase={"passes": 3}, lanes=lanes), units)).values()
    ) == {3}
    assert contents(whole_job(settings, units, ranks)) == contents(batches)
    positions, turn = PhaseStream(settings, 0, units).start(), 0
    for place, batch in enumerate(batches[:-1]):
        positions[batch.lane] = batch.after
        turn = (batch.lane + 1) % lanes
        if turn == 0:
            rest = whole_job(settings, units, lanes=list[Lane](positions))
            assert contents(rest) == contents(batches)[place + 1 :]


def test_a_run_says_what_is_left_out(
    job: Job, audio: str, three: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(job(source={"only": three}))
    assert f"{audio}: 3 utterances are kept by {three}, 0.00 hours; 7 are left out" in capsys.readouterr().err
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["utterances_left_out"] for line in metrics if "loss" in line} == {7}
    listed(audio, Path(three), ("u1", "u2"))
    with pytest.raises(UserError, match="belongs to other settings"):
        train(job(source={"only": three}))


def test_texts_of_others_do_not_count(job: Job, units: Units, audio: str, tmp_path: Path) -> None:
    def spoil(shard: list[Any]) -> None:
        for one in shard:
            if one.key not in KEPT:
                one.fields["text"] = "unspeakable"

    spoilt = rewritten(audio, tmp_path / "spoilt", spoil)
    source = {"audio": spoilt, "targets": None, "soft": 0.0, "ctc": 1.0}
    with pytest.raises(UserError, match="characters that no unit covers"):
        check_source(Source(job(source=source), 0, 0, units))
    assert not check_source(Source(job(source={**source, "only": listed(spoilt, tmp_path / "l", KEPT)}), 0, 0, units))


def test_lists_that_do_not_fit_are_refused(job: Job, units: Units, audio: str, three: str, tmp_path: Path) -> None:
    def refused(path: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            whole_job(job(source={"only": path}), units)

    refused(listed(audio, tmp_path / "none.jsonl", ()), "keeps none of the utterances of")
    refused(listed(audio, tmp_path / "field.jsonl", kept="yes"), "line 2: kept is 'yes'; make the list with")
    for name, value in (
        ("seconds", 2**70),
        ("seconds", True),
        ("shard", "é.tar"),
        ("shard", "shard-000000.tar\0"),
        ("shard", "../x.tar"),
    ):
        refused(listed(audio, tmp_path / "odd.jsonl", **{name: value}), f"line 2: {name} is .*; make the list with")
    refused(listed(audio, tmp_path / "other.jsonl", set="0123"), r"line 2: speaks of other audio \(index 0123\)")
    refused(listed(audio, tmp_path / "key.jsonl", key="u77"), "key.jsonl: u77 is not in .*shard-000000.tar; run")
    refused(
        listed(audio, tmp_path / "shard.jsonl", shard="shard-9.tar"), "u1 or others it keeps are not in .*/shard-9.tar"
    )
    refused(listed(audio, tmp_path / "twice.jsonl", key="u0"), "line 2: the key u0 was there before")
    refused(str(tmp_path / "gone.jsonl"), "no such list of utterances")
    refused(listed(audio, tmp_path / "long.jsonl", KEPT, seconds=90.0), "or index.json says")
    assert read_index(audio).samples == 10


def test_texts_of_a_whisper_teach_and_what_it_left_out_is_not_bad(
    job: Job, audio: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recogniser:
        fingerprint = "whisper"

        def __call__(self, sound: np.ndarray) -> Heard:
            return Heard("A, b.", -0.2 if len(sound) < 16_000 else -2.0, 0.1, "en")

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "whisper"}')
    monkeypatch.setattr(pseudo_labels, "load_recogniser", lambda *_: Recogniser())
    texts = str(tmp_path / "texts.jsonl")
    whisper = {"units": job().units}
    values = {
        "checkpoint": str(tmp_path / "model"),
        "audio": audio,
        "output": texts,
        "device": "cpu",
        "whisper": whisper,
    }
    transcribe_shards(TranscribeSettings.model_validate(values))
    source = {"transcripts": texts, "targets": None, "soft": 0.0, "ctc": 1.0}
    with pytest.raises(UserError, match="no text to learn from"):
        train(job(source=source))
    train(job(source={**source, "only": texts}, max_bad_share=0.0, output=str(tmp_path / "kept")))
    assert published(tmp_path / "kept")["metrics.jsonl"]
