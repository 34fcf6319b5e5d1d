"""A foreign list of tokens → units: a sentencepiece model made of it, and which output of the network stands for which unit."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sentencepiece

from asr_kd.errors import UserError
from asr_kd.units import ModelProto, Units

#: a byte of a token list with byte fallback
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
#: what no text holds: the end of a string in C, and halves of a character (lone surrogates), which JSON can write
NO_TEXT = re.compile("[\0\ud800-\udfff]")
#: how sentencepiece numbers its types of models, and its types of pieces
UNIGRAM, BPE, CHAR = 1, 2, 4
NORMAL, UNKNOWN = 1, 2
#: tokens that a sentence names at most
NAMED = 10


@dataclass(frozen=True)
class Tokens:
    """What a teacher's outputs mean, as its files say.

    Attributes:
        of_columns: the token of each output; None where the files name none.
        blank: number of the output that is CTC's blank.
        unknown: the token that stands for what no other covers; None if there is none.
        delimiter: the token between words; None: a token that begins a word begins with ▁.
        dropped: tokens that no text holds: begin, end, mask, …
        scores: of each output, for a unigram model; empty for others.
        model: a sentencepiece model that has the tokens as its pieces, if one came with them.
    """

    of_columns: list[str | None]
    blank: int
    unknown: str | None = None
    delimiter: str | None = None
    dropped: frozenset[str] = frozenset()
    scores: list[float] = field(default_factory=list)
    model: bytes | None = None


@dataclass(frozen=True)
class Vocabulary:
    """Units, and the unit of each output of the network: 0 is the blank, -1 none.

    Attributes:
        unreached: outputs of tokens that sentencepiece's normalisation changes, so that no text becomes their units.
    """

    units: Units
    columns: list[int]
    tokens: list[str | None]
    unreached: frozenset[int] = frozenset()

    def described(self) -> list[dict[str, Any]]:
        """For people and files: the token of each output, the unit that it stands for, if any, and where no text becomes that unit, so."""
        return [
            {
                "token": token,
                "unit": None if unit < 0 else unit,
                "piece": None if unit < 0 else self.units.piece(unit),
                **({"of_text": False} if column in self.unreached else {}),
            }
            for column, (token, unit) in enumerate(zip(self.tokens, self.columns, strict=True))
        ]


def unreached(described: Sequence[dict[str, Any]]) -> str | None:
    """A sentence about the tokens of `Vocabulary.described` that no text becomes; None where there are none."""
    found = [repr(one["token"]) for one in described if not one.get("of_text", True)]
    if not found:
        return None
    named = ", ".join(found[:NAMED]) + (", …" if len(found) > NAMED else "")
    return f"no text becomes {len(found)} of its tokens, which Unicode's NFKC changes: {named}; only its own answers hold them"


def vocabulary_of(tokens: Tokens, name: str) -> Vocabulary:
    """The units of a token list.

    A list without lower case is written in lower case, and text in any case goes with a list of one case. Tokens that no text holds have
    no unit. A token is spelled as text is that becomes units (Unicode's NFKC), where that takes as many characters and is no other token.

    Args:
        tokens: of the teacher.
        name: of the teacher, for messages.

    Raises:
        UserError: when the blank is none of the outputs, two tokens stand for one unit, or a token is no text.
    """
    if odd := next((pair for pair in enumerate(tokens.of_columns) if NO_TEXT.search(pair[1] or "")), None):
        raise UserError(
            f"{name}: its vocabulary has a token {odd[0]} ({odd[1]!r}) that is no text (half a character, or NUL); copy the model again"
        )
    if not 0 <= tokens.blank < len(tokens.of_columns):
        raise UserError(
            f"{name}: its blank is output {tokens.blank} of {len(tokens.of_columns)}; correct pad_token_id in config.json"
        )
    if tokens.model is not None:
        return _of_model(tokens, tokens.model, name)
    spoken = {
        column: token.replace(tokens.delimiter, "▁") if token == tokens.delimiter else token.replace(" ", "▁")
        for column, token in enumerate(tokens.of_columns)
        if token
        and column != tokens.blank
        and token not in {*tokens.dropped, tokens.unknown, "<unk>"}
        and not BYTE.fullmatch(token)
    }
    if not spoken:
        raise UserError(
            f"{name}: none of its outputs stands for text; give a model with the vocabulary it was trained with"
        )
    upper = any(token != token.lower() for token in spoken.values())
    lower = any(token != token.upper() for token in spoken.values())
    lowered = {column: token.lower() for column, token in spoken.items()}
    if upper and not lower and len(set(lowered.values())) == len(lowered):
        spoken = lowered
    folded = not (upper and lower) and all(token.casefold() == token for token in spoken.values())
    spoken, lost = _as_written(spoken, folded)
    first: dict[str, int] = {}
    pieces, scores = ["<unk>"], [0.0]
    columns = [-1] * len(tokens.of_columns)
    columns[tokens.blank] = Units.blank
    for column, token in enumerate(tokens.of_columns):
        if token is not None and token == tokens.unknown and column != tokens.blank:
            columns[column] = 1
        if column not in spoken:
            continue
        if (other := first.setdefault(spoken[column], column)) != column:
            raise UserError(
                f"{name}: its outputs {other} and {column} ({tokens.of_columns[other]!r}, {token!r}) are both {spoken[column]!r}; give a model with "
                "one output for each text"
            )
        pieces.append(spoken[column])
        scores.append(tokens.scores[column] if tokens.scores else -float(len(pieces)))
        columns[column] = len(pieces)
    kind = CHAR if all(len(piece) == 1 for piece in pieces[1:]) else UNIGRAM if tokens.scores else BPE
    try:
        units = Units(_proto(pieces, scores, kind, folded), name)
    except UserError:
        raise UserError(
            f"{name}: sentencepiece takes none of its {len(spoken)} tokens as they are (one may be too long); give another model"
        ) from None
    return Vocabulary(units, columns, tokens.of_columns, lost)


def _as_written(spoken: dict[int, str], folded: bool) -> tuple[dict[int, str], frozenset[int]]:
    """The tokens by output as text is spelled that becomes units, where that can be; and the outputs where it cannot."""
    normalizer = sentencepiece.SentencePieceNormalizer(rule_name=_rule(folded), add_dummy_prefix=False)
    written, taken, lost = dict(spoken), set(spoken.values()), set()
    for column, token in spoken.items():
        normal = "▁".join(map(normalizer.Normalize, token.split("▁")))
        if normal == token:
            continue
        # a longer one would be cut out of ordinary text: ﬁ would take the place of f and i
        if len(normal) == len(token) and normal not in taken:
            written[column] = normal
            taken.add(normal)
        else:
            lost.add(column)
    return written, frozenset(lost)


def _of_model(tokens: Tokens, model: bytes, name: str) -> Vocabulary:
    units = Units(model, name)
    numbers = {piece.piece: number for number, piece in enumerate(ModelProto.FromString(model).pieces, 1)}
    columns = []
    for column, token in enumerate(tokens.of_columns):
        if column == tokens.blank:
            columns.append(Units.blank)
        elif token == tokens.unknown:
            columns.append(units.unknown)
        elif token is None or token in tokens.dropped:
            columns.append(-1)
        elif token in numbers:
            columns.append(numbers[token])
        else:
            raise UserError(
                f"{name}: its sentencepiece model has no piece {token!r}, the token of output {column}; give the files that belong together"
            )
    return Vocabulary(units, columns, tokens.of_columns)


def _proto(pieces: Sequence[str], scores: Sequence[float], kind: int, folded: bool) -> bytes:
    """A sentencepiece model of these pieces, the first of which is the unknown one."""
    model = ModelProto()
    for number, (piece, score) in enumerate(zip(pieces, scores, strict=True)):
        model.pieces.add(piece=piece, score=score, type=UNKNOWN if number == 0 else NORMAL)
    trained = model.trainer_spec
    trained.model_type, trained.vocab_size = kind, len(pieces)
    trained.unk_id, trained.bos_id, trained.eos_id, trained.pad_id = 0, -1, -1, -1
    model.normalizer_spec.CopyFrom(ModelProto.FromString(_normalizing(folded)).normalizer_spec)
    # a list with a token between words begins no text with it
    model.normalizer_spec.add_dummy_prefix = any(piece.startswith("▁") and len(piece) > 1 for piece in pieces)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


@functools.cache
def _normalizing(folded: bool) -> bytes:
    """A small model for the sake of its tables of Unicode: NFKC, with `folded` also without case."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["a b"]), model_writer=buffer, model_type="char", vocab_size=4, character_coverage=1.0, bos_id=-1,
        eos_id=-1, pad_id=-1, unk_id=0, num_threads=1, normalization_rule_name=_rule(folded), minloglevel=2,
    )  # fmt: skip
    return buffer.getvalue()


def _rule(folded: bool) -> str:
    return "nmt_nfkc_cf" if folded else "nmt_nfkc"
