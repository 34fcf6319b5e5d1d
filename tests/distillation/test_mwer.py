"""Expected word errors against all sequences one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from asr_kd.distillation import mwer
from asr_kd.distillation.batch import Part
from asr_kd.distillation.kind_settings import MwerSettings
from asr_kd.distillation.mwer import expected_word_errors, n_best, sampled_paths, sequence_log_probs
from asr_kd.evaluation.wer import count_errors
from asr_kd.training.settings import TrainSettings
from asr_kd.units import Units

Job = Callable[..., TrainSettings]
ALL = 10_000  # more than there are sequences


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(unit for unit, _ in itertools.groupby(path) if unit != Units.blank)


def probabilities(logits: Tensor) -> dict[tuple[int, ...], Tensor]:
    """Every sequence's probability, path by path; [frames, units]."""
    log_probs = logits.log_softmax(-1)
    totals: dict[tuple[int, ...], Tensor] = {}
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        likelihood = log_probs[torch.arange(len(path)), torch.tensor(path)].sum().exp()
        totals[collapsed(path)] = totals.get(collapsed(path), logits.new_zeros(())) + likelihood
    return totals


def true_expectation(logits: Tensor, text: str, units: Units) -> Tensor:
    return torch.stack(
        [chance * count_errors(text, units.decode(ids)).errors for ids, chance in probabilities(logits).items()]
    ).sum()


