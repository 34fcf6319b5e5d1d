from __future__ import annotations

import copy
import html.parser
import itertools
import math
import re
import xml.etree.ElementTree
from typing import Any

import pytest

from asr_kd.evaluation.charts import Bar, Curve, learning_curves, linear_ticks, log_ticks, wer_bars
from asr_kd.evaluation.report import render_html, render_markdown, verdict

VOID = {"meta", "br", "img", "link", "hr", "input"}
HOSTILE = "<script>alert(1)</script>\"'&|"


def system(errors: int, **changes: Any) -> dict[str, Any]:
    """A made-up system of the report."""
    counts = {"words": 100, "errors": errors, "substitutions": errors, "deletions": 0, "insertions": 0}
    return {
        "wer": errors / 100, "interval": [errors / 120, errors / 80], **counts, "utterances": 20, "sentence_errors": 3,
        "parameters": 1000, "size_bytes": 4000, "frame_ms": 30, "lookahead_ms": 90, "real_time_factor": 0.01,
        "real_time_factor_to_teacher": None, "decoder_real_time_factor": 0.001,
        "relative_change_to_baseline": None, "relative_change_to_baseline_interval": None,
        "relative_change_to_teacher": None, "relative_change_to_teacher_interval": None,
        "gap_recovered": None, "gap_recovered_interval": None, "agreement_with_teacher": None,
        "checkpoint": "runs/x", "fingerprint": "ab", "units_hash": "cd", "units": 9,
        "model": {"kind": "lstm", "layers": 1, "size": 8}, "features": {}, "speakers": {"anna": {"wer": 0.1, **counts}},
        "confusions": {"substitutions": [["one", "two", 3]], "deletions": [], "insertions": [["six", 1]]},
        "worst": [{
            "key": "u1", "speaker": None, **counts,
            "alignment": [["equal", "a", "a"], ["substitution", "b", "c"], ["deletion", "d", None], ["insertion", None, "e"]],
        }],
        "curve": [{"step": 1, "audio_hours": 1.0, "development_wer": 0.5}],
    } | changes  # fmt: skip


def report_of(systems: dict[str, Any], baseline: str | None = None, teacher: str | None = None) -> dict[str, Any]:
    report = {
        "verdict": "", "baseline": baseline, "teacher": teacher, "student": None, "normalizer": "basic-1", "systems": systems,
        "data": {"audio": "test", "hash": "ef", "shards": 1, "utterances": 20, "quarantined": 1, "words": 100,
                 "seconds": 60.0, "speakers": 1},
        "bootstrap": {"resamples": 10, "confidence": 0.95, "blocks": "speakers", "number": 5},
        "settings": {"decoder": "beam", "beam": 4, "threads": 1, "baseline": None},
        "versions": {"python": "3"}, "device": "cpu",
    }  # fmt: skip
    report["verdict"] = verdict(report)
    return report


def distilled(baseline: int, teacher: int, student: int, bounds: list[float] | None = None) -> dict[str, Any]:
    gap = (baseline - student) / (baseline - teacher) if baseline > teacher else None
    moved = {"relative_change_to_baseline": student / baseline - 1 if baseline else None}
    systems = {
        "base": system(baseline),
        "big": system(
            teacher, relative_change_to_baseline=teacher / baseline - 1 if baseline else None, lookahead_ms=None
        ),
        "small": system(student, gap_recovered=gap, relative_change_to_baseline_interval=bounds, **moved),
    }
    return report_of(systems, "base", "big")


