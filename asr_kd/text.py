"""What counts as the same text: one rule of folding, and normalisers, named and versioned, because a WER means nothing without one."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

APOSTROPHES = frozenset("'’ʼ`´＇")
#: what stands for an apostrophe anywhere, and what does between two letters only
ALWAYS, WITHIN = "’ʼ＇", "‘‛`´′ꞌ"
#: a character that shapes, joins or directs others and is never heard: soft hyphen, (zero-width) joiners and non-joiners, marks of
#: direction, variation selectors, byte order mark. Not U+200B, the zero-width space, which parts words
INVISIBLE = (
    "\u00ad\u034f\u061c\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff"
)
#: characters that sentencepiece keeps for itself, or at which it takes a text to be over
RESERVED = "▁▅\0"


class Folding:
    """Makes one spelling of what looks and sounds the same, and changes nothing else; case and punctuation stay.

    - composed and decomposed letters (é, e + ´) are composed: Unicode NFC;
    - invisible characters are dropped, so that a joiner between letters parts no word;
    - curly and other apostrophes become the straight one: ’ and ʼ anywhere, ‘, `, ´ and their like between letters;
    - ▁, ▅ and NUL, which sentencepiece keeps for itself, become spaces.

    Args:
        own: characters that are left alone where they stand, as units have them; units that have another apostrophe and no straight
            one get theirs.
    """

    def __init__(self, own: Iterable[str] = ()) -> None:
        kept = set(own)
        straight = next((one for one in ("'", *ALWAYS) if one in kept), "'")
        self._anywhere = {ord(one): straight for one in ("'", *ALWAYS) if one not in kept}
        self._anywhere |= {ord(one): " " for one in RESERVED if one not in kept}
        within = "".join(one for one in WITHIN if one not in kept)
        # its character first: that is what a search leaps to
        self._within = re.compile(rf"[{within}](?<=[^\W\d_].)(?=[^\W\d_])") if within else None
        self._straight, self._kept = straight, kept

    def __call__(self, text: str) -> str:
        """The text as it is written here."""
        if not text.isascii():
            text = _INVISIBLE.sub(lambda found: found[0] if found[0] in self._kept else "", text)
            text = unicodedata.normalize("NFC", text)
        if self._within:
            text = self._within.sub(self._straight, text)
        return text.translate(self._anywhere)


_INVISIBLE = re.compile(f"[{INVISIBLE}]")
fold = Folding()


@dataclass(frozen=True)
class Normalizer:
    """A normaliser; change its version with its behaviour, because reports, comparisons and units quote it."""

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
    """The text as it is, but for `fold` and white space."""
    return " ".join(fold(text).split())


def basic(text: str) -> str:
    """Lower case (Unicode NFKC), apostrophes dropped (don't = dont), other punctuation and symbols turned to spaces.

    Letters, digits and combining marks of every script stay.
    """
    folded = unicodedata.normalize("NFKC", fold(text)).lower()
    kept = ("" if char in APOSTROPHES else " " if unicodedata.category(char)[0] in "PSZC" else char for char in folded)
    return none("".join(kept))


def english(text: str) -> str:
    """The English normaliser of Whisper, which most public comparisons of English recognisers use.

    Lower case, contractions written out (don't = do not), numbers in figures (twenty one = 21), British spelling turned to
    American, fillers (uh, um) and what stands in brackets dropped, diacritics and punctuation removed. Figures said one
    after another become one word (one two = 12), so it does not suit strings of digits. Source: A. Radford et al.,
    "Robust speech recognition via large-scale weak supervision", 2022, appendix C. Texts are folded first here, since it knows no
    apostrophe but the straight one, and leftover words without any letter or figure are dropped.
    """
    return " ".join(word for word in _whisper()(fold(text)).split() if any(map(str.isalnum, word)))


@functools.cache
def _whisper() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


#: version 2 folds first: joiners inside words are dropped, and all apostrophes are one
NORMALIZERS = {
    "none": Normalizer("none-2", none),
    "basic": Normalizer("basic-2", basic),
    "english": Normalizer("english-2", english, "whisper-normalizer"),
}
