"""Lines as Lhotse 1.33 writes them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asr_kd.errors import UserError
from asr_kd.shards.manifest import Span
from asr_kd.shards.manifests import open_manifest
from asr_kd.shards.manifests.kinds import Kind
from tests.shards.manifests.laid_out import encoded, lines, listed, prepared, quarantined, sound, tar, write


def recording(name: str, **changes: Any) -> dict[str, Any]:
    source = {"type": "file", "channels": [0], "source": f"{name}.flac"}
    return {"id": name, "sources": [source], "sampling_rate": 8000, "num_samples": 8000, "duration": 1.0, "channel_ids": [0], **changes}  # fmt: skip


def supervision(name: str, start: float, duration: float, **changes: Any) -> dict[str, Any]:
    return {"id": name, "recording_id": "rec", "start": start, "duration": duration, "channel": 0, **changes}


def cut(name: str, start: float, duration: float, *spoken: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"id": name, "start": start, "duration": duration, "channel": 0, "supervisions": list(spoken), "recording": recording("rec"), "type": "MonoCut", **changes}  # fmt: skip


def packed(path: Path, *objects: dict[str, Any]) -> Path:
    return write(path, gzip.compress("".join(json.dumps(one) + "\n" for one in objects).encode()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "rec.flac", encoded(0, 1.0))
    return tmp_path


KNOWN = {"text": "seven", "speaker": "ann", "gender": "f", "language": "en", "custom": {"snr": 3}}


def test_cuts_are_cut_each_with_its_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed(
        folder / "cuts",
        cut("whole", 0.0, 1.0, supervision("s", 0.0, 1.0, **KNOWN)),
        cut("silent", 0.5, 0.25),
        cut("part.1", 0.5, 0.5, supervision("s1", 0.25, 0.125, text="one")),
        cut("rounded", 0.25, 0.25, supervision("s2", 0.01, 0.22, text="two")),
        cut("window", 0.25, 0.5, supervision("w1", -0.125, 0.25, text="three"), supervision("w2", 0.5, 0.25, text="")),
    )
    found = prepared(path, tmp_path / "shards")
    assert "cuts: read as cuts of Lhotse, 6 utterances, 1 without text" in capsys.readouterr().err
    assert list(found) == ["whole", "silent", "part_1", "rounded", "w1", "w2"]
    for (heard, _), (first, last) in zip(
        found.values(), [(0, 8000), (4000, 6000), (6000, 7000), (2000, 4000), (1000, 3000), (6000, 8000)], strict=True
    ):
        np.testing.assert_array_equal(heard, sound(0, 1.0)[first:last])
    assert found["whole"][1] == {**KNOWN, "recording": "rec", "seconds": 1.0}
    assert [fields.get("text") for _, fields in found.values()] == ["seven", None, "one", "two", "three", ""]


def test_recordings_alone_are_whole_and_without_text(folder: Path) -> None:
    path = lines(folder / "x.jsonl", recording("rec"), recording("two", transforms=[{"name": "Resample"}]))
    assert open_manifest(path).kind is Kind.RECORDINGS
    assert [(one.key, one.audio, one.text, one.span) for one in listed(path)] == [
        ("rec", folder / "rec.flac", None, Span()), ("two", folder / "two.flac", None, Span()),
    ]  # fmt: skip


def test_supervisions_are_joined_with_the_recordings_beside_them(folder: Path) -> None:
    two = {"type": "file", "channels": [0, 1], "source": "rec.flac"}
    packed(folder / "an4_recordings_train.jsonl.gz", recording("other"), recording("rec", sources=[two]))
    path = packed(folder / "an4_supervisions_train.jsonl.gz", supervision("s1", 0.25, 0.5, text="one", speaker="x"))
    (found,) = listed(path)
    assert (found.key, found.audio, found.text, found.span) == ("s1", folder / "rec.flac", "one", Span(0.25, 0.75))
    assert found.fields == {"speaker": "x", "channel": 0, "recording": "rec"}
    lines(folder / "an4_recordings_train.jsonl.gz", recording("other"))
    with pytest.raises(UserError, match=r"train\.jsonl\.gz, line 1: the recording 'rec' is not in .*recordings_train"):
        listed(path)
    packed(folder / "an4_recordings_train.jsonl.gz", recording("rec"), recording("rec", sources=[two]))
    with pytest.raises(UserError, match=r"recordings_train\.jsonl\.gz, line 2: the recording 'rec' was there before"):
        listed(path)
    (folder / "an4_recordings_train.jsonl.gz").unlink()
    with pytest.raises(UserError, match=r"holds supervisions, and no an4_recordings_train\.jsonl\.gz lies beside it"):
        listed(path)


def shar(folder: Path, *names: str) -> Path:
    placeholder = recording("rec", sources=[{"type": "shar", "channels": [0], "source": ""}])
    spoken = [supervision(f"s{name}", 0.0, 0.5, text=name) for name in names]
    packed(folder / "shar" / "cuts.000000.jsonl.gz", *(cut(name, 0, 0.5, one, recording=placeholder) for name, one in zip(names, spoken, strict=True)))  # fmt: skip
    return folder / "shar"


def test_a_shar_folder_gives_the_sound_of_its_tars(folder: Path, tmp_path: Path) -> None:
    path = shar(folder, "a.b-1", "c")
    tar(path / "recording.000000.tar", ("a.b-1.flac", encoded(1)), ("a.b-1.json", "{}"), ("c.flac", encoded(2)), ("c.json", "{}"))  # fmt: skip
    found = prepared(path, tmp_path / "shards")
    assert [(key, fields["text"]) for key, (_, fields) in found.items()] == [("a_b-1", "a.b-1"), ("c", "c")]
    for seed, (heard, _) in enumerate(found.values(), 1):
        np.testing.assert_array_equal(heard, sound(seed))


def test_a_shar_folder_that_does_not_fit_is_refused(folder: Path) -> None:
    path = shar(folder, "a", "c")
    with pytest.raises(UserError, match=r"cuts\.000000\.jsonl\.gz: has no recording\.000000\.tar beside it"):
        listed(path)
    for members, message in {
        ("c", "a"): r"line 1: the sound of a is not there in recording\.000000\.tar, but c\.flac",
        ("a",): r"line 2: the sound of c is not there in recording\.000000\.tar, but its end",
        ("a", "c", "d"): r"recording\.000000\.tar: d\.flac has no line in cuts\.000000",
    }.items():
        tar(path / "recording.000000.tar", *((f"{name}.flac", b"") for name in members))
        with pytest.raises(UserError, match=message):
            listed(path)


BAD = {
    "mixed": ({**cut("m", 0, 1), "type": "MixedCut"}, "is a MixedCut, which is mixed, padded or of several channels"),
    "tracks": ({"id": "m", "tracks": [{"cut": {}}]}, "is a MixedCut"),
    "padding": ({"id": "m", "duration": 1.5, "type": "PaddingCut"}, "is a PaddingCut"),
    "several channels": ({**cut("m", 0, 1), "type": "MultiCut"}, "is a MultiCut"),
    "no recording": (cut("m", 0, 1, recording=None), "has no recording, so no audio"),
    "a command": (
        cut("m", 0, 1, recording=recording("r", sources=[{"type": "command", "source": "sox"}])),
        "the recording r is no file but of the type 'command'",
    ),
    "two sources": (cut("m", 0, 1, recording=recording("r", sources=[{}, {}])), "the recording r is in several files"),
    "no sources": (cut("m", 0, 1, recording=recording("r", sources=None)), "the recording r has no `sources`, so no audio"),
    "no path": (cut("m", 0, 1, recording=recording("r", sources=[{"type": "file"}])), "the recording r: `source` must be the path of a file"),
    "no id of the recording": (cut("m", 0, 1, recording={}), "the recording has no id that is text, but None"),
    "faster": (
        cut("m", 0, 1, recording=recording("r", transforms=[{"name": "Speed", "kwargs": {"factor": 1.1}}])),
        r"the recording r is changed as it is read \(.*Speed",
    ),
    "odd transforms": (cut("m", 0, 1, recording=recording("r", transforms=3)), r"is changed as it is read \(3\)"),
    "no start": ({**cut("m", 0, 1), "start": None}, "`start` must be a number of seconds, not None"),
    "no end": ({**cut("m", 0, 1), "duration": "1"}, "`duration` must be a number of seconds, not '1'"),
    "odd supervisions": ({**cut("m", 0, 1), "supervisions": [1]}, r"`supervisions` must be a list of objects, not \[1\]"),
    "a text that is none": (cut("m", 0, 1, supervision("s", 0, 1, text=1)), "must have an id and a text that are text"),
    "an id that is none": ({**cut("m", 0, 1), "id": 1}, "the cut has no id that is text"),
    "twice": (cut("first", 0, 1), r"'first' was there before \(.*, line 1\); remove one of them"),
    "no JSON": ({"id": float("nan")}, "holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named_by_line(folder: Path, case: str) -> None:
    value, message = BAD[case]
    path = lines(folder / "cuts.jsonl", cut("first", 0, 1), value)
    with pytest.raises(UserError, match=message) as caught:
        listed(path)
    assert str(caught.value).startswith(f"{path}, line 2: ") and "\n" not in str(caught.value)


def test_a_cut_outside_of_its_recording_is_quarantined(folder: Path, tmp_path: Path) -> None:
    path = lines(folder / "cuts.jsonl", cut("a", 0.0, 1.0), cut("b", 0.75, 0.5), cut("c", 0.0, 0.5))
    assert list(prepared(path, tmp_path / "shards", max_bad_share=0.5)) == ["a", "c"]
    assert "lies outside of the recording" in quarantined(tmp_path / "shards")["b"]
