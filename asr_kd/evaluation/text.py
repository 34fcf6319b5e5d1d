"""What counts as the same word: text normalisers, named and versioned, because a WER means nothing without one."""

from __future__ import annotations

import functools
import importlib.metadata
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

APOSTROPHES = frozenset("'’ʼ`´＇")


@dataclass(frozen=True)
class Normalizer:
    """A normaliser; change its version with its behaviour, because reports and comparisons quote `name`."""

    version: str
    apply: Callable[[str], str]
    library: str | None = None

    @property
    def name(self) -> str:
        """Name and version, with those of the library that does the work."""
        if self.library is None:
            return self.version
        return f"{self.version} ({self.library} {importlib.metadata.version(self.library)})"


def none(text: str) -> str:
    """The text as it is, but for white space."""
    return " ".join(text.split())


def basic(text: str) -> str:
    """Lower case (Unicode NFKC), apostrophes dropped (don't = dont), other punctuation and symbols turned to spaces.

    Letters, digits and combining marks of every script stay.
    """
    folded = unicodedata.normalize("NFKC", text).lower()
    kept = ("" if char in APOSTROPHES else " " if unicodedata.category(char)[0] in "PSZC" else char for char in folded)
    return none("".join(kept))


def english(text: str) -> str:
    """The English normaliser of Whisper, which most public comparisons of English recognisers use.

    Lower case, contractions written out (don't = do not), numbers in figures (twenty one = 21), British spelling turned to
    American, fillers (uh, um) and what stands in brackets dropped, diacritics and punctuation removed. Figures said one
    after another become one word (one two = 12), so it does not suit strings of digits. Source: A. Radford et al.,
    "Robust speech recognition via large-scale weak supervision", 2022, appendix C. Leftover words without any letter or
    figure are dropped here.
    """
    return " ".join(word for word in _whisper()(text).split() if any(map(str.isalnum, word)))


@functools.cache
def _whisper() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


NORMALIZERS = {
    "none": Normalizer("none-1", none),
    "basic": Normalizer("basic-1", basic),
    "english": Normalizer("english-1", english, "whisper-normalizer"),
}
