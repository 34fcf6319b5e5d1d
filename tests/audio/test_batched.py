from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.audio.augment import draw_masks, draw_stretch, in_time, masked, stretched
from asr_kd.audio.batched import BatchedFrontend, Input, Sounds
from asr_kd.audio.features import Deferred, Frontend
from asr_kd.audio.settings import AugmentSettings, FeatureSettings
from tests.audio.test_features import speech_like

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "own": {"stack": 3}, "kaldi": {"kind": "kaldi", "stack": 4}, "own, fast mean": {"mean_frames": 20},
    "own, gaps": {"hop_ms": 40, "stack": 2}, "kaldi, fast mean": {"kind": "kaldi", "mean_frames": 1, "stack": 1},
}  # fmt: skip


def deferred(front: Frontend, *lengths: int) -> list[Deferred]:
    return [front.defer(speech_like(samples, seed)) for seed, samples in enumerate(lengths)]


def made(like: FeatureSettings, utterances: list[Deferred]) -> list[np.ndarray]:
    """Features float32 [frames, dimension] of each utterance of a batch."""
    rows = Sounds.of(utterances).features(like, CPU)
    assert rows.dtype == torch.float32 and rows.shape[1:] == (max(map(len, utterances)), like.dimension)
    for row, one in zip(rows, utterances, strict=True):
        assert (row[len(one) :] == 0).all()
    return [row[: len(one)].numpy() for row, one in zip(rows, utterances, strict=True)]


@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_all_but_a_few_values_in_a_thousand_are_the_front_ends_own(kind: dict[str, Any], rate: int) -> None:
    like = FeatureSettings(sample_rate=rate, mels=40, **kind)
    front, lengths = Frontend(like), (rate // 3, 6 * rate, rate + 77)
    utterances, differing, values = deferred(front, *lengths), 0, 0
    for seed, (found, samples) in enumerate(zip(made(like, utterances), lengths, strict=True)):
        expected = front.compute(speech_like(samples, seed))
        np.testing.assert_array_equal(found, found.astype(np.float16))  # rounded as they are
        step = np.maximum(np.abs(np.spacing(expected)), np.float16(2**-14)).astype(np.float32)
        assert (np.abs(found - expected.astype(np.float32)) <= step).all()
        differing, values = differing + np.count_nonzero(found != expected), values + found.size
    assert differing <= 0.004 * values


@given(
    st.sampled_from(sorted(KINDS)), st.lists(st.integers(1600, 40000), min_size=1, max_size=5), st.integers(1600, 40000)
)
@settings(max_examples=30, deadline=None)
def test_who_is_beside_it_in_the_batch_changes_no_bit(kind: str, others: list[int], samples: int) -> None:
    torch.set_num_threads(1)
    like = FeatureSettings(sample_rate=8000, mels=20, **KINDS[kind])
    one, *beside = deferred(Frontend(like), samples, *others)
    (alone,) = made(like, [one])
    np.testing.assert_array_equal(made(like, [*beside, one])[-1], alone)


def test_sound_of_16_bits_and_other_sound_may_be_in_one_batch() -> None:
    like = FeatureSettings(sample_rate=8000, mels=20)
    front = Frontend(like)
    whole = front.defer(np.round(speech_like(8000) * 32768).clip(-32768, 32767).astype(np.float32) / 32768)
    (other,) = deferred(front, 5000)
    assert (whole.sound.dtype, other.sound.dtype) == (np.int16, np.float32)
    both = made(like, [whole, other])
    for found, one in zip(both, (whole, other), strict=True):
        np.testing.assert_array_equal(found, made(like, [one])[0])


def test_the_precision_around_does_not_matter() -> None:
    like = FeatureSettings(sample_rate=8000, mels=20)
    sounds = Sounds.of(deferred(Frontend(like), 12000))
    with torch.autocast("cpu", torch.bfloat16):
        inside = sounds.features(like, CPU)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, sounds.features(like, CPU))


def test_nothing_is_learned_in_it() -> None:
    front = BatchedFrontend(FeatureSettings(sample_rate=8000, mels=20))
    assert not list(front.parameters()) and not front.state_dict()
    assert not front(torch.rand(1, 8000, requires_grad=True), torch.tensor([8000])).requires_grad


@pytest.mark.parametrize("changes", [
    {}, {"stretch": 0.3}, {"mel_warp": 0.2}, {"time_masks": 2, "time_frames": 4, "mel_masks": 2, "mel_bands": 4},
    {"stretch": 0.2, "mel_warp": 0.1, "time_masks": 1, "mel_masks": 1},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("stack", [1, 3])
def test_augmentation_does_there_what_it_does_here(changes: dict[str, Any], stack: int) -> None:
    like, augment = FeatureSettings(sample_rate=8000, mels=20, stack=stack), AugmentSettings(**changes)
    front, rng = Frontend(like), np.random.default_rng(0)
    lengths = (3000, 16000, 2000)
    utterances = deferred(front, *lengths)
    clean = [front.defer(speech_like(samples, 9 + seed)) for seed, samples in enumerate(lengths)]
    drawn = [draw_stretch(len(one), augment, rng) for one in utterances]
    masks = [draw_masks(one.frames, like, augment, rng) for one in drawn * 2]
    found, quiet = Input(like, Sounds.of(utterances), drawn, masks, True, Sounds.of(clean)).made(CPU)
    assert quiet is not None and found.shape == quiet.shape == (6, max(one.frames for one in drawn), like.dimension)
    for at, (rows, still) in enumerate(zip(found.numpy(), quiet.numpy(), strict=True)):
        how, hidden = drawn[at % 3], masks[at]
        expected = masked(stretched(made(like, [utterances[at % 3]])[0], stack, how), stack, hidden)
        np.testing.assert_allclose(rows[: how.frames], expected, atol=1e-6)
        np.testing.assert_allclose(still[: how.frames], in_time(made(like, [clean[at % 3]])[0], stack, how), atol=1e-6)
        assert (rows[how.frames :] == 0).all() and (still[how.frames :] == 0).all()
    if not changes:
        again, none = Input(like, Sounds.of(utterances), drawn, masks[:3]).made(CPU)
        assert none is None and torch.equal(again, found[:3])
