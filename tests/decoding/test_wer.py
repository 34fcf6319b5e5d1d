from __future__ import annotations

import pytest

from asr_kd.decoding.wer import word_errors


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors"),
    [("a b c", "a b c", 0), ("a b c", "a x", 2), ("a", "b a  c", 2), ("", "a b", 2), ("a b", "", 2), ("", "", 0)],
)
def test_fewest_edits(reference: str, hypothesis: str, errors: int) -> None:
    assert sum(word_errors(reference, hypothesis)) == errors
