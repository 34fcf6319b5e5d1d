"""When a teacher says something, for losses that compare frames: which frames are near its speech, and a student that says it later."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asr_kd.distillation.knowledge import Seen
from asr_kd.units import Units

#: a frame is the teacher's speech if at least this much of its mass is on units other than the blank
SPEECH = 0.1


def near_speech(seen: Seen, before: int, after: int) -> Tensor:
    """Bool [learned frames]: whether the teacher speaks within `after` frames before or `before` frames behind, in the same utterance.

    More than nine of ten frames of a CTC teacher are blank. Learning none of them does not work, learning those around its spikes does
    (blank elimination: Hilmes et al. 2025, arXiv 2506.01503).
    """
    units, probs = seen.parts["soft.units"].values, seen.parts["soft.probs"].values
    speech = torch.where(units != Units.blank, probs, 0.0).sum(-1) + seen.parts["soft.tail"].values >= SPEECH
    near, utterances = speech.clone(), seen.utterances
    for shift in range(1, max(before, after) + 1):
        same = utterances[shift:] == utterances[:-shift]
        if shift <= after:
            near[shift:] |= speech[:-shift] & same
        if shift <= before:
            near[:-shift] |= speech[shift:] & same
    return near


def later(seen: Seen, delay: int) -> Seen:
    """What is seen, with the soft targets `delay` frames later: the first frames of an utterance repeat its first target, its last ones are lost."""
    frames = torch.arange(len(seen.utterances), device=seen.logits.device)
    starts = torch.searchsorted(seen.utterances, seen.utterances)  # the first frame of each frame's utterance
    at = torch.maximum(frames - delay, starts)
    moved = {name: part._replace(values=part.values[at]) for name, part in seen.parts.items() if _of_frames(seen, name)}
    return seen._replace(parts={**seen.parts, **moved})


def _of_frames(seen: Seen, name: str) -> bool:
    part = seen.parts[name]
    return name.startswith("soft.") and not part.whole and part.lengths is None


def best_delay(losses: Tensor, utterances: Tensor, sharpness: float) -> Tensor:
    """The loss of each utterance at its best delay, or a soft minimum of them (a delay buffer, after Li et al. 2025, arXiv 2505.22069).

    One delay an utterance, not a frame: frames that choose for themselves would say some units twice.

    Args:
        losses: float [delays, learned frames].
        utterances: int64 [learned frames], the utterance of each.
        sharpness: τ of -τ log mean exp(-loss / τ), the losses in nat a frame; towards 0 the least, towards infinity the mean.

    Returns:
        float [utterances], each a sum over its frames.
    """
    number = int(utterances.max()) + 1 if len(utterances) else 0
    sums = losses.new_zeros(len(losses), number).index_add_(1, utterances, losses)
    if not sharpness:
        return sums.gather(0, sums.argmin(0, keepdim=True))[0]
    frames = torch.bincount(utterances, minlength=number).clamp_min(1)
    mean = (-sums / frames / sharpness).logsumexp(0) - math.log(len(losses))
    return -sharpness * mean * frames
