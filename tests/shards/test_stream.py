from __future__ import annotations

import errno
import functools
import io
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.audio.features import Deferred, Frontend
from asr_kd.audio.settings import FeatureSettings, NoiseSettings
from asr_kd.errors import UserError
from asr_kd.shards.stream import (
    LoadedShard,
    ShardInput,
    batches_by_length,
    bucketed,
    load_features,
    map_ordered,
    read_ahead,
)  # fmt: skip
from asr_kd.shards.tarset import Sample, ShardInfo, read_index, write_index, write_shard

FEATURES = FeatureSettings(sample_rate=8000, mels=8)
LENGTHS = st.lists(st.integers(1, 50), max_size=40)


def hiss(samples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples)


def wave(samples: int, seed: int) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, hiss(samples, seed), 8000, format="WAV", subtype="FLOAT")
    return data.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards; the first also holds noise that is no audio, and audio shorter than a frame."""
    folder = tmp_path / "shards"
    folder.mkdir()
    first = [
        Sample(f"a{number}", wave(2000 + 700 * number, number), "wav", {"text": f"t{number}"}) for number in range(3)
    ]
    first[1:1] = [Sample("bad", b"no audio", "wav", {}), Sample("short", wave(300, 9), "wav", {})]
    second = [Sample("b0", wave(4000, 5), "wav", {})]
    write_index(
        folder, [write_shard(folder / f"shard-00000{number}.tar", one) for number, one in enumerate([first, second])]
    )
    return folder


def wanted(folder: Path, **changes: object) -> ShardInput:
    return ShardInput.model_validate({"folder": str(folder), "features": FEATURES, "max_seconds": 10.0} | changes)


def same(one: LoadedShard, other: LoadedShard) -> bool:
    return one.bad == other.bad and all(
        (a.key, a.fields) == (b.key, b.fields) and a.features.dtype == b.features.dtype and np.array_equal(a.features, b.features)
        for a, b in zip(one.items, other.items, strict=True)
    )  # fmt: skip


def test_loads_features_in_order_and_lists_what_is_bad(shards: Path) -> None:
    loaded = load_features(wanted(shards), read_index(shards)[0])
    assert [item.key for item in loaded.items] == ["a0", "a1", "a2"]
    assert [item.fields for item in loaded.items] == [{"text": "t0"}, {"text": "t1"}, {"text": "t2"}]
    for number, item in enumerate(loaded.items):
        expected = Frontend(FEATURES).compute(hiss(2000 + 700 * number, number).astype(np.float32))
        assert item.features.dtype == np.float16
        np.testing.assert_allclose(item.features, expected, atol=5e-3)  # FLAC has 16 bits
    assert [key for key, _ in loaded.bad] == ["bad", "short"] and "too short" in loaded.bad[1][1]
    limited = load_features(wanted(shards, max_seconds=0.3), read_index(shards)[0])
    assert [item.key for item in limited.items] == ["a0"] and len(limited.bad) == 4


def test_a_cache_changes_nothing_and_is_used(shards: Path, tmp_path: Path) -> None:
    plain, info = load_features(wanted(shards), read_index(shards)[0]), read_index(shards)[0]
    cached = wanted(shards, cache=str(tmp_path / "cache"))
    assert same(plain, load_features(cached, info))
    assert same(plain, load_features(cached, info))
    (shards / info.name).unlink()
    assert same(plain, load_features(cached, info))
    with pytest.raises(UserError, match=info.name):  # other features are not in the cache
        load_features(cached.model_copy(update={"features": FEATURES.model_copy(update={"stack": 2})}), info)


def test_features_of_another_version_are_not_in_the_cache(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, info = wanted(shards, cache=str(tmp_path / "cache")), read_index(shards)[0]
    load_features(cached, info)
    monkeypatch.setattr("asr_kd.audio.features.FRONTEND_VERSION", 2)
    load_features(cached, info)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


NOISE = NoiseSettings(share=1.0, reverb=0.5, snr_max=5.0)


def test_features_left_for_later_are_counted_refused_and_made_noisy_as_others_and_not_cached(
    shards: Path, tmp_path: Path
) -> None:
    info, noisy = read_index(shards)[0], {"noise": NOISE, "noise_seed": (3,), "keep_clean": True}
    for changes in ({}, noisy):
        there = load_features(wanted(shards, **changes), info)
        later = load_features(wanted(shards, deferred=True, cache=str(tmp_path / "cache"), **changes), info)
        assert later.bad == there.bad
        for one, other in zip(later.items, there.items, strict=True):
            assert (one.key, one.fields, one.seconds) == (other.key, other.fields, other.seconds)
            pairs = [(one.features, other.features)] + ([(one.clean, other.clean)] if changes else [])
            for sound, features in pairs:
                assert isinstance(sound, Deferred) and len(sound) == len(features)
                waveform = sound.sound if sound.sound.dtype == np.float32 else sound.sound / np.float32(32768)
                np.testing.assert_array_equal(Frontend(FEATURES).compute(waveform), features)
    assert not (tmp_path / "cache").exists()


def test_noise_is_drawn_by_seed_and_key_and_never_cached(shards: Path, tmp_path: Path) -> None:
    infos = read_index(shards)
    clean = [load_features(wanted(shards, cache=str(tmp_path / "cache")), info) for info in infos]

    def noisy(workers: int, *seed: int) -> list[LoadedShard]:
        noisy_input = wanted(shards, cache=str(tmp_path / "cache"), noise=NOISE, noise_seed=seed)
        return list(map_ordered(functools.partial(load_features, noisy_input), infos, workers))

    here = noisy(0, 1, 2)
    assert all(map(same, here, noisy(2, 1, 2)))
    assert not any(map(same, here, noisy(0, 1, 3)))
    for quiet, loud in zip(clean, here, strict=True):
        assert loud.bad == quiet.bad
        for one, other in zip(quiet.items, loud.items, strict=True):
            assert (one.key, one.fields, one.features.shape) == (other.key, other.fields, other.features.shape)
            assert not np.array_equal(one.features, other.features)
    assert all(map(same, clean, [load_features(wanted(shards, cache=str(tmp_path / "cache")), info) for info in infos]))


def test_what_the_draw_passes_over_has_clean_features(shards: Path) -> None:
    info = read_index(shards)[0]
    clean = {item.key: item.features for item in load_features(wanted(shards), info).items}
    untouched = total = 0
    for seed in range(20):
        noise = NOISE.model_copy(update={"share": 0.3, "reverb": 0.0})
        for item in load_features(wanted(shards, noise=noise, noise_seed=(seed,)), info).items:
            untouched += np.array_equal(item.features, clean[item.key])
            total += 1
    assert 0.5 * total < untouched < 0.9 * total


def test_noise_from_a_folder_is_heard(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "noises").mkdir()
    # full-scale clicks, alone in their features
    clicks = np.zeros(16000)
    clicks[::4000] = 1.0
    soundfile.write(tmp_path / "noises" / "clicks.wav", clicks, 16000)
    values = {"share": 1.0, "reverb": 0.0, "snr_min": -20.0, "snr_max": -20.0}
    noise = NoiseSettings.model_validate({"kinds": ["files"], "folder": str(tmp_path / "noises"), **values})
    info = read_index(shards)[1]
    (clean,), (noisy,) = (
        load_features(wanted(shards, noise=which, noise_seed=(0,)), info).items for which in (None, noise)
    )
    louder = (noisy.features - clean.features).max(1) > 0.5
    assert louder.any() and not louder.all()


def test_a_damaged_cache_is_named(shards: Path, tmp_path: Path) -> None:
    cached, info = wanted(shards, cache=str(tmp_path / "cache")), read_index(shards)[0]
    plain = load_features(cached, info)
    (rows,) = (tmp_path / "cache").glob("*.npy")
    data = rows.read_bytes()
    for torn in (data[:-100], data[:40], b""):
        rows.write_bytes(torn)
        with pytest.raises(UserError, match=r"damaged feature cache .*remove the folder .*cache"):
            load_features(cached, info)
    rows.write_bytes(data)
    next((tmp_path / "cache").glob("*.json")).unlink()  # killed between the two: the cache was not written
    assert same(plain, load_features(cached, info))


def test_a_shard_that_changed_is_refused(shards: Path) -> None:
    info = read_index(shards)[0]
    data = bytearray((shards / info.name).read_bytes())
    data[700] ^= 1
    (shards / info.name).write_bytes(bytes(data))
    with pytest.raises(UserError, match=info.name):
        load_features(wanted(shards), info)


@given(lengths=LENGTHS, batch_frames=st.integers(1, 200))
@settings(deadline=None)
def test_batches_by_length_hold_everything_once(lengths: list[int], batch_frames: int) -> None:
    batches = batches_by_length(lengths, batch_frames)
    flat = [position for batch in batches for position in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[position] for position in flat] == sorted(lengths)
    for batch in batches:
        assert len(batch) == 1 or max(lengths[position] for position in batch) * len(batch) <= batch_frames
    for batch, following in itertools.pairwise(batches):  # no batch ends early
        assert lengths[following[0]] * (len(batch) + 1) > batch_frames


@given(lengths=LENGTHS, batch_frames=st.integers(1, 200), seed=st.integers(0, 9))
@settings(deadline=None)
def test_bucketed_batches_hold_everything_once(lengths: list[int], batch_frames: int, seed: int) -> None:
    def run() -> list[list[tuple[int, int]]]:
        return list(bucketed(list(enumerate(lengths)), lambda item: item[1], batch_frames, np.random.default_rng(seed)))

    first = run()
    for batch in first:
        assert len(batch) == 1 or max(length for _, length in batch) * len(batch) <= batch_frames
    assert Counter(item for batch in first for item in batch) == Counter(enumerate(lengths))
    assert run() == first


def test_what_is_read_ahead_is_the_same_and_no_more_than_asked() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    ahead = read_ahead(items(), 3)
    got = []
    for number in ahead:
        got.append(number)
        assert len(taken) <= len(got) + 3
    assert got == list(range(20))


def test_a_failure_ahead_comes_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise UserError("u2: broken")

    ahead = read_ahead(items(), 5)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(UserError, match="u2: broken"):
        next(ahead)


def test_ending_early_closes_what_was_read() -> None:
    closed = []

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.append(True)

    ahead = read_ahead(items(), 2)
    assert next(ahead) == 0
    ahead.close()
    assert closed == [True]


def test_any_number_of_workers_gives_the_same_in_order(shards: Path) -> None:
    arguments = [-3, 1, -2, 5]
    assert list(map_ordered(abs, arguments, 0)) == list(map_ordered(abs, arguments, 2)) == [3, 1, 2, 5]


def test_what_a_worker_raises_arrives(shards: Path) -> None:
    missing = ShardInfo("shard-000009.tar", 1, 1.0, 10, "0" * 64)
    with pytest.raises(UserError, match="shard-000009"):
        list(map_ordered(functools.partial(load_features, wanted(shards)), [missing], 1))


INTERRUPTED = """
import signal, sys, time
from asr_kd.shards.stream import map_ordered
if __name__ == "__main__":
    asked = []
    signal.signal(signal.SIGINT, lambda *_: asked.append(1))
    results = map_ordered(time.sleep, [0, 0.7, 0], 1)
    next(results)
    print("waiting", flush=True)
    assert list(results) == [None, None] and asked
    print("done", flush=True)
