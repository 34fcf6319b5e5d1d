"""Adversarial knowledge: a critic beside the student tells the teacher's answers from the student's, which learns to be taken for the teacher.

It stays one loss: the critic minimises its cross-entropy, and a gradient reversal (Ganin & Lempitsky 2014, arXiv 1409.7495) between it and the student
turns the slope round, times `weight`. Critics of a teacher's outputs are from Xu et al. 2017 (arXiv 1709.00513), of hidden states from MEAL (Shen et
al. 2018, arXiv 1812.02425). A critic asks whether an answer looks like the teacher's, not whether it is right: it goes with a kind that does.

*What is well-conditioned.* Behind a reversal the student's slope is that of log(1 - σ(D)), which vanishes where the critic's logit D is sure, as that of a
hinge does altogether, while that of a squared error has no bound. So it is the cross-entropy, of a critic that cannot be sure: samples are vectors
of length 1, and each layer is divided by its largest singular value (spectral normalisation, Miyato et al. 2018, arXiv 1802.05957; exactly, which small
layers allow, so there is no state of a power iteration). D differs by at most `STEEP` times what two samples do. Of two clouds of samples far apart
the slope stayed at a quarter to a half of what it is close by, where without the division it was 0 after some hundred steps.

*What would give the teacher away.* Both sides are measured alike: distributions as the roots of their probabilities, which have no logarithm of 0 and
whose slope by the logits is bounded; hidden states normalised, the student's behind a projection of its own (which units are which is arbitrary). Stored
targets hold few units, rounded: the student's distribution passes the same selection and rounding first, with the gradient straight through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from asr_kd.config.schedule import value_at
from asr_kd.distillation.features import Projection
from asr_kd.distillation.hidden import Hidden, exact
from asr_kd.distillation.knowledge import Seen
from asr_kd.distillation.relations import of_stretches
from asr_kd.distillation.settings import SelectSettings
from asr_kd.distillation.spikes import find_spikes, reach
from asr_kd.distillation.timing import near_speech
from asr_kd.errors import UserError
from asr_kd.models.network import Outputs
from asr_kd.targets.codec import rounded
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.store import Selection, metadata_of

#: width of a critic's inner layer
INNER = 64
#: its slope where it is off
LEAK = 0.2
#: how steep a critic is at most
STEEP = 2.0
#: probability below which the root of one has no slope
FAINTEST = 1e-12


class Samples(NamedTuple):
    """What a critic judges, a row of length 1 each.

    Attributes:
        student: float [samples, width], as the critic sees it.
        through: the same with gradient, before what has none (selection, rounding).
        teacher: float [samples, width], without gradient.
    """

    student: Tensor
    through: Tensor
    teacher: Tensor


class Judge(nn.Module):
    """The weights of a critic.

    The teacher's answers are parts of a batch, which modules beside the student do not hear. So what this one puts out is its weights, and the loss
    judges by them.
    """

    def __init__(self, width: int, name: str = "judge") -> None:
        super().__init__()
        self.name = name
        self.inner, self.outer = nn.Linear(width, INNER), nn.Linear(INNER, 1)

    def forward(self, outputs: Outputs, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Weights and biases by name, behind that of the critic."""
        # copies: DDP looks for the weights behind what comes out, and finds none in a weight itself
        return {f"{self.name}.{name}": weight.clone() for name, weight in self.named_parameters()}


