"""Manifests of all toolkits: what a file or folder is, by what it holds, and its utterances."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from asr_kd.errors import UserError
from asr_kd.files import Place, names_in, place, sha256_file
from asr_kd.shards.manifest import Span, Utterance, read_manifest
from asr_kd.shards.manifests import folders, kaldi, lhotse, parquet, tables, tars
from asr_kd.shards.manifests.entries import Entry, Member, files_below, keyed, packed, unpacked
from asr_kd.shards.manifests.kinds import Kind, recognise

_READERS: dict[Kind, Callable[[Place, Counter[str]], Iterator[Entry]]] = {
    Kind.KALDI: kaldi.entries,
    Kind.CUTS: lhotse.cuts,
    Kind.RECORDINGS: lhotse.recordings,
    Kind.SUPERVISIONS: lhotse.supervisions,
    Kind.SHAR: lhotse.shar,
    Kind.COMMON_VOICE: tables.common_voice,
    Kind.AUDIOFOLDER: tables.audiofolder,
    Kind.PARQUET: parquet.entries,
    Kind.LIBRISPEECH: folders.librispeech,
    Kind.AUDIO: folders.audio_alone,
    Kind.TARS: tars.entries,
}
#: audio within other files, by its kind
_EMBEDDED = {"tar": Member, "parquet": parquet.Cell}


@dataclass
class Survey:
    """What a manifest holds.

    Attributes:
        utterances: how many.
        unlabelled: how many of them without text.
        fingerprint: of all that the utterances are but their sound; of JSON lines of ours, the SHA-256 of the file.
        notes: how often what was found that is no utterance.
    """

    utterances: int
    unlabelled: int
    fingerprint: str
    notes: Counter[str]

    def __str__(self) -> str:
        without = f", {self.unlabelled:,} without text" if self.unlabelled else ""
        return f"{self.utterances:,} utterances{without}" + "".join(
            f"; {count:,} {what}" for what, count in sorted(self.notes.items())
        )


@dataclass(frozen=True)
class Manifest:
    """A manifest of any kind; iterating gives its utterances, each time in the same order, in bounded memory."""

    path: Place
    kind: Kind

    def __iter__(self) -> Iterator[Utterance]:
        return self.read(Counter())

    def read(self, notes: Counter[str]) -> Iterator[Utterance]:
        """Its utterances; what is found that is none is counted in `notes`."""
        if self.kind in (Kind.LINES, Kind.NEMO):
            yield from read_manifest(self.path, "audio" if self.kind is Kind.LINES else "audio_filepath")
        else:
            yield from keyed(_READERS[self.kind](self.path, notes))

    @property
    def base(self) -> Place:
        """The folder from which its paths count."""
        return self.path if self.path.is_dir() else self.path.parent

    def files(self) -> Iterator[Place]:
        """All that its utterances are read from, which says of their sound no more than where it is."""
        if self.kind is Kind.SUPERVISIONS:
            yield from (self.path, lhotse.recordings_beside(self.path))
        elif self.kind is Kind.KALDI:
            yield from (self.path / name for name in kaldi.FILES)
        elif self.kind is Kind.SHAR:
            yield from (self.path / name for name in sorted(names_in(self.path)))
        elif self.path.is_dir():
            yield from (self.path / name for name in files_below(self.path))
        else:
            yield self.path

    def survey(self) -> Survey:
        """Read all of it, and so check it; UserError when it is wrong, or holds no utterance."""
        notes: Counter[str] = Counter()
        digest, total, unlabelled = hashlib.sha256(), 0, 0
        for one in self.read(notes):
            total, unlabelled = total + 1, unlabelled + (one.text is None)
            digest.update(as_line(one, self.base).encode())
        if not total:
            found = ", ".join(f"{count:,} {what}" for what, count in sorted((+notes).items()))
            raise UserError(
                f"{self.path}: was read as {self.kind.value}, and holds no utterances{found and f', but {found}'}; check what it holds"
            )
        mark = sha256_file(self.path) if self.kind is Kind.LINES else digest.hexdigest()
        return Survey(total, unlabelled, mark, +notes)


def as_line(utterance: Utterance, base: Place) -> str:
    """An utterance as a line of JSON, in which what lies below `base` is named from there; see `from_line`."""
    span = utterance.span
    value = [utterance.key, packed(utterance.audio, base), utterance.text, utterance.fields, span.start, span.end]
    return json.dumps(value) + "\n"


def from_line(line: str, base: Place) -> Utterance:
    """The inverse of `as_line`."""
    key, audio, text, fields, start, end = json.loads(line)
    return Utterance(key, unpacked(audio, base, _EMBEDDED), text, fields, Span(start, end))


def open_manifest(path: Place | str) -> Manifest:
    """A manifest, which is what it holds, whatever its name; UserError when it is missing or of no known kind."""
    path = place(path)
    return Manifest(path, recognise(path))
