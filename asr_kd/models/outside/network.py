"""A network from outside: sound in, log-probabilities of our units out."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from asr_kd.audio.settings import SoundSettings
from asr_kd.config.knobs import Precision
from asr_kd.errors import UserError
from asr_kd.files import hash_json
from asr_kd.models.acoustic import Checkpoint
from asr_kd.models.network import AcousticModel, Outputs
from asr_kd.models.outside.vocabulary import Vocabulary
from asr_kd.models.settings import OutsideSettings

#: log-probability of a unit that no output of the network stands for
NEVER = -30.0


class OutsideModel(AcousticModel):
    """A network that hears sound, with a front end and a vocabulary of its own; a family says how it is run (`hear`, `frames`).

    Padding changes what most such networks say, by normalisation over time or by attention to it. So utterances run together where they
    are exactly as long, and else alone, unless the family is known to be safe: what is said of an utterance does not depend on its batch.

    Args:
        vocabulary: which output stands for which unit.
        taps: hidden states that can be asked for, with their widths.
        pads: whether utterances of different lengths may run together.
    """

    lookahead_frames = None
    hears_sound = True
    units_of: Tensor
    columns: Tensor
    #: of the network, not of what it is given: the front end is exact
    precision: Precision = "float32"

    def __init__(self, vocabulary: Vocabulary, taps: dict[str, int], pads: bool) -> None:
        super().__init__()
        self.taps, self.pads, self.num_units = taps, pads, vocabulary.units.size
        columns = torch.tensor(vocabulary.columns)
        # of the outputs that stand for a unit: their numbers, and the unit of each; no weights
        self.register_buffer("columns", (columns >= 0).nonzero()[:, 0], persistent=False)
        self.register_buffer("units_of", columns[columns >= 0], persistent=False)

    def arithmetic(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context that the network runs in; of float32 that around it, as of a step of training."""
        return nullcontext() if self.precision == "float32" else torch.autocast(device.type, torch.bfloat16)

    @abstractmethod
    def hear(self, sounds: list[Tensor], taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The network's own outputs.

        Args:
            sounds: float32 [samples] of each utterance; of one length, unless `pads`.
            taps: names of hidden states to return.

        Returns:
            logits [utterances, frames, columns], at least `frames` of each, and hidden states [utterances, frames, width] by tap.
        """

    @abstractmethod
    def frames(self, rows: int) -> int:
        """Output frames of an utterance of so many samples."""

    def forward(self, features: Tensor, lengths: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """See `AcousticModel.forward`; features: float32 [batch, samples, 1]. The logits are normalised log-probabilities."""
        samples = lengths.tolist()
        logits: list[Tensor] = [features] * len(samples)
        hidden: dict[str, list[Tensor]] = {tap: list(logits) for tap in taps}
        for batch in self._together(samples):
            said, states = self.hear([features[index, : samples[index], 0] for index in batch], taps)
            log_probs = self._of_units(said)
            for row, index in enumerate(batch):
                frames = self.frames(samples[index])
                logits[index] = log_probs[row, :frames]
                for tap in taps:
                    hidden[tap][index] = states[tap][row, :frames]
        padded = {tap: pad_sequence(rows, batch_first=True) for tap, rows in hidden.items()}
        return Outputs(pad_sequence(logits, batch_first=True), torch.tensor([len(one) for one in logits]), padded)

    def _together(self, samples: list[int]) -> list[list[int]]:
        """Positions of the utterances that run together."""
        if self.pads:
            return [list(range(len(samples)))]
        found: dict[int, list[int]] = {}
        for index, count in enumerate(samples):
            found.setdefault(count, []).append(index)
        return list(found.values())

    def _of_units(self, logits: Tensor) -> Tensor:
        """Log-probabilities of units; the mass of outputs that stand for none is spread over the others in proportion."""
        log_probs = logits.float().index_select(-1, self.columns).log_softmax(-1)
        found = log_probs.new_full((*log_probs.shape[:-1], self.num_units), NEVER)
        found[..., self.units_of] = log_probs
        return found


def exactly() -> AbstractContextManager[Any]:
    """The context of a front end, which runs on the CPU, whatever the arithmetic of the networks around it."""
    return torch.autocast("cpu", enabled=False)


def strided(count: int, layers: Iterable[tuple[int, int, int]]) -> int:
    """What convolutions of (kernel, stride, padding on both sides together) leave of so many frames."""
    for kernel, stride, padding in layers:
        count = max(0, (count + padding - kernel) // stride + 1)
    return count


def finished(
    model: OutsideModel,
    vocabulary: Vocabulary,
    features: SoundSettings,
    settings: OutsideSettings,
    said: Any,
    name: str,
) -> Checkpoint:
    """The teacher, with its fingerprint.

    Args:
        model: with its weights.
        vocabulary: of its outputs.
        features: what sound it is given.
        settings: what it is.
        said: all that changes its output besides, as JSON.
        name: of the teacher, for messages.

    Raises:
        UserError: when its weights are not numbers.
    """
    digest = hashlib.sha256()
    for key, weight in sorted(model.state_dict().items()):
        if not bool(weight.isfinite().all()):
            raise UserError(f"{name}: has weights that are not numbers (NaN or infinite); give another model")
        digest.update(key.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    made = {
        "weights": digest.hexdigest(),
        "units": vocabulary.units.hash,
        "columns": vocabulary.columns,
        "settings": said,
    }
    model.requires_grad_(False).eval()
    mark = hash_json({"sound": features.model_dump(), **made})
    return Checkpoint(model, vocabulary.units, features, settings, mark, vocabulary=vocabulary.described())
