"""Which words a beam search may find, and their scores by a language model, applied where a word ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from asr_kd.decoding.kenlm import KenLm
from asr_kd.decoding.ngram import PARTS, SPACES, Ngrams
from asr_kd.errors import UserError
from asr_kd.files import read_text
from asr_kd.units import Units


@dataclass
class Lexicon:
    """Words by the unit ids of their spellings, and all prefixes of spellings."""

    words: dict[tuple[int, ...], str]
    beginnings: set[tuple[int, ...]]


def read_lexicon(name: str, units: Units) -> Lexicon:
    """Read a lexicon: a spelling a line, a word followed by its pieces; without pieces the units spell it.

    A UserError when the file cannot be read, a word cannot be spelled, or two words are spelled alike.
    """
    ids = {units.piece(unit): unit for unit in range(units.size) if unit not in (units.blank, units.unknown)}
    words: dict[tuple[int, ...], str] = {}
    for number, line in enumerate(read_text(name, "lexicon").removeprefix("\ufeff").splitlines(), 1):
        if not line.strip():
            continue
        word, *pieces = PARTS.split(line.strip(SPACES))
        where = f"{name}: line {number}: {word}"
        spelling = [ids.get(piece, units.unknown) for piece in pieces] if pieces else units.encode(word)
        if units.unknown in spelling:
            what = (
                f"{pieces[spelling.index(units.unknown)]} is not one of the units"
                if pieces
                else f"no unit covers {units.unwritable(word)[0]!r}"
            )
            raise UserError(
                f"{where}: cannot be spelled ({what}); leave the word out, or give pieces that the units have"
            )
        if [units.starts_word(unit) for unit in spelling] != [True] + [False] * (len(spelling) - 1):
            raise UserError(f"{where}: its first piece, and no other, must begin with ▁; fix the spelling")
        if (other := words.setdefault(tuple(spelling), word)) != word:
            raise UserError(f"{where}: spelled like {other}; no decoder can tell them apart, keep one of them")
    if not words:
        raise UserError(f"{name}: holds no words; give a lexicon with a word a line")
    return Lexicon(words, {spelling[:end] for spelling in words for end in range(1, len(spelling) + 1)})


LanguageModel = Ngrams | KenLm


def learn_spellings(lm: Ngrams, units: Units, lexicon: Lexicon | None) -> None:
    """Let a language model recognise words that the units, or the lexicon, spell differently: don’t and don't."""
    for word in lm.words:
        if (written := units.written(word)) != word:
            lm.spellings.setdefault(written, word)
    for word in lexicon.words.values() if lexicon else ():
        if not lm.knows(word) and lm.knows(written := units.written(word)):
            lm.spellings[word] = lm.spellings.get(written, written)


def compare_words(name: str, lm: LanguageModel, units: Units, lexicon: Lexicon | None) -> str:
    """Compare the words of a language model with what a decoder can find.

    Args:
        name: of the language model, for messages.
        lm: the language model.
        units: vocabulary of the decoder.
        lexicon: the words that a decoder may find; None: all that the units can spell.

    Returns:
        a sentence that counts what does not fit; empty if everything does.

    Raises:
        UserError: when nothing fits, naming some of the words.
    """
    if lexicon:
        words = list(dict.fromkeys(lexicon.words.values()))
        odd = [word for word in words if not lm.knows(word)]
        if len(odd) == len(words):
            raise UserError(
                f"{name}: knows none of the {len(words):,} words of the lexicon (such as {_some(odd)}); give a language model of the "
                "same language and spelling"
            )
        what, then = f"does not know {len(odd):,} of the {len(words):,} words of the lexicon", "they count as unknown"
    else:
        assert isinstance(lm, Ngrams)  # a KenLM binary always comes with a lexicon
        words = list(lm.words)
        odd = [word for word in words if not _spelt(units, word)]
        if words and len(odd) == len(words):
            raise UserError(
                f"{name}: none of its {len(words):,} words can be spelt by the units (such as {_some(odd)}); make it from text as the "
                "units' own is written: language, capitals or small letters, punctuation"
            )
        what, then = f"{len(odd):,} of its {len(words):,} words cannot be spelt by the units", "they are never found"
    return f"{name}: {what} (such as {_some(odd)}); {then}" if odd else ""


def _spelt(units: Units, word: str) -> bool:
    """Whether a decoder can write it as one word."""
    return len(units.written(word).split()) == 1 and not units.unwritable(word)


def _some(words: Sequence[str]) -> str:
    return ", ".join(ascii(word) if not word.isprintable() or " " in ascii(word) else word for word in words[:3])


class State(NamedTuple):
    """State of a prefix: the language model's context after its complete words, and the unit ids of the incomplete word."""

    context: Any
    word: tuple[int, ...]


class Grammar:
    """What the words of a hypothesis add to its log-probability: lm_weight · ln P(words and end) + word_bonus · words.

    Args:
        units: vocabulary of the hypotheses.
        lm: the language model, if any.
        lexicon: the words that are allowed, or None for any pieces.
        lm_weight: factor on the language model's log-probabilities.
        word_bonus: added for each word, nat.
    """

    def __init__(
        self, units: Units, lm: LanguageModel | None, lexicon: Lexicon | None, lm_weight: float, word_bonus: float
    ) -> None:
        self.lm, self.lexicon, self.units = lm, lexicon, units
        self.weight, self.bonus = lm_weight * math.log(10), word_bonus
        self._starts_word = [units.starts_word(unit) for unit in range(units.size)]
        self.start = State(lm.start if lm else None, ())
        #: upper bound of what a unit adds
        self.most = max(0.0, word_bonus)

    def extend(self, state: State, unit: int) -> tuple[State, float] | None:
        """The state after a unit, and what the unit adds; None if the lexicon has no such word."""
        context, word = state
        added = 0.0
        if word and self._starts_word[unit]:
            if (ended := self._end_word(state)) is None:
                return None
            (context, added), word = ended, ()
        word = (*word, unit)
        if self.lexicon and word not in self.lexicon.beginnings:
            return None
        return State(context, word), added

    def finish(self, state: State) -> float | None:
        """What the end of the utterance adds; None if it is within a word of the lexicon."""
        if (ended := self._end_word(state)) is None:
            return None
        context, added = ended
        return added + (self.weight * self.lm.finish(context) if self.lm else 0.0)

    def spell(self, ids: tuple[int, ...]) -> str:
        """The text of a word's unit ids."""
        return self.lexicon.words.get(ids, "") if self.lexicon else self.units.decode(ids).strip()

    def _end_word(self, state: State) -> tuple[Any, float] | None:
        """The context after the word, and what it adds."""
        context, ids = state
        if self.lexicon and ids and ids not in self.lexicon.words:
            return None
        word = self.spell(ids)
        if not word:  # nothing yet, or only a space
            return context, 0.0
        added = self.bonus
        if self.lm:
            score, context = self.lm.score(context, word)
            added += self.weight * score
        return context, added