class Beside(nn.ModuleList):
    """Modules beside the student, each clipped by itself."""

    def forward(self, outputs: Outputs, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """What each puts out."""
        return {name: value for one in self for name, value in one(outputs, features, lengths).items()}


class Critic(Hidden):
    """`critics`: of outputs, or of a layer of each, in events or in frames near the teacher's speech."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.share, self.weight = self.weight, 1.0  # `weight` weighs what the student learns, not what the critic does
        self.codec: tuple[Selection, int] | None = None
        if self.settings.student:
            # modules beside the student are shared by name: that of states of another width is another one
            self.name += f":{self.task.taught.get(self.settings.teacher, 0)}"
            return
        self.taps, self.taught = (), ()
        if self.task.source and self.task.source.targets:
            (folder,) = self.task.source.target_sets
            metadata = metadata_of(folder)
            self.codec = metadata.selection, metadata.codec.levels
            if metadata.selection.k is None or metadata.selection.mode == "occupancy":
                raise UserError(
                    f"targets: {folder} was labelled with mode={metadata.selection.mode}, which a critic would tell from a student's answers by its "
                    "form; label with mode=mass, or let the teacher answer in the step"
                )

    def beside(self) -> nn.Module:
        """See `Knowledge`."""
        if not self.settings.student:
            assert self.task.units is not None
            return Beside([Judge(self.task.units.size)])
        width, to = self.widths
        return Beside([Judge(to), Projection(self.settings.student, width, to)])

    def loss(self, seen: Seen) -> Tensor:
        """See `Knowledge`; the means over samples count for each learned frame."""
        samples = self._hidden(seen) if self.settings.student else self._outputs(seen)
        loss, right = told_apart(samples, seen.beside, value_at(self.share, seen.done))
        if len(samples.student):
            seen.note(f"{self.name}:accuracy", right)
        return loss * len(seen.utterances)

    def _near(self, seen: Seen) -> Tensor:
        """Bool [learned frames]: which are judged, where frames are."""
        select = (self.task.source and self.task.source.select) or SelectSettings()
        frame_ms = self.task.features.frame_ms
        return near_speech(seen, round(select.before_ms / frame_ms), round(select.after_ms / frame_ms))

    def _hidden(self, seen: Seen) -> Samples:
        # an event is a mean with weights that add up to 1, so projected frames give the projected event
        pairs = self.pairs(seen._replace(hidden=seen.beside))
        own, theirs = (_direction(states) for states in (pairs.student, pairs.teacher))
        if self.settings.samples == "frames":
            near = self._near(seen)
            own, theirs = own[near], theirs[near]
        return Samples(own.detach(), own, theirs)

    def _outputs(self, seen: Seen) -> Samples:
        units, probs = (seen.parts[f"soft.{name}"].values for name in ("units", "probs"))
        log_probs = exact(seen.rows).log_softmax(-1)
        through = log_probs.exp()
        own = coded(log_probs.detach(), *self.codec) if self.codec else through.detach()
        theirs = torch.zeros_like(own).scatter_add(1, units, probs.detach().to(own))
        if self.settings.samples == "events":
            return of_events(Samples(own, through, theirs), seen.parts["spikes.edges"].values)
        near = self._near(seen)
        return Samples(*(_roots(rows[near]) for rows in (own, through, theirs)))


def of_events(frames: Samples, edges: Tensor) -> Samples:
    """What is said in each spike of the teacher, by both over the whole stretch in which the student may answer it.

    A distribution over the units without the blank, as its roots. A spike of which the student says nothing at all is not judged.

    Args:
        frames: probabilities [frames, units].
        edges: int64 [4, spikes], as of `Spikes`.
    """
    _, _, first, last = edges
    if not len(first):
        return Samples(*(rows[:0] for rows in frames))
    own, through, theirs = (of_stretches(rows, first, last) for rows in frames)
    said = own.sum(1) > 0
    return Samples(*(_roots(rows[said]) for rows in (own, through, theirs)))


def of_peers(own: Tensor, other: Tensor, lengths: Tensor, frame_ms: int) -> Samples:
    """The same of two networks that are there in the step, in the spikes of the `other`.

    Args:
        own: logits [learned frames, units], with gradient.
        other: logits [learned frames, units].
        lengths: int64 [utterances], learned frames of each.
        frame_ms: length of a frame.
    """
    through, theirs = own.softmax(-1), other.detach().softmax(-1)
    probs, units = theirs.cpu().sort(dim=-1, descending=True, stable=True)
    spikes = find_spikes(units, probs, lengths.cpu(), *reach(frame_ms))
    return of_events(Samples(through.detach(), through, theirs), spikes.edges.to(own.device))


def told_apart(
    samples: Samples, weights: Mapping[str, Tensor], share: float, name: str = "judge"
) -> tuple[Tensor, Tensor]:
    """The critic's cross-entropy, and how often it is right.

    Args:
        samples: of both sides.
        weights: of the critic, as of `Judge`.
        share: what the slope of the student is multiplied by, beside being reversed.
        name: of the critic.

    Returns:
        the mean over the teacher's samples and that over the student's, added (2 log 2 by chance, 0 of no samples), nat; and the share that is told
        rightly.
    """
    student, through, teacher = samples
    # forward what the critic sees; backward the slope through what has one, reversed
    reversed_ = student.detach() - share * (through - through.detach())
    real, own = judged(teacher.detach(), weights, name), judged(reversed_, weights, name)
    loss = nn.functional.softplus(-real).sum() + nn.functional.softplus(own).sum()
    right = (real > 0).double().mean() + (own <= 0).double().mean()
    return loss / max(len(student), 1), right / 2


def judged(samples: Tensor, weights: Mapping[str, Tensor], name: str = "judge") -> Tensor:
    """Logits [samples] that samples [samples, width] are the teacher's; they differ by no more than `STEEP` times what the samples do."""
    inner, outer = (_spectral(weights[f"{name}.{layer}.weight"]) for layer in ("inner", "outer"))
    said = nn.functional.linear(samples.to(inner), inner, weights[f"{name}.inner.bias"])
    said = nn.functional.leaky_relu(said, LEAK)
    return nn.functional.linear(said, STEEP * outer, weights[f"{name}.outer.bias"])[:, 0]


def _spectral(weight: Tensor) -> Tensor:
    """The weight [outputs, inputs], divided by its largest singular value."""
    # of what is not finite no singular value is asked: the loss becomes so too, which the trainer reports
    squares = (weight @ weight.T).nan_to_num(0.0, 0.0, 0.0)
    return weight * torch.linalg.eigvalsh(squares)[-1].clamp_min(FAINTEST).rsqrt()


def _direction(states: Tensor) -> Tensor:
    """States [samples, width] of mean 0 over their dimensions, and of length 1; as `hint` has them."""
    return nn.functional.layer_norm(states, states.shape[-1:], eps=1e-8) * states.shape[-1] ** -0.5


def _roots(probs: Tensor) -> Tensor:
    return probs.clamp_min(FAINTEST).sqrt()


def coded(log_probs: Tensor, selection: Selection, levels: int) -> Tensor:
    """Probabilities [frames, units] as stored targets have them after the same labelling: those kept, rounded, and 0 elsewhere."""
    found = torch.zeros_like(log_probs)
    if not (len(log_probs) and log_probs.isfinite().all()):  # a student that has broken down is the trainer's to report
        return found
    assert selection.k is not None
    kept = SparsePosteriors.from_dense(log_probs, selection.k, selection.mass or 1.0, selection.floor or 0.0)
    codes, tails = (one.astype(np.int64) ** 2 for one in rounded(kept, levels))
    total = np.add.reduceat(codes, kept.starts) + tails
    found[kept.rows, kept.units] = torch.from_numpy(codes / total.repeat(kept.counts)).to(found)
    return found
