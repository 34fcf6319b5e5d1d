"""Labelled text of any source → units, with an account of what in it is not as a recogniser would write it."""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator

from asr_kd.errors import UserError
from asr_kd.files import Place, claim_folder, place, read_text, write_whole
from asr_kd.shards.manifest import OTHER_NAMES, OTHER_TEXTS, read_manifest
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.tarset import read_index, read_listed
from asr_kd.summary import tell_summary
from asr_kd.text import APOSTROPHES
from asr_kd.units import MODEL_FILE, Units, learn_units

#: names that columns of tables have, of audio files and of texts
FILES, TEXTS = {"audio", *OTHER_NAMES}, {"text", *OTHER_TEXTS}
#: what stands beside a `text` of Kaldi's
KALDI = ("wav.scp", "utt2spk", "spk2utt")
#: other files of text: what their first lines look like
OTHERS = (
    (r"(\S.*\(\S+\)\n){2,}", "a trn of sclite, with a key behind each text"),
    (r"(\S+[ \t]+\S+([ \t]+\d[\d.]*){2}[ \t]+\S+([ \t]+[\d.]+)?\n)+", "a CTM, with a word and its times in each line"),
    (r"(\S+[ \t]+\S+[ \t]+\S+([ \t]+\d[\d.]*){2}[ \t].*\n)+", "an STM, with times in front of each text"),
    (r"(?ms).*^[\d:.,]+ --> .*", "subtitles, with times between the texts"),
    (r"(?s)(File type = |\[Script Info\]|\{\\rtf|%PDF).*", "a TextGrid, subtitles, RTF or a PDF"),
    (r"(?is)<(!doctype|html|\?xml|tt\b).*", "a web page or XML"),
)
#: lines of a text file that show whether it is a table
LOOKED_AT = 20


def train_units(settings: UnitsSettings) -> Units:
    """Train a sentencepiece model on the labelled text of `settings.source` and write it to `settings.output`.

    It raises UserError when there is no text, or too little of it for the wanted number of pieces.
    """
    assert settings.source is not None  # the settings have it, or a teacher
    texts = [text for text in read_texts(settings.source) if text.strip()]
    if not texts:
        raise UserError(
            f"{settings.source}: holds no text to make units from; give labelled audio shards, a manifest or a text file"
        )
    units = learn_units(texts, settings.kind, settings.size, settings.normalizer, str(settings.source))
    # units of plain texts are claimed as they were before there was a choice
    claim = settings.model_dump(exclude={"normalizer"} if settings.normalizer == "none" else None)
    claim_folder(settings.output, "units", {**claim, "text": hashlib.sha256("\n".join(texts).encode()).hexdigest()})
    path = place(settings.output) / MODEL_FILE
    if path.is_file() and path.read_bytes() != units.model:
        raise UserError(
            f"{path}: other units of the same texts, as another version of asr_kd or sentencepiece made them; choose another output folder"
        )
    with write_whole(path, make_folder=False) as file:
        file.write(units.model)
    for remark in remarks(texts, units):
        print(f"{settings.source}: {remark}", file=sys.stderr)
    tell_summary(settings.output, utterances=len(texts), figures={"units": units.size, "kind": settings.kind})
    print(
        f"{settings.output}: {units.size} units ({units.size - 1} {settings.kind} pieces and the blank) from {len(texts):,} utterances"
    )
    return units


def remarks(texts: Iterable[str], units: Units) -> list[str]:
    """A sentence each on what the units make of texts: those that they write otherwise, and what they learned that nobody says."""
    letters = capitals = characters = marks = changed = total = 0
    first = ""
    for text in texts:
        total += 1
        if units.changes(text):
            changed += 1
            first = first or f"{text[:60]!a} is read as {units.written(text)[:60]!a}"
        if units.normalizer != "none":
            continue
        for character in units.written(text):
            letters += character.isalpha()
            capitals += character.isupper()
            characters += not character.isspace()
            marks += unicodedata.category(character)[0] in "PS" and character not in APOSTROPHES
    found = []
    if changed:
        found.append(f"{changed:,} of {total:,} texts are read in another spelling (first: {first})")
    said = [f"{_share(capitals, letters)} of the letters are capitals"] if 0 < capitals < letters else []
    if marks:
        said.append(f"{_share(marks, characters)} of the characters are punctuation or symbols")
    if said:
        found.append(f"{', '.join(said)}, which nobody hears; set normalizer=basic to fold them")
    return found


