from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

from asr_kd.ending import Stopped
from asr_kd.errors import UserError
from asr_kd.models.acoustic import Checkpoint, load_checkpoint
from asr_kd.shards.tarset import Sample, read_index, read_shard, write_index, write_shard
from asr_kd.training import phase, scoring
from asr_kd.training.development import Development
from asr_kd.training.settings import TrainSettings
from asr_kd.training.step import Learner
from asr_kd.training.trainer import train
from tests.training.conftest import tones

Job = Callable[..., TrainSettings]


def lines(run: Path) -> list[dict[str, Any]]:
    """The metrics apart from timings."""
    values = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "frames_per_second"} for line in values]


def published(run: Path) -> dict[str, Any]:
    """Everything that must be the same after any interruption; no file of a killed run may be left either."""
    files = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    return files | {"metrics.jsonl": lines(run)}


def rewritten(audio: str, folder: Path, change: Callable[[list[Sample]], object]) -> str:
    """A copy of a set of shards with other samples in it."""
    folder.mkdir()
    shards = [list(read_shard(Path(audio) / info.name)) for info in read_index(Path(audio))]
    for shard in shards:
        change(shard)
    write_index(folder, [write_shard(folder / f"shard-{number:06d}.tar", one) for number, one in enumerate(shards)])
    return str(folder)


def two_phases(job: Job, **changes: Any) -> TrainSettings:
    """All that a resume must get right: two phases, two passes, two sources, a repeated one, masks, noise, dropout, an average."""
    source = job().phases[0].sources[0].model_dump()
    mixed = {
        "sources": [
            {**source, "augment": {"time_masks": 1, "time_frames": 2, "stretch": 0.1}},
            {**source, "targets": None, "soft": 0.0, "ctc": 1.0, "repeat": 2, "augment": {"noise": {"reverb": 0.5}}},
        ],
        "passes": 1, "learning_rate": 0.01,
    }  # fmt: skip
    phases = [{"sources": [source], "passes": 2, "learning_rate": 0.01}, mixed]
    return job(phases=phases, average={"best": 2}, **changes)


