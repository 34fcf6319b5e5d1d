"""Can the units spell the texts? Checked before the first step: a WER against texts they cannot spell means nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from asr_kd.errors import UserError
from asr_kd.files import place
from asr_kd.shards.tarset import read_index, read_shard
from asr_kd.training.settings import TrainSettings
from asr_kd.training.sources import Source
from asr_kd.units import Units

#: characters listed in a message at most
NAMED = 10
#: utterances of a source that are checked before training; the others are counted as they are read
LOOKED_AT = 500


@dataclass
class Spelling:
    """How the units spell a set of texts.

    Attributes:
        bad: key and text of those that the units cannot spell.
        odd: characters that no unit covers, with their counts.
        silent: number of texts without words.
        changed: number of texts that the units spell differently.
        first: the first of those, as a phrase for a message.
    """

    total: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    odd: Counter[str] = field(default_factory=Counter)
    silent: int = 0
    changed: int = 0
    first: str = ""


def spelling_of(texts: Iterable[tuple[str, str]], units: Units) -> Spelling:
    """How the units spell these (key, text) pairs."""
    found = Spelling()
    for key, text in texts:
        found.total += 1
        if odd := units.unwritable(text):
            found.bad.append((key, text))
            found.odd.update("".join(odd))
            continue
        found.silent += not units.encode(text)
        if units.changes(text):
            found.changed += 1
            found.first = found.first or f"{key}: {text[:60]!a} is read as {units.written(text)[:60]!a}"
    return found


def check_texts(settings: TrainSettings, units: Units, sources: Iterable[Source]) -> list[str]:
    """The remarks of `check_development`, and of `check_source` on every set of audio and transcripts once.

    Raises:
        UserError: as of both.
    """
    once = {
        (source.plan.audio, source.plan.transcripts): source for source in sources if source.needs & {"text", "lists"}
    }
    return check_development(settings, units) + [one for source in once.values() for one in check_source(source)]


def check_development(settings: TrainSettings, units: Units) -> list[str]:
    """Compare the texts of the development set with the units.

    Returns:
        a sentence on texts with characters that no unit covers, and one on texts that the units spell differently, if any.

    Raises:
        UserError: when a text is missing, none holds a word, or all or more than `max_bad_share` of them cannot be spelled.
    """
    folder = settings.development

    def texts() -> Iterator[tuple[str, str]]:
        for shard in read_index(folder):
            for sample in read_shard(place(folder) / shard.name):
                if "text" not in sample.fields:
                    raise UserError(f"{folder}: {sample.key} has no text; the development set must be labelled")
                yield sample.key, sample.fields["text"]

    found = spelling_of(texts(), units)
    if found.silent == found.total:
        raise UserError(f"{folder}: holds no words; the development set must be labelled")
    most = min(settings.max_bad_share * found.total, found.total - 1)
    return _remarks(folder, found, units, settings, most, "their words count as errors")


def check_source(source: Source) -> list[str]:
    """The same for the first texts of a source; training leaves out texts that cannot be spelled.

    Raises:
        UserError: when none can be spelled, or already more than `max_bad_share` of the whole source cannot.
    """
    name, first = source.plan.transcripts or source.plan.audio, source.shards[0]

    def texts() -> Iterator[tuple[str, str]]:
        samples = read_shard(place(source.plan.audio) / first.name)
        for sample in itertools.islice(samples, LOOKED_AT):
            text = sample.fields.get("text") if source.transcripts is None else source.transcripts.get(sample.key)
            if text is not None:
                yield sample.key, text

    found = spelling_of(texts(), source.units)
    most = source.settings.max_bad_share * source.shards.samples
    if source.settings.max_bad_share < 1:
        most = min(most, found.total - 1)
    return _remarks(name, found, source.units, source.settings, most, "these utterances are left out")


def _remarks(name: str, found: Spelling, units: Units, settings: TrainSettings, most: float, then: str) -> list[str]:
    said = []
    if found.bad:
        named = ", ".join(repr(one) for one, _ in found.odd.most_common(NAMED)) + " …" * (len(found.odd) > NAMED)
        what = (
            f"{name}: the texts of {len(found.bad):,} of {found.total:,} utterances ({len(found.bad) / found.total:.1%}; first: "
            f"{found.bad[0][0]}) hold characters that no unit covers: {named}"
        )
        if len(found.bad) > most:
            remedy = _remedy(units, [text for _, text in found.bad])
            if len(found.bad) < found.total:
                remedy += f", or raise max_bad_share ({settings.max_bad_share})"
            raise UserError(f"{what}; {remedy}")
        said.append(f"{what}; {then}")
    if found.silent == found.total > 0:
        said.append(
            f"{name}: none of the {found.total:,} texts looked at holds a word; only silence is learned from them"
        )
    if found.changed:
        said.append(
            f"{name}: {found.changed:,} of {found.total:,} texts are read in another spelling (first: {found.first})"
        )
    return said


def _remedy(units: Units, texts: list[str]) -> str:
    if sum(not units.unwritable(text.lower()) for text in texts) > len(texts) / 2:
        return "the units know small letters alone: prepare this set again with normalizer=basic"
    if sum(not units.unwritable(text.upper()) for text in texts) > len(texts) / 2:
        return "the units know capitals alone: make units and all sets of shards again, with normalizer=basic for each"
    return "write them as the texts that the units were made from (prepare both with the same normalizer), or make units from both"
