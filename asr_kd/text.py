"""What counts as the same text: one rule of folding, and named, versioned normalisers, without which a WER means nothing."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

APOSTROPHES = frozenset("'’ʼ`´＇")
#: characters used as an apostrophe anywhere, and those used as one only between two letters
ALWAYS, WITHIN = "’ʼ＇", "‘‛`´′ꞌ"
#: characters without a sound or a shape of their own: soft hyphen, (zero-width) joiners and non-joiners, marks of direction,
#: variation selectors, byte order mark. Not U+200B, the zero-width space, which separates words
INVISIBLE = (
    "\u00ad\u034f\u061c\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff"
)
#: characters that become spaces: sentencepiece reserves them, ends a text there, or does not know that they separate words
SPACES = "▁▅\0\v\x1c\x1d\x1e\x1f\x85\u200b"


class Folding:
    """Gives texts that look and sound the same one spelling, and changes nothing else; case and punctuation stay.

    - composed and decomposed letters (é, e + ´) are composed: Unicode NFC;
    - invisible characters are removed, so that a joiner between letters does not split a word;
    - curly and other apostrophes become the straight one: ’ and ʼ anywhere, ‘, `, ´ and similar ones between letters;
    - ▁, ▅ and NUL, which sentencepiece reserves, become spaces, and so do rare separators of words (zero-width space, …).

    Args:
        own: characters of the units, which are not changed; if they have another apostrophe and not the straight one, all
            apostrophes become theirs.
    """

    def __init__(self, own: Iterable[str] = ()) -> None:
        kept = set(own)
        straight = next((one for one in ("'", *ALWAYS) if one in kept), "'")
        self._anywhere = {ord(one): straight for one in ("'", *ALWAYS) if one not in kept}
        self._anywhere |= {ord(one): " " for one in SPACES if one not in kept}
        within = "".join(one for one in WITHIN if one not in kept)
        # the character first: the search jumps to it
        self._within = re.compile(rf"[{within}](?<=[^\W\d_].)(?=[^\W\d_])") if within else None
        self._straight, self._kept = straight, kept

    def __call__(self, text: str) -> str:
        """The folded text."""
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
    """A normaliser; change its version with its behaviour, because reports, comparisons and units record it."""

    version: str
    apply: Callable[[str], str]
    library: str | None = None

    @property
    def name(self) -> str:
        """Name and version, with those of the library it uses."""
        if self.library is None:
            return self.version
        return f"{self.version} ({self.library} {importlib.metadata.version(self.library)})"


def none(text: str) -> str:
    """The text after `fold`, with single spaces."""
    return " ".join(fold(text).split())


def basic(text: str) -> str:
    """Lower case (Unicode NFKC), apostrophes removed (don't = dont), other punctuation and symbols replaced by spaces.

    Letters, digits and combining marks of every script stay.
    """
    folded = unicodedata.normalize("NFKC", fold(text)).lower()
    kept = ("" if char in APOSTROPHES else " " if unicodedata.category(char)[0] in "PSZC" else char for char in folded)
    return none("".join(kept))


def english(text: str) -> str:
    """The English normaliser of Whisper, which most public comparisons of English recognisers use.

    Lower case, contractions written out (don't = do not), numbers in figures (twenty one = 21), British spelling changed to
    American, fillers (uh, um) and text in brackets removed, diacritics and punctuation removed. Consecutive digits become one
    word (one two = 12), so it does not suit strings of digits. Source: A. Radford et al., "Robust speech recognition via
    large-scale weak supervision", 2022, appendix C. Texts are folded first here, since it knows only the straight apostrophe,
    and remaining words without any letter or figure are removed.
    """
    return " ".join(word for word in _whisper()(fold(text)).split() if any(map(str.isalnum, word)))


@functools.cache
def _whisper() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


#: version 2 folds first: joiners inside words are removed, and all apostrophes are the same; 3 folds the zero-width space
NORMALIZERS = {
    "none": Normalizer("none-3", none),
    "basic": Normalizer("basic-2", basic),
    "english": Normalizer("english-3", english, "whisper-normalizer"),
}
