from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asr_kd.config.load import build
from asr_kd.errors import UserError
from asr_kd.selection.evidence import disagreement, heard
from asr_kd.selection.job import select
from asr_kd.selection.settings import SelectionSettings
from asr_kd.shards.manifest import write_transcripts
from asr_kd.shards.tarset import read_index, read_shard
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.units import Units
from tests.training.conftest import sample, soft_target, write_audio, write_targets

Chooser = Callable[..., dict[str, dict[str, Any]]]
TEXTS = {"u0": "ab", "u1": "ba", "u2": "a", "u3": "b", "u4": "abb", "u5": "bab", "u6": "aa", "u7": "bb", "u8": "aba", "u9": "bba"}  # fmt: skip


@pytest.fixture
def choose(audio: str, tmp_path: Path) -> Chooser:
    """The list of a job on the tones, by key."""

    def run(**changes: Any) -> dict[str, dict[str, Any]]:
        output = tmp_path / "list.jsonl"
        select(SelectionSettings.model_validate({"audio": audio, "output": str(output), **changes}))
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        return {line["key"]: line for line in lines}

    return run


def kept(lines: dict[str, dict[str, Any]]) -> set[str]:
    return {key for key, line in lines.items() if line["kept"]}


def texts(path: Path, **changes: str) -> str:
    """Transcripts of the tones, a word a letter, some of them changed."""
    write_transcripts(path, ((key, " ".join(changes.get(key, text))) for key, text in TEXTS.items()))
    return str(path)


def test_without_criteria_all_are_listed_and_kept(
    choose: Chooser, audio: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in Path(audio).iterdir()}
    lines = choose()
    assert kept(lines) == set(TEXTS)
    assert lines["u0"] == {"key": "u0", "kept": True, "set": read_index(audio).hash, "shard": "shard-000000.tar", "seconds": 1.2}  # fmt: skip
    assert "10 of 10 utterances are kept, 0.00 of 0.00 hours\n" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in Path(audio).iterdir()} == before


def test_same_input_gives_same_bytes(choose: Chooser, targets: str, tmp_path: Path) -> None:
    choose(targets=targets, share=0.5, by="random", seed=3)
    first = (tmp_path / "list.jsonl").read_bytes()
    choose(targets=targets, share=0.5, by="random", seed=3)
    assert (tmp_path / "list.jsonl").read_bytes() == first
    choose(targets=targets, share=0.5, by="random", seed=4)
    assert (tmp_path / "list.jsonl").read_bytes() != first


def test_confidence_is_that_of_the_peaks_of_spikes(units: Units) -> None:
    """Against the definition: of two spikes, of two frames and of one, those that are least blank."""
    a, b = units.encode("a")[-1], units.encode("b")[-1]
    frames = [{0: 1.0}, {0: 0.7, a: 0.2, b: 0.1}, {0: 0.1, a: 0.6, b: 0.3}, {0: 1.0}, {0: 0.4, b: 0.6}, {0: 1.0}]
    dense = np.full((len(frames), units.size), 1e-12)
    for row, said in zip(dense, frames, strict=True):
        for unit, probability in said.items():
            row[unit] = probability
    target = SparsePosteriors.from_dense(np.log(dense / dense.sum(1, keepdims=True)), 3, 0.99999)
    peaks = [np.array(list(frames[index].values())) for index in (2, 4)]
    ((_, one),) = heard([("u", target)])
    assert one.confidence == pytest.approx(np.mean([math.exp((peak * np.log(peak)).sum()) for peak in peaks]), abs=1e-5)
    assert (one.spoken, one.counts) == (2, Counter({str(a): 1, str(b): 1}))


def test_silence_has_no_confidence(units: Units) -> None:
    dense = np.full((3, units.size), 0.01)
    dense[:, 0] = 1 - 0.01 * (units.size - 1)
    ((_, one),) = heard([("u", SparsePosteriors.from_dense(np.log(dense), 3))])
    assert (one.confidence, one.spoken) == (0.0, 0)


@pytest.fixture
def unsure(audio: str, units: Units, tmp_path: Path) -> str:
    """Targets of a teacher that is the surer the lower the number of an utterance; u3 has none."""
    doubts = {f"u{number}": 0.02 + 0.03 * number for number in range(10)}
    folder = write_targets(tmp_path / "unsure", audio, units, leave_out=("u3",))
    from asr_kd.targets.store import read_metadata, write_target_shard

    for info in read_index(audio):
        pairs = [
            (one.key, soft_target(one, units, doubts[one.key]))
            for one in read_shard(Path(audio) / info.name)
            if one.key != "u3"
        ]
        write_target_shard(Path(folder) / info.name, read_metadata(Path(folder) / info.name), pairs)
    return folder


