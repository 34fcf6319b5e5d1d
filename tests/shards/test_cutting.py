"""Long recordings through `prepare`, cut at their pauses."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from pydantic import ValidationError

from asr_kd.audio.decode import decode
from asr_kd.decoding.aligning import Said
from asr_kd.errors import AudioError, UserError
from asr_kd.shards import cutting
from asr_kd.shards.prepare import prepare
from asr_kd.shards.settings import PrepareSettings
from asr_kd.shards.tarset import Sample, read_index, read_shard

RATE = 8000
DIGITS = Path(__file__).parents[2] / "data_manifests" / "digits"
Job = Callable[..., PrepareSettings]
Dying = Callable[[int], AbstractContextManager[None]]


def spoken(seed: int, count: int = 8) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Embedded digits of one speaker with pauses of 0.8 to 1.5 s around them and noise 60 dB below full scale; and where each is."""
    rng = np.random.default_rng(seed)
    samples = list(read_shard(DIGITS / f"shard-{seed % 5:06d}.tar"))
    pieces, places, at = [], [], 0
    for index in rng.integers(len(samples), size=count):
        sound, _ = decode(samples[index].audio, "a", RATE, 10.0)
        pause = int(RATE * rng.uniform(0.8, 1.5))
        pieces += [np.zeros(pause), 0.3 * sound / np.abs(sound).max()]
        places.append(((at + pause) / RATE, (at + pause + len(sound)) / RATE))
        at += pause + len(sound)
    whole = np.concatenate([*pieces, np.zeros(RATE)])
    return whole + rng.normal(0, 0.001, len(whole)), places


@pytest.fixture
def loadable() -> dict[str, Any]:
    """Aligners by their names, of which none are there at first."""
    return {}


