"""Audio of any length, in pieces of any size → log-probabilities and words as they become known, in bounded memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from asr_kd.audio.features import frontend_of
from asr_kd.decoding.decoder import Decoder, checked
from asr_kd.decoding.words import Spike, Word, group_words
from asr_kd.errors import AudioError, UserError
from asr_kd.models.acoustic import Checkpoint, infer
from asr_kd.models.settings import STREAMING

# Two windows are joined where both output blanks for this many frames on either side.
SEAM_MARGIN = 5


class Network(ABC):
    """A front end and a network that process one recording; `rows`: how many of the network's input they have processed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._features = checkpoint, frontend_of(checkpoint.features).start()
        self.rows = 0

    def push(self, waveform: np.ndarray) -> np.ndarray:
        """Process the next samples, float32 [samples]; returns new log-probabilities, float32 [frames, units]."""
        return self._next(self._features.push(waveform))

    def finish(self) -> np.ndarray:
        """End the recording; returns the remaining log-probabilities, or raises AudioError when it is shorter than one frame."""
        log_probs = self._next(self._features.finish())
        if self._checkpoint.model.frames(self.rows) < 1:
            raise AudioError("too short: the sound does not fill one frame")
        return np.concatenate([log_probs, self._end()])

    def _next(self, features: np.ndarray) -> np.ndarray:
        self.rows += len(features)
        return self._hear(features)

    @abstractmethod
    def _hear(self, features: np.ndarray) -> np.ndarray:
        """New log-probabilities after float16 [frames, inputs] more."""

    @abstractmethod
    def _end(self) -> np.ndarray:
        """The remaining log-probabilities."""