def test_the_surest_are_kept_by_threshold_and_by_share(choose: Chooser, unsure: str) -> None:
    lines = choose(targets=unsure)
    values = [lines[key]["confidence"] for key in TEXTS if key != "u3"]
    assert values == sorted(values, reverse=True) and "confidence" not in lines["u3"]
    limit = lines["u4"]["confidence"]
    lines = choose(targets=unsure, confidence_at_least=limit)
    assert kept(lines) == {"u0", "u1", "u2", "u4"}
    assert lines["u5"]["reasons"] == {"confidence": f"{lines['u5']['confidence']:g} is below {limit:g}"}
    assert lines["u3"]["reasons"] == {"confidence": "not known: no target or text"}
    total = sum(line["seconds"] for line in lines.values())
    lines = choose(targets=unsure, share=0.5)
    assert kept(lines) == {"u0", "u1", "u2", "u4", "u5"}
    assert 0.4 * total < sum(lines[key]["seconds"] for key in kept(lines)) < 0.5 * total + 1e-6
    assert lines["u3"]["reasons"].keys() == {"share"}
    assert kept(choose(targets=unsure, hours=0.5 * total / 3600)) == kept(lines)


def test_a_random_choice_is_as_large_as_another_list(choose: Chooser, unsure: str, tmp_path: Path) -> None:
    best = choose(targets=unsure, share=0.5)
    (tmp_path / "list.jsonl").rename(tmp_path / "best.jsonl")
    chance = choose(by="random", like=str(tmp_path / "best.jsonl"))
    sizes = [sum(lines[key]["seconds"] for key in kept(lines)) for lines in (best, chance)]
    assert kept(chance) != kept(best) and abs(sizes[0] - sizes[1]) < 2
    assert next(line for line in chance.values() if not line["kept"])["reasons"].keys() == {"like"}


def test_thresholds_of_nothing_keep_what_is_not_known(choose: Chooser, unsure: str) -> None:
    assert kept(choose(targets=unsure, confidence_at_least=0.0, disagreement_at_most=1.0, share=1.0)) == set(TEXTS)


def test_texts_that_disagree_are_left_out_with_all_reasons(choose: Chooser, tmp_path: Path) -> None:
    one = texts(tmp_path / "one.jsonl", u6="a" * 40)
    other = texts(tmp_path / "other.jsonl", u1="bb", u4="a")
    lines = choose(transcripts=one, against=other, disagreement_at_most=0.4, pace_at_most=3.0)
    assert kept(lines) == set(TEXTS) - {"u1", "u4", "u6"}
    assert lines["u1"]["disagreement"] == 0.5 and lines["u4"]["disagreement"] == round(2 / 3, 6)
    assert lines["u6"]["reasons"].keys() == {"disagreement", "pace"}
    assert kept(choose(transcripts=one, against=other, by="disagreement", share=0.9)) & {"u4", "u6"} != {"u4", "u6"}


@pytest.mark.parametrize(
    ("one", "other", "wanted"), [("", "", 0.0), ("a", "", 1.0), ("", "a b", 1.0), ("a b c", "a c", 1 / 3)]
)
def test_disagreement_is_symmetric_and_a_share(one: str, other: str, wanted: float) -> None:
    assert disagreement(one, other) == disagreement(other, one) == pytest.approx(wanted)


def test_pace_counts_from_the_median_or_a_second(choose: Chooser, tmp_path: Path, targets: str) -> None:
    one = texts(tmp_path / "one.jsonl", u2="", u5="b" * 30)
    lines = choose(transcripts=one, pace_at_least=0.5, pace_at_most=2.0)
    assert kept(lines) == set(TEXTS) - {"u2", "u5"}
    assert lines["u2"]["pace"] == 0.0 and lines["u0"]["pace"] == round(2 / 1.2, 6)
    assert kept(choose(transcripts=one, pace_of_median=False, pace_at_most=1.5)) == {"u2", "u3"}
    # without texts spikes are counted
    assert choose(targets=targets, pace_at_least=0.1)["u0"]["pace"] == round(2 / 1.2, 6)


def test_lists_tell_how_sure_a_search_was(choose: Chooser, tmp_path: Path) -> None:
    file = tmp_path / "lists.jsonl"
    with file.open("w") as out:
        for number, (key, text) in enumerate(TEXTS.items()):
            nbest = [{"text": text, "score": -1.0}, {"text": "b", "score": -1.0 - number}]
            out.write(json.dumps({"key": key, "text": text, "nbest": nbest}) + "\n")
    lines = choose(transcripts=str(file), share=0.4)
    assert lines["u0"]["confidence"] == 0.5 and lines["u2"]["confidence"] == round(1 / (1 + math.exp(-2)), 6)
    assert kept(lines) == {"u9", "u8", "u7"}
    with pytest.raises(UserError, match="has utterances without an n-best list"):
        choose(transcripts=texts(tmp_path / "plain.jsonl"), share=0.4)


