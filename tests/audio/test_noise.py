from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.audio.noise import (
    Corruption,
    Voice,
    active_power,
    babble,
    check_noise_files,
    choose_voices,
    coloured,
    impulse_response,
    looped,
    mix,
    noise_files,
    read_noise,
    reverberate,
)
from asr_kd.audio.settings import NoiseSettings
from asr_kd.errors import UserError

RATE = 8000


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def speech(seconds: float = 2.0, seed: int = 0) -> np.ndarray:
    """Bursts of 0.24 s, one every half second."""
    time = np.arange(int(seconds * RATE)) / RATE
    sound = 0.3 * np.sin(2 * np.pi * 440 * time) * (time % 0.5 < 0.24 - 1e-9) + rng(seed).normal(0, 1e-4, len(time))
    return sound.astype(np.float32)


def decibels(ratio: float) -> float:
    return float(10 * np.log10(ratio))


def power(waveform: np.ndarray) -> float:
    return float(np.mean(waveform.astype(np.float64) ** 2))


@pytest.mark.parametrize(("colour", "fall"), [("white", 0.0), ("pink", 3.01), ("brown", 6.02)])
def test_power_density_falls_by_so_many_decibels_an_octave(colour: str, fall: float) -> None:
    spectrum = np.abs(np.fft.rfft(coloured(colour, 20 * RATE, RATE, rng()))) ** 2
    frequencies = np.fft.rfftfreq(20 * RATE, 1 / RATE)
    bands = [spectrum[(frequencies >= low) & (frequencies < 2 * low)].mean() for low in (50, 100, 200, 400, 800, 1600)]
    for lower, higher in itertools.pairwise(bands):
        assert decibels(lower / higher) == pytest.approx(fall, abs=0.7)
    assert spectrum[frequencies < 15].sum() < 2e-2 * spectrum.sum()


@given(length=st.integers(1, 50), samples=st.integers(1, 120), seed=st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_a_sound_is_cut_or_repeated_without_a_gap(length: int, samples: int, seed: int) -> None:
    part = looped(np.arange(length), samples, rng(seed))
    assert len(part) == samples
    assert (np.diff(part) % length == 1 % length).all()


def test_voices_of_a_babble_are_equally_loud() -> None:
    quiet, loud = rng(1).normal(0, 1e-3, 4000), rng(2).normal(0, 1, 4000)
    total = babble([quiet, loud, np.zeros(10, np.float32)], 4000, rng())
    assert power(total) == pytest.approx(2.0, rel=0.1)
    for voice in (quiet, loud):
        assert np.corrcoef(total, voice)[0, 1] == pytest.approx(0.5**0.5, abs=0.05)


def test_other_speakers_talk_where_they_are_known() -> None:
    voices = [
        Voice(f"u{number}", speaker, np.full(3, number, np.float32)) for number, speaker in enumerate("aabb", start=0)
    ]

    def chosen(key: str, speaker: str | None, of: list[Voice] = voices, talkers: int = 9) -> set[int]:
        return {int(waveform[0]) for waveform in choose_voices(of, key, speaker, talkers, rng())}

    assert chosen("u0", "a") == {2, 3}
    assert chosen("u0", None) == {1, 2, 3}  # not known to be another's, and never itself
    assert chosen("u0", "a", voices[:2]) == {1}  # no one else is there
    assert chosen("u0", "a", voices[:1]) == set()
    assert len(chosen("u0", None, talkers=2)) == 2


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.5])
def test_the_ratio_is_that_of_active_speech_to_noise(snr: float) -> None:
    clean, noise = speech(), coloured("pink", 2 * RATE, RATE, rng())
    noisy = mix(clean, noise, snr, RATE)
    # the bursts are 0.48 of the time: their power is above the mean
    assert active_power(clean, RATE) == pytest.approx(power(clean) / 0.48, rel=0.02)
    assert decibels(power(clean) / 0.48 / power(noisy - clean)) == pytest.approx(snr, abs=0.1)
    assert noisy.dtype == np.float32


def test_silence_has_no_ratio() -> None:
    silence, noise = np.zeros(4000, np.float32), coloured("white", 4000, RATE, rng())
    np.testing.assert_array_equal(mix(silence, noise, 0.0, RATE), silence)
    np.testing.assert_array_equal(mix(noise, silence, 0.0, RATE), noise)


