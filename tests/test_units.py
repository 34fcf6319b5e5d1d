from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.config import UnitsSettings
from asr_kd.errors import UserError
from asr_kd.shards.tarset import Sample, write_index, write_shard
from asr_kd.units import Units, load_units, train_units

LINES = ["one two three", "two three four", "four five six", "six seven eight nine zero", "zero one two"] * 4
KINDS = ["char", "bpe", "unigram"]


def text_file(folder: Path, lines: list[str]) -> str:
    path = folder / "text.txt"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def trained(folder: Path, lines: list[str] = LINES, **changes: Any) -> Units:
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
    assert units.first_unknown("one two") is None and units.first_unknown("") is None
    assert units.first_unknown("one Ä two Ö") == "Ä" and units.first_unknown("oneÄÖ") == "ÄÖ"


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
    for number, source in enumerate((manifest, shards), 1):
        hashes.add(trained(tmp_path, source=str(source), output=str(tmp_path / str(number))).hash)
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
