from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.errors import UserError
from asr_kd.models.outside.network import NEVER, OutsideModel
from asr_kd.models.outside.tokens import read_tokens
from asr_kd.models.outside.vocabulary import Tokens, unreached, vocabulary_of

TEXTS = [
    "he's quite the judge of a good quiz",
    "jackdaws love my big sphinx of quartz",
    "the five boxing wizards jump quickly",
] * 20


def trained(kind: str, size: int, **options: object) -> bytes:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS), model_writer=buffer, model_type=kind, vocab_size=size, character_coverage=1.0, minloglevel=2, **options
    )  # fmt: skip
    return buffer.getvalue()


def pieces_of(model: bytes) -> list[str]:
    held = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [held.IdToPiece(number) for number in range(held.GetPieceSize())]


def test_letters_in_capitals_are_written_small() -> None:
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABC'", "Ä"]
    made = vocabulary_of(Tokens(list(tokens), 0, "<unk>", "|", frozenset({"<s>", "</s>"})), "x")
    assert made.columns == [0, -1, -1, 1, *range(2, 8)]
    assert made.units.decode(made.units.encode("ABBA CAB's ÄBC".replace("s", "a"))) == "abba cab'a äbc"
    assert made.described()[4] == {"token": "|", "unit": 2, "piece": "▁"}


def test_letters_of_both_cases_stay_apart() -> None:
    made = vocabulary_of(Tokens(["-", "|", *"abAB"], 0, None, "|"), "x")
    assert made.units.decode(made.units.encode("aB Ab")) == "aB Ab"
    assert made.units.unwritable("ac") == ["c"]


def test_a_list_without_an_unknown_token_gets_a_unit_that_nothing_stands_for() -> None:
    made = vocabulary_of(Tokens(["-", *"ab"], 0), "x")
    assert (made.columns, made.units.size, made.units.unknown) == ([0, 2, 3], 4, 1)


def test_a_letter_that_folding_changes_keeps_its_list_as_it_is() -> None:
    """ß is ss where case is folded: then nothing would be written with it."""
    made = vocabulary_of(Tokens(["-", "|", *"aesßrt"], 0, None, "|"), "x")
    assert made.units.decode(made.units.encode("straße")) == "straße"


def test_a_token_that_nfkc_changes_is_spelled_as_text_is() -> None:
    made = vocabulary_of(Tokens(["-", "|", "ｱ", "Ｚ", "Å"], 0, None, "|"), "x")
    units = made.units
    assert [units.piece(unit) for unit in made.columns[2:4]] == ["ア", "z"]
    assert units.encode("ｱ ア") == [made.columns[2], made.columns[1], made.columns[2]]
    assert units.decode(units.encode("Ｚ\u212b")) == "zå"
    assert unreached(made.described()) is None


def test_tokens_that_no_text_becomes_are_named() -> None:
    """… is three tokens in text, ² is the 2 that there is; a ligature must not take the place of its letters."""
    made = vocabulary_of(Tokens(["-", "|", "2", "²", "f", "i", "ﬁ", ".", "…"], 0, None, "|"), "x")
    units = made.units
    assert made.unreached == {3, 6, 8}
    assert units.decode(units.encode("ﬁ² …")) == "fi2 ..."
    assert [units.piece(unit) for unit in units.encode("ﬁ")] == ["f", "i"]
    assert [column["token"] for column in made.described() if "of_text" in column] == ["²", "ﬁ", "…"]
    said = unreached(made.described())
    assert said == (
        "no text becomes 3 of its tokens, which Unicode's NFKC changes: '²', 'ﬁ', '…'; only its own answers hold them"
    )


def test_the_blank_may_be_any_output() -> None:
    made = vocabulary_of(Tokens([*"ab", None, "<pad>"], 3), "x")
    assert made.columns == [2, 3, -1, 0]


@pytest.mark.parametrize("size", [40, 60])
def test_bpe_made_of_tokens_alone_cuts_text_as_the_model_they_came_from(size: int) -> None:
    model = trained("bpe", size)
    whole = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = [*pieces_of(model), "<blank>"]
    made = vocabulary_of(Tokens(list(tokens), len(tokens) - 1, "<unk>", None, frozenset({"<s>", "</s>"})), "x")
    for text in TEXTS[:3]:
        assert [made.units.piece(unit) for unit in made.units.encode(text)] == whole.EncodeAsPieces(text)
        assert made.units.decode(made.units.encode(text)) == text
    assert made.units.starts_word(made.columns[tokens.index("▁")]) or "▁t" in tokens


