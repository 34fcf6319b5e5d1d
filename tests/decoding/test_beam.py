from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.decoding.beam import prefix_beam_search
from asr_kd.decoding.greedy import greedy


def random_posteriors(frames: int, units: int, seed: int, sharpness: float = 2.0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, sharpness, (frames, units))
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def sum_over_alignments(log_probs: np.ndarray, blank: int) -> dict[tuple[int, ...], float]:
    """Probability of every sequence: each path is enumerated."""
    frames, units = log_probs.shape
    totals: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(units), repeat=frames):
        sequence = tuple(unit for unit, _ in itertools.groupby(path) if unit != blank)
        probability = math.exp(sum(log_probs[frame, unit] for frame, unit in enumerate(path)))
        totals[sequence] = totals.get(sequence, 0.0) + probability
    return totals


@settings(max_examples=40, deadline=None)
@given(frames=st.integers(1, 5), units=st.integers(2, 4), seed=st.integers(0, 10**6), blank=st.integers(0, 1))
def test_a_wide_beam_sums_over_all_alignments(frames: int, units: int, seed: int, blank: int) -> None:
    log_probs = random_posteriors(frames, units, seed)
    exact = sum_over_alignments(log_probs, blank)
    found = prefix_beam_search(log_probs, 10_000, blank)
    assert {tuple(ids) for ids, _ in found} == set(exact)
    for ids, score in found:
        assert score == pytest.approx(math.log(exact[tuple(ids)]), abs=1e-9)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


@settings(max_examples=40, deadline=None)
@given(frames=st.integers(1, 5), seed=st.integers(0, 10**6), beam=st.integers(1, 8))
def test_a_narrow_beam_never_overstates_and_gives_each_sequence_once(frames: int, seed: int, beam: int) -> None:
    log_probs = random_posteriors(frames, 4, seed, 1.0)
    exact = sum_over_alignments(log_probs, 0)
    found = prefix_beam_search(log_probs, beam)
    assert 1 <= len(found) <= beam
    assert len({tuple(ids) for ids, _ in found}) == len(found)
    for ids, score in found:
        assert score <= math.log(exact[tuple(ids)]) + 1e-9


def naive_search(log_probs: np.ndarray, beam: int) -> list[tuple[list[int], float]]:
    """The same search without leaving out units."""
    kept = {(): (1.0, 0.0)}
    for frame in np.exp(log_probs):
        new: dict[tuple[int, ...], list[float]] = {}
        for prefix, (blank, unit) in kept.items():
            new.setdefault(prefix, [0.0, 0.0])[0] += (blank + unit) * frame[0]
            if prefix:
                new[prefix][1] += unit * frame[prefix[-1]]
            for other in range(1, len(frame)):
                before = blank if prefix and prefix[-1] == other else blank + unit
                new.setdefault((*prefix, other), [0.0, 0.0])[1] += before * frame[other]
        best = sorted(new.items(), key=lambda item: -sum(item[1]))[:beam]
        kept = {prefix: (parts[0], parts[1]) for prefix, parts in best}
    return [(list(prefix), math.log(sum(parts))) for prefix, parts in kept.items()]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), beam=st.integers(1, 5), sharpness=st.floats(0.1, 8.0))
def test_leaving_out_improbable_units_changes_nothing(seed: int, beam: int, sharpness: float) -> None:
    log_probs = random_posteriors(12, 15, seed, sharpness)
    found, wanted = prefix_beam_search(log_probs, beam), naive_search(log_probs, beam)
    assert [ids for ids, _ in found] == [ids for ids, _ in wanted]
    assert [score for _, score in found] == pytest.approx([score for _, score in wanted])


def test_finds_what_the_best_path_misses() -> None:
    # "1" has probability 0.64 over its three paths, the best single path is all blank with 0.36
    log_probs = np.log(np.array([[0.6, 0.4], [0.6, 0.4]]))
    assert greedy(log_probs) == []
    assert prefix_beam_search(log_probs, 4)[0] == ([1], pytest.approx(math.log(0.64)))


def test_long_audio_neither_underflows_nor_slows_down() -> None:
    log_probs = random_posteriors(3000, 20, 0, 4.0).astype(np.float32)
    ids, score = prefix_beam_search(log_probs, 4)[0]
    assert len(ids) > 1000
    assert math.isfinite(score)


def test_no_frames() -> None:
    assert prefix_beam_search(np.zeros((0, 3)), 4) == [([], 0.0)]
