from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from asr_kd.audio.settings import FeatureSettings
from asr_kd.decoding import aligning
from asr_kd.decoding.aligning import Aligner
from asr_kd.errors import AudioError, UserError
from asr_kd.models.acoustic import build_model, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.units import Units

FEATURES = FeatureSettings(sample_rate=8000, mels=8)


@pytest.fixture(params=["lstm", "blstm"])
def aligner(tmp_path: Path, letter_units: Units, request: pytest.FixtureRequest) -> Aligner:
    """Of a network with random weights."""
    torch.manual_seed(3)
    kind = ModelSettings(kind=request.param, layers=2, size=8)
    model = build_model(kind, FEATURES.dimension, letter_units.size)
    save_checkpoint(tmp_path / "checkpoint", model, letter_units, FEATURES, kind)
    return Aligner(str(tmp_path / "checkpoint"))


def spikes(aligner: Aligner, places: list[tuple[int, int]], frames: int, sure: float = 0.99) -> np.ndarray:
    """Log-probabilities of a network that emits these units in these frames, and blanks elsewhere."""
    size = aligner._checkpoint.units.size
    found = np.full((frames, size), (1 - sure) / (size - 1), np.float32)
    path = np.zeros(frames, int)
    for frame, unit in places:
        path[frame] = unit
    found[np.arange(frames), path] = sure
    return np.log(found)


def test_each_word_has_its_time_and_its_score(aligner: Aligner, monkeypatch: pytest.MonkeyPatch) -> None:
    units = aligner._checkpoint.units
    texts = ["ab", "bba", "ab"]
    ids = [units.encode(text) for text in texts]
    starts = [5, 40, 80]
    assert all(len(word) > 2 and units.piece(word[0]) == "▁" for word in ids)  # its space comes first, by itself
    places = [(start + 2 * at, unit) for start, word in zip(starts, ids, strict=True) for at, unit in enumerate(word)]
    heard = spikes(aligner, places, 120)
    monkeypatch.setattr(aligner, "_hear", lambda blocks: heard)
    words = aligner.align([], " ".join(texts))
    seconds = aligner._checkpoint.frame_ms / 1000
    assert [word.text for word in words] == texts and [word.units for word in words] == list(map(len, ids))
    for word, start, spelt in zip(words, starts, ids, strict=True):
        assert word.start == pytest.approx((start + 2) * seconds)
        assert word.end == pytest.approx((start + 2 * len(spelt) - 1) * seconds)
    for word, (start, end) in zip(words, itertools.pairwise([0, 40, 80, 120]), strict=True):
        assert word.score == pytest.approx((end - start) * np.log(0.99), rel=1e-3)
    wrong = aligner.align([], "b ab bab")
    assert sum(word.score for word in wrong) < -20 < sum(word.score for word in words)


def test_what_no_unit_spells_stays_with_its_neighbour(aligner: Aligner, monkeypatch: pytest.MonkeyPatch) -> None:
    units, real = aligner._checkpoint.units, aligner._checkpoint.units.encode
    monkeypatch.setattr(units, "encode", lambda text: [] if text in ("-", "…") else real(text))
    monkeypatch.setattr(aligner, "_hear", lambda blocks: spikes(aligner, [], 60))
    assert [word.text for word in aligner.align([], "… ab - ba …")] == ["… ab -", "ba …"]


def test_sound_in_blocks_of_any_size_is_aligned_alike(aligner: Aligner) -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, 3 * aligner.rate).astype(np.float32)
    words = aligner.align([sound], "ab ba")
    assert words == aligner.align(np.array_split(sound, 17), "ab ba")
    assert 0 <= words[0].start < words[0].end <= words[1].start < words[1].end <= 3.1


@pytest.mark.parametrize(
    ("text", "message"), [("", "it says nothing"), (" \t", "it says nothing"), ("a Ж", "holds 'Ж', which no unit covers"), ("ab " * 200, "do not fit into")]
)  # fmt: skip
def test_texts_that_cannot_be_aligned_are_refused(aligner: Aligner, text: str, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        aligner.align([np.zeros(aligner.rate, np.float32)], text)


def test_what_needs_too_much_memory_is_refused(aligner: Aligner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligning, "MOST", 100)
    with pytest.raises(AudioError, match=r"frames are too many, \d+\.\d times what fits; cut it by hand first"):
        aligner.align([np.zeros(aligner.rate, np.float32)], "ab ba")


def test_a_missing_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        Aligner(str(tmp_path / "none"))
