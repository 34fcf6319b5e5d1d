"""Stored hidden states: what is learned from them is what is learned from the teacher in the step."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import Field

from asr_kd.distillation.answers import answer
from asr_kd.distillation.batch import Batch, Example
from asr_kd.distillation.knowledge import Seen
from asr_kd.distillation.settings import SourceSettings
from asr_kd.ending import Stopped
from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models.acoustic import build_model, load_checkpoint, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.tarset import read_members, write_members
from asr_kd.targets.hidden import HiddenStates
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.training import phase
from asr_kd.training.batches import PhaseStream
from asr_kd.training.settings import ChunkSettings, PhaseSettings, TrainSettings
from asr_kd.training.sources import cut
from asr_kd.training.trainer import train
from asr_kd.units import Units, load_units
from tests.distillation.near import NearSettings
from tests.training.conftest import FEATURES
from tests.training.test_processes import launched

Job = Callable[..., TrainSettings]
LAYERS = {"student": "layer.1", "teacher": "layer.1"}


class Source(SourceSettings):
    near: list[NearSettings] = Field([])


class Phase(PhaseSettings):
    sources: list[Source]  # type: ignore[assignment]


class Run(TrainSettings):
    phases: list[Phase]  # type: ignore[assignment]


@pytest.fixture(scope="module")
def teacher(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(5)
    folder, units = tmp_path_factory.mktemp("teacher"), load_units(letters)
    kind = ModelSettings(kind="blstm", layers=2, size=10)
    model = build_model(kind, FEATURES.dimension, units.size)
    torch.nn.init.normal_(model.output.weight, std=8.0)  # sure of what it says, so that there are spikes
    save_checkpoint(folder, model, units, FEATURES, kind)
    return str(folder)


@pytest.fixture(scope="module")
def stored(teacher: str, audio: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of targets that keep events, frames or codes of both layers; all units of the posteriors."""
    made: dict[str, str] = {}

    def make(keep: str) -> str:
        if keep not in made:
            made[keep] = str(tmp_path_factory.mktemp("hidden") / keep)
            codes: dict[str, Any] = {"codebooks": 3} if keep == "codes" else {}
            label(
                LabelSettings.model_validate(
                    {"teacher": teacher, "audio": audio, "output": made[keep], "mode": "hidden", "k": 100, "mass": 1.0, "device": "cpu"}
                    | {"taps": ["layer.2", "layer.1"], "keep": keep, **codes}
                )
            )  # fmt: skip
        return made[keep]

    return make


def run_of(job: Job, targets: str | list[str], source: dict[str, Any], **changes: Any) -> Run:
    plain = job(**changes).model_dump()
    first = plain["phases"][0]["sources"][0] | {"targets": targets, "soft": 0.0} | source
    return Run.model_validate(plain | {"phases": [plain["phases"][0] | {"sources": [first]}]})


def batches(settings: TrainSettings, units: Units) -> tuple[PhaseStream, list[Batch]]:
    stream = PhaseStream(settings, 0, units)
    return stream, [batch for batch in stream.batches(stream.start(), 0) if batch]


