from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from asr_kd import cli
from asr_kd.errors import UserError
from asr_kd.evaluation.compare import compare, comparison
from asr_kd.evaluation.earlier import Earlier, read_report
from asr_kd.evaluation.schema import Report as Latest

Report = dict[str, Any]


def report(**wers: float) -> Report:
    systems = {
        name: {"wer": wer, "interval": [wer - 0.01, wer + 0.01], "substitutions": 3, "deletions": 2, "insertions": 1}
        for name, wer in wers.items()
    }
    return {
        "format": "asr_kd-report", "version": 2, "normalizer": "basic-1", "alignment": "sclite",
        "data": {"hash": "12ab", "utterances": 10, "words": 100}, "systems": systems,
    }  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    return {name: written(tmp_path / name, report(**wers)) for name, wers in {
        "old": {"teacher": 0.1, "student": 0.2}, "new": {"student": 0.15, "other": 0.3},
    }.items()}  # fmt: skip


def written(folder: Path, one: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(one))
    return str(folder)


def test_the_table(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--compare", folders["old"], f"{folders['new']}/report.json"]) == 0
    out = capsys.readouterr().out
    assert f"A: {folders['old']}\n" in out
    assert "10 utterances, 100 words (12ab); normaliser basic-1" in out
    (line,) = (line for line in out.splitlines() if line.startswith("| B student"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:7] == ["B student", "15.00 %", "14.00 – 16.00", "−25.0 %", "3", "2", "1"]
    assert cells[7] == "–"  # a figure that the report lacks


@pytest.mark.parametrize(
    ("expression", "status"),
    [
        ("B.student.wer > A.student.wer", 0),
        ("B.student.wer > A.student.wer * 0.7", 1),
        ("other.wer > teacher.wer", 1),
        ("A.teacher.interval.0 < 0.0", 0),
        ("student.wer > 0", 2),  # which?
        ("C.student.wer > 0", 2),
        ("B.student.wer", 2),
    ],
)
def test_a_gate_over_reports(folders: dict[str, str], expression: str, status: int) -> None:
    assert cli.main(["eval", "--compare", *folders.values(), "--fail-if", expression]) == status
    assert cli.main(["eval", "--fail-if", expression, "--compare", *folders.values()]) == status


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "normalizer",
            "none-1",
            r"new: cannot be compared with .*old, because its text normaliser is not the same \(none-1, not",
        ),
        (
            "data",
            {"hash": "ff", "utterances": 10, "words": 100},
            r"because its test data is not the same \(ff, not 12ab\)",
        ),
        (
            "data",
            {"hash": "12ab", "utterances": 9, "words": 100},
            "because its number of scored utterances is not the same",
        ),
        ("version", 4, "new/report.json: is of version 4; this asr-kd reads 1 to 3"),
        ("format", "x", "new/report.json: is no WER report"),
        ("systems", {"a": {}}, "new/report.json: is damaged"),
        ("systems", [], "new/report.json: is damaged"),
        ("data", None, "new/report.json: is damaged"),
    ],
)
def test_what_cannot_be_compared(folders: dict[str, str], key: str, value: Any, message: str) -> None:
    written(Path(folders["new"]), report(student=0.1) | {key: value})
    with pytest.raises(UserError, match=message) as caught:
        compare(list(folders.values()))
    assert "\n" not in str(caught.value)


def test_other_decoders_are_said(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    compare(list(folders.values()))
    assert "Decoded" not in capsys.readouterr().out
    new = report(student=0.15) | {"settings": {"decoder": "beam", "beam": 16, "nbest": 1, "lm": None}}
    compare([folders["old"], written(Path(folders["new"]), new)])
    assert "a difference may come from: A: greedy; B: prefix beam search, beam 16" in capsys.readouterr().out


def test_a_report_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--compare", str(tmp_path / "none")]) == 2
    assert "no such report" in capsys.readouterr().err


def test_reports_of_version_1_and_2(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    old = copy.deepcopy(report(student=0.2)) | {"version": 1}
    del old["alignment"]
    written(Path(folders["old"]), old)
    assert not compare(list(folders.values()))
    assert "aligned words in different ways" in capsys.readouterr().out


def test_a_baseline_without_errors() -> None:
    assert "| B a" in comparison(
        {letter: Earlier.model_validate(report(a=wer)) for letter, wer in (("A", 0.0), ("B", 0.1))}
    )


def test_settings_and_compare_do_not_mix(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "audio=x", "--compare", *folders.values()]) == 2
    assert "--compare" in capsys.readouterr().err


def test_one_report_is_read_whole(folders: dict[str, str]) -> None:
    read, whole = read_report(folders["old"])
    assert list(read.systems) == list(whole["systems"]) == ["teacher", "student"]


#: a report of version 2, as the version before this one wrote it
GOLDEN = Path(__file__).parent / "report-v2"


def test_a_report_of_version_2_beside_one_of_today(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Version 3 is version 2 without the memory of its systems."""
    today = json.loads((GOLDEN / "report.json").read_text()) | {"version": 3}
    for system in today["systems"].values():
        del system["peak_memory_bytes"], system["peak_device_bytes"]
        system["model"]["conditioned"] = []  # a setting that came later
        for one in system["sets"].values():  # figures that came later
            one |= {"change_to_baseline": None, "change_to_baseline_interval": None}
    assert Latest.model_validate(today).model_dump(mode="json") == today
    new = written(tmp_path / "new", today)
    (tmp_path / "new" / "utterances.jsonl").write_bytes((GOLDEN / "utterances.jsonl").read_bytes())
    condition = "B.student.wer > A.student.wer * 1.05 or A.student.peak_memory_bytes == 0"
    assert cli.main(["eval", "--compare", str(GOLDEN), new, "--fail-if", condition]) == 0
    out = capsys.readouterr().out
    assert "11 utterances, 22 words" in out
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in out.splitlines() if "student" in line]
    assert rows[0][:2] == ["100.00 %", "100.00 – 100.00"]
    assert rows[0][3:] == rows[1][3:]
    assert "B against A: paired" in out
    assert "| B student − A student |" in out
