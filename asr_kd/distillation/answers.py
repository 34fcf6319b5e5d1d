"""Who answers in the step what the student is to learn: a checkpoint (online), the run's own moving average, or its last cycle.

Stored answers come with the batch, from the loader; these are made of its clean features. All fill the same parts, so a loss does not
know who has answered. A peer, which is trained too, stands beside the student: `Knowledge.beside`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from asr_kd.audio.settings import FeatureSettings
from asr_kd.config.schedule import value_at
from asr_kd.distillation.batch import Batch, Part
from asr_kd.distillation.knowledge import Knowledge, Lesson, Pupil
from asr_kd.distillation.settings import SourceSettings
from asr_kd.distillation.stored import stored_taps
from asr_kd.errors import UserError
from asr_kd.models.acoustic import Checkpoint, read_model_settings
from asr_kd.models.settings import ModelSettings
from asr_kd.targets.combine import CombineMode
from asr_kd.units import Units

#: the names of the run's own moving average among the teachers, and of the best weights at the end of its last cycle
AVERAGE, CYCLE = "average", "cycle"
#: teachers that the run makes
OWN = frozenset({AVERAGE, CYCLE})


def answer(networks: Mapping[str, nn.Module], batch: Batch, lesson: Lesson, done: float = 0.0) -> dict[str, Part]:
    """What the teachers of a source make of the clean features of a batch; draws no random numbers.

    Args:
        networks: those that can answer, by name.
        batch: with clean features, on their device.
        lesson: of the batch's source.
        done: share of the phase's audio that was heard.

    Returns:
        soft targets with all units, of several teachers combined; and the hidden states that are asked for, of several
        teachers one beside the other. A row per learned frame each.
    """
    assert batch.clean is not None
    source = lesson.source
    temperature, learned = value_at(source.temperature, done), batch.learned
    log_probs, hidden = [], []
    with torch.no_grad():
        for name in source.teachers:
            outputs = networks[name].eval()(batch.clean, batch.lengths, lesson.taught)
            log_probs.append((outputs.logits.float()[learned] / temperature).log_softmax(-1))
            hidden.append(outputs.hidden)
        weights = torch.tensor(source.combine.weights or [1.0] * len(log_probs), device=learned.device)
        probs, units = _combined(torch.stack(log_probs), weights / weights.sum(), source.combine.mode).sort(
            -1, descending=True
        )
        parts = {
            f"hidden.{tap}": Part(torch.cat([one[tap][learned].float() for one in hidden], -1)) for tap in lesson.taught
        }
    tail, whole = probs.new_zeros(len(probs)), probs.new_full((1, probs.shape[1]), 1 / probs.shape[1])
    parts |= {"soft.units": Part(units), "soft.probs": Part(probs), "soft.tail": Part(tail)}
    return parts | {"soft.priors": Part(whole, whole=True)}


def _combined(log_probs: Tensor, weights: Tensor, mode: CombineMode) -> Tensor:
    """Probabilities [frames, units] of several teachers together, as `targets.combine.combine` has them; weights add up to 1."""
    if len(log_probs) == 1:
        return log_probs[0].exp()
    by_frame = weights[:, None, None]
    if mode == "log_mean":
        return (by_frame * log_probs).sum(0).softmax(-1)
    if mode == "confidence":
        by_frame = by_frame * (log_probs.exp() * log_probs).sum(-1, keepdim=True).exp()
        by_frame = by_frame / by_frame.sum(0)
    return (by_frame * log_probs.exp()).sum(0)


def prepare_answers(batch: Batch, kinds: Sequence[Knowledge]) -> None:
    """Add to a batch what kinds make of the answers that it has: as in the loader, on the CPU, and back on its device."""
    makers = [kind for kind in kinds if type(kind).prepare is not Knowledge.prepare]
    if not makers:
        return
    device, there = batch.features.device, set(batch.parts)
    here, rng = batch.to(torch.device("cpu")), np.random.default_rng(batch.draws)
    for kind in makers:
        kind.prepare((), here, rng)
    made = {name: part for name, part in here.parts.items() if name not in there}
    batch.parts |= {name: part._replace(values=part.values.to(device)) for name, part in made.items()}


def taught_by(source: SourceSettings, student: ModelSettings) -> dict[str, int]:
    """Hidden states of who answers, with their widths: those that are stored, or those that all who answer in the step have, together.

    Args:
        source: names them; without targets or a teacher there are none.
        student: the network that is trained, of which the run's own teachers are others.
    """
    if source.targets:
        return stored_taps(source)
    found = [(student if name in OWN else read_model_settings(name)).taps for name in source.teachers]
    common = [tap for tap in found[0] if all(tap in one for one in found)] if found else []
    return {tap: sum(one[tap] for one in found) for tap in common}


def answerers(online: dict[str, Checkpoint], average: AveragedModel | None) -> dict[str, nn.Module]:
    """The networks that can answer in the step, by name: checkpoints by folder, and the moving average, if there is one."""
    found: dict[str, nn.Module] = {folder: checkpoint.model for folder, checkpoint in online.items()}
    if average is not None:
        found[AVERAGE] = cast(Pupil, average.module).student
    return found


def check_same_input(
    name: str, checkpoint: Checkpoint, units: Units, features: FeatureSettings, otherwise: str = ""
) -> None:
    """Refuse a checkpoint that does not fit a run.

    Args:
        name: setting and folder of the checkpoint.
        units: of the run.
        features: of the run.
        otherwise: what else can be done about other features, for the message.

    Raises:
        UserError: when its units or its features are not those of the run.
    """
    if checkpoint.units.hash != units.hash:
        raise UserError(
            f"{name} has units {checkpoint.units.hash}, this run {units.hash}; take a checkpoint with the same units"
        )
    if checkpoint.features != features:
        raise UserError(f"{name} hears other features than this run; give the run its `features`{otherwise}")
