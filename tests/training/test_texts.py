from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from asr_kd.errors import UserError
from asr_kd.models import acoustic
from asr_kd.models.acoustic import Checkpoint
from asr_kd.training import phase
from asr_kd.training.development import score_development
from asr_kd.training.settings import TrainSettings
from asr_kd.training.sources import Source
from asr_kd.training.texts import check_development, check_source, check_texts
from asr_kd.training.trainer import train
from asr_kd.units import Units, learn_units
from tests.training.conftest import FEATURES, sample, write_audio

Job = Callable[..., TrainSettings]


def development_set(folder: Path, texts: list[str]) -> str:
    """Utterances of "ab" that are said to be these texts, in two shards."""
    samples = [sample(f"d{number}", "ab", number) for number in range(len(texts))]
    for one, text in zip(samples, texts, strict=True):
        one.fields["text"] = text
    return write_audio(folder, [samples[:1], samples[1:]])


def test_another_case_is_refused_before_the_first_step(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phase, "step", lambda *_: pytest.fail("work before the message"))
    folder = development_set(tmp_path / "dev", ["ab", "AB", "BAB", "b"])
    with pytest.raises(UserError) as caught:
        train(job(development=folder))
    assert str(caught.value) == (
        f"{folder}: the texts of 2 of 4 utterances (50.0%; first: d1) hold characters that no unit covers: 'B', 'A'; the units know "
        "small letters alone: prepare this set again with normalizer=basic, or raise max_bad_share (0.01)"
    )
    assert not Path(job().output).exists()


