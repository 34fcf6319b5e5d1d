"""Hidden states that `asr-kd label mode=hidden` has stored: what of them a source can learn."""

from __future__ import annotations

from typing import NamedTuple

from asr_kd.distillation.kind_settings import CodesSettings, CriticSettings
from asr_kd.distillation.settings import Asked, SourceSettings
from asr_kd.errors import UserError
from asr_kd.targets.hidden import CODES, HiddenDescription
from asr_kd.targets.quantiser import Quantiser, read_quantiser
from asr_kd.targets.store import metadata_of


class Held(NamedTuple):
    """What the targets of one teacher hold of its hidden states, and what decodes them, if they are codes."""

    description: HiddenDescription
    quantiser: Quantiser | None = None


def stored_hidden(source: SourceSettings) -> list[Held]:
    """What the sets of targets of a source hold, in their order; empty where nothing is learned from hidden states.

    Raises:
        UserError: when a set holds none, or none of the kind that is learned from.
    """
    asked = [one for one in source.knowledge() if "hidden" in one.needs]
    return [_held(folder, asked, len(source.target_sets) > 1) for folder in source.target_sets] if asked else []


def _held(folder: str, asked: list[Asked], several: bool) -> Held:
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
        elif held.keep == "codes" and isinstance(one.settings, CriticSettings):
            raise UserError(
                f"targets: {folder} holds codes of hidden states, which {one.name} would tell from a student's by what they have lost; label with "
                "keep=events or keep=frames"
            )
        elif held.keep == "events" and getattr(one.settings, "samples", "frames") != "events":
            raise UserError(
                f"targets: {folder} holds hidden states of the teacher's spikes alone, {one.name} compares frames; set samples: events, or "
                "label with keep=frames"
            )
    if held.keep == "events" and several:
        raise UserError(
            f"targets: {folder} holds hidden states of its own teacher's spikes, and several teachers together have others; label with keep=frames "
            "or keep=codes"
        )
    return Held(held, read_quantiser(folder, held.quantiser) if held.quantiser else None)


def stored_taps(source: SourceSettings) -> dict[str, int]:
    """Stored hidden states that all sets have, with their widths together, and where all are codes also those, `codes.` and the name, with
    their codebooks together."""
    sets = [held for held, _ in stored_hidden(source)]
    common = [tap for tap in sets[0].taps if all(tap in one.taps for one in sets)] if sets else []
    states = {tap: sum(one.taps[tap] for one in sets) for tap in common}
    if not all(one.codebooks for one in sets):
        return states
    return states | {CODES + tap: sum(one.codebooks or 0 for one in sets) for tap in common}