@pytest.mark.parametrize(("rt60", "direct"), [(0.2, -3.0), (0.5, 10.0)])
def test_a_room_decays_by_60_decibels_and_begins_with_the_direct_sound(rt60: float, direct: float) -> None:
    response = impulse_response(rt60, direct, RATE, rng())
    tail = response[1:].astype(np.float64)
    assert len(tail) == pytest.approx(rt60 * RATE, abs=1)
    assert decibels(response[0] ** 2 / np.sum(tail**2)) == pytest.approx(direct, abs=1e-3)
    assert np.sum(response.astype(np.float64) ** 2) == pytest.approx(1.0)
    half = len(tail) // 2
    early, late = power(tail[: half // 5]), power(tail[half : half + half // 5])
    assert decibels(early / late) == pytest.approx(30, abs=3)


def test_a_room_smears_forward_only_and_keeps_the_energy() -> None:
    click = np.zeros(RATE, np.float32)
    click[3000] = 0.5
    wet = reverberate(click, impulse_response(0.3, 6.0, RATE, rng()))
    assert len(wet) == len(click) and wet.dtype == np.float32
    assert np.argmax(np.abs(wet)) == 3000 and np.abs(wet[:3000]).max() < 1e-6 and np.abs(wet[3001:]).max() > 1e-3
    assert power(wet) == pytest.approx(power(click), rel=1e-5)
    for length in (1, 5, 3999):
        short = reverberate(speech()[:length], impulse_response(0.3, 6.0, RATE, rng()))
        assert len(short) == length and np.isfinite(short).all()


@given(
    samples=st.sampled_from([1, 2, 79, 160, 4000]),
    level=st.sampled_from([0.0, 1e-20, 1e-4, 1.0, 40.0]),
    kind=st.sampled_from(["white", "pink", "brown", "babble", "files"]),
    seed=st.integers(0, 50),
)
@settings(max_examples=150, deadline=None)
def test_any_sound_stays_as_long_and_within_bounds(samples: int, level: float, kind: str, seed: int) -> None:
    wanted = NoiseSettings.model_validate(
        {"share": 0.8, "reverb": 0.5, "kinds": [kind], "folder": "x" if kind == "files" else None, "snr_min": -30}
    )
    voices = [Voice("a", None, np.zeros(3, np.float32)), Voice("b", None, speech(0.1))]
    files = [speech(0.01), np.zeros(7, np.float32)]
    clean = (level * rng(seed).uniform(-1, 1, samples)).astype(np.float32)
    before = clean.copy()
    noisy = Corruption(wanted, RATE, (seed,), voices, files).apply(clean, "a", None)
    np.testing.assert_array_equal(clean, before)
    assert noisy.shape == clean.shape and noisy.dtype == np.float32 and np.isfinite(noisy).all()
    assert np.abs(noisy).max() <= max(1.0, np.abs(clean).max()) * 1.0001
    if not level:
        np.testing.assert_array_equal(noisy, clean)


def test_seed_and_key_alone_decide_and_shares_are_kept() -> None:
    wanted = NoiseSettings(share=0.4, reverb=0.2, kinds=["white"])
    clean = speech(0.1)

    def heard(seed: int, key: str) -> bytes:
        return Corruption(wanted, RATE, (seed, 3)).apply(clean, key, None).tobytes()

    assert heard(1, "a") == heard(1, "a")
    assert len({heard(seed, key) for seed in range(10) for key in ("a", "b")}) > 5
    untouched = np.mean([heard(0, str(number)) == clean.tobytes() for number in range(500)])
    assert untouched == pytest.approx(0.6 * 0.8, abs=0.06)


def test_alone_in_its_shard_pink_noise_takes_the_place_of_babble() -> None:
    wanted = NoiseSettings(share=1.0, reverb=0.0, kinds=["babble"])
    clean = speech()
    alone = Corruption(wanted, RATE, (0,), [Voice("a", "s", clean)]).apply(clean, "a", "s")
    assert power(alone - clean) > 0
    together = Corruption(wanted, RATE, (0,), [Voice("a", "s", clean), Voice("b", "s", speech(seed=1))])
    assert power(together.apply(clean, "a", "s") - alone) > 0


def test_a_folder_of_noises(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "README").write_text("no audio")
    sound = rng().normal(0, 0.1, (16000, 2))
    soundfile.write(tmp_path / "deep" / "b.flac", sound, 16000)
    soundfile.write(tmp_path / "a.OGG", sound[:, 0], 16000, format="OGG")
    paths = noise_files(str(tmp_path))
    assert [path.name for path in paths] == ["a.OGG", "b.flac"]
    check_noise_files(str(tmp_path))
    for path in paths:
        assert len(read_noise(path, RATE)) == pytest.approx(RATE, abs=20)
    soundfile.write(tmp_path / "long.wav", np.zeros(11 * 60 * 1000, np.int16), 1000)
    with pytest.raises(UserError, match=r"long\.wav: 11 minutes, a noise file has 10 at most; cut it"):
        check_noise_files(str(tmp_path))
    (tmp_path / "long.wav").unlink()
    data = paths[1].read_bytes()
    paths[1].write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"noise file .*b\.flac: truncated"):
        read_noise(paths[1], RATE)
    paths[1].write_bytes(b"no audio")
    with pytest.raises(UserError, match=r"noise file .*b\.flac: not audio but text"):
        check_noise_files(str(tmp_path))


def test_a_folder_without_audio_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no audio; give a folder with files of wav"):
        check_noise_files(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="missing: no such folder of noise"):
        check_noise_files(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"snr_min": 30.0}, "snr_min must not be above snr_max"),
        ({"rt60_max": 0.05}, "rt60_min must not be above rt60_max"),
        ({"share": 0.0, "reverb": 0.0}, "set share or reverb above 0, or leave noise out"),
        ({"folder": "noises"}, "folder and the kind files go together"),
        ({"kinds": ["files"]}, "folder and the kind files go together"),
        ({"kinds": []}, "at least 1 item"),
        ({"kinds": ["blue"]}, "'white', 'pink', 'brown', 'babble' or 'files'"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSettings.model_validate(values)
