from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.decoding.estimate import estimate, write_arpa
from asr_kd.decoding.ngram import END, Ngrams, read_arpa
from asr_kd.decoding.settings import LmSettings
from asr_kd.distillation.opinion import Opinion
from asr_kd.distillation.settings import OpinionSettings
from asr_kd.errors import UserError
from asr_kd.targets.codec import encode
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.training.trainer import train
from asr_kd.units import Units

TEXTS = ["▁ a b", "▁ a b", "▁ b a", "▁ a a b"]


@pytest.fixture(scope="module")
def arpa(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("lm") / "lm.arpa"
    write_arpa(path, TEXTS, 3)
    return str(path)


def opinion_of(arpa: str, units: Units, weight: float = 0.5) -> Opinion:
    return Opinion(OpinionSettings(lm=arpa, weight=weight), units)


def says(units: Units, spikes: list[dict[str, float]]) -> SparsePosteriors:
    """A frame of blank, then for each spike one of its units (blank has the rest) and one of blank."""
    ids = {units.piece(unit): unit for unit in range(units.size)}
    dense = np.full((2 * len(spikes) + 1, units.size), 1e-6)
    for frame, spike in enumerate(spikes):
        for piece, prob in spike.items():
            dense[2 * frame + 1, ids[piece]] = prob
    dense[:, Units.blank] += 1 - dense.sum(1)
    return SparsePosteriors.from_dense(np.log(dense), 255, 1.0)


def dense_of(target: SparsePosteriors) -> np.ndarray:
    dense = np.zeros((target.frames, target.num_units))
    dense[target.rows, target.units] = np.exp(target.log_probs)
    return dense


def sentence(model: Ngrams, pieces: tuple[str, ...]) -> float:
    """The probability of a whole sentence, word by word."""
    total, context = 0.0, model.start
    for piece in (*pieces, END):
        log_prob, context = model.score(context, piece)
        total += log_prob
    return 10**total


@given(probs=st.lists(st.tuples(st.floats(0.02, 0.7), st.floats(0.02, 0.29)), min_size=1, max_size=4), weight=st.floats(0, 2))  # fmt: skip
def test_each_spike_is_weighed_by_the_sentences_it_would_make(
    arpa: str, units: Units, probs: list[tuple[float, float]], weight: float
) -> None:
    """Against the probabilities of all whole sentences that differ in it: the rest of the sentence cancels."""
    probs = [(a, b) if a + b > 0.5 else (0.65, 0.3) for a, b in probs]  # all are said
    target = says(units, [{"a": a, "b": b} for a, b in probs])
    found = dense_of(opinion_of(arpa, units, weight).of(target))
    model, before, every = read_arpa(arpa), dense_of(target), range(units.size)
    best = [units.piece(int(before[2 * spike + 1, 1:].argmax()) + 1) for spike in range(len(probs))]
    for spike, row in enumerate(range(1, len(before), 2)):
        opinion = np.array([
            0.0 if unit == Units.blank else sentence(model, (*best[:spike], units.piece(unit), *best[spike + 1 :]))
            for unit in every
        ])  # fmt: skip
        expected = before[row] * np.where(opinion > 0, opinion, 0.0) ** weight
        expected[Units.blank] = 0.0
        expected *= (1 - before[row, Units.blank] / before[row].sum()) * before[row].sum() / expected.sum()
        expected[Units.blank] = before[row, Units.blank]
        np.testing.assert_allclose(found[row], expected, rtol=2e-4, atol=1e-9)
        np.testing.assert_array_equal(found[row - 1], before[row - 1])
    encode(opinion_of(arpa, units, weight).of(target))  # sorted, and adds up to 1


def test_without_weight_or_with_a_model_that_knows_nothing_better_all_stays(
    arpa: str, units: Units, tmp_path: Path
) -> None:
    target = says(units, [{"a": 0.6, "b": 0.3}, {"b": 0.9}])
    even = tmp_path / "even.arpa"
    pieces = [units.piece(unit) for unit in range(units.size) if unit != Units.blank]
    grams = "\n".join(f"-1.0\t{word}" for word in ["<s>", END, *pieces])
    even.write_text(f"\\data\\\nngram 1={len(pieces) + 2}\n\n\\1-grams:\n{grams}\n\n\\end\\\n")
    for opinion in (opinion_of(arpa, units, 0.0), opinion_of(str(even), units, 1.0)):
        found = opinion.of(target)
        np.testing.assert_array_equal(found.units, target.units)
        np.testing.assert_allclose(found.log_probs, target.log_probs, atol=1e-6)


def test_a_doubtful_neighbour_is_no_context_and_silence_stays_silence(arpa: str, units: Units) -> None:
    with_it = says(units, [{"a": 0.9}, {"a": 0.2}, {"a": 0.5, "b": 0.45}])
    without = says(units, [{"a": 0.9}, {}, {"a": 0.5, "b": 0.45}])
    opinion = opinion_of(arpa, units)
    np.testing.assert_allclose(dense_of(opinion.of(with_it))[5], dense_of(opinion.of(without))[5])
    silent = says(units, [{}, {}])
    np.testing.assert_array_equal(opinion.of(silent).log_probs, silent.log_probs)


def test_it_turns_a_spike_where_the_text_is_sure(arpa: str, units: Units) -> None:
    """`▁ a ?`: with nothing behind it, b."""
    target = says(units, [{"▁": 0.9}, {"a": 0.9}, {"a": 0.5, "b": 0.45}])
    found = opinion_of(arpa, units).of(target)
    assert units.piece(int(found.units[found.starts[5]])) == "b"
    np.testing.assert_allclose(found.tail, target.tail)


def test_pieces_are_modelled_by_the_verb(
    letters: Path, tmp_path: Path, units: Units, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("ab\nba\n")
    estimate(
        LmSettings(
            source=str(tmp_path / "text.txt"), output=str(tmp_path / "lm"), units=str(letters), pieces=True, order=3
        )
    )
    assert "3 pieces and their 3-grams from 2 utterances" in capsys.readouterr().out
    model = read_arpa(str(tmp_path / "lm" / "lm.arpa"))
    assert set(model.words) == {"▁", "a", "b"} and model.order == 3
    with pytest.raises(ValueError, match="pieces are those of units; give units"):
        LmSettings(source="text.txt", output="lm", pieces=True)


def test_texts_that_no_unit_covers_are_left_out_and_counted(
    letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("ab\nbé\n")
    estimate(
        LmSettings(source=str(tmp_path / "text.txt"), output=str(tmp_path / "lm"), units=str(letters), pieces=True)
    )
    said = capsys.readouterr()
    assert "1 texts hold what no unit covers ('é' and others) and are left out" in said.err
    assert "from 1 utterances" in said.out


def test_a_model_of_words_is_refused(units: Units, tmp_path: Path) -> None:
    write_arpa(tmp_path / "words.arpa", ["seven one"], 2)
    with pytest.raises(
        UserError, match=r"knows no unit of this run; make it of their pieces \(asr-kd lm units=… pieces=true\)"
    ):
        opinion_of(str(tmp_path / "words.arpa"), units)


@pytest.mark.parametrize("kind", [{}, {"spikes": {}}, {"sequences": {}}], ids=["frames", "spikes", "sequences"])
def test_it_is_learned_and_resumed_to_the_same_bits(
    job: Any, arpa: str, tmp_path: Path, resumed: Any, kind: dict[str, Any]
) -> None:
    source = {"opinion": {"lm": arpa, "weight": 0.3}, **kind}
    states = []
    for name in ("whole", "stopped"):
        settings = job(source=source, output=str(tmp_path / name), loader_workers=len(states))
        train(settings) if name == "whole" else resumed(settings)
        states.append((tmp_path / name / "last" / "state.safetensors").read_bytes())
    assert states[0] == states[1]
    if not kind:  # of tones this long a spike has no other unit to speak of
        train(job(output=str(tmp_path / "without")))
        assert (tmp_path / "without" / "last" / "state.safetensors").read_bytes() != states[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"targets": None, "teacher": "folder"}, "opinion needs targets"),
        ({"features": [{"student": "layer.1", "teacher": "layer.1"}]}, "opinion changes soft targets alone, not hidden states"),
        ({"critics": [{}]}, "opinion changes stored targets, and critics of outputs need them as they were stored"),
    ],
)  # fmt: skip
def test_what_it_cannot_change_is_refused(job: Any, arpa: str, source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(source={"opinion": {"lm": arpa}, **source})


def test_another_model_in_its_place_is_noticed(job: Any, tmp_path: Path, resumed: Any) -> None:
    for texts in itertools.islice(itertools.count(), 2):
        write_arpa(tmp_path / "lm.arpa", TEXTS[texts:], 2)
        settings = job(source={"opinion": {"lm": str(tmp_path / "lm.arpa")}})
        if texts:
            with pytest.raises(UserError, match=r"lm\.arpa|texts"):
                train(settings)
        else:
            resumed(settings, finish=False)
