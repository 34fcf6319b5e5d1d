"""The verb from outside: what it writes, whole or not at all, the same twice; what it refuses; whether its programs run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_kd import cli
from asr_kd.audio.decode import encode
from asr_kd.audio.settings import FeatureSettings
from asr_kd.decoding.decoder import make_decoder
from asr_kd.decoding.settings import DecodingSettings
from asr_kd.errors import UserError
from asr_kd.export import frontend
from asr_kd.export.checking import LIMITS, Compared, Limits, own_rows
from asr_kd.export.job import export
from asr_kd.export.settings import ExportSettings
from asr_kd.export.sherpa import has_sherpa
from asr_kd.files import sha256_file
from asr_kd.shards.tarset import Sample, write_index, write_shard
from tests.export.conftest import Saved, sound

FILES = ["README.md", "export.json", "model.int8.onnx", "model.onnx", "tokens.txt"]


@pytest.fixture
def audio(tmp_path: Path) -> str:
    """Two shards, of which one utterance is too short to be heard, and one has no text."""
    samples = [
        Sample(f"u{number}", encode(sound(seconds, number), 8000, "FLAC"), "flac", {"seconds": seconds, "text": "one two"})
        for number, seconds in enumerate((1.2, 2.0, 0.01, 0.8))
    ]  # fmt: skip
    del samples[3].fields["text"]
    folder = tmp_path / "audio"
    folder.mkdir()
    write_index(folder, [write_shard(folder / f"shard-{at:06d}.tar", samples[2 * at :][:2]) for at in range(2)])
    return str(folder)


def settings(folder: Path, **changes: object) -> ExportSettings:
    values = {"checkpoint": str(folder / "checkpoint"), "output": str(folder / "out" / "small"), **changes}
    return ExportSettings.model_validate(values)


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights are sure of nothing: rounded to int8, and where the sound ends, they say something else."""
    for rounded in (False, True):
        monkeypatch.setitem(LIMITS, rounded, Limits(1.0, 1.0, 9.0, 9.0))


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("interface", ["stream", "t-one", "offline"])
def test_a_folder_that_describes_itself(interface: str, saved: Saved, tmp_path: Path) -> None:
    checkpoint = saved()
    assert export(settings(tmp_path, interface=interface, quantize="int8"))
    output = tmp_path / "out" / "small"
    assert sorted(written(output)) == FILES
    assert [path.name for path in output.parent.iterdir()] == ["small"]
    said = json.loads((output / "export.json").read_text())
    wanted = {
        "format": "asr_kd-export", "version": 1, "fingerprint": checkpoint.fingerprint, "units_hash": checkpoint.units.hash,
        "units": checkpoint.units.size, "interface": interface, "quantize": "int8", "frame_ms": 30, "lookahead_ms": 105, "checked": None,
        "multiplied_out": False,
    }  # fmt: skip
    assert {name: said[name] for name in wanted} == wanted
    assert said["features"]["sample_rate"] == 8000
    assert set(said["versions"]) == {"asr-kd", "torch", "onnx", "onnxruntime"}
    for name, file in said["files"].items():
        path = output / name
        assert (file["bytes"], file["sha256"]) == (path.stat().st_size, sha256_file(path))
    own = {
        "stream": {"state": 359 + 3 + 8 + 48, "frame_samples": 240, "first_frame_samples": 360},
        "t-one": {"state": 2 * 418, "chunk_ms": 300, "rows": 10, "lag_rows": 4, "lag_ms": 120, "tail_ms": 720},
        "offline": {"hears": "sound"},
    }[interface]
    assert {name: said[name] for name in own} == own
    card = (output / "README.md").read_text()
    assert checkpoint.fingerprint in card and "25.00%" in card and "To be filled in" in card


def test_the_same_checkpoint_gives_the_same_bytes(saved: Saved, audio: str, tmp_path: Path) -> None:
    saved()
    wanted = settings(tmp_path, interface="stream", check=audio)
    assert export(wanted)
    first = written(tmp_path / "out" / "small")
    assert export(wanted)  # over itself
    assert written(tmp_path / "out" / "small") == first
    # by another process
    words = [f"{name}={getattr(wanted, name)}" for name in ("checkpoint", "check")]
    subprocess.run([sys.executable, "-m", "asr_kd", "export", *words, f"output={tmp_path}/other"], check=True)
    assert written(tmp_path / "other") == first