def test_a_model_that_comes_with_the_tokens_is_taken_as_it_is() -> None:
    model = trained("unigram", 40, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    made = vocabulary_of(
        Tokens(list(pieces_of(model)), 0, "<unk>", None, frozenset({"<pad>", "</s>"}), model=model), "x"
    )
    assert made.units.model == model
    assert made.columns == [0, -1, 3, *range(4, len(made.columns) + 1)]
    with pytest.raises(UserError, match="its sentencepiece model has no piece 'zz', the token of output 5"):
        vocabulary_of(Tokens([*pieces_of(model)[:5], "zz"], 0, "<unk>", model=model), "x")


def test_bytes_of_a_fallback_are_no_text() -> None:
    made = vocabulary_of(Tokens(["<blk>", "<unk>", "<0x00>", "<0xFF>", "▁a", "b"], 0, "<unk>"), "x")
    assert made.columns == [0, 1, -1, -1, 2, 3]


class Fixed(OutsideModel):
    """It answers with what it is given."""

    def __init__(self, columns: int, **options: object) -> None:
        tokens = Tokens(
            ["-", "<s>", *(chr(97 + number) for number in range(columns - 2))], 0, None, None, frozenset({"<s>"})
        )
        super().__init__(vocabulary_of(tokens, "x"), {}, False)
        self.answer = torch.empty(0)

    def frames(self, rows: int) -> int:
        return rows

    def hear(self, sounds: list[torch.Tensor], taps: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.answer[None], {}


@given(st.integers(3, 12), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_the_mass_of_what_is_no_text_is_spread_in_proportion(columns: int, frames: int, seed: int) -> None:
    model = Fixed(columns)
    logits = np.random.default_rng(seed).normal(0, 4, (frames, columns)).astype(np.float32)
    model.answer = torch.from_numpy(logits)
    found = model(torch.zeros(1, frames, 1), torch.tensor([frames])).logits[0].numpy()
    probs = np.exp(logits.astype(np.float64))
    probs[:, 1] = 0
    wanted = probs / probs.sum(1, keepdims=True)
    assert np.allclose(np.exp(found[:, [0, *range(2, columns)]]), wanted[:, [0, *range(2, columns)]], atol=1e-6)
    assert (found[:, 1] == NEVER).all()  # the unknown unit, which nothing stands for
    assert np.allclose(np.exp(found).sum(1), 1, atol=1e-5)


def described(folder: Path, **values: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def test_tokenizer_json_of_bpe(tmp_path: Path) -> None:
    model = trained("bpe", 50)
    tokens = pieces_of(model)
    vocabulary = {
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": {token: number for number, token in enumerate(tokens)}}
    }
    vocabulary |= {
        "added_tokens": [
            {"id": len(tokens), "content": "<pad>", "special": True},
            {"id": 1, "content": "<s>", "special": True},
        ]
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary | {"decoder": {"type": "Metaspace"}}))
    described(tmp_path, pad_token="<pad>", eos_token="</s>")
    read = read_tokens(tmp_path, "x", len(tokens) + 1, len(tokens))
    assert (
        read.of_columns == [*tokens, "<pad>"] and read.unknown == "<unk>" and {"<s>", "</s>", "<pad>"} <= read.dropped
    )
    made = vocabulary_of(read, "x")
    assert made.units.decode(made.units.encode(TEXTS[0])) == TEXTS[0]


def test_tokenizer_json_of_unigram(tmp_path: Path) -> None:
    model = trained("unigram", 40)
    held = sentencepiece.SentencePieceProcessor(model_proto=model)
    scored = [[held.IdToPiece(number), held.GetScore(number)] for number in range(held.GetPieceSize())]
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "Unigram", "unk_id": 0, "vocab": [*scored, ["<pad>", 0.0]]}})
    )
    described(tmp_path, pad_token={"content": "<pad>"}, bos_token="<s>", eos_token="</s>")
    made = vocabulary_of(read_tokens(tmp_path, "x", len(scored) + 1, len(scored)), "x")
    for text in TEXTS[:3]:
        assert [made.units.piece(unit) for unit in made.units.encode(text)] == held.EncodeAsPieces(text)


def test_a_sentencepiece_model_beside_the_tokenizer_is_taken(tmp_path: Path) -> None:
    model = trained("unigram", 40, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (tmp_path / "spiece.model").write_bytes(model)
    described(tmp_path, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_ids=0)
    made = vocabulary_of(read_tokens(tmp_path, "x", 40, 0), "x")
    assert made.units.model == model and made.columns[:4] == [0, -1, 3, 4]


def test_tokens_beside_the_vocabulary_are_no_text(tmp_path: Path) -> None:
    """As fine-tuned wav2vec 2.0 has them: <s> and </s> behind the outputs."""
    (tmp_path / "vocab.json").write_text(json.dumps({"|": 0, "a": 1, "b": 2, "[UNK]": 3, "[PAD]": 4}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"})
    )
    added = {str(number): {"content": token, "special": True} for number, token in ((5, "<s>"), (6, "</s>"))}
    described(tmp_path, pad_token="[PAD]", added_tokens_decoder=added)
    made = vocabulary_of(read_tokens(tmp_path, "x", 5, 4), "x")
    assert made.columns == [2, 3, 4, 1, 0]


def test_one_language_of_several(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"eng": {"<pad>": 0, "a": 1}, "deu": {"<pad>": 0, "ä": 1}}))
    described(tmp_path, pad_token="<pad>", target_lang="deu")
    assert read_tokens(tmp_path, "x", 2, 0).of_columns == ["<pad>", "ä"]


