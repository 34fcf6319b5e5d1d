from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.decoding.beam import BeamSearch, prefix_beam_search
from asr_kd.decoding.grammar import Grammar, Lexicon
from asr_kd.decoding.greedy import GreedySearch, units_of
from asr_kd.decoding.ngram import END, START, Ngrams, read_arpa
from asr_kd.units import Units
from tests.decoding.oracle import align_spikes


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
    assert units_of(log_probs.argmax(1)) == []
    assert prefix_beam_search(log_probs, 4)[0] == ([1], pytest.approx(math.log(0.64)))


def test_long_audio_neither_underflows_nor_slows_down() -> None:
    log_probs = random_posteriors(3000, 20, 0, 4.0).astype(np.float32)
    ids, score = prefix_beam_search(log_probs, 4)[0]
    assert len(ids) > 1000
    assert math.isfinite(score)


def test_no_frames() -> None:
    assert prefix_beam_search(np.zeros((0, 3)), 4) == [([], 0.0)]


def words_of(units: Units, ids: tuple[int, ...]) -> list[tuple[int, ...]]:
    groups: list[tuple[int, ...]] = []
    for unit in ids:
        if not groups or units.starts_word(unit):
            groups.append(())
        groups[-1] = (*groups[-1], unit)
    return groups


def added(
    units: Units, ids: tuple[int, ...], ngrams: Ngrams | None, lexicon: Lexicon | None, weight: float, bonus: float
) -> float | None:
    """What words add to a score, by the definition; None where the lexicon lacks one."""
    groups = words_of(units, ids)
    if lexicon:
        if any(group not in lexicon.words for group in groups):
            return None
        words = [lexicon.words[group] for group in groups]
    else:
        words = [word for group in groups if (word := units.decode(group).strip())]
    total, context = bonus * len(words), (START,)
    for word in [*words, END] if ngrams else []:
        score, context = ngrams.score(context, word)
        total += weight * math.log(10) * score
    return total


@settings(max_examples=30, deadline=None)
@given(
    frames=st.integers(1, 5), seed=st.integers(0, 10**6), weight=st.sampled_from([0.0, 0.5, 2.0]),
    bonus=st.sampled_from([-1.0, 0.0, 2.0]), with_lm=st.booleans(), with_lexicon=st.booleans(),
)  # fmt: skip
def test_a_wide_beam_with_words_is_exact(
    letter_units: Units, letters_arpa: str, frames: int, seed: int, weight: float, bonus: float,
    with_lm: bool, with_lexicon: bool,
) -> None:  # fmt: skip
    ngrams = read_arpa(letters_arpa) if with_lm else None
    space, a, b = (letter_units.encode("a")[0], *(letter_units.encode(letter)[1] for letter in "ab"))
    spellings = {(space, a): "a", (space, a, b): "ab", (space, b, a): "unheard", (space, b): "b"}
    lexicon = Lexicon(spellings, {ids[:end] for ids in spellings for end in range(1, 4)}) if with_lexicon else None
    log_probs = random_posteriors(frames, letter_units.size, seed)
    exact = {
        ids: math.log(probability) + score
        for ids, probability in sum_over_alignments(log_probs, 0).items()
        if (score := added(letter_units, ids, ngrams, lexicon, weight, bonus)) is not None
    }
    search = BeamSearch(100_000, 0, Grammar(letter_units, ngrams, lexicon, weight, bonus))
    search.push(log_probs)
    found = search.results()
    assert {tuple(spike.unit for spike in spikes) for spikes, _ in found} == set(exact)
    for spikes, score in found:
        assert score == pytest.approx(exact[tuple(spike.unit for spike in spikes)], abs=1e-8)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


def test_a_language_model_decides_between_what_sounds_alike(letter_units: Units, letters_arpa: str) -> None:
    space, a, b = (letter_units.encode("a")[0], *(letter_units.encode(letter)[1] for letter in "ab"))
    log_probs = np.full((4, letter_units.size), -9.0)
    for frame, (unit, value) in enumerate([(space, -0.1), (a, -0.1), (space, -0.7), (b, -0.1)]):
        log_probs[frame, unit] = value
    log_probs[2, 0] = -0.75  # "a b" is a little more probable than "ab"
    texts = []
    for weight in (0.0, 2.0):
        search = BeamSearch(8, 0, Grammar(letter_units, read_arpa(letters_arpa), None, weight, 0.0))
        search.push(log_probs)
        texts.append(letter_units.decode([spike.unit for spike in search.results()[0][0]]))
    assert texts == ["a b", "ab"]


def test_within_a_word_of_the_lexicon_only_whole_words_are_given(letter_units: Units) -> None:
    space, a, b = (letter_units.encode("a")[0], *(letter_units.encode(letter)[1] for letter in "ab"))
    lexicon = Lexicon({(space, a, b): "ab"}, {(space,), (space, a), (space, a, b)})
    log_probs = np.full((6, letter_units.size), -50.0)
    for frame, unit in enumerate([space, a, b, space, a, 0]):
        log_probs[frame, unit] = -0.01
    search = BeamSearch(1, 0, Grammar(letter_units, None, lexicon, 0.0, 0.0))
    search.push(log_probs)
    assert [spike.unit for spike in search.results()[0][0]] == [space, a, b]


