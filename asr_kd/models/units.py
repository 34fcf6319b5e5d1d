"""Job `units`: learned from text, or those that a teacher has."""

from __future__ import annotations

from asr_kd.files import claim_folder, place, write_whole
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.texts import train_units
from asr_kd.summary import tell_summary
from asr_kd.units import MODEL_FILE


def make_units(settings: UnitsSettings) -> None:
    """Write units: those of a teacher, or new ones learned from text (`train_units`); a UserError of either."""
    if not settings.teacher:
        train_units(settings)
        return
    # torch, which text does not need
    from asr_kd.models.outside.vocabulary import unreached
    from asr_kd.models.teachers import load_teacher

    teacher = load_teacher(settings.teacher)
    claim_folder(settings.output, "units", {"teacher": teacher.fingerprint})
    with write_whole(place(settings.output) / MODEL_FILE, make_folder=False) as file:
        file.write(teacher.units.model)
    tell_summary(settings.output, figures={"units": teacher.units.size})
    print(f"{settings.output}: the {teacher.units.size} units of {settings.teacher}, the blank among them")
    if lost := unreached(teacher.vocabulary):
        print(f"{settings.teacher}: {lost}")
