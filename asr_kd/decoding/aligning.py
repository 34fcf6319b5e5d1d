"""When each word of a known text is said in a recording: CTC forced alignment with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torchaudio.functional import forced_align

from asr_kd.decoding.listening import StreamingNetwork, WindowedNetwork
from asr_kd.errors import AudioError
from asr_kd.models.acoustic import load_checkpoint

MOST = (
    1 << 30
)  # bytes that an alignment may take: one for each frame and each state, which are the units and the blanks around them
WINDOW, OVERLAP = 60.0, 12.0  # seconds that a network for whole utterances hears at once


@dataclass(frozen=True)
class Said:
    """A word of a text in its recording.

    Attributes:
        start: seconds, of the frame that emits its first unit, not counting a space.
        end: seconds, of the end of the frame that emits its last one.
        score: log-probability (nat) of the alignment from its start to the next word, blanks included.
        units: how many it is spelt with.
    """

    text: str
    start: float
    end: float
    score: float
    units: int


class Aligner:
    """A checkpoint that aligns texts; `rate` in Hz of the sound it hears, `mark` its fingerprint. It raises UserError as `load_checkpoint`."""

    def __init__(self, checkpoint: str) -> None:
        torch.set_num_threads(1)  # the same bits on any machine
        self._checkpoint = load_checkpoint(checkpoint)
        self.rate, self.mark = self._checkpoint.features.sample_rate, self._checkpoint.fingerprint
        units = self._checkpoint.units
        self._space = next((unit for unit in range(units.size) if units.piece(unit) == "▁"), -1)

    def align(self, blocks: Iterable[np.ndarray], text: str) -> list[Said]:
        """The words of a text, at least one, in the order of time.

        Args:
            blocks: the sound, float32 [samples] at `rate`, of any lengths.
            text: all that is said in it; words are what spaces part.

        Raises:
            AudioError: when the text is empty, has what no unit covers, does not fit into the sound, or both are too long.
        """
        units = self._checkpoint.units
        spelt = [(word, units.encode(word)) for word in text.split()]
        ids = [unit for _, word in spelt for unit in word]
        if not ids:
            raise AudioError("it says nothing")
        heard = self._hear(blocks)
        if misfit := units.misfit(text, ids, len(heard)):
            raise AudioError(misfit)
        if (states := 2 * len(ids) + 1) * len(heard) > MOST:
            raise AudioError(
                f"its {len(ids)} units and {len(heard)} frames are too many, {states * len(heard) / MOST:.1f} times what fits; cut it by hand first"
            )
        path, scores = forced_align(
            torch.from_numpy(heard)[None], torch.tensor([ids], dtype=torch.int32), blank=units.blank
        )
        return self._words(spelt, path[0].numpy(), scores[0].double().numpy())

    def _hear(self, blocks: Iterable[np.ndarray]) -> np.ndarray:
        """Log-probabilities, float32 [frames, units]."""
        if self._checkpoint.model.streams:
            network: StreamingNetwork | WindowedNetwork = StreamingNetwork(self._checkpoint)
        else:
            network = WindowedNetwork(self._checkpoint, WINDOW, OVERLAP)
        parts = [network.push(block) for block in blocks]
        return np.concatenate([*parts, network.finish()])

    def _words(self, spelt: list[tuple[str, list[int]]], path: np.ndarray, scores: np.ndarray) -> list[Said]:
        """Words with their times, of a path int [frames] and its log-probabilities [frames]."""
        before = np.concatenate([[self._checkpoint.units.blank], path[:-1]])
        after = np.concatenate([path[1:], [self._checkpoint.units.blank]])
        inside = path != self._checkpoint.units.blank
        starts, ends = np.flatnonzero(inside & (path != before)), np.flatnonzero(inside & (path != after)) + 1
        counts = [len(ids) for _, ids in spelt]
        firsts = np.cumsum([0, *counts])
        # a word that no unit spells, such as a dash, goes with the one before it, or with the first
        words: list[tuple[list[str], int, int]] = []
        waiting: list[str] = []
        for (text, _), first, last in zip(spelt, firsts, firsts[1:], strict=False):
            if first == last and words:
                words[-1][0].append(text)
            elif first == last:
                waiting.append(text)
            else:
                words.append(([*waiting, text], int(first), int(last)))
                waiting = []
        cuts = [0, *(int(starts[first]) for _, first, _ in words[1:]), len(path)]
        seconds = self._checkpoint.frame_ms / 1000
        # a space that is a unit of its own may be emitted as soon as the word before is over, ahead of a pause
        spaced = [path[starts[first]] == self._space and first + 1 < last for _, first, last in words]
        return [
            Said(
                " ".join(texts),
                starts[first + space] * seconds,
                ends[last - 1] * seconds,
                float(scores[begin:stop].sum()),
                last - first,
            )
            for (texts, first, last), begin, stop, space in zip(words, cuts, cuts[1:], spaced, strict=False)
        ]
