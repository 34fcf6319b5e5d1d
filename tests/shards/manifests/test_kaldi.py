from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from asr_kd.errors import UserError
from asr_kd.shards.manifest import Span
from asr_kd.shards.manifests import open_manifest
from tests.shards.manifests.laid_out import RATE, encoded, listed, prepared, quarantined, sound, write

FILES = {
    "wav.scp": "sw2001 audio/sw 2001.flac\nsw2005\taudio/sw2005.flac\nsw2009 audio/sw2009.flac\n",
    "segments": "2001-A.1 sw2001 0.1 0.35\n2001-A.2 sw2001 0.4 -1\n2005-B.1 sw2005 0 0.5\n",
    "text": "2001-A.1 seven  two\n2001-A.2\tone\n",
    "utt2spk": "2001-A.1 ann\n2001-A.2 ann\n2005-B.1 bob\n",
    "spk2utt": "ann 2001-A.1 2001-A.2\nbob 2005-B.1\n",
    "spk2gender": "ann f\nbob m\n",
    "utt2lang": "2001-A.1 en\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        write(tmp_path / "data" / name, content)
    for seed, name in enumerate(("sw 2001", "sw2005", "sw2009")):
        write(tmp_path / "data" / "audio" / f"{name}.flac", encoded(seed))
    return tmp_path / "data"


def test_segments_are_cut_and_joined_with_what_is_known_of_them(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    found = prepared(folder, tmp_path / "shards")
    assert "data: read as a data folder of Kaldi, 3 utterances, 1 without text; 1 recordings without a segment" in capsys.readouterr().err  # fmt: skip
    assert list(found) == ["2001-A_1", "2001-A_2", "2005-B_1"]
    np.testing.assert_array_equal(found["2001-A_1"][0], sound(0)[800:2800])
    np.testing.assert_array_equal(found["2001-A_2"][0], sound(0)[3200:])
    np.testing.assert_array_equal(found["2005-B_1"][0], sound(1))
    first, second, third = (fields for _, fields in found.values())
    assert first == {
        "text": "seven  two", "speaker": "ann", "gender": "f", "language": "en", "recording": "sw2001",
        "seconds": 0.25, "source_start": 0.1, "source_end": 0.35,
    }  # fmt: skip
    assert second["text"] == "one" and third.keys() == {"speaker", "gender", "recording", "seconds"}


def test_without_segments_each_recording_is_an_utterance(folder: Path) -> None:
    for name in ("segments", "text", "utt2spk", "utt2lang"):
        (folder / name).unlink()
    write(folder / "text", "sw2005 TWO\n")
    found = listed(folder)
    assert [(one.key, one.text, one.span, one.fields) for one in found] == [
        ("sw2001", None, Span(), {}), ("sw2005", "TWO", Span(), {}), ("sw2009", None, Span(), {}),
    ]  # fmt: skip
    assert found[0].audio == folder / "audio" / "sw 2001.flac"


def test_paths_that_count_from_where_the_recipe_ran(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "wav.scp", "sw2001 data/audio/sw2005.flac\nsw2005 data/audio/sw2005.flac\n")
    assert listed(folder)[0].audio == folder / "audio" / "sw2005.flac"  # the folder above is the recipe's
    monkeypatch.chdir(folder.parent)
    assert listed(folder)[0].audio == folder / "audio" / "sw2005.flac"
    other = folder.parent.parent / "elsewhere"
    write(other / "data" / "audio" / "sw2005.flac", "")
    monkeypatch.chdir(other)  # goes first
    assert listed(folder)[0].audio == other / "data" / "audio" / "sw2005.flac"
    (folder / "audio" / "sw2005.flac").unlink()
    monkeypatch.chdir("/")
    assert (
        listed(folder)[0].audio == folder / "data" / "audio" / "sw2005.flac"
    )  # it is nowhere: the message names the manifest's folder


BAD = {
    "pipe": ("wav.scp", "sw2001 flac -c -d -s sw2001.flac |\nsw2005 a.flac\n", r"wav\.scp, line 1: is a command \(a pipe\)"),
    "archive": ("wav.scp", "sw2001 a.flac\nsw2005 raw/wav.ark:123\n", r"wav\.scp, line 2: lies in an archive of Kaldi"),
    "standard input": ("wav.scp", "sw2001 -\nsw2005 a.flac\n", r"wav\.scp, line 1: is standard input"),
    "no path": ("wav.scp", "sw2001\n", r"wav\.scp, line 1: nothing stands behind sw2001"),
    "twice": ("wav.scp", "sw2001 a\nsw2001 b\n", r"wav\.scp, line 2: sw2001 was there before, in line 1"),
    "missing": ("wav.scp", "sw2001 audio/a.flac\n", r"segments, line 3: the recording sw2005 is not in wav\.scp"),
    "words": ("segments", "2001-A.1 sw2001 0 x\n", r"segments, line 1: must be an utterance, its recording, and start and end"),
    "too few": ("segments", "\n2001-A.1 sw2001 0\n", r"segments, line 2: must be an utterance"),
    "text alone": ("text", "2001-A.1 a\n2001-A.9 b\n", r"text, line 2: 2001-A\.9 is not in segments, so it has no audio"),
    "speaker alone": ("utt2spk", "x y\n", r"utt2spk, line 1: x is not in segments, so it has no audio"),
    "text twice": ("text", "2001-A.1 a\n2001-A.1 b\n", r"text, line 2: 2001-A\.1 was there before, in line 1"),
    "url": ("wav.scp", "sw2001 s3:/b/a.flac\nsw2005 a\n", r"wav\.scp, line 1: s3:/b/a\.flac: is not quite a URL"),
    "latin": ("text", b"2001-A.1 \xe4\n", r"text, line 1: not UTF-8 text"),
    "empty": ("segments", "", r"text, line 1: 2001-A\.1 is not in segments"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named_by_file_and_line(folder: Path, case: str) -> None:
    name, content, message = BAD[case]
    write(folder / name, content)
    with pytest.raises(UserError, match=message) as caught:
        listed(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_a_file_of_a_folder_is_not_the_folder(folder: Path) -> None:
    for name in ("wav.scp", "segments", "text"):
        with pytest.raises(UserError, match=f"{name}: is a part of a data folder of Kaldi; give the folder, {folder}$"):
            open_manifest(folder / name)


def test_the_bytes_do_not_depend_on_where_the_folder_lies(folder: Path, tmp_path: Path) -> None:
    before = open_manifest(folder).survey()
    moved = folder.rename(tmp_path / "elsewhere")
    assert open_manifest(moved).survey() == before
    write(moved / "text", FILES["text"].replace("seven", "six"))
    assert open_manifest(moved).survey().fingerprint != before.fingerprint


def test_ten_thousand_segments_of_a_recording(folder: Path) -> None:
    for name in ("text", "utt2spk", "utt2lang"):
        (folder / name).unlink()
    write(folder / "segments", "".join(f"u{n:05} sw2001 {n / RATE} {(n + 9) / RATE}\n" for n in range(10_000)))
    found = open_manifest(folder).survey()
    assert (found.utterances, found.unlabelled) == (10_000, 10_000)


def test_only_blanks_and_tabs_part_words(tmp_path: Path) -> None:
    """A no-break space is a character; and a path too long for any file is quarantined."""
    write(tmp_path / "set" / "a.flac", encoded(0))
    write(tmp_path / "set" / "wav.scp", f"long {'x' * 5000}.flac\nu\u00a01 \t a.flac\n")
    write(tmp_path / "set" / "text", "u\u00a01 two\u00a0words\u2028three\u00a0\n")
    found = prepared(tmp_path / "set", tmp_path / "shards", max_bad_share=0.5)
    assert [(key, fields["text"]) for key, (_, fields) in found.items()] == [("u_1", "two\u00a0words\u2028three\u00a0")]
    assert "File name too long" in quarantined(tmp_path / "shards")["long"]
