"""Hidden states that `asr-kd label mode=hidden` has stored: what of them a source can learn."""

from __future__ import annotations

from asr_kd.distillation.settings import CodesSettings, SourceSettings
from asr_kd.errors import UserError
from asr_kd.targets.hidden import CODES, HiddenDescription
from asr_kd.targets.quantiser import Quantiser, read_quantiser
from asr_kd.targets.store import metadata_of


def stored_hidden(source: SourceSettings) -> tuple[HiddenDescription | None, Quantiser | None]:
    """What the targets of a source hold of hidden states, and what decodes them, where something is learned from them.

    Raises:
        UserError: when the targets hold none, or none of the kind that is learned from.
    """
    asked = [one for one in source.knowledge() if "hidden" in one.needs]
    if not asked or not source.targets:
        return None, None
    (folder,) = source.target_sets
    held = metadata_of(folder).hidden
    if held is None:
        raise UserError(
            f"targets: {folder} holds no hidden states, which {asked[0].name} learns from; label the audio with mode=hidden"
        )
    for one in asked:
        if isinstance(one.settings, CodesSettings):
            if held.keep != "codes":
                raise UserError(
                    f"targets: {folder} holds {held.keep} of hidden states, {one.name} learns codes; label with keep=codes"
                )
        elif held.keep == "events" and getattr(one.settings, "samples", "frames") != "events":
            raise UserError(
                f"targets: {folder} holds hidden states of the teacher's spikes alone, {one.name} compares frames; set samples: events, or "
                "label with keep=frames"
            )
    return held, read_quantiser(folder, held.quantiser) if held.quantiser else None


def stored_taps(source: SourceSettings) -> dict[str, int]:
    """Stored hidden states, with their widths, and where they are codes also those, `codes.` and the name, with their codebooks."""
    held, _ = stored_hidden(source)
    if held is None:
        return {}
    return held.taps | {CODES + tap: held.codebooks for tap in held.taps if held.codebooks}