def test_a_search_that_is_sure_of_silence_is_not_sure_of_words(choose: Chooser, tmp_path: Path) -> None:
    file = tmp_path / "lists.jsonl"
    with file.open("w") as out:
        for key, text in (TEXTS | {"u0": "", "u1": ""}).items():
            nbest = [{"text": text, "score": -1.0}, *([] if key == "u1" else [{"text": "b", "score": -2.0}])]
            out.write(json.dumps({"key": key, "text": text, "nbest": nbest}) + "\n")
    lines = choose(transcripts=str(file), share=0.5)
    assert lines["u0"]["confidence"] == lines["u1"]["confidence"] == 0.0 and not {"u0", "u1"} & kept(lines)


def test_what_a_ranking_does_not_know_is_counted_and_all_of_it_refused(
    choose: Chooser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_transcripts(tmp_path / "others.jsonl", [("v0", "a b")])
    with pytest.raises(UserError, match="by: nothing is known of the variety of any utterance"):
        choose(transcripts=str(tmp_path / "others.jsonl"), by="variety", share=0.5)
    write_transcripts(tmp_path / "some.jsonl", [("u0", "a b"), ("u1", "b")])
    choose(transcripts=str(tmp_path / "some.jsonl"), by="variety", share=0.5)
    assert "; variety is not known of 8, which come last" in capsys.readouterr().out


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    audio = write_audio(tmp_path / "twice", [[sample("u0", "ab", 0)], [sample("u0", "a", 1)]])
    with pytest.raises(
        UserError, match=r"twice: u0 is the key of two utterances, in .*-000000\.tar and in .*-000001\.tar; "
    ):
        select(SelectionSettings(audio=audio, output=str(tmp_path / "list.jsonl")))


def test_no_speaker_has_more_than_his_share(tmp_path: Path) -> None:
    said = [sample(f"u{number}", "ab", number, speaker="a" if number < 6 else f"b{number}") for number in range(9)]
    audio = write_audio(tmp_path / "speakers", [said[:4], said[4:]])
    output = tmp_path / "list.jsonl"

    def of(**limits: Any) -> Counter[str]:
        select(SelectionSettings(audio=audio, output=str(output), by="random", **limits))
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        return Counter(line["speaker"] for line in lines if line["kept"])

    assert of(speaker_utterances=2) == Counter({"a": 2, "b6": 1, "b7": 1, "b8": 1})
    assert of(speaker_hours=3 * 1.2 / 3600) == Counter({"a": 3, "b6": 1, "b7": 1, "b8": 1})
    assert sum(of(speaker_utterances=1, hours=2 * 1.2 / 3600).values()) == 2


def test_variety_evens_out_what_is_heard(tmp_path: Path) -> None:
    spoken = ["aaaa"] * 8 + ["bbbb"] * 2
    audio = write_audio(
        tmp_path / "audio", [[sample(f"u{number}", text, number) for number, text in enumerate(spoken)]]
    )
    write_transcripts(tmp_path / "texts.jsonl", ((f"u{n}", " ".join(text)) for n, text in enumerate(spoken)))
    output = tmp_path / "list.jsonl"
    select(
        SelectionSettings(
            audio=audio, output=str(output), transcripts=str(tmp_path / "texts.jsonl"), by="variety", share=0.4
        )
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert Counter(spoken[int(line["key"][1:])][0] for line in lines if line["kept"]) == Counter(a=2, b=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0.5}, "by: confidence needs targets, or transcripts with n-best lists"),
        ({"share": 0.5, "hours": 1.0}, "hours and share both say how much is kept"),
        ({"share": 0.0}, "share 0 keeps nothing"),
        ({"disagreement_at_most": 0.1, "transcripts": "a"}, "disagreement_at_most needs transcripts and against"),
        ({"against": "a"}, "against is compared with transcripts"),
        ({"pace_at_least": 0.1}, "pace needs targets or transcripts"),
        ({"transcripts": "a", "pace_at_least": 2.0, "pace_at_most": 1.0}, "pace_at_most 1 is below pace_at_least 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(SelectionSettings, {"audio": "a", "output": "b", **changes}, "command line")


def test_what_cannot_be_chosen_from_is_refused(
    choose: Chooser, audio: str, targets: str, units: Units, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"none of 10 utterances would be kept, by confidence 10 \("):
        choose(targets=targets, confidence_at_least=1.0)
    with pytest.raises(UserError, match="has no `speaker`, of whom only so much may be kept"):
        choose(by="random", speaker_utterances=1)
    with pytest.raises(UserError, match="would lie among what is read"):
        select(SelectionSettings(audio=audio, output=f"{audio}/list.jsonl"))
    aligned = write_targets(tmp_path / "aligned", audio, units, selection={"mode": "alignment"})
    with pytest.raises(UserError, match="mode alignment does not say how sure the teacher was"):
        choose(targets=aligned)
    other = write_audio(tmp_path / "other", [list(read_shard(Path(audio) / "shard-000001.tar"))])
    with pytest.raises(UserError, match="answers an audio shard with SHA-256"):
        choose(audio=other, targets=targets)
    assert not (tmp_path / "list.jsonl").exists()
