from __future__ import annotations

import bz2
import json
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.errors import UserError
from asr_kd.files import place
from asr_kd.shards import manifest
from asr_kd.shards.manifest import Span, Transcripts, check_key, read_manifest, read_transcripts, write_transcripts
from asr_kd.shards.manifests.entries import packed, unpacked


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
    "empty audio without a key": ('{"audio": ""}', "`audio` must be the path of a file, not ''"),
    "audio a list without a key": ('{"audio": ["b.wav"]}', r"`audio` must be the path of a file, not \['b.wav'\]"),
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
    "text a number": ('{"key": "b", "audio": "b.wav", "text": 7}', "`text` must be text, not 7"),
    "text a list": ('{"key": "b", "audio": "b.wav", "text": ["one"]}', "`text` must be text"),
    "half a character": ('{"key": "b", "audio": "b.wav", "text": "\\ud800"}', "half a character"),
    "NaN": ('{"key": "b", "audio": "b.wav", "snr": NaN}', "NaN"),
    "the same key": ('{"key": "a", "audio": "b.wav"}', "the key a was there before, in line 1"),
    "a bound that is text": (
        '{"key": "b", "audio": "b.wav", "start": "1.5"}',
        "start must be a number of seconds, not '1.5'; rename it",
    ),
    "a bound that is true": (
        '{"key": "b", "audio": "b.wav", "end": true}',
        "end must be a number of seconds, not True",
    ),
    "two starts": ('{"key": "b", "audio": "b.wav", "start": 1, "offset": 2}', "offset and start contradict each other"),
    "two ends": (
        '{"key": "b", "audio": "b.wav", "start": 1, "end": 2, "duration": 3}',
        "start 1, end 2 and duration 3 contradict",
    ),
    "milliseconds": (
        '{"key": "b", "audio": "b.wav", "start_ms": 1}',
        "start_ms is not known; give the bounds of a segment in seconds",
    ),
    "a stop": ('{"key": "b", "audio": "b.wav", "start": 1, "stop": 2}', "stop is not known; give the bounds"),
    "a bound in camel case": (
        '{"key": "b", "audio": "b.wav", "startTime": 1}',
        "startTime is not known; give the bounds",
    ),
    "a length in samples": (
        '{"key": "b", "audio": "b.wav", "start": 1, "length": 8000}',
        "length is not known; give the length of a segment in seconds",
    ),
    "praat's bounds": ('{"key": "b", "audio": "b.wav", "xmin": 1, "xmax": 2}', "xmin is not known; give the bounds"),
    "an onset": ('{"key": "b", "audio": "b.wav", "onset": 1, "offset": 2}', "onset is not known; give the bounds"),
    "a bound with its unit": (
        '{"key": "b", "audio": "b.wav", "start (s)": 1}',
        r"start \(s\) is not known; give the bounds",
    ),
    "a bound on a clock": ('{"key": "b", "audio": "b.wav", "from": "00:01.5"}', "from is not known; give the bounds"),
    "a pair of bounds": (
        '{"key": "b", "audio": "b.wav", "timestamp": [1.5, 2]}',
        "timestamp is not known; give the bounds",
    ),
    "our own length": (
        '{"key": "b", "audio": "b.wav", "start": 1, "seconds": 2}',
        "seconds is not known; give the length",
    ),
    "no number": ('{"key": "b", "audio": "b.wav", "start": 1' + "0" * 400 + "}", "start must be a number of seconds"),
    "Common Voice's text": (
        '{"key": "b", "audio": "b.wav", "sentence": "x"}',
        "the text is called sentence there: call it text",
    ),
    "Whisper's segments": (
        '{"key": "b", "audio": "b.wav", "segments": [{"start": 0, "text": "x"}]}',
        "segments has the texts of segments; write one line each, with start, end and text",
    ),
    "Lhotse's cut": (
        '{"id": "b", "start": 1, "recording": {"sources": []}}',
        "recording is an object there: give the path of its file as audio",
    ),
    "an object": (
        '{"audio": {"path": "a/b.wav", "bytes": null}, "text": "x"}',
        "`audio` is an object, .* give its path alone, \"audio\": 'a/b.wav'",
    ),
    "NeMo's name": (
        '{"audio_filepath": "b.wav", "text": "x"}',
        "the audio file is called audio_filepath there: call it audio",
    ),
    "NeMo's name and a key": (
        '{"key": "b", "audio_filepath": "b.wav"}',
        "not None; the audio file is called audio_filepath there",
    ),
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
        with pytest.raises(
            UserError,
            match=r"empty\.jsonl: this manifest holds no utterances; write a line of JSON for each, with audio$",
        ):
            list(read_manifest(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(GOOD.encode() + '\n{"key": "ä"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl, line 2: not UTF-8 text"):
        list(read_manifest(tmp_path / "latin.jsonl"))
    with pytest.raises(UserError, match=r"no such manifest; check the path"):
        list(read_manifest(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match=r"is a folder where a manifest was expected"):
        list(read_manifest(tmp_path))
    with pytest.raises(UserError, match=r"no such manifest; a part of the path is a file"):
        list(read_manifest(tmp_path / "empty.jsonl" / "x"))


def keys_of(path: Path, *lines: dict[str, object]) -> list[str]:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [utterance.key for utterance in read_manifest(path)]


def test_keys_are_made_of_names_bounds_and_folders(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    assert keys_of(path, {"audio": "x/b.1.wav"}, {"audio": "s3://bucket/c d.flac"}, {"audio": "e\nf.wav"}) == [
        "b_1",
        "c d",
        "e_f",
    ]
    assert keys_of(
        path, {"audio": "r.wav", "start": 1.25, "end": 3}, {"audio": "r.wav", "offset": 3, "duration": 0.5}, {"audio": "r.wav", "begin": 2},
        {"audio": "r.wav", "end": 2}, {"audio": "q.wav", "duration": 2}, {"audio": "p.wav", "offset": 0}, {"audio": "o.wav", "start": None},
    ) == ["r-1250-3000", "r-3000-3500", "r-2000", "r-0-2000", "q", "p", "o"]  # fmt: skip
    # all of those that would be the same, whatever their order; a key that is given stays
    lines = [
        {"audio": "dr1/f.0/sa1.wav"},
        {"audio": "../dr2/sa1.wav"},
        {"audio": "sa2.wav"},
        {"audio": "dr3/sa3.wav"},
        {"audio": "y.wav", "key": "sa3"},
    ]
    assert keys_of(path, *lines) == ["dr1-f_0-sa1", "dr2-sa1", "sa2", "dr3-sa3", "sa3"]
    assert keys_of(path, *lines[::-1]) == ["sa3", "dr3-sa3", "sa2", "dr2-sa1", "dr1-f_0-sa1"]
    with pytest.raises(
        UserError,
        match=r"line 2: the key x-a was there before, in line 1; give one line a `key` of its own, or remove it",
    ):
        keys_of(path, {"audio": "x/a.wav"}, {"audio": "x/a.flac"})
    with pytest.raises(UserError, match=r"line 1 \(give it a `key`\): the key '\S+ is longer than 200 bytes"):
        keys_of(path, {"audio": "a" * 210 + ".wav"})


def test_bounds_are_read_under_the_names_that_others_give_them(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    for fields, expected in [
        ({"offset": 1, "duration": 2.5}, Span(1.0, 3.5)), ({"start": 1.0, "duration": 2}, Span(1.0, 3.0)), ({"start": 1, "end": 2}, Span(1.0, 2.0)),
        ({"begin": 1, "end": 2, "duration": 1.04}, Span(1.0, 2.0)), ({"start_time": 1, "end_time": 2}, Span(1.0, 2.0)), ({"start": 1, "offset": 1}, Span(1.0, None)),
        ({"duration": 2}, Span(0.0, 2.0)), ({"end": 2}, Span(0.0, 2.0)), ({"start": None, "end": None, "seconds": 3, "starts": "x", "duration_ms": 2, "endpoint": 1}, Span()),
    ]:  # fmt: skip
        path.write_text(json.dumps({"audio": "a.wav", **fields}))
        (utterance,) = read_manifest(path)
        assert utterance.span == expected and utterance.fields == fields


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bz2.compress(GOOD.encode()), r"is packed by bzip2; unpack it first: bunzip2 < list > NEW"),
        (b"PK\3\4\0\0", "is packed by zip; unpack it first: unzip -p list > NEW"),
        (
            b"client_id\tpath\tsentence\nx\ta.wav\tone\n",
            r'line 1: not JSON but a table, with tabs between its columns; this wants a JSON object on each line, such as \{"audio"',
        ),
        (b"audio,text\na.wav,one\n", "not JSON but a table, with commas"),
        (b"u1 a.wav\n", "not JSON but plain text; this wants"),
        (b'[\n{"audio": "a.wav"}\n]\n', r"line 1: a list of JSON; this wants .* jq -c '\.\[\]' "),
        (b'[{"audio": "a.wav"}]', "line 1: a list of JSON"),
    ],
)
def test_manifests_of_others_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_manifest(tmp_path / "list"))
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize(
    ("audio", "meant"),
    [("a.wav", "s3://b/x/lists/a.wav"), ("./wavs/a.wav", "s3://b/x/lists/wavs/a.wav"), ("../wavs/a.wav", "s3://b/x/wavs/a.wav"), ("s3://c/../a", "s3://c/../a")],
)  # fmt: skip
def test_paths_of_a_list_in_a_store_count_from_its_folder(audio: str, meant: str) -> None:
    folder = place("s3://b/x/lists")
    found = manifest.audio_place(folder, audio, "line 1")
    assert str(found) == meant
    assert unpacked(packed(found, folder), folder, {}) == found
    with pytest.raises(
        UserError, match=r"^line 1: \.\./\.\./\.\./\.\./a leads out of the store, counted from s3://b/x"
    ):
        manifest.audio_place(folder, "../../../../a", "line 1")


def test_a_full_disk_of_the_keys_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = manifest.database

    def small(table: str) -> sqlite3.Connection:
        database = made(table)
        database.execute("PRAGMA max_page_count = 2")
        return database

    monkeypatch.setattr(manifest, "database", small)
    monkeypatch.setenv("TMPDIR", "/small")
    path = tmp_path / "list.jsonl"
    path.write_text(
        "".join(json.dumps({"key": f"{'k' * 150}{number}", "text": "x" * 100}) + "\n" for number in range(99))
    )
    for read in (read_transcripts, Transcripts):
        with pytest.raises(
            UserError,
            match=r"^/small: database or disk is full, for the keys of a list; free some space, or set TMPDIR",
        ):
            read(path)
