from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.distillation.knowledge import Seen, Task, lesson_of
from asr_kd.distillation.sequences import draw_from_lists, draw_sequences, weigh_lists
from asr_kd.distillation.settings import SequenceSettings, SourceSettings
from asr_kd.models.settings import ModelSettings
from asr_kd.units import Units
from tests.training.conftest import FEATURES


def collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(unit for unit, _ in itertools.groupby(path) if unit)


def drawn(labels: torch.Tensor, lengths: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(part.tolist()) for part in labels.split(lengths.tolist())]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_transcripts_are_drawn_as_often_as_ctc_says(temperature: float) -> None:
    probs = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.25, 0.25]])
    tempered = probs ** (1 / temperature)
    tempered /= tempered.sum(1, keepdims=True)
    expected: Counter[tuple[int, ...]] = Counter()
    for path in itertools.product(range(3), repeat=3):
        expected[collapsed(path)] += math.prod(tempered[frame, unit] for frame, unit in enumerate(path))
    count = 20_000
    units = torch.arange(3).expand(3 * count, 3)
    labels, lengths = draw_sequences(
        units,
        torch.from_numpy(np.tile(probs, (count, 1))),
        torch.full((count,), 3),
        SequenceSettings(temperature=temperature),
        np.random.default_rng(0),
    )
    found = Counter(drawn(labels, lengths))
    assert set(found) <= set(expected)
    for sequence, probability in expected.items():
        assert found[sequence] / count == pytest.approx(probability, abs=4 * math.sqrt(probability / count))


def test_units_of_neighbouring_utterances_do_not_collapse_and_kept_units_share_the_rest() -> None:
    units = torch.tensor([[2, 0], [2, 1], [2, 1], [0, 0]])
    probs = torch.tensor([[0.9, 0.0], [0.0, 0.5], [0.7, 0.0], [0.1, 0.0]])
    labels, lengths = draw_sequences(
        units, probs, torch.tensor([1, 1, 1, 1]), SequenceSettings(), np.random.default_rng(0)
    )
    assert drawn(labels, lengths) == [(2,), (1,), (2,), ()]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 2**31))
def test_what_is_drawn_fits_into_the_frames(frames: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = torch.from_numpy(rng.dirichlet(np.full(4, 0.3), sum(frames)))
    labels, lengths = draw_sequences(
        torch.arange(4).expand(sum(frames), 4), probs, torch.tensor(frames), SequenceSettings(temperature=0.7), rng
    )
    for sequence, room in zip(drawn(labels, lengths), frames, strict=True):
        assert len(sequence) + sum(a == b for a, b in itertools.pairwise(sequence)) <= room


def test_towards_temperature_zero_the_best_is_drawn() -> None:
    probs = torch.tensor([[0.4, 0.6], [0.7, 0.3], [0.1, 0.9]])
    units = torch.tensor([[0, 3]]).expand(3, 2)
    assert drawn(
        *draw_sequences(units, probs, torch.tensor([3]), SequenceSettings(temperature=1e-3), np.random.default_rng(0))
    ) == [(3, 3)]
    lists = [[([1], -700.0), ([2, 2], -690.0)]]
    assert draw_from_lists(lists, SequenceSettings(temperature=1e-3), np.random.default_rng(0))[0].tolist() == [2, 2]


def test_lists_are_drawn_by_their_scores() -> None:
    scores = {(1,): -5.0, (2, 1): -6.0, (): -8.0}
    lists = [[(list(ids), score) for ids, score in scores.items()]] * 20_000
    labels, lengths = draw_from_lists(lists, SequenceSettings(temperature=2.0), np.random.default_rng(0))
    weights = {ids: math.exp(score / 2) for ids, score in scores.items()}
    found = Counter(drawn(labels, lengths))
    for ids, weight in weights.items():
        assert found[ids] / 20_000 == pytest.approx(weight / sum(weights.values()), abs=0.015)


def test_several_are_drawn_one_of_each_utterance_after_the_other() -> None:
    settings = SequenceSettings(draws=3)
    certain = torch.tensor([[1.0], [1.0], [1.0]])
    labels, lengths = draw_sequences(
        torch.tensor([[1], [2], [0]]), certain, torch.tensor([2, 1]), settings, np.random.default_rng(0)
    )
    assert drawn(labels, lengths) == [(1, 2), ()] * 3
    assert (
        drawn(*draw_from_lists([[([1], 0.0)], [([2, 3], 0.0)]], settings, np.random.default_rng(0)))
        == [(1,), (2, 3)] * 3
    )
    unsure = draw_from_lists([[([1], 0.0), ([2], 0.0)]] * 50, SequenceSettings(draws=2), np.random.default_rng(0))
    first, second = drawn(*unsure)[:50], drawn(*unsure)[50:]
    assert first != second


def test_the_best_of_a_list_are_learned_together_by_their_weights(units: Units) -> None:
    lists = [
        [([1, 2], -1.0), ([2], -2.0), ([1, 2], -1.5), ([3], -9.0)],  # two that are spelled alike are one
        [([2, 2], -4.0)],
    ]
    settings = SequenceSettings(best=2, temperature=2.0)
    parts = weigh_lists(lists, settings)
    text, weights = parts["sequences"], parts["sequences.weights"].values
    assert text.lengths is not None
    assert drawn(text.values, text.lengths) == [(1, 2), (2,), (2, 2), (2, 2)]
    first = np.exp(-0.5) + np.exp(-0.75)
    np.testing.assert_allclose(
        weights, [first / (first + np.exp(-1)), np.exp(-1) / (first + np.exp(-1)), 1, 0], rtol=1e-6
    )

    logits = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([7, 6])
    source = SourceSettings(audio="a", transcripts="t", soft=1.0, sequences=settings)
    task = Task(units, FEATURES, ModelSettings(), "ghost")
    learned = torch.arange(7)[None, :] < lengths[:, None]
    loss = lesson_of(source, task).kinds[0].loss(Seen(logits, lengths, learned, parts, {}, {}))
    log_probs = logits.log_softmax(-1).transpose(0, 1)
    expected = logits.new_zeros(())
    for utterance, ids, weight in ((0, [1, 2], weights[0]), (0, [2], weights[1]), (1, [2, 2], 1.0)):
        one = log_probs[: lengths[utterance], utterance : utterance + 1]
        size = torch.tensor([len(ids)])
        expected = expected + weight * torch.nn.functional.ctc_loss(
            one, torch.tensor([ids]), lengths[utterance : utterance + 1], size, reduction="sum"
        )
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"targets": "t", "sequences": {"best": 2}}, "sequences.best takes the best of n-best lists"),
        ({"transcripts": "t", "sequences": {"best": 2, "draws": 3}}, "draws and best are two ways to learn a list"),
    ],
)
def test_the_best_come_from_lists(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceSettings.model_validate({"audio": "a", "soft": 1.0} | source)
