"""Who answers in the step what the student is to learn: a checkpoint (online), the run's own moving average or last cycle, or another run.

Stored answers come with the batch, from the loader; these are made of its clean features. All fill the same parts, so a loss does not
know who has answered. A peer, which is trained too, stands beside the student: `Knowledge.beside`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim.swa_utils import AveragedModel

from asr_kd.audio.settings import FeatureSettings, SoundSettings
from asr_kd.config.schedule import value_at
from asr_kd.distillation.batch import Batch, Part
from asr_kd.distillation.knowledge import Knowledge, Lesson, Pupil
from asr_kd.distillation.settings import SourceSettings
from asr_kd.distillation.stored import stored_taps
from asr_kd.errors import UserError
from asr_kd.models.acoustic import Checkpoint, read_model_settings
from asr_kd.models.network import Outputs
from asr_kd.models.settings import ModelSettings
from asr_kd.targets.combine import CombineMode
from asr_kd.units import Units

#: the names of the run's own moving average among the teachers, and of the best weights at the end of its last cycle
AVERAGE, CYCLE = "average", "cycle"
#: part with the log-probabilities [learned frames, units] of a teacher that hears what the step has made, with their gradient by that
SAID = "said"
#: teachers that the run makes
OWN = frozenset({AVERAGE, CYCLE})
#: no teachers from outside
NO_ONE: Mapping[str, Foreign] = MappingProxyType({})


class Foreign(NamedTuple):
    """What the loader must know of a teacher from outside: the sound that it hears, and its hidden states with their widths."""

    sound: SoundSettings
    taps: dict[str, int]


def foreigners(online: Mapping[str, Checkpoint]) -> dict[str, Foreign]:
    """Those of the teachers, by name, that are from outside."""
    return {
        name: Foreign(cast(SoundSettings, one.features), one.model.taps)
        for name, one in online.items()
        if one.model.hears_sound
    }


def answer(networks: Mapping[str, nn.Module], batch: Batch, lesson: Lesson, done: float = 0.0) -> dict[str, Part]:
    """What the teachers of a source make of the clean features of a batch; draws no random numbers.

    Args:
        networks: those that can answer, by name.
        batch: with clean features, on their device.
        lesson: of the batch's source.
        done: share of the phase's audio that was heard.

    Returns:
        soft targets with all units, of several teachers combined; and the hidden states that are asked for, of several
        teachers one beside the other. A row per learned frame each. They have no gradient; where the clean features have one, it is in `SAID`.
    """
    assert batch.clean is not None
    made = batch.clean.requires_grad
    source = lesson.source
    temperature, learned = value_at(source.temperature, done), batch.learned
    log_probs, hidden = [], []
    # cuDNN has no gradient through a recurrent network that is not in training
    with torch.set_grad_enabled(made), torch.backends.cudnn.flags(enabled=False) if made else nullcontext():
        for name in source.teachers:
            outputs = _said(networks[name].eval(), batch, batch.clean, lesson.taught)
            log_probs.append((outputs.logits.float()[learned] / temperature).log_softmax(-1))
            hidden.append(outputs.hidden)
    with torch.no_grad():
        weights = torch.tensor(source.combine.numbers(len(log_probs)), device=learned.device)
        probs, units = _combined(torch.stack(log_probs), weights / weights.sum(), source.combine.mode).sort(
            -1, descending=True
        )
        parts = {
            f"hidden.{tap}": Part(torch.cat([one[tap][learned].float() for one in hidden], -1)) for tap in lesson.taught
        }
    tail, whole = probs.new_zeros(len(probs)), probs.new_full((1, probs.shape[1]), 1 / probs.shape[1])
    parts |= {"soft.units": Part(units), "soft.probs": Part(probs), "soft.tail": Part(tail)}
    parts |= {SAID: Part(log_probs[0])} if made else {}
    return parts | {"soft.priors": Part(whole, whole=True)}


def _said(network: nn.Module, batch: Batch, clean: Tensor, taps: Sequence[str]) -> Outputs:
    """What a network makes of a batch: of its features, or of its sound, frame by frame of the features.

    The frames of a teacher from outside begin where those of the features do, and there may be one more or one less, whose place its
    neighbour takes.
    """
    outputs: Outputs
    if not getattr(network, "hears_sound", False):
        outputs = network(clean, batch.lengths, taps)
        return outputs
    sound = batch.parts["sound"]
    assert sound.lengths is not None
    rows = pad_sequence(list(sound.values.split(sound.lengths.tolist())), batch_first=True)
    outputs = network(rows[..., None], sound.lengths, taps)
    frames = torch.arange(clean.shape[1]).minimum(outputs.lengths[:, None] - 1).to(clean.device)  # [batch, frames]
    at = torch.arange(len(frames), device=clean.device)[:, None]
    hidden = {tap: states[at, frames] for tap, states in outputs.hidden.items()}
    return Outputs(outputs.logits[at, frames], batch.lengths, hidden)


def _combined(log_probs: Tensor, weights: Tensor, mode: CombineMode) -> Tensor:
    """Probabilities [frames, units] of several teachers together, as `targets.combine.combine` has them; weights add up to 1."""
    if len(log_probs) == 1:
        return log_probs[0].exp()
    by_frame = weights[:, None, None]
    if mode == "log_mean":
        return (by_frame * log_probs).sum(0).softmax(-1)
    if mode in ("confidence", "surest"):
        by_frame = by_frame * (log_probs.exp() * log_probs).sum(-1, keepdim=True).exp()
        surest = torch.arange(len(log_probs), device=log_probs.device)[:, None, None] == by_frame.argmax(0)
        by_frame = surest.float() if mode == "surest" else by_frame / by_frame.sum(0)
    return (by_frame * log_probs.exp()).sum(0)


def prepare_answers(batch: Batch, kinds: Sequence[Knowledge]) -> None:
    """Add to a batch what kinds make of the answers that it has: as in the loader, on the CPU, and back on its device."""
    makers = [kind for kind in kinds if type(kind).prepare is not Knowledge.prepare]
    if not makers:
        return
    device, rng = batch.features.device, np.random.default_rng(batch.draws)
    # nothing else of it is looked at, so that nothing else leaves a GPU
    there = {name: part for name, part in batch.parts.items() if name.startswith("soft.")}
    here = replace(batch, features=batch.features[:, :0], clean=None, parts=there).to(torch.device("cpu"))
    for kind in makers:
        kind.prepare((), here, rng)
    made = {name: part for name, part in here.parts.items() if name not in there}
    batch.parts |= {name: part._replace(values=part.values.to(device)) for name, part in made.items()}


def taught_by(
    source: SourceSettings, student: ModelSettings, foreign: Mapping[str, Foreign] = NO_ONE
) -> dict[str, int]:
    """Hidden states of who answers, with their widths: those that are stored, or those that all who answer in the step have, together.

    Args:
        source: names them; without targets or a teacher, or with one that is another run, there are none.
        student: the network that is trained, of which the run's own teachers are others.
        foreign: teachers from outside.
    """
    if source.targets:
        return stored_taps(source)
    if source.runs:
        return {}
    found = [
        foreign[name].taps if name in foreign else (student if name in OWN else read_model_settings(name)).taps
        for name in source.teachers
    ]
    common = [tap for tap in found[0] if all(tap in one for one in found)] if found else []
    return {tap: sum(one[tap] for one in found) for tap in common}


def answerers(online: dict[str, Checkpoint], average: AveragedModel | None) -> dict[str, nn.Module]:
    """The networks that can answer in the step, by name: checkpoints by folder, frozen, and the moving average, if there is one."""
    found: dict[str, nn.Module] = {
        folder: checkpoint.model.requires_grad_(False) for folder, checkpoint in online.items()
    }
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
            f"{name} has units {checkpoint.units.hash}, this run {units.hash}; take a checkpoint with the same units, or give the run that "
            "one's (asr-kd units teacher=…)"
        )
    heard = checkpoint.features
    if checkpoint.model.hears_sound:
        if heard.frame_ms != features.frame_ms or 2 * abs(heard.offset_ms) > heard.frame_ms:
            raise UserError(
                f"{name} has frames of {heard.frame_ms} ms from {heard.offset_ms} ms on, this run of {features.frame_ms} ms; give the run "
                f"features of its frames{otherwise}"
            )
    elif heard != features:
        raise UserError(f"{name} hears other features than this run; give the run its `features`{otherwise}")
