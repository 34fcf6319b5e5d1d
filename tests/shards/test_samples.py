from __future__ import annotations

import io
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset

from asr_kd.audio.features import Frontend
from asr_kd.audio.settings import FeatureSettings
from asr_kd.errors import AudioError, UserError
from asr_kd.shards import Position, dataset
from asr_kd.shards.tarset import Sample, read_index, write_index, write_shard

ROOM = Path(__file__).parents[2] / "asr_kd" / "shards"
SIZES = (3, 1, 0, 4, 2)


def sound(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3000, 3000, 800 + 80 * seed).astype(np.int16)


def flac(seed: int) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, sound(seed), 8000, format="FLAC")
    return data.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten utterances in five shards, one of which is empty; u1 has no text."""
    path, number = tmp_path / "shards", itertools.count()
    path.mkdir()
    infos = []
    for shard, size in enumerate(SIZES):
        samples = [Sample(f"u{one}", flac(one), "flac", {"text": f"t{one}"}) for one in itertools.islice(number, size)]
        if shard == 0:
            samples[1].fields = {"speaker": "x"}
        infos.append(write_shard(path / f"shard-{shard:06d}.tar", samples))
    write_index(path, infos)
    return path


def keys(pipeline: Any) -> list[str]:
    return [sample["__key__"] for sample in pipeline]


def test_samples_hold_sound_text_and_fields_in_order(folder: Path) -> None:
    samples = list(dataset(folder))
    assert [sample["__key__"] for sample in samples] == [f"u{number}" for number in range(10)]
    for number, sample in enumerate(samples):
        np.testing.assert_allclose(sample["waveform"], sound(number) / 32768, atol=1e-6)
        assert sample["sample_rate"] == 8000
    assert (samples[1]["text"], samples[1]["fields"]) == (None, {"speaker": "x"})
    assert (samples[2]["text"], samples[2]["__url__"]) == ("t2", f"{folder}/shard-000000.tar")
    assert {sample["sample_rate"] for sample in dataset(folder, sample_rate=16000)} == {16000}
    assert next(iter(dataset(folder).compose(webdataset.to_tuple("__key__", "text")))) == ("u0", "t0")


def test_features_are_those_of_the_front_end(folder: Path) -> None:
    settings = FeatureSettings(sample_rate=8000, mels=8)
    for number, sample in enumerate(dataset(folder, features=settings)):
        expected = Frontend(settings).compute((sound(number) / 32768).astype(np.float32))
        np.testing.assert_array_equal(sample["features"], expected)
        assert "waveform" not in sample
    with pytest.raises(UserError, match=r"sample_rate: 16000, but features\.sample_rate is 8000; leave it out"):
        dataset(folder, features=settings, sample_rate=16000)


@pytest.mark.parametrize("seed", [None, 7])
def test_from_every_position_on_the_rest_is_the_same(folder: Path, seed: int | None) -> None:
    samples = list(dataset(folder, seed=seed, passes=2))
    order = [sample["__key__"] for sample in samples]
    assert len(order) == 20 and sorted(order[:10]) == sorted(order[10:]) == sorted(f"u{number}" for number in range(10))
    assert keys(dataset(folder, seed=seed, passes=2)) == order
    for done, sample in enumerate(samples, 1):
        start = json.loads(json.dumps(sample["after"]))  # as a training state keeps it
        assert keys(dataset(folder, seed=seed, passes=2, start=start)) == order[done:]
    assert keys(dataset(folder, seed=seed, passes=2, start=Position(1))) == order[10:]
    assert keys(itertools.islice(dataset(folder, seed=seed, passes=None), 20)) == order


def test_a_seed_draws_another_order_each_pass(folder: Path) -> None:
    orders = {tuple(keys(dataset(folder, seed=3, start=(number, 0, 0), passes=number + 1))) for number in range(8)}
    assert len(orders) > 2 and tuple(keys(dataset(folder))) == tuple(f"u{number}" for number in range(10))


def test_lanes_and_workers_share_the_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sorted(keys(dataset(folder, seed=5)))
    assert sorted(key for lane in range(3) for key in keys(dataset(folder, seed=5, lane=lane, lanes=3))) == whole
    copy = pickle.loads(pickle.dumps(dataset(folder, seed=5)))  # as it reaches a worker
    monkeypatch.setenv("NUM_WORKERS", "2")
    parts = []
    for worker in "01":
        monkeypatch.setenv("WORKER", worker)
        parts.append(keys(copy))
    assert sorted(parts[0] + parts[1]) == whole and all(parts)


@pytest.mark.parametrize("start", [(0, 4, 0), (0, 0, 4), (-1, 0, 0), (0, 0, -1)])
def test_a_position_of_other_shards_is_refused(folder: Path, start: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match=r"^start: .* is no position of these shards; take one that"):
        dataset(folder, start=start)


def test_what_cannot_be_read_is_one_sentence(folder: Path) -> None:
    with pytest.raises(UserError, match="has 4 shards that hold utterances, for 5 lanes; use fewer lanes"):
        dataset(folder, lanes=5)
    with pytest.raises(UserError, match="lane: 2 is not one of the 2 lanes"):
        dataset(folder, lane=2, lanes=2)
    with pytest.raises(UserError, match="no such folder of shards"):
        dataset(folder / "missing")
    damaged = folder / "shard-000003.tar"
    damaged.write_bytes(damaged.read_bytes()[:-512] + b"x" * 512)
    read = iter(dataset(folder, handler=lambda _: True))  # which is asked about audio alone
    assert [next(read)["__key__"] for _ in range(4)] == ["u0", "u1", "u2", "u3"]
    with pytest.raises(UserError, match=r"shard-000003\.tar: its SHA-256 differs"):
        next(read)


def test_audio_that_cannot_be_decoded_is_raised_or_passed_over(folder: Path) -> None:
    samples = [Sample(key, b"no audio" if key == "b" else flac(1), "flac", {}) for key in "abc"]
    write_index(folder, [*read_index(folder)[:1], write_shard(folder / "shard-000001.tar", samples)])
    with pytest.raises(AudioError, match=r"^b: "):
        list(dataset(folder))
    assert keys(dataset(folder, handler=lambda _: True)) == ["u0", "u1", "u2", "a", "c"]


def test_the_example_of_the_readme_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    example = (ROOM / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(example, "README.md", "exec"), {})
    assert "u1 (880,) None" in capsys.readouterr().out.splitlines()
