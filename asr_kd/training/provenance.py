"""What a run depends on: the content of its data, and the checkpoint it starts from."""

from __future__ import annotations

from typing import Any

from asr_kd.audio.noise import noise_files
from asr_kd.distillation.answers import check_same_input
from asr_kd.errors import UserError
from asr_kd.files import sha256_file
from asr_kd.models.acoustic import Checkpoint, OwnCheckpoint
from asr_kd.models.network import AcousticModel
from asr_kd.shards.tarset import read_index
from asr_kd.targets.moments import read_moments
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
    heard = [settings.development, *(source.audio for source in sources if source.audio)]
    audio = {str(one): one for one in heard}
    moments = {
        source.generated.moments: _checked_moments(source.generated.moments, settings, teachers[source.teachers[0]])
        for source in sources
        if source.generated and source.generated.moments
    }
    lists = {path: sha256_file(path) for source in sources for path in (source.only, source.pairs) if path}
    noises = {source.augment.noise.folder for source in sources if source.augment.noise and source.augment.noise.folder}
    return {
        "units_hash": units.hash,
        "data": {name: read_index(audio[name]).hash for name in sorted(audio)},
        "texts": {name: sha256_file(name) for source in sources for name in source.texts},
        "noises": {folder: [str(path.relative_to(folder)) for path in noise_files(folder)] for folder in noises},
        "teachers": {folder: teacher_of(folder) for source in sources for folder in source.target_sets}
        | {folder: teacher.fingerprint for folder, teacher in teachers.items()},
        "init_fingerprint": init and init.fingerprint,
        **({"lists": lists} if lists else {}),
        **({"moments": moments} if moments else {}),
    }


def _checked_moments(path: str, settings: TrainSettings, teacher: Checkpoint) -> str:
    """The hash of a file of moments; a UserError when they are of another teacher's features."""
    found = read_moments(path, settings.features.dimension)
    if found.teacher != teacher.fingerprint:
        raise UserError(
            f"generated.moments: {path} was made with teacher {found.teacher}, {teacher.fingerprint} answers; make it with that one"
        )
    return sha256_file(path)


def start_from(other: OwnCheckpoint, model: AcousticModel, settings: TrainSettings, units: Units) -> None:
    """Copy the weights of `init`, or of its `init_layers`, into a network, thinned where it has a projection or a rank and `init` does not.

    Args:
        other: the checkpoint `init`.
        model: the network, changed in place.
        settings: of the run.
        units: of the network.

    Raises:
        UserError: when the checkpoint has other units, other features, another shape, or no such layer.
    """
    check_same_input(f"init: {settings.init}", other, units, settings.features)
    layers, there = settings.init_layers, other.settings.layers
    if layers and max(layers) > there:
        raise UserError(f"init_layers: {settings.init} has no layer {max(layers)}; name layers from 1 to {there}")
    if other.settings.kind == settings.model.kind and other.settings.heads != settings.model.heads:
        raise UserError(
            f"init: {settings.init} has {other.settings.heads} heads of attention, this run's model {settings.model.heads}; set model.heads={other.settings.heads}"
        )
    if settings.model.projection and not other.settings.projection and settings.model.conditioned:
        raise UserError(
            f"init: {settings.init} is conditioned, and cannot be thinned to a projection; take model.rank, or leave out conditioned"
        )
    try:
        model.begin_as(other.model, layers)
    except RuntimeError:
        own, same = settings.model, "(but for bits, and for projection or rank where it has neither)"
        if layers:
            same = same.replace("for bits", "for layers, bits")
        elif (own.kind, own.size) == (other.settings.kind, other.settings.size) and own.layers < there:
            same += f", or say which of its {there} layers these {own.layers} begin as: init_layers={apart(own.layers, there)}"
        raise UserError(
            f"init: {settings.init} is another network than this run's model; use the same model settings {same}"
        ) from None


def apart(count: int, of: int) -> list[int]:
    """So many of the numbers from 1 to `of`, as far apart as they can be (distil-whisper, Gandhi et al. 2023, arXiv 2311.00430)."""
    return [1 + at * (of - 1) // max(count - 1, 1) for at in range(count)]
