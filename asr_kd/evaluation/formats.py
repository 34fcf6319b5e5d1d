"""How figures are written, in the terminal, in Markdown and on the page. A figure that is not defined is a dash."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from asr_kd.evaluation.charts import percent
from asr_kd.evaluation.earlier import EarlierSettings
from asr_kd.evaluation.schema import Bootstrap, Drawn, Interval, NamedSlice, Pair, Report, Slice
from asr_kd.evaluation.settings import EvalSettings

T = TypeVar("T")

NOTHING = "–"
SURE = "significant"


def table(rows: list[list[str]]) -> str:
    """A Markdown table that is also easy to read in a terminal; the first row is its head, all columns but the first figures."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * (width - 1) + (":" if column else "-") for column, width in enumerate(widths)]  # figures to the right
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [f"{cell:{'>' if column else '<'}{widths[column]}}" for column, cell in enumerate(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def known(value: T | None, written: Callable[[T], str]) -> str:
    """A figure as `written` writes it, where there is one."""
    return NOTHING if value is None else written(value)


def p_value(value: float | None) -> str:
    """`0.00012` → `< 0.001`."""
    return known(value, lambda p: "< 0.001" if p < 0.001 else f"{p:.3f}")


def points(value: float | None) -> str:
    """A difference of rates in percentage points: `-0.0123` → `−1.23`."""
    return NOTHING if value is None else f"{100 * value:+.2f}".replace("-", "−")


def change(value: float | None) -> str:
    """Relative change: `-0.123` → `−12.3 %`."""
    if value is None:
        return NOTHING
    text = f"{100 * value:+.1f} %"
    return ("0.0 %" if text in ("+0.0 %", "-0.0 %") else text).replace("-", "−")


def share(value: float | None) -> str:
    """`0.834` → `83 %`."""
    return NOTHING if value is None else f"{100 * value:.0f} %".replace("-", "−")


def span(bounds: Interval | None) -> str:
    """An interval of fractions in percent."""
    return NOTHING if bounds is None else f"{100 * bounds[0]:.2f} – {100 * bounds[1]:.2f}"


def changes(bounds: Interval | None) -> str:
    """An interval of relative changes or shares in percent."""
    return "" if bounds is None else f"{100 * bounds[0]:.0f} to {100 * bounds[1]:.0f}".replace("-", "−")


def ratio(value: float | None) -> str:
    """`0.25` → `0.25 ×`."""
    return NOTHING if value is None else f"{value:.2f} ×"


def size(count: int) -> str:
    """Bytes in decimal units, in three digits: `7877744` → `7.88 MB`."""
    for unit, power in (("GB", 1e9), ("MB", 1e6)):
        if count >= power:
            return f"{count / power:.{2 if count < 10 * power else 1 if count < 100 * power else 0}f} {unit}"
    return f"{count / 1e3:.1f} kB"


def milliseconds(value: float) -> str:
    """`-30.0` → `−30 ms`."""
    return f"{value:,.0f} ms".replace("-", "−")


def lookahead(value: int | None) -> str:
    """Milliseconds; None is the whole utterance."""
    return "utterance" if value is None else f"{value:,} ms"


#: by the setting; torchaudio's is in reports before version 3 alone
SEARCHES = {"beam": "prefix beam search", "torchaudio": "beam search of torchaudio"}


def decoder(settings: EvalSettings | EarlierSettings) -> str:
    """The decoder in words, with the language model and the lexicon that it had."""
    if settings.decoder == "greedy":
        return "greedy"
    said = [f"{SEARCHES[settings.decoder]}, beam {settings.beam}"]
    if settings.lm:
        said.append(f"language model {settings.lm} with weight {settings.lm_weight:g}")
    if settings.lexicon:
        said.append(f"lexicon {settings.lexicon}")
    if settings.lm or settings.lexicon:
        said.append(f"word bonus {settings.word_bonus:g}")
    return ", ".join(said)


def threads(count: int) -> str:
    """The thread count in words."""
    return "one thread" if count == 1 else f"{count} threads"


def intervals_note(bootstrap: Bootstrap) -> str:
    """How the intervals came about, and when to distrust them."""
    if not bootstrap.resamples:
        return "no intervals (bootstrap=0)"
    crude = ", which is few: the intervals are crude" if bootstrap.number < 20 else ""
    drawn = f"{bootstrap.number:,} {bootstrap.blocks}{crude}"
    return f"95 % intervals from {bootstrap.resamples:,} bootstrap resamples of {drawn}"


def sureness(pair: Pair) -> str:
    """Whether two systems can be told apart, by both tests at 5 %; by MAPSSWE alone where nothing was resampled."""
    if not pair.difference:
        return "no difference"
    sure = {value < 0.05 for value in (pair.p_bootstrap, pair.mapsswe.p) if value is not None}
    if len(sure) > 1:
        return "the tests disagree"
    return SURE if True in sure else "within chance"


def said_of_pair(pair: Pair) -> str:
    """The same, naming the better one."""
    how = sureness(pair)
    return f"{pair.a if pair.difference < 0 else pair.b} is better" if how == SURE else how


def named_slices(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """The worst slices, and those that changed most: for each list its title, and slices with their figures in words."""
    lists: dict[str, list[tuple[str, str]]] = {}
    for one in report.slices_worst:
        bounds = f"95 % interval {span(one.interval)}; " if one.interval else ""
        figures = f"{percent(one.wer)} ({bounds}{_of(one)})"
        lists.setdefault(f"Worst of {one.system}", []).append((_where(one), figures))
    for apart in report.slices_changed:
        bounds = "95 % interval {} to {}; ".format(*map(points, apart.interval)) if apart.interval else ""
        moved = f"{points(apart.difference)} points, {percent(apart.other_wer)} → {percent(apart.wer)}"
        title = f"Most changed from {apart.other} to {apart.system}"
        lists.setdefault(title, []).append((_where(apart), f"{moved} ({bounds}{_of(apart)})"))
    return list(lists.items())


def _of(one: Slice) -> str:
    return f"{one.words:,} words, {drawn_of(one)}"


def drawn_of(one: Drawn) -> str:
    """What the interval of a slice was drawn of: `5 speakers`."""
    return f"{one.number:,} {one.blocks.removesuffix('s') if one.number == 1 else one.blocks}"


def _where(one: NamedSlice) -> str:
    return f"{one.field} {named(one.value)}"


def named(value: str | None) -> str:
    """The value of a field in a slice."""
    return "(not given)" if value is None else value
