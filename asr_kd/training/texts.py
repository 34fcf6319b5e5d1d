"""Can the units spell the texts? Checked before the first step: a WER against texts they cannot spell means nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator

from asr_kd.errors import UserError
from asr_kd.shards.keys import check_keys
from asr_kd.shards.tarset import read_index, read_listed
from asr_kd.training.settings import TrainSettings
from asr_kd.training.sources import Source
from asr_kd.units import Units

#: characters listed in a message at most
NAMED = 10
#: utterances of a source that are checked before training; the others are counted as they are read
LOOKED_AT = 500


def check_texts(settings: TrainSettings, units: Units, sources: Iterable[Source], show: bool = True) -> list[str]:
    """The remarks of `check_development`, and of `check_source` on every set of audio and transcripts once.

    Args:
        settings: of the run.
        units: of the learner.
        sources: all of them.
        show: whether progress is shown.

    Raises:
        UserError: as of both; and when transcripts, which go by key, give two utterances the same text.
    """
    written = [source for source in sources if source.needs & {"text", "lists"}]
    once = {
        (source.plan.name, source.plan.transcripts, source.plan.only or source.plan.pairs): source for source in written
    }
    for source in once.values():
        if source.transcripts and not source.chosen:  # a list of utterances has each key once
            name = f"transcripts {source.plan.transcripts}"
            check_keys(source.audio, source.shards, name, source.transcripts.__contains__, show)
    return check_development(settings, units) + [one for source in once.values() for one in check_source(source)]


def left_out(sources: Iterable[Source]) -> list[str]:
    """A sentence on every list by which utterances of a source are left out."""
    lists = {(source.plan.name, str(source.chosen.path)): source for source in sources if source.chosen}
    return [
        f"{audio}: {source.shards.samples:,} utterances are kept by {path}, {source.shards.seconds / 3600:.2f} hours; "
        f"{source.chosen.left_out:,} are left out"
        for (audio, path), source in lists.items()
        if source.chosen
    ]


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
            for sample in read_listed(folder, shard):
                if "text" not in sample.fields:
                    raise UserError(f"{folder}: {sample.key} has no text; the development set must be labelled")
                yield sample.key, sample.fields["text"]

    return _remarks(str(folder), texts(), units, settings.max_bad_share)


def check_source(source: Source) -> list[str]:
    """The same for the first texts of a source; training leaves out texts that cannot be spelled.

    Raises:
        UserError: when none can be spelled, or already more than `max_bad_share` of the whole source cannot.
    """
    samples = read_listed(source.audio, source.shards[0])
    kept = source.chosen.keys(source.shards[0].name) if source.chosen else None
    heard = (sample for sample in samples if kept is None or sample.key in kept)
    texts = ((one.key, source.text_of(one.key, one.fields)) for one in itertools.islice(heard, LOOKED_AT))
    known = ((key, text) for key, text in texts if text is not None)
    name = source.plan.transcripts or source.plan.name
    return _remarks(name, known, source.units, source.settings.max_bad_share, source.shards.samples)


def _remarks(
    name: str, texts: Iterable[tuple[str, str]], units: Units, max_bad_share: float, source: int | None = None
) -> list[str]:
    """What there is to say of these (key, text) pairs: of a source with so many utterances, or of the development set."""
    bad, changed, odd, total, silent = [], [], Counter[str](), 0, 0
    for total, (key, text) in enumerate(texts, 1):  # noqa: B007
        if unwritable := units.unwritable(text):
            bad.append((key, text))
            odd.update("".join(unwritable))
            continue
        silent += not units.encode(text)
        if units.changes(text):
            changed.append((key, text))
    if source is None and silent == total:
        raise UserError(f"{name}: holds no words; the development set must be labelled")
    most = max_bad_share * (total if source is None else source)
    if source is None or max_bad_share < 1:
        most = min(most, total - 1)
    said = []
    if bad:
        named = ", ".join(repr(one) for one, _ in odd.most_common(NAMED)) + " …" * (len(odd) > NAMED)
        what = (
            f"{name}: the texts of {len(bad):,} of {total:,} utterances ({len(bad) / total:.1%}; first: {bad[0][0]}) hold "
            f"characters that no unit covers: {named}"
        )
        if len(bad) > most:
            remedy = _remedy(units, [text for _, text in bad])
            if len(bad) < total:
                remedy += f", or raise max_bad_share ({max_bad_share})"
            raise UserError(f"{what}; {remedy}")
        said.append(f"{what}; {'their words count as errors' if source is None else 'these utterances are left out'}")
    if silent == total > 0:
        said.append(f"{name}: none of the {total:,} texts looked at holds a word; only silence is learned from them")
    if changed:
        key, text = changed[0]
        first = f"{key}: {text[:60]!a} is read as {units.written(text)[:60]!a}"
        said.append(f"{name}: {len(changed):,} of {total:,} texts are read in another spelling (first: {first})")
    return said


def _remedy(units: Units, texts: list[str]) -> str:
    if sum(not units.unwritable(text.lower()) for text in texts) > len(texts) / 2:
        return "the units know small letters alone: prepare this set again with normalizer=basic"
    if sum(not units.unwritable(text.upper()) for text in texts) > len(texts) / 2:
        return "the units know capitals alone: make units and all sets of shards again, with normalizer=basic for each"
    return "write them as the texts that the units were made from (prepare both with the same normalizer), or make units from both"
