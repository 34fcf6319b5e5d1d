from __future__ import annotations

import sys

import pytest

from asr_kd import progress
from asr_kd.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since some time, which the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("label", 1000, "utterances") as shown:
        for _ in range(40):
            clock[0] += 1
            shown.advance(20, 72.0)
    assert capsys.readouterr().err.splitlines() == [
        "label: 300 of 1,000 utterances, 72 audio hours/hour, 35 s left",
        "label: 600 of 1,000 utterances, 72 audio hours/hour, 20 s left",
        "label: 800 of 1,000 utterances, 72 audio hours/hour, 10 s left",
    ]


def test_what_an_earlier_run_did_says_nothing_of_the_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Progress("eval", 1000, "utterances")
    shown.resume(900)
    clock[0] += 20
    shown.advance(0)
    clock[0] += 20
    shown.advance(10, 40.0)
    assert capsys.readouterr().err.splitlines() == [
        "eval: 900 of 1,000 utterances, 20.0 s",
        "eval: 910 of 1,000 utterances, 1 audio hours/hour, 360 s left",
    ]


def test_so_does_the_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = Progress("eval", 1000, "utterances")
    shown.resume(900)
    assert shown._bar is not None
    known = shown._bar.format_dict | {"elapsed": 20.0}
    assert (known["n"], known["initial"]) == (900, 900)
    assert "900/1000" in capsys.readouterr().err


def test_nothing_is_shown_where_another_process_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", None, "s of audio", show=False) as shown:
        shown.advance(5)
    assert capsys.readouterr().err == ""
