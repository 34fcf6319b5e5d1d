from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from asr_kd.audio.decode import decode
from asr_kd.shards.manifest import read_transcripts
from asr_kd.shards.tarset import Sample, read_checked, read_index, read_members, write_index, write_shard

SPLITS = {"test": range(5), "development": range(5, 10), "labelled": range(10, 14), "unlabelled": range(14, 18)}
WORDS = ("zero", "one", "two")
STEP = 590  # of height from one recording to the next: more than twice the noise floor
SMALL = ["--test", "0.5", "--development", "0.4", "--labelled", "0.4", "--unlabelled", "2"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "pipelines" / "digits" / "compose.py"
    spec = importlib.util.spec_from_file_location("digits_compose", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits_compose"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, script: ModuleType) -> Path:
    """Recordings of constant samples, whose height tells take and word."""
    folder = tmp_path_factory.mktemp("source")
    infos = []
    for number, speaker in enumerate(("ann", "bob")):
        samples = [
            Sample(
                f"{word}-{speaker}-{take}",
                script.to_wav(np.full(1200, STEP * (1 + 3 * take + index), np.int16)),
                "wav",
                {"text": WORDS[index], "speaker": speaker, "take": take, "seconds": 0.15},
            )
            for index, word in enumerate(WORDS)
            for take in range(18)
        ]
        infos.append(write_shard(folder / f"shard-{number:06d}.tar", samples))
    write_index(folder, infos)
    return folder


@pytest.fixture(scope="module")
def composed(source: Path, script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("composed") / "data"
    assert script.main(["--source", str(source), "--output", str(output), *SMALL]) == 0
    return output


def samples_of(folder: Path) -> list[Sample]:
    samples = []
    for info in read_index(folder):
        samples += read_checked(folder, info)
    return samples


def heard(sample: Sample) -> list[tuple[int, str]]:
    """(take, word) of every recording in a string, from the height of its samples."""
    waveform, rate = decode(sample.audio, sample.key, None, 60)
    assert rate == 8000 and sample.fields["seconds"] == pytest.approx(len(waveform) / rate, abs=1e-4)
    heights = np.round(waveform * 32768 / STEP).astype(int)
    runs = np.split(heights, np.flatnonzero(np.diff(heights)) + 1)
    # recordings that follow each other without a pause, from the same take and word, make one longer run
    found = [(int(run[0]), round(len(run) / 1200)) for run in runs if run[0]]
    return [((height - 1) // 3, WORDS[(height - 1) % 3]) for height, times in found for _ in range(times)]


def test_no_recording_is_in_two_sets_and_the_text_is_what_is_heard(composed: Path) -> None:
    oracle = read_transcripts(composed / "unlabelled-oracle.jsonl")
    for name, takes in SPLITS.items():
        counts: dict[tuple[str, int, str], int] = {}
        for sample in samples_of(composed / name):
            recordings = heard(sample)
            assert 3 <= len(recordings) <= 7
            text = oracle[sample.key] if name == "unlabelled" else sample.fields["text"]
            assert [word for _, word in recordings] == text.split()
            for take, word in recordings:
                assert take in takes
                place = (sample.fields["speaker"], take, word)
                counts[place] = counts.get(place, 0) + 1
        assert len(counts) == 2 * len(takes) * len(WORDS)
        for speaker in (
            "ann",
            "bob",
        ):  # each recording of a speaker is used as often as the others, a round more or less
            uses = [count for place, count in counts.items() if place[0] == speaker]
            assert max(uses) - min(uses) <= 2


def test_unlabelled_shards_hold_no_text(composed: Path) -> None:
    samples = samples_of(composed / "unlabelled")
    assert read_transcripts(composed / "unlabelled-oracle.jsonl").keys() == {sample.key for sample in samples}
    for number, sample in enumerate(samples):
        assert sample.key == f"unlabelled-{number:05d}"
        assert sample.fields.keys() == {"seconds", "speaker"}
    for info in read_index(composed / "unlabelled"):
        for name, data in read_members(composed / "unlabelled" / info.name):
            written = name.encode() if name.endswith(".wav") else name.encode() + data
            assert not any(word.encode() in written for word in WORDS)


def test_sizes_and_nested_subsets(composed: Path) -> None:
    minutes = {name: sum(info.seconds for info in read_index(composed / name)) / 60 for name in SPLITS}
    wanted = {"test": 0.5, "development": 0.4, "labelled": 0.4, "unlabelled": 2.0}
    assert all(wanted[name] <= minutes[name] < wanted[name] + 0.1 for name in wanted)
    whole = read_index(composed / "unlabelled")
    assert len(whole) == 8
    for name, shards in (("quarter", 2), ("half", 4)):
        folder = composed / f"unlabelled-{name}"
        assert read_index(folder) == whole[:shards]
        assert samples_of(folder)


def test_the_test_set_in_conditions(composed: Path, script: ModuleType) -> None:
    clean = samples_of(composed / "test")
    by_condition: dict[str, list[Sample]] = {}
    for sample in samples_of(composed / "test-conditions"):
        by_condition.setdefault(sample.fields["condition"], []).append(sample)
    assert tuple(by_condition) == script.CONDITIONS
    for condition, samples in by_condition.items():
        for plain, sample in zip(clean, samples, strict=True):
            assert sample.fields == {**plain.fields, "condition": condition}
            assert (sample.audio == plain.audio) == (condition == "clean")
            before, after = (decode(one.audio, one.key, None, 60)[0] for one in (plain, sample))
            assert len(before) == len(after)


def test_same_seed_same_bytes(source: Path, script: ModuleType, composed: Path, tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    arguments = ["--source", str(source), *SMALL]
    assert script.main([*arguments, "--output", str(tmp_path / "again")]) == 0
    assert content(tmp_path / "again") == content(composed)
    assert script.main([*arguments, "--output", str(tmp_path / "other"), "--seed", "1"]) == 0
    assert content(tmp_path / "other")["test/shard-000000.tar"] != content(composed)["test/shard-000000.tar"]


def test_by_the_grammar_a_digit_leaves_two_for_the_next_all_equally_often(script: ModuleType) -> None:
    recordings = [
        script.Recording(np.zeros(800, np.int16), word, speaker, take)
        for speaker in ("ann", "bob") for word in script.DIGITS for take in range(3)
    ]  # fmt: skip
    strings = script.strings_of_digits(recordings, 4, np.random.default_rng(0), grammar=True)
    texts = [text.split() for _, text, _ in strings]
    pairs = [pair for text in texts for pair in itertools.pairwise(text)]
    assert len(pairs) > 300 and all(second in script.GRAMMAR[first] for first, second in pairs)
    assert set(pairs) == {(first, second) for first, some in script.GRAMMAR.items() for second in some}
    shares = Counter(word for text in texts for word in text)
    assert max(shares.values()) < 1.5 * min(shares.values())


def test_a_grammar_needs_every_digit(
    source: Path, tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        script.main(["--source", str(source), "--output", str(tmp_path / "data"), *SMALL, "--strings", "grammar"]) == 2
    )
    assert "--strings grammar: ann has no recording of eight; compose random strings" in capsys.readouterr().err


def test_the_bytes_are_the_same_everywhere(composed: Path) -> None:
    expected = {
        "test": "28bd875c85ade4bb",
        "development": "b927feadc044845f",
        "labelled": "5c39abfb69a6a4b2",
        "unlabelled": "0ce12ebe3333a552",
        "test-conditions": "e6857b1e1f8a0aba",
    }
    assert {name: read_index(composed / name).hash for name in expected} == expected


def test_a_killed_composition_is_made_good(source: Path, script: ModuleType, composed: Path, tmp_path: Path) -> None:
    arguments = ["--source", str(source), *SMALL, "--output", str(tmp_path / "data")]
    assert script.main(arguments) == 0
    (tmp_path / "data" / "unlabelled" / "index.json").unlink()
    (tmp_path / "data" / "unlabelled" / "shard-000003.tar").write_bytes(b"")
    assert script.main(arguments) == 0
    assert samples_of(tmp_path / "data" / "unlabelled") == samples_of(composed / "unlabelled")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "missing"], "no such folder of shards"),
        (["--test", "0"], "--test: 0 minutes cannot be composed"),
        (["--unlabelled", "nan"], "--unlabelled: nan minutes cannot be composed"),
    ],
)
def test_mistakes_are_named(
    source: Path,
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert script.main(["--source", str(source), "--output", str(tmp_path / "data"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_other_settings_are_refused(
    source: Path, script: ModuleType, composed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--source", str(source), "--output", str(composed), *SMALL, "--seed", "9"]) == 2
    assert "belongs to other settings (seed was 0, now 9)" in capsys.readouterr().err


def test_recordings_without_a_take_are_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = Sample(
        "a", script.to_wav(np.ones(100, np.int16)), "wav", {"text": "one", "speaker": "ann", "seconds": 0.1}
    )
    write_index(tmp_path, [write_shard(tmp_path / "shard-000000.tar", [sample])])
    assert script.main(["--source", str(tmp_path), "--output", str(tmp_path / "data")]) == 2
    assert "shard-000000.tar: a has no 'take'" in capsys.readouterr().err


def test_the_embedded_recordings_are_whole() -> None:
    folder = Path(__file__).parents[2] / "data_manifests" / "digits"
    seen: dict[tuple[str, str], set[int]] = {}
    for sample in samples_of(folder):
        assert sample.audio[:4] == b"fLaC"
        seen.setdefault((sample.fields["speaker"], sample.fields["text"]), set()).add(sample.fields["take"])
    assert len(seen) == 50 and all(takes == set(range(50)) for takes in seen.values())
    assert json.loads((folder / "index.json").read_text())["version"] == 1
