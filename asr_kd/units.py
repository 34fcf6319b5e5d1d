"""Output units: the pieces of a sentencepiece model plus the blank; text ⇄ ids."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from asr_kd.ending import stop_if_asked
from asr_kd.errors import UserError
from asr_kd.files import Place, place
from asr_kd.text import NORMALIZERS, Folding, fold

MODEL_FILE = "units.model"
#: longest text in bytes that sentencepiece learns from: it skips longer ones without a message
LONGEST = 4192
#: prefix of a normaliser's name in models that were trained on normalised texts
NORMALIZED = "nmt_nfkc after "
ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # its classes are made on import


class Units:
    """Text ⇄ unit ids. Id 0 is the blank; a sentencepiece piece `p` has id `p + 1`; `unknown` stands for other characters.

    Every text is first changed to the spelling of the units (`written`), so that texts that look and sound the same have the
    same ids.

    Attributes:
        model: the serialised sentencepiece model.
        normalizer: key of the normaliser that was applied to the training texts, and is applied to every text.
        hash: of the model.
        size: number of units, blank included.
        unknown: id of the unknown unit.

    Raises:
        UserError: naming `name`, when `model` is not a sentencepiece model, or its normaliser is unknown here.
    """

    blank = 0

    def __init__(self, model: bytes, name: str = "units") -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(model) and self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            loaded = False
        if not loaded:
            raise UserError(f"{name}: not a sentencepiece model; make one with `asr-kd units`")
        self.model = model
        self.normalizer = _normalizer(model, name)
        self._fold = Folding(set("".join(map(self._processor.IdToPiece, range(self._processor.GetPieceSize())))))
        self.hash = hashlib.sha256(model).hexdigest()[:16]
        self.size = self._processor.GetPieceSize() + 1
        self.unknown = self._processor.unk_id() + 1

    def __reduce__(self) -> tuple[type[Units], tuple[bytes]]:
        return type(self), (self.model,)

    def written(self, text: str) -> str:
        """A text in the spelling of the units, to be compared with a hypothesis: normalised as the units' training texts, folded,
        and in sentencepiece's form (Unicode NFKC). Characters that no unit covers stay.
        """
        return " ".join(self._processor.Normalize(self._prepared(text)).replace("▁", " ").split())

    def changes(self, text: str) -> bool:
        """Whether the units spell a text differently than its normalised form, except for white space."""
        normal = text if self.normalizer == "none" else NORMALIZERS[self.normalizer].apply(text)
        return self.written(text) != " ".join(normal.split())

    def encode(self, text: str) -> list[int]:
        """Unit ids of `text`, without blanks."""
        return [piece + 1 for piece in self._processor.EncodeAsIds(self._prepared(text))]

    def unwritable(self, text: str) -> list[str]:
        """The parts of `text` that no unit covers, in order."""
        prepared = self._prepared(text)
        ids, pieces = self._processor.EncodeAsIds(prepared), self._processor.EncodeAsPieces(prepared)
        return [piece.strip("▁") or piece for unit, piece in zip(ids, pieces, strict=True) if unit == self.unknown - 1]

    def misfit(self, text: str, ids: Sequence[int], frames: int) -> str:
        """Why CTC has no path for `text`, whose `ids` they are, through so many frames; empty if it has."""
        if self.unknown in ids:
            return f"text holds {self.unwritable(text)[0]!r}, which no unit covers"
        if len(ids) + sum(a == b for a, b in itertools.pairwise(ids)) > frames:  # a blank parts equal units
            return f"text too long: its {len(ids)} units do not fit into {frames} frames"
        return ""

    def _prepared(self, text: str) -> str:
        return self._fold(text if self.normalizer == "none" else NORMALIZERS[self.normalizer].apply(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of unit ids; blanks are ignored."""
        return self._processor.DecodeIds([unit - 1 for unit in ids if unit != self.blank])

    def starts_word(self, unit: int) -> bool:
        """Whether this unit starts a word: its piece includes the space before it."""
        return unit != self.blank and self._processor.IdToPiece(unit - 1).startswith("▁")

    def piece(self, unit: int) -> str:
        """How a unit is shown to a person."""
        return "∅" if unit == self.blank else self._processor.IdToPiece(unit - 1)


def load_units(folder: Place | str) -> Units:
    """The units of a folder written by `asr-kd units` (or of a checkpoint); a UserError when it holds none."""
    path = place(folder) / MODEL_FILE
    if not path.is_file():
        raise UserError(f"{folder}: holds no {MODEL_FILE}; make units with `asr-kd units`")
    return Units(path.read_bytes(), str(path))


def _normalizer(model: bytes, name: str) -> str:
    said = ModelProto.FromString(model).normalizer_spec.name
    if not said.startswith(NORMALIZED):
        return "none"
    known = {one.version: key for key, one in NORMALIZERS.items()}
    if (version := said.removeprefix(NORMALIZED)) not in known:
        raise UserError(f"{name}: units of texts by normaliser {version}; this program has {', '.join(known)}")
    return known[version]


def learn_units(texts: Sequence[str], kind: str, size: int, normalizer: str = "none", name: str = "units") -> Units:
    """Units from texts, which are normalised and folded first; the normaliser is stored in the units.

    Args:
        kind: model type of sentencepiece: `unigram`, `bpe` or `char`.
        size: number of pieces.
        normalizer: key of `NORMALIZERS`.
        name: of the units, for messages.

    Raises:
        UserError: when there is too little text for the wanted number of pieces, or too few pieces for all characters.
    """
    # without a normaliser only folding: sentencepiece merges white space itself
    apply = fold if normalizer == "none" else NORMALIZERS[normalizer].apply
    texts = [text for text in map(apply, texts) if text.strip()]
    # char: exactly the characters that occur, so `size` is only a bound; sentencepiece adds the unknown piece and the space
    bound = min(size, len(set("".join(texts)) | {" "}) + 1) if kind == "char" else size
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_parts(texts), model_writer=buffer, model_type=kind, vocab_size=bound,
            character_coverage=1.0, bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0, num_threads=1,
            normalization_rule_name="nmt_nfkc", minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        stop_if_asked()  # a signal during a call back into Python is such an error too
        reason = str(error).split("] ")[-1].strip().rstrip(".")
        raise UserError(
            f"size: {size} {kind} pieces cannot be made from this text ({reason}); choose another size"
        ) from None
    model = buffer.getvalue()
    if normalizer != "none":
        described = ModelProto.FromString(model)
        described.normalizer_spec.name = NORMALIZED + NORMALIZERS[normalizer].version
        model = described.SerializeToString(deterministic=True)
    units = Units(model, name)
    if lost := next((text for text in texts if units.unknown in units.encode(text)), None):
        if "<unk>" in lost:
            raise UserError(
                f"{name}: the text {lost[:60]!r} holds <unk>, which stands for what no unit covers; leave it out"
            )
        raise UserError(f"size: {size} {kind} pieces leave out a character of {lost[:60]!r}; choose a larger size")
    return units


def _parts(texts: Iterable[str]) -> Iterator[str]:
    """The texts; those too long for sentencepiece are split into words, as it learns only within words."""
    for text in texts:
        if len(text.encode()) <= LONGEST:
            yield text
            continue
        for word in text.split():
            yield from (word[start : start + LONGEST // 4] for start in range(0, len(word), LONGEST // 4))
