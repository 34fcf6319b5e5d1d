"""The report's pictures, as inline SVG. Colours are CSS classes of the page, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from asr_kd.evaluation.schema import Bin

WIDTH = 520
LEFT, NARROW, RIGHT = 46, 8, 16  # margins; rows of a name and a rate have the narrow one at the left
NAME_LENGTH = 44
Scale = Callable[[float], float]  # a value → its place
FEW_WORDS, FEW_SHARE = 50, 0.01  # slices of fewer words, or of a smaller share of them, do not stretch an axis


@dataclass(frozen=True)
class Bar:
    """A system's word error rate (a fraction) and its interval; `series` picks the colour."""

    name: str
    series: str
    wer: float
    interval: tuple[float, float] | None
    note: str = ""

    @property
    def high(self) -> float:
        """The upper end of the interval, or else the rate."""
        return self.interval[1] if self.interval else self.wer

    @property
    def spoken(self) -> str:
        """Rate and interval in words."""
        bounds = self.interval and ", 95 % interval {} to {}".format(*map(percent, self.interval))
        return percent(self.wer) + (bounds or "")


@dataclass(frozen=True)
class Curve:
    """Development word error rates (fractions) against hours of audio: points are (hours, rate)."""

    name: str
    series: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Row:
    """A value of a manifest field, how many words it has, and the systems' word error rates on them."""

    value: str
    words: int
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Heat:
    """A picture of a pixel a value: PNG in base64, the names of its rows from the top, its length in seconds."""

    title: str
    image: str
    rows: list[str]
    seconds: float


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
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    every = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first = max(index for index, value in enumerate(every) if value <= low * 1.001)
    last = min(index for index, value in enumerate(every) if value >= high * 0.999)
    return every[first : last + 1]


