"""Streams on Kaldi's features behind sherpa-onnx's zipformer2 interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asr_kd.audio.settings import FeatureSettings
from asr_kd.audio.spectrum import spectrum_of
from asr_kd.decoding.greedy import units_of
from asr_kd.errors import UserError
from asr_kd.export.checking import own_rows
from asr_kd.export.running import session_of
from asr_kd.export.sherpa import has_sherpa, recogniser_of
from asr_kd.export.tokens import tokens_of
from asr_kd.export.zipformer2 import Zipformer2, zipformer2_model, zipformer2_timing
from tests.export.conftest import FEATURES, STUDENT, Saved, sound

KALDI = FeatureSettings(kind="kaldi", sample_rate=16000, mels=20, stack=4)


def heard(running: Any, samples: np.ndarray) -> np.ndarray:
    """Rows [frames, units] of a waveform, of whole frames."""
    logs, stream = spectrum_of(KALDI).of(samples), Zipformer2(running)
    return np.concatenate([stream.push(logs[at : at + 4]) for at in range(0, len(logs) - 3, 4)])


@pytest.mark.parametrize(
    "model", [STUDENT, {**STUDENT, "delay_frames": 0, "conditioned": [1]}, {**STUDENT, "layers": 3, "projection": 5}]
)
def test_it_says_what_the_checkpoint_says(model: dict[str, Any], saved: Saved, tmp_path: Path) -> None:
    checkpoint = saved(KALDI, **model)
    (tmp_path / "model.onnx").write_bytes(zipformer2_model(checkpoint, {}, "0").SerializeToString())
    (tmp_path / "tokens.txt").write_text(tokens_of(checkpoint.units, "zipformer2", True))
    running, timing = session_of(tmp_path / "model.onnx"), zipformer2_timing(checkpoint)
    lag = timing["lag_rows"]
    samples = sound(5.07, rate=16000)
    longer = np.concatenate([samples, np.zeros(16 * timing["tail_ms"], np.float32)])
    said, own = heard(running, longer), own_rows(checkpoint, samples, stream=True)
    assert (said[:lag, 0] == 0).all()  # blank
    compared = len(own) - lag - 1  # behind them it hears silence, the checkpoint the end mirrored
    assert np.abs(said[lag:][:compared] - own[:compared]).max() < 2e-3
    if has_sherpa():
        hear = recogniser_of("zipformer2", tmp_path / "model.onnx", tmp_path / "tokens.txt", KALDI, timing, 70, 1)
        text = "".join(checkpoint.units.piece(unit) for unit in units_of(said.argmax(1))).replace("▁", " ").strip()
        assert len(text) > 5
        assert hear(samples) == text


def test_streams_side_by_side_at_different_places(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(zipformer2_model(saved(KALDI), {}, "0").SerializeToString())
    running = session_of(tmp_path / "model.onnx")
    one, other = (spectrum_of(KALDI).of(sound(2, seed, 16000)).reshape(-1, 4, 20) for seed in (1, 2))
    alone = [
        np.concatenate([stream.push(logs) for logs in of]) for of in (one, other) for stream in [Zipformer2(running)]
    ]
    ahead, behind = Zipformer2(running), Zipformer2(running)
    for logs in one[:20]:
        ahead.push(logs)
    axis = {name: 0 if name.endswith(("conv1", "conv2", "embed", "lens")) else 1 for name in ahead._state}
    both = {name: np.concatenate([ahead._state[name], behind._state[name]], axis[name]) for name in axis}
    said = []
    for pair in zip(one[20:], other, strict=False):
        rows, *state = running.run(None, {"x": np.stack(pair), **both})
        both = dict(zip(both, state, strict=True))
        said.append(rows[:, 0])
    found = np.stack(said, 1)
    assert np.abs(found[0] - alone[0][20:]).max() < 2e-3
    assert np.abs(found[1] - alone[1][: len(said)]).max() < 2e-3


def test_what_it_cannot_carry_is_refused(saved: Saved) -> None:
    wrong: list[tuple[FeatureSettings, dict[str, Any], str]] = [
        (FEATURES, STUDENT, r"gives a network kaldi's features, this one hears our own; export it as stream"),
        (KALDI, {"kind": "conv", "size": 8}, r"kind conv does not leave as zipformer2, .* export this one as offline"),
        (KALDI.model_copy(update={"mels": 18}), STUDENT, r"a multiple of 4 mel filters, not 18; export it as offline"),
    ]
    for features, model, words in wrong:
        with pytest.raises(UserError, match=words):
            zipformer2_model(saved(features, **model), {}, "0")