@pytest.fixture
def fickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that the weights decide but that go up and down, so that the best weights are rarely the last."""

    def score(_: TrainSettings, learner: Checkpoint) -> Development:
        total = sum(weight.double().sum().item() for weight in learner.model.parameters())
        return Development(1.0, abs(total) * 1000 % 1)

    monkeypatch.setattr(scoring, "score_development", score)


def test_soft_targets_alone_teach_the_words(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    settings = job(phase={"passes": 20, "learning_rate": 0.02}, evaluate_every=10)
    train(settings)
    run = Path(settings.output)
    losses = [line["loss"] for line in lines(run) if "loss" in line]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    scores = [line for line in lines(run) if "development_wer" in line]
    assert scores[-1]["development_loss"] < 0.5 * scores[0]["development_loss"]
    best = load_checkpoint(run)
    assert best.training["development_wer"] == min(score["development_wer"] for score in scores) < 0.5
    assert f"{len(losses)} steps" in capsys.readouterr().out
    steps = [line["step"] for line in lines(run) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))


def test_ctc_goes_down(job: Job) -> None:
    settings = job(
        source={"targets": None, "soft": 0.0, "ctc": 1.0}, phase={"passes": 12, "learning_rate": 0.02},
        model={"kind": "blstm", "layers": 1, "size": 12}, evaluate_every=100,
    )  # fmt: skip
    train(settings)
    losses = [line["loss"] for line in lines(Path(settings.output)) if "loss" in line]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_learning_rate_and_hours_follow_the_audio(job: Job, audio: str) -> None:
    settings = job(phase={"passes": 3, "warmup": 0.5, "final_rate": 0.1})
    train(settings)
    steps = [line for line in lines(Path(settings.output)) if "loss" in line]
    rates = [step["learning_rate"] for step in steps]
    peak = rates.index(max(rates))
    assert 0.4 < peak / len(rates) < 0.6 and max(rates) <= 0.01
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.002
    hours = 3 * sum(info.seconds for info in read_index(Path(audio))) / 3600
    assert steps[-1]["audio_hours"] == pytest.approx(hours, rel=0.1) and steps[-1]["done"] == pytest.approx(1, abs=0.1)


def test_same_seed_same_bytes(job: Job, tmp_path: Path) -> None:
    settings = two_phases(job)
    contents = []
    for name in ("first", "second"):
        train(settings)
        Path(settings.output).rename(tmp_path / name)
        contents.append(published(tmp_path / name))
    assert contents[0] == contents[1]
    other = two_phases(job, seed=1)
    train(other)
    assert published(Path(other.output))["last/state.safetensors"] != contents[0]["last/state.safetensors"]


def test_cache_and_loader_processes_change_no_bit(job: Job, tmp_path: Path) -> None:
    states = []
    cache = str(tmp_path / "cache")
    for name, changes in {
        "plain": {},
        "write": {"feature_cache": cache},
        "read": {"feature_cache": cache, "loader_workers": 1},
    }.items():
        settings = job(phase={"passes": 1}, output=str(tmp_path / name), **changes)
        train(settings)
        states.append((tmp_path / name / "last" / "state.safetensors").read_bytes())
    assert states[0] == states[1] == states[2]


def cycles(job: Job) -> TrainSettings:
    """A schedule as of a long job: slices of an endless stream in chunks, carried and not, then whole utterances, twice."""
    source = job().phases[0].sources[0].model_dump()
    sliced = {
        "sources": [source],
        "hours": 0.002,
        "learning_rate": 0.01,
        "chunks": {"frames": 9, "left": 4, "right": 3},
    }
    carried = {"sources": [source], "passes": 1, "chunks": {"frames": 9, "carry": True}, "frozen": ["output"]}
    phases = [sliced, carried, {"sources": [{**source, "targets": None, "soft": 0.0, "ctc": 1.0}], "passes": 1}]
    return job(phases=phases, cycles=2, cycle_decay=0.5, lanes=2, ema_decay=0.9, average={"last": 3})


@pytest.mark.parametrize("schedule", [two_phases, cycles])
def test_asked_to_stop_at_any_step_and_started_again(
    job: Job, fickle: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: Callable[[Job], TrainSettings]
) -> None:
    settings = schedule(job)
    run = Path(settings.output)
    train(settings)
    expected = published(run)
    run.rename(tmp_path / "whole")
    real = phase.step
    asked = (signal.SIGTERM, signal.SIGINT)

    def stopped(*arguments: Any) -> float:
        os.kill(os.getpid(), asked[len(stops) % 2])
        return real(*arguments)

    stops: list[str] = []
    monkeypatch.setattr(phase, "step", stopped)
    before = signal.getsignal(signal.SIGTERM)
    for _ in range(100):  # one step at a time
        try:
            train(settings)
            break
        except Stopped as error:
            assert error.status == 128 + asked[len(stops) % 2]
            stops.append(str(error))
            assert f"stopped at step {len(stops)} as asked" in stops[-1]
    assert len(stops) == expected["metrics.jsonl"][-1]["step"] > 10
    assert signal.getsignal(signal.SIGTERM) is before
    assert published(run) == expected


class Killed(BaseException):
    pass


def test_killed_at_every_publish(job: Job, fickle: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = two_phases(job, evaluate_every=5, feature_cache=str(tmp_path / "cache"))
    run = Path(settings.output)
    real, publishes = os.replace, 0

    def counting(source: str, target: str) -> None:
        nonlocal publishes
        real(source, target)
        publishes += 1

    train(settings)  # fills the cache
    run.rename(tmp_path / "first")
    monkeypatch.setattr(os, "replace", counting)
    train(settings)
    expected = published(run)
    run.rename(tmp_path / "whole")

    for moment in range(publishes):
        left = moment

        def dying(source: str, target: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            real(source, target)

        monkeypatch.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            train(settings)
        monkeypatch.setattr(os, "replace", real)
        train(settings)
        assert published(run) == expected, moment
        run.rename(tmp_path / f"run-{moment}")


SLOW_JOB = """
import sys, time
from asr_kd.training.settings import TrainSettings
from asr_kd.training import phase, trainer
step = phase.step
def slow(*arguments):
    time.sleep(0.05)
    return step(*arguments)