def _ticks(values: Sequence[float]) -> tuple[list[float], bool]:
    """Ticks for these values, and whether they are logarithmic: where the values above 0 span a wide range."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) / min(positive) > 5:
        return log_ticks(min(positive), max(positive)), True
    return linear_ticks(max(values)), False


def _label(value: float) -> str:
    return f"{value:.10g}"


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "tick") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(x, y, anchor, kind, text)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    template = Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>')
    return template.format(x1, y1, x2, y2, kind)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _curve(points: Sequence[tuple[float, float]], series: str) -> Markup:
    return Markup('<polyline points="{}" class="stroke {}"/>').format(_path(points), series)


def _dot(x: float, y: float, radius: float, kind: str) -> Markup:
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}" class="{}"/>').format(x, y, radius, kind)


def _group(title: str, *drawn: Markup) -> Markup:
    """Things with a title of their own."""
    return Markup("<g><title>{}</title>{}</g>").format(title, Markup("").join(drawn))


def _svg(height: float, title: str, description: str, parts: list[Markup], width: float = WIDTH) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">\n<desc>{}</desc>\n')
    return head.format(width, height, title, description) + Markup("\n").join(parts) + Markup("\n</svg>")


def _heading(y: float, name: str, note: str, figure: str, kind: str) -> list[Markup]:
    """Name and figure of a row, which stand above it so that long names fit a phone."""
    end = f" ({note})" if note else ""
    length = NAME_LENGTH - len(end)
    short = (name if len(name) <= length else name[: length - 1] + "…") + end
    # a halo in the page's colour keeps the grid from crossing the letters
    return [_text(NARROW + 4, y, short, "start", "name halo"), _text(WIDTH - RIGHT, y, figure, "end", f"{kind} halo")]


def _rates_below(ticks: list[float], scale: float, bottom: float) -> list[Markup]:
    """The grid of rows of word error rates, in percent from left to right."""
    parts = []
    for tick in ticks:
        x = NARROW + scale * tick
        parts.append(_line(x, 4, x, bottom, "axis" if tick == 0 else "grid"))
        parts.append(_text(x, bottom + 18, _label(tick), "start" if tick == 0 else "middle"))
    return [*parts, _text(WIDTH - RIGHT, bottom + 38, "word error rate, %", "end")]


def _axes(ticks: list[float], up: Scale, marks: list[float], across: Scale, bottom: float, said: str) -> list[Markup]:
    """The grid of a picture against hours or decibels, with ticks upwards and marks to the right, of which `said` is written."""
    parts = []
    for tick in ticks:
        parts.append(_line(LEFT, up(tick), WIDTH - RIGHT, up(tick), "axis" if tick == ticks[0] else "grid"))
        parts.append(_text(LEFT - 7, up(tick) + 4.5, _label(tick), "end"))
    for mark in marks:
        parts.append(_line(across(mark), bottom, across(mark), bottom + 5, "axis"))
        parts.append(_text(across(mark), bottom + 20, _label(mark), "middle"))
    return [*parts, _text(WIDTH - RIGHT, bottom + 40, said, "end")]


def wer_bars(bars: Sequence[Bar]) -> Markup:
    """Horizontal bars with the interval as a whisker."""
    row, thick, top = 48, 16, 4
    ticks = linear_ticks(100 * max(bar.high for bar in bars))
    scale = (WIDTH - NARROW - RIGHT - 8) / ticks[-1]
    bottom = top + row * len(bars)
    parts = _rates_below(ticks, scale, bottom)
    for index, bar in enumerate(bars):
        y = top + row * index
        parts += _heading(y + 16, bar.name, bar.note, percent(bar.wer), "value")
        middle = y + 24 + thick / 2
        whisker = Markup("")
        if bar.interval:
            low, high = (NARROW + scale * 100 * bound for bound in bar.interval)
            strokes = [(low, middle, high, middle), *((end, middle - 5, end, middle + 5) for end in (low, high))]
            whisker = Markup("").join(_line(*one, kind) for kind in ("whisker-halo", "whisker") for one in strokes)
        rect = Markup('<rect x="{}" y="{:.1f}" width="{:.1f}" height="{}" rx="2" class="fill {}"/>')
        drawn = rect.format(NARROW, y + 24, max(1.0, scale * 100 * bar.wer), thick, bar.series)
        parts.append(_group(f"{bar.name}: {bar.spoken}", drawn, whisker))
    said = "; ".join(f"{bar.name} {percent(bar.wer)}" for bar in bars)
    return _svg(bottom + 46, "Word error rate of each system, with 95 % intervals", said, parts)


def best_of(curve: Curve) -> str:
    """The best score of a curve and when it was."""
    hours, wer = min(curve.points, key=lambda point: point[1])
    return f"{percent(wer)} after {hours:.1f} h"


def learning_curves(curves: Sequence[Curve]) -> Markup:
    """Development WER against hours of audio; a ring marks the best score.

    The WER axis is logarithmic where the scores span a wide range, so that the end of training can be told apart.
    """
    top, height = 34, 352
    bottom = height - 50
    ticks, logarithmic = _ticks([100 * wer for curve in curves for _, wer in curve.points])
    hours = linear_ticks(max(hour for curve in curves for hour, _ in curve.points))

    def across(hour: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * hour / hours[-1]

    def up(score: float) -> float:
        share = score / ticks[-1]
        if logarithmic:
            share = math.log(max(score, ticks[0]) / ticks[0]) / math.log(ticks[-1] / ticks[0])
        return bottom - (bottom - top) * share

    parts = _axes(ticks, up, hours, across, bottom, "hours of audio trained on (passes counted)")
    parts.append(_text(4, 16, "development WER, %" + " (logarithmic)" * logarithmic))
    for curve in curves:
        points = [(across(hour), up(100 * wer)) for hour, wer in curve.points]
        best = min(range(len(points)), key=lambda index: curve.points[index][1])
        ring = _dot(*points[best], 4.5, f"ring {curve.series}")
        parts.append(_group(f"{curve.name}: best {best_of(curve)}", _curve(points, curve.series), ring))
    said = "; ".join(f"{curve.name} best {percent(min(wer for _, wer in curve.points))}" for curve in curves)
    return _svg(height, "Learning curves: development word error rate against hours of audio", said, parts)


def slice_dots(field: str, slices: Sequence[Row]) -> Markup:
    """A row for each value, in it a dot with its interval for each system.

    The axis reaches somewhat further than the highest rate of a slice that is not small. What lies beyond has an arrow at
    the edge, and its figures in the title and the description.
    """
    lane, head, gap = 12, 21, 9
    row = head + lane * max(len(one.bars) for one in slices) + gap
    every = [bar for one in slices for bar in one.bars]
    enough = max(FEW_WORDS, FEW_SHARE * sum(one.words for one in slices))
    steady = [bar for one in slices if one.words >= enough for bar in one.bars] or every
    widest = max(bar.high for bar in every)
    ticks = linear_ticks(100 * min(widest, 1.6 * max(bar.wer for bar in steady) or widest))
    scale = (WIDTH - NARROW - RIGHT - 8) / ticks[-1]
    edge, cut = NARROW + scale * ticks[-1], False
    bottom = row * len(slices)
    parts = _rates_below(ticks, scale, bottom)
    for index, one in enumerate(slices):
        y = row * index
        parts += _heading(y + 15, one.value, "", f"{one.words:,} words", "tick")
        for level, bar in enumerate(one.bars):
            middle = y + head + lane * level + lane / 2
            drawn = []
            if bar.interval:
                low, high = (NARROW + scale * min(100 * bound, ticks[-1]) for bound in bar.interval)
                drawn.append(_line(low, middle, high, middle, f"stroke {bar.series}"))
            dot_beyond, whisker_beyond = (100 * end > ticks[-1] * 1.0001 for end in (bar.wer, bar.high))
            if dot_beyond or whisker_beyond:
                cut, size = True, 5.5 if dot_beyond else 3.5
                corners = [(edge - 1.5 * size, middle - size), (edge, middle), (edge - 1.5 * size, middle + size)]
                drawn.append(Markup('<polygon points="{}" class="head {}"/>').format(_path(corners), bar.series))
            if not dot_beyond:
                drawn.append(_dot(NARROW + scale * 100 * bar.wer, middle, 4.5, f"point {bar.series}"))
            parts.append(_group(f"{one.value}, {bar.name}: {bar.spoken}", *drawn))
    if cut:
        parts.append(_text(NARROW, bottom + 38, "▸ goes on beyond the axis"))
    rates = [", ".join(f"{bar.name} {percent(bar.wer)}" for bar in one.bars) for one in slices]
    said = "; ".join(f"{one.value}: {told}" for one, told in zip(slices, rates, strict=True))
    return _svg(bottom + 46, f"Word error rate by {field}", said, parts)


def wer_against_hours(points: Sequence[tuple[float, Bar]]) -> Markup:
    """Word error rate against the hours of audio without transcripts that a system learned from.

    The hours are logarithmic where they span a wide range; none stand at the left edge then, apart.
    """
    top, height = 34, 330
    bottom = height - 50
    ticks = linear_ticks(100 * max(bar.high for _, bar in points))
    marks, logarithmic = _ticks([hours for hours, _ in points])
    apart = logarithmic and any(hours <= 0 for hours, _ in points)
    first = LEFT + (46 if apart else 16)

    def across(hours: float) -> float:
        if not logarithmic:
            return first + (WIDTH - first - RIGHT - 8) * hours / marks[-1]
        if hours <= 0:
            return LEFT + 16
        return first + (WIDTH - first - RIGHT - 8) * math.log(hours / marks[0]) / math.log(marks[-1] / marks[0])

    def up(wer: float) -> float:
        return bottom - (bottom - top) * 100 * wer / ticks[-1]

    scale = "hours without transcripts" + " (logarithmic)" * logarithmic
    parts = [_text(4, 16, "word error rate, %")]
    parts += _axes(ticks, lambda tick: up(tick / 100), [0.0, *marks] if apart else marks, across, bottom, scale)
    for hours, bar in points:
        beside = [other for same, other in points if same == hours]  # systems of the same hours stand side by side
        step = min(9.0, 22 / len(beside))
        x, y = across(hours) + step * (beside.index(bar) - (len(beside) - 1) / 2), up(bar.wer)
        drawn = [_dot(x, y, 6, f"point {bar.series}")]
        if bar.interval:
            drawn.insert(0, _line(x, up(bar.interval[0]), x, up(bar.interval[1]), f"stroke {bar.series}"))
        parts.append(_group(f"{bar.name}: {percent(bar.wer)} with {hours:,.6g} hours", *drawn))
    said = "; ".join(f"{bar.name}: {hours:,.6g} hours, {percent(bar.wer)}" for hours, bar in points)
    return _svg(height, "Word error rate against hours of audio without transcripts", said, parts)


def wer_against_noise(noise: str, heard: Sequence[tuple[float | None, Sequence[Bar]]]) -> Markup:
    """Word error rate against the signal-to-noise ratio, the louder noise to the right, a line for each system.

    Args:
        noise: what kind it is.
        heard: ratio in dB, and a bar for each system; None: the clean sound, which stands apart at the left edge.
    """
    top, height = 34, 330
    bottom = height - 50
    ticks = linear_ticks(100 * max(bar.high for _, bars in heard for bar in bars))
    ratios = sorted({ratio for ratio, _ in heard if ratio is not None})
    heard = sorted(heard, key=lambda one: -math.inf if one[0] is None else -one[0])
    clean = any(ratio is None for ratio, _ in heard)
    first = LEFT + (76 if clean else 24)
    width = WIDTH - first - RIGHT - 16

    def across(ratio: float | None) -> float:
        return LEFT + 24 if ratio is None else first + width * (ratios[-1] - ratio) / max(ratios[-1] - ratios[0], 1e-9)

    def up(wer: float) -> float:
        return bottom - (bottom - top) * 100 * wer / ticks[-1]

    parts = [_text(4, 16, "word error rate, %")]
    parts += _axes(ticks, lambda tick: up(tick / 100), ratios, across, bottom, "signal-to-noise ratio, dB")
    if clean:
        parts.append(_text(across(None), bottom + 20, "clean", "middle"))
    dots: dict[str, list[tuple[float | None, float, float, Bar]]] = {}
    for ratio, bars in heard:
        step = min(6.0, 22 / len(bars))
        for place, bar in enumerate(bars):  # side by side, so that their intervals can be told apart
            x = across(ratio) + step * (place - (len(bars) - 1) / 2)
            dots.setdefault(bar.name, []).append((ratio, x, up(bar.wer), bar))
    for name, own in dots.items():
        loud = [(x, y) for ratio, x, y, _ in own if ratio is not None]
        drawn = [_curve(loud, own[0][-1].series)] if loud else []
        for _, x, y, bar in own:
            if bar.interval:
                drawn.append(_line(x, up(bar.interval[0]), x, up(bar.interval[1]), f"stroke {bar.series}"))
            drawn.append(_dot(x, y, 4.5, f"point {bar.series}"))
        told = ", ".join(f"{_ratio(ratio)} {percent(bar.wer)}" for ratio, _, _, bar in own)
        parts.append(_group(f"{name}: {told}", *drawn))
    said = "; ".join(
        f"{_ratio(ratio)}: {', '.join(f'{bar.name} {percent(bar.wer)}' for bar in bars)}" for ratio, bars in heard
    )
    return _svg(height, f"Word error rate against {noise} noise", said, parts)


def _ratio(decibels: float | None) -> str:
    return "clean" if decibels is None else f"{_label(decibels)} dB"


def reliability(systems: Sequence[tuple[str, str, Sequence[Bin]]]) -> Markup:
    """Share of words that are right against the confidence that the system gave them: (name, series, bins).

    Bins without words are passed over.
    """
    top, side = 34, 300
    bottom, right = top + side, LEFT + 400

    def at(confidence: float, accuracy: float) -> tuple[float, float]:
        return LEFT + (right - LEFT) * confidence, bottom - side * accuracy

    parts = [_text(4, 16, "words that are right, %")]
    for step in range(6):
        x, y = at(step / 5, step / 5)
        parts.append(_line(LEFT, y, right, y, "grid" if step else "axis"))
        parts.append(_text(LEFT - 7, y + 4.5, f"{20 * step}", "end"))
        parts.append(_line(x, bottom, x, bottom + 5, "axis"))
        parts.append(_text(x, bottom + 20, f"{20 * step}", "middle"))
    parts.append(_line(*at(0, 0), *at(1, 1), "ideal"))
    parts.append(_text(right, bottom + 40, "confidence, %", "end"))
    dot = Markup(
        '<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}" class="point {}"><title>{}: {:,} words, confidence {}, right {}</title></circle>'
    )
    said = []
    for name, series, bins in systems:
        most = max((one.words for one in bins), default=1)
        points, dots, told = [], Markup(""), []
        for one in bins:
            if one.confidence is not None and one.accuracy is not None:
                points.append(at(one.confidence, one.accuracy))
                radius = 2.5 + 4.5 * math.sqrt(one.words / most)
                confidence, accuracy = percent(one.confidence), percent(one.accuracy)
                dots += dot.format(*points[-1], radius, series, name, one.words, confidence, accuracy)
                told.append(f"confidence {confidence} right {accuracy}")
        parts.append(Markup("<g>{}{}</g>").format(_curve(points, series), dots))
        said.append(f"{name}: {', '.join(told)}")
    return _svg(bottom + 50, "Calibration: words that are right against confidence", "; ".join(said), parts)


def heat_maps(maps: Sequence[Heat]) -> Markup:
    """Pictures one under the other on one time axis, with the names of their rows; a row of a few names is spread."""
    left, width, line, gap = 96, 880, 17, 34
    end = max(one.seconds for one in maps)
    parts, y = list[Markup](), 8.0
    for one in maps:
        height = max(120.0, line * len(one.rows))
        parts.append(_text(left, y + 14, one.title, "start", "name"))
        top = y + 22
        # an image is stretched without smoothing: a block a frame and unit
        picture = Markup(
            '<image x="{}" y="{:.1f}" width="{:.1f}" height="{:.1f}" preserveAspectRatio="none" class="pixels" '
            'href="data:image/png;base64,{}"/>'
        )
        parts.append(picture.format(left, top, width * one.seconds / end, height, one.image))
        step = height / len(one.rows)
        for index, name in enumerate(one.rows):
            parts.append(_text(left - 7, top + step * (index + 0.5) + 4.5, name, "end"))
        y = top + height + gap - 22
    for tick in linear_ticks(end, 8):
        if tick <= end * 1.001:
            x = left + width * tick / end
            parts.append(_line(x, y - 10, x, y - 5, "axis"))
            parts.append(_text(x, y + 10, _label(tick), "middle"))
    parts.append(_text(left + width, y + 30, "seconds", "end"))
    said = "; ".join(f"{one.title}: {', '.join(one.rows)}" for one in maps)
    return _svg(y + 38, "Posteriors over time, under the spectrogram", said, parts, left + width + 8)
