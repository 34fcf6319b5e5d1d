"""Response knowledge of a CTC teacher as whole transcripts: the cross-entropy of sequences, by drawing them.

What a CTC teacher says of an utterance is a distribution over transcripts, P(y), in which frames are independent given the
audio. Its cross-entropy with the student's, -Σ P(y) log Q(y), is what distillation asks for, and says nothing of *when*: each
Q(y) is a sum over all alignments. The sum over all transcripts cannot be computed, but a path that takes each frame's unit
from that frame's distribution, collapsed, is an exact draw of P. So the CTC loss of one draw is an unbiased estimate of the
full sum, and a new one each time an utterance is heard averages over them. Towards temperature 0 it becomes CTC on the
teacher's best path, the pseudo-label. Sequences in place of frames for CTC: Takashima et al. 2018 and 2019 (n-best and
lattices); the full sum is the aim of arXiv 2303.05958.
"""

from __future__ import annotations

import numpy as np

from asr_kd.units import Units


def draw_sequences(
    units: np.ndarray, probs: np.ndarray, lengths: np.ndarray, temperature: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a transcript of each utterance from soft targets.

    What the targets did not keep is never drawn: the kept units share its mass.

    Args:
        units: int64 [frames, k], kept units of the utterances one after the other; probs: float [frames, k], their
            probabilities, 0 where there is none.
        lengths: int64 [utterances], frames of each.
        temperature: the probabilities are drawn by their power of 1 / temperature.

    Returns:
        int64 unit ids of all utterances in a row, and int64 [utterances], how many each has. They fit into its frames.
    """
    if temperature != 1.0:
        probs = np.where(probs > 0, (probs / probs.max(1, keepdims=True)) ** (1 / temperature), 0.0)
    reached = probs.cumsum(1, dtype=np.float64)
    points = rng.random(len(reached)) * reached[:, -1]
    path = units[np.arange(len(units)), (points[:, None] >= reached).sum(1)]
    utterance = np.repeat(np.arange(len(lengths)), lengths)
    begins = np.append(True, (path[1:] != path[:-1]) | (utterance[1:] != utterance[:-1]))
    spoken = begins & (path != Units.blank)
    return path[spoken], np.bincount(utterance[spoken], minlength=len(lengths))
