"""torchaudio's CTC beam search (flashlight's, in C++), which ours is compared with; it needs the extra `lm`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torchaudio.functional import forced_align

from asr_kd.decoding.beam import CANDIDATES
from asr_kd.decoding.decoder import Decoder, Search
from asr_kd.decoding.grammar import Grammar, State
from asr_kd.decoding.words import Spike
from asr_kd.units import Units

# far below every probability; with minus infinity flashlight's sums become NaN
FORBIDDEN = -1e9


def _engine(units: Units, grammar: Grammar | None, beam: int) -> Any:
    """torchaudio's `CTCDecoder`, which sums over alignments and asks our grammar about every unit.

    Its own lexicon decoder is not used: there a word is over with the first frame of its last unit, so that paths in which
    that unit lasts longer are missing from the sum, unless every spelling ends with a unit of silence. Pieces that begin
    with a space have none.
    """
    library: Any = importlib.import_module("torchaudio.models.decoder._ctc_decoder")
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


class TorchaudioDecoder(Decoder):
    """Ours, but for the search."""

    def start(self) -> Search:
        return _WholeSearch(_engine(self.units, self.grammar, self.settings.beam), self.units.blank)


class _WholeSearch:
    """It hears a whole utterance before it searches."""

    def __init__(self, engine: Any, blank: int) -> None:
        self._engine, self._blank = engine, blank
        self._parts: list[np.ndarray] = []

    def push(self, log_probs: np.ndarray) -> None:
        """Keep the next frames: float [frames, units], natural logarithm."""
        self._parts.append(log_probs.astype(np.float32))

    def results(self) -> Iterator[tuple[list[Spike], float]]:
        """Spikes (in the most probable alignment of the units) and scores, best first."""
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
    path = forced_align(torch.from_numpy(log_probs)[None], torch.tensor([ids], dtype=torch.int32), blank=blank)[0][0]
    spikes: list[Spike] = []
    last = blank
    for frame, unit in enumerate(path.tolist()):
        if unit != blank:
            spike = Spike(unit, frame, frame + 1, math.exp(log_probs[frame, unit]))
            spikes.append(spikes.pop().longer(spike) if unit == last else spike)
        last = unit
    return spikes
