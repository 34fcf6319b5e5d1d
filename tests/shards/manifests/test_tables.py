from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from asr_kd.errors import UserError
from asr_kd.shards.manifest import Span
from asr_kd.shards.manifests import open_manifest
from asr_kd.shards.manifests.kinds import Kind
from tests.shards.manifests.laid_out import encoded, lines, listed, prepared, quarantined, sound, write

HEADER = "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tdown_votes\tage\tgender\taccents\tvariant\tlocale\tsegment\n"


@pytest.fixture
def voices(tmp_path: Path) -> Path:
    for seed in range(3):
        write(tmp_path / "cv" / "clips" / f"cv_en_{seed}.mp3", encoded(seed, kind="MP3"))
    rows = [
        'abc\tcv_en_0.mp3\ts1\t"Seven," he said.\t\t2\t0\ttwenties\tfemale_feminine\tUS\t\ten\t',
        "def\tcv_en_1\ts2\tTwo\t\t3\t1\t\t\t\t\ten\tBenchmark",
        "def\tcv_en_9.mp3\ts3\tThree\t\t3\t1\t\t\t\t\ten\t",
    ]
    return write(tmp_path / "cv" / "train.tsv", HEADER + "\r\n".join(rows) + "\n")


def test_a_table_of_common_voice(voices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = prepared(voices, tmp_path / "shards", max_bad_share=0.5)
    assert "train.tsv: read as a table of Common Voice, 3 utterances\n" in capsys.readouterr().err
    assert list(found) == ["cv_en_0", "cv_en_1"]
    assert quarantined(tmp_path / "shards").keys() == {"cv_en_9"}
    fields = found["cv_en_0"][1]
    assert abs(fields.pop("seconds") - 0.5) < 0.1
    assert fields == {
        "text": '"Seven," he said.', "speaker": "abc", "sentence_id": "s1", "up_votes": "2", "down_votes": "0", "age": "twenties",
        "gender": "female_feminine", "accent": "US", "language": "en",
    }  # fmt: skip
    assert found["cv_en_1"][1]["segment"] == "Benchmark"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x\ta.mp3\n", r"line 5: has 2 cells for 13 columns"),
        ("x\t\ts\tone" + "\t" * 9 + "\n", r"line 5: names no file in `path`"),
        ("x\tcv_en_0.mp3\ts\tone" + "\t" * 9 + "\n", r"line 5: 'cv_en_0.mp3' was there before \(.*, line 2\)"),
    ],
)
def test_wrong_rows_of_common_voice_are_named(voices: Path, row: str, message: str) -> None:
    voices.write_text(voices.read_text() + row)
    with pytest.raises(UserError, match=message):
        listed(voices)


def test_the_folder_of_common_voice_is_not_one_table(voices: Path) -> None:
    write(voices.parent / "dev.tsv", HEADER)
    with pytest.raises(UserError, match=r"cv: holds lists of utterances itself \(dev\.tsv, train\.tsv\); give the one you mean"):  # fmt: skip
        open_manifest(voices.parent)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two splits, one with a CSV and one with JSON lines, and a file that neither names."""
    for seed, name in enumerate(("train/a.flac", "train/b/c.flac", "test/a.flac", "test/alone.flac")):
        write(tmp_path / "set" / name, encoded(seed))
    write(
        tmp_path / "set" / "train" / "metadata.csv",
        'file_name,transcription,speaker,note\na.flac,"seven, two",x,\nb/c.flac,"one\n""two""",y,"a, b"\n',
    )
    lines(tmp_path / "set" / "test" / "metadata.jsonl", {"file_name": "a.flac", "text": "three", "age": 3})
    return tmp_path / "set"


def test_an_audiofolder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = prepared(folder, tmp_path / "shards")
    assert "set: read as an audiofolder of Hugging Face, 3 utterances; 1 audio files that no metadata name" in capsys.readouterr().err  # fmt: skip
    assert {key: fields for key, (_, fields) in found.items()} == {
        "test-a": {"text": "three", "age": 3, "seconds": 0.5},
        "train-a": {"text": "seven, two", "speaker": "x", "seconds": 0.5},
        "train-b-c": {"text": 'one\n"two"', "speaker": "y", "note": "a, b", "seconds": 0.5},
    }
    np.testing.assert_array_equal(found["train-b-c"][0], sound(1))


def test_one_file_of_metadata_is_enough(folder: Path) -> None:
    assert [one.audio for one in listed(folder / "train" / "metadata.csv")] == [folder / "train" / "a.flac", folder / "train" / "b" / "c.flac"]  # fmt: skip
    other = (folder / "test" / "metadata.jsonl").rename(folder / "test" / "labels")  # whatever it is called
    assert open_manifest(other).kind is Kind.AUDIOFOLDER and [one.key for one in listed(other)] == ["a"]


def test_bounds_in_metadata_are_honoured(folder: Path) -> None:
    path = write(
        folder / "train" / "metadata.csv", "file_name,start,end,text\na.flac,0,0.25,one\na.flac,0.25,0.5,two\n"
    )
    assert [(one.key, one.text, one.span) for one in listed(path)] == [("a", "one", Span(0, 0.25)), ("a-250", "two", Span(0.25, 0.5))]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file_name,text\na.flac\n", r"metadata\.csv, line 2: has 1 cells for 2 columns"),
        ("file_name,text\n,one\n", r"metadata\.csv, line 2: `file_name` must be the path of a file, not None"),
        ('file_name,text\na.flac,"one\n', r"metadata\.csv, line 2: is no row of a CSV \(unexpected end"),
        ("file_name,start\na.flac,soon\n", r"metadata\.csv, line 2: start must be a number of seconds, not 'soon'"),
        ("file_name,start_ms\na.flac,5\n", r"metadata\.csv, line 2: start_ms is not known; give the bounds"),
        ("file_name,text\na.flac,a\na.flac,b\n", r"metadata\.csv, line 3: 'a.flac' was there before"),
        ('{"file_name": "a.flac", "text": 1}\n', r"metadata\.csv, line 1: `text` must be text, not 1"),
        ('{"file_name": "a.flac"}\n[]\n', r"metadata\.csv, line 2: must be a JSON object"),
    ],
)
def test_wrong_metadata_are_named(folder: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        listed(write(folder / "train" / "metadata.csv", content))


def test_metadata_of_another_kind_are_named(folder: Path) -> None:
    write(folder / "train" / "metadata.csv", "LJ001-0001|Printing, in the only sense|Printing\n")
    with pytest.raises(UserError, match=r"train/metadata\.csv: names no `file_name`"):
        open_manifest(folder)


@pytest.mark.parametrize(("content", "message"), [
    ("path\tsentence\tsentence\na.mp3\tone\ttwo\n", r"line 1: the column 'sentence' stands twice; rename or remove one"),
    ("file_name,text,text\na.wav,one,two\n", r"line 1: the column 'text' stands twice"),
    ('file_name,text\na.wav,"one\n\nb.wav,two\n', r"line 2: is no row of a CSV \(unexpected end of data\)"),
])  # fmt: skip
def test_columns_and_rows_of_tables_are_told_apart(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        listed(write(tmp_path / "table", content))
