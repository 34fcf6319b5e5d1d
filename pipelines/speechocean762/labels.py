"""How good the teachers' texts of the unlabelled audio are, by the text that was held back: all of them, and what a filter keeps.

    python pipelines/speechocean762/labels.py --corpus RUN/corpus --whisper RUN/whisper-texts.jsonl --own RUN/teacher-lists.jsonl --output FOLDER

For diagnosis: nothing that is trained reads it. Whisper is filtered by the mean log-probability of its tokens, the teacher from here by how
much of its list of transcripts the best one has.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from asr_kd.errors import UserError
from asr_kd.evaluation.formats import percent, table
from asr_kd.evaluation.wer import ErrorCounts, align, counts_of
from asr_kd.files import read_text, write_json, write_whole
from asr_kd.text import NORMALIZERS

#: age from which a speaker is no child
ADULT = 18
#: name of a filter → whether a text with such figures is kept, of each teacher; the first keeps all
WHISPER: dict[str, Callable[[dict[str, Any]], bool]] = {
    "Whisper, all": lambda _: True,
    "as `transcribe` keeps them": lambda text: "why" not in text,
    "-0.5 nat a token at least": lambda text: "why" not in text and text["avg_logprob"] >= -0.5,
    "-0.3 nat a token at least": lambda text: "why" not in text and text["avg_logprob"] >= -0.3,
    "-0.2 nat a token at least": lambda text: "why" not in text and text["avg_logprob"] >= -0.2,
}
OWN: dict[str, Callable[[dict[str, Any]], bool]] = {
    "the teacher from here, all": lambda _: True,
    "half of the list at least": lambda text: certainty(text) >= 0.5,
    "nine tenths of the list at least": lambda text: certainty(text) >= 0.9,
}


class Quality(NamedTuple):
    """Of the texts that a filter keeps.

    Attributes:
        utterances: that are kept, of those whose text was held back.
        share: of the words that were said.
        wer: of all, `children` and `adults` of theirs.
    """

    utterances: int
    share: float
    wer: float
    children: float
    adults: float


def certainty(text: dict[str, Any]) -> float:
    """How much of the probability of a list its best transcript has."""
    scores = [one["score"] for one in text["nbest"]]
    return 1 / sum(math.exp(score - max(scores)) for score in scores)


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Lines of JSON by their key."""
    lines = map(json.loads, read_text(path, "texts of a teacher").splitlines())
    return {line["key"]: line for line in lines}


def column(path: Path) -> dict[str, str]:
    """A file of a data folder: what stands behind an id."""
    return dict(line.split(maxsplit=1) for line in read_text(path, "list of the corpus").splitlines())


def quality(
    texts: dict[str, dict[str, Any]],
    said: dict[str, str],
    ages: dict[str, int],
    keeps: Callable[[dict[str, Any]], bool],
) -> Quality:
    """Of the texts of a teacher that a filter keeps."""
    normalize = NORMALIZERS["basic"].apply
    kept, counts = 0, {True: ErrorCounts(), False: ErrorCounts()}
    for key, reference in said.items():
        text = texts.get(key)
        if text is None or not keeps(text):
            continue
        kept += 1
        edits = align(normalize(reference), normalize(text["text"]))
        counts[ages[key] >= ADULT] += counts_of(edits)
    every, words = counts[True] + counts[False], sum(len(normalize(text).split()) for text in said.values())
    return Quality(kept, every.words / words, every.rate, counts[False].rate, counts[True].rate)


def main() -> None:
    """Write labels.md and labels.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("corpus", "whisper", "own", "output"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    chosen = parser.parse_args()
    try:
        said = {key: line["text"] for key, line in read_lines(chosen.corpus / "unlabelled-oracle.jsonl").items()}
        speakers, ages = (column(chosen.corpus / "unlabelled" / name) for name in ("utt2spk", "spk2age"))
        left_out = read_lines(chosen.whisper.with_suffix(".left-out.jsonl"))
        teachers = ((WHISPER, read_lines(chosen.whisper) | left_out), (OWN, read_lines(chosen.own)))
    except UserError as error:
        sys.exit(f"pipelines/speechocean762/labels.py: {error}")
    old = {key: int(ages[speakers[key]]) for key in said}
    found = {name: quality(texts, said, old, keeps) for filters, texts in teachers for name, keeps in filters.items()}
    rows = [["texts", "utterances", "share of the words", "WER", "of children", "of adults"]]
    rows += [[name, f"{one.utterances:,}", *map(percent, one[1:])] for name, one in found.items()]
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output / "labels.json", {name: one._asdict() for name, one in found.items()})
    with write_whole(chosen.output / "labels.md", "w") as file:
        file.write(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
