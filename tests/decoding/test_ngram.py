from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import pytest

from asr_kd.decoding.estimate import write_arpa
from asr_kd.decoding.ngram import END, START, UNKNOWN, Ngrams, read_arpa
from asr_kd.errors import UserError

BIGRAMS = """made by hand

\\data\\
ngram 1=4
ngram 2=2

\\1-grams:
-1.0\t<unk>
-99\t<s>\t-0.5
-0.5\t</s>
-0.25\ta\t-0.125

\\2-grams:
-0.75\t<s> a
-0.0625 a </s>

\\end\\
"""


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_backs_off_as_the_format_says(tmp_path: Path) -> None:
    ngrams = read_arpa(written(tmp_path / "lm.arpa", BIGRAMS))
    assert ngrams.order == 2
    assert ngrams.score((START,), "a") == (-0.75, ("a",))
    assert ngrams.score(("a",), END) == (-0.0625, (END,))
    assert ngrams.score(("a",), "a") == (-0.125 - 0.25, ("a",))
    assert ngrams.score((START,), "b") == (-0.5 - 1.0, (UNKNOWN,))
    assert ngrams.score((UNKNOWN,), "a") == (-0.25, ("a",))


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "lm.arpa.gz"
    path.write_bytes(gzip.compress(BIGRAMS.encode()))
    assert read_arpa(str(path)).table == read_arpa(written(tmp_path / "lm.arpa", BIGRAMS)).table
    path.write_bytes(gzip.compress(BIGRAMS.encode())[:60])
    with pytest.raises(UserError, match=r"lm.arpa.gz: .*cannot be read"):
        read_arpa(str(path))
    path.write_bytes(gzip.compress(BIGRAMS.encode())[:20] + bytes(range(255, 55, -1)))
    with pytest.raises(UserError, match=r"lm.arpa.gz: .*cannot be read \(damaged"):
        read_arpa(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"not an ARPA language model"),
        ("one two\n", r"not an ARPA language model"),
        (BIGRAMS[:-7], r"not whole \(no .end."),
        (BIGRAMS.replace("-0.75\t<s> a\n", ""), r"2 2-grams announced, 1 there"),
        (BIGRAMS.replace("-0.75", "a"), r"line 14: not a 2-gram"),
        (BIGRAMS.replace("-0.75", "nan"), r"line 14: nan is no log10 probability"),
        (BIGRAMS.replace("-0.125", "-inf"), r"line 11: -0.25 is no log10 probability, or its backoff is no number"),
        (BIGRAMS.replace("-0.75", "0.75"), r"line 14: 0.75 is no log10 probability"),
        (BIGRAMS.replace("<s> a", "a </s>"), r"line 15: a </s> stands there twice"),
        (BIGRAMS.replace("ngram 2=2", "ngram 3=0").split("\\2-")[0] + "\\end\\\n", r"has 3-grams, but no 2-grams"),
        (BIGRAMS.replace("ngram 1", "ngram " + "9" * 5000), r"1-grams: was not announced"),
        (BIGRAMS.replace("<s> a", "<s> a b c"), r"line 14: not a 2-gram"),
        (BIGRAMS.replace("\\2-", "\\3-"), r"3-grams: was not announced"),
        (BIGRAMS.replace("</s>", "c"), r"has no </s>"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"lm.arpa: .*{message}|lm.arpa: {message}"):
        read_arpa(written(tmp_path / "lm.arpa", text))


def test_not_text_and_not_there(tmp_path: Path) -> None:
    (tmp_path / "lm").write_bytes(b"\\data\\\n\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_arpa(str(tmp_path / "lm"))
    with pytest.raises(UserError, match="cannot be read"):
        read_arpa(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="cannot be read"):
        read_arpa(str(tmp_path))


def total(ngrams: Ngrams, context: tuple[str, ...]) -> float:
    words = [gram[0] for gram in ngrams.table if len(gram) == 1 and gram != (START,)]
    return sum(10 ** ngrams.score(context, word)[0] for word in words)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_estimated_probabilities_sum_to_one(tmp_path: Path, order: int) -> None:
    sentences = ["one two three", "one two", "two two two one", "three", ""]
    write_arpa(tmp_path / "lm.arpa", sentences, order)
    ngrams = read_arpa(str(tmp_path / "lm.arpa"))
    assert ngrams.order == order
    for size in range(order):
        for context in itertools.product((START, "one", "two", "three", UNKNOWN), repeat=size):
            assert total(ngrams, context) == pytest.approx(1.0, abs=1e-5)


def test_what_was_seen_is_more_probable(digits_arpa: str) -> None:
    ngrams = read_arpa(digits_arpa)
    seen, unseen = (ngrams.score((START, "zero"), word)[0] for word in ("two", "nine"))
    assert seen > unseen + 1


def test_details_as_kenlm_reads_them(tmp_path: Path) -> None:
    """The unknown word in capitals, minus infinity, a mark at the head; only ASCII white space parts words."""
    text = (
        BIGRAMS.replace("<unk>", "<UNK>")
        .replace("-99", "-inf")
        .replace(" a", " a\u00a0b")
        .replace("\ta\t", "\ta\u00a0b\t")
    )
    ngrams = read_arpa(written(tmp_path / "lm.arpa", "\ufeff" + text.removeprefix("made by hand\n\n")))
    plain = read_arpa(written(tmp_path / "plain.arpa", BIGRAMS))
    assert ngrams.table == {
        tuple(word.replace("a", "a\u00a0b") if word == "a" else word for word in gram): values
        for gram, values in plain.table.items()
    }
    assert list(ngrams.words) == ["a\u00a0b"] and ngrams.knows("a\u00a0b") and not ngrams.knows("a")
    assert ngrams.score((START,), "a")[0] == -0.5 - 1.0
