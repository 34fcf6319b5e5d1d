"""Word error rates measured with several amounts of audio → what more audio would give, where they follow a power law.

WER = scale · hours ^ -exponent is a straight line on logarithmic axes. A line is fitted to each seed by itself, because networks of one seed
share their start and teacher; how much the seeds differ gives the intervals. Nothing but the measured range supports the law: an interval
says what the scatter of the seeds allows if the line goes on, and not whether it does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from asr_kd.errors import UserError
from asr_kd.files import Place, parse_json, read_text

#: of Student's t distribution, two-sided 95 %, by degrees of freedom; more count as the last
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
#: amounts that show whether the line is straight, and seeds that show how much chance there is
AMOUNTS, SEEDS = 3, 2
#: a bend below it is of rounding
ROUNDING = 1e-9

#: a value and its 95 % interval
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Law:
    """Lines through the points of each seed, natural logarithms on both axes.

    Attributes:
        hours: the amounts that were measured, float64 [amounts], rising.
        slopes: of each seed, float64 [seeds].
        heights: of each seed at the mean of the logarithms of `hours`, float64 [seeds].
        bends: of each seed, float64 [seeds]: the coefficient of a parabola that is at right angles to the line.
    """

    hours: np.ndarray
    slopes: np.ndarray
    heights: np.ndarray
    bends: np.ndarray

    @property
    def exponent(self) -> Interval:
        """By which power of the hours the WER falls."""
        value, low, high = _interval(-self.slopes)
        return value, low, high

    @property
    def refusal(self) -> str | None:
        """Why the points do not support an extrapolation; None where they do."""
        bend, low, high = _interval(self.bends)
        if low > ROUNDING or high < -ROUNDING:
            less = "less and less" if bend > 0 else "more and more"
            return f"the points follow no power law: more audio helps {less} (a curve fits them for certain)"
        value, low, high = self.exponent
        if low <= 0:
            return f"no gain is certain: the exponent is {value:.3f} (95 % interval {low:.3f} to {high:.3f})"
        return None

    def wer(self, hours: float) -> Interval:
        """The mean of students of so many hours."""
        away = math.log(hours) - float(np.log(self.hours).mean())
        value, low, high = (math.exp(one) for one in _interval(self.heights + self.slopes * away))
        return value, low, high


def _interval(values: np.ndarray) -> Interval:
    mean, count = float(values.mean()), len(values)
    half = T95[min(count - 1, len(T95)) - 1] * statistics.stdev(values.tolist()) / math.sqrt(count)
    return mean, mean - half, mean + half


def fit(points: Mapping[int, Mapping[float, float]]) -> Law:
    """The law of measured points: seed → hours → WER. All seeds have the same amounts, at least `AMOUNTS`; there are at least `SEEDS`."""
    hours = sorted(next(iter(points.values())))
    logs = np.log(hours)
    line = logs - logs.mean()
    square = line**2
    bent = square - square.mean() - line * (line @ square) / (line @ line)
    rows = np.log([[of_seed[amount] for amount in hours] for of_seed in points.values()])
    return Law(np.array(hours), rows @ line / (line @ line), rows.mean(1), rows @ bent / (bent @ bent))


def read_points(path: Place | str) -> dict[int, dict[float, float]]:
    """Points of a JSONL file with `hours`, `wer` (0.25 is 25 %) and `seed` in each line: seed → hours → WER.

    Raises:
        UserError: when a line is no point, a seed lacks an amount, or there are too few of either.
    """
    found: dict[int, dict[float, float]] = {}
    for number, line in enumerate(read_text(path, "measured points").splitlines(), 1):
        if not line.strip():
            continue
        where = f"measured: {path}, line {number}"
        one = parse_json(line, where)
        hours, wer, seed = (one.get(name) if isinstance(one, dict) else None for name in ("hours", "wer", "seed"))
        if not (_positive(hours) and _positive(wer) and type(seed) is int):
            raise UserError(
                f'{where}: is no point; write {{"hours": 0.45, "wer": 0.283, "seed": 0}}, hours and WER above 0'
            )
        if hours in found.setdefault(seed, {}):
            raise UserError(f"{where}: is the second point of seed {seed} at {hours:g} hours; keep one of them")
        found[seed][float(hours)] = float(wer)
    amounts: Sequence[float] = sorted({amount for of_seed in found.values() for amount in of_seed})
    if len(amounts) < AMOUNTS or len(found) < SEEDS:
        raise UserError(
            f"measured: {path} has {len(amounts)} amounts of audio and {len(found)} seeds; a law needs {AMOUNTS} amounts of each of {SEEDS} seeds"
        )
    for seed, of_seed in found.items():
        if lacking := next((amount for amount in amounts if amount not in of_seed), None):
            raise UserError(
                f"measured: {path} has no point of seed {seed} at {lacking:g} hours; measure each seed with every amount"
            )
    return found


def _positive(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
