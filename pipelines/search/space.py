"""The students that a search chooses from: what space.yaml allows, each by its name, and a grid of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asr_kd.config.load import build, load_yaml
from asr_kd.errors import UserError
from asr_kd.models.settings import STREAMING, ModelSettings

#: kind of network → setting → values; a setting that is not of `model` is RATE
Space = Mapping[str, Mapping[str, Sequence[Any]]]
RATE = "learning_rate"


@dataclass(frozen=True)
class Candidate:
    """A student that may be trained.

    Attributes:
        name: kind, settings and values, in the order of the space: of folders too.
        rate: learning rate.
    """

    name: str
    model: ModelSettings
    rate: float


def candidate(kind: str, values: Mapping[str, Any]) -> Candidate | None:
    """The student with these values; None where the settings refuse them together."""
    settings = {name: value for name, value in values.items() if name != RATE and value is not None}
    said = "-".join(f"{name}.{'none' if value is None else f'{value:g}'}" for name, value in values.items())
    try:
        model = build(ModelSettings, {"kind": kind, **settings}, "space")
    except UserError:
        return None
    return Candidate(f"{kind}-{said}", model, values[RATE])


def read_space(file: Path) -> Space:
    """The space in a file.

    Raises:
        UserError: when it holds no lists of numbers, a kind has no learning rates, or one with nothing that the settings take.
    """
    space = load_yaml(file)
    for kind, settings in space.items():
        rates = settings.get(RATE) if isinstance(settings, dict) else None
        if not isinstance(rates, list) or None in rates:
            raise UserError(f"{file}: {kind} has no {RATE}; give a list of them beside the lists of settings of model")
        for name, values in settings.items():
            numbers = isinstance(values, list) and all(one is None or type(one) in (int, float) for one in values)
            if not numbers or not values or len(set(values)) < len(values):
                raise UserError(f"{file}: {kind}: {name} is {values}; give a list of different numbers (or null)")
        if min(rates) <= 0:
            raise UserError(f"{file}: {kind}: {RATE} is {min(rates)}; give rates above 0")
        if kind not in STREAMING:
            raise UserError(
                f"{file}: {kind} does not stream, and speed is that of a stream; take {', '.join(STREAMING)}"
            )
        if not any(candidate(kind, values) for values in combinations(settings)):
            first = {name: value for name, value in next(combinations(settings)).items() if name != RATE}
            build(ModelSettings, {"kind": kind, **first}, f"{file}: {kind}: no values go together; of the first ones")
    if not space:
        raise UserError(f"{file}: holds no kind of network; give one, as lstm: {{layers: [1, 2], {RATE}: [0.003]}}")
    return space


def combinations(settings: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every choice of one value of each setting."""
    for values in itertools.product(*settings.values()):
        yield dict(zip(settings, values, strict=True))


def grid(space: Space, points: int) -> list[tuple[str, dict[str, Any]]]:
    """So many kinds with their values, or fewer: those on the finest lattice that has no more of them.

    Of a setting it has values that are evenly spaced, the ends among them (one: the middle); settings are made finer in turn.
    """
    levels = {name: 1 for settings in space.values() for name in settings}
    finest = _lattice(space, levels)
    grown = True
    while grown:
        grown = False
        for name in levels:
            finer = _lattice(space, {**levels, name: levels[name] + 1})
            if len(finest) < len(finer) <= points:
                levels[name] += 1
                finest, grown = finer, True
    return finest[:points]


def _lattice(space: Space, levels: Mapping[str, int]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (kind, values)
        for kind, settings in space.items()
        for values in combinations({name: _spread(every, levels[name]) for name, every in settings.items()})
        if candidate(kind, values)
    ]


def _spread(values: Sequence[Any], levels: int) -> list[Any]:
    if levels == 1:
        return [values[len(values) // 2]]
    levels = min(levels, len(values))
    return [values[round(at * (len(values) - 1) / max(1, levels - 1))] for at in range(levels)]
