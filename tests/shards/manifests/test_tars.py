from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from asr_kd.errors import AudioError, UserError
from asr_kd.shards.manifest import Utterance
from asr_kd.shards.manifests import Manifest, entries, open_manifest
from asr_kd.shards.manifests.entries import Member
from asr_kd.shards.manifests.kinds import Kind
from tests.shards.manifests.laid_out import encoded, lines, listed, prepared, quarantined, sound, tar, write


def test_tars_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    tar(
        folder / "train-000.tar",
        ("./spk/a.flac", encoded(0)), ("./spk/a.txt", "seven two\n"), ("./spk/a.json", json.dumps({"speaker": "x", "text": "7 2"})),
        ("._b.wav", "macOS"), ("b.json", json.dumps({"sentence": "one", "start": 3.0})), ("b.wav", encoded(1, kind="WAV")), ("b.npy", b"features"),
        ("c.cls", "7"), ("c.left.mp3", encoded(2, kind="MP3")), ("README", "about"),
    )  # fmt: skip
    tar(folder / "train-001.tar", ("b.FLAC", encoded(3)), ("b.cls", "dog"), ("d.flac", b"damaged"))
    found = prepared(folder, tmp_path / "shards", max_bad_share=0.2)
    said = (
        "set: read as WebDataset tars, 5 utterances, 3 without text; 1 .npy members not read; "
        "1 samples whose .json has another text than their .txt, which is taken; 1 samples without audio\n"
    )
    assert said in capsys.readouterr().err
    known = {
        key: {name: value for name, value in fields.items() if name != "seconds"} for key, (_, fields) in found.items()
    }
    assert known == {
        "spk-a": {"text": "seven two", "speaker": "x"}, "b": {"text": "one", "start": 3.0}, "c": {"class": 7}, "b-2": {"class": "dog"},
    }  # fmt: skip
    for key, seed in {"spk-a": 0, "b": 1, "b-2": 3}.items():
        np.testing.assert_array_equal(found[key][0], sound(seed))
    assert quarantined(tmp_path / "shards")["d"].startswith(f"{folder}/train-001.tar, d.flac: ")


def test_a_set_of_ours_is_read_as_any_other(tmp_path: Path) -> None:
    write(tmp_path / "a.flac", encoded(0))
    ours = lines(tmp_path / "list.jsonl", {"audio": "a.flac", "text": "one", "speaker": "x"})
    first = prepared(ours, tmp_path / "shards")
    again = prepared(tmp_path / "shards", tmp_path / "again")
    assert {key: fields for key, (_, fields) in again.items()} == {key: fields for key, (_, fields) in first.items()}


