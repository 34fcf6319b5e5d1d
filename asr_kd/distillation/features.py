"""Feature knowledge: hidden states of the student that resemble those of who answers, on frames or on events (`hidden.py`).

What is compared passes a linear projection on the student's side, trained beside it and left behind at export. A trained projection of the
teacher would collapse: both sides could become one constant, at no loss. A student that was cut from its teacher has the teacher's space, and
needs none (`projection: false`, as in DistilBERT, Sanh et al. 2019, arXiv 1910.01108).
"""

from __future__ import annotations

from torch import Tensor, nn

from asr_kd.distillation.hidden import Hidden
from asr_kd.distillation.knowledge import Seen
from asr_kd.errors import UserError
from asr_kd.models.network import Outputs

#: norms below it count as this: near 0 the cosine's gradient would grow without bound
SHORTEST = 1e-3
#: mean square of an utterance's energies at least, so that silence of all channels divides by no 0
FAINTEST = 1e-12


class Features(Hidden):
    """`features`: a layer of the student and one of who answers, compared as `match` says.

    Sources that compare the same pair in the same way share a projection, if the states are as wide: they are of one teacher, or of teachers
    that one projection can serve.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.projected = self.settings.projection and self.settings.match != "energy"
        # modules beside the student are shared by name: a projection to states of another width is another one
        if width := self.task.taught.get(self.settings.teacher):
            self.name += f":{width}"
        own = self.task.model.taps.get(self.settings.student)
        if width and own and own != width and not self.settings.projection:
            raise UserError(
                f"{self.name}: the student's {self.settings.student} is {own} wide and the teacher's {self.settings.teacher} {width}; leave out "
                "projection: false"
            )

    def beside(self) -> nn.Module | None:
        """See `Knowledge`."""
        return Projection(self.settings.student, *self.widths) if self.projected else None

    def loss(self, seen: Seen) -> Tensor:
        """See `Knowledge`; the mean over samples counts for each learned frame."""
        if self.settings.match == "energy":
            pairs = self.pairs(seen)
            return energy(pairs.student, pairs.teacher, seen.learned).sum()
        # an event is a mean with weights that add up to 1, so projected frames give the projected event
        pairs = self.pairs(seen._replace(hidden=seen.beside) if self.projected else seen)
        apart = (hint if self.settings.match == "hint" else cosine)(pairs.student, pairs.teacher)
        return apart.sum() * (len(seen.utterances) / max(len(apart), 1))


class Projection(nn.Linear):
    """A hidden state of the student on the way to the teacher's space, by the name that it has without."""

    def __init__(self, tap: str, width: int, to: int) -> None:
        super().__init__(width, to)
        self.tap = tap

    def forward(self, outputs: Outputs, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """The projected state, [batch, frames, width of the teacher]."""
        return {self.tap: super().forward(outputs.hidden[self.tap])}


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error to the normalised teacher (FitNets, Romero et al. 2015, arXiv 1412.6550), [samples].

    Each state of the teacher is brought to mean 0 and variance 1 over its dimensions, so a weight means the same for any teacher. Statistics
    of each dimension over time would need the rest of the utterance, which a streaming student has not heard, or of the batch, and
    then what is learned from an utterance would depend on its batch-mates; kept from step to step they would be a state of their own. A
    dimension that is constant costs nothing but a bias of the projection; a state that is constant is taught as 0.

    Args:
        student: float [samples, width], projected.
        teacher: float [samples, width].
    """
    # torch's own floor of the variance, 1e-5, is not small beside the states of a quiet LSTM
    normalised = nn.functional.layer_norm(teacher, teacher.shape[-1:], eps=1e-8)
    return (student - normalised).square().mean(-1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute error, and -log σ of the cosine above what equal states have (DistilHuBERT, arXiv 2110.01900), [samples].

    The teacher's states are taken as they are: the first part grows with their scale, the second does not see it.

    Args:
        student: float [samples, width], projected.
        teacher: float [samples, width].
    """
    similarity = nn.functional.cosine_similarity(student, teacher, dim=-1, eps=SHORTEST)
    equal = nn.functional.logsigmoid(similarity.new_ones(()))
    return (student - teacher).abs().mean(-1) + equal - nn.functional.logsigmoid(similarity)


def energy(student: Tensor, teacher: Tensor, learned: Tensor) -> Tensor:
    """Squared difference of where in an utterance the energy lies (attention transfer, Zagoruyko & Komodakis 2017, arXiv 1612.03928).

    The energy of a frame is the mean square over its channels, divided by its root mean square over the utterance's learned frames: the
    widths may differ, and neither scale nor length matters. Summed over an utterance of T frames, it is T times what vectors of
    norm 1 differ by.

    Args:
        student: float [learned frames, width].
        teacher: float [learned frames, width of the teacher].
        learned: bool [batch, frames].

    Returns:
        float [batch, frames], 0 where nothing is learned.
    """
    return (_over_time(student, learned) - _over_time(teacher, learned)).square()


def _over_time(states: Tensor, learned: Tensor) -> Tensor:
    rows = states.square().mean(-1)
    energies = rows.new_zeros(learned.shape).masked_scatter(learned, rows)
    frames = learned.sum(1, keepdim=True).clamp_min(1)
    return energies * (energies.square().sum(1, keepdim=True) / frames).clamp_min(FAINTEST).rsqrt()
