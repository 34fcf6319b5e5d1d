from __future__ import annotations

import io
import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.ending import interruptible
from asr_kd.errors import UserError
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.tarset import Sample, write_index, write_shard
from asr_kd.shards.texts import train_units
from asr_kd.text import NORMALIZERS
from asr_kd.units import Units, load_units

LINES = ["one two three", "two three four", "four five six", "six seven eight nine zero", "zero one two"] * 4
KINDS = ["char", "bpe", "unigram"]


def text_file(folder: Path, lines: list[str]) -> str:
    path = folder / "text.txt"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def trained(folder: Path, lines: list[str] = LINES, **changes: Any) -> Units:
    folder.mkdir(exist_ok=True)
    values = {"source": text_file(folder, lines), "output": str(folder / "units"), "kind": "char", "size": 25}
    return train_units(UnitsSettings.model_validate(values | changes))


@pytest.fixture(scope="module", params=KINDS)
def units(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Units:
    return trained(tmp_path_factory.mktemp(request.param), kind=request.param)


def test_text_goes_round(units: Units) -> None:
    for line in [*LINES, "nine one", "seven", ""]:
        ids = units.encode(line)
        assert all(0 < unit < units.size for unit in ids)
        assert units.decode(ids) == line


def test_what_cannot_be_spelt_is_found(units: Units) -> None:
    assert units.unwritable("one two") == [] == units.unwritable("")
    assert units.unwritable("one Ä two Ö") == ["Ä", "Ö"] and units.unwritable("oneÄÖ") == ["ÄÖ"]


@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.text("efghinorstuvwxz", min_size=1, max_size=8), max_size=6))
def test_any_text_of_known_letters_goes_round(units: Units, words: list[str]) -> None:
    assert units.decode(units.encode(" ".join(words))) == " ".join(words)


def test_the_blank_is_apart_from_the_pieces(units: Units) -> None:
    ids = units.encode("one two")
    assert Units.blank == 0 and units.blank not in ids
    assert units.decode([0, *ids[:2], 0, 0, *ids[2:], 0]) == "one two"
    pieces = [units.piece(unit) for unit in range(units.size)]
    assert len(set(pieces)) == units.size and pieces[0] == "∅"
    assert "".join(units.piece(unit) for unit in ids).replace("▁", " ").strip() == "one two"


def test_same_text_same_model(tmp_path: Path) -> None:
    for kind in KINDS:
        made = []
        for name in ("first", "second"):
            (tmp_path / kind / name).mkdir(parents=True)
            made.append(trained(tmp_path / kind / name, kind=kind))
        again = load_units(tmp_path / kind / "first" / "units")
        assert made[0].hash == made[1].hash == again.hash and made[0].model == again.model
        assert (again.size, again.encode("one six")) == (made[0].size, made[0].encode("one six"))


def test_other_units_have_another_hash(tmp_path: Path) -> None:
    hashes = set()
    for number, changes in enumerate(({}, {"kind": "bpe"}, {"lines": [*LINES, "quick"]})):
        (tmp_path / str(number)).mkdir()
        hashes.add(trained(tmp_path / str(number), **changes).hash)
    assert len(hashes) == 3


def test_characters_are_those_that_occur(tmp_path: Path) -> None:
    units = trained(tmp_path, ["ab ba", "äb"], size=1000)
    assert {units.piece(unit) for unit in range(1, units.size)} == {"<unk>", "▁", "a", "b", "ä"}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_size_that_cannot_be_had_leaves_the_folder_free(tmp_path: Path, kind: str) -> None:
    for size in (5000, 4):
        with pytest.raises(
            UserError, match=rf"size: {size} {kind} pieces cannot be made .*; choose another size"
        ) as caught:
            trained(tmp_path, kind=kind, size=size)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "units").exists()
    trained(tmp_path, kind=kind)


