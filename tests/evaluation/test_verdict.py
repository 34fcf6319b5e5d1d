from __future__ import annotations

import pytest

from asr_kd.evaluation.schema import Report
from asr_kd.evaluation.verdict import below_it, student, verdict
from tests.evaluation.made import changed, distilled, report_of, system


def test_one_sentence_on_baseline_and_teacher() -> None:
    report = distilled(20, 10, 12, (-0.5, -0.3))
    assert report.verdict == (
        "small (12.00 % WER) makes 40.0 % fewer word errors than the baseline base (20.00 %; 95 % interval 30.0 to "
        "50.0 % fewer, significant), and 20.0 % more word errors than the teacher big (10.00 %, significant)."
    )
    assert below_it(report) == ["small recovers 80 % of the 10.00 points of WER from base to big (significant)."]


def test_more_systems_do_not_make_it_longer() -> None:
    few, report = distilled(20, 10, 12), distilled(20, 10, 12, oracle=8, half=14, twin=12)
    report = changed(report, student="small")
    assert verdict(report) == few.verdict
    assert below_it(report)[1] == (
        "Against small, significantly better: oracle (8.00 %); no difference: twin (12.00 %); significantly worse: half (14.00 %)."
    )


def test_it_is_about_the_named_student_or_else_the_best() -> None:
    report = distilled(20, 10, 12, oracle=8)
    assert student(report) == "oracle"
    report = changed(report, student="small")
    assert student(report) == "small"
    assert student(report_of({"a": system(5), "b": system(3)}, "a", "b")) == "b"


def alone(name: str | None) -> Report:
    return changed(report_of({"a": system(5), "b": system(3)}), student=name)


@pytest.mark.parametrize(
    ("report", "wanted"),
    [
        (distilled(20, 10, 18, (-0.2, 0.1), 0.3), "base (20.00 %; 95 % interval −20.0 % to +10.0 %, within chance), and"),
        (distilled(20, 10, 26, (0.1, 0.5)), "base (20.00 %; 95 % interval 10.0 to 50.0 % more, significant), and"),
        (distilled(20, 10, 18, (-0.2, 0.0), 0.3), "base (20.00 %; 95 % interval −20.0 % to 0.0 %, within chance), and"),
        (distilled(20, 10, 18, p=0.045), "base (20.00 %, the tests disagree), and"),
        (distilled(20, 10, 20), "makes as many word errors as the baseline base (20.00 %, no difference), and 100.0 % more"),
        (distilled(0, 10, 5), "makes 5 word errors where the baseline base makes none (0.00 %, significant), and 50.0 % fewer"),
        (report_of({"a": system(5, relative_change_to_teacher=1.5), "teacher": system(2)}, None, "teacher"), "150.0 % more word errors than the teacher (2"),
        (report_of({"a": system(5, relative_change_to_baseline=2 / 3), "b": system(3)}, "b"), "than the baseline b (3.00 %, significant)."),
        (report_of({"a": system(5)}, "a"), "a has a WER of 5.00 % (5 errors in 100 words; 95 % interval 4.17 % to 6.25 %)."),
        (report_of({"a": system(5)}, "a", "a"), "a has a WER of 5.00 % ("),
        (alone(None), "b has the lowest WER of 2 systems, 3.00 % (3 errors in 100 words; "),
        (alone("a"), "a has a WER of 5.00 % (5 errors in 100 words; 95 % interval 4.17 % to 6.25 %), where b, the best of 2"),
    ],
)  # fmt: skip
def test_it_is_careful(report: Report, wanted: str) -> None:
    assert wanted in verdict(report)
    assert verdict(report).count(". ") == 0


def test_a_teacher_that_is_no_better_leaves_no_gap() -> None:
    (said,) = below_it(distilled(20, 25, 12))
    assert (
        said == "The teacher big (25.00 %) is no better than the baseline base (20.00 %): there is no gap to recover."
    )


def test_a_set_in_which_the_student_is_worse_is_named() -> None:
    report = distilled(20, 10, 12)
    report = changed(report, sets=dict.fromkeys(("car", "home"), report.data.model_dump()))
    for name, wers in (("base", (0.1, 0.3)), ("big", (0.08, 0.12)), ("small", (0.11, None))):
        one = report.systems[name].sets["test"].model_dump()
        sets = {place: one | {"wer": wer} for place, wer in zip(("car", "home"), wers, strict=True)}
        report = changed(report, **{f"systems__{name}__sets": sets})
    assert verdict(report).startswith("small (12.00 % WER over 2 sets) makes 40.0 % fewer")
    assert below_it(report)[1:] == ["Yet small is worse than the baseline in car (11.00 % against 10.00 %)."]


def test_without_roles_the_others_stand_below() -> None:
    assert below_it(alone(None)) == ["Against b, significantly worse: a (5.00 %)."]


START = {"folder": "runs/base", "wer": 0.392, "loss": 0.32, "won": False}
LOST = "no checkpoint was better than runs/base, where it started (development WER 39.2 %, loss 0.32)"


def test_a_student_that_is_the_baseline_is_called_so() -> None:
    report = distilled(20, 10, 20)
    report = changed(report, systems__small__fingerprint=report.systems["base"].fingerprint)
    assert below_it(report)[0] == "small is the baseline base, with the same weights to the bit."
    report = changed(report, systems__small__started_from=START)
    assert below_it(report)[0] == f"small is the baseline base, with the same weights to the bit: {LOST}."
    report = changed(report, systems__big__fingerprint=report.systems["base"].fingerprint)
    assert len([said for said in below_it(report) if "to the bit" in said]) == 1


def test_systems_whose_training_won_nothing_are_named_the_student_first() -> None:
    report = distilled(20, 10, 20, rival=20, oracle=5)
    report = changed(report, student="small")
    for name, won in (("base", False), ("small", False), ("oracle", True)):
        report = changed(report, **{f"systems__{name}__started_from": {**START, "won": won}})
    said = below_it(report)
    assert said[:2] == [f"small's training won nothing: {LOST}.", f"base's training won nothing: {LOST}."]
    assert not any("won nothing" in one for one in said[2:])
