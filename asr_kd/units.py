"""Output units: the pieces of a sentencepiece model plus the blank; text ⇄ ids."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator

import sentencepiece

from asr_kd.config import UnitsSettings
from asr_kd.errors import UserError
from asr_kd.files import Place, claim_folder, place, read_text, write_whole

MODEL_FILE = "units.model"


class Units:
    """Text ⇄ unit ids. Id 0 is the blank; a sentencepiece piece `p` has id `p + 1`; `unknown` stands for other characters.

    Args:
        model: a serialised sentencepiece model.
        name: where it came from, for messages.

    Raises:
        UserError: when `model` is not a sentencepiece model.
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
        self.hash = hashlib.sha256(model).hexdigest()[:16]
        self.size = self._processor.GetPieceSize() + 1
        self.unknown = self._processor.unk_id() + 1

    def encode(self, text: str) -> list[int]:
        """Unit ids of `text`, without blanks."""
        return [piece + 1 for piece in self._processor.EncodeAsIds(text)]

    def first_unknown(self, text: str) -> str | None:
        """The first stretch of `text` that only `unknown` can stand for, if there is one."""
        pieces = zip(self.encode(text), self._processor.EncodeAsPieces(text), strict=True)
        return next((piece.strip("▁") or piece for unit, piece in pieces if unit == self.unknown), None)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of unit ids; blanks are ignored."""
        return self._processor.DecodeIds([unit - 1 for unit in ids if unit != self.blank])

    def starts_word(self, unit: int) -> bool:
        """Whether a word begins with this unit: its piece holds the space before it."""
        return unit != self.blank and self._processor.IdToPiece(unit - 1).startswith("▁")

    def piece(self, unit: int) -> str:
        """How a unit is shown to a person."""
        return "∅" if unit == self.blank else self._processor.IdToPiece(unit - 1)


def load_units(folder: Place | str) -> Units:
    """Load the units of a folder written by `asr-kd units` (or of a checkpoint).

    Raises:
        UserError: when the folder holds no units.
    """
    path = place(folder) / MODEL_FILE
    if not path.is_file():
        raise UserError(f"{folder}: holds no {MODEL_FILE}; make units with `asr-kd units`")
    return Units(path.read_bytes(), str(path))


def train_units(settings: UnitsSettings) -> Units:
    """Train a sentencepiece model on the labelled text of `settings.source` and write it to `settings.output`.

    Raises:
        UserError: when there is no text, or too little of it for the wanted number of pieces.
    """
    texts = [text for text in _texts(settings.source) if text.strip()]
    if not texts:
        raise UserError(
            f"{settings.source}: holds no text to make units from; give labelled audio shards, a manifest or a text file"
        )
    # characters: exactly those that occur, so `size` is only a bound; sentencepiece adds the unknown piece and the space
    size = min(settings.size, len(set("".join(texts)) | {" "}) + 1) if settings.kind == "char" else settings.size
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts), model_writer=model, model_type=settings.kind, vocab_size=size,
            character_coverage=1.0, bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0, num_threads=1,
            normalization_rule_name="nmt_nfkc", minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).split("] ")[-1].strip().rstrip(".")
        raise UserError(
            f"size: {settings.size} {settings.kind} pieces cannot be made from this text ({reason}); choose another size"
        ) from None
    units = Units(model.getvalue(), settings.source)
    if lost := next((text for text in texts if units.unknown in units.encode(text)), None):
        raise UserError(
            f"size: {settings.size} {settings.kind} pieces leave out a character of {lost[:60]!r}; choose a larger size"
        )
    from asr_kd.shards.leases import sole_writer

    claim_folder(
        settings.output,
        "units",
        {**settings.model_dump(), "text": hashlib.sha256("\n".join(texts).encode()).hexdigest()},
    )
    with sole_writer(settings.output), write_whole(place(settings.output) / MODEL_FILE, make_folder=False) as file:
        file.write(units.model)
    print(
        f"{settings.output}: {units.size} units ({units.size - 1} {settings.kind} pieces and the blank) from {len(texts):,} utterances"
    )
    return units


def _texts(source: str) -> Iterator[str]:
    from asr_kd.shards.manifest import read_manifest
    from asr_kd.shards.tarset import read_index, read_shard

    path = place(source)
    if path.is_dir():
        for shard in read_index(path):
            for sample in read_shard(path / shard.name):
                if "text" in sample.fields:
                    yield sample.fields["text"]
    elif path.suffix == ".jsonl":
        yield from (utterance.text for utterance in read_manifest(path) if utterance.text is not None)
    else:
        yield from read_text(path, "text file").splitlines()
