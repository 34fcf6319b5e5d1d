"""Log-probabilities → hypotheses, by the settings: used by every job that decodes."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from asr_kd.decoding.beam import BeamSearch
from asr_kd.decoding.grammar import Grammar, LanguageModel, Lexicon, compare_words, learn_spellings, read_lexicon
from asr_kd.decoding.greedy import GreedySearch
from asr_kd.decoding.kenlm import KenLm
from asr_kd.decoding.ngram import is_kenlm_binary, read_arpa
from asr_kd.decoding.settings import DecodingSettings
from asr_kd.decoding.words import Hypothesis, Spike, Token, Word, group_words
from asr_kd.errors import UserError
from asr_kd.units import Units

if TYPE_CHECKING:  # a process that only decodes starts without torch
    from asr_kd.models.acoustic import Checkpoint

#: how long a beam search keeps alternatives to a word; shorter utterances are not affected
HORIZON_SECONDS = 20.0


#: the search through one utterance
Search = GreedySearch | BeamSearch


class Decoder:
    """Log-probabilities of one utterance → its best hypotheses. It can be sent to another process.

    Args:
        settings: of the search.
        units: of the log-probabilities.
        frame_seconds: period of a frame.
        first_seconds: start of the first frame in the audio.

    A UserError when a language model or lexicon of the settings cannot be used.
    """

    def __init__(
        self, settings: DecodingSettings, units: Units, frame_seconds: float, first_seconds: float = 0.0
    ) -> None:
        self.settings, self.units, self.frame_seconds, self.first_seconds = (
            settings,
            units,
            frame_seconds,
            first_seconds,
        )
        lexicon = read_lexicon(settings.lexicon, units) if settings.lexicon else None
        lm = _language_model(settings.lm, units, lexicon) if settings.lm else None
        self.grammar = Grammar(units, lm, lexicon, settings.lm_weight, settings.word_bonus) if lm or lexicon else None

    def __reduce__(self) -> tuple[type[Decoder], tuple[DecodingSettings, Units, float, float]]:
        return type(self), (self.settings, self.units, self.frame_seconds, self.first_seconds)

    def __call__(self, log_probs: np.ndarray) -> list[Hypothesis]:
        """The best hypotheses for float [frames, units], best first: at most `nbest`, at least one, which may be empty."""
        search = self.start()
        search.push(checked(log_probs))
        return self.hypotheses(search)

    def start(self) -> Search:
        """A search for a new utterance, to be fed in pieces of any size."""
        if self.settings.decoder == "greedy":
            return GreedySearch(self.units.blank)
        horizon = round(HORIZON_SECONDS / self.frame_seconds)
        return BeamSearch(self.settings.beam, self.units.blank, self.grammar, horizon)

    def hypotheses(self, search: Search) -> list[Hypothesis]:
        """What a search has found so far, as if the utterance ended here."""
        found: dict[str, Hypothesis] = {}
        for spikes, score in search.results():
            words = self.words(spikes)
            text = " ".join(word.text for word in words)
            found.setdefault(text, Hypothesis(text, score, words))  # other pieces of a text are not another one
            if len(found) == self.settings.nbest:
                break
        return list(found.values()) or [Hypothesis("", -math.inf)]

    def _seconds(self, frame: int) -> float:
        return max(0.0, self.first_seconds + frame * self.frame_seconds)

    def words(self, spikes: Sequence[Spike]) -> list[Word]:
        """The words of a unit sequence, each with its tokens, times and confidence."""
        words = []
        for group in group_words(self.units, spikes):
            ids = tuple(spike.unit for spike in group)
            text = self.grammar.spell(ids) if self.grammar else self.units.decode(ids).strip()
            if text:  # a lone space is not a word
                tokens = tuple(
                    Token(self.units.piece(unit), self._seconds(start), self._seconds(end), probability)
                    for unit, start, end, probability in group
                )
                confidence = math.prod(token.confidence for token in tokens)
                words.append(Word(text, tokens[0].start, tokens[-1].end, confidence, tokens))
        return words


def checked(log_probs: np.ndarray) -> np.ndarray:
    """Refuse NaN, which would be decoded as silence; a softmax makes either all of a frame NaN or nothing."""
    if np.isnan(log_probs[:, :1]).any():
        raise UserError(
            "the network's output is NaN; its weights are broken: train it again, or give another checkpoint"
        )
    return log_probs


def _language_model(name: str, units: Units, lexicon: Lexicon | None) -> LanguageModel:
    if not is_kenlm_binary(name):
        ngrams = read_arpa(name)
        learn_spellings(ngrams, units, lexicon)
        return ngrams
    if lexicon is None:
        raise UserError(f"{name}: a KenLM binary does not tell its words; set lexicon too, or give the ARPA file")
    return KenLm(name, lexicon.words.values())


def make_decoder(settings: DecodingSettings, checkpoint: Checkpoint) -> Decoder:
    """The decoder of a checkpoint's output; words of the language model that do not fit are counted on standard error, or refused."""
    decoder = Decoder(settings, checkpoint.units, checkpoint.frame_ms / 1000, checkpoint.offset_ms / 1000)
    if settings.lm and decoder.grammar and (lm := decoder.grammar.lm):
        _say(compare_words(settings.lm, lm, decoder.units, decoder.grammar.lexicon))
    return decoder


@functools.cache
def _say(remark: str) -> None:
    """Print a remark, if there is any, once, however many systems are decoded with the same settings."""
    if remark:
        print(remark, file=sys.stderr)
