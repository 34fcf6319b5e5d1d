"""Streams: in pieces of any length, side by side at different places, reset, silent, long; as the checkpoint itself says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asr_kd.audio.features import Frontend
from asr_kd.audio.settings import FeatureSettings
from asr_kd.errors import UserError
from asr_kd.export.checking import own_rows
from asr_kd.export.frontend import add_energies, add_features
from asr_kd.export.graph import FLOAT, Graph
from asr_kd.export.running import Stream, TOne, session_of
from asr_kd.export.sherpa import has_sherpa, recogniser_of
from asr_kd.export.streaming import longest_seconds, shape_of, stream_model, t_one_model, t_one_timing
from asr_kd.export.tokens import tokens_of
from asr_kd.models.acoustic import OwnCheckpoint
from tests.export.conftest import FEATURES, STUDENT, Saved, sound

#: a feature that lies between two halves may be rounded to the other one
CLOSE = 2e-3


def session(checkpoint: OwnCheckpoint, folder: Path, make: Any = stream_model) -> Any:
    (folder / "model.onnx").write_bytes(make(checkpoint, {}, "0").SerializeToString())
    return session_of(folder / "model.onnx")


def heard(stream: Stream, samples: np.ndarray, piece: int) -> np.ndarray:
    parts = [stream.push(samples[None, at : at + piece])[0] for at in range(0, len(samples), piece)]
    return np.concatenate([*parts, stream.push(samples[None, :0], 1.0)[0]])


@pytest.mark.parametrize(
    ("features", "model"),
    [
        (FEATURES, STUDENT),
        (FEATURES, {**STUDENT, "delay_frames": 0, "conditioned": [1]}),
        (FEATURES, {**STUDENT, "projection": 5}),
        (FEATURES, {**STUDENT, "rank": 3}),
        (FEATURES, {**STUDENT, "bits": 4}),
        (FeatureSettings(sample_rate=16000, mels=9, stack=4), STUDENT),
        (FeatureSettings(sample_rate=8000, mels=8, window_ms=10, hop_ms=15, stack=2, mean_frames=20), STUDENT),
        (FeatureSettings(sample_rate=8000, mels=8, window_ms=100, stack=1), STUDENT),
    ],
)
def test_pieces_of_any_length_say_what_the_checkpoint_says(
    features: FeatureSettings, model: dict[str, Any], saved: Saved, tmp_path: Path
) -> None:
    checkpoint = saved(features, **model)
    running, samples = session(checkpoint, tmp_path), sound(5, rate=features.sample_rate)
    own = own_rows(checkpoint, samples, stream=True)
    for piece in (53, 800, len(samples)):
        said = heard(Stream(running), samples, piece)
        assert said.shape == own.shape
        assert np.abs(said - own).max() < CLOSE
        assert np.allclose(np.exp(said).sum(1), 1, atol=1e-5)


def test_streams_side_by_side_at_different_places_are_as_alone(saved: Saved, tmp_path: Path) -> None:
    checkpoint = saved()
    running, piece = session(checkpoint, tmp_path), 700
    recordings = [sound(seconds, seed) for seed, seconds in enumerate((1.3, 2.1, 0.7, 1.9, 1.1, 0.02))]
    alone = [heard(Stream(running), one, piece) for one in recordings]
    together, said = Stream(running, 3), {number: [] for number in range(len(recordings))}
    lanes, waiting = [0, 1, 2], [3, 4, 5]
    at = [0, 0, 0]
    while any(lane is not None for lane in lanes):
        # what does not fill a piece comes at the end, alone: an axis has one length
        ends = np.array([lane is None or at[row] + piece > len(recordings[lane]) for row, lane in enumerate(lanes)])
        for length, now in ((piece, ~ends), *((len(recordings[lane][at[row] :]), np.arange(3) == row) for row, lane in enumerate(lanes) if ends[row] and lane is not None)):  # fmt: skip
            if not now.any():
                continue
            rows = [row for row in range(3) if now[row]]
            batch = Stream(running, len(rows))
            batch.state = together.state[rows]
            pieces = np.stack([recordings[lanes[row]][at[row] : at[row] + length] for row in rows])
            for row, log_probs in zip(rows, batch.push(pieces, ends[rows].astype(np.float32)), strict=True):
                said[lanes[row]].append(log_probs)
                at[row] += length
            together.state[rows] = batch.state
        for row in range(3):
            if ends[row]:
                lanes[row], at[row] = (waiting.pop(0) if waiting else None), 0
                together.state[row] = 0.0
    for number, log_probs in enumerate(alone):
        assert np.abs(np.concatenate(said[number]) - log_probs).max(initial=0.0) < CLOSE, number


def test_one_may_end_while_others_go_on(saved: Saved, tmp_path: Path) -> None:
    running = session(saved(), tmp_path)
    one, other = sound(0.9, 1), sound(1.8, 2)
    both = Stream(running, 2)
    first = both.push(np.stack([one, other[: len(one)]]), np.array([1.0, 0.0], np.float32))
    both.state[0] = 0.0
    second = both.push(np.stack([one, other[len(one) :]]), 1.0)
    alone = [heard(Stream(running), one, len(one)), heard(Stream(running), other, len(one))]
    assert np.abs(first[0] - alone[0]).max() < CLOSE
    assert np.abs(second[0] - alone[0]).max() < CLOSE
    assert np.abs(np.concatenate([first[1], second[1]]) - alone[1]).max() < CLOSE


def test_a_reset_in_mid_speech_begins_anew(saved: Saved, tmp_path: Path) -> None:
    checkpoint, samples = saved(), sound(3)
    running, cut = session(checkpoint, tmp_path), 9001
    stream = Stream(running)
    stream.push(samples[None, :cut])
    stream.state[:] = 0.0
    said, own = heard(stream, samples[cut:], 333), own_rows(checkpoint, samples[cut:], stream=True)
    assert np.abs(said - own).max() < CLOSE


def test_too_little_sound_gives_no_frames(saved: Saved, tmp_path: Path) -> None:
    checkpoint = saved()
    running, units = session(checkpoint, tmp_path), checkpoint.units.size
    stream = Stream(running)
    for length in (0, 1, 10, 190, 158):  # 359 samples: one less than the first frame spans
        assert stream.push(sound(1)[None, :length])[0].shape == (0, units)
    assert stream.push(sound(1)[None, :0], 1.0)[0].shape == (0, units)
    stream = Stream(running)
    stream.push(sound(1)[None, :359])
    assert stream.push(sound(1)[None, 359:360], 1.0)[0].shape == (1, units)


def test_a_minute_of_silence_and_speech_behind_it(saved: Saved, tmp_path: Path) -> None:
    checkpoint = saved()
    samples = np.concatenate([sound(1), np.zeros(60 * 8000, np.float32), sound(1)])
    said = heard(Stream(session(checkpoint, tmp_path)), samples, 2400)
    own = own_rows(checkpoint, samples, stream=True)
    assert np.isfinite(said).all()
    assert np.abs(said - own).max() < CLOSE


def test_a_long_stream_does_not_drift(saved: Saved, tmp_path: Path) -> None:
    checkpoint = saved(**{**STUDENT, "layers": 1, "size": 8})
    samples = np.concatenate([sound(20, seed) * (0.2 + seed % 3) for seed in range(3)])
    said = heard(Stream(session(checkpoint, tmp_path)), samples, 1600)
    difference = np.abs(said - own_rows(checkpoint, samples, stream=True))
    assert difference.max() < CLOSE
    late, early = difference[-len(difference) // 4 :].mean(), difference[: len(difference) // 4].mean()
    assert late < 3 * early + 1e-6


def test_what_is_no_number_stays_in_its_stream(saved: Saved, tmp_path: Path) -> None:
    running, samples = session(saved(), tmp_path), sound(1)
    bad = samples.copy()
    bad[500] = np.nan
    both = Stream(running, 2)
    said = both.push(np.stack([samples, bad]))
    assert np.isnan(said[1][3:]).all()
    assert np.isnan(both.push(np.stack([samples, samples]))[1]).all(), "until it is reset"
    assert np.abs(said[0] - Stream(running).push(samples[None])[0]).max() < CLOSE


def test_other_networks_are_refused(saved: Saved) -> None:
    others: list[tuple[dict[str, Any], str]] = [
        ({"kind": "blstm", "size": 8}, "kind blstm hears whole utterances; kind lstm leaves as stream or t-one, this one as offline"),
        ({"kind": "conv", "size": 8}, "kind conv hears whole utterances"),
        ({"kind": "separable", "size": 8}, "kind separable has no graph that streams yet; .* this one as offline"),
    ]  # fmt: skip
    for model, words in others:
        with pytest.raises(UserError, match=words):
            shape_of(saved(**model))
    with pytest.raises(
        UserError, match=r"hears kaldi's features, which stream and t-one do not make.* export it as offline"
    ):
        shape_of(saved(FeatureSettings(kind="kaldi", sample_rate=8000, mels=8)))
    with pytest.raises(UserError, match=r"features.mean_frames is 1, too few for a graph"):
        longest_seconds(saved(FeatureSettings(sample_rate=8000, mels=8, mean_frames=1)))
    assert 1700 < longest_seconds(saved()) < 2000


def of_t_one(running: Any, batch: np.ndarray) -> np.ndarray:
    """All rows of recordings side by side, of whole chunks [batch, samples]."""
    stream = TOne(running, len(batch))
    return np.concatenate([stream.push(part) for part in np.split(batch, batch.shape[1] // TOne.samples, axis=1)], 1)


@pytest.mark.parametrize("features", [FEATURES, FeatureSettings(sample_rate=8000, mels=8, window_ms=100, stack=5)])
def test_t_one_says_what_the_checkpoint_says_later(features: FeatureSettings, saved: Saved, tmp_path: Path) -> None:
    checkpoint = saved(features)
    running, timing = session(checkpoint, tmp_path, t_one_model), t_one_timing(checkpoint, shape_of(checkpoint))
    samples = sound(4.8)
    samples[samples == np.float32(1 / 32768)] = 0.0  # the one that is lost on the way
    said = of_t_one(running, samples[None])[0]
    assert len(said) == 16 * timing["rows"]
    assert (said[: timing["lag_rows"], 0] == 0).all()  # blank
    own = own_rows(checkpoint, samples, stream=True)[: len(said) - timing["lag_rows"]]
    assert np.abs(said[timing["lag_rows"] :][: len(own)] - own).max() < CLOSE


def test_t_one_streams_side_by_side_at_different_places(saved: Saved, tmp_path: Path) -> None:
    running = session(saved(), tmp_path, t_one_model)
    one, other = (sound(2.4, seed)[None].reshape(-1, 1, TOne.samples) for seed in (1, 2))
    alone = [of_t_one(running, part.reshape(1, -1))[0] for part in (one, other)]
    stream, late = TOne(running), TOne(running, 2)
    said = [stream.push(one[number]) for number in range(3)]
    late.state = np.concatenate([stream.state, np.zeros_like(stream.state)])
    both = [late.push(np.concatenate([one[3 + number], other[number]])) for number in range(5)]
    assert np.abs(np.concatenate([*said, *(rows[:1] for rows in both)], 1)[0] - alone[0]).max() < CLOSE
    assert np.abs(np.concatenate([rows[1] for rows in both]) - alone[1][:50]).max() < CLOSE


def test_t_one_refuses_what_it_cannot_carry(saved: Saved) -> None:
    wrong = [
        (FeatureSettings(sample_rate=16000, mels=8), "t-one hears sound of 8000 Hz, this network 16000 Hz; export it as stream"),
        (FeatureSettings(sample_rate=8000, mels=8, stack=4), "t-one hears 300 ms at once, which frames of 40 ms do not fill; export it as stream"),
    ]  # fmt: skip
    for features, words in wrong:
        with pytest.raises(UserError, match=words):
            t_one_model(saved(features), {}, "0")


@pytest.mark.skipif(not has_sherpa(), reason="sherpa-onnx is not installed")
def test_sherpa_onnx_says_the_same(saved: Saved, tmp_path: Path) -> None:
    checkpoint = saved()
    session(checkpoint, tmp_path, t_one_model)
    (tmp_path / "tokens.txt").write_text(tokens_of(checkpoint.units, "t-one", True))
    timing = t_one_timing(checkpoint, shape_of(checkpoint))
    hear = recogniser_of("t-one", tmp_path / "model.onnx", tmp_path / "tokens.txt", FEATURES, timing, 100, 1)
    for seed in range(3):
        samples = np.concatenate([sound(3, seed), np.zeros(4000, np.float32)])
        best = own_rows(checkpoint, samples, stream=True).argmax(1)
        spoken = [unit for unit, before in zip(best, [0, *best], strict=False) if unit not in (0, before)]
        text = "".join(checkpoint.units.piece(unit) for unit in spoken).replace("▁", " ")
        said = hear(samples)
        # behind the sound the checkpoint hears no features, the client silence
        assert text.split()[:5] == said.split()[:5]
        assert len(text) > 5


@pytest.mark.skipif(not has_sherpa(), reason="sherpa-onnx is not installed")
def test_sherpa_onnx_hears_several_at_different_places(saved: Saved, tmp_path: Path) -> None:
    import sherpa_onnx

    checkpoint = saved()
    session(checkpoint, tmp_path, t_one_model)
    (tmp_path / "tokens.txt").write_text(tokens_of(checkpoint.units, "t-one", True))
    files = {"model": str(tmp_path / "model.onnx"), "tokens": str(tmp_path / "tokens.txt")}
    recognizer = sherpa_onnx.OnlineRecognizer.from_t_one_ctc(**files, num_threads=1)

    def texts(recordings: list[np.ndarray], late: int) -> list[str]:
        """Heard side by side, each so many pieces behind the one before."""
        streams, piece = [recognizer.create_stream() for _ in recordings], 1000
        for step in range(40 + late * len(recordings)):
            for number, (stream, samples) in enumerate(zip(streams, recordings, strict=True)):
                at = piece * (step - late * number)
                if 0 <= at < len(samples):
                    stream.accept_waveform(8000, samples[at : at + piece])
            while ready := [stream for stream in streams if recognizer.is_ready(stream)]:
                recognizer.decode_streams(ready)
        return [recognizer.get_result(stream).strip() for stream in streams]

    recordings = [np.append(sound(3, seed), np.zeros(7000, np.float32)) for seed in range(4)]
    alone = [texts([one], 0)[0] for one in recordings]
    assert len(set(alone)) == 4
    assert texts(recordings, 4) == alone


def test_features_are_those_of_the_product_bit_for_bit(saved: Saved, tmp_path: Path) -> None:
    """But for a few that lie between two halves."""
    front, graph, samples = Frontend(FEATURES), Graph(), sound(6)
    given = graph.input("sound", FLOAT, ["N", "samples"])
    frames = len(own := front.compute(samples))
    zeros = np.zeros((1, 1), np.float32)
    logs = add_energies(graph, front.spectrum, given, graph.constant(3 * frames))
    features, _ = add_features(graph, front, logs, graph.constant(frames), np.zeros((1, 8), np.float32), zeros)
    graph.output("features", features)
    model = graph.model({"features": (FLOAT, ["N", "frames", FEATURES.dimension])}, {}, "0")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    said = session_of(tmp_path / "model.onnx").run(None, {"sound": samples[None]})[0][0]
    assert (said == own).mean() > 0.999
    assert np.abs(said - own.astype(np.float32)).max() < 5e-3