class Checker(html.parser.HTMLParser):
    """Collects open tags, and whatever a browser would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), f"{tag} runs {name}"
            if name in ("src", "href", "srcset", "xlink:href", "action", "data"):
                self.loaded.append(str(value))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert checker.loaded == []
    assert not checker.seen & {"script", "iframe", "object", "embed", "link"}
    assert not re.search(r"@import|url\(|https?:", page)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        xml.etree.ElementTree.fromstring(svg)
    return checker


def test_the_page_is_well_formed_and_self_contained() -> None:
    page = render_html(distilled(20, 10, 12, [-0.5, -0.3]))
    assert {"svg", "table", "details"} <= check_page(page).seen
    assert page.count("<svg") == 2
    assert "prefers-color-scheme: dark" in page
    for mark in ('<del class="r">d</del>', '<ins class="h">e</ins>', "substitution: b recognised as c", "one → two"):
        assert mark in page


def test_hostile_text_stays_text() -> None:
    alignment = [["substitution", HOSTILE, HOSTILE], ["deletion", HOSTILE, None], ["insertion", None, HOSTILE]]
    hostile = system(
        9,
        worst=[{"key": HOSTILE, "speaker": HOSTILE, "errors": 3, "words": 2, "alignment": alignment}],
        confusions={
            "substitutions": [[HOSTILE, HOSTILE, 1]],
            "deletions": [[HOSTILE, 1]],
            "insertions": [[HOSTILE, 1]],
        },
        speakers={HOSTILE: {"wer": None, "words": 0}},
        checkpoint=HOSTILE,
    )
    report = report_of({HOSTILE: hostile})
    report["data"]["audio"] = HOSTILE
    page = render_html(report)
    check_page(page)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    row = next(line for line in render_markdown(report).splitlines() if line.startswith("| <script>"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 15


def test_many_systems_without_roles_curves_speakers_or_errors() -> None:
    one = system(0, curve=[], speakers={}, worst=[], interval=None)
    one["confusions"] = {"substitutions": [], "deletions": [], "insertions": []}
    report = report_of({f"system-{index}": copy.deepcopy(one) for index in range(11)})
    report["data"].update(speakers=None, quarantined=0)
    report["bootstrap"]["resamples"] = 0
    page = render_html(report)
    check_page(page)
    assert page.count("<svg") == 1
    assert "Change to" not in page


def test_verdict_on_a_recovered_gap() -> None:
    text = distilled(20, 10, 12, [-0.5, -0.3])["verdict"]
    assert text == (
        "Of the 10.00 points of WER between base (20.00 %) and big (10.00 %), small recovers 80 %. "
        "small (12.00 %) makes 40.0 % fewer word errors than base (95 % interval −50.0 % to −30.0 %)."
    )


def test_the_verdict_is_about_the_named_student() -> None:
    report = distilled(20, 10, 12, [-0.5, -0.3])
    report["systems"]["oracle"] = system(8) | {"gap_recovered": 1.2}
    assert "recovers 120 %" in verdict(report).split(" and ")[1].split(",")[1]
    report["student"] = "small"
    text = verdict(report)
    assert text.index("small recovers") < text.index("oracle recovers")
    assert "small (12.00 %) makes 40.0 % fewer word errors" in text


@pytest.mark.parametrize(
    ("report", "wanted"),
    [
        (distilled(20, 25, 12), "big (25.00 %) is no better than base (20.00 %): there is no gap to recover."),
        (distilled(20, 10, 18, [-0.2, 0.1]), "10.0 % fewer word errors than base, within chance"),
        (distilled(20, 10, 20), "makes as many word errors as base"),
        (distilled(20, 10, 22), "small recovers −20 %. small (22.00 %) makes 10.0 % more word errors than base."),
        (distilled(0, 10, 5), "base makes no errors, so no relative change is defined."),
        (
            report_of({"a": system(5), "b": system(3)}),
            "b has the lowest WER of 2 systems, 3.00 %: 3 errors in 100 words",
        ),
        (report_of({"a": system(5)}, "a"), "a has a WER of 5.00 %"),
        (report_of({"a": system(5)}, "a", "a"), "a has a WER of 5.00 %"),
    ],
)
def test_verdict_is_careful(report: dict[str, Any], wanted: str) -> None:
    assert wanted in report["verdict"]
    check_page(render_html(report))


@pytest.mark.parametrize("high", [0.0, 0.013, 1.0, 7.3, 25.0, 99.9, 101.0, 4321.0])
def test_linear_ticks_reach_the_data(high: float) -> None:
    ticks = linear_ticks(high)
    assert ticks[0] == 0
    assert ticks[-1] >= high * (1 - 1e-9)
    assert 2 <= len(ticks) <= 8
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1


@pytest.mark.parametrize(("low", "high"), [(0.3, 100), (5, 5), (4.9, 51), (1, 1000), (0.001, 0.02)])
def test_log_ticks_enclose_the_data(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert ticks[0] <= low * 1.01
    assert ticks[-1] >= high * 0.99


def numbers(svg: str) -> list[float]:
    return [float(value) for value in re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|width)="([^"]+)"', svg)]


@pytest.mark.parametrize("wers", [[0.0], [0.0, 0.0], [1.2, 0.0, 0.05], [0.2, 0.19]])
@pytest.mark.parametrize("hours", [0.0, 3.0])
def test_pictures_hold_any_figures(wers: list[float], hours: float) -> None:
    curve = Curve("a", "s0", [hours * index for index in range(len(wers))], wers)
    for svg in (str(learning_curves([curve])), str(wer_bars([Bar("a" * 99, "s0", wers[0], None)]))):
        xml.etree.ElementTree.fromstring(svg)
        assert all(math.isfinite(value) and 0 <= value <= 600 for value in numbers(svg))
