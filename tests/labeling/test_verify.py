from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from asr_kd.cli import main
from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings, VerifySettings
from asr_kd.labeling.verify import verify
from asr_kd.models.acoustic import load_checkpoint, save_checkpoint
from asr_kd.shards.tarset import read_members, write_members
from asr_kd.targets.hidden import decode_hidden, encode_hidden
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.quantiser import read_quantiser, write_bytes
from asr_kd.targets.store import read_labelled_shard, read_target_shard, write_target_shard

Job = Callable[..., LabelSettings]
MODES = (
    {"k": 8, "mass": 0.99},
    {"mode": "top_k", "k": 3},
    {"mode": "sampled", "draws": 9},
    {"mode": "alignment"},
    {"mode": "occupancy"},
)


def check(job: LabelSettings, **changes: object) -> bool:
    values = {"targets": job.output, "audio": job.audio, "teacher": job.teacher, "device": "cpu", "shards": None}
    return verify(VerifySettings.model_validate(values | changes))


def problems(job: LabelSettings, tmp_path: Path, **changes: object) -> str:
    """What the report of a set that does not hold says."""
    assert not check(job, report=str(tmp_path / "found.json"), **changes)
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["holds"] is False and report["problems"]
    return "\n".join(report["problems"])


def members(path: Path) -> list[tuple[str, bytes]]:
    return list(read_members(path))


