"""Word n-gram language models with backoff, from ARPA files."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from asr_kd.errors import UserError
from asr_kd.files import local_copy, place

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
#: another spelling of the unknown word in files (KenLM reads both)
UNKNOWN_TOO = "<UNK>"
#: what separates the words of a line, as in KenLM: a no-break space is part of a word
SPACES = " \t\r\n\f\v\0"
#: first bytes of a KenLM binary
KENLM = b"mmap lm"
#: log10 probability of an unknown word if the file has none (KenLM's)
MISSING_UNKNOWN = -100.0
#: log10 probability in place of minus infinity, as in SRILM; sums and products with it stay finite
NEVER = -99.0
PARTS = re.compile(f"[{SPACES}]+")


class Ngrams:
    """A backoff n-gram model (Katz 1987): P(w | context) is that of the longest known n-gram, times the backoffs of the longer contexts.

    Attributes:
        order: number of words of the longest n-gram.
        table: n-gram → log10 probability and log10 backoff.
        spellings: a decoder's spelling of a word → the table's, if they differ.
    """

    def __init__(self, order: int, table: dict[tuple[str, ...], tuple[float, float]]) -> None:
        self.order, self.table = order, table
        self.spellings: dict[str, str] = {}
        table.setdefault((UNKNOWN,), (MISSING_UNKNOWN, 0.0))
        #: context of the first word
        self.start = (START,)[: order - 1]

    @property
    def words(self) -> Iterator[str]:
        """The vocabulary, without the ends of sentences and the unknown word."""
        return (gram[0] for gram in self.table if len(gram) == 1 and gram[0] not in (START, END, UNKNOWN))

    def knows(self, word: str) -> bool:
        """Whether a word is in the vocabulary."""
        return (self.spellings.get(word, word),) in self.table

    def score(self, context: tuple[str, ...], word: str) -> tuple[float, tuple[str, ...]]:
        """log10 P(word | context), and the context of the next word. A word out of the vocabulary counts as `<unk>`."""
        if (word,) not in self.table:
            word = self.spellings.get(word, UNKNOWN)
        total = 0.0
        for start in range(len(context) + 1):
            if found := self.table.get((*context[start:], word)):
                total += found[0]
                break
            total += self.table.get(context[start:], (0.0, 0.0))[1]
        longer = (*context, word)
        return total, longer[max(0, len(longer) - self.order + 1) :]

    def finish(self, context: tuple[str, ...]) -> float:
        """log10 P(end of the sentence | context)."""
        return self.score(context, END)[0]


def is_kenlm_binary(name: str) -> bool:
    """Whether a file is a language model in KenLM's own format; a UserError when it cannot be read."""
    with _open(name) as file:
        return file.read(len(KENLM)) == KENLM


def read_arpa(name: str) -> Ngrams:
    """Read an ARPA file, plain or gzipped, as KenLM does; a few hundred bytes of memory an n-gram.

    A UserError when the file is missing or no whole ARPA file with `<s>` and `</s>`.
    """
    table: dict[tuple[str, ...], tuple[float, float]] = {}
    stated: dict[int, int] = {}
    found: dict[int, int] = {}
    order = 0  # of the section that the lines are in; 0 before the first
    ended = False
    with _open(name) as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip(SPACES)
            except UnicodeDecodeError:
                raise UserError(f"{name}: not an ARPA language model (not UTF-8 text); give an ARPA file") from None
            where = f"{name}: line {number}"
            if not line or (line != "\\data\\" and not stated and order == 0 and not line.startswith("ngram ")):
                continue  # lines before the header are comments
            if section := re.fullmatch(r"\\(\d{1,9})-grams:", line):
                order = int(section[1])
                if order not in stated:
                    raise UserError(f"{where}: {line} was not announced in \\data\\; make the ARPA file again")
            elif line == "\\end\\":
                ended = True
                break
            elif order == 0:
                if count := re.fullmatch(r"ngram\s+(\d{1,9})\s*=\s*(\d{1,18})", line):
                    stated[int(count[1])] = int(count[2])
            else:
                fields = PARTS.split(line)
                try:
                    values = float(fields[0]), float(fields[order + 1]) if len(fields) == order + 2 else 0.0
                except ValueError:
                    values = None
                if values is None or not order + 1 <= len(fields) <= order + 2:
                    what = f"not a {order}-gram with its log10 probability"
                    raise UserError(f"{where}: {what}; give an ARPA file, as made by KenLM's lmplz")
                if not (values[0] <= 0 and math.isfinite(values[1])):
                    raise UserError(
                        f"{where}: {fields[0]} is no log10 probability, or its backoff is no number; make the ARPA file again"
                    )
                ngram = tuple(UNKNOWN if word == UNKNOWN_TOO else word for word in fields[1 : order + 1])
                if ngram in table:
                    raise UserError(f"{where}: {' '.join(ngram)} stands there twice; make the ARPA file again")
                table[ngram] = max(values[0], NEVER) if math.isinf(values[0]) else values[0], values[1]
                found[order] = found.get(order, 0) + 1
    if not stated:
        raise UserError(f"{name}: not an ARPA language model (no \\data\\ header); make one, e.g. with KenLM's lmplz")
    short = next((order for order, count in stated.items() if found.get(order, 0) != count), None)
    if short or not ended:
        counted = f"{stated[short]} {short}-grams announced, {found.get(short, 0)} there" if short else "no \\end\\"
        raise UserError(f"{name}: not whole ({counted}); fetch or make the ARPA file again")
    if gap := next((order for order in range(1, max(stated)) if order not in stated), None):
        raise UserError(f"{name}: has {max(stated)}-grams, but no {gap}-grams; make the ARPA file again")
    if missing := [word for word in (START, END) if (word,) not in table]:
        raise UserError(f"{name}: has no {missing[0]}; make the language model with the ends of sentences")
    return Ngrams(max(stated), table)


@contextmanager
def _open(name: str) -> Iterator[IO[bytes]]:
    try:
        with local_copy(place(name)) as path, path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            yield gzip.GzipFile(fileobj=file) if zipped else file  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "damaged, cut off or not there"
        raise UserError(f"{name}: language model: cannot be read ({reason}); check the path and the file") from None