@pytest.fixture
def job(tmp_path: Path, loadable: dict[str, Any]) -> Job:
    """Prepare these lines with the energy detector, unless other settings are given."""

    def make(*lines: dict[str, Any], segment: dict[str, Any] | None = None, **changes: object) -> PrepareSettings:
        (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        values = {"manifest": str(tmp_path / "list.jsonl"), "output": str(tmp_path / "shards")}
        cut = {"segment": {"detector": "energy", "recordings_per_shard": 2, **(segment or {})}}
        settings = PrepareSettings.model_validate(values | cut | changes)
        prepare(settings, lambda name: loadable[name])
        return settings

    return make


def samples_of(settings: PrepareSettings) -> list[Sample]:
    return [one for info in read_index(settings.output) for one in read_shard(Path(settings.output) / info.name)]


def quarantined(settings: PrepareSettings) -> dict[str, dict[str, Any]]:
    lines = map(json.loads, (Path(settings.output) / "quarantine.jsonl").read_text().splitlines())
    return {line["key"]: line for line in lines}


def tree(folder: str | Path) -> dict[str, bytes]:
    """All that must be the same whoever worked, and however often."""
    paths = (
        path for path in Path(folder).rglob("*") if path.is_file() and path.name not in ("timing.json", "summary.json")
    )
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


DETECTORS = [
    "energy",
    pytest.param(
        "silero",
        marks=pytest.mark.skipif(
            not importlib.util.find_spec("silero_vad") or not importlib.util.find_spec("onnxruntime"),
            reason="needs asr-kd[vad]",
        ),
    ),
]


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("seed", range(3))
def test_every_digit_is_in_an_utterance_and_most_of_the_pauses_in_none(
    job: Job, tmp_path: Path, detector: str, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, places = spoken(seed)
    soundfile.write(tmp_path / "talk.wav", sound, RATE)
    whole, _ = soundfile.read(tmp_path / "talk.wav", dtype="int16")
    settings = job({"audio": "talk.wav", "speaker": "x", "seconds": 99}, segment={"detector": detector})
    samples = samples_of(settings)
    spans = [(one.fields["source_start"], one.fields["source_end"]) for one in samples]
    rest = whole.astype(float) ** 2
    for start, end in spans:
        rest[round(start * RATE) : round(end * RATE)] = 0
    for start, end in places:  # by its energy: some recordings of digits begin or end in silence
        here = slice(round(start * RATE), round(end * RATE))
        assert rest[here].sum() < 0.02 * (whole[here].astype(float) ** 2).sum()
    kept = sum(end - start for start, end in spans)
    assert kept < sum(end - start for start, end in places) + 0.7 * len(places) < 0.9 * len(whole) / RATE
    assert all(left[1] <= right[0] for left, right in pairwise(spans))
    for sample, (start, end) in zip(samples, spans, strict=True):
        assert sample.key == f"talk-{round(100 * start):07d}-{round(100 * end):07d}"
        found, rate = soundfile.read(io.BytesIO(sample.audio), dtype="int16")
        assert rate == RATE and sample.fields["seconds"] == pytest.approx(len(found) / RATE, abs=1e-6)
        assert sample.fields["speaker"] == "x" and "text" not in sample.fields
        np.testing.assert_array_equal(found, whole[round(start * RATE - 0.25) :][: len(found)])
    said = capsys.readouterr().out
    hours = [f"{seconds / 3600:.3f} h" for seconds in (len(whole) / RATE, kept, len(whole) / RATE - kept)]
    assert f"1 lines in = 1 used + 0 quarantined\n{len(samples)} utterances written; 1 recordings cut: " in said
    assert f"{hours[0]} heard = {hours[1]} written + {hours[2]} left out in {len(samples) + 1} pauses" in said


def test_nothing_is_lost_between_what_is_written_and_what_is_left_out(job: Job, tmp_path: Path) -> None:
    lines = []
    for seed in range(5):
        soundfile.write(tmp_path / f"r{seed}.flac", spoken(seed, count=4)[0], RATE)
        lines.append({"audio": f"r{seed}.flac"})
    settings = job(*lines, segment={"max_seconds": 1.0, "min_pause": 0.1})
    records = sorted((Path(settings.output) / ".records").glob("shard-*.json"))
    for path, some in zip(records, (lines[:2], lines[2:4], lines[4:]), strict=True):
        account = json.loads(path.read_text())["segments"]
        shard = Path(settings.output) / f"{path.stem}.tar"
        assert account["recordings"] == len(some)
        assert account["heard"] == pytest.approx(sum(soundfile.info(tmp_path / one["audio"]).duration for one in some))
        assert account["heard"] == pytest.approx(account["written"] + account["left_out"], abs=1e-5)
        assert account["written"] == pytest.approx(
            sum(one.fields["seconds"] for one in read_shard(shard)), abs=1e-4 * 50
        )
    assert max(sample.fields["seconds"] for sample in samples_of(settings)) <= 1.0


def test_other_rates_channels_and_kinds_are_cut_at_the_same_places(job: Job, tmp_path: Path) -> None:
    import soxr

    sound, _ = spoken(0, count=5)
    fast = soxr.resample(sound, RATE, 44100)
    soundfile.write(tmp_path / "a.wav", sound, RATE)
    soundfile.write(tmp_path / "b.flac", np.stack([0.5 * fast, 1.5 * fast], axis=1), 44100)
    soundfile.write(tmp_path / "c.mp3", fast, 44100, format="MP3")
    samples = samples_of(job({"audio": "a.wav"}, {"audio": "b.flac"}, {"audio": "c.mp3"}, sample_rate=16000))
    found = {
        name: [one.fields["source_start"] for one in samples if one.key.startswith(name)] for name in ("a-", "b-", "c-")
    }
    assert len(found["a-"]) == 5
    for name, atol in (("b-", 0.001), ("c-", 0.1)):
        np.testing.assert_allclose(found[name], found["a-"], atol=atol)
    assert {soundfile.info(io.BytesIO(one.audio)).samplerate for one in samples} == {16000}
    assert {soundfile.info(io.BytesIO(one.audio)).channels for one in samples} == {1}


def test_a_part_of_a_recording_is_cut_as_a_file_of_its_own(job: Job, tmp_path: Path) -> None:
    """With times that count from the recording's beginning."""
    sound, _ = spoken(1)
    soundfile.write(tmp_path / "a.wav", sound, RATE)
    soundfile.write(tmp_path / "part.wav", sound[2 * RATE : 9 * RATE], RATE)
    settings = job({"audio": "a.wav", "start": 2, "duration": 7, "key": "a"}, {"audio": "part.wav", "key": "b"})
    samples = samples_of(settings)
    here, there = ([one for one in samples if one.key[0] == name] for name in "ab")
    assert len(here) == len(there) > 3
    for one, other in zip(here, there, strict=True):
        assert one.audio == other.audio
        for name in ("source_start", "source_end"):
            assert one.fields[name] == pytest.approx(other.fields[name] + 2)
        assert one.key == f"a-{round(100 * one.fields['source_start']):07d}-{round(100 * one.fields['source_end']):07d}"
        assert "start" not in one.fields and "duration" not in one.fields


def test_what_has_a_text_stays_whole_unless_the_text_is_dropped(job: Job, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", spoken(2, count=3)[0], RATE)
    lines = (
        {"audio": "a.wav", "key": "whole", "text": "one two three"},
        {"audio": "a.wav", "key": "part", "text": "one", "end": 2.0},
        {"audio": "a.wav", "key": "cut"},
    )
    samples = samples_of(job(*lines))
    assert [one.key for one in samples[:2]] == ["whole", "part"] and samples[0].fields["text"] == "one two three"
    assert len(samples) == 5 and all(one.key.startswith("cut-") for one in samples[2:])
    dropped = samples_of(job(*lines, drop_text=True, output=str(tmp_path / "dropped")))
    assert {one.key.partition("-")[0] for one in dropped} == {"whole", "part", "cut"} and len(dropped) > 6


def test_a_key_that_a_cut_utterance_might_get_is_refused(job: Job, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", spoken(2, count=3)[0], RATE)
    lines = (
        {"audio": "a.wav", "key": "a-0000078-0000150", "text": "one"},
        {"audio": "a.wav", "key": "a"},
        {"audio": "a.wav", "key": "x" * 190},
        {"audio": "a.wav", "key": "b-0000078-0000150"},
    )
    settings = job(*lines, max_bad_share=0.5)
    found = quarantined(settings)
    assert found.keys() == {"a-0000078-0000150", "x" * 190}
    assert "its key ends as keys of utterances do that are cut" in found["a-0000078-0000150"]["reason"]
    assert "is longer than 200 bytes" in found["x" * 190]["reason"]


def test_silence_is_quarantined_and_fails_no_job(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "a.wav", spoken(2, count=3)[0], RATE)
    soundfile.write(tmp_path / "zeros.wav", np.zeros(3 * RATE), RATE)
    soundfile.write(tmp_path / "hiss.wav", np.random.default_rng(0).normal(0, 0.1, 3 * RATE), RATE)
    lines = [{"audio": f"{name}.wav"} for name in ("zeros", "a", "hiss")]
    settings = job(*lines, max_bad_share=0.0)
    found = quarantined(settings)
    assert found.keys() == {"zeros", "hiss"} and all(one["silent"] for one in found.values())
    assert (
        "zeros.wav: no speech was heard in its 3.0 s (segment.detector energy, threshold 0.5); lower"
        in found["zeros"]["reason"]
    )
    assert len(samples_of(settings)) == 3
    said = capsys.readouterr().out
    assert "3 lines in = 1 used + 2 quarantined (2 of them without speech)" in said and "3 recordings cut: " in said
    with pytest.raises(UserError, match=r"list\.jsonl: none of 2 utterances can be used \(first: zeros: .*no speech"):
        job(lines[0], lines[2], max_bad_share=1.0, output=str(tmp_path / "none"))
    assert not (tmp_path / "none" / "index.json").exists()


def test_what_cannot_be_read_to_its_end_gives_no_utterance_and_counts(job: Job, tmp_path: Path) -> None:
    sound, _ = spoken(0, count=12)
    soundfile.write(tmp_path / "good.wav", sound, RATE)
    soundfile.write(tmp_path / "torn.flac", sound, RATE)
    data = (tmp_path / "torn.flac").read_bytes()
    (tmp_path / "torn.flac").write_bytes(data[: len(data) * 3 // 4])
    soundfile.write(tmp_path / "odd.wav", np.stack([sound, -sound], axis=1), RATE)
    soundfile.write(tmp_path / "two.wav", np.stack([sound, sound], axis=1), RATE)
    lines = (
        {"audio": "good.wav"}, {"audio": "torn.flac"}, {"audio": "odd.wav"}, {"audio": "none.wav"}, {"audio": "good.wav", "key": "late", "start": 90},
        {"audio": "two.wav", "channel": 1},
    )  # fmt: skip
    settings = job(*lines, max_bad_share=0.9)
    assert all(one.key.startswith("good-") for one in samples_of(settings))
    found = {key: one["reason"] for key, one in quarantined(settings).items()}
    for key, reason in (("torn", "torn.flac: "), ("odd", "channels cancel out"), ("none", "no such audio file"), ("late", "is empty; it must end after it starts"), ("two", "their mean")):  # fmt: skip
        assert reason in found[key]
    assert len(found) == 5 and not any("silent" in one for one in quarantined(settings).values())
    with pytest.raises(UserError, match=r"5 of 6 utterances cannot be used, more than max_bad_share 0\.8"):
        job(*lines, max_bad_share=0.8)


def test_a_recording_is_decoded_once_to_listen_and_once_to_write(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(tmp_path / "a.wav", spoken(1, count=20)[0], RATE)
    passes = []
    real = cutting.native_blocks
    monkeypatch.setattr(cutting, "native_blocks", lambda *rest: passes.append(1) or real(*rest))
    job({"audio": "a.wav"})
    assert len(passes) == 2


def test_a_file_that_changes_meanwhile_ends_the_job(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound, _ = spoken(1)
    soundfile.write(tmp_path / "a.wav", sound, RATE)
    real = cutting.speech

    def shortened(*rest: Any) -> Any:
        soundfile.write(tmp_path / "a.wav", sound[: 3 * RATE], RATE)
        return real(*rest)

    with monkeypatch.context() as patched:
        patched.setattr(cutting, "speech", shortened)
        with pytest.raises(UserError, match=r"a\.wav: .*; the file changed while it was cut: start again"):
            job({"audio": "a.wav"})
    assert not list((tmp_path / "shards").glob("*.tar"))
    assert len(samples_of(job({"audio": "a.wav"}))) == 2


def test_a_file_that_is_gone_meanwhile_ends_the_job(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a line in quarantine, whose seconds would count as written."""
    soundfile.write(tmp_path / "b.wav", spoken(2)[0], RATE)
    soundfile.write(tmp_path / "a.wav", spoken(1)[0], RATE)
    real = cutting.speech

    def removed(*rest: Any) -> Any:
        (tmp_path / "a.wav").unlink(missing_ok=True)
        return real(*rest)

    monkeypatch.setattr(cutting, "speech", removed)
    with pytest.raises(UserError, match=r"a\.wav: No such file or directory; the file changed while it was cut: start"):
        job({"audio": "a.wav"}, {"audio": "b.wav"}, max_bad_share=0.5)
    assert not (tmp_path / "shards" / "index.json").exists()


def test_workers_leave_no_copies_of_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are killed when the work is done, and what lies in a tar is cut from a copy."""
    (tmp_path / "copies").mkdir()
    soundfile.write(tmp_path / "a.wav", spoken(1)[0], RATE)
    with tarfile.open(tmp_path / "talks.tar", "w") as file:
        file.add(tmp_path / "a.wav", "a.wav")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "copies"))
    values = {"manifest": str(tmp_path / "talks.tar"), "output": str(tmp_path / "shards"), "workers": 2}
    prepare(PrepareSettings.model_validate({**values, "segment": {"detector": "energy"}}))
    assert len(read_index(tmp_path / "shards")) == 1
    assert not list((tmp_path / "copies").iterdir())


def test_killed_at_every_publish(job: Job, tmp_path: Path, dying_at_publish: Dying) -> None:
    for seed in range(4):
        soundfile.write(tmp_path / f"r{seed}.flac", spoken(seed, count=3)[0] * (seed != 1), RATE)
    lines = [{"audio": f"r{seed}.flac"} for seed in range(4)]
    settings = job(*lines, segment={"recordings_per_shard": 1})
    expected = tree(settings.output)
    for stop in range(len(expected)):
        output = str(tmp_path / f"killed-{stop}")
        with dying_at_publish(stop):
            job(*lines, segment={"recordings_per_shard": 1}, output=output)
        assert not (Path(output) / "index.json").exists()
        job(*lines, segment={"recordings_per_shard": 1}, output=output)
        assert tree(output) == expected


@pytest.mark.parametrize("detector", DETECTORS)
def test_workers_cut_as_one_process_does(
    job: Job, tmp_path: Path, detector: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(4):
        soundfile.write(tmp_path / f"r{seed}.flac", spoken(seed, count=3)[0] * (seed != 1), RATE)
    lines = [{"audio": f"r{seed}.flac"} for seed in range(4)]
    chosen = {"detector": detector, "recordings_per_shard": 1}
    one = job(*lines, segment=chosen)
    said = capsys.readouterr().out
    two = job(*lines, segment=chosen, workers=2, output=str(tmp_path / "two"))
    assert tree(two.output) == tree(one.output)
    assert capsys.readouterr().out == said.replace(one.output, two.output)


def test_a_job_that_goes_on_gives_the_same_account(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        soundfile.write(tmp_path / f"r{seed}.flac", spoken(seed, count=3)[0], RATE)
    lines = [{"audio": f"r{seed}.flac"} for seed in range(3)]
    settings = job(*lines)
    first = capsys.readouterr().out
    before = tree(settings.output)
    (Path(settings.output) / "shard-000001.tar").unlink()
    job(*lines)
    assert capsys.readouterr().out == first and tree(settings.output) == before
    with pytest.raises(UserError, match=r"belongs to other settings \(segment.min_pause was 0.5, now 0.4"):
        job(*lines, segment={"min_pause": 0.4})
    with pytest.raises(UserError, match=r"belongs to other settings \(segment.recordings_per_shard was 2, now 3"):
        job(*lines, segment={"recordings_per_shard": 3})


@pytest.mark.parametrize("detector", DETECTORS[1:])
def test_another_network_is_another_job(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, detector: str
) -> None:
    soundfile.write(tmp_path / "a.wav", spoken(1, count=3)[0], RATE)
    job({"audio": "a.wav"}, segment={"detector": detector})
    monkeypatch.setattr("asr_kd.shards.prepare.silero_mark", lambda: "another")
    with pytest.raises(UserError, match=r"belongs to other settings \(segment.silero was "):
        job({"audio": "a.wav"}, segment={"detector": detector})


def test_a_missing_network_is_said_before_anything_is_written(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(tmp_path / "a.wav", spoken(1, count=3)[0], RATE)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'asr-kd\[vad\]'"):
        job({"audio": "a.wav"}, segment={"detector": "silero"})
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment": {"detector": "loud"}}, "should be 'silero' or 'energy'"),
        ({"segment": {"max_seconds": 0.5}}, "greater than or equal to 1"),
        ({"segment": {"max_seconds": 61}}, "segment.max_seconds must not be above max_seconds"),
        ({"segment": {}, "max_seconds": 20.0}, "segment.max_seconds must not be above max_seconds"),
        ({"segment": {"padding": 8}}, "padding must be at most a quarter of max_seconds"),
        ({"segment": {"min_speech": 8}}, "min_speech must be at most a quarter of max_seconds"),
        ({"segment": {"min_pause": -0.1}}, "greater than or equal to 0"),
        ({"segment": {"padding": -0.1}}, "greater than or equal to 0"),
        ({"segment": {"threshold": 0}}, "greater than 0"),
        ({"segment": {"threshold": 1}}, "less than 1"),
        ({"segment": {"recordings_per_shard": 0}}, "greater than or equal to 1"),
        ({"segment": {"longest": 3}}, "Extra inputs"),
        ({"segment": {"min_score": -1.0}}, "min_score belongs to aligner"),
        ({"segment": {"aligner": "c", "min_score": 0.5}}, "less than or equal to 0"),
        ({"segment": {}, "samples_per_shard": 7}, "set segment.recordings_per_shard"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PrepareSettings.model_validate({"manifest": "a", "output": "b", **changes})


def test_jobs_without_it_are_what_they_were() -> None:
    settings = PrepareSettings(manifest="a", output="b")
    assert "segment" not in settings.model_dump() and settings.lines_per_shard == 500


class FakeAligner:
    """Knows where the words of each text are: (word, start, end, log-probability a unit)."""

    rate, mark = 11025, "fake"

    def __init__(self, known: dict[str, list[tuple[str, float, float, float]]]) -> None:
        self.known = known
        self.heard: list[float] = []

    def align(self, blocks: Iterable[np.ndarray], text: str) -> list[Said]:
        self.heard.append(sum(map(len, blocks)) / self.rate)
        if text not in self.known:
            raise AudioError("text too long: its 9 units do not fit into 4 frames")
        return [Said(word, start, end, 3 * score, 3) for word, start, end, score in self.known[text]]


@pytest.fixture
def aligned(loadable: dict[str, Any]) -> FakeAligner:
    loadable["c"] = FakeAligner({})
    return loadable["c"]


def test_a_long_recording_with_text_is_cut_between_its_words(
    job: Job, tmp_path: Path, aligned: FakeAligner, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, places = spoken(0, count=6)
    soundfile.write(tmp_path / "a.wav", sound, RATE)
    words = [f"W{number}," for number in range(6)]
    # as CTC has them: somewhere within the sound; and two words to the last digit
    middles = [(start + 0.3 * (end - start), start + 0.6 * (end - start)) for start, end in places]
    known = [(word, *times, -0.1) for word, times in zip(words, middles, strict=True)]
    known.append(("end", middles[5][1], middles[5][1] + 0.05, -0.1))
    text = " ".join(word for word, *_ in known)
    aligned.known[text] = known
    lines = [
        {"audio": "a.wav", "text": text, "speaker": "x"},
        {"audio": "a.wav", "key": "short", "text": "W0", "end": 2.0},
    ]
    settings = job(*lines, segment={"aligner": "c", "max_seconds": 4}, normalizer="basic")
    *cut, short = samples_of(settings)
    assert [one.fields["text"] for one in cut] == ["w0", "w1", "w2", "w3", "w4", "w5 end"]
    assert (short.key, short.fields["text"]) == ("short", "w0")
    assert aligned.heard == [pytest.approx(len(sound) / RATE, abs=1e-3)]
    for one, (start, end) in zip(cut, places, strict=True):
        assert one.fields["source_start"] <= start + 0.1 and end - 0.1 <= one.fields["source_end"]
        assert one.key == f"a-{round(100 * one.fields['source_start']):07d}-{round(100 * one.fields['source_end']):07d}"
        assert one.fields["speaker"] == "x"
    said = capsys.readouterr().out
    assert "2 lines in = 2 used + 0 quarantined\n7 utterances written; 1 recordings cut: " in said
    with pytest.raises(UserError, match=r"belongs to other settings \(segment\.aligner was \"fake\", now \"new\"\)"):
        aligned.mark = "new"
        job(*lines, segment={"aligner": "c", "max_seconds": 4}, normalizer="basic")


def test_pieces_whose_text_does_not_fit_are_quarantined_and_accounted_for(
    job: Job, tmp_path: Path, aligned: FakeAligner, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, places = spoken(0, count=6)
    soundfile.write(tmp_path / "a.wav", sound, RATE)
    scores = [-0.5, -9.0, -1.0, -1.9, -2.1, -0.1]
    aligned.known["some"] = [
        (f"w{at}", *place, score) for at, (place, score) in enumerate(zip(places, scores, strict=True))
    ]
    aligned.known["bad"] = [(word, *place, -8.0) for word, *place, _ in aligned.known["some"]]
    aligned.known["one"] = [("w", places[0][0], places[-1][1], -0.1)]
    lines = [{"audio": "a.wav", "key": text, "text": text} for text in ("some", "bad", "one", "odd")]
    settings = job(*lines, segment={"aligner": "c", "max_seconds": 4}, max_bad_share=0.75)
    assert [one.fields["text"] for one in samples_of(settings)] == ["w0", "w2", "w3", "w5"]
    found = quarantined(settings)
    pieces = {key: line["reason"] for key, line in found.items() if line.get("piece")}
    assert len(pieces) == 2 and all(key.startswith("some-") for key in pieces)
    assert any(
        "its text 'w1' does not fit: -9.00 nat a unit, below segment.min_score -2" in one for one in pieces.values()
    )
    assert (
        "does not fit: -8.00 nat a unit" in found["bad"]["reason"]
        and "so are all its 6 pieces" in found["bad"]["reason"]
    )
    assert "no place between two words to cut it to segment.max_seconds 4" in found["one"]["reason"]
    assert "a.wav: its text cannot be aligned: text too long" in found["odd"]["reason"]
    said = capsys.readouterr().out
    assert "4 lines in = 1 used + 3 quarantined\n4 utterances written; 1 recordings cut: " in said
    assert "h quarantined in 2 pieces" in said
    account = json.loads(next((Path(settings.output) / ".records").glob("shard-*.json")).read_text())["segments"]
    assert account["misfits"] == 2 and account["recordings"] == 1
    parts = account["written"] + account["left_out"] + account["misfit"]
    assert account["heard"] == pytest.approx(parts, abs=1e-5) and account["heard"] == pytest.approx(len(sound) / RATE)
    job(*lines, segment={"aligner": "c", "max_seconds": 4}, max_bad_share=0.75)  # the same account of what is there
    assert capsys.readouterr().out == said


def test_a_part_with_text_is_cut_with_times_of_the_recording(job: Job, tmp_path: Path, aligned: FakeAligner) -> None:
    sound, places = spoken(1, count=6)
    soundfile.write(tmp_path / "a.wav", sound, RATE)
    start = places[1][0] - 0.75
    aligned.known["t"] = [(f"w{at}", a - start, b - start, 0.0) for at, (a, b) in enumerate(places[1:])]
    samples = samples_of(
        job({"audio": "a.wav", "text": "t", "start": start}, segment={"aligner": "c", "max_seconds": 4})
    )
    assert [one.fields["text"] for one in samples] == [f"w{at}" for at in range(5)]
    assert [one.fields["source_start"] for one in samples] == pytest.approx([a - 0.2 for a, _ in places[1:]], abs=0.1)


def test_who_can_load_no_aligner_is_told_who_can(job: Job, tmp_path: Path, aligned: FakeAligner) -> None:
    soundfile.write(tmp_path / "a.wav", spoken(1, count=3)[0], RATE)
    settings = job({"audio": "a.wav"}, segment={"aligner": "c"}, output=str(tmp_path / "others"))
    with pytest.raises(UserError, match=r"segment\.aligner: .*; call asr_kd\.decoding\.prepare\.prepare"):
        prepare(settings.model_copy(update={"output": str(tmp_path / "shards")}))
    assert not (tmp_path / "shards").exists()
