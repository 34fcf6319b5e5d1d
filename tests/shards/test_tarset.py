from __future__ import annotations

import bz2
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asr_kd.errors import UserError
from asr_kd.shards.tarset import (
    Sample,
    ShardInfo,
    first_member,
    read_checked,
    read_index,
    read_members,
    read_shard,
    shard_name,
    write_index,
    write_members,
    write_shard,
)

SAMPLES = [
    Sample("a", b"sound of a", "flac", {"seconds": 1.25, "text": "eins", "speaker": "x"}),
    Sample("größe-2", b"", "wav", {"seconds": 2}),
    Sample("c" * 180, bytes(range(256)) * 5, "opus", {"seconds": 0.5, "text": ""}),
]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / shard_name(0)
    write_shard(path, SAMPLES)
    return path


def raw_tar(path: Path, members: Iterable[tuple[str, bytes]], **changes: Any) -> None:
    """A tar of whatever names; `changes` go to the header of its last member."""
    members = list(members)
    with tarfile.open(path, "w") as tar:
        for number, (name, data) in enumerate(members):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            if number == len(members) - 1:
                for field, value in changes.items():
                    setattr(header, field, value)
            tar.addfile(header, io.BytesIO(data))


def test_round_trip(shard: Path) -> None:
    assert list(read_shard(shard)) == SAMPLES
    infos = [write_shard(shard, SAMPLES)]
    assert infos[0] == ShardInfo(
        "shard-000000.tar", 3, 3.75, shard.stat().st_size, hashlib.sha256(shard.read_bytes()).hexdigest()
    )
    write_index(shard.parent, infos)
    assert read_index(shard.parent) == infos
    assert list(read_checked(shard.parent, infos[0])) == SAMPLES
    with tarfile.open(shard) as tar:  # any reader of WebDataset finds them
        assert tar.getnames()[:3] == ["a.flac", "a.json", "größe-2.wav"]
        assert {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in tar} == {
            (0, 0, 0, "", 0o644)
        }


def test_same_samples_same_bytes(shard: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "other.tar", iter(SAMPLES))
    assert (tmp_path / "other.tar").read_bytes() == shard.read_bytes()


def test_the_bytes_are_those_that_were_always_written(shard: Path, tmp_path: Path) -> None:
    """Hashes of shards stand in indexes and in soft targets: no writer may change a byte of them."""
    written = hashlib.sha256(shard.read_bytes()).hexdigest()
    assert written == "6932ddf3abf513979a2bc22944984fba44baa452996a3a358d99d01d2cf6ad36"
    members = [("metadata.json", b"{}\n"), ("größe.target", b"x" * 700), (f"{'n' * 95}.target", b"")]
    members.append((f"{'y' * 200}.target", b"abc"))
    assert write_members(tmp_path / "t.tar", members) == (
        10240, "3508c82a3510a446ad736a47f3d3f6b4f9bf537e1ad0bf9ea007c3ea97c416dd",
    )  # fmt: skip


def test_a_shard_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    def samples() -> Iterable[Sample]:
        yield SAMPLES[0]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "a.tar", samples())
    assert not list(tmp_path.iterdir())


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAMES = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="./\\"), min_size=1, max_size=30)
FIELDS = st.dictionaries(TEXT, TEXT | st.integers() | st.booleans() | st.none() | st.lists(TEXT), max_size=4).map(
    lambda fields: {name: value for name, value in fields.items() if name not in ("text", "seconds")}
)
ANY_SAMPLES = st.lists(
    st.builds(Sample, NAMES, st.binary(max_size=1500), st.sampled_from(["wav", "flac", "ogg", "opus", "mp3"]), FIELDS),
    unique_by=lambda sample: sample.key,
    max_size=6,
)