phase.step = slow
trainer.train(TrainSettings.model_validate_json(sys.argv[1]))
"""


def test_killed_by_sigkill_and_started_again(job: Job, tmp_path: Path) -> None:
    settings = two_phases(job)
    run = Path(settings.output)
    train(settings)
    expected = published(run)
    run.rename(tmp_path / "whole")
    process = subprocess.Popen([sys.executable, "-c", SLOW_JOB, settings.model_dump_json()], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (run / "last").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    for path in run.rglob(".*.tmp"):
        path.unlink()
    train(settings)
    assert published(run) == expected


def test_a_run_that_another_process_trains_is_left_alone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = job()
    run = Path(settings.output)
    real = phase.step

    def step(*arguments: Any) -> float:
        monkeypatch.setattr(phase, "step", real)
        with pytest.raises(UserError, match=f"^{run}: is being written by process {os.getpid()} on "):
            train(settings)
        return real(*arguments)

    monkeypatch.setattr(phase, "step", step)
    train(settings)
    assert not (run / ".writer").exists()


@pytest.mark.parametrize(("every", "steps"), [(0.0, 3), (60.0, 10)])
def test_a_folder_that_vanishes_ends_the_run(
    job: Job, fickle: None, monkeypatch: pytest.MonkeyPatch, every: float, steps: int
) -> None:
    """Seen between the steps, or when there is something to save."""
    settings = job(evaluate_every=10, phase={"passes": 12})
    run = Path(settings.output)
    real, made = phase.step, 0

    def step(*arguments: Any) -> float:
        nonlocal made
        made += 1
        if made == 3:
            shutil.rmtree(run)
        return real(*arguments)

    monkeypatch.setattr(phase, "CHECK_SECONDS", every)
    monkeypatch.setattr(phase, "step", step)
    with pytest.raises(UserError, match=f"^{run}: is gone, removed or unmounted since the job began"):
        train(settings)
    assert made <= steps + 1 and not run.exists()
    train(settings)
    assert lines(run)[-1]["step"] > 10


def test_torn_metrics_are_cut_back_to_the_state(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = job()
    run = Path(settings.output)
    train(settings)
    expected = published(run)
    run.rename(tmp_path / "whole")
    real = phase.step
    monkeypatch.setattr(phase, "step", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM) or real(*arguments))
    with pytest.raises(UserError, match="stopped at step 1"):
        train(settings)
    monkeypatch.setattr(phase, "step", real)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 7}\n{"step": 3, "lo')
    train(settings)
    assert published(run) == expected


def test_the_average_of_the_weights_is_what_is_kept(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = job(ema_decay=0.75, evaluate_every=1)
    real, seen = phase.step, []

    def recording(learner: Learner, *arguments: Any) -> float:
        loss = real(learner, *arguments)
        seen.append({name: weight.clone() for name, weight in learner.pupil.student.state_dict().items()})
        return loss

    monkeypatch.setattr(phase, "step", recording)
    train(settings)
    best = load_checkpoint(settings.output)
    expected = seen[0]
    for weights in seen[1 : best.training["step"]]:
        expected = {name: 0.75 * expected[name] + 0.25 * weights[name] for name in expected}
    for name, weight in best.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name])


@pytest.mark.parametrize("wanted", [{"last": 2}, {"best": 2}])
def test_the_mean_of_checkpoints_is_kept_when_it_is_best(
    job: Job, fickle: None, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, int]
) -> None:
    seen: list[tuple[float, int, dict[str, torch.Tensor]]] = []
    real = scoring.score_development

    def recording(settings: TrainSettings, learner: Checkpoint) -> Development:
        scores = real(settings, learner)
        weights = {name: weight.clone() for name, weight in learner.model.state_dict().items()}
        seen.append((scores.loss, len(seen), weights))
        return Development(0.0, 0.0) if len(seen) == 1 + scored + 1 else scores  # the mean is the best

    settings = job(average=wanted, evaluate_every=2)
    scored = 0
    train(settings.model_copy(update={"output": settings.output + "-counted"}))
    scored = sum("development_wer" in line for line in lines(Path(settings.output + "-counted"))) - 1
    monkeypatch.setattr(scoring, "score_development", recording)
    train(settings)
    own = seen[1:-1]  # neither the start nor the mean
    kept = own[-2:] if "last" in wanted else sorted(own)[:2]
    best = load_checkpoint(settings.output)
    steps = [line["step"] for line in lines(Path(settings.output)) if "development_wer" in line]
    assert best.training["averaged"] == sorted(steps[number] for _, number, _ in kept)
    for name, weight in best.model.state_dict().items():
        torch.testing.assert_close(weight, (kept[0][2][name] + kept[1][2][name]) / 2)
    folders = {path.name for path in (Path(settings.output) / "scored").iterdir()}
    assert folders == {str(step) for step in best.training["averaged"]}
    assert lines(Path(settings.output))[-1]["mean_wer"] == 0.0


def test_a_mean_that_is_worse_is_not_kept(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    real = scoring.mean_of

    def broken(folders: list[Path]) -> torch.nn.Module:
        model = real(folders)
        for weight in model.parameters():
            weight.detach().zero_()
        return model

    monkeypatch.setattr(scoring, "mean_of", broken)
    settings = job(average={"last": 2})
    train(settings)
    *curve, mean = lines(Path(settings.output))
    assert mean["mean_loss"] > min(line["development_loss"] for line in curve if "development_loss" in line)
    assert "averaged" not in load_checkpoint(settings.output).training


def test_frozen_weights_stay_and_others_move(job: Job, tmp_path: Path) -> None:
    first = job()
    train(first)
    settings = job(init=first.output, output=str(tmp_path / "second"), phase={"frozen": ["forwards.0", "output"]})
    train(settings)
    before = load_checkpoint(first.output).model.state_dict()
    with safetensors.safe_open(str(tmp_path / "second" / "last" / "state.safetensors"), framework="pt") as file:
        for name, weight in before.items():
            same = torch.equal(file.get_tensor(f"model.{name}"), weight)
            assert same == name.startswith(("forwards.0", "output")), name
    with pytest.raises(
        UserError, match=r"phases\.0\.frozen: no weight begins with encoder; the network has forwards, output"
    ):
        train(job(phase={"frozen": ["encoder"]}, output=str(tmp_path / "third")))
    with pytest.raises(UserError, match=r"phases\.0\.frozen: names all weights, and nothing is left to train"):
        train(job(phase={"frozen": ["forwards", "output"]}, output=str(tmp_path / "fourth")))


def test_rates_fall_from_cycle_to_cycle(job: Job) -> None:
    settings = job(cycles=3, cycle_decay=0.5, phase={"passes": 1, "warmup": 0.0, "final_rate": 1.0})
    train(settings)
    rates = {(line["cycle"], line["learning_rate"]) for line in lines(Path(settings.output)) if "loss" in line}
    assert rates == {(0, 0.01), (1, 0.005), (2, 0.0025)}


def test_a_finished_run_is_not_run_again(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = job(phase={"passes": 1})
    train(settings)
    before = published(Path(settings.output))
    monkeypatch.setattr(phase, "step", lambda *_: pytest.fail("trained again"))
    train(settings)
    assert "already trained" in capsys.readouterr().out
    assert published(Path(settings.output)) == before


def test_output_of_other_settings_is_refused(job: Job, audio: str, tmp_path: Path) -> None:
    train(job(phase={"passes": 1}))
    with pytest.raises(UserError, match=r"run: belongs to other settings .*seed was 0, now 1"):
        train(job(phase={"passes": 1}, seed=1))
    with pytest.raises(UserError, match="belongs to other settings"):
        train(job(phase={"passes": 3}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        train(job(output=str(tmp_path / "full")))


@pytest.mark.parametrize("changed", ["development", "transcripts", "init", "noises"])
def test_other_data_behind_the_same_paths_is_refused(job: Job, development: str, tmp_path: Path, changed: str) -> None:
    train(job(output=str(tmp_path / "first"), phase={"passes": 1}))
    texts, copy, init = tmp_path / "texts.jsonl", tmp_path / "development", tmp_path / "init"
    texts.write_text("".join(f'{{"key": "u{number}", "text": "ab"}}\n' for number in range(10)))
    shutil.copytree(development, copy)
    shutil.copytree(tmp_path / "first" / "best", init)
    noises = tmp_path / "noises"
    noises.mkdir()
    (noises / "hum.flac").write_bytes(tones("a", 1))
    noise = {"kinds": ["files"], "folder": str(noises)}
    source = {"targets": None, "soft": 0.0, "ctc": 1.0, "transcripts": str(texts), "augment": {"noise": noise}}
    settings = job(development=str(copy), init=str(init), source=source, max_bad_share=1.0, phase={"passes": 1})
    train(settings)
    train(settings)
    if changed == "development":
        shutil.rmtree(copy)
        rewritten(development, copy, lambda shard: shard.pop())
    elif changed == "transcripts":
        texts.write_text(texts.read_text().replace("ab", "ba"))
    elif changed == "noises":
        (noises / "whistle.flac").write_bytes(tones("b", 2))
    else:
        shutil.rmtree(init)
        shutil.copytree(tmp_path / "run" / "best", init)
    with pytest.raises(UserError, match="run: belongs to other settings"):
        train(settings)


def test_a_run_does_not_go_on_with_features_of_another_version(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = job(phase={"passes": 1})
    train(settings)
    monkeypatch.setattr("asr_kd.audio.features.FRONTEND_VERSION", 2)
    with pytest.raises(UserError, match=r"run: belongs to other settings \(features\.frontend was null, now 2\)"):
        train(settings)


def test_the_curve_begins_before_the_first_step(job: Job) -> None:
    settings = job(phase={"passes": 1})
    train(settings)
    first, second = lines(Path(settings.output))[:2]
    assert first["step"] == 0 and first["audio_hours"] == 0 and "development_wer" in first
    assert second["step"] == 1 and "loss" in second


def test_development_set_must_be_labelled_and_readable(
    job: Job, development: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phase, "step", lambda *_: pytest.fail("hours of work before the message"))
    silent = rewritten(development, tmp_path / "silent", lambda shard: shard[1].fields.pop("text"))
    with pytest.raises(UserError, match=r"silent: d1 has no text; the development set must be labelled"):
        train(job(development=silent))
    broken = rewritten(development, tmp_path / "broken", lambda shard: setattr(shard[1], "audio", b"noise"))
    with pytest.raises(UserError, match=r"broken: d1: .*fix the development set"):
        train(job(development=broken, output=str(tmp_path / "run2")))


def test_an_empty_text_in_the_development_set_counts(job: Job, development: str, tmp_path: Path) -> None:
    def hush(shard: list[Sample]) -> None:
        shard[1].fields["text"] = ""

    train(job(development=rewritten(development, tmp_path / "hush", hush), phase={"passes": 1}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(job: Job, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr("asr_kd.training.step.batch_loss", lambda seen, *_: seen.logits.sum() * 0 + value)
    with pytest.raises(UserError, match=rf"run: the loss became {value} at step 0; lower phases\.0\.learning_rate"):
        train(job())


def test_bad_utterances_are_counted(job: Job, audio: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = rewritten(audio, tmp_path / "broken", lambda shard: setattr(shard[0], "audio", b"noise"))
    plain = {"audio": broken, "targets": None, "soft": 0.0, "ctc": 1.0}
    train(job(source=plain, max_bad_share=0.3, phase={"passes": 2}))
    assert capsys.readouterr().err.count("6 of 20 utterances cannot be used (first: u") == 1
    with pytest.raises(UserError, match=r"3 of 10 utterances cannot be used, more than max_bad_share 0\.2 .first: u"):
        train(job(source=plain, max_bad_share=0.2, output=str(tmp_path / "strict")))


@pytest.mark.parametrize("phase", [{"passes": 2}, {"passes": None, "hours": 0.01}])
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_source_that_nothing_can_be_learned_from_is_a_failure(
    job: Job, audio: str, tmp_path: Path, phase: dict[str, Any], lanes: int
) -> None:
    """Whatever share may be bad, beside a good source too; a slice of hours would never end."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"key": "u{number}", "text": "{"ab" * 200}"}}\n' for number in range(10)))
    good = job().phases[0].sources[0].model_dump()
    bad = {**good, "targets": None, "soft": 0.0, "ctc": 1.0, "transcripts": str(texts)}
    for sources in ([bad], [good, bad]):
        settings = job(phase={**phase, "sources": sources}, max_bad_share=1.0, lanes=lanes)
        with pytest.raises(UserError, match=rf"{audio}: none of \d+ utterances can be used \(first: u"):
            train(settings)
        shutil.rmtree(settings.output)


