from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from asr_kd.audio.decode import decode as decode_audio
from asr_kd.audio.features import Frontend
from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models import acoustic
from asr_kd.models.acoustic import infer, load_checkpoint, save_checkpoint
from asr_kd.shards.tarset import Sample, read_index, read_members, read_shard, write_index, write_shard
from asr_kd.targets import posteriors
from asr_kd.targets import reduced as reduced_module
from asr_kd.targets.codec import decode, encode
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.reduced import divergence, reduced
from asr_kd.targets.store import SUFFIX, read_metadata, teacher_of
from tests.joining import join

Job = Callable[..., LabelSettings]


def published(folder: str | Path) -> dict[str, bytes]:
    """What must be the same after any interruption; no file of a killed run may be left either."""
    return {
        path.name: path.read_bytes()
        for path in Path(folder).iterdir()
        if path.name not in ("timing.json", "summary.json")
    }


def write_shards(folder: Path, shards: list[list[Sample]]) -> str:
    folder.mkdir()
    write_index(folder, [write_shard(folder / f"shard-{number:06d}.tar", shard) for number, shard in enumerate(shards)])
    return str(folder)


def samples_of(folder: str | Path) -> list[list[Sample]]:
    return [list(read_shard(Path(folder) / info.name)) for info in read_index(Path(folder))]


