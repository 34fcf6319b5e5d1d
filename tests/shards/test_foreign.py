from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest

from asr_kd.audio.decode import encode
from asr_kd.errors import UserError
from asr_kd.shards.foreign import Account, Reading, foreign_samples
from asr_kd.shards.tarset import read_members

TAR = Path("their.tar")
WAV = encode(np.arange(800, dtype=np.int16), 8000, "WAV", "PCM_16")  # 0.1 s

PLAIN = Reading()


def read(members: dict[str, bytes], reading: Reading = PLAIN) -> tuple[dict[str, dict[str, object]], Account]:
    account = Account()
    samples = {}
    for key, audio, extension, fields in foreign_samples(TAR, members.items(), reading, account):
        assert audio == WAV and extension in ("wav", "flac")
        samples[key] = fields
    return samples, account


def test_audio_with_json_txt_or_cls() -> None:
    samples, account = read({
        "a.wav": WAV, "a.json": b'{"text": "eins", "speaker": "x", "seconds": 99}',
        "b.txt": "\ufeffzwei \n".encode(), "b.WAV": WAV,
        "c.cls": b"drei", "c.flac": WAV,
        "d.wav": WAV,
        "e.wav": WAV, "e.txt": b"",
    })  # fmt: skip
    assert samples == {
        "a": {"text": "eins", "speaker": "x", "seconds": 0.1},
        "b": {"text": "zwei", "seconds": 0.1},
        "c": {"text": "drei", "seconds": 0.1},
        "d": {"seconds": 0.1},
        "e": {"text": "", "seconds": 0.1},
    }
    assert account == Account(texts={"json.text": 1, "txt": 2, "cls": 1, "": 1})  # type: ignore[arg-type]


def test_folders_dots_and_odd_letters_in_keys() -> None:
    samples, account = read(
        {"x/y/a.wav": WAV, "x/y/a.txt": b"1", "x/z/a.wav": WAV, "./b\tc .wav": WAV, "../d.wav": WAV}
    )
    assert list(samples) == ["x-y-a", "x-z-a", "b_c", "__-d"]
    assert not account.bad


def test_numbers_of_classes_are_texts_with_a_list_alone() -> None:
    members = {"a.wav": WAV, "a.cls": b"1\n", "b.wav": WAV, "b.cls": b"2"}
    assert all("text" not in fields for fields in read(members)[0].values())
    samples, account = read(members, Reading(classes=("no", "yes")))
    assert samples == {"a": {"text": "yes", "seconds": 0.1}}
    assert account.bad == [("b", "has the class 2, and classes has 2 lines, counted from 0")]


@pytest.mark.parametrize("text", ["json.sentence", "norm.txt"])
def test_texts_elsewhere(text: str) -> None:
    members = {"a.wav": WAV, "a.json": b'{"sentence": "A", "text": 5}', "a.txt": b"B", "a.norm.txt": b"A"}
    samples, account = read(members, Reading(text))
    assert samples["a"] == {"seconds": 0.1, "text": "A"} | ({"sentence": "A"})
    assert account.texts == {text: 1}
    assert read({"a.wav": WAV}, Reading(text))[0] == {"a": {"seconds": 0.1}}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.json": b"{}"}, "has no audio among json, where one audio file belongs"),
        ({"a.wav": WAV, "a.flac": WAV}, "has wav and flac among"),
        ({"a.wav": WAV, "a.json": b"{"}, "json: not JSON"),
        ({"a.wav": WAV, "a.json": b"[1]"}, "its JSON is [1], no object"),
        ({"a.wav": WAV, "a.json": b"\xff"}, "its json is not UTF-8 text"),
        ({"a.wav": WAV, "a.txt": b"\xff"}, "its txt is not UTF-8 text"),
        ({"a.wav": WAV, "a.json": b'{"text": ["a"]}'}, "json.text is ['a'], no text"),
        ({"a.wav": WAV, "a.json": b'{"text": "\\ud800"}'}, "half a character"),
        ({"a.wav": WAV, "a.json": b'{"text": "a"}', "a.txt": b"b"}, "json.text and txt hold different texts; choose one, such as text=txt"),
        ({"a.wav": WAV, "a.json": b'{"transcript": "a"}'}, "its text seems to be called transcript; set text=json.transcript"),
        ({"a.wav": b"RIFF"}, "not audio"),
        ({"a.wav": b""}, "empty (0 bytes)"),
        ({"a.wav": WAV[:-9]}, "truncated"),
    ],
)  # fmt: skip
def test_what_is_no_utterance_is_passed_over_with_its_reason(members: dict[str, bytes], reason: str) -> None:
    samples, account = read(members | {"z.wav": WAV})
    assert list(samples) == ["z"]
    ((key, said),) = account.bad
    assert key == "a" and reason in said
    assert not said.startswith("a: ")


def test_members_that_nobody_reads_are_counted() -> None:
    samples, account = read(
        {"a.wav": WAV, "a.npy": b"", "a.speaker.txt": b"", "README": b"", "x/.hidden": b"", "b.npy": b""}
    )
    assert list(samples) == ["a"]
    assert account.unread == {".npy": 2, ".speaker.txt": 1, "README": 1, ".hidden": 1}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.wav", "b.wav", "a.txt"], r"'a.wav' and 'a.txt' stand apart, .*tar --sort=name"),
        (["a/b.wav", "a-b.wav", "c.wav"], r"a\.wav|a-b\.wav is there twice"),
        (["a/b.wav", "c.wav", "a-b.wav"], r"'a/b.wav' and 'a-b.wav' .* are two utterances with the key a-b"),
        (["a.wav", "a.WAV"], "a.wav is there twice"),
        ([f"{'a' * 201}.wav"], "longer than 200 bytes"),
    ],
)
def test_keys_that_cannot_be_told_apart_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=rf"^their\.tar: .*{message}"):
        read(dict.fromkeys(names, WAV))


@pytest.mark.parametrize("packed", [False, True])
def test_damage_anywhere_is_a_sentence_or_a_reason(packed: bool, tmp_path: Path) -> None:
    rng = random.Random(0)
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name, data in {"x/a.wav": WAV, "x/a.json": b'{"text": "eins"}', "b.flac": WAV, "b.txt": b"zwei"}.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))
    good = (tmp_path / "x.tar").read_bytes().rstrip(b"\0") + bytes(1024)
    good = gzip.compress(good) if packed else good + bytes(-len(good) % 512)
    path, told = tmp_path / "y.tar", 0
    for _ in range(400):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(bad[: rng.randrange(len(bad))] if rng.random() < 0.2 else bad)
        account = Account()
        try:
            found = list(foreign_samples(path, read_members(path, foreign=True), Reading(), account))
            told += bool(account.bad or account.unread)
            assert len(found) <= 3
        except UserError as error:
            told += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert told > 150


def test_what_is_read_is_json(tmp_path: Path) -> None:
    samples, _ = read({"a.wav": WAV, "a.json": json.dumps({"text": "ß", "more": {"x": [1, None]}}).encode()})
    assert samples["a"]["more"] == {"x": [1, None]}
