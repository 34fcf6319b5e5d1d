"""Reports side by side, utterance by utterance; what a report of both systems says is the reference."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asr_kd import cli
from asr_kd.evaluation.earlier import Earlier
from asr_kd.evaluation.paired import Side, counterparts, paired
from asr_kd.evaluation.significance import MatchedPairs, interval, marks, segments, two_sided
from asr_kd.evaluation.wer import align
from tests.evaluation.made import line

SAID = "one two three four five six"
Line = dict[str, Any]


def lines_of(system: str, wrong: int, utterances: int = 60, **changes: Any) -> list[Line]:
    """Utterances of six speakers, of which one in `wrong` has its second word wrong, and the last word is lost in some."""
    made = []
    for index in range(utterances):
        heard = SAID.replace("two", "too") if index % wrong == 0 else SAID
        heard = heard.removesuffix(" six") if index % 7 == 0 else heard
        made.append(line(system, f"u{index}", SAID, heard, speaker=f"s{index % 6}", **changes))
    return made


def side(folder: Path, letter: str, lines: list[Line], student: str | None = None, resamples: int = 200) -> Side:
    """A folder with a report of these lines."""
    folder.mkdir()
    systems: dict[str, Any] = {}
    for one in lines:
        system = systems.setdefault(one["system"], {"errors": 0, "words": 0, "interval": None})
        system["errors"] += one["errors"]
        system["words"] += one["words"]
        system["wer"] = system["errors"] / system["words"]
    report = {
        "format": "asr_kd-report", "version": 2, "normalizer": "basic-1", "student": student, "systems": systems,
        "data": {"hash": "12ab", "utterances": len(lines), "words": 6 * len(lines)},
        "settings": {"seed": 3, "bootstrap": resamples},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "utterances.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return Side(letter, Earlier.model_validate(report), folder / "utterances.jsonl")


def test_the_tests_of_both_sides_lines(tmp_path: Path) -> None:
    before, after = lines_of("student", 3), lines_of("student", 5)
    found = paired(side(tmp_path / "a", "A", before), side(tmp_path / "b", "B", after))
    assert not isinstance(found, str)
    ((pair,), basis) = found
    tested = MatchedPairs()
    for mine, theirs in zip(after, before, strict=True):
        tested.add(segments(*(marks(align(SAID, one["hypothesis_scored"])) for one in (mine, theirs))))
    errors = np.array([[one["errors"] for one in lines] for lines in (after, before)])
    by_speaker = errors.reshape(2, -1, 6).sum(1)
    rng = np.random.default_rng(3)
    drawn = np.array([by_speaker[:, rng.integers(0, 6, 6)].sum(1) for _ in range(200)]) / 360
    differences = drawn[:, 0] - drawn[:, 1]
    assert (pair.a, pair.b, pair.mapsswe) == ("B student", "A student", tested.test())
    assert pair.difference == pytest.approx((errors[0] - errors[1]).sum() / 360)
    assert pair.interval == pytest.approx(interval(differences))
    assert pair.p_bootstrap == two_sided(differences)
    assert basis == "200 resamples of 6 speakers"


def earlier(student: str | None, *systems: str) -> Earlier:
    figures = {"wer": 0.1, "interval": None}
    return Earlier.model_validate({
        "format": "asr_kd-report", "normalizer": "basic-2", "student": student, "systems": dict.fromkeys(systems, figures),
        "data": {"hash": "12ab", "utterances": 1, "words": 1},
    })  # fmt: skip


def test_counterparts_have_one_name_or_are_the_students() -> None:
    first, second = earlier("old", "teacher", "old"), earlier("new", "new", "teacher", "other")
    assert counterparts(first, second) == [("teacher", "teacher"), ("new", "old")]
    assert counterparts(first, first) == [("teacher", "teacher"), ("old", "old")]
    assert counterparts(first, earlier(None, "x")) == []


def broken(lines: list[Line], how: str) -> list[Line]:
    if how == "fewer":
        return lines[:-1]
    if how == "another order":
        return lines[::-1]
    if how == "other texts":
        return [one | {"reference_scored": "a"} for one in lines]
    return [{key: value for key, value in one.items() if key != "words"} for one in lines]


@pytest.mark.parametrize("how", ["fewer", "another order", "other texts", "damaged"])
def test_lines_that_cannot_be_paired(tmp_path: Path, how: str) -> None:
    first, second = (side(tmp_path / name, name, lines_of("student", 3)) for name in "AB")
    Path(str(second.lines)).write_text("".join(json.dumps(one) + "\n" for one in broken(lines_of("student", 3), how)))
    said = paired(first, second)
    assert isinstance(said, str)
    assert "utterances" in said


def test_lines_of_another_run_are_not_taken_for_the_reports(tmp_path: Path) -> None:
    first, second = (side(tmp_path / name, name, lines_of("student", 3)) for name in "AB")
    Path(str(second.lines)).write_text("".join(json.dumps(one) + "\n" for one in lines_of("student", 4)))
    assert paired(first, second) == f"{second.lines} is not of the same run as the report beside it"


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """A hundred utterances a shard; what is held of each is five numbers, and what is drawn."""
    peaks = []
    for shards in (2, 20):
        lines = []
        for shard in range(shards):
            lines += lines_of("x", 3, 100, shard=f"shard-{shard:06}.tar", padding=SAID * 50)
        sides = [side(tmp_path / f"{name}{shards}", name, lines) for name in "AB"]
        del lines
        tracemalloc.start()
        assert not isinstance(paired(*sides), str)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1800 * 100


def test_without_resamples_mapsswe_is_left(tmp_path: Path) -> None:
    found = paired(*(side(tmp_path / name, name, lines_of("x", 3), resamples=0) for name in "AB"))
    assert not isinstance(found, str)
    ((pair,), _) = found
    assert (pair.interval, pair.p_bootstrap, pair.mapsswe.p) == (None, None, 1.0)


def test_the_command_says_which_test_it_used_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, wrong in (("a", 1), ("b", 5), ("c", 2)):
        side(tmp_path / name, name, lines_of("student", wrong))
    (tmp_path / "c" / "utterances.jsonl").unlink()
    assert cli.main(["eval", "--compare", *(str(tmp_path / name) for name in "abc")]) == 0
    out = capsys.readouterr().out
    assert "B against A: paired, for both reports' utterances.jsonl hold the same utterances" in out
    assert "| B student − A student |" in out
    assert "| B student is better |" in out
    assert f"C against A: unpaired, for {tmp_path / 'c' / 'utterances.jsonl'} is not there." in out