@pytest.mark.parametrize("mode", MODES)
def test_what_was_just_labelled_holds(
    job: Job, mode: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = job(**mode)
    label(settings)
    capsys.readouterr()
    assert check(settings, report=str(tmp_path / "found.json"))
    assert "holds; 3 of 3 shards, 12 utterances" in capsys.readouterr().out
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["holds"] and report["difference"] == 0 and report["top1"] == 0 and report["utterances"] == 12


HIDDEN: tuple[dict[str, object], ...] = (
    {"keep": "events"},
    {"keep": "frames"},
    {"keep": "codes", "codebooks": 2, "quantiser_frames": 300},
)


@pytest.mark.parametrize("keep", HIDDEN, ids=lambda keep: keep["keep"])
def test_hidden_states_are_compared_with_the_teacher_s(
    job: Job, keep: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = job(mode="hidden", k=8, mass=0.99, taps=["layer.1"], **keep)
    label(settings)
    capsys.readouterr()
    assert check(settings, report=str(tmp_path / "found.json"))
    assert "hidden states of layer.1 are within" in capsys.readouterr().out
    path = tmp_path / "targets" / "shard-000001.tar"
    metadata, utterances = read_labelled_shard(path)
    assert metadata.hidden is not None
    kept = list(utterances)
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["hidden"]["layer.1"] >= metadata.hidden.lost["layer.1"] * 0.99
    assert report["moved"] == 0 and bool(report["events"]) == (keep["keep"] == "events")
    # what belongs to other frames
    states = {one.key: decode_hidden(one.hidden or b"", metadata.hidden) for one in kept}
    for one in states.values():
        one.taps["layer.1"] = one.taps["layer.1"][::-1]
    changed = {key: encode_hidden(one) for key, one in states.items()}
    write_target_shard(path, metadata, [(one.key, one.target) for one in kept], changed)
    assert re.search(r"shard-000001\.tar: hidden states of layer\.1 are .* more than the", problems(settings, tmp_path))


def test_events_elsewhere_and_another_quantiser(job: Job, tmp_path: Path) -> None:
    settings = job(mode="hidden", k=8, mass=0.99, taps=["layer.1"])
    label(settings)
    path = tmp_path / "targets" / "shard-000000.tar"
    metadata, utterances = read_labelled_shard(path)
    assert metadata.hidden is not None
    kept = list(utterances)
    states = {one.key: decode_hidden(one.hidden or b"", metadata.hidden) for one in kept}
    for one in states.values():
        assert one.edges is not None
        one.edges[1, -1:] = one.frames
        one.edges[0, -1:] = one.frames - 1
    changed = {key: encode_hidden(one) for key, one in states.items()}
    write_target_shard(path, metadata, [(one.key, one.target) for one in kept], changed)
    assert "events are of utterances whose spikes the teacher has elsewhere" in problems(settings, tmp_path)
    codes = job(
        mode="hidden", k=8, mass=0.99, taps=["layer.1"], keep="codes", codebooks=1, quantiser_frames=300,
        output=str(tmp_path / "codes"),
    )  # fmt: skip
    label(codes)
    other = read_quantiser(codes.output)
    other.tables["layer.1"][0, 0, 0] += 1
    (tmp_path / "codes" / "quantiser.safetensors").write_bytes(write_bytes(other))
    assert "the codes are of" in problems(codes, tmp_path)


def test_a_sample_of_the_shards(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    label(job())
    capsys.readouterr()
    assert check(job(), shards=2)
    assert "2 of 3 shards, 8 utterances" in capsys.readouterr().out


def test_settings_that_the_labelling_did_not_have_are_named(job: Job, tmp_path: Path) -> None:
    texts, others = tmp_path / "texts.jsonl", tmp_path / "others.jsonl"
    for path, text in ((texts, "two"), (others, "six")):
        path.write_text("".join(json.dumps({"key": f"s{n // 4}-u{n % 4}", "text": text}) + "\n" for n in range(12)))
    label(job(mode="alignment", transcripts=str(texts), max_seconds=30.0))
    assert check(job(), max_seconds=30.0, transcripts=str(texts))
    with pytest.raises(
        UserError, match=r"give max_seconds=30\.0 \(not 60\.0\) and transcripts=FILE, .* \(SHA-256 \w+…\)"
    ):
        check(job())
    with pytest.raises(UserError, match=r"give transcripts=FILE, .*others\.jsonl differs"):
        check(job(), max_seconds=30.0, transcripts=str(others))
    plain = job(mode="alignment", output=str(tmp_path / "plain"))
    label(plain)
    with pytest.raises(UserError, match="give no transcripts"):
        check(plain, transcripts=str(texts))


def test_findings_come_in_the_order_of_keys(job: Job, tmp_path: Path) -> None:
    label(job())
    path = tmp_path / "targets" / "shard-000001.tar"
    write_members(path, members(path)[:1])
    said = [line for line in problems(job(), tmp_path).splitlines() if "is missing" in line]
    assert len(said) == 4 and said == sorted(said)


def test_another_teacher_is_named(job: Job, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label(job())
    other = load_checkpoint(teacher)
    with torch.no_grad():
        next(other.model.parameters()).add_(0.01)
    mark = save_checkpoint(tmp_path / "other", other.model, other.units, other.features, other.settings)
    said = problems(job(), tmp_path, teacher=str(tmp_path / "other"))
    assert mark in said and load_checkpoint(teacher).fingerprint in said
    assert "verify: 0 of 12 utterances" in capsys.readouterr().err


def test_probabilities_that_are_not_the_teachers(job: Job, tmp_path: Path) -> None:
    label(job())
    path = tmp_path / "targets" / "shard-000001.tar"
    metadata, pairs = read_target_shard(path)

    def turned(target: SparsePosteriors) -> SparsePosteriors:
        units = (target.units + 1) % target.num_units
        return SparsePosteriors(target.counts, units, target.log_probs, target.tail, target.num_units)

    changed = [(key, turned(target) if key == "s1-u2" else target) for key, target in pairs]
    write_target_shard(path, metadata, changed)
    said = problems(job(), tmp_path)
    assert "a probability differs by" in said and "the best unit is not the teacher's" in said
    assert check(job(), max_difference=1.0, max_top1_share=1.0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"shard-000001\.tar: this audio shard has no soft targets"),
        (lambda path: shutil.copy(path, path.with_name("shard-9.tar")), r"shard-9\.tar: answers no audio shard"),
        (lambda path: write_members(path, members(path)[:-1]), "s1-u3 is missing, though the teacher can label it"),
        (lambda path: write_members(path, members(path)[1:]), "not a soft-target shard"),
        (
            lambda path: write_members(path, [*members(path)[:2], ("s1-u1.target", members(path)[2][1][:-1] + b"?")]),
            "s1-u1: damaged .the checksum differs",
        ),
        (
            lambda path: write_members(path, [*members(path), ("foreign.target", members(path)[1][1])]),
            "foreign has a soft target, but it is not in the audio shard",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "truncated or damaged"),
        (lambda path: shutil.copy(path.with_name("shard-000000.tar"), path), "answers an audio shard with SHA-256"),
    ],
)
def test_damage_is_found(job: Job, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    label(job())
    damage(tmp_path / "targets" / "shard-000001.tar")
    assert re.search(message, problems(job(), tmp_path))


def test_exit_status_says_whether_it_holds(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    settings = job()
    label(settings)
    words = [f"targets={settings.output}", f"audio={settings.audio}", f"teacher={settings.teacher}", "device=cpu"]
    assert main(["verify", *words]) == 0
    (Path(settings.output) / "shard-000002.tar").unlink()
    assert main(["verify", *words]) == 1
    assert "does not hold" in capsys.readouterr().out
    assert main(["verify", *words, "targets=nowhere"]) == 2


def test_no_targets_at_all(job: Job) -> None:
    with pytest.raises(UserError, match="no such folder of soft targets"):
        check(job())


def test_targets_of_a_teacher_that_heard_unrounded_features(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they were made before version 3: read still, and the reason of the difference is said."""
    settings = job(k=20, mass=0.9999)
    label(settings)
    capsys.readouterr()
    assert check(settings) and "heard unrounded" not in capsys.readouterr().out
    for path in sorted((tmp_path / "targets").glob("*.tar")):
        metadata, pairs = read_target_shard(path)
        assert (metadata.version, metadata.heard, metadata.frontend) == (3, "float16", 1)
        old = metadata.model_copy(update={"version": 2, "heard": None})
        write_target_shard(path, old, [(key, nudged(target)) for key, target in pairs])
    report = tmp_path / "found.json"
    assert check(settings, report=str(report))
    assert "the teacher of 3 of these 3 shards heard unrounded features (float32, as asr_kd" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["rounded_later"] == 3 and 0 < found["difference"] < 0.03
    assert not check(settings, max_difference=1e-6)
    assert "heard unrounded features" in capsys.readouterr().out


def nudged(target: SparsePosteriors) -> SparsePosteriors:
    """What another rounding may do."""
    log_probs = target.log_probs - np.float32(0.01)
    kept = np.add.reduceat(np.exp(log_probs), target.starts)
    return SparsePosteriors(target.counts, target.units, log_probs, (1 - kept).astype(np.float32), target.num_units)
