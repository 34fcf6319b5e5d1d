"""The kind of knowledge: which samples it compares, of what, and how a loss counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asr_kd.audio.settings import FeatureSettings
from asr_kd.distillation import relation_losses, relations
from asr_kd.distillation.batch import Batch, Part
from asr_kd.distillation.kind_settings import OVER_TIME, RelationSettings
from asr_kd.distillation.knowledge import Seen, Task, lesson_of
from asr_kd.distillation.relations import Relations
from asr_kd.distillation.settings import SourceSettings
from asr_kd.errors import UserError
from asr_kd.models.settings import ModelSettings

UNITS = 4
LAYERS = {"student": "layer.1", "teacher": "layer.2"}
ASKED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("similarity", "distance", "angle", "probability", "correlation", "gram"), LAYERS),
    "flow": LAYERS | {"student_to": "layer.2", "teacher_to": "layer.2"},
    "classes": {},
    "attention": {"student": "attention.1", "teacher": "attention.1", "heads": 2},
}  # fmt: skip
MODEL = ModelSettings(kind="conformer", layers=2, size=8, heads=2)
TAUGHT = {"layer.1": 8, "layer.2": 8, "attention.1": 12}


def kind_of(kind: str, taught: dict[str, int] = TAUGHT, model: ModelSettings = MODEL, **changes: Any) -> Relations:
    source = SourceSettings.model_validate({"audio": "memory", "teacher": "t", "relations": [{"kind": kind, **ASKED[kind], **changes}]})  # fmt: skip
    task = Task(None, FeatureSettings(), model, "ghost", taught)
    found = lesson_of(source, task).kinds[0]
    assert isinstance(found, Relations)
    return found


def seen_of(kind: Relations, frames: list[int], first: int = 0, room: int = 0, seed: int = 0, spoken: bool = True, like: torch.dtype = torch.float32) -> Seen:  # fmt: skip
    """A batch in which units come by turns, each for a frame, three blanks before the next."""
    rng = np.random.default_rng(seed)
    longest = max(frames) + room

    def draw(width: int) -> list[Tensor]:
        return [torch.from_numpy(rng.normal(size=(size, width))).to(like) for size in frames]

    def padded(rows: list[Tensor]) -> Tensor:
        filled = [torch.cat([one, one.new_full((longest - len(one), one.shape[1]), 7.0)]) for one in rows]
        return torch.stack(filled).requires_grad_()

    lengths = torch.tensor(frames)
    begins = torch.full_like(lengths, first)
    batch = Batch(torch.zeros(len(frames), longest, 1), lengths, begins, lengths, 0)
    learned = batch.learned
    hidden = {tap: padded(draw(kind.task.model.taps[tap])) for tap in ("layer.1", "layer.2", "attention.1")}
    logits = padded(draw(UNITS)).float().detach().requires_grad_()
    parts = {f"hidden.{tap}": torch.cat([one[first:] for one in draw(width)]) for tap, width in TAUGHT.items()}
    probs = []
    for size in frames:
        one = torch.full((size, UNITS), 0.01)
        frame = torch.arange(size)
        unit = torch.where((frame % 4 == 2) & torch.tensor(spoken), 1 + frame // 4 % (UNITS - 1), 0)
        one[frame, unit] = 1 - 0.01 * (UNITS - 1)
        probs.append(one[first:])
    best, units = torch.cat(probs).sort(dim=-1, descending=True, stable=True)
    parts |= {"soft.probs": best, "soft.units": units}
    batch.parts = {name: Part(value) for name, value in parts.items()}
    kind.prepare((), batch, rng)
    return Seen(logits, lengths, learned, batch.parts, hidden, {})


every = pytest.mark.parametrize("kind", ASKED)


@pytest.mark.parametrize(
    ("kind", "samples"),
    [(kind, "frames") for kind in ASKED] + [(kind, "events") for kind in ASKED if kind not in OVER_TIME],
)
def test_padding_changes_nothing_and_the_teacher_learns_nothing(kind: str, samples: str) -> None:
    asked = kind_of(kind, samples=samples)
    seen = seen_of(asked, [40, 23, 9])
    for part in seen.parts.values():
        if part.values.is_floating_point():
            part.values.requires_grad_()
    loss = asked.loss(seen)
    assert loss > 0 and loss.dtype == torch.float32
    taken = [seen.hidden[tap] for tap in asked.taps] or [seen.logits]
    for gradient in torch.autograd.grad(loss, taken, retain_graph=True):
        assert gradient.abs().sum() > 0
        outside = gradient[~seen.learned]
        assert not outside.any()
    loss.backward()
    assert all(part.values.grad is None for part in seen.parts.values())
    torch.testing.assert_close(asked.loss(seen_of(asked, [40, 23, 9], room=31)), loss)


def compared_with_nothing(kind: str, changes: dict[str, Any], frames: list[int], first: int, spoken: bool) -> None:
    asked = kind_of(kind, **changes)
    seen = seen_of(asked, frames, first=first, spoken=spoken)
    loss = asked.loss(seen)
    assert loss == 0
    loss.backward()
    grads = [seen.hidden[tap].grad for tap in asked.taps]
    assert all(grad is not None and not grad.any() for grad in grads)


@pytest.mark.parametrize("kind", [kind for kind in ASKED if kind not in OVER_TIME])
@pytest.mark.parametrize(("frames", "spoken"), [([4], True), ([9, 9], False)], ids=["one spike", "no spike"])
def test_of_fewer_than_two_events_nothing_is_learned(kind: str, frames: list[int], spoken: bool) -> None:
    compared_with_nothing(kind, {}, frames, 0, spoken)


@pytest.mark.parametrize("kind", [kind for kind in ASKED if kind != "flow"])
def test_of_one_frame_nothing_is_learned(kind: str) -> None:
    compared_with_nothing(kind, {"samples": "frames"}, [1], 0, True)


@every
def test_of_no_frame_nothing_is_learned(kind: str) -> None:
    compared_with_nothing(kind, {"samples": "frames"}, [3, 2], 3, True)


def test_silence_hardly_counts_in_gram() -> None:
    asked = kind_of("gram")
    silent, spoken = (float(asked.loss(seen_of(asked, [9], spoken=there)).detach()) for there in (False, True))
    assert 0 < silent < 0.2 * spoken


@every
def test_bfloat16_stays_finite_and_float32(kind: str) -> None:
    asked = kind_of(kind)
    exact, half = (seen_of(asked, [40, 23], like=like) for like in (torch.float32, torch.bfloat16))
    loss = asked.loss(half)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, asked.loss(exact), rtol=0.2, atol=0.05)
    loss.backward()
    taken = [half.hidden[tap] for tap in asked.taps] or [half.logits]
    assert all(one.grad is not None and one.grad.isfinite().all() for one in taken)


@pytest.mark.parametrize("kind", OVER_TIME)
def test_over_time_the_loss_of_a_batch_is_that_of_its_utterances(kind: str) -> None:
    asked = kind_of(kind)
    both = seen_of(asked, [40, 23])
    total = torch.zeros(())
    for utterance, size in enumerate([40, 23]):
        own = slice(0, 40) if utterance == 0 else slice(40, 63)
        total = total + asked.loss(
            Seen(
                both.logits[utterance : utterance + 1, :size],
                both.lengths[utterance : utterance + 1],
                both.learned[utterance : utterance + 1, :size],
                {name: Part(part.values[own]) for name, part in both.parts.items()},
                {tap: value[utterance : utterance + 1, :size] for tap, value in both.hidden.items()},
                {},
            )
        )
    torch.testing.assert_close(asked.loss(both), total)


@pytest.mark.parametrize("kind", OVER_TIME)
def test_context_is_not_compared(kind: str) -> None:
    """Frames before those that are learned may hold anything."""
    asked = kind_of(kind)
    seen = seen_of(asked, [30, 19], first=6)
    loss = asked.loss(seen)
    with torch.no_grad():
        for value in seen.hidden.values():
            value[:, :6] = 99.0
    torch.testing.assert_close(asked.loss(seen), loss)


@pytest.mark.parametrize(
    ("kind", "most"),
    [("distance", 256), ("angle", 64), ("similarity", 256), ("probability", 256), ("correlation", 256)],
)
def test_of_many_samples_every_second_is_compared(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = kind_of(kind, samples="frames")
    loss, limit = relations.BETWEEN_SAMPLES[kind]
    assert limit == most
    monkeypatch.setitem(relations.BETWEEN_SAMPLES, kind, (loss, 20))
    seen = seen_of(asked, [20, 19])
    student, teacher = seen.hidden["layer.1"][seen.learned][::2], seen.parts["hidden.layer.2"].values[::2]
    assert len(student) == 20
    torch.testing.assert_close(asked.loss(seen), loss(student, teacher) * 39)


def test_of_many_frames_attention_compares_some_of_each_utterance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relations, "ATTENDED", 10)
    asked = kind_of("attention")
    seen = seen_of(asked, [25, 10, 3], first=2)  # 23, 8 and 1 are learned
    total, begin = torch.zeros(()), 0
    for utterance, (size, step) in enumerate([(23, 3), (8, 1), (1, 1)]):
        mine = seen.hidden["attention.1"][utterance, 2 : 2 + size : step][None]
        theirs = seen.parts["hidden.attention.1"].values[begin : begin + size : step][None]
        total = total + relation_losses.attention(mine, theirs, torch.ones(mine.shape[:2], dtype=torch.bool), 2) * size
        begin += size
    torch.testing.assert_close(asked.loss(seen), total[0])


@pytest.mark.parametrize("kind", ["similarity", "probability", "correlation"])
def test_centred_samples_have_no_origin(kind: str) -> None:
    asked, plain = kind_of(kind, centre=True), kind_of(kind)
    seen = seen_of(asked, [60])
    moved = seen._replace(hidden={tap: value + 3.0 for tap, value in seen.hidden.items()})
    torch.testing.assert_close(asked.loss(moved), asked.loss(seen), rtol=1e-3, atol=1e-4)
    assert abs((plain.loss(moved) - plain.loss(seen)).item()) > 0.1


def test_the_graph_of_classes_is_of_what_is_said_not_of_the_blank() -> None:
    """A student that says each spike as the teacher does, late and with much blank around, has the same graph."""
    asked = kind_of("classes")
    seen = seen_of(asked, [60])
    late = torch.full((1, 60, UNITS), 0.001)
    late[..., 0] = 1 - 0.001 * (UNITS - 1)
    frame = torch.arange(60)
    late[0, frame % 4 == 3] = 0.01  # a frame later
    said = frame[frame % 4 == 3]
    late[0, said, 1 + said // 4 % (UNITS - 1)] = 0.97
    right = asked.loss(seen._replace(logits=late.log()))
    wrong = asked.loss(seen._replace(logits=late.roll(1, -1).log()))
    assert right < 0.01 * 60 and wrong > 0.5 * 60


def test_stored_targets_are_enough_for_classes() -> None:
    source = SourceSettings(audio="memory", targets="stored", relations=[RelationSettings(kind="classes")])
    assert "hidden" not in source.needs and "targets" in source.needs


def test_flow_and_attention_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"the student's have 8 and 8, the teacher's 8 and 10: take another kind"):
        kind_of("flow", TAUGHT | {"layer.2": 10}, teacher="layer.1")
    with pytest.raises(UserError, match="heads must divide the student's size 8 and the teacher's 4, and 8 does not"):
        kind_of("attention", heads=8)
    with pytest.raises(UserError, match=r"the network has no attention\.1; it has layer\.1, layer\.2"):
        kind_of("attention", model=ModelSettings(layers=2, size=8))
    with pytest.raises(UserError, match=r"the teacher has no attention\.1; it has layer\.1"):
        kind_of("attention", {"layer.1": 8})
    with pytest.raises(UserError, match=r"the teacher has no layer\.2; it has layer\.1"):
        kind_of("flow", {"layer.1": 8})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"kind": "gram", **LAYERS, "samples": "events"},
            "gram compares the frames of an utterance; leave out samples",
        ),
        ({"kind": "classes", **LAYERS}, "classes compares outputs; leave out student and teacher"),
        ({"kind": "angle", "student": "layer.1"}, "angle needs student and teacher, a layer of each"),
        ({"kind": "flow", **LAYERS}, "student_to and teacher_to belong to flow, which needs both"),
        ({"kind": "gram", **LAYERS, "student_to": "layer.2"}, "student_to and teacher_to belong to flow"),
        ({"kind": "attention", **LAYERS}, "attention compares attention.1, attention.2, … of two Conformers"),
        ({"kind": "distance", **LAYERS, "centre": True}, "centre belongs to similarity, probability and correlation"),
    ],
)
def test_what_does_not_go_together(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelationSettings.model_validate(asked)


def test_attention_of_several_teachers_is_refused() -> None:
    with pytest.raises(ValueError, match="attention relations need one teacher"):
        SourceSettings.model_validate(
            {"audio": "a", "teacher": ["b", "c"], "relations": [{"kind": "attention", **ASKED["attention"]}]}
        )


def test_several_kinds_and_several_layers_stand_side_by_side() -> None:
    asked = [{"kind": kind, **layers} for kind, layers in ASKED.items()]
    source = SourceSettings.model_validate({"audio": "a", "teacher": "b", "relations": asked})
    names = [one.name for one in source.knowledge()]
    assert len(set(names)) == len(ASKED) and "relations:flow:layer-1:layer-2:layer-2:layer-2:frames" in names
    assert SourceSettings.model_validate(source.model_dump()) == source
    with pytest.raises(ValueError, match="is asked for twice"):
        SourceSettings.model_validate({"audio": "a", "teacher": "b", "relations": [asked[0], asked[0]]})
