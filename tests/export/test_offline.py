"""Whole recordings, by networks of every family, and what int8 leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from asr_kd.audio.features import frontend_of
from asr_kd.audio.settings import FeatureSettings
from asr_kd.audio.spectrum import spectrum_of
from asr_kd.decoding.decoder import make_decoder
from asr_kd.decoding.settings import DecodingSettings
from asr_kd.export.frontend import MEL
from asr_kd.export.networks import FAMILIES
from asr_kd.export.offline import offline_model
from asr_kd.export.quantize import quantized
from asr_kd.export.running import session_of
from asr_kd.export.sherpa import has_sherpa, offline_recogniser
from asr_kd.export.tokens import tokens_of
from asr_kd.models.acoustic import NETWORKS, OwnCheckpoint, infer
from asr_kd.models.lstm import LstmModel
from tests.export.conftest import STUDENT, Saved, sound

CHUNKED = {"layers": 2, "size": 12, "heads": 2, "chunk_frames": 4}
NETS: dict[str, dict[str, Any]] = {
    "lstm": {**STUDENT, "conditioned": [1]},
    "lstm, no delay": {"kind": "lstm", "layers": 1, "size": 12},
    "lstm, rank": {**STUDENT, "rank": 4},
    "blstm": {"kind": "blstm", "layers": 2, "size": 12},
    "blstm, projection": {"kind": "blstm", "layers": 2, "size": 12, "projection": 5, "conditioned": [1]},
    "conv": {"kind": "conv", "layers": 3, "size": 24, "kernel": 3},
    "conv, 4 bits": {"kind": "conv", "layers": 2, "size": 12, "kernel": 3, "bits": 4},
    "conformer": {"kind": "conformer", "layers": 2, "size": 12, "heads": 2, "kernel": 5, "conditioned": [1]},
    "separable": {"kind": "separable", "layers": 2, "size": 12, "kernel": 5, "delay_frames": 3, "conditioned": [1]},
    "separable, no delay": {"kind": "separable", "layers": 1, "size": 12, "kernel": 4},
    "chunked conformer": {"kind": "chunked_conformer", **CHUNKED, "left_frames": 6, "conditioned": [1]},
    "chunked conformer, nothing left": {"kind": "chunked_conformer", **CHUNKED, "left_frames": 0, "kernel": 1},
    "emformer": {"kind": "emformer", **CHUNKED, "left_frames": 8, "right_frames": 2, "memory": 2, "conditioned": [1]},
    "emformer, chunks alone": {"kind": "emformer", **CHUNKED, "left_frames": 0},
    "emformer, memory": {"kind": "emformer", **CHUNKED, "memory": 3},
    "emformer, right": {"kind": "emformer", **CHUNKED, "right_frames": 3},
}


def run(checkpoint: OwnCheckpoint, folder: Path, lengths: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """What a graph and its checkpoint say of recordings of these lengths, in one batch with noise behind the shorter ones."""
    model = offline_model(checkpoint, {}, "0")
    onnx.checker.check_model(model, full_check=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    batch = np.stack([sound(max(lengths) / 8000, seed) for seed in range(len(lengths))])
    given = {"samples": batch, "lengths": np.array(lengths)}
    log_probs, frames = session_of(folder / "model.onnx").run(["log_probs", "frames"], given)
    own = [infer(checkpoint, [frontend_of(checkpoint.features).compute(one[:length])])[0] for one, length in zip(batch, lengths, strict=True)]  # fmt: skip
    return [(rows[:count], row) for rows, count, row in zip(log_probs, frames, own, strict=True)]


@pytest.mark.parametrize("name", NETS)
def test_every_family_says_what_the_checkpoint_says(name: str, saved: Saved, tmp_path: Path) -> None:
    checkpoint = saved(**NETS[name])
    for lengths in ([24001, 8000, 360], [360], [11 * 240 + 120]):
        for said, own in run(checkpoint, tmp_path, lengths):
            assert said.shape == own.shape
            assert np.abs(said - own).max() < 2e-3


def test_all_families_are_there() -> None:
    assert {*FAMILIES, LstmModel} == set(NETWORKS.values())
    assert {net["kind"] for net in NETS.values()} == set(NETWORKS)


def test_other_features(saved: Saved, tmp_path: Path) -> None:
    checkpoint = saved(FeatureSettings(sample_rate=8000, mels=8, window_ms=10, hop_ms=15, stack=2), **NETS["conv"])
    for said, own in run(checkpoint, tmp_path, [8000, 4001]):
        assert np.abs(said - own).max() < 2e-3


@pytest.mark.parametrize("name", ["lstm", "blstm", "conformer", "emformer"])
def test_on_kaldis_features_as_sherpa_onnx_gives_them(name: str, saved: Saved, tmp_path: Path) -> None:
    features = FeatureSettings(kind="kaldi", sample_rate=16000, mels=20, stack=4)
    checkpoint, recordings = saved(features, **NETS[name]), [sound(seconds, 3, 16000) for seconds in (3, 2.313, 0.05)]
    (tmp_path / "model.onnx").write_bytes(offline_model(checkpoint, {}, "0").SerializeToString())
    rows = [spectrum_of(features).of(one) for one in recordings]
    batch = np.full((3, len(rows[0]), 20), 7.0, np.float32)  # padding, whatever it is
    for row, own in zip(batch, rows, strict=True):
        row[: len(own)] = own
    session = session_of(tmp_path / "model.onnx")
    log_probs, frames = session.run(None, {"features": batch, "lengths": np.array([len(one) for one in rows])})
    texts = []
    for said, count, one in zip(log_probs, frames, recordings, strict=True):
        own = infer(checkpoint, [frontend_of(features).compute(one)])[0]
        assert count == len(own)
        assert np.abs(said[:count] - own).max() < 2e-3
        texts.append(make_decoder(DecodingSettings(), checkpoint)(own)[0].text)
    assert len(texts[0]) > 5
    if has_sherpa():
        (tmp_path / "tokens.txt").write_text(tokens_of(checkpoint.units, "offline", True))
        hear = offline_recogniser(tmp_path / "model.onnx", tmp_path / "tokens.txt", features)
        assert [hear(one) for one in recordings] == texts


def test_a_recording_without_a_frame(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(offline_model(saved(), {}, "0").SerializeToString())
    session = session_of(tmp_path / "model.onnx")
    for lengths in ([0, 359], [100, 8000]):
        _, frames = session.run(
            None, {"samples": np.zeros((2, max(lengths)), np.float32), "lengths": np.array(lengths)}
        )
        assert frames.tolist() == [0, 32 if lengths[1] == 8000 else 0]


@pytest.mark.parametrize("name", ["lstm", "conv", "conformer", "separable", "chunked conformer", "emformer"])
def test_int8_rounds_the_network_and_not_the_front_end(name: str, saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(offline_model(saved(**NETS[name]), {"kept": "yes"}, "0").SerializeToString())
    small = quantized(tmp_path / "model.onnx", by_row=False)
    assert [node.op_type for node in small.graph.node if node.name == MEL] == ["MatMul"]
    assert {one.key: one.value for one in small.metadata_props}["kept"] == "yes"
    (tmp_path / "small.onnx").write_bytes(small.SerializeToString())
    given = {"samples": sound(4)[None], "lengths": np.array([32000])}
    full, rounded = (session_of(tmp_path / name).run(None, given)[0] for name in ("model.onnx", "small.onnx"))
    assert 0 < np.abs(full - rounded).mean() < 0.2


def test_a_network_trained_on_8_bits_keeps_its_weights(saved: Saved, tmp_path: Path) -> None:
    checkpoint = saved(**{**STUDENT, "bits": 8})
    (tmp_path / "model.onnx").write_bytes(offline_model(checkpoint, {}, "0").SerializeToString())
    small = quantized(tmp_path / "model.onnx", by_row=True)
    held = {one.name: onnx.numpy_helper.to_array(one) for one in small.graph.initializer}
    node = next(node for node in small.graph.node if node.op_type == "DynamicQuantizeLSTM")
    weights, steps = held[node.input[1]], next(held[name] for name in node.input if name.endswith("_scale"))
    made = (weights.astype(np.float32) * steps[:, None])[0].T  # [4 × size, inputs], gates i o f g
    i, f, g, o = checkpoint.model.state_dict()["forwards.0.weight_ih_l0"].chunk(4)
    own = np.concatenate([i, o, f, g])
    assert np.abs(made - own).max() < 1e-6 * np.abs(own).max()