def random_logits(*shape: int, sharpness: float = 1.5) -> Tensor:
    return (sharpness * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def expected(logits: Tensor, texts: list[str], units: Units, lengths: list[int] | None = None, **how: Any) -> Tensor:
    ids = [units.encode(text) for text in texts]
    flat = torch.tensor([unit for row in ids for unit in row], dtype=torch.int64)
    frames = torch.tensor(lengths or [logits.shape[1]] * len(logits))
    sizes = torch.tensor([len(row) for row in ids])
    return expected_word_errors(logits, frames, Part(flat, sizes), units, MwerSettings(**how))


def slope(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("text", ["ab", "a b", "a", ""])
def test_a_list_of_all_sequences_gives_the_true_expectation_and_its_gradient(text: str, units: Units) -> None:
    logits = random_logits(1, 4, units.size)
    found, wanted = expected(logits, [text], units, hypotheses=ALL)[0], true_expectation(logits[0], text, units)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-12)
    torch.testing.assert_close(slope(found, logits), slope(wanted, logits))
    assert torch.autograd.gradcheck(
        lambda values: expected(values, [text], units, hypotheses=ALL), logits, fast_mode=True
    )


def test_a_short_list_is_renormalised(units: Units) -> None:
    logits = random_logits(1, 4, units.size)
    found = expected(logits, ["ab"], units, hypotheses=3)[0]
    # with so narrow a beam the list need not be the three best, so ask for it
    kept = n_best(logits.detach().log_softmax(-1), torch.tensor([4]), 3)[0]
    every = probabilities(logits[0])
    scores = torch.stack([every[ids] for ids in kept])
    errors = torch.tensor([count_errors("ab", units.decode(ids)).errors for ids in kept], dtype=torch.float64)
    assert len(kept) == 3
    assert found.item() == pytest.approx(((scores * errors).sum() / scores.sum()).item())
    torch.testing.assert_close(slope(found, logits), slope((scores * errors).sum() / scores.sum(), logits))
    assert torch.autograd.gradcheck(lambda values: expected(values, ["ab"], units, hypotheses=3), logits)


def test_draws_give_the_true_gradient_on_average(units: Units, monkeypatch: pytest.MonkeyPatch) -> None:
    """The average over all pairs of paths, each weighed by its probability, in place of many random ones."""
    logits = random_logits(1, 3, 3)
    paths = list(itertools.product(range(3), repeat=3))
    chances = torch.stack(
        [logits[0].log_softmax(-1)[torch.arange(3), torch.tensor(path)].sum().exp() for path in paths]
    )
    value, gradient = 0.0, torch.zeros_like(logits)
    for one, other in itertools.combinations_with_replacement(range(len(paths)), 2):
        pair = mwer.Hypotheses([collapsed(paths[one]), collapsed(paths[other])])
        monkeypatch.setattr(mwer, "sampled_paths", lambda *_, pair=pair: [pair])
        found = expected(logits, ["a"], units, hypotheses=2, sampled=True)[0]
        chance = (1 if one == other else 2) * chances[one].item() * chances[other].item()
        value += chance * found.item()
        gradient += chance * slope(found, logits)
    wanted = true_expectation(logits[0], "a", units)
    assert value == pytest.approx(wanted.item())
    torch.testing.assert_close(gradient, slope(wanted, logits))


def test_draws_follow_the_probabilities_of_the_sequences() -> None:
    logits = random_logits(1, 3, 3)
    drawn = sampled_paths(logits.detach().log_softmax(-1), torch.tensor([3]), 20_000)[0]
    for ids, probability in probabilities(logits[0]).items():
        assert drawn[ids] / 20_000 == pytest.approx(probability.item(), abs=0.015)  # 4 standard deviations at most
    assert drawn.total() == 20_000


@pytest.mark.parametrize("sampled", [False, True])
def test_errors_that_every_candidate_makes_do_not_pull(
    sampled: bool, units: Units, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, how = random_logits(2, 5, units.size), {"hypotheses": 4, "sampled": sampled}
    torch.manual_seed(1)
    before = expected(logits, ["ab", "b a"], units, **how)
    plain = mwer.word_errors
    monkeypatch.setattr(mwer, "word_errors", lambda *args: (*plain(*args), 7))
    torch.manual_seed(1)
    after = expected(logits, ["ab", "b a"], units, **how)
    torch.testing.assert_close(after, before + 7)
    pull = slope(before.sum(), logits)
    torch.testing.assert_close(slope(after.sum(), logits), pull)
    assert pull.abs().max() > 1e-3


def test_padding_and_neighbours_change_nothing(units: Units) -> None:
    logits, lengths, texts = random_logits(3, 6, units.size), [6, 2, 4], ["a b", "", "ab"]
    together = expected(logits, texts, units, lengths, hypotheses=4)
    pull = slope(together.sum(), logits)
    for row, (length, text) in enumerate(zip(lengths, texts, strict=True)):
        alone = logits.detach()[row : row + 1, :length].clone().requires_grad_()
        value = expected(alone, [text], units, hypotheses=4)
        torch.testing.assert_close(value[0], together[row])
        torch.testing.assert_close(slope(value.sum(), alone)[0], pull[row, :length])
        assert not pull[row, length:].any()


def test_draws_take_nothing_from_padding() -> None:
    logits = torch.zeros(2, 5, 3)
    logits[1, 2:, 1] = 50.0
    drawn = sampled_paths(logits.log_softmax(-1), torch.tensor([5, 2]), 50)
    assert max(map(len, drawn[1])) <= 2 < max(map(len, drawn[0]))


def test_all_candidates_in_one_pass_have_the_probability_of_all_their_alignments() -> None:
    logits = random_logits(2, 4, 3)
    every = [probabilities(rows) for rows in (logits[0], logits[1, :3])]
    hypotheses = [mwer.Hypotheses(one) for one in every]
    scores = sequence_log_probs(logits.log_softmax(-1), torch.tensor([4, 3]), hypotheses)
    for row, one in zip(scores, every, strict=True):
        torch.testing.assert_close(row[: len(one)].exp(), torch.stack(list(one.values())))
        assert not row[len(one) :].any()


@pytest.mark.parametrize("sampled", [False, True])
def test_long_sure_and_wrong_stays_finite(sampled: bool, units: Units) -> None:
    logits = (200.0 * torch.randn(2, 800, units.size)).requires_grad_()
    value = expected(logits, ["ab", "a b"], units, hypotheses=4, sampled=sampled)
    assert torch.isfinite(value).all() and torch.isfinite(slope(value.sum(), logits)).all()


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_network_gives_no_number(sampled: bool, value: float, units: Units) -> None:
    logits = torch.zeros(1, 4, units.size)
    logits[0, 1, 1] = value
    logits.requires_grad_()
    loss = expected(logits, ["ab"], units, hypotheses=4, sampled=sampled).sum()
    assert math.isnan(loss.item())
    loss.backward()  # the trainer goes back through it before it looks


@pytest.mark.parametrize("sampled", [False, True])
def test_following_the_gradient_makes_fewer_errors(sampled: bool, units: Units) -> None:
    logits, texts = random_logits(2, 4, units.size, sharpness=0.5), ["ab", "b"]
    with torch.no_grad():  # not from nowhere: a candidate must be right before it can become more probable
        for frame, unit in enumerate(units.encode("ab")):
            logits[:, frame, unit] += 2.0
    before = [true_expectation(rows, text, units).item() for rows, text in zip(logits, texts, strict=True)]
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(25):
        optimizer.zero_grad()
        expected(logits, texts, units, hypotheses=6, sampled=sampled).sum().backward()
        optimizer.step()
    after = [true_expectation(rows, text, units).item() for rows, text in zip(logits, texts, strict=True)]
    assert all(late < 0.2 < 0.8 < early for late, early in zip(after, before, strict=True))
