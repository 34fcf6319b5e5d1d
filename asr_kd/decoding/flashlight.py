"""What the extra `lm` brings: torchaudio's CTC beam search (flashlight's, in C++) and KenLM's binary language models.

torch is imported where it is used: a process that searches with ours starts without it.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from asr_kd.decoding.beam import CANDIDATES
from asr_kd.decoding.grammar import Grammar, State
from asr_kd.decoding.ngram import UNKNOWN
from asr_kd.decoding.words import Spike
from asr_kd.errors import UserError
from asr_kd.files import local_copy, place
from asr_kd.units import Units

# far below every probability; with minus infinity flashlight's sums become NaN
FORBIDDEN = -1e9
#: whether flashlight-text, which torchaudio's decoder and its KenLM are, has a wheel for this Python
HAS_WHEEL = sys.version_info < (3, 13)


def _library(needed_by: str, instead: str) -> Any:
    try:
        return importlib.import_module("torchaudio.models.decoder._ctc_decoder")
    except ImportError:
        if HAS_WHEEL:
            raise UserError(f"{needed_by} needs the extra lm; install it with pip install 'asr-kd[lm]'") from None
        raise UserError(
            f"{needed_by} needs flashlight-text, which is not there for Python 3.13; {instead}, or use Python 3.12 or 3.11"
        ) from None


class KenLm:
    """A KenLM model (binary or ARPA) for the words of a lexicon, with the interface of `Ngrams`.

    Raises:
        UserError: when the extra is not installed or KenLM cannot read the file.
    """

    def __init__(self, name: str, words: Iterable[str]) -> None:
        library = _library(f"{name}: a KenLM binary", "give the ARPA file that it was made from")
        known = [UNKNOWN, *dict.fromkeys(words)]
        self._number = {word: number for number, word in enumerate(known)}
        try:
            with local_copy(place(name)) as path:
                self._model = library._KenLM(str(path), library._Dictionary(known))
        except (RuntimeError, OSError) as error:  # RuntimeError: KenLM's exceptions
            reason = str(error).strip().splitlines()[-1][:200] if str(error).strip() else "unreadable"
            raise UserError(
                f"{name}: not a language model that KenLM reads ({reason}); make it again with KenLM's build_binary"
            ) from None
        self.start = self._model.start(False)

    def knows(self, word: str) -> bool:
        """Whether the model has a word, as far as can be told: KenLM does not say, but scores others as the unknown one."""
        alone = self._model.start(True)
        return self._model.score(alone, self._number.get(word, 0))[1] != self._model.score(alone, 0)[1]

    def score(self, context: Any, word: str) -> tuple[float, Any]:
        """log10 P(word | context), and the context of the word that follows."""
        after, score = self._model.score(context, self._number.get(word, 0))
        return score, after

    def finish(self, context: Any) -> float:
        """log10 P(end of the sentence | context)."""
        return self._model.finish(context)[1]


def make_engine(units: Units, grammar: Grammar | None, beam: int) -> Any:
    """torchaudio's `CTCDecoder`, which sums over alignments and asks our grammar about every unit.

    Its own lexicon decoder is not used: there a word is over with the first frame of its last unit, so that paths in which
    that unit lasts longer are missing from the sum, unless every spelling ends with a unit of silence. Pieces that begin
    with a space have none.

    Raises:
        UserError: when the extra is not installed.
    """
    library = _library("decoder: torchaudio", "set decoder to beam")

    base: Any = library.CTCDecoderLM

    class GrammarLm(base):
        def __init__(self) -> None:
            super().__init__()
            self.states: dict[Any, State | None] = {}
            self.scores: dict[Any, float] = {}

        def start(self, start_with_nothing: bool) -> Any:
            self.states, self.scores = {}, {}
            state = library.CTCDecoderLMState()
            self.states[state] = grammar.start if grammar else None
            return state

        def score(self, state: Any, unit: int) -> tuple[Any, float]:
            after = state.child(unit)
            if after not in self.scores:
                before = self.states[state]
                step = grammar.extend(before, unit) if grammar and before else None
                self.states[after] = step and step[0]
                self.scores[after] = step[1] if step else FORBIDDEN if grammar else 0.0
            return after, self.scores[after]

        def finish(self, state: Any) -> tuple[Any, float]:
            before = self.states[state]
            added = grammar.finish(before) if grammar and before else 0.0
            return state, FORBIDDEN if added is None else added

    pieces = [units.piece(unit) for unit in range(units.size)]
    blank = pieces[units.blank]
    return library.ctc_decoder(
        lexicon=None, tokens=pieces, lm=GrammarLm(), nbest=beam, beam_size=beam, beam_size_token=min(units.size, CANDIDATES),
        beam_threshold=-FORBIDDEN / 2, lm_weight=1.0, log_add=True, blank_token=blank, sil_token=blank,
    )  # fmt: skip


class FlashlightSearch:
    """It hears a whole utterance before it searches: unlike ours, it gives nothing while the frames come."""

    def __init__(self, engine: Any, blank: int) -> None:
        self._engine, self._blank = engine, blank
        self._parts: list[np.ndarray] = []

    def push(self, log_probs: np.ndarray) -> None:
        """Keep the next frames: float [frames, units], natural logarithm."""
        self._parts.append(log_probs.astype(np.float32))

    def results(self) -> Iterator[tuple[list[Spike], float]]:
        """Spikes (in the most probable alignment of the units) and scores, best first."""
        import torch

        log_probs = np.ascontiguousarray(np.concatenate(self._parts))
        if not len(log_probs):
            return
        found = self._engine(torch.from_numpy(np.maximum(log_probs, FORBIDDEN))[None])[0]
        for one in found:
            if one.score > FORBIDDEN / 2:
                yield align_spikes(log_probs, one.tokens.tolist(), self._blank), one.score

    def settle(self) -> list[Spike]:
        """Nothing settles before the end."""
        return []


def align_spikes(log_probs: np.ndarray, ids: list[int], blank: int) -> list[Spike]:
    """The spikes of a unit sequence in its most probable alignment to log-probabilities float32 [frames, units]."""
    if not ids:
        return []
    import torch
    from torchaudio.functional import forced_align

    path = forced_align(torch.from_numpy(log_probs)[None], torch.tensor([ids], dtype=torch.int32), blank=blank)[0][0]
    spikes: list[Spike] = []
    last = blank
    for frame, unit in enumerate(path.tolist()):
        if unit != blank:
            spike = Spike(unit, frame, frame + 1, math.exp(log_probs[frame, unit]))
            spikes.append(spikes.pop().longer(spike) if unit == last else spike)
        last = unit
    return spikes