def test_same_command_again_is_no_error_and_other_settings_are(tmp_path: Path) -> None:
    trained(tmp_path)
    before = (tmp_path / "units" / "units.model").read_bytes()
    trained(tmp_path)
    with pytest.raises(UserError, match=r"units: belongs to other settings \(kind was \"char\", now \"bpe\"\)"):
        trained(tmp_path, kind="bpe")
    with pytest.raises(UserError, match=r"belongs to other settings \(text was"):
        trained(tmp_path, [*LINES, "ten"])
    assert (tmp_path / "units" / "units.model").read_bytes() == before


def test_labelled_text_of_every_source(tmp_path: Path) -> None:
    lines = ["one two", "three"]
    manifest = tmp_path / "list.jsonl"
    entries: list[dict[str, str]] = [{"audio": f"{number}.wav", "text": line} for number, line in enumerate(lines)]
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in [*entries, {"audio": "x.wav"}]))
    shards = tmp_path / "shards"
    shards.mkdir()
    samples = [Sample(str(number), b"", "wav", {"text": line, "seconds": 1.0}) for number, line in enumerate(lines)]
    unlabelled = Sample("u", b"", "wav", {"seconds": 1.0})
    write_index(shards, [write_shard(shards / "shard-000000.tar", [*samples, unlabelled])])
    hashes = {trained(tmp_path, lines, output=str(tmp_path / "0")).hash}
    apart = []
    for one in samples:
        (tmp_path / f"of-{one.key}").mkdir()
        write_index(tmp_path / f"of-{one.key}", [write_shard(tmp_path / f"of-{one.key}" / "shard-000000.tar", [one])])
        apart.append(str(tmp_path / f"of-{one.key}"))
    for number, source in enumerate((str(manifest), str(shards), apart), 1):
        hashes.add(trained(tmp_path, source=source, output=str(tmp_path / str(number))).hash)
    assert len(hashes) == 1


@pytest.mark.parametrize("kind", ["empty", "blank", "unlabelled"])
def test_no_text_is_named(tmp_path: Path, kind: str) -> None:
    if kind == "unlabelled":
        source = tmp_path / "shards"
        source.mkdir()
        write_index(source, [write_shard(source / "shard-000000.tar", [Sample("u", b"", "wav", {"seconds": 1.0})])])
    else:
        source = Path(text_file(tmp_path, [] if kind == "empty" else ["", "  "]))
    with pytest.raises(UserError, match="holds no text to make units from; give labelled audio shards") as caught:
        train_units(UnitsSettings(source=str(source), output=str(tmp_path / "units")))
    assert str(source) in str(caught.value) and not (tmp_path / "units").exists()


def test_every_character_of_the_text_has_a_piece(tmp_path: Path) -> None:
    lines = ["one", "two", "öß"]
    with pytest.raises(UserError, match=r"size: 6 char pieces leave out a character of '.*'; choose a larger size"):
        trained(tmp_path, lines, kind="char", size=6)
    assert not (tmp_path / "units").exists()
    units = trained(tmp_path, lines, kind="char", size=20)
    assert units.unknown not in units.encode("two öß") and units.unknown in units.encode("z")


def test_missing_source_is_named(tmp_path: Path) -> None:
    for name, what in (("no.txt", "text file"), ("no.jsonl", "manifest")):
        with pytest.raises(UserError, match=rf"{name}: no such {what}"):
            trained(tmp_path, source=str(tmp_path / name))


