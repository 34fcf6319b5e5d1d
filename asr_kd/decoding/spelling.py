"""Texts of somebody else's recogniser → texts as the student's units write them."""

from __future__ import annotations

import unicodedata

from asr_kd.text import APOSTROPHES, NORMALIZERS
from asr_kd.units import Units


class Spelling:
    """How texts are written.

    Without units a normaliser is applied. With them a text becomes what they would make of it: in their spelling, in small letters or
    capitals where they have no others, without punctuation and symbols that they lack.

    Args:
        units: those that the texts are for.
        normalizer: key of `NORMALIZERS`, for texts that are for no units.
    """

    def __init__(self, units: Units | None, normalizer: str) -> None:
        self.units, self._normalize = units, NORMALIZERS[normalizer].apply
        pieces = "".join(map(units.piece, range(1, units.size))) if units else ""
        self._known = set(pieces.replace("<unk>", ""))
        self._lower, self._upper = any(map(str.islower, self._known)), any(map(str.isupper, self._known))

    def __call__(self, text: str) -> str:
        """The text as it is written; what the units cannot write otherwise stays in it (`unwritable`)."""
        if self.units is None:
            return self._normalize(text)
        if self._lower != self._upper:
            text = text.lower() if self._lower else text.upper()
        text = self.units.written(text)
        kept = ("" if one in APOSTROPHES else " " if self._is_mark(one) else one for one in text)
        return " ".join(
            "".join(one if one in self._known else new for one, new in zip(text, kept, strict=True)).split()
        )

    def unwritable(self, text: str) -> list[str]:
        """What in a text so written no unit covers."""
        return self.units.unwritable(text) if self.units else []

    @staticmethod
    def _is_mark(character: str) -> bool:
        return unicodedata.category(character)[0] in "PSC"
