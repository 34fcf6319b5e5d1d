"""Networks that begin as layers of others, of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from asr_kd.models.acoustic import NETWORKS, build_model, collate
from asr_kd.models.settings import HEARS_FEATURES, ModelSettings
from asr_kd.units import Units
from tests.models.test_acoustic import FEATURES, lively, noise

ODD: dict[str, dict[str, Any]] = {
    "lstm": {"delay_frames": 2}, "separable": {"delay_frames": 2}, "chunked_conformer": {"chunk_frames": 3, "left_frames": 4},
    "emformer": {"chunk_frames": 3, "left_frames": 4, "right_frames": 2, "memory": 2},
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", NETWORKS)


def deep(kind: str, layers: int = 4, **changes: Any) -> ModelSettings:
    values = {"kind": kind, "layers": layers, "size": 16, "dropout": 0.0, **ODD.get(kind, {}), **changes}
    return ModelSettings.model_validate(values)


@kinds
def test_layers_of_a_copied_prefix_say_what_the_teacher_s_say(kind: str, units: Units) -> None:
    teacher = lively(deep(kind), units)
    student = build_model(deep(kind, 3), FEATURES.dimension, units.size).eval()
    student.begin_as(teacher, [1, 2, 4])
    features = collate([noise(20), noise(9)])
    taps = ["layer.1", "layer.2", "layer.3"]
    own, theirs = student(*features, taps), teacher(*features, taps)
    for tap in taps[:2]:
        assert torch.equal(own.hidden[tap], theirs.hidden[tap])
    assert not torch.equal(own.hidden["layer.3"], theirs.hidden["layer.3"])


@kinds
def test_each_layer_is_the_named_one_and_nothing_is_left(kind: str, units: Units) -> None:
    teacher = lively(deep(kind), units)
    for layers in ([1, 4], [1, 3, 2, 4], [1, 2, 3, 4]) if kind in HEARS_FEATURES else ([4, 2], [3, 3], [1, 2, 3, 4]):
        student = build_model(deep(kind, len(layers)), FEATURES.dimension, units.size)
        student.begin_as(teacher, layers)
        theirs = teacher.state_dict()
        for name, weight in student.state_dict().items():
            parts = name.split(".")
            if at := next((at for at, part in enumerate(parts) if part.isdigit()), None):
                parts[at] = str(layers[int(parts[at])] - 1)
            assert torch.equal(weight, theirs[".".join(parts)]), name
    features = collate([noise(12)])
    assert torch.equal(student.eval()(*features).logits, teacher(*features).logits)


def test_the_copy_is_no_part_of_the_teacher(units: Units) -> None:
    teacher, student = (lively(deep("separable", layers), units) for layers in (2, 2))
    student.begin_as(teacher, [2, 2])
    with torch.no_grad():
        student.layers[0].over_channels.weight.zero_()  # type: ignore[union-attr,operator,index]
    for other in (student.layers[1], teacher.layers[1]):  # type: ignore[index]
        assert other.over_channels.weight.any()  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("thin", [{"rank": 5}, {"projection": 7}, {"bits": 4}, {"bits": 8, "rank": 5}])
def test_copied_layers_are_thinned_as_a_whole_network_is(thin: dict[str, int], units: Units) -> None:
    teacher = lively(deep("lstm"), units)
    shallow = build_model(deep("lstm", 2), FEATURES.dimension, units.size)
    shallow.begin_as(teacher, [1, 4])
    one, other = (build_model(deep("lstm", 2, **thin), FEATURES.dimension, units.size) for _ in range(2))
    one.begin_as(teacher, [1, 4])
    other.begin_as(shallow)
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in one.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 20}, "size mismatch"),
        ({"kind": "separable"}, "Missing key"),
        ({"conditioned": [1]}, "Missing key"),
        ({"layers": 3}, "Missing key"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str, units: Units) -> None:
    student = build_model(deep(**{"kind": "lstm", "layers": 2, **change}), FEATURES.dimension, units.size)
    with pytest.raises(RuntimeError, match=said):
        student.begin_as(lively(deep("lstm"), units), [1, 4])


def test_what_the_teacher_has_besides_is_refused(units: Units) -> None:
    student = build_model(deep("lstm", 2), FEATURES.dimension, units.size)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*condition"):
        student.begin_as(lively(deep("lstm", conditioned=[1]), units), [1, 4])
