from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import asr_kd
from asr_kd.evaluation.settings import EvalSettings

PAIRS = [("Seven four nine.", "seven for nine"), ("don't", "dont stop it"), ("one two", ""), ("", "uh")]


def test_edits_are_counted_after_the_normaliser() -> None:
    found = asr_kd.word_errors(PAIRS)
    assert (found.substitutions, found.deletions, found.insertions) == (1, 2, 3)
    assert (found.words, found.errors, found.utterances, found.wer) == (6, 6, 4, 1.0)
    assert found.normalizer.startswith("basic-")
    plain = asr_kd.word_errors(iter(PAIRS), normalizer="none")
    assert (plain.substitutions, plain.deletions, plain.insertions) == (4, 2, 3)
    assert asr_kd.word_errors([("twenty one", "21")], normalizer="english").wer == 0
    assert repr(found).startswith(
        "WordErrors(100.00 %: 6 errors in 6 words, 1 substituted, 2 deleted, 3 inserted; 4 utterances, basic-"
    )
    assert math.isinf(asr_kd.word_errors([("", "a")]).wer)


def test_a_report_has_the_same_figures(here: Path, tmp_path: Path) -> None:
    from asr_kd.evaluation.job import evaluate

    settings = {"systems": {"a": "student"}, "audio": "shards", "output": str(tmp_path / "report"), "max_bad_share": 0.5, "device": "cpu"}  # fmt: skip
    figures = evaluate(EvalSettings.model_validate({**settings, "bootstrap": 0})).systems["a"]
    lines = map(json.loads, (tmp_path / "report" / "utterances.jsonl").read_text().splitlines())
    found = asr_kd.word_errors((line["reference"], line["hypothesis"]) for line in lines)
    for name in ("words", "errors", "substitutions", "deletions", "insertions", "wer"):
        assert getattr(found, name) == getattr(figures, name)
    assert found.utterances == 3 and found.errors > 0


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (("one two", "one to"), r"pairs: item 0 is 'one two', no pair of two texts"),
        ([], "pairs: hold no words; nothing to count"),
        ([("", ""), ("!", ".")], "pairs: hold no words; nothing to count"),
        ([("a", "b"), ("a", None)], r"pairs: item 1 is \('a', None\), no pair"),
    ],
)
def test_what_cannot_be_counted_is_refused(pairs: object, words: str) -> None:
    with pytest.raises(asr_kd.UserError, match=f"^{words}"):
        asr_kd.word_errors(pairs)  # type: ignore[arg-type]
    with pytest.raises(asr_kd.UserError, match=r"^normalizer: 'Basic' is unknown; use none, basic, english"):
        asr_kd.word_errors([], normalizer="Basic")  # type: ignore[arg-type]
