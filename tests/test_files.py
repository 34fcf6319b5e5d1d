from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from asr_kd.errors import UserError
from asr_kd.files import (
    claim_folder,
    clear_torn,
    create,
    hash_json,
    parse_json,
    place,
    read_json,
    read_text,
    sha256_file,
    spelled,
    write_json,
    write_whole,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.txt"
    with write_whole(path, "w") as file:
        file.write("grün")
        assert not path.exists()
    assert path.read_bytes() == "grün".encode() and names(path.parent) == {"a.txt"}
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError(errno.EIO, "broken")])
def test_what_was_there_stays_when_writing_fails(tmp_path: Path, failure: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(failure if isinstance(failure, type) else OSError), write_whole(path, "w") as file:
        file.write("half")
        raise failure
    assert path.read_text() == "old" and names(tmp_path) == {"a.txt"}


def test_what_a_dead_process_left_is_cleared_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    (tmp_path / ".dead.x.tmp").write_text("half")
    (tmp_path / "whole.txt").write_text("")
    later = time.time() + 9
    with write_whole(tmp_path / "living.txt", "w") as file:
        file.write("more than half")
        file.flush()
        clear_torn(tmp_path, began=0)
        assert len(names(tmp_path)) == 3, "nothing is so old"
        clear_torn(tmp_path, later)
        assert ".dead.x.tmp" not in names(tmp_path)
    assert names(tmp_path) == {"living.txt", "whole.txt"}
    clear_torn(tmp_path / "missing", later)


def test_a_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "a.txt"
    with pytest.raises(UserError, match="gone: is gone, removed or unmounted"), write_whole(path, make_folder=False):
        pass
    with pytest.raises(FileNotFoundError):
        create(path, "x")
    assert not names(tmp_path)


def test_a_failing_disk_is_named_where_the_system_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    for write in (lambda path: write_json(path, 1), lambda path: create(path, "x")):
        with pytest.raises(OSError) as caught:
            write(tmp_path / "a.json")
        assert caught.value.filename == str(tmp_path / "a.json") and not names(tmp_path)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left on the device; free some"),
        (errno.EDQUOT, "no space left"),
        (errno.EROFS, "cannot be written"),
        (errno.EACCES, "cannot be written"),
    ],
)
@pytest.mark.parametrize("moment", ["mkstemp", "fsync", "replace"])
def test_a_full_or_closed_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str, moment: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(f"tempfile.{moment}" if moment == "mkstemp" else f"os.{moment}", fail)
    path = tmp_path / "a.bin"
    with pytest.raises(UserError, match=message) as caught, write_whole(path) as file:
        file.write(b"data")
    monkeypatch.undo()
    assert str(path) in str(caught.value) and not names(tmp_path)


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for path in (tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"):
        with pytest.raises(UserError, match="is a file, not a folder"), write_whole(path):
            pass


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EACCES, "cannot be written (Permission denied); choose a folder you may write to"),
        (errno.ENOENT, "the folder cannot be made there; choose another output folder"),
    ],
)
def test_a_folder_that_cannot_be_made_is_named_and_no_file_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    mkdir = os.mkdir

    def fail(path: str | Path, *mode: int) -> None:
        if Path(path).parent == tmp_path:
            raise OSError(number, os.strerror(number), str(path))
        mkdir(path, *mode)

    monkeypatch.setattr(os, "mkdir", fail)
    for folder in (tmp_path / "out", tmp_path / "a" / "out"):
        for claim in (lambda: claim_folder(folder, "units", {}), lambda: write_json(folder / "a.json", 1)):  # noqa: B023
            with pytest.raises(UserError) as caught:
                claim()
            assert str(caught.value) == f"{folder}: {message}"


def test_a_link_to_nothing_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="a: is a link to a folder that is not there; make that, or remove the link"), write_whole(tmp_path / "a" / "b"):  # fmt: skip
        pass


def test_json_goes_round(tmp_path: Path) -> None:
    value = {"text": "häßlich", "list": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_text(encoding="utf-8").endswith("\n")


def test_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("grün".encode("latin-1"))
    (tmp_path / "file").write_text("")
    for name, message in {
        "none": "no such list; check the path", "latin": "this list is not UTF-8 text", "file/x": "a part of the path is a file",
        ".": "is a folder where a list was expected",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message) as caught:
            read_text(tmp_path / name, "list")
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "nope", "[" * 100_000, "{'a': 1}", '{"a": {"b": 1, "b": 1}}'])
def test_what_is_not_json_is_named(text: str) -> None:
    with pytest.raises(UserError, match=r"^list, line 3: (not JSON|JSON nested)"):
        parse_json(text, "list, line 3")


def test_a_disk_that_numpy_fills_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.npy: no space left on the device"), write_whole(tmp_path / "a.npy"):
        raise OSError("2048 requested and 1016 written")  # as np.save says it