@settings(deadline=None)
@given(ANY_SAMPLES)
def test_anything_round_trips(tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.tar"
    info = write_shard(path, samples)
    assert list(read_shard(path)) == samples and info.samples == len(samples)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_writers_are_read(tmp_path: Path, kind: int) -> None:
    path, long = tmp_path / "other.tar", "c" * (180 if kind != tarfile.USTAR_FORMAT else 90)
    members = [("a.wav", b"x" * 700), ("a.json", b"{}"), (f"{long}.wav", b""), (f"{long}.json", b"{}"), ("d.wav", b"y")]
    with tarfile.open(path, "w", format=kind) as tar:
        for number, (name, data) in enumerate(members):
            header = tarfile.TarInfo(name)
            header.size, header.mode, header.uid, header.uname = len(data), 0o600, 1000, "speaker"
            header.mtime = 1.5 if number == 1 and kind == tarfile.PAX_FORMAT else 1_700_000_000
            tar.addfile(header, io.BytesIO(data))
    assert list(read_members(path)) == members


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_a_folder_is_read_and_what_macos_adds_is_passed_over(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        folder = tarfile.TarInfo(".")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("./._a.wav", "./a.wav", "./a.json", "./.DS_Store", "b.json", "._b.json", "b.wav", "._b.wav"):
            member, data = tarfile.TarInfo(name), b"{}" if name.endswith("json") else b"sound"
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        folder.name = "./empty"
        tar.addfile(folder)
    assert list(read_shard(path)) == [Sample("a", b"sound", "wav", {}), Sample("b", b"sound", "wav", {})]
    assert first_member(path) == ("a.wav", b"sound")


@pytest.mark.parametrize(("pack", "what"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_a_packed_tar_is_named(shard: Path, tmp_path: Path, pack: Callable[[bytes], bytes], what: str) -> None:
    path = tmp_path / "p.tar"
    path.write_bytes(pack(shard.read_bytes()))
    with pytest.raises(
        UserError,
        match=rf"p\.tar: is packed by {what}; unpack it first: \w+ < p\.tar > NEW, and write its bytes and SHA-256 into index",
    ):
        list(read_shard(path))


def test_every_truncation_is_found(shard: Path) -> None:
    data = shard.read_bytes()
    cut = shard.with_name("cut.tar")
    # the last of it is padding of zeros: two blocks of them are enough
    end = len(data.rstrip(b"\0"))
    whole = -(-end // 512) * 512 + 1024
    for size in [*range(0, whole, 97), *range(0, whole, 512), whole - 1, whole - 512, len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"cut\.tar: truncated or damaged tar") as caught:
            list(read_shard(cut))
        assert "\n" not in str(caught.value)
    cut.write_bytes(data[:whole])
    assert list(read_shard(cut)) == SAMPLES


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_shards_give_a_sentence_or_samples(shard: Path, data: st.DataObject) -> None:
    damaged = bytearray(shard.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = shard.with_name("damaged.tar")
    path.write_bytes(damaged)
    try:
        samples = list(read_shard(path))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:  # only what is in the members can have changed, which the index's SHA-256 finds
        assert len(samples) == 3


JSON = b'{"seconds": 1.0}'
BAD_MEMBERS: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "no JSON": ([("a.wav", b"x")], r"a\.wav has no a\.json beside it"),
    "no audio": ([("a.json", JSON)], "a must have one audio member, found none"),
    "two audio": ([("a.wav", b"x"), ("a.flac", b"x"), ("a.json", JSON)], r"found a\.wav and a\.flac"),
    "the same member": ([("a.wav", b"x"), ("a.wav", b"x"), ("a.json", JSON)], r"member a\.wav is there twice"),
    "the same key": (
        [("a.wav", b"x"), ("a.json", JSON), ("b.wav", b"x"), ("b.json", JSON), ("a.wav", b"x"), ("a.json", JSON)],
        "the key a is there twice",
    ),
    "JSON apart": ([("a.wav", b"x"), ("b.wav", b"x"), ("a.json", JSON)], r"a\.wav has no a\.json beside it"),
    "a text file": ([("a.wav", b"x"), ("a.txt", b"one")], r"a\.txt is neither audio \(wav, flac, .*\) nor \.json"),
    "a pickle": ([("a.pyd", b"x")], "neither audio"),
    "a dotted key": ([("a.1.wav", b"x")], r"a\.1\.wav is neither audio"),
    "no extension": ([("a", b"x")], "must be named <key>.<extension>"),
    "an empty extension": ([("a.", b"x")], "must be named <key>.<extension>"),
    "a hidden file": ([(".wav", b"x")], "the key must be text that is not empty"),
    "an absolute path": ([("/etc/passwd.wav", b"x")], "has a dot, a slash"),
    "a path upward": ([("../a.wav", b"x")], "the key must be text that is not empty"),
    "a folder": ([("speech/a.wav", b"x")], "the key 'speech/a' has a dot, a slash"),
    "a control character": ([("a\x1b.wav", b"x")], "control character"),
    "not JSON": ([("a.wav", b"x"), ("a.json", b"{")], r"a\.json: not JSON"),
    "JSON that is a list": ([("a.wav", b"x"), ("a.json", b"[]")], r"a\.json: must be a JSON object, not \[\]"),
    "JSON that is not UTF-8": ([("a.wav", b"x"), ("a.json", b'"\xff"')], r"a\.json is not UTF-8"),
    "text that is none": ([("a.wav", b"x"), ("a.json", b'{"text": 3}')], "`text` must be text, not 3"),
    "text half a character": ([("a.wav", b"x"), ("a.json", b'{"text": "a\\uD83D"}')], "a.json holds half a character"),
    "text null": ([("a.wav", b"x"), ("a.json", b'{"text": null}')], "`text` must be text, not None"),
    "seconds as text": ([("a.wav", b"x"), ("a.json", b'{"seconds": "1"}')], "`seconds` must be a length"),
    "seconds true": ([("a.wav", b"x"), ("a.json", b'{"seconds": true}')], "`seconds` must be a length"),
    "seconds NaN": ([("a.wav", b"x"), ("a.json", b'{"seconds": NaN}')], "`seconds` must be a length"),
    "negative seconds": ([("a.wav", b"x"), ("a.json", b'{"seconds": -1}')], "`seconds` must be a length"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_bad_members_are_named(tmp_path: Path, case: str) -> None:
    members, message = BAD_MEMBERS[case]
    raw_tar(tmp_path / "bad.tar", members)
    with pytest.raises(UserError, match=message) as caught:
        list(read_shard(tmp_path / "bad.tar"))
    assert str(caught.value).startswith(f"{tmp_path}/bad.tar: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    raw_tar(tmp_path / "bad.tar", [("a.wav", b"")], type=kind, linkname="/etc/passwd")
    with pytest.raises(UserError, match=r"a\.wav is not a plain file"):
        list(read_members(tmp_path / "bad.tar"))


FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "truncated or damaged tar"),
    "joined with itself": (lambda data: data * 2, r"several tars joined into one \(the second begins at byte \d+\)"),
    "not a tar": (lambda data: b"one two three\n" * 1000, "truncated or damaged tar"),
    "gzip": (lambda data: b"\x1f\x8b\x08" + data, "is packed by gzip"),
    "rubbish behind": (lambda data: data + b"x" * 512, "what follows byte"),
    "a header overwritten": (lambda data: data[:1024] + b"\1" * 512 + data[1536:], "truncated or damaged tar"),
    "a header zeroed": (lambda data: data[:1024] + bytes(512) + data[1536:], "truncated or damaged tar"),
    "a size beyond the end": (lambda data: resized(data, 1 << 40), "needs .* bytes more|truncated or damaged"),
}


def resized(data: bytes, size: int) -> bytes:
    header = tarfile.TarInfo.frombuf(data[:512], "utf-8", "strict")
    header.size = size
    return header.tobuf(tarfile.GNU_FORMAT) + data[512:]


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_whole_tar(shard: Path, case: str) -> None:
    change, message = FILES[case]
    shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        list(read_shard(shard))
    assert str(caught.value).startswith(f"{shard}: ")


def test_shards_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.tar: no such shard"):
        list(read_shard(tmp_path / "missing.tar"))
    with pytest.raises(UserError, match="is a folder where a shard was expected"):
        list(read_shard(tmp_path))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("a", b"", "flac", {}), "the key a is there twice"),
        (Sample("a/b", b"", "flac", {}), "has a dot, a slash"),
        (Sample("b.1", b"", "flac", {}), "has a dot"),
        (Sample("", b"", "flac", {}), "the key must be text"),
        (Sample("b", b"", "txt", {}), "txt is not a kind of audio"),
        (Sample("b", b"", "flac", {"x": float("nan")}), "its fields cannot be written as JSON"),
        (Sample("b", b"", "flac", {"x": {1, 2}}), "its fields cannot be written as JSON"),
        (Sample("b", b"", "flac", {"x": "\ud800"}), "its fields cannot be written as JSON"),
        (Sample("b", b"", "flac", {"text": 1}), "`text` must be text"),
        (Sample("b", b"", "flac", {"seconds": "1"}), "`seconds` must be a length"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path: Path, sample: Sample, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_shard(tmp_path / "a.tar", [Sample("a", b"", "flac", {}), sample])
    assert not list(tmp_path.iterdir())


def test_names_of_members_are_keys(tmp_path: Path) -> None:
    for name in ("../a.wav", "/a.wav", "a/b.wav", "a", "a\n.wav"):
        with pytest.raises(UserError):
            write_members(tmp_path / "a.tar", [(name, b"")])


GOOD_INDEX: dict[str, Any] = {
    "format": "asr_kd-shards",
    "version": 1,
    "shards": [{"name": "shard-000000.tar", "samples": 1, "seconds": 1, "bytes": 5, "sha256": "0" * 64}],
}


def with_shard(**changes: Any) -> dict[str, Any]:
    return {**GOOD_INDEX, "shards": [{**GOOD_INDEX["shards"][0], **changes}]}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "not an index of audio shards"),
        ({}, "not an index of audio shards"),
        ({**GOOD_INDEX, "format": "other"}, "not an index of audio shards"),
        ({**GOOD_INDEX, "version": 3}, "of version 3, this program reads 2; use a newer asr_kd"),
        ({**GOOD_INDEX, "version": True}, "of version True"),
        ({**GOOD_INDEX, "version": None}, "of version None"),
        ({"format": "asr_kd-shards", "version": 1}, "shards: input should be a valid"),
        ({**GOOD_INDEX, "shards": [3]}, r"shards\.0"),
        ({**GOOD_INDEX, "shards": GOOD_INDEX["shards"] * 2}, "lists a shard twice"),
        (with_shard(name="../shard-000000.tar"), r"shards\.0\.name"),
        (with_shard(name="/etc/x.tar"), r"shards\.0\.name"),
        (with_shard(name="x.tar\n"), r"shards\.0\.name"),
        (with_shard(name=3), r"shards\.0\.name"),
        (with_shard(samples="1"), r"shards\.0\.samples"),
        (with_shard(samples=-1), r"shards\.0\.samples"),
        (with_shard(seconds=float("nan")), r"shards\.0\.seconds"),
        (with_shard(bytes=1.5), r"shards\.0\.bytes"),
        (with_shard(sha256="0"), r"shards\.0\.sha256"),
    ],
)
def test_a_bad_index_is_named(tmp_path: Path, index: Any, message: str) -> None:
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message) as caught:
        read_index(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/index.json: ")


def test_an_index_that_is_missing_or_not_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder of shards"):
        read_index(tmp_path / "missing")
    with pytest.raises(UserError, match=r"holds no shards \(index\.json is missing\)"):
        read_index(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json: not JSON"):
        read_index(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(GOOD_INDEX))
    assert read_index(tmp_path)[0].seconds == 1.0


def test_shards_that_differ_from_the_index_are_named(shard: Path) -> None:
    info = write_shard(shard, SAMPLES)
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-000000\.tar: its SHA-256 differs from index\.json"):
        list(read_checked(shard.parent, info))
    with pytest.raises(UserError, match=r"has \d+ bytes, index\.json says 7"):
        list(read_checked(shard.parent, dataclasses.replace(info, bytes=7)))
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000000\.tar: this shard is in index\.json, but not there"):
        list(read_checked(shard.parent, info))
