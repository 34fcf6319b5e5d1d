"""`asr_kd.word_errors`: word errors of texts, counted as `asr-kd eval` counts them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from asr_kd.config.knobs import Normalizing
from asr_kd.errors import UserError
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.wer import ErrorCounts, count_errors
from asr_kd.text import NORMALIZERS

DEFAULT: Normalizing = EvalSettings.model_fields["normalizer"].default


@dataclass(frozen=True, repr=False)
class WordErrors(ErrorCounts):
    """Word errors of some texts: the edits that turn what was said into what was recognised.

    Attributes:
        words: of what was said.
        utterances: number of texts.
        normalizer: name and version of what both sides went through first; without it a word error rate means nothing.
    """

    utterances: int = 0
    normalizer: str = ""

    @property
    def wer(self) -> float:
        """Word error rate, 0.03 for 3 %; infinity where words were recognised and none was said."""
        return self.rate

    def __repr__(self) -> str:
        kinds = f"{self.substitutions} substituted, {self.deletions} deleted, {self.insertions} inserted"
        return (
            f"WordErrors({100 * self.wer:.2f} %: {self.errors:,} errors in {self.words:,} words, {kinds}; {self.utterances:,} utterances, "
            f"{self.normalizer})"
        )


def word_errors(pairs: Iterable[tuple[str, str]], normalizer: Normalizing = DEFAULT) -> WordErrors:
    """Word errors of pairs of a text that was said and one that was recognised, aligned as NIST sclite does.

    >>> asr_kd.word_errors([("seven four nine", "seven for nine"), ("two", "two two")])
    WordErrors(50.00 %: 2 errors in 4 words, 1 substituted, 0 deleted, 1 inserted; 2 utterances, basic-2)
    >>> asr_kd.word_errors([("Don't stop!", "don't stop")], normalizer="none").wer
    1.0

    Args:
        pairs: of an utterance each.
        normalizer: that both sides go through: `basic` (small letters, no punctuation, the default of `eval`), `english` (Whisper's), or
            `none` (folded alone, see `text.py`).

    Raises:
        UserError: when something is no pair of texts, the pairs hold no words, or there is no such normaliser.
    """
    if normalizer not in NORMALIZERS:
        raise UserError(f"normalizer: {normalizer!r} is unknown; use {', '.join(NORMALIZERS)}")
    apply = NORMALIZERS[normalizer].apply
    counts, utterances = ErrorCounts(), 0
    for pair in pairs:
        match pair:
            case (str(said), str(recognised)):
                counts += count_errors(apply(said), apply(recognised))
            case _:
                raise UserError(
                    f"pairs: item {utterances} is {pair!r}, no pair of two texts (what was said, what was recognised)"
                )
        utterances += 1
    if not counts.words and not counts.errors:  # else a loop that gave nothing would be a perfect score
        raise UserError("pairs: hold no words; nothing to count")
    edits = counts.substitutions, counts.deletions, counts.insertions
    return WordErrors(counts.words, *edits, utterances, NORMALIZERS[normalizer].name)
