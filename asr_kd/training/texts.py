"""Can the units write what the development set says? Asked before the first step, for a WER against other letters means nothing."""

from __future__ import annotations

from collections import Counter

from asr_kd.config import TrainSettings
from asr_kd.errors import UserError
from asr_kd.files import place
from asr_kd.shards.tarset import read_index, read_shard
from asr_kd.units import Units

#: characters that a message names at most
NAMED = 10


def check_development(settings: TrainSettings, units: Units) -> list[str]:
    """Compare the texts of the development set with the units.

    Returns:
        a sentence each on the texts that hold a character that no unit covers, and on those that the units write otherwise.

    Raises:
        UserError: when a text is missing, or more of them than `max_bad_share` cannot be written.
    """
    folder = settings.development
    total = changed = 0
    odd: Counter[str] = Counter()
    bad: list[tuple[str, str]] = []  # key and text
    first = ""
    for shard in read_index(folder):
        for sample in read_shard(place(folder) / shard.name):
            if "text" not in sample.fields:
                raise UserError(f"{folder}: {sample.key} has no text; the development set must be labelled")
            text = sample.fields["text"]
            total += 1
            if found := units.unwritable(text):
                bad.append((sample.key, text))
                odd.update("".join(found))
            elif units.changes(text):
                changed += 1
                first = first or f"{sample.key}: {text[:60]!a} is read as {units.written(text)[:60]!a}"
    said = []
    if bad:
        named = ", ".join(repr(one) for one, _ in odd.most_common(NAMED)) + (" …" if len(odd) > NAMED else "")
        what = (
            f"{folder}: the texts of {len(bad):,} of {total:,} utterances ({len(bad) / total:.1%}; first: {bad[0][0]}) hold "
            f"characters that no unit covers: {named}"
        )
        if len(bad) > settings.max_bad_share * total:
            raise UserError(
                f"{what}; {_remedy(units, [text for _, text in bad])}, or raise max_bad_share ({settings.max_bad_share})"
            )
        said.append(f"{what}; their words count as errors")
    if changed:
        said.append(f"{folder}: {changed:,} of {total:,} texts are read in another spelling (first: {first})")
    return said


def _remedy(units: Units, texts: list[str]) -> str:
    small = sum(not units.unwritable(text.lower()) for text in texts)
    if small > len(texts) / 2:
        return "the units know small letters alone: prepare this set again with normalizer=basic"
    if sum(not units.unwritable(text.upper()) for text in texts) > len(texts) / 2:
        return "the units know capitals alone: make units and all sets of shards again, with normalizer=basic for each"
    return "write them as the texts that the units were made from (prepare both with the same normalizer), or make units from both"
