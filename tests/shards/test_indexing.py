from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asr_kd.audio.decode import encode
from asr_kd.config.load import build
from asr_kd.errors import UserError
from asr_kd.files import place
from asr_kd.shards import dataset, index, index_file, indexing
from asr_kd.shards.indexing import index as make_index
from asr_kd.shards.settings import IndexSettings
from asr_kd.shards.tarset import Sample, read_checked, read_index, read_listed, write_index, write_shard


def sound(number: int) -> bytes:
    return encode(np.full(800 + number, 1000 + number, np.int16), 8000, "WAV", "PCM_16")


def tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            if name.endswith("/"):
                header.type = tarfile.DIRTYPE
            file.addfile(header, io.BytesIO(data))


def utterance(number: int, folder: str = "") -> list[tuple[str, bytes]]:
    return [(f"{folder}u{number}.txt", b"text %d" % number), (f"{folder}u{number}.wav", sound(number))]


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Three tars: as `tar cf x.tar .` on a Mac writes them, packed, and one with folders."""
    folder = tmp_path / "theirs"
    mac = [("./", b""), ("./._u0.txt", b"x"), ("./.DS_Store", b"x"), *utterance(0, "./")]
    tar(folder / "train.00.tar", mac)
    tar(folder / "t", utterance(1))
    (folder / "train.01.tar.gz").write_bytes(gzip.compress((folder / "t").read_bytes()))
    (folder / "t").unlink()
    tar(folder / "train.02.tar", [("x/", b""), *utterance(2, "x/"), *utterance(3, "x/y.z/"), ("x/u4.npy", b"")])
    (folder / "README").write_text("none of ours")
    return folder


def run(output: Path, **given: Any) -> None:
    given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    make_index(build(IndexSettings, {"output": str(output), **given}, "test"))


def heard(audio: Any) -> dict[str, str | None]:
    return {sample["__key__"]: sample["text"] for sample in dataset(audio)}


def test_tars_of_others_stay_where_they_are(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in theirs.iterdir()}
    run(tmp_path / "set", audio=theirs)
    assert {path: path.read_bytes() for path in theirs.iterdir()} == before
    infos = read_index(tmp_path / "set")
    assert [(info.name, info.samples, str(info.at(""))) for info in infos] == [
        ("train_00.tar", 1, f"{theirs}/train.00.tar"),
        ("train_01.tar", 1, f"{theirs}/train.01.tar.gz"),
        ("train_02.tar", 2, f"{theirs}/train.02.tar"),
    ]
    assert infos.seconds == pytest.approx(0.4 + 6 / 8000, abs=1e-5)
    assert heard(tmp_path / "set") == {"u0": "text 0", "u1": "text 1", "x-u2": "text 2", "x-y_z-u3": "text 3"}
    for info in infos:
        assert list(read_checked(tmp_path / "set", info)) == list(read_listed(tmp_path / "set", info))
    said = capsys.readouterr().out
    assert "4 utterances in = 4 indexed + 0 quarantined" in said
    assert "4 texts from txt; not read: 1 .npy" in said


def test_a_relative_folder_moves_with_its_index(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_index(build(IndexSettings, {"audio": "theirs", "output": "indices/set"}, "test"))
    for audio in ("indices/set", ["indices/set"]):
        assert os.path.isabs(str(read_index(audio)[0].at(audio))), "a process that works elsewhere finds it"
    (tmp_path / "elsewhere").mkdir()
    for name in ("theirs", "indices"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    assert len(heard(tmp_path / "elsewhere" / "indices" / "set")) == 4


def test_killed_at_any_tar_it_goes_on(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole", audio=theirs)
    read: list[str] = []
    true = indexing._examined

    def examined(audio: Path, reading: Any, with_keys: bool, file: str) -> dict[str, Any]:
        read.append(file)
        if len(read) in (1, 3):
            raise KeyboardInterrupt
        return true(audio, reading, with_keys, file)

    monkeypatch.setattr(indexing, "_examined", examined)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "set", audio=theirs)
        assert not (tmp_path / "set" / "index.json").exists()
    run(tmp_path / "set", audio=theirs)
    assert read == ["train.00.tar", "train.00.tar", "train.01.tar.gz", "train.01.tar.gz", "train.02.tar"]
    for name in ("index.json", "quarantine.jsonl"):
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_processes_give_the_same_index_and_new_tars_are_added(theirs: Path, tmp_path: Path) -> None:
    run(tmp_path / "one", audio=theirs)
    run(tmp_path / "two", audio=theirs, loader_workers=1)
    assert (tmp_path / "one" / "index.json").read_bytes() == (tmp_path / "two" / "index.json").read_bytes()
    tar(theirs / "train.03.tar", utterance(9))
    tar(theirs / "train.00.tar", [*utterance(0), *utterance(7), *utterance(8), *utterance(6)])
    run(tmp_path / "one", audio=theirs)
    assert [info.samples for info in read_index(tmp_path / "one")] == [4, 1, 2, 1]


def test_a_tar_that_changed_since_is_named(theirs: Path, tmp_path: Path) -> None:
    run(tmp_path / "set", audio=theirs)
    data = bytearray((theirs / "train.02.tar").read_bytes())
    data[-1] = 1
    (theirs / "train.02.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"train\.02\.tar: its SHA-256 differs .* run `asr-kd index` again"):
        heard(tmp_path / "set")


def test_what_is_no_utterance_is_quarantined(theirs: Path, tmp_path: Path) -> None:
    tar(theirs / "train.03.tar", [("a.wav", b"RIFF"), ("b.txt", b"x")])
    with pytest.raises(
        UserError, match=r"theirs: 2 of 6 utterances cannot be used, more than max_bad_share 0.01 \(first: a: "
    ):
        run(tmp_path / "set", audio=theirs)
    assert not (tmp_path / "set" / "index.json").exists()
    run(tmp_path / "set", audio=theirs, max_bad_share=0.5)
    lines = [json.loads(line) for line in (tmp_path / "set" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["key"], line["file"]) for line in lines] == [("a", "train.03.tar"), ("b", "train.03.tar")]
    assert read_index(tmp_path / "set").samples == 4


def test_where_texts_stand_is_kept_and_part_of_the_sets_hash(tmp_path: Path) -> None:
    members = [("a.json", b'{"text": "A", "raw": "B"}'), ("a.wav", sound(0)), ("a.cls", b"1")]
    tar(tmp_path / "theirs" / "x.tar", members)
    (tmp_path / "classes").write_text("no\nyes\n")
    run(tmp_path / "text", audio=tmp_path / "theirs")
    run(tmp_path / "raw", audio=tmp_path / "theirs", text="json.raw")
    run(tmp_path / "cls", audio=tmp_path / "theirs", text="cls", classes=tmp_path / "classes")
    assert [heard(tmp_path / name) for name in ("text", "raw", "cls")] == [{"a": "A"}, {"a": "B"}, {"a": "yes"}]
    assert len({read_index(tmp_path / name).hash for name in ("text", "raw", "cls")}) == 3


def test_file_names_that_become_the_same_are_told_apart(tmp_path: Path) -> None:
    tar(tmp_path / "theirs" / "a.b.tar", utterance(0))
    tar(tmp_path / "theirs" / "a_b.tar", utterance(1))
    run(tmp_path / "set", audio=tmp_path / "theirs")
    infos = read_index(tmp_path / "set")
    assert [info.name for info in infos] == [f"a_b-{info.sha256[:8]}.tar" for info in infos]
    assert heard(tmp_path / "set") == {"u0": "text 0", "u1": "text 1"}


def test_an_index_is_read_in_pieces_as_a_whole(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "set", audio=theirs)
    whole = read_index(tmp_path / "set")
    path = tmp_path / "set" / "index.json"
    monkeypatch.setattr(index, "PIECE", 400)
    with monkeypatch.context() as patch:
        patch.setattr(index_file, "_read_whole", None)
        assert read_index(tmp_path / "set") == whole
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    assert read_index(tmp_path / "set") == whole


def test_in_an_object_store(theirs: Path, sets: list[str], tmp_path: Path) -> None:
    store = f"memory://{tmp_path.name}"
    for path in theirs.glob("*.tar*"):
        place(f"{store}/tars/{path.name}").write(path.read_bytes())  # type: ignore[union-attr]
    make_index(build(IndexSettings, {"audio": f"{store}/tars", "output": f"{store}/set"}, "test"))
    make_index(build(IndexSettings, {"audio": f"{store}/tars", "output": f"{store}/set"}, "test"))
    assert read_index(f"{store}/set").hash == read_index(sets[2]).hash
    assert heard(f"{store}/set") == heard(sets[2])
    run(tmp_path / "all", audio=[f"{store}/set", sets[0]])
    assert heard(tmp_path / "all") == heard(sets[2]) | heard(sets[0])
    value = json.loads(place(f"{store}/set/index.json").read_text())
    place(f"{store}/set/index.json").write(json.dumps({**value, "folder": "../tars"}).encode())  # type: ignore[union-attr]
    assert heard(f"{store}/set") == heard(sets[2])


# ---- sets that were made apart


@pytest.fixture
def sets(tmp_path: Path, theirs: Path) -> list[str]:
    """Two that `prepare` made, whose shards have the same names, and one of tars of others."""
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        samples = [
            Sample(f"{name}{one}", sound(one + 10 * number), "wav", {"seconds": 0.1, "text": name}) for one in range(2)
        ]
        infos = [write_shard(tmp_path / name / f"shard-00000{one}.tar", [samples[one]]) for one in range(2)]
        write_index(tmp_path / name, infos)
    run(tmp_path / "c", audio=theirs)
    return [str(tmp_path / name) for name in "abc"]


def test_sets_are_read_as_one(sets: list[str], tmp_path: Path) -> None:
    run(tmp_path / "all", audio=sets)
    joined = read_index(tmp_path / "all")
    assert joined == read_index(sets) and joined.hash == read_index(sets).hash
    assert heard(tmp_path / "all") == {key: text for one in sets for key, text in heard(one).items()}
    assert [str(info.at("")) for info in joined[:2]] == [f"{sets[0]}/shard-00000{one}.tar" for one in range(2)]
    assert joined.samples == 8 and joined[2:].filled.take(np.array([0]))[0] == joined[2]


def test_names_that_two_sets_have_depend_on_the_shards_alone(sets: list[str], tmp_path: Path) -> None:
    names = {info.sha256: info.name for info in read_index(sets)}
    assert len(set(names.values())) == len(names) == 7
    a = read_index(sets[0])[0]
    assert names[a.sha256] == f"shard-000000-{a.sha256[:8]}.tar"
    assert "train_00.tar" in names.values()
    shutil.copytree(sets[1], tmp_path / "moved")
    for order in ([sets[2], str(tmp_path / "moved"), sets[0]], sets[:2]):
        assert all(names[info.sha256] == info.name for info in read_index(order))


def test_an_index_of_indexes_of_indexes(sets: list[str], tmp_path: Path) -> None:
    run(tmp_path / "ab", audio=sets[:2])
    run(tmp_path / "abc", audio=[str(tmp_path / "ab"), sets[2]])
    assert read_index(tmp_path / "abc") == read_index(sets)


def test_a_set_that_changed_since_is_refused_and_indexed_anew(sets: list[str], tmp_path: Path) -> None:
    run(tmp_path / "all", audio=sets)
    write_index(sets[0], list(read_index(sets[0]))[:1])
    with pytest.raises(UserError, match=r"all/index\.json: .*/a has changed since .* run `asr-kd index` again"):
        read_index(tmp_path / "all")
    run(tmp_path / "all", audio=sets)
    assert read_index(tmp_path / "all").samples == 7


def test_the_same_shard_twice_is_refused(sets: list[str], tmp_path: Path) -> None:
    shutil.copytree(sets[0], tmp_path / "copy")
    for audio in ([sets[0], sets[0]], [sets[0], str(tmp_path / "copy")]):
        with pytest.raises(
            UserError, match=r"the same shard is there twice, as .*shard-000000\.tar and .*shard-000000\.tar; leave"
        ):
            run(tmp_path / "all", audio=audio)
    assert not (tmp_path / "all").exists()


def test_tars_without_utterances_are_no_shards_of_joined_sets(tmp_path: Path) -> None:
    """They are the same bytes under the same name in both."""
    for number, name in enumerate("ab"):
        tar(tmp_path / f"tars-{name}" / "x.tar", utterance(number))
        tar(tmp_path / f"tars-{name}" / "y.tar", [("README", b"")])
        run(tmp_path / name, audio=tmp_path / f"tars-{name}")
    sets = [str(tmp_path / name) for name in "ab"]
    run(tmp_path / "all", audio=sets)
    assert read_index(tmp_path / "all") == read_index(sets)
    assert heard(tmp_path / "all") == {"u0": "text 0", "u1": "text 1"} and len(read_index(sets)) == 2


def test_an_index_that_names_itself_is_refused(sets: list[str], tmp_path: Path) -> None:
    run(tmp_path / "all", audio=sets[:2])
    value = json.loads((tmp_path / "all" / "index.json").read_text())
    value["sets"].append({"folder": "/x", "hash": ""})
    value["sets"][0]["folder"] = str(tmp_path / "all")
    (tmp_path / "all" / "index.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"names .*all → .*all, itself"):
        read_index(tmp_path / "all")


@pytest.mark.parametrize(
    "about",
    [
        {"folder": "x"}, {"folder": 5, "reading": {"text": None, "classes": None}}, {"folder": "x", "reading": {"text": 5, "classes": None}},
        {"folder": "x", "reading": {"text": None, "classes": [5]}}, {"folder": "", "reading": {"text": None, "classes": None}},
        {"sets": 5}, {"sets": [5]}, {"sets": [{"folder": "x"}]}, {"sets": []},
    ],
)  # fmt: skip
def test_an_index_that_says_wrongly_where_shards_lie_is_named(tmp_path: Path, about: dict[str, Any]) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"format": "asr_kd-shards", "version": 2, **about, "shards": []}))
    with pytest.raises(UserError, match=r"index\.json: does not say where its shards lie|is empty where a file"):
        read_index(tmp_path)


@pytest.mark.parametrize("file", ["../x.tar", "a/b.tar", "x.exe", "", "x\n.tar"])
def test_a_file_that_is_no_tar_in_its_folder_is_refused(tmp_path: Path, file: str) -> None:
    row = {"name": "x.tar", "samples": 1, "seconds": 1.0, "bytes": 1, "sha256": "0" * 64, "file": file}
    about = {"folder": "x", "reading": {"text": None, "classes": None}}
    value = {"format": "asr_kd-shards", "version": 2, **about, "shards": [row]}
    (tmp_path / "index.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"shards\.0\.file: "):
        read_index(tmp_path)


# ---- mistakes


def test_folders_that_hold_no_such_tars_are_named(theirs: Path, sets: list[str], tmp_path: Path) -> None:
    (tmp_path / "below" / "x").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    shar = tmp_path / "shar"
    tar(shar / "recording.000000.tar", utterance(0))
    (shar / "cuts.000000.jsonl.gz").write_bytes(b"")
    tar(tmp_path / "silent" / "x.tar", [("a.npy", b"")])
    tar(tmp_path / "half" / "shard-000000.tar", utterance(0))
    (tmp_path / "half" / "job.json").write_text('{"job": "prepare", "settings": {"max_seconds": 60.0}}')
    for audio, message in {
        tmp_path / "none": "no such folder",
        tmp_path / "empty": "it is empty",
        tmp_path / "below": "holds no .tar itself; where they lie in folders below, index each",
        theirs / "README": "is a file; give the folder",
        shar: "is Lhotse Shar, whose texts lie beside its tars",
        Path(sets[0]): "has an index already",
        tmp_path / "half": r"is made by a job of asr-kd \(job\.json\); let that be finished",
        tmp_path / "silent": "hold no utterances, only .npy",
    }.items():
        with pytest.raises(UserError, match=message):
            run(tmp_path / "set", audio=audio)
        assert not (tmp_path / "set" / "index.json").exists()
    with pytest.raises(UserError, match="is where the tars are"):
        run(theirs, audio=theirs)
    with pytest.raises(UserError, match="is one of the sets"):
        run(Path(sets[0]), audio=sets)
    with pytest.raises(UserError, match=r"theirs: holds no shards .* `asr-kd index` on tars that others wrote"):
        run(tmp_path / "all", audio=[str(theirs), sets[0]])


def test_damaged_tars_are_named(theirs: Path, tmp_path: Path) -> None:
    data = (theirs / "train.02.tar").read_bytes()
    packed = (theirs / "train.01.tar.gz").read_bytes()
    for content, message in {
        data.rstrip(b"\0"): "truncated or damaged tar", packed[:-20]: "truncated or damaged gzip file", packed[:12]: "truncated or damaged gzip",
        b"BZh" + data: "is packed by bzip2; unpack it first: .*, and index it anew", b"": "truncated or damaged tar",
    }.items():  # fmt: skip
        (theirs / "train.03.tar").write_bytes(content)
        with pytest.raises(UserError, match=rf"train\.03\.tar: {message}"):
            run(tmp_path / "set", audio=theirs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"audio": ["a", "b"], "text": "txt"}, "belong to a folder of tars"),
        ({"audio": "a", "text": "txt", "classes": "c"}, "classes belong to cls"),
        ({"audio": "a", "text": "json"}, "json names no field; write json.FIELD"),
        ({"audio": []}, "audio"),
        ({"audio": "a", "text": "Text!"}, "text"),
    ],
)
def test_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(IndexSettings, {"output": "o", **given}, "test")
