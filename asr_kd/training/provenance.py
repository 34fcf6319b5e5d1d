"""What a run depends on: the content of its data, and the checkpoint it starts from."""

from __future__ import annotations

from typing import Any

from torch import nn

from asr_kd.audio.noise import noise_files
from asr_kd.distillation.answers import check_same_input
from asr_kd.errors import UserError
from asr_kd.files import sha256_file
from asr_kd.models.acoustic import Checkpoint
from asr_kd.shards.tarset import read_index
from asr_kd.targets.store import teacher_of
from asr_kd.training.settings import TrainSettings
from asr_kd.units import Units


def provenance(
    settings: TrainSettings, units: Units, init: Checkpoint | None, teachers: dict[str, Checkpoint]
) -> dict[str, Any]:
    """Hashes of the run's data, so that resuming on other data is refused.

    Args:
        settings: of the run.
        units: of the learner.
        init: what the run starts from.
        teachers: by folder, those that answer in the step.
    """
    sources = [source for phase in settings.phases for source in phase.sources]
    audio = sorted({settings.development, *(source.audio for source in sources)})
    noises = {source.augment.noise.folder for source in sources if source.augment.noise and source.augment.noise.folder}
    return {
        "units_hash": units.hash,
        "data": {folder: read_index(folder).hash for folder in audio},
        "texts": {source.transcripts: sha256_file(source.transcripts) for source in sources if source.transcripts},
        "noises": {folder: [str(path.relative_to(folder)) for path in noise_files(folder)] for folder in noises},
        "teachers": {folder: teacher_of(folder) for source in sources for folder in source.target_sets}
        | {folder: teacher.fingerprint for folder, teacher in teachers.items()},
        "init_fingerprint": init and init.fingerprint,
    }


def start_from(other: Checkpoint, model: nn.Module, settings: TrainSettings, units: Units) -> None:
    """Copy the weights of `init` into a network.

    Args:
        other: the checkpoint `init`.
        model: the network, changed in place.
        settings: of the run.
        units: of the network.

    Raises:
        UserError: when the checkpoint has other units, other features or another shape.
    """
    check_same_input(f"init: {settings.init}", other, units, settings.features)
    try:
        model.load_state_dict(other.model.state_dict())
    except RuntimeError:
        raise UserError(
            f"init: {settings.init} is another network than this run's model; use the same model settings"
        ) from None
