from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from asr_kd.errors import UserError
from asr_kd.shards.manifests import open_manifest
from tests.shards.manifests.laid_out import encoded, listed, prepared, quarantined, sound, tar, write


@pytest.fixture
def books(tmp_path: Path) -> Path:
    root = tmp_path / "LibriSpeech"
    chapter = root / "train-clean-100" / "19" / "198"
    for seed in range(3):
        write(chapter / f"19-198-000{seed}.flac", encoded(seed))
    write(
        chapter / "19-198.trans.txt", "19-198-0000 NORTHANGER ABBEY\n19-198-0001 THIS LITTLE WORK\n19-198-0009 GONE\n"
    )
    write(root / "train-clean-100" / "20" / "5" / "20-5-0000.flac", encoded(3))
    write(root / "train-clean-100" / "20" / "5" / "20-5.trans.txt", "20-5-0000 ONE\n")
    write(root / "README.TXT", "about")
    return root


def test_librispeech(books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = prepared(books, tmp_path / "shards", max_bad_share=0.2)
    said = "LibriSpeech: read as a folder laid out as LibriSpeech, 5 utterances, 1 without text; 1 .txt files not read"
    assert said in capsys.readouterr().err
    assert {key: fields for key, (_, fields) in found.items()} == {
        "19-198-0000": {"text": "NORTHANGER ABBEY", "speaker": "19", "chapter": "198", "seconds": 0.5},
        "19-198-0001": {"text": "THIS LITTLE WORK", "speaker": "19", "chapter": "198", "seconds": 0.5},
        "19-198-0002": {"speaker": "19", "chapter": "198", "seconds": 0.5},
        "20-5-0000": {"text": "ONE", "speaker": "20", "chapter": "5", "seconds": 0.5},
    }
    np.testing.assert_array_equal(found["20-5-0000"][0], sound(3))
    assert "no such audio file" in quarantined(tmp_path / "shards")["19-198-0009"]


def test_an_id_that_stands_twice_is_named(books: Path) -> None:
    write(books / "dev" / "19-198.trans.txt", "19-198-0000 AGAIN\n")
    write(books / "dev" / "19-198-0000.flac", encoded(5))
    with pytest.raises(UserError, match=r"trans\.txt, line 1: '19-198-0000' was there before \(.*dev.*, line 1\)"):
        listed(books)


def test_audio_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "sounds"
    names = ["b.flac", "a b/c.1.WAV", "a b/c.1.mp3", "a b/x.m4a", "x-y.ogg", "x/y.ogg"]
    for seed, name in enumerate(names):
        write(root / name, encoded(seed, kind=name.rpartition(".")[2].upper().replace("M4A", "FLAC")))
    write(root / "x.txt", "not read")
    write(root / "._b.flac", "of macOS")
    (root / "gone.wav").symlink_to(root / "nowhere.wav")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "elsewhere" / "z.wav", encoded(9, kind="WAV"))
    found = prepared(root, tmp_path / "shards", max_bad_share=0.2)
    said = "sounds: read as a folder of audio files, without text, 8 utterances, 8 without text; 1 .txt files not read"
    assert said in capsys.readouterr().err
    # what would be one key gets a number; a file is what it holds, whatever its ending
    assert list(found) == ["b", "x-y", "a b-c_1", "a b-c_1-2", "a b-x", "linked-z", "x-y-2"]
    assert quarantined(tmp_path / "shards").keys() == {"gone"}
    np.testing.assert_array_equal(found["a b-x"][0], sound(3))


def test_keys_of_long_paths_differ(tmp_path: Path) -> None:
    deep = tmp_path / ("ä" * 100) / ("b" * 60)
    for name in ("1.wav", "2.wav"):
        write(deep / name, encoded(0, kind="WAV"))
    first, second = (one.key for one in listed(tmp_path))
    assert first != second and len(first.encode()) <= 200 and first.startswith("ä")


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds nothing that is known; give a list of JSON lines, or a Kaldi"):
        open_manifest(tmp_path)
    write(tmp_path / "a.wav", encoded(0, kind="WAV"))
    (tmp_path / "above").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"above: is a link to a folder that it lies in; remove it"):
        open_manifest(tmp_path)
    (tmp_path / "above").unlink()
    tar(tmp_path / "b.tar", ("a.wav", b""))
    with pytest.raises(UserError, match=r"holds audio and tar files; put each kind into a folder of its own"):
        open_manifest(tmp_path)
    (tmp_path / "b.tar").unlink()
    write(tmp_path / "all.jsonl", '{"audio": "a.wav", "text": "one"}\n')
    with pytest.raises(UserError, match=r"holds lists of utterances itself \(all\.jsonl\); give the one you mean"):
        open_manifest(tmp_path)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a\udce4.wav").write_bytes(b"")
    with pytest.raises(UserError, match=r"the name of the file .* is not UTF-8; rename it"):
        open_manifest(tmp_path)


def test_two_files_of_one_id_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "set" / "1" / "1.trans.txt", "1-2-3\tONE TWO\n")
    write(tmp_path / "set" / "1" / "1-2-3.flac", encoded(0))
    assert [(one.key, one.text) for one in listed(tmp_path / "set")] == [("1-2-3", "ONE TWO")]
    write(tmp_path / "set" / "1" / "1-2-3.wav", encoded(1, kind="WAV"))
    with pytest.raises(UserError, match=r"set/1: 1-2-3\.flac and 1-2-3\.wav have the same id; remove one of them"):
        listed(tmp_path / "set")