@pytest.mark.parametrize("file", ["merges", "decoder"])
def test_bytes_are_refused_by_name(tmp_path: Path, file: str) -> None:
    if file == "merges":
        (tmp_path / "vocab.json").write_text('{"Ġa": 0}')
        (tmp_path / "merges.txt").write_text("Ġ a")
    else:
        parts = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"Ġa": 0}}, **parts}))
    with pytest.raises(UserError, match="byte-level BPE vocabulary"):
        read_tokens(tmp_path, "x", 1, 0)
    shutil.rmtree(tmp_path)


def test_tokens_that_no_file_declares_are_the_usual_ones(tmp_path: Path) -> None:
    """Wav2Vec2CTCTokenizer writes vocab.json; where its defaults were kept older versions say nothing of them."""
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5}))
    made = vocabulary_of(read_tokens(tmp_path, "x", 6, 0), "x")
    assert made.columns == [0, -1, -1, 1, 2, 3]
    assert made.units.decode(made.units.encode("a aa")) == "a aa"


def test_two_tokens_of_one_output_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "A": 1, "B": 1}))
    with pytest.raises(UserError, match=r"x: its vocabulary has two tokens 1 \('A' and 'B'\)"):
        read_tokens(tmp_path, "x", 2, 0)


@pytest.mark.parametrize(
    "value",
    [
        {"model": {"vocab": [["a", -1.0]], "unk_id": 9}},
        {"model": {"vocab": [["a", -1.0]], "unk_id": "a"}},
        {"model": {"vocab": ["a", "bc"]}},
        {"model": {"vocab": [[1, 2.0]]}},
        {"model": {"vocab": [["a", "high"]]}},
        {"model": {"vocab": [["a", None]]}},
        {"model": {"vocab": {"a": 0}, "unk_token": ["a"]}},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b"}]},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b", "id": "1"}]},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b", "id": -1}]},
        {"model": {"vocab": {"a": 0}}, "added_tokens": ["b"]},
    ],
)
def test_a_damaged_tokenizer_gives_a_sentence(tmp_path: Path, value: object) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"x: tokenizer\.json is not as a tokenizer is saved; copy the model again"):
        read_tokens(tmp_path, "x", 4, 3)


@pytest.mark.parametrize(
    ("vocabulary", "said"),
    [
        ({"\ud800": 5}, r"has a token 5 \('\\ud800'\) that is no text"),
        ({"A\udfffB": 5}, r"has a token 5 \('A\\udfffB'\) that is no text"),
        ({"\0": 5}, r"has a token 5 \('\\x00'\) that is no text"),
        ({"A": True}, "no table of tokens and numbers"),
        ({"A": -1}, "no table of tokens and numbers"),
        ({"A": 5.0}, "no table of tokens and numbers"),
        ({"A": "5"}, "no table of tokens and numbers"),
        ({"A": None}, "no table of tokens and numbers"),
        ({"A": {"B": 5}}, "no table of tokens and numbers"),
        ({"A": 10**30}, "a token 10+ .*the network 6 outputs"),
        ({"A": 4, "B": 4}, r"two tokens 4 \('A' and 'B'\)"),
        ({"A": 4, " ": 5, "|": 3}, "are both '▁'"),
        ({"A": 4, "B" * 100_000: 5}, "sentencepiece takes none of its 2 tokens"),
    ],
)
def test_a_damaged_list_gives_a_sentence(tmp_path: Path, vocabulary: dict[str, object], said: str) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2} | vocabulary))
    with pytest.raises(UserError, match=f"^x: .*{said}") as refused:
        vocabulary_of(read_tokens(tmp_path, "x", 6, 0), "x")
    assert "\n" not in str(refused.value) and str(refused.value).isprintable()


def test_unk_is_no_text_where_another_token_is_the_unknown_one(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"[PAD]": 0, "[UNK]": 1, "<unk>": 2, "A": 3}))
    described(tmp_path, unk_token="[UNK]", pad_token="[PAD]")
    assert vocabulary_of(read_tokens(tmp_path, "x", 4, 0), "x").columns == [0, 1, -1, 2]


def test_odd_keys_of_a_tokenizer_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"eng": {"<pad>": 0, "a": 1}, "deu": {"<pad>": 0, "b": 1}}))
    said = {"target_lang": "deu", "added_tokens_decoder": {"²": {"content": "x"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    assert read_tokens(tmp_path, "x", 2, 0).of_columns == ["<pad>", "b"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"target_lang": ["deu"]}))
    with pytest.raises(UserError, match="name one as target_lang"):
        read_tokens(tmp_path, "x", 2, 0)