def test_missing_and_damaged_units_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: holds no units\.model; make units with `asr-kd units`"):
        load_units(tmp_path / "nowhere")
    good = trained(tmp_path).model
    for damaged in (b"", b"not a model", good[: len(good) // 2], bytes(300)):
        (tmp_path / "units" / "units.model").write_bytes(damaged)
        with pytest.raises(UserError, match=r"units\.model: not a sentencepiece model"):
            load_units(tmp_path / "units")


def test_texts_are_spelt_as_the_units_write_them(tmp_path: Path) -> None:
    units = trained(tmp_path, ["don’t caf\u0065\u0301", "don't so\u00adlo cafe"])
    plain = units.encode("don't café solo")
    assert units.unknown not in plain and units.decode(plain) == "don't café solo"
    for text in ("don’t cafe\u0301 solo", "don‘t\u00a0café▁so\u200dlo", "donʼt  café so\ufb02o".replace("\ufb02", "l")):
        assert units.encode(text) == plain and units.written(text) == "don't café solo"
        assert units.changes(text) and not units.changes(units.written(text))
    # what no unit covers stays where it is: one word is one word
    assert units.written("Solo  solX") == "Solo solX" and not units.changes(" Solo  solX")
    assert units.unwritable("Solo solX") == ["S", "X"]


def test_units_of_old_texts_keep_their_apostrophe(tmp_path: Path) -> None:
    """As they were learned before texts were folded."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["don’t on\u00adto"] * 3), model_writer=buffer, model_type="char", vocab_size=8,
        bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0, normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    old = Units(buffer.getvalue())
    assert old.written("don't don’t") == "don’t don’t" and old.unknown not in old.encode("don't")
    assert old.written("on\u00adto on\u200dto") == "on\u00adto onto"


def test_units_that_this_version_would_make_otherwise_are_not_replaced(tmp_path: Path) -> None:
    other = trained(tmp_path / "other", ["one two"]).model
    trained(tmp_path / "mine")
    path = tmp_path / "mine" / "units" / "units.model"
    path.write_bytes(other)
    with pytest.raises(UserError, match=r"units\.model: other units of the same texts"):
        trained(tmp_path / "mine")
    assert path.read_bytes() == other


@pytest.mark.parametrize("name", ["basic", "english"])
def test_a_normaliser_goes_with_the_units(tmp_path: Path, name: str) -> None:
    made = trained(tmp_path, ["We DON’T know.", "Colour, please!"], normalizer=name)
    again = pickle.loads(pickle.dumps(load_units(tmp_path / "units")))
    for units in (made, again):
        wanted = {"basic": "we dont know", "english": "we do not know"}[name]
        assert units.normalizer == name
        assert units.decode(units.encode("WE don't, know")) == wanted == units.written("WE don't, know")
        assert not units.changes("WE don't, know")
    assert trained(tmp_path, ["We DON’T know.", "Colour, please!"], normalizer=name).hash == made.hash
    with pytest.raises(UserError, match=r'units: belongs to other settings \(normalizer was "'):
        trained(tmp_path, ["We DON’T know.", "Colour, please!"])
    of_tomorrow = made.model.replace(NORMALIZERS[name].version.encode(), f"{name}-9".encode())
    with pytest.raises(UserError, match=rf"u: units of texts by normaliser {name}-9; this program has none-3, basic-2"):
        Units(of_tomorrow, "u")


def test_a_signal_while_sentencepiece_asks_for_text_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asr_kd.units._parts", lambda _: (os.kill(os.getpid(), signal.SIGTERM) for _ in "ab"))
    with interruptible(), pytest.raises(KeyboardInterrupt):
        trained(tmp_path)


def test_the_unknown_word_of_others_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"\.txt: the text 'one <unk>' holds <unk>, which stands for what no unit covers"
    ):
        trained(tmp_path, ["one two", "one <unk>"])


def test_long_texts_are_learned_too(tmp_path: Path) -> None:
    """sentencepiece passes over those of more than 4192 bytes."""
    short, long = ["tea toe"] * 40, "heron noon onion " * 400
    with_it = trained(tmp_path / "a", [*short, long], kind="bpe", size=20)
    assert [with_it.piece(unit) for unit in with_it.encode("heron noon")] == ["▁heron", "▁noon"]
    assert trained(tmp_path / "b", [long], kind="bpe", size=14).unknown not in with_it.encode("onion")
    unbroken = trained(tmp_path / "c", ["ab" * 50_000 + "ö", "c"], kind="char", size=20)
    assert unbroken.unwritable("abcö") == []


def test_what_sentencepiece_keeps_for_itself_loses_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    units = trained(tmp_path, ["one▅two", "six▁ten", "x\0y", "one"])
    assert units.unwritable("one two six ten x y") == [] and units.written("one▅two▁six") == "one two six"
    assert (
        "3 of 4 texts are read in another spelling (first: 'one\\u2585two' is read as 'one two')"
        in capsys.readouterr().err
    )


def test_capitals_and_punctuation_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "a", ["Hello, it's me.", "Yes"], size=40)
    assert capsys.readouterr().err == (
        f"{tmp_path}/a/text.txt: 15 % of the letters are capitals, 12 % of the characters are punctuation or symbols, "
        "which nobody hears; set normalizer=basic to fold them\n"
    )
    trained(tmp_path / "b", ["Hello, it's me.", "Yes"], size=40, normalizer="basic")
    trained(tmp_path / "c", ["HELLO IT'S ME", "YES"], size=40)
    trained(tmp_path / "d", ["hello it's me", "yes"], size=40)
    assert capsys.readouterr().err == ""


NEMO = '{"audio": "/d/%d.wav", "duration": 3.2, "text": "%s"}\n'


def test_a_manifest_is_one_whatever_it_is_called(tmp_path: Path) -> None:
    lines = ["one two", "three"]
    plain = trained(tmp_path, lines)
    for name in ("train.json", "list.txt", "list"):
        path = tmp_path / name
        path.write_text("\ufeff" + "".join(NEMO % pair for pair in enumerate(lines)))
        assert trained(tmp_path, source=str(path), output=str(tmp_path / f"of-{name}")).hash == plain.hash


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"audio": "a.wav", "text": "one"}]', r"holds one JSON value, not a manifest; write a JSON object a line"),
        ('{\n "text": "one"\n}\n', r"holds one JSON value, not a manifest"),
        (
            "client_id\tpath\tsentence\nx\ta.mp3\tone two\n",
            r"is a table \(cut by tabs, with the columns client_id, path, sen",
        ),
        (
            "wav_filename,wav_filesize,transcript\na.wav,3,one, two\n",
            r"is a table \(cut by commas, with the columns wav_fil",
        ),
        (
            "utt-001 one two\nutt-002 three\n",
            r"has a key in front of each text \(utt-001\), as Kaldi's `text` has; give the",
        ),
        (
            "one two (a-1)\nthree (a-2)\n",
            "is a trn of sclite, with a key behind each text, not plain text; write its texts alone",
        ),
        ("a 1 0.5 0.25 one\na 1 0.75 0.5 two 0.9\n", "is a CTM"),
        (";; x\na 1 anna 0.5 2.75 <o> one two\n", "is an STM, with times"),
        ("1\n00:00:01,000 --> 00:00:02,500\none two\n", "is subtitles"),
        ("LJ001-0001|Printing|printing\nLJ001-0002|in being|in being\n", r"is a table \(cut by bars\)"),
        ('File type = "ooTextFile"\nxmin = 0\n', "is a TextGrid"),
        ("<!DOCTYPE html>\n<p>one two</p>\n", "is a web page"),
        ("a.wav\tone two\nb.wav\tthree\n", r"is a table \(cut by tabs\), not plain text; write its texts alone"),
    ],
)
def test_what_is_neither_text_nor_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    for name in ("list.json", "list.tsv", "list.txt"):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name}: {message}"):
            trained(tmp_path, source=str(tmp_path / name))
    assert not (tmp_path / "units").exists()


def test_a_text_of_kaldi_s_is_known_by_what_stands_beside_it(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("anna one two\nbert three\n")
    assert trained(tmp_path, source=str(tmp_path / "text")).size > 2  # names or words: who can tell
    (tmp_path / "wav.scp").write_text("anna a.wav\nbert b.wav\n")
    with pytest.raises(UserError, match=r"text: has a key in front of each text \(anna\).*cut -d' ' -f2- text > texts"):
        trained(tmp_path, source=str(tmp_path / "text"), output=str(tmp_path / "other"))


def test_texts_with_commas_and_brackets_are_texts(tmp_path: Path) -> None:
    lines = [
        "mid-air 24-hour",
        "[laughter] one, two",
        "{noise} three; four",
        "text, path or both",
        "a | b",
        "(one)",
        "12",
        "<a>",
    ]
    assert trained(tmp_path, lines, size=60).unwritable("".join(lines)) == []
