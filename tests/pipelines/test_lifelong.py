"""The recipe of learning without forgetting: its pipeline, its two domains, and that the old model's answers keep what it knew."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch

from asr_kd.audio.decode import decode
from asr_kd.config.load import build
from asr_kd.errors import UserError
from asr_kd.pipeline import load_pipeline
from asr_kd.shards.manifest import write_transcripts
from asr_kd.shards.tarset import Sample, read_index, read_shard
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from tests.audio.test_offset import speech
from tests.training.conftest import audio, development, job, letters, targets, units, write_audio

__all__ = ["audio", "development", "job", "letters", "targets", "units"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def domains() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "pipelines" / "lifelong"))
        yield importlib.import_module("domains")


@pytest.fixture(scope="module")
def measure() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "pipelines" / "taxonomy"))
        file = ROOT / "pipelines" / "lifelong" / "measure.py"
        spec = importlib.util.spec_from_file_location("lifelong_measure", file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_the_pipeline_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, stages = load_pipeline(ROOT / "pipelines" / "lifelong" / "pipeline.yaml", [])
    needs = {stage.name: set(stage.needs) for stage in stages}
    later: dict[str, dict[str, Any]] = {
        stage.name: stage.settings for stage in stages if stage.verb == "train" and stage.name != "before"
    }
    assert needs["replayed"] - needs["finetuned"] == {"replay"}
    for name, settings in later.items():
        phase = build(TrainSettings, settings, name).phases[0]
        assert "before" in needs[name] and "old" not in settings["development"]
        heard = {source.audio.rpartition("/")[2] for source in phase.sources}
        # old audio is for those alone that are said to have it
        assert heard == {"new-training"} | ({"old-training"} if name in ("replayed", "joint") else set())
        # all pass over the new audio alike, and by the same rate
        assert (phase.passes, phase.learning_rate) == (20, 0.002) and phase.sources[0].repeat == 1
    weights = [later[f"without-forgetting-{weight}"]["phases"][0]["sources"][0]["soft"] for weight in ("0.3", "1", "3")]
    assert weights == [0.3, 1.0, 3.0]


def recordings(root: Path, speakers: str) -> Path:
    """The sets of compose.py, an utterance a speaker in each of two shards."""
    said = []
    for number, letter in enumerate(speakers):
        data = io.BytesIO()
        soundfile.write(data, 0.3 * speech(number), 8000, format="WAV")
        name = {"g": "george", "j": "jackson", "n": "nicolas"}[letter]
        said.append(Sample(f"u{number}", data.getvalue(), "wav", {"seconds": 3.0, "speaker": name}))
    half = len(said) // 2
    write_audio(root / "unlabelled-half", [said[:half], said[half:]])
    write_transcripts(root / "unlabelled-oracle.jsonl", [(one.key, f"text of {one.key}") for one in said])
    for name in ("development", "test"):
        told = [Sample(one.key, one.audio, "wav", {**one.fields, "text": "own"}) for one in said]
        write_audio(root / name, [told[:half], told[half:]])
    return root


def test_two_domains(domains: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = recordings(tmp_path / "digits", "gnjjgn"), tmp_path / "domains"
    monkeypatch.setattr("sys.argv", ["domains.py", "--source", str(source), "--output", str(output)])
    domains.main()
    written = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    domains.main()
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == written
    original = {one.key: one for info in read_index(source / "test") for one in read_shard(source / "test" / info.name)}
    keys = set()
    for domain, speakers in (("old", {"george", "jackson"}), ("new", {"nicolas"})):
        for name in ("training", "development", "test"):
            folder = output / f"{domain}-{name}"
            samples = [one for info in read_index(folder) for one in read_shard(folder / info.name)]
            assert {one.fields["speaker"] for one in samples} == speakers
            for one in samples:
                assert one.fields["text"] == (f"text of {one.key}" if name == "training" else "own")
                assert (one.audio == original[one.key].audio) == (domain == "old")
                keys |= {(name, one.key)}
                if domain == "new":  # a band of 300 to 3,400 Hz
                    sound = decode(one.audio, one.key, 8000, 60.0)[0]
                    power = np.square(np.abs(np.fft.rfft(sound)))
                    assert power[: len(power) * 100 // 4000].mean() < 0.1 * power.mean()
    assert len(keys) == 3 * 6


def test_a_domain_without_utterances_is_refused(domains: ModuleType, tmp_path: Path) -> None:
    source = recordings(tmp_path / "digits", "gjgjgj")
    with pytest.raises(UserError, match=r"unlabelled-half: shard-000000.tar holds nothing of the new domain"):
        domains.split(source, tmp_path / "domains")


def test_the_old_model_s_answers_hold_a_student_where_it_is(
    job: Callable[..., TrainSettings], audio: str, letters: Path, tmp_path: Path
) -> None:
    """On text that contradicts what it knows: the stronger they weigh, the less of it changes."""
    train(job(output=str(tmp_path / "before"), phase={"passes": 3}))
    texts = {
        one.key: one.fields["text"] for info in read_index(Path(audio)) for one in read_shard(Path(audio) / info.name)
    }
    write_transcripts(tmp_path / "other.jsonl", [(key, text[::-1] + "a") for key, text in texts.items()])
    said = {}
    for weight in (0.0, 30.0):
        source = {"targets": None, "transcripts": str(tmp_path / "other.jsonl"), "ctc": 1.0, "soft": weight}
        source |= {"teacher": str(tmp_path / "before"), "temperature": 2.0} if weight else {}
        run = str(tmp_path / f"after-{weight}")
        train(job(output=run, init=str(tmp_path / "before"), source=source))
        said[weight] = last(tmp_path / f"after-{weight}")
    start = last(tmp_path / "before")
    moved = [float(sum((said[weight][name] - start[name]).square().sum() for name in start)) for weight in said]
    assert moved[0] > 2 * moved[1] > 0


def last(run: Path) -> dict[str, torch.Tensor]:
    """The weights in which a run has ended."""
    state = safetensors.torch.load((run / "last" / "state.safetensors").read_bytes())
    return {name: one.double() for name, one in state.items() if name.startswith("model.")}


def test_the_table(measure: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, worse in enumerate((0.0, 0.02)):
        wers = {"before": (0.02, 0.5), "finetuned": (0.2 + worse, 0.1), "replayed": (0.05 + worse, 0.12)}
        systems = {name: {"sets": {"old": {"wer": old}, "new": {"wer": new}}} for name, (old, new) in wers.items()}
        (tmp_path / f"seed{seed}" / "report").mkdir(parents=True)
        (tmp_path / f"seed{seed}" / "report" / "report.json").write_text(json.dumps({"systems": systems}))
    measure.print_table([tmp_path / "seed0", tmp_path / "seed1"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows} == {9}
    before, finetuned, replayed = rows[1:]
    assert before[3] == before[7] == finetuned[7] == "–"
    assert finetuned[1:4] == ["21.00", "20.00 / 22.00", "+19.00 ± 12.71"] and replayed[7] == "+2.00 ± 0.00"
