"""The token list of a Hugging Face folder, from its own files: no tokenizer is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asr_kd.errors import UserError
from asr_kd.files import read_json
from asr_kd.models.outside.vocabulary import Tokens
from asr_kd.units import ModelProto, Units

#: names of files with a sentencepiece model
PIECES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "bpe.model")
#: in tokenizer_config.json and special_tokens_map.json: tokens that no text holds
SPECIAL = ("pad_token", "bos_token", "eos_token", "mask_token", "cls_token", "sep_token")
#: what they and the unknown token are where neither file says so: Wav2Vec2CTCTokenizer's own
USUAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def read_tokens(folder: Path, name: str, columns: int, blank: int) -> Tokens:
    """What the outputs of a model mean.

    Args:
        folder: of the model.
        name: of the model, for messages.
        columns: outputs of the network.
        blank: which of them is the blank.

    Raises:
        UserError: when the folder has no vocabulary, one of bytes, a damaged one, or one that does not fit the outputs.
    """
    described = USUAL | _merged(folder)
    dropped = {word for key in SPECIAL if (word := _word(described.get(key)))}
    delimiter = _word(described.get("word_delimiter_token"))
    unknown = _word(described.get("unk_token"))
    scores: dict[int, float] = {}
    model = next((path for file in PIECES if (path := folder / file).is_file()), None)
    whole = folder / "tokenizer.json"
    if (folder / "vocab.json").is_file() and not (folder / "merges.txt").is_file():
        numbers = _numbers(read_json(folder / "vocab.json", "vocabulary"), described, name)
        delimiter = delimiter or ("|" if "|" in numbers else None)
    elif whole.is_file():
        value = read_json(whole, "tokenizer")
        try:
            numbers, scores, more, said = _of_tokenizer(value, name)
        except (TypeError, KeyError, IndexError, ValueError, AttributeError):
            raise UserError(f"{name}: tokenizer.json is not as a tokenizer is saved; copy the model again") from None
        dropped, unknown = dropped | more, said or unknown
    elif model is not None:
        Units(model.read_bytes(), str(model))  # refuses what is none
        numbers = {piece.piece: number for number, piece in enumerate(ModelProto.FromString(model.read_bytes()).pieces)}
    elif (folder / "merges.txt").is_file():
        raise _bytes(name)
    else:
        raise UserError(
            f"{name}: has no vocabulary (vocab.json, tokenizer.json or a sentencepiece model); give the folder with its tokenizer"
        )
    for number, content, special in _added(described):
        numbers.setdefault(content, number)
        if special and content not in (delimiter, unknown):
            dropped.add(content)
    of_columns: list[str | None] = [None] * columns
    for token, number in numbers.items():
        if number < columns:
            if (other := of_columns[number]) is not None and not {token, other} & {*dropped, unknown}:
                raise UserError(
                    f"{name}: its vocabulary has two tokens {number} ({other!r} and {token!r}); copy the model again"
                )
            of_columns[number] = token
        elif token not in dropped and token not in (unknown, delimiter):
            raise UserError(
                f"{name}: its vocabulary has a token {number} ({token!r}), the network {columns} outputs; give the files that belong together"
            )
    return Tokens(
        of_columns, blank, unknown, delimiter, frozenset(dropped - {unknown, delimiter}),
        [scores.get(column, 0.0) for column in range(columns)] if scores else [], model.read_bytes() if model else None,
    )  # fmt: skip


def language_of(folder: Path) -> str | None:
    """The language that a folder's files choose of a vocabulary of several; None where there is one."""
    value = read_json(folder / "vocab.json") if (folder / "vocab.json").is_file() else None
    several = isinstance(value, dict) and len(value) > 1 and all(isinstance(one, dict) for one in value.values())
    return _word(_merged(folder).get("target_lang")) if several else None


def _merged(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, and special_tokens_map.json where it says nothing."""
    found: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file() and isinstance(value := read_json(folder / file), dict):
            found |= {key: one for key, one in value.items() if one is not None}
    return found


def _word(value: Any) -> str | None:
    """A token as it stands, or in a description of it."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _added(described: dict[str, Any]) -> list[tuple[int, str, bool]]:
    """Number, token, and whether no text holds it, of tokens beside the vocabulary."""
    found = described.get("added_tokens_decoder")
    return [
        (int(number), one["content"], bool(one.get("special")))
        for number, one in (found.items() if isinstance(found, dict) else ())
        if isinstance(one, dict) and isinstance(one.get("content"), str) and number.isdecimal()
    ]


def _numbers(value: Any, described: dict[str, Any], name: str) -> dict[str, int]:
    """vocab.json: the number of each token; of one language, where it holds several."""
    if isinstance(value, dict) and value and all(isinstance(one, dict) for one in value.values()):
        language = _word(described.get("target_lang"))
        if language not in value:
            raise UserError(
                f"{name}: vocab.json holds several languages ({', '.join(list(value)[:5])}, …); name one as target_lang in tokenizer_config.json"
            )
        value = value[language]
    if not isinstance(value, dict) or not all(type(one) is int and one >= 0 for one in value.values()):
        raise UserError(f"{name}: vocab.json is no table of tokens and numbers; give the folder with its tokenizer")
    return dict(value)


def _of_tokenizer(value: Any, name: str) -> tuple[dict[str, int], dict[int, float], set[str], str | None]:
    """tokenizer.json: numbers, scores of a unigram model, tokens that no text holds, and the unknown one."""
    model = value.get("model") if isinstance(value, dict) else None
    if not isinstance(model, dict) or not model.get("vocab"):
        raise UserError(f"{name}: tokenizer.json holds no vocabulary; give the folder with its tokenizer")
    if '"ByteLevel"' in repr([value.get(part) for part in ("pre_tokenizer", "decoder")]).replace("'", '"'):
        raise _bytes(name)
    vocabulary, unknown, scores = model["vocab"], model.get("unk_token"), {}
    if isinstance(vocabulary, list):
        numbers = {token: number for number, (token, _) in enumerate(vocabulary)}
        scores = {number: float(score) for number, (_, score) in enumerate(vocabulary)}
        if unknown is None and model.get("unk_id") is not None:
            unknown = vocabulary[model["unk_id"]][0]
    else:
        numbers = _numbers(vocabulary, {}, name)
    special = set()
    for one in value.get("added_tokens") or []:
        numbers.setdefault(one["content"], one["id"])
        if one.get("special") and one["content"] != unknown:
            special.add(one["content"])
    if not all(isinstance(token, str) and number >= 0 for token, number in [(unknown or "", 0), *numbers.items()]):
        raise ValueError("a token that is no text, or has no number")
    return numbers, scores, special, unknown


def _bytes(name: str) -> UserError:
    return UserError(
        f"{name}: has a byte-level BPE vocabulary, whose tokens are bytes and not letters, and which no units can be made of; give a model with "
        "characters, sentencepiece or BPE of characters"
    )