def test_int8_gives_the_same_bytes(saved: Saved, tmp_path: Path) -> None:
    saved()
    for name in ("one", "two"):
        export(settings(tmp_path, interface="t-one", quantize="int8", output=str(tmp_path / name)))
    assert written(tmp_path / "one") == written(tmp_path / "two")


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("interface", ["stream", "t-one", "zipformer2", "offline"])
def test_a_check_compares_texts_log_probabilities_and_wer(
    interface: str, saved: Saved, audio: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kaldi = FeatureSettings(kind="kaldi", sample_rate=8000, mels=8)
    saved(*([kaldi] if interface == "zipformer2" else []))
    assert export(settings(tmp_path, interface=interface, quantize="int8", check=audio))
    assert "left out u2: too short" in capsys.readouterr().err
    checked = json.loads((tmp_path / "out" / "small" / "export.json").read_text())["checked"]
    runtimes = ["onnxruntime", *(["sherpa-onnx"] if interface in ("t-one", "zipformer2") and has_sherpa() else [])]
    assert set(checked) == {"data", *(f"{name}, {one}" for name in FILES[2:4] for one in runtimes)}
    found = checked["model.onnx, onnxruntime"]
    overhang = 0 if interface == "zipformer2" else 120
    frames = sum((round(8000 * seconds) - overhang) // 240 for seconds in (1.2, 2.0, 0.8))
    assert (found["utterances"], found["words"]) == (3, 4)
    # there the last frames of each are heard before silence
    assert found["frames"] == frames - {"t-one": 9, "zipformer2": 12}.get(interface, 0)
    assert found["other_best_unit"] == 0 and found["mean_difference"] < 1e-3
    if interface not in ("t-one", "zipformer2"):  # which hear silence behind the end, the checkpoint nothing
        assert found["same_texts"] == 3
        assert found["wer"] == found["checkpoint_wer"]
    assert checked["model.int8.onnx, onnxruntime"]["mean_difference"] > found["mean_difference"]
    assert f"| {found['same_texts']} of 3 |" in (tmp_path / "out" / "small" / "README.md").read_text()


def test_a_graph_that_says_something_else_is_not_written(
    saved: Saved, audio: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved()
    monkeypatch.setattr(frontend, "LOG_SCALE", 9.0)
    words = [f"checkpoint={tmp_path}/checkpoint", f"output={tmp_path}/out/small", f"check={audio}"]
    assert cli.main(["export", *words]) == 1
    said = capsys.readouterr().out
    assert re.search(r"model.onnx, onnxruntime: \d+ of \d+ frames have another best unit", said)
    assert "not written" in said
    assert list((tmp_path / "out").iterdir()) == []
    assert cli.main(["export", *words[:2]]) == 0  # unchecked, it is


def test_what_may_differ() -> None:
    found = Compared()
    rows = np.log(np.array([[0.6, 0.4], [0.3, 0.7]]))
    found.add_rows(rows, rows)
    for number in range(1000):
        found.add_text(f"u{number}", "one two", "one two", "one two")
    found.add_text("s", "one  two ", "one two", "one two")  # spaces that a client prints twice are none of the words
    assert found.beyond(LIMITS[False]) == [] and found.same_texts == 1001
    found.add_text("v", "one", "one two", "one two")  # one word may
    assert found.beyond(LIMITS[False]) == []
    for number in range(10):
        found.add_text(f"w{number}", "", "one two", "one two")
    found.add_rows(rows[:, ::-1], rows)
    texts, frames, log_prob, wer = found.beyond(LIMITS[False])
    assert texts == "74 of 7084 characters of the texts differ (v: 'one two' became 'one')"
    assert frames == "2 of 4 frames have another best unit"
    assert log_prob == "log-probabilities differ by 0.313 nat, 0.01 are allowed"
    assert wer == "WER 1.04%, the checkpoint's is 0.00%"
    assert found.told() == (
        "1,001 of 1,012 texts the same, WER 1.04% (the checkpoint's 0.00%), 2 of 4 frames with another best unit, "
        "log-probabilities off by 0.3 nat, at most 0.8"
    )
    nothing = Compared()
    nothing.add_rows(rows * np.nan, rows)
    assert nothing.beyond(LIMITS[True])


def test_a_folder_of_something_else_is_left_alone(saved: Saved, tmp_path: Path) -> None:
    saved()
    output = tmp_path / "out" / "small"
    output.mkdir(parents=True)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="small: is not empty and was not written by `asr-kd export`"):
        export(settings(tmp_path))
    assert written(output) == {"notes.txt": b"mine"}
    shutil.rmtree(output)
    export(settings(tmp_path))
    before = written(output)
    with pytest.raises(UserError, match=r"holds another export \(interface was stream, now offline\)"):
        export(settings(tmp_path, interface="offline"))
    output_of_file = tmp_path / "file"
    output_of_file.write_text("mine")
    with pytest.raises(UserError, match="file: is a file, not a folder; choose another output folder"):
        export(settings(tmp_path, output=str(output_of_file)))
    assert written(output) == before


def test_what_killed_processes_have_left_goes(saved: Saved, tmp_path: Path) -> None:
    saved()
    left = tmp_path / "out" / ".small.dead.tmp"
    left.mkdir(parents=True)
    (left / "model.onnx").write_bytes(b"half")
    export(settings(tmp_path))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["small"]


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"export: {name} is not installed; run `pip install 'asr-kd\[export\]'`"):
        export(settings(tmp_path))


def test_refusals_leave_nothing(saved: Saved, audio: str, tmp_path: Path) -> None:
    saved(kind="blstm", size=8)
    with pytest.raises(UserError, match=r"kind blstm hears whole utterances.*this one as offline"):
        export(settings(tmp_path))
    with pytest.raises(UserError, match=r"report.json: no such report; check the path"):
        export(settings(tmp_path, interface="offline", report=str(tmp_path)))
    (tmp_path / "report.json").write_text('{"format": "asr_kd-report", "systems": {"a": {"fingerprint": "b"}}}')
    with pytest.raises(UserError, match="scores no system with fingerprint"):
        export(settings(tmp_path, interface="offline", report=str(tmp_path)))
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_report_stands_in_the_card(saved: Saved, tmp_path: Path) -> None:
    mark = saved().fingerprint
    sets = {
        "test": {"words": 1918, "wer": 0.0266, "interval": [0.02, 0.03]},
        "noisy": {"words": 5, "wer": 0.5, "interval": None},
    }
    report = {"format": "asr_kd-report", "systems": {"it": {"fingerprint": mark, "sets": sets}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    export(settings(tmp_path, report=str(tmp_path)))
    card = (tmp_path / "out" / "small" / "README.md").read_text()
    assert "| test | 1,918 | 2.66% | 2.00% – 3.00% |\n| noisy | 5 | 50.00% | – |" in card


@pytest.mark.parametrize("interface", ["stream", "t-one", "zipformer2", "offline", "offline, kaldi"])
def test_the_program_in_the_card_runs(interface: str, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    kaldi = interface in ("offline, kaldi", "zipformer2")
    if (interface == "t-one" or kaldi) and not has_sherpa():
        pytest.skip("sherpa-onnx is not installed")
    checkpoint = saved(FeatureSettings(kind="kaldi", sample_rate=8000, mels=8)) if kaldi else saved()
    export(settings(tmp_path, interface=interface.partition(",")[0], quantize="int8"))
    output = tmp_path / "out" / "small"
    samples = np.concatenate([sound(3.03), np.zeros(4000, np.float32)])
    soundfile.write(output / "audio.wav", samples, 8000, subtype="PCM_16")
    program = re.search(r"```python\n(.*?)```", (output / "README.md").read_text(), re.S)
    assert program
    monkeypatch.chdir(output)
    capsys.readouterr()
    exec(compile(program[1], "README.md", "exec"), {})
    said = capsys.readouterr().out.strip()
    own = make_decoder(DecodingSettings(), checkpoint)(
        own_rows(checkpoint, samples, stream=interface != "offline, kaldi")
    )[0].text
    assert len(own) > 5
    if interface in ("t-one", "zipformer2"):  # behind the sound it hears silence, the checkpoint nothing
        assert said.split()[:3] == own.split()[:3]
    else:
        assert said == own
