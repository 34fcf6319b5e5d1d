from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import asr_kd
from asr_kd import losses
from asr_kd.api.soft_targets import SoftTarget
from asr_kd.distillation.batch import Batch
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.training.batches import _soft
from asr_kd.training.settings import TrainSettings
from tests.learning import loss_of, prepared


@pytest.fixture
def targets(here: Path) -> list[SoftTarget]:
    return [asr_kd.soft_targets("targets")[key] for key in ("u0", "u2", "u1")]


def logits_of(targets: list[SoftTarget]) -> tuple[Tensor, Tensor]:
    """What a student says, with padding that must not count, and its lengths."""
    lengths = torch.tensor([one.frames for one in targets])
    logits = torch.randn(3, int(lengths.max()) + 2, 10, generator=torch.Generator().manual_seed(0))
    for row, length in zip(logits, lengths, strict=True):
        row[length:] = 1e4
    return logits.requires_grad_(), lengths


def trained(targets: list[SoftTarget], logits: Tensor, lengths: Tensor, **source: object) -> Tensor:
    """The loss that `asr-kd train` has with these settings of a source."""
    values = {
        "output": "o", "units": "u", "development": "d", "features": {"sample_rate": 8000, "mels": 8},
        "phases": [{"sources": [{"audio": "a", "targets": "t", "soft": 1.0, **source}], "passes": 1}],
    }  # fmt: skip
    settings = TrainSettings.model_validate(values)

    class Example:
        def __init__(self, one: SoftTarget) -> None:
            self.targets, self.prior = one.posteriors, one.prior

    parts = _soft([Example(one) for one in targets], [slice(None)] * 3)
    batch = Batch(torch.zeros(*logits.shape[:2], 1), lengths, torch.zeros_like(lengths), lengths, 0, parts)
    return loss_of(logits, prepared(batch, settings), settings)


@pytest.mark.parametrize(
    ("mine", "source"),
    [
        (lambda *given: losses.soft(*given), {}),
        (lambda *given: losses.divergence(*given, "reverse"), {"divergence": {"kind": "reverse"}}),
        (lambda *given: losses.divergence(*given, "jensen", beta=0.3), {"divergence": {"kind": "jensen", "beta": 0.3}}),
        (lambda *given: losses.divergence(*given, "forward", teacher_share=0.5), {"divergence": {"kind": "forward", "teacher_share": 0.5}}),
        (lambda *given: losses.divergence(*given, "pearson"), {"divergence": {"kind": "pearson"}}),
        (lambda *given: losses.spikes(*given), {"spikes": {}}),
        (lambda *given: losses.sequences(*given, np.random.default_rng(0), draws=2), {"sequences": {"draws": 2}}),
    ],
)  # fmt: skip
def test_they_are_what_is_trained_with(targets: list[SoftTarget], mine, source: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
    logits, lengths = logits_of(targets)
    found = mine(logits, lengths, targets)
    torch.testing.assert_close(found, trained(targets, logits, lengths, **source))
    found.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    for row, length in zip(logits.grad, lengths, strict=True):
        assert row[:length].any() and not row[length:].any()


def test_what_was_not_kept_counts_as_asked(targets: list[SoftTarget]) -> None:
    logits, lengths = logits_of(targets)
    inside = torch.cat([row[:length] for row, length in zip(logits, lengths, strict=True)])
    for how in ("prior", "uniform"):
        dense = torch.from_numpy(np.concatenate([one.dense(how) for one in targets]))
        expected = -(dense * inside.log_softmax(-1)).sum(-1).mean()
        found = losses.soft(logits, lengths, targets, missing_mass=how)
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)
    ghost, gone = (losses.soft(logits, lengths, targets, missing_mass=how) for how in ("ghost", "renormalise"))
    assert ghost < found and not torch.isclose(ghost, gone)


@pytest.mark.parametrize(
    "loss", [losses.soft, losses.spikes, lambda *given: losses.sequences(*given, np.random.default_rng(3))]
)
def test_a_student_comes_to_say_what_the_teacher_says(targets: list[SoftTarget], loss) -> None:  # type: ignore[no-untyped-def]
    logits, lengths = logits_of(targets)
    logits = logits.detach().zero_().requires_grad_()
    course = []
    for _ in range(40):
        course.append(loss(logits, lengths, targets))
        (slope,) = torch.autograd.grad(course[-1], logits)
        logits = (logits - 20 * slope).detach().requires_grad_()
    assert course[-1] < 0.8 * course[0]
    if loss is losses.soft:
        for row, target in zip(logits, targets, strict=True):
            np.testing.assert_array_equal(row[: target.frames].argmax(-1).numpy(), target.indices[:, 0])


