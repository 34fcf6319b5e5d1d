from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_kd.config.load import build
from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.plan.job import plan
from asr_kd.plan.settings import PlanSettings
from asr_kd.shards.prepare import prepare
from asr_kd.shards.settings import PrepareSettings
from asr_kd.shards.tarset import Sample, read_index, read_shard, write_index, write_shard

Job = Callable[..., LabelSettings]


def settings_for(job: LabelSettings, **values: object) -> PlanSettings:
    return PlanSettings.model_validate({"audio": job.audio, "targets": job.output, **values})


def test_the_bytes_of_a_larger_job_are_predicted(job: Job, tmp_path: Path) -> None:
    samples = [sample for info in read_index(job().audio) for sample in read_shard(Path(job().audio) / info.name)]

    def shards(name: str, count: int) -> str:
        folder = tmp_path / name
        folder.mkdir()
        several = [
            [Sample(f"p{number}-{item}", samples[(number + 5 * item) % 12].audio, "flac", {"seconds": 1.0}) for item in range(5)]
            for number in range(count)
        ]  # fmt: skip
        infos = [write_shard(folder / f"shard-{number:06d}.tar", shard) for number, shard in enumerate(several)]
        write_index(folder, infos)
        return str(folder)

    small = job(audio=shards("small", 2), output=str(tmp_path / "small-targets"))
    large = job(audio=shards("large", 12), output=str(tmp_path / "large-targets"))
    label(small)
    label(large)
    hours = sum(info.seconds for info in read_index(large.audio)) / 3600
    report = json.loads((Path(large.output) / "report.json").read_text())
    result = plan(settings_for(small, hours=report["audio_hours"]))
    stored = sum(path.stat().st_size for path in Path(large.output).glob("*.tar"))
    assert stored / 1.5 < result.target_bytes < stored * 1.5
    result = plan(settings_for(small, hours=hours))
    assert result.shards == 12
    size = sum(path.stat().st_size for path in Path(large.audio).glob("*.tar"))
    assert size / 1.5 < result.audio_bytes < size * 1.5