def test_posteriors_are_the_teachers_for_every_utterance(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    settings = job()
    label(settings)
    assert "12 utterances in = 12 labelled + 0 quarantined" in capsys.readouterr().out
    teacher = load_checkpoint(settings.teacher)
    frames = 0
    for info in read_index(Path(settings.audio)):
        pairs = list(
            join(
                Path(settings.audio) / info.name, Path(settings.output) / info.name, audio_sha256=info.sha256,
                units_hash=teacher.units.hash, num_units=teacher.units.size, frame_ms=teacher.frame_ms,
            )
        )  # fmt: skip
        keys = [sample.key for sample in read_shard(Path(settings.audio) / info.name)]
        assert [sample.key for sample, _ in pairs] == keys
        for sample, target in pairs:
            waveform, _ = decode_audio(sample.audio, sample.key, 8000, 60.0)
            (dense,) = infer(teacher, [Frontend(teacher.features).compute(waveform)])
            expected = decode(encode(SparsePosteriors.from_dense(dense, settings.k, settings.mass)))
            np.testing.assert_array_equal(target.units[target.starts], dense.argmax(1))
            # rounding in another batch may move a probability by one step of 1/128 on the scale of roots
            for a, b in zip(target.padded(1), expected.padded(1), strict=True):
                np.testing.assert_allclose(a, b, atol=0.03)
            assert divergence(reduced(target, dense), target).mean() < 0.1
            frames += target.frames
    report = json.loads((Path(settings.output) / "report.json").read_text())
    assert (report["utterances"], report["labelled"], report["quarantined"], report["shards"]) == (12, 12, 0, 3)
    assert report["frames"] == frames and report["top1_kept"] == 1.0
    assert 0 < report["mean_kl"] <= report["worst_kl"] and 0.5 < report["mean_kept_mass"] <= 1
    seconds = sum(info.seconds for info in read_index(Path(settings.audio)))
    assert report["audio_hours"] == pytest.approx(seconds / 3600, rel=1e-3)
    timing = json.loads((Path(settings.output) / "timing.json").read_text())
    assert timing["shards"] == 3 and timing["seconds"] > 0 and timing["frames_per_second"] > 0
    assert teacher_of(settings.output)["teacher"] == teacher.fingerprint


def test_loader_processes_change_no_byte(job: Callable[..., LabelSettings], tmp_path: Path) -> None:
    for workers in (0, 2):
        label(job(output=str(tmp_path / str(workers)), loader_workers=workers, max_seconds=1.4, max_bad_share=0.9))
    here, beside = (published(tmp_path / name) for name in ("0", "2"))
    assert here == beside
    assert here["quarantine.jsonl"].count(b"\n") > 1


@pytest.mark.parametrize("mode", ["mass", "top_k"])
def test_what_runs_on_a_gpu_keeps_the_same(
    mode: str, job: Callable[..., LabelSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def members(name: str) -> dict[str, bytes]:
        label(job(output=str(tmp_path / name), mode=mode))
        shards = [path for path in (tmp_path / name).iterdir() if path.suffix == ".tar"]
        return {member: data for path in shards for member, data in read_members(path) if member.endswith(SUFFIX)}

    here = members("cpu")
    # its code runs on tensors of the CPU just as well
    monkeypatch.setattr("asr_kd.targets.posteriors._largest", posteriors._largest_on_device)
    monkeypatch.setattr("asr_kd.targets.reduced._sums", reduced_module._sums_on_device)
    assert members("device") == here
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("cpu", "device")]
    assert reports[1]["mean_kl"] == pytest.approx(reports[0]["mean_kl"], abs=1e-6)


def test_a_process_that_is_killed_ends_the_job_in_a_sentence(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    # the first thing that a process that encodes does
    monkeypatch.setattr("asr_kd.labeling.job.serve_parent", os.abort)
    settings = job(loader_workers=1)
    with pytest.raises(
        UserError, match=r"a worker process was killed, .* set loader_workers=0 and run the command again"
    ):
        label(settings)
    monkeypatch.undo()
    label(settings)


def test_batches_do_not_change_the_targets(job: Job, tmp_path: Path) -> None:
    one, many = job(output=str(tmp_path / "one"), batch_frames=1), job(output=str(tmp_path / "many"), batch_frames=4000)
    label(one)
    label(many)
    for info in read_index(Path(one.audio)):
        pairs = (join(Path(one.audio) / info.name, Path(job.output) / info.name) for job in (one, many))
        for (_, a), (_, b) in zip(*pairs, strict=True):
            np.testing.assert_allclose(a.padded(1)[1], b.padded(1)[1], atol=0.03)
            np.testing.assert_array_equal(a.padded(1)[0], b.padded(1)[0])


def test_alignment_spells_the_text(job: Job, tmp_path: Path) -> None:
    texts = {"a": "one two", "b": "three", "c": "seven seven", "d": ""}
    samples = samples_of(job().audio)[0]
    for sample, (key, text) in zip(samples, texts.items(), strict=True):
        sample.key, sample.fields["text"] = key, text
    settings = job(mode="alignment", audio=write_shards(tmp_path / "audio", [samples]))
    label(settings)
    teacher = load_checkpoint(settings.teacher)
    name = "shard-000000.tar"
    for sample, target in join(Path(settings.audio) / name, Path(settings.output) / name):
        assert target.counts.max() == 1 and np.all(target.log_probs == 0)
        changed = np.diff(target.units, prepend=-1) != 0
        assert teacher.units.decode(target.units[changed].tolist()) == texts[sample.key]
    report = json.loads((Path(settings.output) / "report.json").read_text())
    assert report["mean_kl"] is None and report["entries_per_frame"] == 1.0
    selection = read_metadata(Path(settings.output) / name).selection
    assert selection.model_dump(exclude_none=True) == {"mode": "alignment", "hold_frames": 1}


def test_occupancy_spells_the_text_and_says_how_sure_it_is(job: Job, tmp_path: Path) -> None:
    settings = job(mode="occupancy", mass=0.99)
    label(settings)
    label(job(output=str(tmp_path / "posteriors"), mass=0.99))
    report = json.loads((Path(settings.output) / "report.json").read_text())
    plain = json.loads((tmp_path / "posteriors" / "report.json").read_text())
    assert 1.0 < report["entries_per_frame"] < plain["entries_per_frame"]  # the text rules out most of it
    for info in read_index(Path(settings.audio)):
        for sample, target in join(Path(settings.audio) / info.name, Path(settings.output) / info.name):
            allowed = {0, *load_checkpoint(settings.teacher).units.encode(sample.fields["text"])}
            assert set(target.units.tolist()) <= allowed


def test_alignment_quarantines_missing_and_impossible_text(job: Job, tmp_path: Path) -> None:
    samples = samples_of(job().audio)[0]
    del samples[0].fields["text"]
    samples[1].fields["text"] = "one " * 100
    settings = job(mode="alignment", audio=write_shards(tmp_path / "audio", [samples]), max_bad_share=0.5)
    label(settings)
    lines = [json.loads(line) for line in (Path(settings.output) / "quarantine.jsonl").read_text().splitlines()]
    reasons = {line["key"]: line["reason"].split(":")[0] for line in lines}
    assert reasons == {"s0-u0": "no text to align to", "s0-u1": "text too long"}

    transcripts = tmp_path / "texts.jsonl"
    transcripts.write_text("".join(json.dumps({"key": f"s0-u{number}", "text": "two"}) + "\n" for number in range(4)))
    second = str(tmp_path / "second")
    label(job(mode="alignment", audio=settings.audio, transcripts=str(transcripts), output=second))
    assert (tmp_path / "second" / "quarantine.jsonl").read_text() == ""


def test_text_that_the_units_cannot_spell_is_quarantined(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = samples_of(job().audio)[0]
    samples[1].fields["text"], samples[3].fields["text"] = "one Two", "42"
    settings = job(mode="alignment", audio=write_shards(tmp_path / "audio", [samples]), max_bad_share=0.5)
    label(settings)
    assert "4 utterances in = 2 labelled + 2 quarantined" in capsys.readouterr().out
    lines = [json.loads(line) for line in (Path(settings.output) / "quarantine.jsonl").read_text().splitlines()]
    reason = "text holds '{}', which no unit covers"
    assert {line["key"]: line["reason"] for line in lines} == {
        "s0-u1": reason.format("T"),
        "s0-u3": reason.format("42"),
    }
    with pytest.raises(UserError, match=r"first: s0-u1: text holds 'T'.*, fix the texts, or"):
        label(settings.model_copy(update={"max_bad_share": 0.0}))


def with_bad_audio(job: Job, tmp_path: Path) -> str:
    shards = samples_of(job().audio)
    shards[0][1].audio = b"not audio at all"
    broken = [b"", shards[2][0].audio[:60]]
    shards[1] = [Sample(f"bad-{number}", data, "flac", {}) for number, data in enumerate(broken)]
    return write_shards(tmp_path / "audio", shards)


def test_nothing_labelled_is_a_failure(job: Job, tmp_path: Path) -> None:
    shards = [[Sample(f"bad-{number}", b"", "flac", {}) for number in range(2)]]
    settings = job(audio=write_shards(tmp_path / "audio", shards), max_bad_share=1.0)
    with pytest.raises(
        UserError, match=r"none of 2 utterances can be labelled \(first: bad-0: .*; see .*fix the audio$"
    ):
        label(settings)
    assert not (Path(settings.output) / "report.json").exists()


def test_bad_audio_is_quarantined_and_reconciled(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = job(audio=with_bad_audio(job, tmp_path), max_bad_share=0.4)
    label(settings)
    assert "10 utterances in = 7 labelled + 3 quarantined" in capsys.readouterr().out
    lines = [json.loads(line) for line in (Path(settings.output) / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["key"], line["shard"]) for line in lines] == [
        ("s0-u1", "shard-000000.tar"), ("bad-0", "shard-000001.tar"), ("bad-1", "shard-000001.tar"),
    ]  # fmt: skip
    assert all(line["reason"] for line in lines)
    pairs = [
        sample.key
        for info in read_index(Path(settings.audio))
        for sample, _ in join(Path(settings.audio) / info.name, Path(settings.output) / info.name)
    ]
    assert pairs == ["s0-u0", "s0-u2", "s0-u3", "s2-u0", "s2-u1", "s2-u2", "s2-u3"]


def test_too_much_bad_audio_fails_and_can_be_allowed_later(job: Job, tmp_path: Path) -> None:
    audio = with_bad_audio(job, tmp_path)
    with pytest.raises(UserError, match=r"3 of 10 utter.*max_bad_share 0\.2 \(first: s0-u1: .*raise max_bad_share"):
        label(job(audio=audio, max_bad_share=0.2))
    assert not (tmp_path / "targets" / "report.json").exists()
    whole = tmp_path / "targets" / "quarantine.jsonl"
    assert [json.loads(line)["key"] for line in whole.read_text().splitlines()] == ["s0-u1", "bad-0", "bad-1"]
    label(job(audio=audio, max_bad_share=0.3))


def test_what_was_quarantined_is_listed_when_the_job_gives_up(job: Job, tmp_path: Path) -> None:
    settings = job(audio=with_bad_audio(job, tmp_path), max_bad_share=0.0)
    with pytest.raises(UserError, match=r"first: s0-u1: not audio.*see \S+targets/quarantine\.jsonl, fix the audio"):
        label(settings)
    first = json.loads((tmp_path / "targets" / "quarantine.jsonl").read_text().splitlines()[0])
    assert first["key"] == "s0-u1" and first["shard"] == "shard-000000.tar"


def test_an_alignment_without_texts_is_told_to_give_them(job: Job, tmp_path: Path) -> None:
    samples = samples_of(job().audio)
    for sample in samples[0] + samples[1] + samples[2]:
        del sample.fields["text"]
    audio = write_shards(tmp_path / "audio", samples)
    with pytest.raises(UserError, match=r"first: s0-u0: no text to align to.*, give the texts with transcripts=, or"):
        label(job(mode="alignment", audio=audio))
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"key": "another", "text": "one"}) + "\n")
    with pytest.raises(UserError, match=r"add them to \S+texts\.jsonl, or raise"):
        label(job(mode="alignment", audio=audio, transcripts=str(texts), output=str(tmp_path / "second")))


def test_finished_work_is_not_redone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = job()
    label(settings)
    before = published(settings.output)
    timing = (Path(settings.output) / "timing.json").read_text()
    monkeypatch.setattr(acoustic, "log_posteriors_and_hidden", lambda *_: pytest.fail("the teacher ran again"))
    label(settings)
    assert published(settings.output) == before
    assert (Path(settings.output) / "timing.json").read_text() == timing


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_publish(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    label(job(output=str(tmp_path / "whole")))
    expected = published(tmp_path / "whole")
    settings = job()
    real = os.replace
    kills = 0

    def dying(source: str, target: str) -> None:
        nonlocal kills
        if after:
            real(source, target)
        kills += 1
        raise Killed

    for moment in range(20):
        done = set(Path(settings.output).glob("*.tar"))
        inodes = {path: path.stat().st_ino for path in done}
        # one file more each time when death comes before the rename, or nothing would ever be done
        allowed = iter([] if after else [real] * (moment % 2))
        monkeypatch.setattr(os, "replace", lambda *paths, allowed=allowed: next(allowed, dying)(*paths))
        try:
            label(settings)
        except Killed:
            pass
        finally:
            monkeypatch.setattr(os, "replace", real)
        assert {path: path.stat().st_ino for path in done} == inodes
        if after and moment == 8:
            break
    label(settings)
    assert kills > 5
    assert published(settings.output) == expected


SLOW_JOB = """
import sys, time
from asr_kd.labeling.settings import LabelSettings
from asr_kd.labeling import job
from asr_kd.models import acoustic
infer = acoustic.log_posteriors_and_hidden
def slow(*arguments):
    time.sleep(0.1)
    return infer(*arguments)
acoustic.log_posteriors_and_hidden = slow
job.label(LabelSettings.model_validate_json(sys.argv[1]))
"""


def test_killed_by_sigkill_and_started_again(job: Job, tmp_path: Path) -> None:
    label(job(output=str(tmp_path / "whole")))
    settings = job()
    output = Path(settings.output)
    for shards in (1, 2):
        process = subprocess.Popen([sys.executable, "-c", SLOW_JOB, settings.model_dump_json()], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 300
        while len(list(output.glob("*.tar"))) < shards and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors.decode()
    (output / ".shard-000002.tar.torn.tmp").write_bytes(b"half a shard")
    os.utime(output / ".shard-000002.tar.torn.tmp", (0, 0))
    first = (output / "shard-000000.tar").stat().st_ino
    label(settings)
    assert (output / "shard-000000.tar").stat().st_ino == first
    assert published(output) == published(tmp_path / "whole")


TERMINATED = """
import os, signal, sys
from asr_kd import cli
from asr_kd.labeling import shard
real = shard.write_target_shard
def last(*arguments):
    real(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
shard.write_target_shard = last
sys.exit(cli.main(sys.argv[1:]))
"""


def test_sigterm_is_one_line_and_gives_the_leases_back(job: Job, tmp_path: Path) -> None:
    settings = job()
    words = [f"{name}={value}" for name, value in settings.model_dump(exclude_unset=True).items()]
    command = [sys.executable, "-c", TERMINATED, "label", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.splitlines() == ["asr-kd label: interrupted; the same command goes on where it stopped"]
    assert not (Path(settings.output) / ".leases").exists()
    assert list(Path(settings.output).glob("*.tar"))
    label(settings)
    label(job(output=str(tmp_path / "whole")))
    assert published(settings.output) == published(tmp_path / "whole")


def test_output_of_others_is_refused(job: Job, teacher: Path, tmp_path: Path) -> None:
    label(job())
    with pytest.raises(UserError, match=r"belongs to other settings .k was 8, now 9"):
        label(job(k=9))
    with pytest.raises(
        UserError, match=r"belongs to other settings .audio: \S+audio does not hold what this output was made from"
    ):
        label(job(audio=write_shards(tmp_path / "audio", samples_of(job().audio)[:2])))
    checkpoint = load_checkpoint(teacher)
    with torch.no_grad():
        next(checkpoint.model.parameters()).add_(0.1)
    save_checkpoint(tmp_path / "other", checkpoint.model, checkpoint.units, checkpoint.features, checkpoint.settings)
    with pytest.raises(UserError, match=r"belongs to other settings .teacher was"):
        label(job(teacher=str(tmp_path / "other")))


def test_a_claim_before_the_first_shard_is_easily_left(job: Job, tmp_path: Path) -> None:
    label(job(mode="alignment"))
    for path in Path(job().output).glob("*.tar"):
        path.unlink()
    for path in ("quarantine.jsonl", "report.json", "timing.json"):
        (Path(job().output) / path).unlink()
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"key": f"s{n // 4}-u{n % 4}", "text": "two"}) + "\n" for n in range(12)))
    changed = job(mode="alignment", transcripts=str(texts))
    with pytest.raises(
        UserError, match=r"transcripts was null, now the content of \S+texts\.jsonl\).*remove \S+job\.json"
    ):
        label(changed)
    (Path(job().output) / "job.json").unlink()
    label(changed)
    with pytest.raises(UserError, match="choose another output folder or remove it"):
        label(job())


def test_audio_that_changed_under_the_index_is_refused(job: Job, tmp_path: Path) -> None:
    audio = write_shards(tmp_path / "audio", samples_of(job().audio))
    path = Path(audio) / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"shard-000001\.tar"):
        label(job(audio=audio))


def test_a_broken_teacher_is_named(job: Job, teacher: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(teacher)
    with torch.no_grad():
        next(checkpoint.model.parameters()).fill_(float("nan"))
    save_checkpoint(tmp_path / "nan", checkpoint.model, checkpoint.units, checkpoint.features, checkpoint.settings)
    assert safetensors.torch.load_file(tmp_path / "nan" / "model.safetensors")
    with pytest.raises(UserError, match="nan: has weights that are not numbers"):
        label(job(teacher=str(tmp_path / "nan")))
    assert not list((tmp_path / "targets").glob("*.tar"))


def test_a_teacher_whose_output_overflows_is_named(job: Job, teacher: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(teacher)
    with torch.no_grad():
        list(checkpoint.model.parameters())[-2].fill_(torch.finfo().max)
    save_checkpoint(tmp_path / "large", checkpoint.model, checkpoint.units, checkpoint.features, checkpoint.settings)
    with pytest.raises(UserError, match=r"shard-000000\.tar: s0-u0: the probabilities of frame 0 do not add up to 1"):
        label(job(teacher=str(tmp_path / "large")))


def test_no_audio_is_refused(job: Job, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no utterances"):
        label(job(audio=write_shards(tmp_path / "audio", [])))
