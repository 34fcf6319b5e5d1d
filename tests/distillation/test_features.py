"""Feature knowledge: each comparison against plain loops in float64, and what must not change it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asr_kd.distillation.features import Features, Projection, cosine, energy, hint
from asr_kd.distillation.kind_settings import FeatureMatchSettings
from asr_kd.distillation.knowledge import Pupil, Seen
from asr_kd.distillation.settings import SourceSettings
from asr_kd.errors import UserError
from asr_kd.models.acoustic import build_model
from asr_kd.models.settings import ModelSettings
from tests.distillation.scenes import OWN, THEIRS, UNITS, Utterance, kind_of, seen_by, utterance

#: every way to compare
WAYS = [("hint", "frames"), ("hint", "events"), ("cosine", "frames"), ("cosine", "events"), ("energy", "frames")]
ways = pytest.mark.parametrize(("match", "samples"), WAYS)


def features(match: Any, samples: Any = "frames", theirs: int = THEIRS, projection: bool = True) -> Features:
    asked = FeatureMatchSettings(
        student="layer.1", teacher="layer.2", samples=samples, match=match, projection=projection
    )
    return kind_of(Features, asked, theirs)


def projection(kind: Features) -> Any:
    torch.manual_seed(0)
    module = kind.beside()
    return module and module.double()


def loss(kind: Features, *several: Utterance, padding: int = 0, project: Any = None) -> Tensor:
    return kind.loss(seen_by(kind, several, padding, project or projection(kind)))


def plain_hint(student: Tensor, teacher: Tensor) -> float:
    mean = sum(teacher.tolist()) / len(teacher)
    variance = sum((value - mean) ** 2 for value in teacher.tolist()) / len(teacher)
    pairs = zip(student.tolist(), teacher.tolist(), strict=True)
    return sum((own - (value - mean) / math.sqrt(variance)) ** 2 for own, value in pairs) / len(teacher)


def plain_cosine(student: Tensor, teacher: Tensor) -> float:
    pairs = list(zip(student.tolist(), teacher.tolist(), strict=True))
    norms = [math.sqrt(sum(value**2 for value in side.tolist())) for side in (student, teacher)]
    similarity = sum(own * value for own, value in pairs) / norms[0] / norms[1]
    log_sigmoid = [-math.log(1 + math.exp(-value)) for value in (similarity, 1.0)]
    return sum(abs(own - value) for own, value in pairs) / len(pairs) - log_sigmoid[0] + log_sigmoid[1]


@pytest.mark.parametrize(("match", "plain"), [("hint", plain_hint), ("cosine", plain_cosine)])
@pytest.mark.parametrize("samples", ["frames", "events"])
def test_the_mean_of_plain_loops_counts_for_each_frame(match: str, plain: Any, samples: str) -> None:
    kind = features(match, samples)
    several = [utterance("..1...22.", 0, before=1, after=2), utterance("1...", 1)]
    project = projection(kind)
    seen = seen_by(kind, several, 2, project)
    pairs = kind.pairs(seen)  # as they are before the projection
    own = pairs.student @ project.weight.T + project.bias
    expected = [plain(*pair) for pair in zip(own, pairs.teacher, strict=True)]
    assert kind.loss(seen).item() == pytest.approx(13 * sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize("match", ["hint", "cosine"])
@pytest.mark.parametrize("samples", ["frames", "events"])
def test_without_a_projection_states_are_compared_as_they_are(match: str, samples: str) -> None:
    kind, identity = features(match, samples, OWN, projection=False), Projection("layer.1", OWN, OWN).double()
    torch.nn.init.eye_(identity.weight)
    torch.nn.init.zeros_(identity.bias)
    several = [utterance("..1...22.", 0, before=1, after=2, theirs=OWN), utterance("1...", 1, theirs=OWN)]
    assert kind.beside() is None
    found = kind.loss(seen_by(kind, several, 2))
    torch.testing.assert_close(found, loss(features(match, samples, OWN), *several, padding=2, project=identity))


def test_without_a_projection_widths_are_equal() -> None:
    with pytest.raises(UserError, match=r"the student's layer.1 is 5 wide and the teacher's layer.2 3; leave out proj"):
        features("cosine", projection=False)


def test_energy_is_that_of_plain_loops() -> None:
    kind = features("energy")
    several = [utterance("..1...22.", 0, before=1, after=2), utterance("1...", 1)]
    expected = 0.0
    for one in several:
        profiles = []
        for states in (one.student[one.before : one.before + len(one.path)], one.teacher):
            energies = [sum(value**2 for value in row) for row in states.tolist()]
            norm = math.sqrt(sum(value**2 for value in energies))
            profiles.append([value / norm for value in energies])
        apart = [(own - their) ** 2 for own, their in zip(*profiles, strict=True)]
        # the paper's mean over entries of norm 1/√T, times T: free of the length; and for each frame of the utterance
        expected += len(one.path) * (len(apart) * sum(apart) / len(apart))
    assert loss(kind, *several, padding=3).item() == pytest.approx(expected, rel=1e-9)


@ways
def test_padding_and_context_change_nothing_and_batch_mates_only_the_mean(match: str, samples: str) -> None:
    kind, project = features(match, samples), projection(features(match, samples))
    several = [utterance("..1....1.", 0, before=1, after=2), utterance("1...", 1), utterance("......", 2)]
    together = loss(kind, *several, project=project).item()
    assert loss(kind, *several, padding=7, project=project).item() == pytest.approx(together, rel=1e-6)
    changed = utterance("..1....1.", 0, before=1, after=2)
    changed.student[0], changed.student[-2:] = 9.0, -9.0
    assert loss(kind, changed, *several[1:], project=project).item() == pytest.approx(together, rel=1e-6)
    alone = [loss(kind, one, project=project).item() for one in several]
    frames = [9, 4, 6]
    weights = [2, 1, 0] if samples == "events" else frames
    means = [one / count for one, count in zip(alone, frames, strict=True)]
    mean = sum(weight * one for weight, one in zip(weights, means, strict=True)) / sum(weights)
    assert together == pytest.approx(sum(frames) * mean, rel=1e-5)


@ways
def test_equal_states_cost_nothing(match: str, samples: str) -> None:
    kind = features(match, samples, OWN)
    same = utterance("..1...2.", theirs=OWN)
    if samples == "events":  # the two are means over other frames
        same.student = same.student[:1].repeat(8, 1)
    same.teacher = same.student.clone()
    if match == "hint":  # equal after the teacher's normalisation
        same.student = torch.nn.functional.layer_norm(same.teacher, (OWN,), eps=1e-8)
    identity = Projection("layer.1", OWN, OWN).double()
    torch.nn.init.eye_(identity.weight)
    torch.nn.init.zeros_(identity.bias)
    found = loss(kind, same, project=identity if kind.beside() else None).item()
    assert abs(found) < 1e-5
    same.student[3] *= -1.1
    assert loss(kind, same, project=identity if kind.beside() else None).item() > 1e-3


@ways
def test_gradients_reach_the_student_and_its_projection_alone(match: str, samples: str) -> None:
    kind, project = features(match, samples), projection(features(match, samples))
    one = utterance("..1...2.", before=1)
    for tensor in (one.student, one.teacher, one.logits):
        tensor.requires_grad_()
    loss(kind, one, padding=2, project=project).backward()
    assert one.student.grad is not None and one.student.grad.any()
    assert one.teacher.grad is None and one.logits.grad is None
    assert project is None or all(weight.grad.any() for weight in project.parameters())


@ways
def test_gradcheck(match: str, samples: str) -> None:
    kind, project = features(match, samples), projection(features(match, samples))
    several = [utterance(".1.", 0, before=1), utterance("2.", 1)]
    weights = dict(project.named_parameters()) if project else {}

    def of(first: Tensor, second: Tensor, *held: Tensor) -> Tensor:
        several[0].student, several[1].student = first, second
        named = dict(zip(weights, held, strict=True))
        said = (lambda *inputs: torch.func.functional_call(project, named, inputs)) if project else None
        return kind.loss(seen_by(kind, several, 1, said))

    inputs = [one.student.requires_grad_() for one in several] + [
        one.detach().requires_grad_() for one in weights.values()
    ]
    assert torch.autograd.gradcheck(of, inputs)


@pytest.mark.parametrize("match", ["hint", "cosine"])
def test_without_a_spike_the_loss_is_0_with_a_graph(match: str) -> None:
    kind, project = features(match, "events"), projection(features(match, "events"))
    silent = utterance(".....")
    silent.student.requires_grad_()
    found = loss(kind, silent, project=project)
    assert found.item() == 0.0
    found.backward()
    for grad in (silent.student.grad, *(weight.grad for weight in project.parameters())):
        assert grad is not None and not grad.any()


def test_energy_of_an_utterance_without_learned_frames() -> None:
    states = torch.randn(3, OWN, requires_grad=True)
    learned = torch.tensor([[True, True, False, True], [False] * 4])
    found = energy(states, torch.randn(3, THEIRS), learned)
    assert found.isfinite().all() and not found[~learned].any()
    empty = energy(states[:0], torch.zeros(0, THEIRS), torch.zeros(2, 4, dtype=torch.bool)).sum()
    empty.backward()
    assert empty.item() == 0.0 and states.grad is not None and not states.grad.any()


@given(st.integers(0, 100), st.floats(0.01, 100), st.floats(-3, 3))
@settings(max_examples=20, deadline=None)
def test_what_the_teacher_s_scale_changes(seed: int, scale: float, shift: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    own, theirs = (torch.randn(6, 20, generator=draw, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(hint(own, scale * theirs + shift), hint(own, theirs), rtol=1e-3, atol=1e-3)
    apart = [
        cosine(one, other) - (one - other).abs().mean(-1)
        for one, other in ((own, theirs), (scale * own, theirs), (own, scale * theirs))
    ]
    for one in apart[1:]:
        torch.testing.assert_close(one, apart[0])
    learned = torch.tensor([[True, True], [True, True], [True, True]])
    turned = torch.linalg.qr(torch.randn(20, 20, generator=draw, dtype=torch.float64))[0]
    torch.testing.assert_close(energy(scale * own @ turned, theirs, learned), energy(own, theirs, learned))


def test_energy_does_not_depend_on_the_length_or_on_the_widths() -> None:
    """Said twice, every frame costs what it cost; and channels said twice cost nothing."""
    draw = torch.Generator().manual_seed(0)
    own, theirs = (torch.randn(4, size, generator=draw) for size in (OWN, THEIRS))
    once = energy(own, theirs, torch.ones(1, 4, dtype=torch.bool))
    long = energy(own.repeat_interleave(3, 0), theirs.repeat_interleave(3, 0), torch.ones(1, 12, dtype=torch.bool))
    torch.testing.assert_close(long.sum(), 3 * once.sum())
    torch.testing.assert_close(energy(own, theirs.repeat(1, 2), torch.ones(1, 4, dtype=torch.bool)), once)


def test_energy_rises_with_the_distance_in_time() -> None:
    time = torch.arange(40.0)[:, None]
    bump = (-((time - 20) ** 2) / 50).exp()
    learned = torch.ones(1, 40, dtype=torch.bool)
    apart = [float(energy(bump.roll(shift, 0), bump, learned).sum()) for shift in range(6)]
    assert apart[0] == 0.0 and apart == sorted(apart) and apart[1] < apart[5] / 4


@pytest.mark.parametrize("compare", [hint, cosine])
@pytest.mark.parametrize(("own", "theirs"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (2.0, 5.0)])
def test_constant_states_have_finite_gradients(compare: Any, own: float, theirs: float) -> None:
    student = torch.full((2, THEIRS), own, requires_grad=True)
    found = compare(student, torch.full((2, THEIRS), theirs)).sum()
    found.backward()
    assert found.isfinite() and student.grad is not None and student.grad.isfinite().all()


def test_silence_of_all_channels_has_a_finite_energy() -> None:
    student = torch.zeros(3, OWN, requires_grad=True)
    found = energy(student, torch.zeros(3, THEIRS), torch.ones(1, 3, dtype=torch.bool)).sum()
    found.backward()
    assert found.item() == 0.0 and student.grad is not None and student.grad.isfinite().all()


@ways
def test_half_precision_stays_finite(match: str, samples: str) -> None:
    kind = features(match, samples)
    project = projection(kind)
    seen = seen_by(kind, [utterance("..1...2.")], 1, project)
    half = {name: state.bfloat16() for name, state in seen.hidden.items()}
    beside = {name: state.bfloat16() for name, state in seen.beside.items()}
    parts = {
        name: part._replace(values=part.values.float()) if name.startswith("hidden") else part
        for name, part in seen.parts.items()
    }
    found = kind.loss(Seen(seen.logits.float(), seen.lengths, seen.learned, parts, half, beside))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(kind.loss(seen).item(), rel=0.05)


def test_teachers_of_another_width_have_a_projection_of_their_own() -> None:
    narrow, again, wide = features("hint"), features("hint"), features("hint", theirs=7)
    assert narrow.name == "kind:layer-1:layer-2:hint:frames:3" and wide.name == "kind:layer-1:layer-2:hint:frames:7"
    pupil = Pupil(build_model(ModelSettings(layers=2, size=OWN), 8, UNITS), [narrow, again, wide, features("energy")])
    assert {name: tuple(one.weight.shape) for name, one in pupil.beside.items()} == {
        narrow.name: (3, OWN),
        wide.name: (7, OWN),
    }


def source(*pairs: dict[str, Any], **changes: Any) -> SourceSettings:
    layers = {"student": "layer.1", "teacher": "layer.2"}
    asked = {"audio": "memory", "teacher": "folder", "features": [layers | pair for pair in pairs], **changes}
    return SourceSettings.model_validate(asked)


def test_pairs_are_told_apart_by_layers_and_by_how_they_are_compared() -> None:
    asked = source({}, {"student": "layer.2"}, {"match": "cosine"}, {"match": "energy", "samples": "frames"}, soft=1.0)
    assert [one.name for one in asked.knowledge()] == [
        "soft", "features:layer-1:layer-2:hint:events", "features:layer-2:layer-2:hint:events",
        "features:layer-1:layer-2:cosine:events", "features:layer-1:layer-2:energy:frames",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pairs", "changes", "message"),
    [
        ([{"match": "energy"}], {}, "match energy compares the frames of an utterance; set samples to frames"),
        (
            [{"match": "energy", "samples": "frames", "projection": False}],
            {},
            "match energy has no projection; leave it out",
        ),
        ([{}, {}], {}, "features:layer-1:layer-2:hint:events is asked for twice"),
        ([{}], {"teacher": None}, "learns what somebody answers; give targets or a teacher"),
    ],
)
def test_what_does_not_go_together(pairs: list[dict[str, Any]], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(*pairs, **changes)