def test_figures_given_take_the_place_of_measured_ones(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label(job())
    capsys.readouterr()
    values = {"hours": 1e6, "label_speed": 1000.0, "workers": 50, "price_per_hour": 2.5}
    training = {"train_speed": 500.0, "passes": 3, "train_workers": 16}
    result = plan(settings_for(job(), **values, **training, report=str(tmp_path / "plan.json")))
    assert (result.label_device_hours, result.label_wall_hours, result.label_cost) == (1000.0, 20.0, 2500.0)
    assert (result.train_device_hours, result.train_wall_hours, result.train_cost) == (6000.0, 375.0, 15000.0)
    text = capsys.readouterr().out
    assert "1,000.0 device-hours, 20.0 hours with 50 workers, cost 2,500.00" in text and "(given)" in text
    assert json.loads((tmp_path / "plan.json").read_text())["shards"] == result.shards


def test_the_training_of_a_network_is_measured_here(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    label(job())
    network = {"train_model": {"layers": 1, "size": 8}, "train_units": 30, "train_batch_frames": 700, "device": "cpu"}
    result = plan(settings_for(job(), hours=1000.0, passes=2, **network))
    assert result.train_device_hours is not None and result.train_device_hours > 0
    weights = 4 * 8 * (192 + 8 + 2) + 30 * (8 + 1)
    assert f"measured on cpu, 1 threads: lstm of {weights:,} parameters, 30 units" in capsys.readouterr().out


def test_preparing_is_planned_by_its_measured_speed(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [sample for info in read_index(job().audio) for sample in read_shard(Path(job().audio) / info.name)]
    lines = []
    for sample in samples:
        (tmp_path / f"{sample.key}.flac").write_bytes(sample.audio)
        lines.append(json.dumps({"audio": f"{sample.key}.flac"}) + "\n")
    (tmp_path / "list.jsonl").write_text("".join(lines))
    prepare(PrepareSettings(manifest=str(tmp_path / "list.jsonl"), output=str(tmp_path / "audio"), samples_per_shard=5))
    prepared = job(audio=str(tmp_path / "audio"))
    label(prepared)
    timing = json.loads((tmp_path / "audio" / "timing.json").read_text())
    capsys.readouterr()
    result = plan(settings_for(prepared, hours=1000.0, prepare_workers=4, price_per_hour=1.0))
    assert timing["workers"] == 1.0 and result.prepare_worker_hours
    assert result.prepare_worker_hours == pytest.approx(1000 / timing["audio_hours_per_hour"])
    assert result.prepare_wall_hours == result.prepare_worker_hours / 4
    assert f"preparing      {result.prepare_worker_hours:,.1f} worker-hours, " in capsys.readouterr().out
    assert plan(settings_for(prepared, hours=1000.0, prepare_speed=50.0)).prepare_worker_hours == 20.0
    (tmp_path / "audio" / "timing.json").unlink()  # as others make shards
    capsys.readouterr()
    assert plan(settings_for(prepared, hours=1000.0)).prepare_worker_hours is None
    assert "\npreparing" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_units": 30}, "train_model and train_units go together"),
        ({"train_speed": 5.0, "student": "runs/student"}, "give one"),
    ],
)
def test_the_speed_of_training_is_told_once(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(PlanSettings, {"hours": 10.0, "audio": "audio", "targets": "targets", **values}, "command line")


def test_without_training_or_a_price_neither_is_told(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    label(job())
    capsys.readouterr()
    result = plan(settings_for(job(), hours=10.0))
    assert result.train_device_hours is None and result.label_cost is None
    assert ", cost " not in (text := capsys.readouterr().out) and "\ntraining" not in text
    assert "measured on cpu, 1 threads" in text


def test_a_job_that_is_not_finished_measures_nothing(job: Job, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no report\.json; give the folder of a label job that is finished"):
        plan(settings_for(job(output=str(tmp_path / "nowhere")), hours=10.0))


def test_a_speed_that_was_not_measured_is_asked_for(job: Job) -> None:
    label(job())
    (Path(job().output) / "timing.json").unlink()
    with pytest.raises(UserError, match=r"has no timing\.json, so the speed .* give label_speed="):
        plan(settings_for(job(), hours=10.0))
    assert plan(settings_for(job(), hours=10.0, label_speed=5.0)).label_device_hours == 2.0


def test_targets_of_other_audio_are_refused(job: Job, tmp_path: Path) -> None:
    label(job())
    samples = list(read_shard(Path(job().audio) / "shard-000000.tar"))
    write_index(tmp_path, [write_shard(tmp_path / "shard-000000.tar", samples)])
    with pytest.raises(UserError, match=r"targets: was not labelled from .*; give the audio that it was labelled from"):
        plan(settings_for(job(audio=str(tmp_path)), hours=10.0))


def test_hidden_states_are_said_apart(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    settings = job(mode="hidden", k=8, mass=0.99, taps=["layer.1"], keep="frames")
    label(settings)
    capsys.readouterr()
    plan(settings_for(settings, hours=10.0))
    report = json.loads((Path(settings.output) / "report.json").read_text())
    hidden, hour = report["hidden"]["bytes_per_frame"], report["frames"] / report["audio_hours"] / 1e6
    said = capsys.readouterr().out
    audio = read_index(settings.audio)
    stored = sum(info.bytes for info in audio) / audio.seconds * 3600
    assert f"audio: {stored / 1e6:,.1f} MB an hour" in said
    assert f"{hidden * hour:,.3f} MB an hour of it hidden states (frames, {hidden:.2f} bytes a frame)" in said


def test_recordings_that_are_cut_are_planned_with_their_pauses(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name, seconds in (("a", 2), ("b", 4)):
        bursts = [rng.normal(0, level, seconds * 8000) for level in (0.2, 0.0005) * 3]
        soundfile.write(tmp_path / f"{name}.wav", np.concatenate(bursts).clip(-1, 1), 8000)
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"audio": f"{name}.wav"}) + "\n")
        cut = {
            "manifest": str(tmp_path / f"{name}.jsonl"),
            "output": str(tmp_path / name),
            "segment": {"detector": "energy"},
        }
        prepare(PrepareSettings.model_validate(cut))
    sets = [str(tmp_path / "a"), str(tmp_path / "b")]
    cut_job = job(audio=sets)
    label(cut_job)
    written, heard = read_index(sets).seconds, 36.0
    assert 0.4 < written / heard < 0.7
    capsys.readouterr()
    result = plan(settings_for(cut_job, recording_hours=1000.0, prepare_workers=2))
    assert result.recording_hours == 1000.0 and result.audio_hours == pytest.approx(1000 * written / heard, rel=1e-4)
    timings = [json.loads((tmp_path / name / "timing.json").read_text()) for name in "ab"]
    took = sum(
        read_index(one).seconds / timing["audio_hours_per_hour"] for one, timing in zip(sets, timings, strict=True)
    )
    assert result.prepare_worker_hours == pytest.approx(1000 * took / heard, rel=1e-4)
    said = capsys.readouterr().out
    assert (
        f"audio          {result.audio_hours:,.0f} hours" in said and ", cut from 1,000 hours of recordings\n" in said
    )
    assert (
        f"preparing: {heard / took:,.0f} hours of recordings an hour and worker (measured, {sets[0]} + {sets[1]})"
        in said
    )
    same = plan(settings_for(cut_job, hours=result.audio_hours))
    assert same.recording_hours == pytest.approx(1000.0) and same.label_device_hours == result.label_device_hours
    given = plan(settings_for(cut_job, recording_hours=1000.0, written_share=0.25, prepare_speed=50.0))
    assert (given.audio_hours, given.prepare_worker_hours) == (250.0, 20.0)


def test_how_much_of_recordings_is_written_must_be_known(job: Job) -> None:
    label(job())
    with pytest.raises(UserError, match=r"was not cut from recordings .*; give written_share="):
        plan(settings_for(job(), recording_hours=10.0))
    assert plan(settings_for(job(), recording_hours=10.0, written_share=0.5)).audio_hours == 5.0
    for values in ({}, {"hours": 1.0, "recording_hours": 1.0}):
        with pytest.raises(ValueError, match="give one of the two"):
            settings_for(job(), **values)
