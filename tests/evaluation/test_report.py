from __future__ import annotations

import base64
import hashlib
import html.parser
import re
import shlex
import xml.etree.ElementTree
from typing import Any

from asr_kd.config.load import build, override
from asr_kd.evaluation.charts import Heat
from asr_kd.evaluation.page import command, drawn, leading, render_html
from asr_kd.evaluation.report import render_markdown
from asr_kd.evaluation.samples import Clip, Evidence
from asr_kd.evaluation.schema import Report
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.utterances import Packed, pack
from tests.evaluation.made import changed, distilled, line, report_of, system

VOID = {"meta", "br", "img", "link", "hr", "input"}
HOSTILE = "<script>alert(1)</script>\"'&|"


def packed_of(report: Report, lines: list[dict[str, Any]] | None = None) -> Packed:
    lines = lines or [
        line(name, key, "one two three", said)
        for name in report.systems
        for key, said in (("u1", "one four three four"), ("u2", "one three"), ("u3", "one two three"))
    ]
    wanted = {one.identity for one in report.samples}
    return pack(lambda: lines, list(report.systems), ["condition"], wanted, report.data.utterances)


EVIDENCE = Evidence(
    {("test", "u1", "shard-000000.tar"): Clip(2.0, "TVAz")},
    ("test", "u1", "shard-000000.tar"),
    [Heat("Spectrogram", "iVBORw0KGgo=", ["high", "low"], 2.0)],
)


def page_of(report: Report, lines: list[dict[str, Any]] | None = None) -> str:
    return "".join(render_html(report, packed_of(report, lines), EVIDENCE))