@pytest.mark.parametrize(
    ("texts", "remedy"),
    [
        (["AB", "b"], r"small letters alone: prepare this set again"),
        (
            ["аб", "ab"],
            r"hold characters that no unit covers: 'а', 'б'; write them as the texts that the units were made",
        ),
        (["a,", "c."], r"2 of 2 utterances .*: ',', 'c', '\.'; write them as"),
    ],
)
def test_what_cannot_be_written_is_named(job: Job, units: Units, tmp_path: Path, texts: list[str], remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        check_development(job(development=development_set(tmp_path / "dev", texts)), units)


def test_nothing_that_can_be_scored_is_refused_whatever_may_be_bad(job: Job, units: Units, tmp_path: Path) -> None:
    for name, texts, said in [
        ("other", ["AB", "A"], r"other: the texts of 2 of 2 utterances .* with normalizer=basic$"),
        ("silent", ["", "  "], r"silent: holds no words; the development set must be labelled"),
    ]:
        with pytest.raises(UserError, match=said):
            check_development(job(development=development_set(tmp_path / name, texts), max_bad_share=1.0), units)
    folder = development_set(tmp_path / "source", [" ", "ab"])  # the first shard
    assert check_source(source_of(job(source={**CTC, "audio": folder}), units)) == [
        f"{folder}: none of the 1 texts looked at holds a word; only silence is learned from them"
    ]


def test_units_of_capitals_say_so(job: Job, tmp_path: Path) -> None:
    folder = development_set(tmp_path / "dev", ["ab", "ba"])
    with pytest.raises(UserError, match="the units know capitals alone"):
        check_development(job(development=folder), learn_units(["AB BA"] * 5, "char", 10))


def test_a_little_is_a_warning_that_counts(job: Job, units: Units, tmp_path: Path) -> None:
    folder = development_set(tmp_path / "dev", ["ab", "a\u00adb", "abX", "ba"])
    assert check_development(job(development=folder, max_bad_share=0.25), units) == [
        f"{folder}: the texts of 1 of 4 utterances (25.0%; first: d2) hold characters that no unit covers: 'X'; their words count as errors",
        f"{folder}: 1 of 4 texts are read in another spelling (first: d1: 'a\\xadb' is read as 'ab')",
    ]


def test_a_set_that_the_units_write_as_it_stands_is_not_mentioned(job: Job, units: Units, development: str) -> None:
    assert check_development(job(), units) == []


def test_a_spelling_that_the_units_change_is_no_error(
    job: Job, units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is what the network says, not how the text was typed."""

    def perfect(_: Checkpoint, features: list[np.ndarray]) -> list[torch.Tensor]:
        path = [one for unit in units.encode("ab") for one in (unit, units.blank)]
        return [torch.log(torch.eye(units.size)[path] + 1e-6) for _ in features]

    monkeypatch.setattr(acoustic, "log_posteriors", perfect)
    network = acoustic.build_model(job().model, FEATURES.dimension, units.size)
    learner = Checkpoint(network, units, FEATURES, job().model, "")
    for number, text in enumerate(("ab", "a\u200db", "a\u00adb", "a\ufeffb", " ab ")):
        folder = development_set(tmp_path / str(number), [text, "ab"])
        assert score_development(job(development=folder), learner).wer == 0
    wrong = development_set(tmp_path / "wrong", ["ab", "aX", "b a"])
    assert score_development(job(development=wrong), learner).wer == 3 / 4


CTC = {"ctc": 1.0, "soft": 0.0, "targets": None}


def source_of(settings: TrainSettings, units: Units) -> Source:
    return Source(settings, 0, 0, units)


def test_a_source_is_looked_at_before_the_first_step(
    job: Job, units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phase, "step", lambda *_: pytest.fail("work before the message"))
    folder = development_set(tmp_path / "audio", ["AB", "ab", "ab", "ab"])  # all of the first shard
    message = r"audio: the texts of 1 of 1 utterances \(100.0%; first: d0\) .*small letters alone"
    with pytest.raises(UserError, match=message):
        train(job(source={**CTC, "audio": folder}, max_bad_share=0.9))
    assert check_source(source_of(job(source={**CTC, "audio": folder}, max_bad_share=1.0), units)) == [
        f"{folder}: the texts of 1 of 1 utterances (100.0%; first: d0) hold characters that no unit covers: 'A', 'B'; "
        "these utterances are left out"
    ]


def test_a_source_of_some_odd_texts_says_so(job: Job, units: Units, tmp_path: Path) -> None:
    samples = [sample(f"d{number}", "ab", number) for number in range(5)]
    for one, text in zip(samples, ["ab", "a\u200db", "X", "ab", "ab"], strict=True):
        one.fields["text"] = text
    folder = write_audio(tmp_path / "audio", [samples])
    odd = f"{folder}: the texts of 1 of 5 utterances (20.0%; first: d2) hold characters that no unit covers: 'X'"
    assert check_source(source_of(job(source={**CTC, "audio": folder}, max_bad_share=0.2), units)) == [
        f"{odd}; these utterances are left out",
        f"{folder}: 1 of 5 texts are read in another spelling (first: d1: 'a\\u200db' is read as 'ab')",
    ]
    with pytest.raises(UserError, match=r"first: d2\) hold characters that no unit covers: 'X'; write them as"):
        check_source(source_of(job(source={**CTC, "audio": folder}, max_bad_share=0.19), units))


def test_transcripts_are_looked_at_in_place_of_the_texts(job: Job, units: Units, audio: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"key": "u{number}", "text": "ab,"}}\n' for number in range(3)))
    settings = job(source={**CTC, "audio": audio, "transcripts": str(texts)}, max_bad_share=0.5)
    with pytest.raises(UserError, match=r"texts.jsonl: the texts of 3 of 3 utterances .*: ','; write them as"):
        check_source(source_of(settings, units))


def test_every_source_is_looked_at_once_and_those_of_soft_targets_alone_are_not(
    job: Job, units: Units, tmp_path: Path
) -> None:
    folder = development_set(tmp_path / "audio", ["a\u200db", "ab"])
    source = source_of(job(source={**CTC, "audio": folder}), units)
    assert len(check_texts(job(), units, [source, source])) == 1
    capitals = development_set(tmp_path / "soft", ["AB"])
    assert check_texts(job(), units, [source_of(job(source={"audio": capitals}), units)]) == []
