"""The report's pictures, as inline SVG. Colours are CSS classes of the page, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 520
LEFT, RIGHT = 46, 16
NAME_LENGTH = 44


@dataclass(frozen=True)
class Bar:
    """A system's word error rate (a fraction) and its interval; `series` picks the colour."""

    name: str
    series: str
    wer: float
    interval: tuple[float, float] | None
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """Development word error rates (fractions) against hours of audio."""

    name: str
    series: str
    hours: Sequence[float]
    wers: Sequence[float]


def percent(value: float) -> str:
    """`0.1234` → `12.34 %`."""
    return f"{100 * value:.2f} %"


def linear_ticks(high: float, wanted: int = 5) -> list[float]:
    """Round values from 0 to at least `high`, about `wanted` steps."""
    if high <= 0:
        return [0.0, 1.0]
    raw = high / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    return [index * step for index in range(math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Values 1, 2 and 5 times a power of ten that enclose low … high."""
    every = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for factor in (1, 2, 5)
    ]
    first = max(index for index, value in enumerate(every) if value <= low * 1.001)
    last = min(index for index, value in enumerate(every) if value >= high * 0.999)
    return every[first : last + 1]


def _label(value: float) -> str:
    return f"{value:.10g}"


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "tick") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(x, y, anchor, kind, text)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    template = Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>')
    return template.format(x1, y1, x2, y2, kind)


def _svg(height: float, title: str, description: str, parts: list[Markup]) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">\n<desc>{}</desc>\n')
    return head.format(WIDTH, height, title, description) + Markup("\n").join(parts) + Markup("\n</svg>")


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def wer_bars(bars: Sequence[Bar]) -> Markup:
    """Horizontal bars with the interval as a whisker; name and figure stand above, so that long names fit a phone."""
    left, row, thick, top = 8, 48, 16, 4
    ticks = linear_ticks(100 * max((bar.interval[1] if bar.interval else bar.wer) for bar in bars))
    scale = (WIDTH - left - RIGHT - 8) / ticks[-1]
    bottom = top + row * len(bars)
    parts = []
    for tick in ticks:
        x = left + scale * tick
        parts.append(_line(x, top, x, bottom, "axis" if tick == 0 else "grid"))
        parts.append(_text(x, bottom + 18, _label(tick), "start" if tick == 0 else "middle"))
    parts.append(_text(WIDTH - RIGHT, bottom + 38, "word error rate, %", "end"))
    for index, bar in enumerate(bars):
        y = top + row * index
        value = percent(bar.wer)
        # a halo in the page's colour keeps the grid from crossing the letters
        name = f"{_short(bar.name)} ({bar.note})" if bar.note else _short(bar.name)
        parts.append(_text(left + 4, y + 16, name, "start", "name halo"))
        parts.append(_text(WIDTH - RIGHT, y + 16, value, "end", "value halo"))
        width = max(1.0, scale * 100 * bar.wer)
        middle = y + 24 + thick / 2
        spoken = value
        whisker = Markup("")
        if bar.interval:
            low, high = (left + scale * 100 * bound for bound in bar.interval)
            spoken += f", 95 % interval {percent(bar.interval[0])} to {percent(bar.interval[1])}"
            ends = [(end, middle - 5, end, middle + 5) for end in (low, high)]
            strokes = [(low, middle, high, middle), *ends]
            halo = [_line(*stroke, "whisker-halo") for stroke in strokes]
            whisker = Markup("").join([*halo, *(_line(*stroke, "whisker") for stroke in strokes)])
        group = Markup(
            '<g><title>{}: {}</title><rect x="{}" y="{:.1f}" width="{:.1f}" height="{}" rx="2" class="fill {}"/>{}</g>'
        )
        parts.append(group.format(bar.name, spoken, left, y + 24, width, thick, bar.series, whisker))
    said = "; ".join(f"{bar.name} {percent(bar.wer)}" for bar in bars)
    return _svg(bottom + 46, "Word error rate of each system, with 95 % intervals", said, parts)


def learning_curves(curves: Sequence[Curve]) -> Markup:
    """Development WER against hours of audio; a ring marks the best score.

    The WER axis is logarithmic where the scores span a wide range, so that the end of training can be told apart.
    """
    top, height = 34, 352
    bottom = height - 50
    scores = [100 * wer for curve in curves for wer in curve.wers]
    positive = [score for score in scores if score > 0]
    logarithmic = bool(positive) and max(positive) / min(positive) > 5
    ticks = log_ticks(min(positive), max(positive)) if logarithmic else linear_ticks(max(scores))
    hours = linear_ticks(max(hour for curve in curves for hour in curve.hours))

    def across(hour: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * hour / hours[-1]

    def up(score: float) -> float:
        if logarithmic:
            score = max(score, ticks[0])
            share = math.log(score / ticks[0]) / math.log(ticks[-1] / ticks[0])
        else:
            share = score / ticks[-1]
        return bottom - (bottom - top) * share

    parts = []
    for tick in ticks:
        parts.append(_line(LEFT, up(tick), WIDTH - RIGHT, up(tick), "axis" if tick == ticks[0] else "grid"))
        parts.append(_text(LEFT - 7, up(tick) + 4.5, _label(tick), "end"))
    for hour in hours:
        parts.append(_line(across(hour), bottom, across(hour), bottom + 5, "axis"))
        parts.append(_text(across(hour), bottom + 20, _label(hour), "middle"))
    parts.append(_text(WIDTH - RIGHT, bottom + 40, "hours of audio trained on (passes counted)", "end"))
    scale = "development WER, % (logarithmic)" if logarithmic else "development WER, %"
    parts.append(_text(4, 16, scale))
    for curve in curves:
        points = [(across(hour), up(100 * wer)) for hour, wer in zip(curve.hours, curve.wers, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        best = min(range(len(points)), key=lambda index: curve.wers[index])
        spoken = f"{curve.name}: best {percent(curve.wers[best])} after {curve.hours[best]:.1f} hours"
        group = Markup(
            '<g><title>{}</title><polyline points="{}" class="stroke {}"/>'
            '<circle cx="{:.1f}" cy="{:.1f}" r="4.5" class="ring {}"/></g>'
        )
        parts.append(group.format(spoken, path, curve.series, *points[best], curve.series))
    said = "; ".join(f"{curve.name} best {percent(min(curve.wers))}" for curve in curves)
    return _svg(height, "Learning curves: development word error rate against hours of audio", said, parts)