def test_a_set_of_unknown_length_is_refused(job: Job, audio: str, tmp_path: Path) -> None:
    """Its share of what is done would be wrong: the first step would have the last rate."""
    copy = tmp_path / "audio"
    copy.mkdir()
    shards = [write_shard(copy / info.name, read_shard(Path(audio) / info.name)) for info in read_index(audio)]
    write_index(copy, [shards[0], dataclasses.replace(shards[1], seconds=0.0), shards[2]])
    source = {"audio": str(copy), "targets": None, "soft": 0.0, "ctc": 1.0}
    with pytest.raises(UserError, match=f"{copy}: index.json says nothing of the length of shard-000001.tar, by which"):
        train(job(source=source))
    slices = job(source=source, phase={"passes": None, "hours": 0.001}, output=str(tmp_path / "slices"))
    train(slices)  # the hours are the settings' own
    assert lines(Path(slices.output))[-1]["step"] > 1


def test_init_takes_over_a_network_and_refuses_others(job: Job, tmp_path: Path) -> None:
    train(job(phase={"passes": 1}))
    first = str(tmp_path / "run")
    train(job(init=first, phase={"passes": 1, "learning_rate": 1e-12}, weight_decay=0.0, output=str(tmp_path / "next")))
    weights = [load_checkpoint(tmp_path / name).model.state_dict() for name in ("run", "next")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight)
    with pytest.raises(UserError, match="another network"):
        train(job(init=first, model={"layers": 1, "size": 12}, output=str(tmp_path / "a")))
    other = job().features.model_copy(update={"mean_frames": 10})
    with pytest.raises(UserError, match=r"hears other features than this run; give the run its `features`$"):
        train(job(init=first, features=other.model_dump(), output=str(tmp_path / "b")))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safetensors.safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def scored_as(monkeypatch: pytest.MonkeyPatch, *scores: Development) -> None:
    """Let the development scores be these, one after the other, the last one again and again."""
    left = list(scores)
    monkeypatch.setattr(scoring, "score_development", lambda *_: left.pop(0) if len(left) > 1 else left[0])