class StreamingNetwork(Network):
    """A network that streams, run frame by frame.

    It always gets one frame, since a matrix product of another shape rounds differently: so the same audio gives the same
    bits, whatever the pieces.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._model = checkpoint.model
        self._state: Any = None
        self._answered = -self._model.delay  # frames that were answered for; the first answers belong to none

    @torch.inference_mode()
    def _hear(self, features: np.ndarray) -> np.ndarray:
        rows = []
        for frame in torch.from_numpy(features.astype(np.float32)).to(self._checkpoint.device):
            logits, self._state = self._model.stream(frame[None, None], self._state)
            # nor do those behind the end
            own = slice(max(0, -self._answered), max(0, self.rows - self._answered))
            self._answered += logits.shape[1]
            rows.append(logits[0, own].float().log_softmax(-1).cpu().numpy())
        return np.concatenate(rows) if rows else np.empty((0, self._checkpoint.units.size), np.float32)

    def _end(self) -> np.ndarray:
        assert self._model.lookahead_frames is not None  # it streams
        return self._hear(np.zeros((self._model.lookahead_frames, self._checkpoint.features.dimension), np.float16))


class WindowedNetwork(Network):
    """A network for whole utterances, run window by window, both lengths in seconds; shorter recordings are processed whole.

    Windows overlap. Within the overlap they are joined at the frame around which both are surest of the blank, so that no
    word is cut, lost or doubled.
    """

    def __init__(self, checkpoint: Checkpoint, window: float, overlap: float) -> None:
        super().__init__(checkpoint)
        self._window = max(1, round(window * 1000 / checkpoint.frame_ms))  # in output frames, like the overlap
        self._overlap = min(round(overlap * 1000 / checkpoint.frame_ms), self._window // 2)
        self._per_frame = checkpoint.features.rows_per_frame
        self._heard: list[np.ndarray] = []  # the input from the window's start on, in pieces
        self._waiting = 0  # rows of it
        self._before: np.ndarray | None = None  # the previous window's output in the overlap

    def _hear(self, features: np.ndarray) -> np.ndarray:
        self._heard.append(features)
        self._waiting += len(features)
        parts = [np.empty((0, self._checkpoint.units.size), np.float32)]
        while self._waiting > self._window * self._per_frame:
            heard, step = np.concatenate(self._heard), self._window - self._overlap
            log_probs = self._join(infer(self._checkpoint, [heard[: self._window * self._per_frame]])[0])
            parts.append(log_probs[:step])
            self._before, self._heard = log_probs[step:], [heard[step * self._per_frame :].copy()]
            self._waiting -= step * self._per_frame
        return np.concatenate(parts)

    def _end(self) -> np.ndarray:
        return self._join(infer(self._checkpoint, [np.concatenate(self._heard)])[0])

    def _join(self, log_probs: np.ndarray) -> np.ndarray:
        if self._before is None or not len(self._before):
            return log_probs
        at = find_seam(self._before, log_probs[: len(self._before)], self._checkpoint.units.blank)
        return np.concatenate([self._before[:at], log_probs[at:]])


def network_for(checkpoint: Checkpoint, window: float) -> Network:
    """What processes a recording of any length: as it comes, or in overlapping windows of so many seconds."""
    if checkpoint.model.streams:
        return StreamingNetwork(checkpoint)
    return WindowedNetwork(checkpoint, window, window / 5)


def check_streams(checkpoint: Checkpoint, name: str, what: str) -> None:
    """Refuse a network that hears whole utterances, where `what` needs one that streams."""
    if not checkpoint.model.streams:
        kind = checkpoint.settings.kind
        raise UserError(
            f"{name}: kind {kind} hears whole utterances; {what} needs a model of kind {', '.join(STREAMING)}"
        )


def whole(checkpoint: Checkpoint, waveform: np.ndarray) -> np.ndarray:
    """Log-probabilities of a recording at once, float32 [frames, units], of a waveform at the network's rate.

    Raises:
        AudioError: when it is shorter than one frame.
    """
    if checkpoint.model.streams:  # the same bits as when audio arrives in pieces
        network = StreamingNetwork(checkpoint)
        return np.concatenate([network.push(waveform), network.finish()])
    return infer(checkpoint, [frontend_of(checkpoint.features).compute(waveform)])[0]


def listen(
    checkpoint: Checkpoint, decoder: Decoder, blocks: Iterable[np.ndarray], name: str, window: float
) -> Iterator[Word]:
    """The words of a recording of any length, in bounded memory.

    Args:
        checkpoint: the network.
        decoder: of its output.
        blocks: the waveform at its rate, float32 [samples] each.
        name: of the recording, for messages.
        window: seconds processed at once by a network that needs whole utterances (`WindowedNetwork`).

    Raises:
        AudioError: when the recording is shorter than one frame.
    """
    listener = Listener(network_for(checkpoint, window), decoder, name)
    for block in blocks:
        yield from listener.push(block)
    yield from listener.finish()


def find_seam(first: np.ndarray, second: np.ndarray, blank: int) -> int:
    """The frame at which `second` takes over from `first`, two log-probabilities [frames, units] of the same audio.

    In the middle half, where both windows have context on both sides; on a tie the frame nearest to the centre.
    """
    count = len(first)
    quiet = np.minimum(first[:, blank], second[:, blank])
    padded = np.pad(quiet, SEAM_MARGIN, mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * SEAM_MARGIN + 1).min(axis=1)
    middle = range(count // 4, max(count // 4 + 1, count - count // 4))
    return max(middle, key=lambda frame: (around[frame], -abs(2 * frame - count)))


class Listener:
    """A network and a decoder that process one recording of any length (`name` in messages), in bounded memory.

    The words equal those of the best hypothesis for the whole recording.
    """

    def __init__(self, network: Network, decoder: Decoder, name: str) -> None:
        self._network, self._decoder, self._name = network, decoder, name
        self._search = decoder.start()
        self._settled: list[Spike] = []  # of a word that may go on

    def push(self, waveform: np.ndarray) -> list[Word]:
        """Process the next samples, float32 [samples]; returns the words that later audio cannot change any more."""
        return self._hear(self._network.push(waveform))

    def rest(self) -> list[Word]:
        """The words after the settled ones, as of now."""
        found = next(iter(self._search.results()), ([], 0.0))[0]
        return self._decoder.words(self._settled + found)

    def finish(self) -> list[Word]:
        """End the recording; returns the words after the settled ones, or raises AudioError when it is shorter than one frame."""
        try:
            log_probs = self._network.finish()
        except AudioError as error:
            raise AudioError(f"{self._name}: {error}") from None
        return self._hear(log_probs) + self.rest()

    def _hear(self, log_probs: np.ndarray) -> list[Word]:
        self._search.push(checked(log_probs))
        self._settled += self._search.settle()
        groups = group_words(self._decoder.units, self._settled)
        if len(groups) < 2:
            return []
        words = self._decoder.words(self._settled[: -len(groups[-1])])
        self._settled = groups[-1]
        return words
