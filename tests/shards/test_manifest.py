from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.errors import UserError
from asr_kd.shards.manifest import Transcripts, check_key, read_manifest, read_transcripts, write_transcripts


def test_reads_lines_with_paths_from_the_manifests_folder(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    lines = [
        {"key": "a", "audio": "wavs/a.wav", "text": "eins zwei", "speaker": "x", "age": 3},
        {"audio": "/data/Größe 2.flac", "text": None},
    ]
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    first, second = read_manifest(path)
    assert (first.key, first.audio, first.text) == ("a", tmp_path / "wavs" / "a.wav", "eins zwei")
    assert first.fields == {"speaker": "x", "age": 3}
    assert (second.key, second.audio, second.text, second.fields) == ("Größe 2", Path("/data/Größe 2.flac"), None, {})


GOOD = '{"key": "a", "audio": "a.wav"}'
BAD_LINES = {
    "not JSON": ("{key: a}", "not JSON"),
    "cut": ('{"key": "b", "audio": "b.wa', "not JSON"),
    "plain text": ("b.wav one two", "not JSON"),
    "two objects": (GOOD + GOOD, "not JSON"),
    "a list": ('["b", "b.wav"]', r"must be a JSON object \{…\}, not \['b', 'b.wav'\]"),
    "a string": ('"b"', "must be a JSON object"),
    "null": ("null", "must be a JSON object"),
    "nothing in it": ("{}", "neither `audio` nor `key`"),
    "no audio": ('{"key": "b"}', "`audio` must be the path of a file, not None"),
    "empty audio": ('{"key": "b", "audio": ""}', "`audio` must be the path of a file, not ''"),
    "audio a number": ('{"key": "b", "audio": 5}', "`audio` must be the path of a file, not 5"),
    "audio a list": ('{"key": "b", "audio": ["b.wav"]}', "`audio` must be the path"),
    "NUL in audio": ('{"key": "b", "audio": "b\\u0000.wav"}', "`audio` must be the path"),
    "key a number": ('{"key": 5, "audio": "b.wav"}', "the key must be text that is not empty, not 5"),
    "key null": ('{"key": null, "audio": "b.wav"}', "the key must be text"),
    "empty key": ('{"key": "", "audio": "b.wav"}', "the key must be text that is not empty"),
    "dotted key": ('{"key": "b.1", "audio": "b.wav"}', "the key 'b.1' has a dot"),
    "a path as key": ('{"key": "../etc/passwd", "audio": "b.wav"}', "has a dot, a slash"),
    "a slash": ('{"key": "x/b", "audio": "b.wav"}', "a slash"),
    "a backslash": ('{"key": "x\\\\b", "audio": "b.wav"}', "a slash"),
    "a newline": ('{"key": "x\\nb", "audio": "b.wav"}', "control character"),
    "an escape": ('{"key": "\\u001b[2J", "audio": "b.wav"}', "control character"),
    "a right-to-left mark": ('{"key": "a\\u202eb", "audio": "b.wav"}', "control character"),
    "an outer space": ('{"key": " b", "audio": "b.wav"}', "an outer space"),
    "a long key": (json.dumps({"key": "b" * 201, "audio": "b.wav"}), "longer than 200 bytes"),
    "a dot in the file's name": ('{"audio": "b.1.wav"}', "the key 'b.1' has a dot"),
    "text a number": ('{"key": "b", "audio": "b.wav", "text": 7}', "`text` must be text, not 7"),
    "text a list": ('{"key": "b", "audio": "b.wav", "text": ["one"]}', "`text` must be text"),
    "half a character": ('{"key": "b", "audio": "b.wav", "text": "\\ud800"}', "half a character"),
    "NaN": ('{"key": "b", "audio": "b.wav", "snr": NaN}', "NaN"),
    "the same key": ('{"key": "a", "audio": "b.wav"}', "the key a was there before, in line 1"),
    "the same name": ('{"audio": "other/a.flac"}', "the key a was there before, in line 1"),
    "deep": ('{"key": "b", "x": ' + "[" * 50000 + "]" * 50000 + "}", "too deep"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_named(tmp_path: Path, case: str) -> None:
    line, message = BAD_LINES[case]
    path = tmp_path / "list.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        list(read_manifest(path))
    assert str(caught.value).startswith(f"{path}, line 3: ") and "\n" not in str(caught.value)


def test_files_that_are_no_manifest(tmp_path: Path) -> None:
    for content in ("", "\n \n"):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"empty\.jsonl: this manifest holds no utterances"):
            list(read_manifest(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(GOOD.encode() + '\n{"key": "ä"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl, line 2: not UTF-8 text"):
        list(read_manifest(tmp_path / "latin.jsonl"))
    with pytest.raises(UserError, match=r"no such manifest; check the path"):
        list(read_manifest(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match=r"is a folder where a manifest was expected"):
        list(read_manifest(tmp_path))
    with pytest.raises(UserError, match=r"cannot be read \(Not a directory\)"):
        list(read_manifest(tmp_path / "empty.jsonl" / "x"))


KEYS = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="./\\"), min_size=1, max_size=40)


@given(st.dictionaries(KEYS, st.text(st.characters(exclude_categories=["Cs"]))))
def test_transcripts_round_trip(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> None:
    path = tmp_path_factory.getbasetemp() / "texts.jsonl"
    write_transcripts(path, texts.items())
    assert read_transcripts(path) == texts
    found = Transcripts(path)
    assert {key: found.get(key) for key in texts} == texts and found.get("no key") is None


def test_n_best_lists_are_read(tmp_path: Path) -> None:
    file = tmp_path / "lists.jsonl"
    nbest = [{"text": "a b", "score": -1.5, "words": []}, {"text": "a", "score": -2}]
    lines = [{"key": "k", "text": "a b", "nbest": nbest}, {"key": "alone", "text": "c"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = Transcripts(file)
    assert texts.nbest("k") == [("a b", -1.5), ("a", -2.0)] and texts.get("k") == "a b"
    assert texts.nbest("alone") == [("c", 0.0)] and texts.nbest("other") == []


@pytest.mark.parametrize("nbest", [[], "a", [{"text": "a"}], [{"text": 1, "score": 0}], [{"text": "a", "score": True}]])
def test_lists_that_are_none_are_refused(tmp_path: Path, nbest: object) -> None:
    file = tmp_path / "lists.jsonl"
    file.write_text(json.dumps({"key": "k", "text": "a", "nbest": nbest}) + "\n")
    with pytest.raises(UserError, match=r"lists\.jsonl, line 1: `nbest` must be a list of objects with text and score"):
        Transcripts(file)


def test_bad_transcripts_are_named(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    for line, message in {
        '{"key": "b"}': "line 2: `text` must be text, not None",
        '{"text": "b"}': "line 2: has neither",
        '{"key": "a", "text": "b"}': "line 2: the key a was there before, in line 1",
        "b one": "line 2: not JSON",
    }.items():
        path.write_text('{"key": "a", "text": "one"}\n' + line)
        with pytest.raises(UserError, match=message):
            read_transcripts(path)
        with pytest.raises(UserError, match=message):
            Transcripts(path)
    with pytest.raises(UserError, match="no such file of transcripts"):
        read_transcripts(tmp_path / "missing")


@given(st.text())
def test_a_key_that_passes_is_one_plain_name(key: str) -> None:
    try:
        check_key(key, "here")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert Path(key).name == key and "." not in key and key.encode().decode() == key


def test_audio_elsewhere_than_beside_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    path = tmp_path / "list.jsonl"
    audio = ["~/a.wav", "file:///data/b%20b.wav", "S3://bucket/c.wav", "./~/d.wav", "a:b/e.wav"]
    path.write_text("".join(json.dumps({"audio": one}) + "\n" for one in audio))
    found = [str(utterance.audio) for utterance in read_manifest(path)]
    assert found[:3] == ["/home/me/a.wav", "/data/b b.wav", "s3://bucket/c.wav"]
    assert found[3:] == [f"{tmp_path}/~/d.wav", f"{tmp_path}/a:b/e.wav"]
    path.write_text(f'{GOOD}\n{{"audio": "s3:/bucket/c.wav"}}\n')
    with pytest.raises(
        UserError,
        match=r"list.jsonl, line 2: `audio`: s3:/bucket/c.wav: is not quite a URL; write s3://bucket/c.wav",
    ):
        list(read_manifest(path))
