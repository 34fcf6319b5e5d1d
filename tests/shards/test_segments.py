"""Segments of recordings through `prepare`."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asr_kd.audio import recording as recording_module
from asr_kd.errors import UserError
from asr_kd.shards.prepare import prepare
from asr_kd.shards.settings import PrepareSettings
from asr_kd.shards.tarset import Sample, read_index, read_shard

RATE = 8000
SOUND = np.random.default_rng(0).integers(-9000, 9000, 4 * RATE).astype(np.int16)
Job = Callable[..., PrepareSettings]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Prepare these lines, of recordings of four seconds a.wav and b.flac."""
    soundfile.write(tmp_path / "a.wav", SOUND, RATE)
    soundfile.write(tmp_path / "b.flac", SOUND[::-1], RATE)

    def make(*lines: dict[str, Any], **changes: object) -> PrepareSettings:
        (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        values = {"manifest": str(tmp_path / "list.jsonl"), "output": str(tmp_path / "shards"), "max_bad_share": 0.9}
        settings = PrepareSettings.model_validate(values | changes)
        prepare(settings)
        return settings

    return make


def samples_of(settings: PrepareSettings) -> list[Sample]:
    return [one for info in read_index(settings.output) for one in read_shard(Path(settings.output) / info.name)]


def sound_of(sample: Sample) -> np.ndarray:
    return soundfile.read(io.BytesIO(sample.audio), dtype="int16")[0]


def test_each_segment_is_an_utterance_with_its_own_sound(job: Job) -> None:
    settings = job(
        {"audio": "a.wav", "key": "s0", "offset": 0, "duration": 1.0, "text": "seven", "speaker": "x"},
        {"audio": "a.wav", "key": "s1", "offset": 1.0, "duration": 0.5, "text": "two three"},
        {"audio": "a.wav", "start": 3, "text": "to the end"},
        {"audio": "b.flac", "end": 0.25},
    )
    samples = samples_of(settings)
    assert [sample.key for sample in samples] == ["s0", "s1", "a-3000", "b-0-250"]
    for sample, first, last in zip(samples, (0, 8000, 24000, 0), (8000, 12000, 32000, 2000), strict=True):
        whole = SOUND[::-1] if sample.key[0] == "b" else SOUND
        np.testing.assert_array_equal(sound_of(sample), whole[first:last])
    assert samples[0].fields == {
        "speaker": "x",
        "text": "seven",
        "seconds": 1.0,
        "source_start": 0.0,
        "source_end": 1.0,
    }
    assert samples[2].fields == {"text": "to the end", "seconds": 1.0, "source_start": 3.0, "source_end": 4.0}


def test_a_length_that_is_the_files_changes_nothing(job: Job, tmp_path: Path) -> None:
    settings = job(
        {"audio": "a.wav", "duration": 4.02}, {"audio": "b.flac", "offset": 0.0, "duration": 3.98, "key": "b"},
        {"audio": "a.wav", "key": "half", "duration": 2.0}, {"audio": "a.wav", "key": "said", "seconds": 99},
    )  # fmt: skip
    whole, other, half, said = samples_of(settings)
    assert whole.audio == (tmp_path / "a.wav").read_bytes() == said.audio and whole.fields == {
        "duration": 4.02,
        "seconds": 4.0,
    }
    assert other.audio == (tmp_path / "b.flac").read_bytes()
    np.testing.assert_array_equal(sound_of(half), SOUND[:16000])
    assert said.fields == {"seconds": 4.0}


def test_bounds_that_cannot_be_are_quarantined_with_their_reason(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {
        "negative": ({"start": -1, "end": 1}, "lies outside of the recording, which has 4.000 s"),
        "empty": ({"start": 1, "end": 1}, "is empty; it must end after it starts"),
        "behind": ({"start": 5, "end": 6}, "lies outside of the recording, which has 4.000 s"),
        "too far": ({"duration": 4.5}, "the segment from 0 to 4.5 s lies outside"),
        "too long": ({"start": 0.5, "end": 3.6}, "is longer than max_seconds 3; cut it or raise max_seconds"),
        "missing": ({"audio": "none.wav", "start": 0.5}, "no such audio file"),
        "folder": ({"audio": ".", "start": 0.5}, "is a folder, a pipe or a device"),
    }
    lines = [{"audio": "a.wav", "key": key, **fields} for key, (fields, _) in bad.items()]
    settings = job(*lines, {"audio": "a.wav", "start": 1, "end": 2, "key": "good"}, max_seconds=3)
    assert "8 utterances in = 1 written + 7 quarantined" in capsys.readouterr().out
    reasons = [json.loads(line) for line in (Path(settings.output) / "quarantine.jsonl").read_text().splitlines()]
    assert [one["key"] for one in reasons] == list(bad)
    for one in reasons:
        assert bad[one["key"]][1] in one["reason"]


def test_a_full_temporary_folder_is_named(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("asr_kd.shards.prepare.IN_MEMORY", 1)
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(
        UserError, match=r"no space left for segments of recordings; free some, or set TMPDIR to a larger"
    ):
        job({"audio": "a.wav", "start": 1, "end": 2})


@pytest.mark.parametrize("order", ["sorted", "shuffled", "interleaved"])
def test_a_recording_is_read_once_a_shard(job: Job, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    passes = []
    real = recording_module.native_blocks
    monkeypatch.setattr(
        recording_module, "native_blocks", lambda path, *rest: passes.append(path.name) or real(path, *rest)
    )
    lines: list[dict[str, Any]] = [
        {"audio": audio, "start": start / 10, "end": start / 10 + 0.2, "key": f"{audio[0]}{start}"}
        for audio in ("a.wav", "b.flac") for start in range(38)
    ]  # fmt: skip
    if order == "shuffled":
        lines = [lines[index] for index in np.random.default_rng(0).permutation(len(lines))]
    if order == "interleaved":
        lines = sorted(lines, key=lambda line: line["start"])
    settings = job(*lines, samples_per_shard=19, max_bad_share=0.0)
    assert len(passes) <= {"sorted": 2}.get(order, 2 * 4) and set(passes) == {"a.wav", "b.flac"}
    samples = samples_of(settings)
    assert [sample.key for sample in samples] == [line["key"] for line in lines]
    for sample in samples:
        whole, first = SOUND[::-1] if sample.key[0] == "b" else SOUND, int(sample.key[1:]) * 800
        np.testing.assert_array_equal(sound_of(sample), whole[first : first + 1600])


def test_a_killed_job_ends_in_the_same_bytes(job: Job, tmp_path: Path) -> None:
    lines = [
        {"audio": "b.flac", "start": start / 10, "end": start / 10 + 0.3, "key": f"u{start}"} for start in range(30)
    ]
    settings = job(*lines, samples_per_shard=7)
    whole = {path.name: path.read_bytes() for path in Path(settings.output).glob("[iqs]*.*")}
    for name in ("shard-000001.tar", "shard-000003.tar"):
        (Path(settings.output) / name).unlink()
    job(*lines, samples_per_shard=7)
    assert {path.name: path.read_bytes() for path in Path(settings.output).glob("[iqs]*.*")} == whole


def test_files_that_others_would_read_in_part_become_whole_ones(job: Job, tmp_path: Path) -> None:
    """Joined, or with a header that states too little: what is in the shard is plain FLAC."""
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "joined.wav").write_bytes(data * 2)
    (tmp_path / "died.wav").write_bytes(data[:40] + bytes(4) + data[44:])
    settings = job({"audio": "joined.wav"}, {"audio": "died.wav"}, {"audio": "a.wav"})
    joined, died, plain = samples_of(settings)
    assert [sample.extension for sample in (joined, died, plain)] == ["flac", "flac", "wav"]
    np.testing.assert_array_equal(sound_of(joined), np.tile(SOUND, 2))
    np.testing.assert_array_equal(sound_of(died), SOUND)
    assert plain.audio == data


def test_one_channel_of_several_is_not_their_mean(job: Job, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "two.wav", np.stack([SOUND, SOUND[::-1]], axis=1), RATE)
    settings = job(
        {"audio": "two.wav", "key": "caller", "channel": 0, "text": "seven"},
        {"audio": "two.wav", "key": "agent", "channel": 1, "start": 1, "end": 2},
        {"audio": "two.wav", "key": "both", "channel": "telephone"},
        {"audio": "a.wav", "key": "mono", "channel": 0},
    )
    assert [sample.key for sample in samples_of(settings)] == ["both", "mono"]
    reasons = [json.loads(line) for line in (tmp_path / "shards" / "quarantine.jsonl").read_text().splitlines()]
    assert [one["key"] for one in reasons] == ["caller", "agent"]
    assert all("of 2, and their mean is heard; write that channel to a file" in one["reason"] for one in reasons)