def _share(part: int, whole: int) -> str:
    percent = 100 * part / whole
    return f"{percent:.0f} %" if percent >= 1 else f"{percent:.2g} %"


def read_texts(source: str | list[str]) -> Iterator[str]:
    """The texts of audio shards, of a manifest, or of a text file with a line an utterance: a file is what it holds, whatever
    its name ends in. It raises UserError when it cannot be read, or holds a table or JSON of another kind.
    """
    if not isinstance(source, str) or place(source).is_dir():
        for shard in read_index(source):
            yield from (sample.fields["text"] for sample in read_listed(source, shard) if "text" in sample.fields)
        return
    path = place(source)
    text = "" if path.suffix == ".jsonl" else read_text(path, "text file").removeprefix("\ufeff")
    is_json = path.suffix == ".jsonl" or _holds_json(path, text.lstrip())
    lines = [] if is_json else text.splitlines()
    del text  # it may be large
    if is_json:
        yield from (utterance.text for utterance in read_manifest(path) if utterance.text is not None)
    else:
        for refuse in (_refuse_table, _refuse_keys, _refuse_others):
            refuse(path, lines)
        yield from lines


def _holds_json(path: Place, text: str) -> bool:
    """Whether a file's first line begins an object of JSON; UserError when it holds one JSON value over all lines."""
    if re.match(r"\[\s*[{\]\"]|\{\s*[\n}]", text):
        raise UserError(f"{path}: holds one JSON value, not a manifest; write a JSON object a line with audio and text")
    return re.match(r'\{\s*"', text) is not None


def _refuse_table(path: Place, lines: list[str]) -> None:
    filled = list(itertools.islice((line for line in lines if line.strip()), LOOKED_AT))
    for mark, name in (("\t", "tabs"), (",", "commas"), (";", "semicolons"), ("|", "bars")):
        rows = [[cell.strip().strip('"').lower() for cell in line.split(mark)] for line in filled]
        named = bool(rows) and bool(FILES & set(rows[0])) and bool(TEXTS & set(rows[0]))
        # tabs and bars are no part of a text; commas are
        if named or (mark in "\t|" and len(rows) > 1 and {len(row) for row in rows} == {max(len(rows[0]), 2)}):
            columns = f", with the columns {', '.join(rows[0])}" if named else ""
            raise UserError(
                f"{path}: is a table (cut by {name}{columns}), not plain text; write its texts alone into a file, a line each, or a "
                "manifest of JSON lines"
            )


def _refuse_others(path: Place, lines: list[str]) -> None:
    filled = (line.strip() + "\n" for line in lines if line.strip() and not line.startswith(";;"))
    head = "".join(itertools.islice(filled, LOOKED_AT))
    for pattern, what in OTHERS:
        if re.fullmatch(pattern, head):
            raise UserError(f"{path}: is {what}, not plain text; write its texts alone into a file, a line each")


def _refuse_keys(path: Place, lines: list[str]) -> None:
    """Kaldi's `text` has a key in front of each line: as text, the keys would become units."""
    firsts = [line.split(maxsplit=1)[0] for line in lines if line.strip()]
    names = [first for first in firsts if re.search(r"[0-9_-]", first) and len(first) > 3]
    beside = any((path.parent / name).exists() for name in KALDI)
    if firsts and len(set(firsts)) == len(firsts) and (beside or (len(firsts) > 1 and len(names) == len(firsts))):
        raise UserError(
            f"{path}: has a key in front of each text ({firsts[0]}), as Kaldi's `text` has; give the texts alone: "
            f"cut -d' ' -f2- {path.name} > texts.txt"
        )