class Checker(html.parser.HTMLParser):
    """Collects open tags, and whatever a browser would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.named: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attributes)
        assert len(values) == len(attributes), f"{tag} has an attribute twice"
        for name, value in values.items():
            assert not name.startswith("on"), f"{tag} runs {name}"
            if name in ("src", "href", "srcset", "xlink:href", "action", "data", "poster"):
                self.loaded.append(str(value))
            if name == "id":
                self.ids.append(str(value))
            if name in ("aria-labelledby", "for"):
                self.named.append(str(value))
        if tag == "script":
            self.scripts.append(values)
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(values["content"])
        if tag in ("section", "svg", "article", "audio", "form", "nav"):
            assert values.get("aria-label") or values.get("aria-labelledby"), f"{tag} has no name"

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(page: str) -> Checker:
    assert page.startswith("<!DOCTYPE html>")
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    # nothing but what the page carries, and places in itself
    for target in checker.loaded:
        assert target.startswith(("data:image/png;base64,", "data:audio/mpeg;base64,")) or target[1:] in checker.ids
    assert not {"iframe", "object", "embed", "link", "base"} & set(checker.seen)
    assert not re.search(r"@import|url\(|https?:", page)
    assert len(set(checker.ids)) == len(checker.ids)
    assert set(checker.named) <= set(checker.ids)
    # one script, the one that the policy lets run
    assert [one.get("type") for one in checker.scripts] == ["application/gzip", "application/json", None]
    script = page.rsplit("<script>", 1)[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in checker.policy
    assert f"script-src 'sha256-{digest}'" in checker.policy
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        xml.etree.ElementTree.fromstring(svg)
    return checker


def test_the_page_is_well_formed_and_self_contained() -> None:
    page = page_of(distilled(20, 10, 12, (-0.5, -0.3)))
    seen = check_page(page).seen
    assert {
        "header",
        "nav",
        "main",
        "footer",
        "h1",
        "figure",
        "table",
        "caption",
        "details",
        "audio",
        "noscript",
    } <= set(seen)
    assert seen.count("h1") == seen.count("main") == 1
    assert page.count("<svg") == 6  # systems, two slices, learning curves, posteriors, calibration
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    for mark in (
        "<del>d</del>",
        "<ins>e</ins>",
        "one → two",
        "<b>condition noisy</b>: 30.00 % (50 words, 2 speakers)",
        "big is better",
        "most errors",
        "<b>condition (not given)</b>: +20.00 points, 10.00 % → 30.00 %",
        "id (more than 2,000 values)",
        "<small>1 utterance</small>",
    ):
        assert mark in page, mark


def row_of(markdown: str, name: str) -> list[str]:
    (row,) = (line for line in markdown.splitlines() if line.startswith(f"| {name} "))
    return row.split("|")[1:-1]


def test_rates_that_are_not_defined_are_dashes() -> None:
    """As in a set without reference words in which a system says something."""
    report = distilled(20, 10, 12)
    report = changed(report, sets__hollow=report.data.model_dump() | {"words": 0})
    for name, one in report.systems.items():
        hollow = one.sets["test"].model_dump() | {"wer": None}
        report = changed(
            report, **{f"systems__{name}__sets__hollow": hollow, f"systems__{name}__mean_of_sets_wer": None}
        )
    page = page_of(report)
    check_page(page)
    assert [cell.strip() for cell in row_of(render_markdown(report).split("by set")[1], "base")] == [
        "base",
        "20.00 %",
        "–",
        "–",
    ]
    assert page.count("<td>–</td>\n<td>20.00 %</td>\n<td>–</td>") == 1


def test_change_on_each_set_where_there_is_something_to_change_from() -> None:
    report = distilled(20, 10, 12)
    assert "Change on each set" not in render_markdown(report) + page_of(report)
    report = changed(report, sets__old=report.data.model_dump())
    for name, one in report.systems.items():
        moved = {"change_to_baseline": 0.025, "change_to_baseline_interval": (0.01, 0.04)} if name == "small" else {}
        report = changed(report, **{f"systems__{name}__sets__old": one.sets["test"].model_dump() | moved})
    page, markdown = page_of(report), render_markdown(report).split("Change on each set against base")[1]
    check_page(page)
    assert [cell.strip() for cell in row_of(markdown, "small")] == ["small", "–", "+2.50 (+1.00 to +4.00)"]
    assert "<td>+2.50<small>+1.00 to +4.00</small></td>" in page and "| base " not in markdown.split("\n\n")[1]
    assert "Change on each set" not in page_of(changed(report, baseline=None))


def test_wer_against_hours_needs_two_systems_that_say_theirs() -> None:
    report = distilled(20, 10, 12)
    report = changed(report, systems__base__unlabelled_hours=0.0)
    assert "WER against unlabelled audio" not in page_of(report)
    page = page_of(changed(report, systems__small__unlabelled_hours=1200.0))
    check_page(page)
    assert "small: 1200 h" in page


def in_conditions(report: Report, *conditions: str | None) -> Report:
    """The same report with slices of these conditions."""
    slices = report.model_dump()["slices"]
    slices[0]["values"] = [slices[0]["values"][0] | {"value": condition} for condition in conditions]
    return changed(report, slices=slices)


def test_wer_against_noise_where_conditions_name_its_ratio() -> None:
    report = distilled(20, 10, 12)
    heard = in_conditions(report, "clean", "babble 0 dB", "babble 10 dB", "car_-5.5dB", "car-20-dB", "wind 10 dB", None)
    page = page_of(heard)
    check_page(page)
    assert [noise for noise in ("babble", "car", "wind") if f"WER against {noise} noise" in page] == ["babble", "car"]
    assert "small: clean 12.00 %, 10 dB 12.00 %, 0 dB 12.00 %" in page and "-5.5 dB 12.00 %" in page
    unlike = page_of(in_conditions(report, "clean", "office", "10 dB", "babble 10 dB louder"))
    assert "Slices" in unlike and "against babble" not in unlike and "signal-to-noise" not in unlike


def test_hostile_text_stays_text() -> None:
    alignment = [("substitution", HOSTILE, HOSTILE), ("deletion", HOSTILE, None), ("insertion", None, HOSTILE)]
    one = system(9)
    worst = one.worst[0].model_dump() | {"key": HOSTILE, "speaker": HOSTILE, "alignment": alignment}
    hostile = system(
        9,
        worst=[worst],
        confusions={
            "substitutions": [(HOSTILE, HOSTILE, 1)],
            "deletions": [(HOSTILE, 1)],
            "insertions": [(HOSTILE, 1)],
        },
        checkpoint=HOSTILE,
        sets={HOSTILE: one.sets["test"]},
    )
    report = report_of({HOSTILE: hostile})
    slices = report.model_dump()["slices"]
    for value in slices[0]["values"]:
        value["value"] = HOSTILE
    report = changed(
        report, sets={HOSTILE: report.data.model_dump() | {"audio": HOSTILE}}, slices=slices, settings__audio=HOSTILE,
        samples=[{"key": HOSTILE, "set": HOSTILE, "shard": HOSTILE, "why": HOSTILE}],
    )  # fmt: skip
    lines = [
        line(
            HOSTILE,
            HOSTILE,
            HOSTILE,
            f"{HOSTILE} 語\u2028",
            set=HOSTILE,
            speaker=HOSTILE,
            fields={"condition": HOSTILE},
        )
    ]
    evidence = Evidence(
        {(HOSTILE, HOSTILE): Clip(1.0, problem=HOSTILE)}, (HOSTILE, HOSTILE), [Heat(HOSTILE, "AA", [HOSTILE], 1.0)]
    )
    page = "".join(render_html(report, packed_of(report, lines), evidence))
    check_page(page)
    assert "alert(1)</script>" not in page
    assert "&lt;script&gt;" in page
    markdown = render_markdown(report)
    assert not re.search(r"(?<!\\)<", re.sub("`.*`", "", markdown))
    row = next(line for line in markdown.splitlines() if line.startswith("| \\<script"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 15


def test_many_systems_without_roles_curves_slices_or_errors() -> None:
    nothing: dict[str, list[Any]] = {"substitutions": [], "deletions": [], "insertions": []}
    one = system(0, curve=[], worst=[], interval=None, calibration=None, word_delay_ms=None, confusions=nothing)
    report = changed(
        report_of({f"system-{index}": one for index in range(11)}), data__speakers=None, data__quarantined=0, slices=[],
        slices_worst=[], samples=[], bootstrap__resamples=0,
    )  # fmt: skip
    page = "".join(render_html(report, packed_of(report), Evidence()))
    check_page(page)
    assert page.count("<svg") == 1
    assert "Change to" not in page
    assert "Against system-0, no difference: system-1 (0.00 %), " in page.replace("\u00a0", " ")
    assert len(leading(report)) < 11
    assert "<summary>All 55 pairs</summary>" in page
    assert page.count('<table class="pairs">') == 2
    assert len(drawn(report)) == 1


def test_the_page_says_where_audio_is_missing() -> None:
    report = distilled(20, 10, 12)
    evidence = Evidence({("test", "u1", "shard-000000.tar"): Clip(0.0, problem="cannot be played: gone")})
    page = "".join(render_html(report, packed_of(report), evidence))
    assert "Audio cannot be played: gone" in page
    assert "<audio" not in page


def test_the_command_makes_the_report_again() -> None:
    settings = EvalSettings(systems={"a b": "runs/it's"}, audio="test", output="out", bootstrap=10)
    text = command(settings)
    words = shlex.split(text)
    assert words[:2] == ["asr-kd", "eval"]
    assert build(EvalSettings, override({}, words[2:]), "command") == settings
    assert "batch_frames" not in text


def test_one_system_has_nothing_to_be_compared_with() -> None:
    report = report_of({"a": system(5)}, "a")
    page = page_of(report)
    check_page(page)
    assert "a has a WER of 5.00" in page
    assert 'id="pairs"' not in page
    assert '<p class="below">' not in page
