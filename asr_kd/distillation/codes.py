"""Feature knowledge as codes: the student guesses, frame by frame, how a quantiser coded the teacher's hidden state.

Guo et al. 2022 (arXiv 2211.00508). A code is a class of 256, so the teacher's scale and rotation do not matter, and nothing is to be
projected; a frame takes a byte a codebook on disk. Here the codes are those of a residual quantiser (`asr-kd label mode=hidden keep=codes`), each
guessed by itself.
"""

from __future__ import annotations

from torch import Tensor, nn

from asr_kd.distillation.knowledge import Knowledge, Seen
from asr_kd.models.network import Outputs
from asr_kd.targets.hidden import CODES
from asr_kd.targets.quantiser import CENTRES
from asr_kd.targets.store import metadata_of


class CodeHead(nn.Linear):
    """Logits of all codes [batch, frames, codebooks × 256], from a hidden state of the student."""

    def __init__(self, tap: str, width: int, codebooks: int) -> None:
        super().__init__(width, codebooks * CENTRES)
        self.tap = tap

    def forward(self, outputs: Outputs, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """See `Knowledge.beside`."""
        return {"codes": super().forward(outputs.hidden[self.tap])}


class Codes(Knowledge):
    """`codes`: the codes of the teacher's layer `teacher`, or of those of several teachers, from the student's layer `student`."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.taps, self.taught = (self.settings.student,), (CODES + self.settings.teacher,)
        if (
            self.task.source
        ):  # heads beside the student are shared by name: codes of another quantiser are other classes
            held = [metadata_of(folder).hidden for folder in self.task.source.target_sets]
            self.name += ":" + "-".join(str(one and one.quantiser) for one in held)

    def beside(self) -> nn.Module:
        """See `Knowledge`."""
        tap = self.settings.student
        return CodeHead(tap, self.task.model.taps[tap], self.task.taught[self.taught[0]])

    def loss(self, seen: Seen) -> Tensor:
        """See `Knowledge`."""
        logits = seen.beside["codes"].float()[seen.learned]
        return code_cross_entropy(logits, seen.parts[self.taught[0]].values)


def code_cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy of codes, the mean over the codebooks and the sum over the frames; log 256 = 5.5 nat a frame for a blind guess.

    Guo et al. sum over the codebooks; with the mean a weight means the same however many there are.

    Args:
        logits: float [frames, codebooks × 256].
        codes: int64 [frames, codebooks].
    """
    every = logits.reshape(-1, CENTRES)
    return nn.functional.cross_entropy(every, codes.reshape(-1), reduction="sum") / codes.shape[1]
