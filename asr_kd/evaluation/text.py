"""What counts as the same word: text normalisers, named and versioned, because a WER means nothing without one."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

APOSTROPHES = frozenset("'’ʼ`´＇")


@dataclass(frozen=True)
class Normalizer:
    """A normaliser; change its version with its behaviour, because reports and comparisons quote `name`."""

    name: str
    apply: Callable[[str], str]


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


NORMALIZERS = {"none": Normalizer("none-1", none), "basic": Normalizer("basic-1", basic)}