def state(run: Path) -> bytes:
    return (run / "last" / "state.safetensors").read_bytes()


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_frames_are_the_states_of_the_teacher(
    job: Job, stored: Callable[[str], str], teacher: str, units: Units
) -> None:
    layers = [LAYERS | {"samples": "frames"}, {"student": "layer.2", "teacher": "layer.2", "samples": "frames"}]
    _, found = batches(run_of(job, stored("frames"), {"near": layers}), units)
    online, answered = batches(run_of(job, None, {"near": layers, "teacher": teacher}), units)  # type: ignore[arg-type]
    networks = {teacher: load_checkpoint(teacher).model}
    for batch, other in zip(found, answered, strict=True):
        theirs = answer(networks, other, online.lessons[0])
        for layer in ("layer.1", "layer.2"):
            values = batch.parts[f"hidden.{layer}"].values
            assert values.dtype == torch.float32 and values.shape == (batch.frames, 20)
            torch.testing.assert_close(values, theirs[f"hidden.{layer}"].values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("samples", ["frames", "events"])
@pytest.mark.parametrize("keep", ["frames", "events", "codes"])
def test_what_is_learned_is_what_the_teacher_in_the_step_teaches(
    job: Job, stored: Callable[[str], str], teacher: str, tmp_path: Path, keep: str, samples: str
) -> None:
    near = {"near": [LAYERS | {"samples": samples}]}
    ours = run_of(job, stored(keep), near, output=str(tmp_path / "stored"), phase={"passes": 1})
    if (keep, samples) == ("events", "frames"):
        with pytest.raises(
            UserError, match=r"of the teacher's spikes alone, near:layer-1:layer-1 compares frames; set"
        ):
            train(ours)
        return
    train(ours)
    theirs: Any = None
    train(run_of(job, theirs, near | {"teacher": teacher}, output=str(tmp_path / "online"), phase={"passes": 1}))
    assert len(losses(tmp_path / "stored")) > 4 and min(losses(tmp_path / "stored")) > 0
    # codes lose something, float16 hardly anything
    np.testing.assert_allclose(
        losses(tmp_path / "stored"), losses(tmp_path / "online"), rtol=0.3 if keep == "codes" else 0.01
    )


def test_events_survive_a_stretch(job: Job, stored: Callable[[str], str], units: Units) -> None:
    """Against the stretch of stored frames: exact where a spike is one frame, a mean of the same frames elsewhere."""
    close, count = 0, 0
    source = {"near": [LAYERS], "augment": {"stretch": 0.4}}
    found = [batches(run_of(job, stored(keep), source), units) for keep in ("events", "frames")]
    for events, frames in zip(*(one for _, one in found), strict=True):
        kinds = [stream.lessons[0].kinds[0] for stream, _ in found]
        assert torch.equal(events.parts["spikes.edges"].values, frames.parts["spikes.edges"].values)
        theirs = []
        for kind, batch in zip(kinds, (events, frames), strict=True):
            shape = batch.features.shape[:2]
            seen = Seen(
                torch.zeros(*shape, units.size),
                batch.lengths,
                batch.learned,
                batch.parts,
                {"layer.1": torch.zeros(*shape, 12)},
                {},
            )
            theirs.append(kind.pairs(seen).teacher)  # type: ignore[attr-defined]
        assert theirs[0].shape == theirs[1].shape and theirs[0].abs().sum(1).gt(0).all()
        distance = (theirs[0] - theirs[1]).norm(dim=1) / theirs[1].norm(dim=1)
        close, count = close + int((distance < 0.1).sum()), count + len(distance)
    assert count > 20 and close > 0.7 * count


def test_codes_are_learned_and_better_than_a_guess(job: Job, stored: Callable[[str], str], tmp_path: Path) -> None:
    train(run_of(job, stored("codes"), {"codes": [LAYERS]}, phase={"passes": 12, "learning_rate": 0.03}))
    found = losses(tmp_path / "run")
    assert abs(found[0] - np.log(256)) < 0.5
    assert np.mean(found[-5:]) < 0.8 * found[0]
    assert not any("codes" in name for name in load_checkpoint(tmp_path / "run").model.state_dict())


@pytest.mark.parametrize("keep", ["events", "codes"])
def test_killed_and_resumed_to_the_same_bits(
    job: Job, stored: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    source = {"soft": 0.5, "augment": {"stretch": 0.2}}
    source |= {"near": [LAYERS]} if keep == "events" else {"codes": [LAYERS], "near": [LAYERS | {"samples": "frames"}]}
    train(run_of(job, stored(keep), source, output=str(tmp_path / "whole")))
    real, steps = phase.step, iter(range(100))

    def interrupted(*arguments: Any) -> float:
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(phase, "step", interrupted)
    again = run_of(job, stored(keep), source, output=str(tmp_path / "again"), loader_workers=1)
    with pytest.raises(Stopped):
        train(again)
    train(again)
    assert state(tmp_path / "again") == state(tmp_path / "whole")


def test_two_processes_of_which_one_dies(job: Job, stored: Callable[[str], str], tmp_path: Path) -> None:
    found = {}
    for how in ("lives", "dies"):
        (tmp_path / how).mkdir()
        plain = job(
            output=str(tmp_path / how / "run"), lanes=2, phase={"passes": 3}, batch_frames=60, bucket_utterances=3,
            source={"targets": stored("codes"), "soft": 0.0, "codes": [LAYERS]},
        )  # fmt: skip
        found[how] = state(launched(plain, tmp_path / how, 2, how))
    assert found["lives"] == found["dies"]


def test_chunks_have_the_codes_of_their_frames() -> None:
    codes = np.arange(20, dtype=np.uint8).reshape(10, 2)
    posteriors = SparsePosteriors.from_alignment(np.zeros(10, np.int64), 3)
    example = Example(
        "a", np.zeros((10, 4), np.float16), targets=posteriors, hidden=HiddenStates("codes", 10, {"layer.1": codes})
    )
    pieces = cut(example, ChunkSettings(frames=4, left=2, right=2))
    held = [piece.hidden for piece in pieces if piece.hidden]
    assert [one.frames for one in held] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([one.of_frames("codes.layer.1") for one in held]), codes)


@pytest.mark.parametrize(
    ("keep", "source", "message"),
    [
        ("frames", {"near": [LAYERS | {"teacher": "layer.3"}]}, r"the teacher has no layer\.3; it has layer\.2, layer\.1"),
        ("frames", {"codes": [LAYERS]}, "holds frames of hidden states, codes:layer-1:layer-1 learns codes; label with keep=codes"),
        ("codes", {"codes": [LAYERS | {"teacher": "layer.3"}]}, r"the teacher has no codes\.layer\.3; it has"),
        ("", {"near": [LAYERS]}, "holds no hidden states, which near:layer-1:layer-1 learns from; label the audio with mode=hidden"),
    ],
)  # fmt: skip
def test_what_was_not_stored_is_named(
    job: Job, stored: Callable[[str], str], targets: str, units: Units, keep: str, source: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        PhaseStream(run_of(job, stored(keep) if keep else targets, source), 0, units)


@pytest.mark.parametrize(
    ("folders", "source", "message"),
    [
        ("a", {"resample": True}, "resample changes soft targets alone, not hidden states"),
        (["a", "b"], {}, "a list of targets combines soft targets alone, not hidden states"),
        (None, {"teacher": "average", "near": [], "codes": [LAYERS]}, "codes:layer-1:layer-1 learns from stored targets alone"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(job: Job, folders: Any, source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_of(job, folders, {"near": [LAYERS]} | source, ema_decay=0.5)


def test_a_shard_of_another_kind_is_refused(
    job: Job, stored: Callable[[str], str], teacher: str, audio: str, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed"
    label(LabelSettings(teacher=teacher, audio=audio, output=str(mixed), mode="hidden", taps=["layer.1"], device="cpu"))
    other = Path(stored("frames")) / "shard-000002.tar"
    write_members(mixed / other.name, list(read_members(other)))
    with pytest.raises(UserError, match=r"shard-000002\.tar: holds other hidden states than the first shard"):
        train(run_of(job, str(mixed), {"near": [LAYERS]}))