def test_members_in_a_store_are_fetched_one_by_one(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", ("a.flac", encoded(0)), ("a.txt", "one"), ("b.flac", encoded(1)))
    fsspec.filesystem("memory").pipe_file("/bucket/set/a.tar", path.read_bytes())
    for url in ("memory://bucket/set", "memory://bucket/set/a.tar"):
        first, second = listed(url)  # type: ignore[arg-type]
        assert (first.key, first.text, second.key, second.text) == ("a", "one", "b", None)
        assert first.audio.read_bytes() == encoded(0) and second.audio.read_bytes() == encoded(1)
        with second.audio.fetched() as copy:  # type: ignore[union-attr]
            assert copy.read_bytes() == encoded(1)


def test_a_recording_of_any_length_is_copied_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = listed(tar(tmp_path / "a.tar", ("a.flac", encoded(0))))
    sizes = []
    real = Member.read_bytes

    def read(member: Member, *rest: int | None) -> bytes:
        sizes.append(len(data := real(member, *rest)))
        return data

    monkeypatch.setattr(entries, "BLOCK", 1000)
    monkeypatch.setattr(Member, "read_bytes", read)
    with one.audio.fetched() as copy:
        assert copy.read_bytes() == encoded(0)
    assert len(sizes) > 1 and max(sizes) == 1000


def test_a_tar_that_is_cut_afterwards(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", ("a.flac", encoded(0)))
    (one,) = listed(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(AudioError, match=r"a\.tar, a\.flac: the tar was cut since"):
        one.audio.read_bytes()


def test_a_tar_of_a_store_that_is_gone_afterwards(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name, seed in (("a", 0), ("b", 1)):
        path = tar(tmp_path / f"{name}.tar", (f"{name}.flac", encoded(seed)))
        store.pipe_file(f"/gone/{name}.tar", path.read_bytes())
    real = Manifest.read

    def gone(self: Manifest, notes: Any) -> Iterator[Utterance]:
        yield from real(self, notes)
        store.rm(store.find("/gone/")[0]) if len(store.find("/gone/")) == 2 and counts.pop() else None

    counts = [1, 0]  # surveyed first, then planned
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Manifest, "read", gone)
        found = prepared("memory://gone", tmp_path / "shards", max_bad_share=0.5)  # type: ignore[arg-type]
    assert list(found) == ["b"]
    assert quarantined(tmp_path / "shards")["a"].endswith("a.flac: cannot be read (it is not there); check the file and its permissions")  # fmt: skip


BAD = {
    "dots in keys": ([("a.1.flac", b""), ("a.2.flac", b"")], r"a\.1\.flac and a\.2\.flac are one sample, as keys end at"),
    "torn apart": ([("a.flac", b""), ("b.flac", b""), ("a.flac", b"")], r"a\.flac and a\.flac have one key, and others stand between them"),
    "text apart": ([("a.flac", b""), ("b.flac", b""), ("a.txt", "one")], r"a\.flac and a\.txt have one key"),
    "text before": ([("a.txt", "one"), ("b.flac", b""), ("a.flac", b"")], r"a\.txt and a\.flac have one key"),
    "two texts": ([("a.flac", b""), ("a.txt", "one"), ("a.txt", "two")], r"x\.tar: a\.txt: stands twice"),
    "no JSON": ([("a.flac", b""), ("a.json", "{")], r"x\.tar: a\.json: not JSON"),
    "a number": ([("a.flac", b""), ("a.json", "5")], r"x\.tar: a\.json: must be a JSON object"),
    "no text": ([("a.flac", b""), ("a.txt", b"\xe4")], r"x\.tar: a\.txt: is no UTF-8 text"),
    "text of JSON": ([("a.flac", b""), ("a.json", '{"text": ["x"]}')], r"a\.json: `text` must be text, not \['x'\]"),
    "no audio": ([("a.txt", "one")], r"was read as WebDataset tars, and holds no utterances, but 1 samples without audio"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named_by_tar_and_member(tmp_path: Path, case: str) -> None:
    members, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        open_manifest(tar(tmp_path / "x.tar", *members)).survey()
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_tars_that_are_cut_packed_or_hold_links(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", ("a.flac", encoded(0)))
    write(tmp_path / "y.tar", gzip.compress(path.read_bytes()))
    with pytest.raises(
        UserError, match=r"y\.tar: is a tar packed by gzip; unpack it first: gunzip < y\.tar > NEW\.tar"
    ):
        open_manifest(tmp_path / "y.tar")
    path.write_bytes(path.read_bytes()[:2048])
    assert open_manifest(path).kind is Kind.TARS
    with pytest.raises(UserError, match=r"x\.tar: truncated or damaged tar \(a\.flac needs \d+ bytes more\)"):
        listed(path)
    with tarfile.open(path, "w") as file:
        link = tarfile.TarInfo("a.flac")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    with pytest.raises(UserError, match=r"the member a\.flac is a link or a device; make the tar again: tar chf"):
        listed(path)


def test_tars_of_one_name_may_hold_the_same_keys(tmp_path: Path) -> None:
    tar(tmp_path / "set" / "a" / "0.tar", ("u.flac", encoded(0)), ("u.txt", "one"))
    tar(tmp_path / "set" / "b" / "0.tar", ("u.flac", encoded(1)), ("u.txt", "two"))
    found = prepared(tmp_path / "set", tmp_path / "shards")
    assert [(key, fields["text"]) for key, (_, fields) in found.items()] == [("u", "one"), ("u-2", "two")]
