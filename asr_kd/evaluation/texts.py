"""Can the systems write what the test texts say? Asked before any work, of the first shard of each set."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence

from asr_kd.decoding.grammar import read_lexicon
from asr_kd.errors import UserError
from asr_kd.evaluation.score import System
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.shards.index import ShardList
from asr_kd.shards.tarset import read_listed
from asr_kd.text import NORMALIZERS
from asr_kd.units import Units

NAMED = 10  # characters that a message names at most


def check_texts(
    settings: EvalSettings, systems: Sequence[System], sets: Mapping[str, tuple[str | list[str], ShardList]]
) -> None:
    """Compare the texts with what each system can write, both normalised; print a sentence where some of them hold other letters.

    Raises:
        UserError: when a system can write none of a set's texts: its word error rate would say nothing.
    """
    said = set()
    for folder, infos in sets.values():
        first = infos.filled[0]
        read = read_listed(folder, first)
        texts = [(one.key, one.fields["text"]) for one in read if "text" in one.fields]
        for system in systems:
            known = letters(settings, system.checkpoint.units)
            odd = [(key, found) for key, text in texts if (found := _comparable(settings, text) - known)]
            if not odd:
                continue
            counted = Counter(one for _, found in odd for one in sorted(found))
            named = ", ".join(repr(one) for one, _ in counted.most_common(NAMED)) + " …" * (len(counted) > NAMED)
            where = f"{folder}: {len(odd):,} of the {len(texts):,} texts of {first.name} (first: {odd[0][0]})"
            what = f"{where} hold characters that {system.name} cannot write: {named}"
            if len(odd) == len(texts):
                language = "give texts of the language of its units"
                raise UserError(f"{what}; {'set normalizer=basic' if settings.normalizer == 'none' else language}")
            if (where, named) not in said:  # systems with the same units are told together
                said.add((where, named))
                print(f"{what}; their words count as errors", file=sys.stderr)


def letters(settings: EvalSettings, units: Units) -> set[str]:
    """The characters of a system's normalised texts."""
    known = set().union(*(_comparable(settings, units.piece(unit).replace("▁", " ")) for unit in range(1, units.size)))
    if settings.lexicon:
        known.update(*(_comparable(settings, word) for word in read_lexicon(settings.lexicon, units).words.values()))
    return known


def _comparable(settings: EvalSettings, text: str) -> set[str]:
    """The characters of a text that are compared. `english` writes numbers in figures, so that figures say nothing."""
    characters = set(NORMALIZERS["none" if settings.normalizer == "none" else "basic"].apply(text)) - {" "}
    return {one for one in characters if one.isalpha()} if settings.normalizer == "english" else characters