def test_hashes_depend_on_the_value_alone(tmp_path: Path) -> None:
    assert hash_json({"a": 1, "b": [2]}) == hash_json({"b": [2], "a": 1}) == "0855bfc20eb6cfaa"
    assert len({hash_json(value) for value in ({"a": 1}, {"a": 1.5}, {"a": "1"}, {"b": 1}, [1], None)}) == 6
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_claim_holds_against_other_jobs_and_settings(tmp_path: Path) -> None:
    folder, settings = tmp_path / "out", {"k": 8, "model": {"size": 3, "kinds": (1, 2)}}
    claim_folder(folder, "label", settings)
    (folder / "shard.tar").write_text("work")
    claim_folder(folder, "label", settings)
    with pytest.raises(UserError, match=r"out: belongs to other settings \(model\.size was 3, now 4\)"):
        claim_folder(folder, "label", {**settings, "model": {"size": 4, "kinds": [1, 2]}})
    with pytest.raises(UserError, match=r"new was null, now true"):
        claim_folder(folder, "label", {**settings, "new": True})
    with pytest.raises(UserError, match=r"\(k: list\.jsonl does not hold what this output was made from\)"):
        claim_folder(folder, "label", {**settings, "k": "5e1f"}, named={"5e1f": "list.jsonl"})
    with pytest.raises(UserError, match=r"new was null, now the content of list\.jsonl"):
        claim_folder(folder, "label", {**settings, "new": "5e1f"}, named={"5e1f": "list.jsonl"})
    with pytest.raises(UserError, match="holds the output of another job; choose another output folder"):
        claim_folder(folder, "train", settings)
    assert names(folder) == {"job.json", "shard.tar"}


def test_a_folder_of_someone_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("")
    claim_folder(tmp_path, "units", {})
    (tmp_path / "job.json").unlink()
    (tmp_path / "holiday.jpg").write_text("")
    with pytest.raises(UserError, match="is not empty and was not written by `asr-kd units`"):
        claim_folder(tmp_path, "units", {})
    assert names(tmp_path) == {".hidden", "holiday.jpg"}


@pytest.mark.parametrize("claim", ["not json", "[1]", '{"job": "label"}', '{"job": "label", "settings": 3}'])
def test_a_damaged_claim_is_refused(tmp_path: Path, claim: str) -> None:
    (tmp_path / "job.json").write_text(claim)
    with pytest.raises(UserError, match=r"not JSON|another job"):
        claim_folder(tmp_path, "label", {})
    assert (tmp_path / "job.json").read_text() == claim


def test_a_claim_is_plain_json(tmp_path: Path) -> None:
    claim_folder(tmp_path / "out", "units", {"size": 8})
    assert json.loads((tmp_path / "out" / "job.json").read_text()) == {"job": "units", "settings": {"size": 8}}


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("a/b", "a/b"), ("/a b#c", "/a b#c"), ("12:30", "12:30"), ("a:b/c", "a:b/c"), ("./s3:/b", "./s3:/b"), ("a~", "a~"), ("s3", "s3"),
        ("s3/b", "s3/b"), ("file.txt", "file.txt"), ("s3://b/c", "s3://b/c"), ("S3://b/C", "s3://b/C"), ("HTTP://a/b", "http://a/b"),
        ("file:///a/b", "/a/b"), ("FILE:///a%20b", "/a b"), ("file://localhost/a", "/a"), ("file:/a", "/a"), ("~/a", "/home/me/a"), ("~", "/home/me"),
        ("./~/a", "./~/a"), ("memory://a", "memory://a"),
    ],
)  # fmt: skip
def test_a_name_is_what_is_meant(monkeypatch: pytest.MonkeyPatch, text: str, meant: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert spelled(text) == meant == spelled(meant)
    assert str(place(text)) == meant.removeprefix("./")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3:/bucket/x", "is not quite a URL; write s3://bucket/x, or ./s3:/bucket/x for a local name"),
        ("S3:/b", "write s3://b,"), ("s3:b/c", "write s3://b/c,"), ("gs//b/c", "write gs://b/c,"), (" s3://b", "write s3://b,"),
        ("'s3://b'", "write s3://b,"), ("host:/data", "not quite a URL"), ("http:/a.b/c", "write http://a.b/c,"),
        ("file://host/a", "write file:///FOLDER/FILE"), ("file:a", "no URL of a file on this machine"), ("simplecache::s3://b", "no URL that is known"),
        ("~nobody-here/a", "there is no such user; write ./~nobody-here/a"), ("", "is empty where a file or folder belongs"), (" ", "is empty"),
        ("s3://", "names no bucket"),
    ],
)  # fmt: skip
def test_nearly_a_url_is_no_folder(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        place(text)
    assert message in str(caught.value)