@settings(max_examples=30, deadline=None)
@given(frames=st.integers(1, 30), seed=st.integers(0, 10**6), beam=st.integers(1, 6), sharpness=st.floats(0.5, 6))
def test_spikes_follow_each_other_and_hold_the_frames_probabilities(
    frames: int, seed: int, beam: int, sharpness: float
) -> None:
    log_probs = random_posteriors(frames, 5, seed, sharpness)
    search = BeamSearch(beam)
    search.push(log_probs)
    for spikes, _ in search.results():
        edges = [edge for spike in spikes for edge in (spike.start, spike.end)]
        assert edges == sorted(edges) and all(spike.start < spike.end <= frames for spike in spikes)
        for spike in spikes:
            heard = np.exp(log_probs[spike.start : spike.end, spike.unit])
            assert spike.probability == pytest.approx(heard.max())


def best_alignments(log_probs: np.ndarray) -> dict[tuple[int, ...], tuple[float, list[tuple[int, int, int]]]]:
    """Of every sequence the most probable path, with its spikes as unit, start and end: each path is enumerated."""
    frames, units = log_probs.shape
    best: dict[tuple[int, ...], tuple[float, list[tuple[int, int, int]]]] = {}
    for path in itertools.product(range(units), repeat=frames):
        score, spikes, at = sum(log_probs[frame, unit] for frame, unit in enumerate(path)), [], 0
        for unit, run in itertools.groupby(path):
            length = len(list(run))
            spikes += [(unit, at, at + length)] if unit else []
            at += length
        sequence = tuple(unit for unit, *_ in spikes)
        best[sequence] = max(best.get(sequence, (-math.inf, [])), (score, spikes))
    return best


@settings(max_examples=30, deadline=None)
@given(frames=st.integers(1, 6), units=st.integers(2, 4), seed=st.integers(0, 10**6), sharpness=st.floats(0.3, 4))
def test_times_are_those_of_the_most_probable_alignment(frames: int, units: int, seed: int, sharpness: float) -> None:
    log_probs = random_posteriors(frames, units, seed, sharpness)
    exact = best_alignments(log_probs)
    search = BeamSearch(10_000)
    search.push(log_probs)
    greedily = GreedySearch()
    greedily.push(log_probs)
    for spikes, _ in [*search.results(), *greedily.results()]:
        found = [(spike.unit, spike.start, spike.end) for spike in spikes]
        assert found == exact[tuple(spike.unit for spike in spikes)][1]
        aligned = align_spikes(
            log_probs.astype(np.float32), [spike.unit for spike in spikes], 0
        )  # as torchaudio aligns
        assert found == [(spike.unit, spike.start, spike.end) for spike in aligned]


def test_spikes_of_certain_posteriors_are_the_best_path() -> None:
    path = [0, 1, 1, 0, 1, 2, 2, 0, 0, 3, 1]
    log_probs = np.log(np.eye(4)[path] * 0.98 + 0.005)
    search = BeamSearch(4)
    search.push(log_probs)
    spikes = search.results()[0][0]
    assert [(spike.unit, spike.start, spike.end) for spike in spikes] == [
        (1, 1, 3), (1, 4, 5), (2, 5, 7), (3, 9, 10), (1, 10, 11),
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 40), seed=st.integers(0, 10**6), beam=st.integers(1, 6), sharpness=st.floats(0.5, 6),
    cuts=st.sets(st.integers(0, 40)), with_lm=st.booleans(), horizon=st.sampled_from([None, 1, 5, 12]),
)  # fmt: skip
def test_settling_at_any_time_changes_nothing(
    letter_units: Units, letters_arpa: str, frames: int, seed: int, beam: int, sharpness: float, cuts: set[int],
    with_lm: bool, horizon: int | None,
) -> None:  # fmt: skip
    log_probs = random_posteriors(frames, letter_units.size, seed, sharpness)
    grammar = Grammar(letter_units, read_arpa(letters_arpa), None, 1.0, 0.5) if with_lm else None
    whole, pieces = BeamSearch(beam, 0, grammar, horizon), BeamSearch(beam, 0, grammar, horizon)
    whole.push(log_probs)
    settled = []
    edges = [0, *sorted(cut for cut in cuts if cut < frames), frames]
    for start, end in itertools.pairwise(edges):
        pieces.push(log_probs[start:end])
        settled += pieces.settle()
    assert [(settled + spikes, score) for spikes, score in pieces.results()] == whole.results()


def test_what_has_settled_takes_no_memory() -> None:
    path = np.random.default_rng(0).integers(0, 20, 3000)
    log_probs = np.log(np.eye(20)[path] * 0.9 + 0.005)
    search, held, settled = BeamSearch(8, horizon=100), [], 0
    for start in range(0, 3000, 10):
        search.push(log_probs[start : start + 10])
        settled += len(search.settle())
        held.append(len(search._pairs) + len(search._nodes) + max(len(spikes) for spikes, _ in search.results()))
    assert settled > 2500
    assert max(held[150:]) < 1.2 * max(held[:150])


def test_doubts_end_at_the_horizon() -> None:
    log_probs = np.log(np.array([[0.02, 0.5, 0.48], [0.98, 0.01, 0.01], *[[0.98, 0.01, 0.01]] * 18]))
    found = [BeamSearch(3), BeamSearch(3, horizon=40), BeamSearch(3, horizon=10)]
    for search in found:
        search.push(log_probs)
    keeps, within, decided = ([[spike.unit for spike in spikes] for spikes, _ in search.results()] for search in found)
    assert keeps == within and keeps[:2] == [[1], [2]]
    assert decided[0] == [1] and all(units[0] == 1 for units in decided)
