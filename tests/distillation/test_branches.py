from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from asr_kd.distillation.branches import Branches, Upper, mixed
from asr_kd.distillation.knowledge import Pupil, Seen, lesson_of
from asr_kd.distillation.settings import SourceSettings
from asr_kd.errors import UserError
from asr_kd.models.acoustic import build_model, parameters
from tests.distillation.test_mutual import FEATURES, STUDENT, TASK, drawn, parts, softmax


def source(**changes: Any) -> SourceSettings:
    branches = {"weight": 0.3, "count": 3, "temperature": 2.0, **changes.pop("branches", {})}
    values = {"audio": "memory", "targets": "somewhere", "soft": 0.7, "branches": branches}
    return SourceSettings.model_validate(values | changes)


def kind_of(asked: SourceSettings) -> Branches:
    found = next(kind for kind in lesson_of(asked, TASK).kinds if kind.name == "branches")
    assert isinstance(found, Branches)
    return found


def seen_of(gate: Tensor, logits: list[Tensor], learned: Tensor) -> Seen:
    beside = {"gate": gate} | {f"branch.{number}": one for number, one in enumerate(logits[1:], 1)}
    lengths = torch.full((len(learned),), learned.shape[1])
    return Seen(logits[0], lengths, learned, parts(int(learned.sum())), {}, beside)


def test_it_is_what_it_says() -> None:
    gate, logits = drawn(7, 1, 4, 3), [3 * drawn(seed, 1, 4, 5) for seed in range(3)]
    learned = torch.tensor([[True, True, False, True]])
    kind = kind_of(source())
    expected, mixture = 0.0, torch.zeros(1, 4, 5, dtype=torch.float64)
    for frame in range(4):
        shares = softmax(gate[0, frame].tolist())
        for share, one in zip(shares, logits, strict=True):
            mixture[0, frame] += share * one[0, frame]
    for frame in (0, 1, 3):
        theirs = (mixture[0, frame] / 2).softmax(-1)
        for one in logits:
            expected += 0.3 * 4 * float((theirs * (theirs.log() - (one[0, frame] / 2).softmax(-1).log())).sum())
    seen = seen_of(gate.float(), [one.float() for one in logits], learned)
    taught = sum(float(kind.taught_loss(seen, one.float())) for one in (logits[1], logits[2], mixture))
    assert kind.loss(seen).item() == pytest.approx(expected + taught, rel=1e-5)
    torch.testing.assert_close(mixed(gate.softmax(-1), logits), mixture)


def test_equal_branches_learn_nothing_from_their_mixture() -> None:
    one = drawn(0, 1, 4, 5)
    seen = seen_of(
        drawn(1, 1, 4, 3), [one.clone().requires_grad_() for _ in range(3)], torch.ones(1, 4, dtype=torch.bool)
    )
    kind = kind_of(source())
    taught = 3 * kind.taught_loss(seen, one)
    assert kind.loss(seen).item() == pytest.approx(taught.item(), rel=1e-5)


def test_the_mixture_answers_without_a_gradient() -> None:
    """Where nothing else is taught, the gate learns nothing."""
    gate, logits = drawn(7, 1, 4, 3).requires_grad_(), [drawn(seed, 1, 4, 5).requires_grad_() for seed in range(3)]
    kind = kind_of(source())
    kind.join([])
    kind.loss(seen_of(gate, logits, torch.ones(1, 4, dtype=torch.bool))).backward()
    assert gate.grad is None or not gate.grad.any()
    assert all(one.grad is not None and one.grad.any() for one in logits)


def test_the_gate_learns_what_the_source_teaches_the_mixture() -> None:
    gate, logits = drawn(7, 1, 4, 3).requires_grad_(), [drawn(seed, 1, 4, 5) for seed in range(3)]
    kind_of(source()).loss(seen_of(gate, logits, torch.ones(1, 4, dtype=torch.bool))).backward()
    assert gate.grad is not None and gate.grad.any()


def test_padding_nothing_learned_and_half_precision() -> None:
    kind, learned = kind_of(source()), torch.ones(1, 4, dtype=torch.bool)
    gate, logits = drawn(7, 1, 4, 3), [drawn(seed, 1, 4, 5).requires_grad_() for seed in range(3)]
    whole = kind.loss(seen_of(gate, logits, learned))
    more = [torch.nn.functional.pad(one, (0, 0, 0, 3), value=9.0) for one in (gate, *logits)]
    torch.testing.assert_close(kind.loss(seen_of(more[0], more[1:], torch.nn.functional.pad(learned, (0, 3)))), whole)
    nothing = kind.loss(seen_of(gate, logits, ~learned))
    nothing.backward()
    assert nothing.item() == 0.0 and all(one.grad is not None and not one.grad.any() for one in logits)
    half = [(50 * one).detach().bfloat16().requires_grad_() for one in logits]
    loss = kind.loss(seen_of(gate.bfloat16(), [half[0].float(), *half[1:]], learned))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in half)


@pytest.mark.parametrize("kind", ["lstm", "separable", "chunked_conformer", "emformer", "blstm", "conv"])
def test_branches_share_the_lower_layers_whatever_the_network(kind: str) -> None:
    delay = {"delay_frames": 2 if kind in ("lstm", "separable") else 0}
    model = STUDENT.model_validate(STUDENT.model_dump() | {"kind": kind, "size": 8, **delay})
    units = TASK.units
    assert units is not None
    kinds = lesson_of(source(), replace(TASK, model=model)).kinds
    torch.manual_seed(0)
    student = build_model(model, FEATURES.dimension, units.size)
    pupil = Pupil(student, kinds).eval()
    upper = pupil.beside["branches"]
    assert isinstance(upper, Upper) and len(upper.branches) == 2
    assert parameters(student) == parameters(build_model(model, FEATURES.dimension, units.size))
    features, lengths = torch.randn(2, 6, FEATURES.dimension), torch.tensor([6, 4])
    _, besides = pupil(features, lengths)
    said = besides["branches"]
    assert said["gate"].shape == (2, 6, 3) and said["branch.2"].shape == (2, 6, 5)
    assert not torch.equal(said["branch.1"], said["branch.2"])
    # neither batch-mates nor padding change what is said of an utterance
    _, alone = pupil(features[1:, :4], lengths[1:])
    for name, value in alone["branches"].items():
        torch.testing.assert_close(value, said[name][1:, :4])
    # what a branch learns reaches the shared layers
    said["branch.1"].sum().backward()
    first = next(student.parameters())
    assert first.grad is not None and first.grad.any()


def test_a_network_of_one_layer_has_nothing_to_share() -> None:
    with pytest.raises(UserError, match=r"branches: share the layers below the student's last; give model\.layers 2"):
        lesson_of(source(), replace(TASK, model=STUDENT.model_copy(update={"layers": 1})))


def test_branches_and_peers_are_refused_together() -> None:
    with pytest.raises(UserError, match=r"mutual: cannot go with branches|branches: cannot go with mutual"):
        lesson_of(source(mutual={}), TASK)