"""


def test_a_killed_worker_is_noticed() -> None:
    with pytest.raises(UserError, match=r"a worker process was killed.*; set loader_workers=0 and"):
        list(map_ordered(signal.raise_signal, [signal.SIGKILL], 1))
    with pytest.raises(UserError, match="; use fewer than workers=2 and"):
        list(map_ordered(signal.raise_signal, [signal.SIGKILL], 2, "workers"))


SURVIVED = """
import os, signal, time
from pathlib import Path
from asr_kd.errors import UserError
from asr_kd.shards.stream import map_ordered

def die_when_both_are_there(number):
    Path(f"{number}.there").touch()
    while len(list(Path().glob("*.there"))) < 2:
        time.sleep(0.01)
    if number:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    try:
        list(map_ordered(die_when_both_are_there, [0, 1], 2))
    except UserError as error:
        print(error)
"""


def test_a_worker_at_rest_ends_when_another_was_killed(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(SURVIVED)
    done = subprocess.run([sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("a worker process was killed") and not done.stderr


ABANDONED = """
import os, signal
from asr_kd.shards.stream import map_ordered
if __name__ == "__main__":
    results = map_ordered(os.getpgid, [0, 0, 0, 0], 2)
    next(results)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_main_process(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(ABANDONED)
    process = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], start_new_session=True)
    assert process.wait(timeout=300) == -signal.SIGKILL
    try:
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    except ProcessLookupError:
        return
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("workers live on")


def test_ctrl_c_leaves_the_workers_to_the_main_process(tmp_path: Path) -> None:
    # a terminal sends it to every process; a task that died with its worker would be waited for without end
    (tmp_path / "main.py").write_text(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py")], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == b"waiting\n"
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    try:
        assert process.communicate(timeout=300)[0] == b"done\n"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EACCES, "Permission denied"), "Permission denied"),
        (ImportError("This platform lacks a functioning sem_open"), "semaphores do not work on this system"),
    ],
)
def test_no_shared_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def semaphore(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", semaphore)
    with pytest.raises(UserError, match=f"^/dev/shm: {reason}; .* set workers=0, .*--shm-size=1g"):
        map_ordered(abs, [1], 2, "workers")
    assert list(map_ordered(abs, [-1], 0, "workers")) == [1]
