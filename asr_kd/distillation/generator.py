"""Features made by a network beside the student, which seeks what the student and its teacher say differently; no audio is heard.

Data-free adversarial distillation (Micaelli & Storkey 2019, arXiv 1905.09768; DFAD, Fang et al. 2019, arXiv 1912.11006; the generator that must please a
teacher is of DAFL, Chen et al. 2019, arXiv 1904.01186): the student learns what the teacher says of the features that a generator makes of noise, and the generator
raises the divergence between the two. It stays one loss: the student hears the features through a gradient reversal, so the slope of its cross-entropy by
them turns round on its way into the generator; what the teacher has in the divergence, the same way. With the student's part they are the slope of KL(teacher ‖ student).

*What keeps it near speech.* The largest disagreement lies where nobody speaks, and of garbage a CTC teacher says blank. So the generator is held to the moments
of the features that the teacher knows, along their principal axes (mean, variance, and the square of the difference of successive frames), and to a band of the share
in which the teacher speaks. The latter is counted in nat: the slope of a share near 0 vanishes, that of its logarithm does not.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from asr_kd.config.schedule import value_at
from asr_kd.distillation.answers import SAID
from asr_kd.distillation.knowledge import MADE, Knowledge, Seen, Task
from asr_kd.distillation.settings import Asked
from asr_kd.models.network import Outputs
from asr_kd.targets.moments import Moments, read_moments
from asr_kd.units import Units

#: channels of its inner layers
WIDTH = 128
#: frames that a layer hears on each side, times its dilation
REACH = 2
#: dilations of its layers: it hears 14 frames of noise on each side, about a word
DILATIONS = (1, 2, 4)


class Generator(nn.Module):
    """Noise [batch, frames, dimension] → features of the same shape.

    Args:
        moments: of the features that it is to resemble.
        turned: what the student's slope is multiplied by on its way into it, beside being reversed.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, moments: Moments, turned: float) -> None:
        super().__init__()
        dimension, self.turned = len(moments.mean), turned
        widths = [dimension, *[WIDTH] * len(DILATIONS)]
        self.layers = nn.ModuleList(
            nn.Conv1d(before, after, 2 * REACH + 1, padding=REACH * dilation, dilation=dilation)
            for before, after, dilation in zip(widths[:-1], widths[1:], DILATIONS, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in DILATIONS)
        self.output = nn.Linear(WIDTH, dimension)
        self.register_buffer("mean", torch.from_numpy(moments.mean))
        self.register_buffer("spread", torch.from_numpy(np.sqrt(moments.variance)[:, None] * moments.axes))

    def make(self, noise: Tensor) -> dict[str, Tensor]:
        """Features, `MADE`; the same with the slope that `reversed_slope` gives them, for the student, `heard`; and their coordinates along the
        principal axes, in units of the deviation there, `along`."""
        hidden = noise
        for layer, norm in zip(self.layers, self.norms, strict=True):
            hidden = norm(nn.functional.leaky_relu(layer(hidden.transpose(1, 2)).transpose(1, 2), 0.2))
        along = self.output(hidden).float()
        features = self.mean + along @ self.spread
        return {MADE: features, "heard": reversed_slope(features, self.turned), "along": along}

    def forward(self, outputs: Outputs, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Beside audio, which it does not hear: what DDP can find its weights by."""
        return {"idle": torch.stack([weight.sum() for weight in self.parameters()])}


def reversed_slope(values: Tensor, share: float) -> Tensor:
    """The same values; what comes back through them is multiplied by -share (Ganin & Lempitsky 2014, arXiv 1409.7495)."""
    return values.detach() - share * (values - values.detach())


class Generated(Knowledge):
    """`generated` of kind adversarial: what the generator learns. The student learns by `soft`, as from audio."""

    def __init__(self, asked: Asked, task: Task) -> None:
        super().__init__(asked, task)
        self.moments = read_moments(self.settings.moments, task.features.dimension)

    def beside(self) -> nn.Module:
        """See `Knowledge`."""
        return Generator(self.moments, self.settings.disagreement)

    def loss(self, seen: Seen) -> Tensor:
        """See `Knowledge`; the distance from the moments and the teacher's silence, means over a batch, count for each learned frame."""
        assert self.task.source is not None
        said, frames = seen.parts[SAID].values, len(seen.utterances)
        apart = divergence(reversed_slope(said, self.settings.disagreement), seen.rows.detach())
        unlike = distance(seen.beside["along"], self.moments)
        spoken = log_spoken(said, seen.learned)
        least, most = (
            math.log(share * self.moments.spoken) for share in (self.settings.speech_least, self.settings.speech_most)
        )
        amiss = ((least - spoken).relu() + (spoken - most).relu()).mean()
        seen.note(f"{self.name}:disagreement", apart / frames)
        seen.note(f"{self.name}:distance", unlike)
        seen.note(f"{self.name}:spoken", spoken.exp().mean())
        # a slope alone: the divergence is counted in the student's loss
        through_teacher = value_at(self.task.source.soft, seen.done) * (apart - apart.detach())
        return through_teacher + (self.settings.likeness * unlike + self.settings.speech * amiss) * frames


def divergence(said: Tensor, logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nat, summed over frames: log-probabilities [frames, units] of the teacher, logits of the student."""
    return (said.exp() * (said - logits.log_softmax(-1))).sum()


def distance(along: Tensor, moments: Moments) -> Tensor:
    """How far features are from moments, a mean over the principal axes of the squared differences of mean, variance and roughness.

    Args:
        along: float [utterances, frames, axes], coordinates in units of the deviation: of the right moments mean 0 and variance 1.
    """
    mean, variance = along.mean((0, 1)), along.var((0, 1), correction=0)
    change = along.diff(dim=1).square().mean((0, 1)) if along.shape[1] > 1 else variance.new_zeros(())
    wanted = torch.from_numpy(moments.roughness).to(along)
    off = mean.square() + (variance - 1).square()
    return (off + (change - wanted).square()).mean() if along.shape[1] > 1 else off.mean()


def log_spoken(said: Tensor, learned: Tensor) -> Tensor:
    """Of each utterance the logarithm of the mean over its frames of the teacher's probability of all units but the blank: float [utterances].

    Args:
        said: log-probabilities [learned frames, units].
        learned: bool [utterances, frames].
    """
    others = torch.cat([said[:, : Units.blank], said[:, Units.blank + 1 :]], -1).logsumexp(-1)
    spread = others.new_full(learned.shape, -torch.inf)
    spread[learned] = others
    return spread.logsumexp(-1) - learned.sum(-1).log()