def test_half_precision_and_another_type_of_lengths(targets: list[SoftTarget]) -> None:
    logits, lengths = logits_of(targets)
    expected = losses.soft(logits, lengths, targets)
    found = losses.soft(logits.detach().bfloat16().requires_grad_(), lengths.int(), targets)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    assert losses.soft(logits, lengths.tolist(), targets) == expected  # type: ignore[arg-type]
    half, draws = logits.detach().bfloat16(), [np.random.default_rng(3) for _ in range(2)]
    assert losses.sequences(half, lengths, targets, draws[0]) == losses.sequences(
        half.float(), lengths, targets, draws[1]
    )


def test_what_is_given_in_place_of_something_else(targets: list[SoftTarget]) -> None:
    logits, lengths = logits_of(targets)
    with pytest.raises(asr_kd.UserError, match=r"^missing_mass: 'gost' is unknown; use renormalise, ghost, prior"):
        losses.soft(logits, lengths, targets, missing_mass="gost")  # type: ignore[arg-type]
    for given in (targets[0], [one.key for one in targets]):
        with pytest.raises(asr_kd.UserError, match=r"^targets: must be a list of soft targets"):
            losses.soft(logits, lengths, given)  # type: ignore[arg-type]


def test_hidden_states_are_compared_row_by_row(targets: list[SoftTarget]) -> None:
    states = torch.from_numpy(np.concatenate([one.hidden("layer.1") for one in targets]))
    for loss in (losses.hint, losses.cosine):
        assert loss(torch.zeros_like(states), states).shape == (len(states),)
    torch.testing.assert_close(losses.cosine(states, states), torch.zeros(len(states)))
    assert losses.similarity(states @ torch.randn(16, 3, generator=torch.Generator().manual_seed(0)), states) > 0


def test_mistakes_get_one_sentence(targets: list[SoftTarget]) -> None:
    logits, lengths = logits_of(targets)
    bare = [SoftTarget(one.key, one.posteriors, one.frame_ms) for one in targets]
    for ask, words in (
        (lambda: losses.soft(logits, lengths - 1, targets), r"u0: its soft target has 19 frames of 30 ms, the student 18 of at most"),
        (lambda: losses.soft(logits[:, :30], lengths, targets), r"u2: its soft target has 36 frames of 30 ms, the student 36 of at most 30"),
        (lambda: losses.soft(logits[..., :9], lengths, targets), r"u0: its soft target is over 10 units, the logits over 9; give"),
        (lambda: losses.soft(logits[0], lengths, targets), r"logits of shape \[38, 10\], 3 lengths and 3 soft targets do not fit"),
        (lambda: losses.soft(logits, lengths, targets[:2]), r"logits of shape \[3, 38, 10\], 3 lengths and 2 soft targets"),
        (lambda: losses.soft(logits[:0], lengths[:0], []), r"logits of shape \[0, 38, 10\], 0 lengths and 0 soft targets do not fit"),
        (lambda: losses.soft(logits, lengths, bare, missing_mass="prior"), r"u0: its shard has no prior; use"),
        (lambda: losses.divergence(logits, lengths, targets, "kl"), r"asr_kd\.losses\.divergence: kind: .*\(given: 'kl'\)"),
        (lambda: losses.divergence(logits, lengths, targets, "reverse", beta=0.3), r"asr_kd\.losses\.divergence: .*beta belongs"),
        (lambda: losses.sequences(logits, lengths, targets, np.random.default_rng(0), best=3), r"asr_kd\.losses\.sequences: best is"),
        (lambda: losses.sequences(logits, lengths, targets, np.random.default_rng(0), drws=3), r".*unknown key drws; did you mean draws"),
    ):  # fmt: skip
        with pytest.raises(asr_kd.UserError, match=f"^{words}"):
            ask()


def test_batches_know_nothing_of_each_other() -> None:
    one, other = (SoftTarget(key, _target(seed), 30) for key, seed in (("a", 0), ("b", 1)))
    logits = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    together = losses.spikes(logits, torch.tensor([9, 9]), [one, other])
    alone = [losses.spikes(logits[i : i + 1], torch.tensor([9]), [target]) for i, target in enumerate((one, other))]
    torch.testing.assert_close(together, sum(alone) / 2)


def _target(seed: int) -> SparsePosteriors:
    probs = np.random.default_rng(seed).dirichlet(np.full(5, 0.3), 9)
    return SparsePosteriors.from_dense(np.log(probs + 1e-9).astype(np.float32), 3, 0.95)