def test_the_blank_is_taken_off_what_is_written_and_training_goes_on_without(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("with", "without"):
        offset = 1.25 if name == "with" else 0.0
        scores = [Development(1.0, 3.0 - 0.1 * number, offset, 1, 4, 1) for number in range(20)]
        scored_as(monkeypatch, *scores)
        settings = job(output=str(tmp_path / name), calibrate_blank=name == "with", average={"last": 2}, ema_decay=0.5)
        train(settings)
    states = [tensors(tmp_path / name / "last" / "state.safetensors") for name in ("with", "without")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    scored = sorted((tmp_path / "with" / "scored").iterdir())
    for folder in (*scored, tmp_path / "with" / "best"):
        taken = load_checkpoint(folder)
        given = load_checkpoint(tmp_path / "without" / folder.relative_to(tmp_path / "with"))
        for name, weight in given.model.state_dict().items():
            expected = weight.clone()
            if name == "output.bias":  # the best is the mean of two of which it was taken off, and is scored anew
                expected[0] -= 2 * 1.25 if folder.name == "best" else 1.25
            torch.testing.assert_close(taken.model.state_dict()[name], expected, rtol=0, atol=1e-6)
        assert (taken.training["blank_offset"], given.training["blank_offset"]) == (1.25, 0.0)
    best = load_checkpoint(tmp_path / "with").training
    counts = [best[f"development_{kind}"] for kind in ("substitutions", "deletions", "insertions")]
    assert counts == [1, 4, 1] and best["development_loss"] < 3.0
    line = [line for line in lines(tmp_path / "with") if "development_wer" in line][-1]
    assert (line["development_blank_offset"], line["development_deletions"], line["development_blank_share"]) == (
        1.25,
        4,
        0.0,
    )


@pytest.mark.parametrize(("choose", "best"), [("wer", 3), ("loss", 9), ("both", 6)])
def test_the_setting_chooses_the_checkpoint(job: Job, monkeypatch: pytest.MonkeyPatch, choose: str, best: int) -> None:
    scored_as(monkeypatch, Development(0.9, 4.0), Development(0.3, 2.0), Development(0.4, 1.0), Development(0.6, 0.9))
    settings = job(choose=choose, phase={"passes": 3})
    train(settings)
    assert load_checkpoint(settings.output).training["step"] == best


def test_a_run_that_wins_nothing_says_so_in_the_end_and_again(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = job(output=str(tmp_path / "start"), phase={"passes": 20, "learning_rate": 0.02}, evaluate_every=10)
    train(start)
    capsys.readouterr()
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("".join(f'{{"key": "u{number}", "text": "bbbb"}}\n' for number in range(10)))
    settings = job(
        init=start.output, source={"targets": None, "soft": 0.0, "ctc": 1.0, "transcripts": str(wrong)},
        phase={"passes": 2, "learning_rate": 0.05}, max_bad_share=1.0,
    )  # fmt: skip
    train(settings)
    won = load_checkpoint(start.output).training
    last = [line for line in lines(Path(settings.output)) if "development_wer" in line][-1]
    said = (
        f"{settings.output}: no checkpoint was better than {start.output}, where it started (development WER "
        f"{100 * won['development_wer']:.1f} %, loss {won['development_loss']:.3g}): best/ holds the start. The last weights "
        f"have development WER {100 * last['development_wer']:.1f} %, loss {last['development_loss']:.3g}: the loss was never "
        "below the start's, so the learning rate may be too high or the targets worse than what the start knows; try a lower "
        "learning_rate."
    )
    first, second = capsys.readouterr().out.splitlines()
    assert f"steps over 0.0 audio hours, best development WER {won['development_wer']:.2%}" in first and second == said
    train(settings)
    first, second = capsys.readouterr().out.splitlines()
    assert "already trained" in first and second == said
    best = load_checkpoint(settings.output)
    assert best.training["started_from"]["folder"] == start.output and best.training["started_from"]["won"] is False
    assert best.fingerprint == load_checkpoint(start.output).fingerprint, "a calibrated start is not calibrated again"
    assert "started_from" not in won


def test_a_phase_whose_weights_are_thrown_away_is_named(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored_as(monkeypatch, Development(0.9, 4.0), Development(0.3, 2.0), Development(0.4, 1.9), Development(0.2, 1.9))
    source = job().phases[0].sources[0].model_dump()
    phases = [{"sources": [source], "passes": 1, "learning_rate": 0.01}] * 3
    settings = job(phases=phases, evaluate_every=1000)
    train(settings)
    ends = [line["step"] for line in lines(Path(settings.output)) if "development_wer" in line]
    said = capsys.readouterr().out.splitlines()
    assert len(ends) == 4 and len(said) == 2 and "20.00%" in said[1]
    assert said[0] == (
        f"{settings.output}: phase 2 of 3 won nothing: its last weights, of step {ends[2]} (development WER 40.0 %, loss 1.9), "
        f"are thrown away, and the next phase begins at those of step {ends[1]} (development WER 30.0 %, loss 2)"
    )


def test_no_targets_no_units_no_audio(job: Job, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    with pytest.raises(UserError, match="holds no soft-target shards"):
        train(job(source={"targets": empty}))
    with pytest.raises(UserError, match=r"holds no units\.model"):
        train(job(units=empty))
    with pytest.raises(UserError, match="index"):
        train(job(source={"audio": empty}))
    with pytest.raises(UserError, match="device: abacus"):
        train(job(device="abacus"))
    assert not (tmp_path / "run").exists()
