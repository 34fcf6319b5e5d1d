from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from asr_kd.audio.settings import FeatureSettings
from asr_kd.distillation.batch import Part
from asr_kd.distillation.codes import Codes, code_cross_entropy
from asr_kd.distillation.knowledge import Knowledge, Seen, Task, lesson_of
from asr_kd.distillation.settings import SourceSettings
from asr_kd.errors import UserError
from asr_kd.models.network import Outputs
from asr_kd.models.settings import ModelSettings

BOOKS = 3


@pytest.fixture(autouse=True)
def no_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind asks its targets for the quantiser's name; here there are none."""
    monkeypatch.setattr("asr_kd.distillation.codes.metadata_of", lambda folder: SimpleNamespace(hidden=None))


def kind(**taught: int) -> Knowledge:
    layers = {"student": "layer.1", "teacher": "layer.2"}
    source = SourceSettings.model_validate({"audio": "a", "targets": "b", "codes": [layers]})
    task = Task(None, FeatureSettings(), ModelSettings(layers=1, size=5), "ghost", taught or {"codes.layer.2": BOOKS})
    return lesson_of(source, task).kinds[0]


def seen_of(hidden: torch.Tensor, codes: torch.Tensor, lengths: list[int], module: torch.nn.Module) -> Seen:
    learned = torch.arange(hidden.shape[1])[None] < torch.tensor(lengths)[:, None]
    beside = module(Outputs(hidden, torch.tensor(lengths), {"layer.1": hidden}), hidden, torch.tensor(lengths))
    return Seen(
        torch.zeros(*hidden.shape[:2], 4),
        torch.tensor(lengths),
        learned,
        {"codes.layer.2": Part(codes)},
        {"layer.1": hidden},
        beside,
    )


def test_it_is_the_mean_over_codebooks_of_plain_cross_entropies() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, BOOKS * 256, dtype=torch.float64)
    codes = torch.randint(0, 256, (4, BOOKS))
    expected = 0.0
    for frame in range(4):
        for book in range(BOOKS):
            row = logits[frame, 256 * book : 256 * (book + 1)].tolist()
            expected -= (row[codes[frame, book]] - math.log(sum(map(math.exp, row)))) / BOOKS
    assert code_cross_entropy(logits, codes).item() == pytest.approx(expected, rel=1e-12)
    assert code_cross_entropy(torch.zeros(4, BOOKS * 256), codes).item() == pytest.approx(4 * math.log(256), rel=1e-5)
    sure = torch.full((4, BOOKS * 256), -30.0).reshape(4, BOOKS, 256).scatter(2, codes[..., None], 30.0)
    assert code_cross_entropy(sure.flatten(1), codes).item() == 0
    assert torch.autograd.gradcheck(
        lambda one: code_cross_entropy(one, codes), logits[:2].repeat(2, 1).requires_grad_()
    )


def test_padding_and_batch_mates_change_nothing() -> None:
    torch.manual_seed(0)
    asked = kind()
    module = asked.beside()
    assert module is not None
    hidden = torch.randn(2, 6, 5)
    codes = torch.randint(0, 256, (10, BOOKS))
    together = asked.loss(seen_of(hidden, codes, [6, 4], module))
    changed = hidden.clone()
    changed[1, 4:] = 99.0
    assert torch.equal(asked.loss(seen_of(changed, codes, [6, 4], module)), together)
    apart = asked.loss(seen_of(hidden[:1], codes[:6], [6], module)) + asked.loss(
        seen_of(hidden[1:, :4], codes[6:], [4], module)
    )
    torch.testing.assert_close(apart, together)


def test_gradients_reach_the_student_and_the_head_and_an_empty_batch_gives_zero() -> None:
    asked = kind()
    module = asked.beside()
    assert module is not None
    hidden = torch.randn(1, 3, 5, requires_grad=True)
    asked.loss(seen_of(hidden, torch.zeros(3, BOOKS, dtype=torch.int64), [3], module)).backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in module.parameters())
    none = asked.loss(seen_of(hidden, torch.zeros(0, BOOKS, dtype=torch.int64), [0], module))
    assert none.item() == 0.0 and none.requires_grad


def test_it_is_finite_in_bfloat16() -> None:
    asked = kind()
    module = asked.beside()
    assert module is not None
    with torch.autocast("cpu", torch.bfloat16):
        seen = seen_of(100 * torch.randn(1, 3, 5), torch.zeros(3, BOOKS, dtype=torch.int64), [3], module)
    loss = asked.loss(seen)
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_its_shape_and_what_is_missing() -> None:
    module = kind().beside()
    assert isinstance(kind(), Codes) and isinstance(module, torch.nn.Linear)
    assert (module.in_features, module.out_features) == (5, BOOKS * 256)
    with pytest.raises(UserError, match=r"the teacher has no codes\.layer\.2; it has layer\.2"):
        kind(**{"layer.2": 7})
