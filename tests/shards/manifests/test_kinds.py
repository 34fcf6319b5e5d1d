"""NeMo's lists, lists that gzip packed, and what is recognised by what it holds, under any name."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest

from asr_kd.errors import UserError
from asr_kd.files import read_json, sha256_file
from asr_kd.shards.manifest import Span
from asr_kd.shards.manifests import as_line, from_line, open_manifest
from asr_kd.shards.manifests.kinds import Kind
from tests.shards.manifests.laid_out import encoded, lines, listed, prepared, sound, tar, write


def test_a_list_of_nemo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "wavs" / "a.wav", encoded(0, 1.0, "WAV"))
    path = lines(
        tmp_path / "train_manifest.json",
        {"audio_filepath": "wavs/a.wav", "duration": 1.0, "text": "one two", "lang": "en"},
        {"audio_filepath": "wavs/a.wav", "offset": 0.25, "duration": 0.5, "text": "two"},
        {"audio_filepath": str(tmp_path / "wavs" / "a.wav"), "offset": 0.5, "duration": 0.5, "text": ""},
    )
    found = prepared(path, tmp_path / "shards")
    assert "train_manifest.json: read as JSON lines of NeMo, 3 utterances\n" in capsys.readouterr().err
    assert list(found) == ["a", "a-250-750", "a-500-1000"]
    for (heard, _), (first, last) in zip(found.values(), [(0, 8000), (2000, 6000), (4000, 8000)], strict=True):
        np.testing.assert_array_equal(heard, sound(0, 1.0)[first:last])
    assert found["a"][1] == {"duration": 1.0, "lang": "en", "text": "one two", "seconds": 1.0}
    assert found["a-250-750"][1] == {"text": "two", "seconds": 0.5, "source_start": 0.25, "source_end": 0.75}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x"}, r"line 2: has neither `audio_filepath` nor `key`"),
        ({"audio_filepath": 5, "key": "b"}, r"line 2: `audio_filepath` must be the path of a file, not 5"),
        ({"audio_filepath": "s3:/x/a.wav"}, r"line 2: `audio_filepath`: s3:/x/a\.wav: is not quite a URL"),
        ({"audio_filepath": "b.wav", "offset": "x"}, r"line 2: offset must be a number of seconds"),
        ({"audio_filepath": "a.wav"}, r"line 2: the key a was there before, in line 1"),
    ],
)
def test_wrong_lines_of_nemo_are_named(tmp_path: Path, line: dict[str, object], message: str) -> None:
    path = lines(tmp_path / "list", {"audio_filepath": "a.wav", "key": "a"}, line)
    with pytest.raises(UserError, match=message):
        listed(path)


def test_nemos_tarred_lists_are_refused_by_name(tmp_path: Path) -> None:
    path = lines(tmp_path / "list", {"audio_filepath": "a.wav", "shard_id": 0})
    with pytest.raises(UserError, match=r"list: lists members of NeMo's tarred data \(shard_id\); give the list"):
        open_manifest(path)


def test_lines_that_gzip_packed(tmp_path: Path) -> None:
    plain = lines(tmp_path / "list.jsonl", {"audio": "a.wav", "text": "one", "end": 2})
    path = write(tmp_path / "list", gzip.compress(plain.read_bytes()))
    assert listed(path) == listed(plain)
    assert listed(path)[0].span == Span(0.0, 2.0)
    write(path, path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"list: truncated or damaged gzip \(.*\); fetch the file again"):
        listed(path)


def test_what_a_file_is_its_content_says(tmp_path: Path) -> None:
    for content, kind in {
        '{"audio": "a.wav", "audio_filepath": "b.wav"}': Kind.LINES,
        '\ufeff\n {"audio_filepath": "b.wav"}': Kind.NEMO,
        '{"id": "x", "recording": {}, "start": 0}': Kind.CUTS,
        '{"id": "x", "tracks": []}': Kind.CUTS,
        '{"id": "x", "sources": []}': Kind.RECORDINGS,
        '{"id": "x", "recording_id": "y", "start": 0, "duration": 1}': Kind.SUPERVISIONS,
        '{"file_name": "a.wav"}': Kind.AUDIOFOLDER,
        "text,file_name\n": Kind.AUDIOFOLDER,
        "path\tsentence\n": Kind.COMMON_VOICE,
        "PAR1....": Kind.PARQUET,
        "": Kind.LINES,
        "u1 a.wav\n": Kind.LINES,
        "{": Kind.LINES,
    }.items():
        for name in ("a", "a.jsonl", "a.tsv"):
            assert open_manifest(write(tmp_path / name, content)).kind is kind
        assert open_manifest(write(tmp_path / "a", gzip.compress(content.encode()))).kind is (
            Kind.LINES if kind is Kind.PARQUET else kind
        )
    with pytest.raises(UserError, match="no such manifest; check the path"):
        open_manifest(tmp_path / "none")


def test_lists_of_ours_are_claimed_as_before(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", encoded(0, kind="WAV"))
    path = lines(tmp_path / "list.jsonl", {"audio": "a.wav"})
    prepared(path, tmp_path / "shards")
    assert read_json(tmp_path / "shards" / "job.json")["settings"]["manifest"] == sha256_file(path)


def test_utterances_come_back_from_their_lines_wherever_the_folder_lies(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    tar(here / "tars" / "a.tar", ("x.flac", encoded(0)), ("x.txt", "größer"))
    lines(
        here / "list.jsonl",
        {"audio": "a/b.wav", "end": 2.5},
        {"audio": "/data/c.wav"},
        {"audio": "s3://b/d.wav", "n": [1]},
    )
    for name in ("tars", "tars/a.tar", "list.jsonl"):
        manifest = open_manifest(here / name)
        written = [as_line(one, manifest.base) for one in manifest]
        assert [from_line(line, manifest.base) for line in written] == list(manifest)
        here.rename(there)
        moved = open_manifest(there / name)
        assert [from_line(line, moved.base) for line in written] == list(moved)
        there.rename(here)
    (one,) = (from_line(line, here / "tars") for line in [as_line(*open_manifest(here / "tars"), here / "tars")])
    assert one.audio.read_bytes() == encoded(0) and str(one.audio) == f"{here}/tars/a.tar, x.flac"


def test_a_job_over_a_folder_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    names = [(f"{number}.flac", encoded(number)) for number in range(8)]
    tar(tmp_path / "set" / "a.tar", *names)
    prepared(tmp_path / "set", tmp_path / "shards")

    def made() -> dict[str, bytes]:
        files = (
            path
            for path in (tmp_path / "shards").iterdir()
            if path.is_file() and path.name not in ("timing.json", "summary.json")
        )
        return {path.name: path.read_bytes() for path in files}

    whole = made()
    for name in ("shard-000001.tar", "index.json"):
        (tmp_path / "shards" / name).unlink()
    prepared(tmp_path / "set", tmp_path / "shards")
    assert made() == whole
    tar(tmp_path / "set" / "a.tar", *names[:7])
    with pytest.raises(
        UserError, match=r"belongs to other settings \(manifest: \S+set does not hold what this output was made from\)"
    ):
        prepared(tmp_path / "set", tmp_path / "shards")


def test_audio_is_no_list_of_it(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"a\.wav: is audio itself \(FLAC\); give the folder that it lies in, or a list"
    ):
        open_manifest(write(tmp_path / "a.wav", encoded(0)))


def test_folders_below_one_in_a_store_are_not_seen(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/of_kinds/deep/below/a.flac", encoded(0))
    with pytest.raises(
        UserError, match=r"deep: holds nothing that is known right in it \(in a store folders below are not"
    ):
        open_manifest("memory://of_kinds/deep")
    assert open_manifest("memory://of_kinds/deep/below").kind is Kind.AUDIO


def test_what_stands_in_the_place_of_a_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x: is packed by gzip twice; unpack it first: gunzip < x > NEW\.gz"):
        listed(write(tmp_path / "x", gzip.compress(gzip.compress(b"{}"))))
    with pytest.raises(UserError, match=r"x, line 1: not JSON but a Git LFS pointer; fetch the file: git lfs pull"):
        listed(write(tmp_path / "x", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"))
    with pytest.raises(UserError, match=r"x, line 2: not JSON but a web page or XML, perhaps a server's error; fetch"):
        listed(write(tmp_path / "x", "\n<!DOCTYPE html>\n"))
    with pytest.raises(UserError, match=r"x, line 3: not JSON but a table, with commas between its columns"):
        listed(write(tmp_path / "x", "\n\na,b\n"))


@pytest.mark.parametrize("name", ["list", "kaldi/wav.scp"])
def test_a_pipe_is_refused_before_anything_is_read_of_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "kaldi").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(
        UserError, match=rf"{name}: is a pipe or a device where a (manifest|wav\.scp) was expected; write it"
    ):
        listed((tmp_path / name).parent if name.startswith("kaldi") else tmp_path / name)
