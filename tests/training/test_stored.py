"""Stored hidden states: what is learned from them is what is learned from the teacher in the step."""

from __future__ import annotations

import json
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
from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models.acoustic import build_model, load_checkpoint, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.tarset import read_members, write_members
from asr_kd.targets.hidden import HiddenStates, SideBySide
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.store import read_labelled_shard, write_target_shard
from asr_kd.training.batches import PhaseStream
from asr_kd.training.settings import ChunkSettings, PhaseSettings, TrainSettings
from asr_kd.training.sources import cut
from asr_kd.training.trainer import train
from asr_kd.units import Units, load_units
from tests.distillation.near import NearSettings
from tests.training.conftest import FEATURES
from tests.training.test_processes import assert_a_death_changes_nothing

Job = Callable[..., TrainSettings]
LAYERS = {"student": "layer.1", "teacher": "layer.1"}


class Source(SourceSettings):
    near: list[NearSettings] = Field([])


class Phase(PhaseSettings):
    sources: list[Source]  # type: ignore[assignment]


class Run(TrainSettings):
    phases: list[Phase]  # type: ignore[assignment]


def made_teacher(folder: Path, letters: Path, seed: int, size: int, layers: int) -> str:
    torch.manual_seed(seed)
    units, kind = load_units(letters), ModelSettings(kind="blstm", layers=layers, size=size)
    model = build_model(kind, FEATURES.dimension, units.size)
    torch.nn.init.normal_(model.output.weight, std=8.0)  # sure of what it says, so that there are spikes
    save_checkpoint(folder, model, units, FEATURES, kind)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return made_teacher(tmp_path_factory.mktemp("teacher"), letters, 5, 10, 2)


@pytest.fixture(scope="module")
def second(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another teacher, of other widths, with one layer more."""
    return made_teacher(tmp_path_factory.mktemp("second"), letters, 6, 7, 3)


@pytest.fixture(scope="module")
def stored(teacher: str, second: str, audio: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Folder of targets that keep events, frames or codes of layers; all units of the posteriors."""
    made: dict[tuple[str, bool], str] = {}

    def make(keep: str, of_second: bool = False) -> str:
        if (keep, of_second) not in made:
            made[keep, of_second] = str(tmp_path_factory.mktemp("hidden") / keep)
            codes: dict[str, Any] = {"codebooks": 2 if of_second else 3} if keep == "codes" else {}
            label(
                LabelSettings.model_validate(
                    {"teacher": second if of_second else teacher, "audio": audio, "output": made[keep, of_second], "mode": "hidden"}
                    | {"k": 100, "mass": 1.0, "device": "cpu", "taps": ["layer.3", "layer.1"] if of_second else ["layer.2", "layer.1"]}
                    | {"keep": keep, **codes}
                )
            )  # fmt: skip
        return made[keep, of_second]

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


def test_frames_are_the_states_of_the_teacher(job: Job, stored: Callable[..., str], teacher: str, units: Units) -> None:
    layers = [LAYERS | {"samples": "frames"}, {"student": "layer.2", "teacher": "layer.2", "samples": "frames"}]
    _, found = batches(run_of(job, stored("frames"), {"near": layers}), units)
    online, answered = batches(run_of(job, "", {"near": layers, "teacher": teacher, "targets": None}), units)
    networks = {teacher: load_checkpoint(teacher).model}
    for batch, other in zip(found, answered, strict=True):
        theirs = answer(networks, other, online.lessons[0])
        for layer in ("layer.1", "layer.2"):
            values = batch.parts[f"hidden.{layer}"].values
            assert values.dtype == torch.float32 and values.shape == (batch.frames, 20)
            torch.testing.assert_close(values, theirs[f"hidden.{layer}"].values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("samples", ["frames", "events"])
def test_what_is_learned_is_what_the_teacher_in_the_step_teaches(
    job: Job, stored: Callable[..., str], teacher: str, tmp_path: Path, samples: str
) -> None:
    near = {"near": [LAYERS | {"samples": samples}]}
    online: dict[str, Any] = near | {"teacher": teacher, "targets": None}
    train(run_of(job, "", online, output=str(tmp_path / "online"), phase={"passes": 1}))
    theirs = losses(tmp_path / "online")
    assert len(theirs) > 4 and min(theirs) > 0
    for keep in ("frames", "events", "codes"):
        ours = run_of(job, stored(keep), near, output=str(tmp_path / keep), phase={"passes": 1})
        if (keep, samples) == ("events", "frames"):
            with pytest.raises(UserError, match=r"of the teacher's spikes alone, near:layer-1:layer-1 compares frames"):
                train(ours)
        else:  # codes lose something, float16 hardly anything
            train(ours)
            np.testing.assert_allclose(losses(tmp_path / keep), theirs, rtol=0.3 if keep == "codes" else 0.01)


def test_events_survive_a_stretch(job: Job, stored: Callable[..., str], units: Units) -> None:
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


def test_codes_are_learned_and_better_than_a_guess(job: Job, stored: Callable[..., str], tmp_path: Path) -> None:
    train(run_of(job, stored("codes"), {"codes": [LAYERS]}, phase={"passes": 12, "learning_rate": 0.03}))
    found = losses(tmp_path / "run")
    assert abs(found[0] - np.log(256)) < 0.5
    assert np.mean(found[-5:]) < 0.8 * found[0]
    assert not any("codes" in name for name in load_checkpoint(tmp_path / "run").model.state_dict())


@pytest.mark.parametrize("keep", ["frames", "codes"])
def test_several_teachers_states_stand_side_by_side_as_in_the_step(
    job: Job, stored: Callable[..., str], teacher: str, second: str, units: Units, keep: str
) -> None:
    """Of two teachers, of which one keeps codes and the other frames, what all have; soft targets are combined as ever."""
    sets = [stored(keep), stored("frames", True)]
    near = {"near": [LAYERS | {"samples": "frames"}], "features": [LAYERS], "combine": {"weights": [1.0, 3.0]}}
    stream, found = batches(run_of(job, sets, near), units)
    online, answered = batches(run_of(job, "", near | {"teacher": [teacher, second], "targets": None}), units)
    assert stream.lessons[0].taught == ["layer.1"] and dict(stream.lessons[0].kinds[0].task.taught) == {"layer.1": 34}
    assert [kind.name for kind in stream.lessons[0].kinds] == [kind.name for kind in online.lessons[0].kinds]
    networks = {name: load_checkpoint(name).model for name in (teacher, second)}
    for batch, other in zip(found, answered, strict=True):
        theirs = answer(networks, other, online.lessons[0])
        ours = batch.parts["hidden.layer.1"].values
        assert ours.shape == (batch.frames, 34)
        torch.testing.assert_close(ours[:, 20:], theirs["hidden.layer.1"].values[:, 20:], rtol=1e-3, atol=1e-4)
        first = theirs["hidden.layer.1"].values[:, :20]
        assert (ours[:, :20] - first).abs().mean() < (1e-4 if keep == "frames" else 0.2 * first.abs().mean())
        best, own = theirs["soft.units"].values[:, 0], batch.parts["soft.units"].values[:, 0]
        assert (best == own).float().mean() > 0.9


@pytest.mark.parametrize("samples", ["frames", "events"])
def test_what_two_stored_teachers_teach_is_what_both_in_the_step_teach(
    job: Job, stored: Callable[..., str], teacher: str, second: str, tmp_path: Path, samples: str
) -> None:
    kinds = {
        "near": [LAYERS | {"samples": samples}],
        "relations": [LAYERS | {"kind": "similarity", "samples": samples}],
    }
    online: dict[str, Any] = kinds | {"teacher": [teacher, second], "targets": None}
    train(run_of(job, "", online, output=str(tmp_path / "online"), phase={"passes": 1}))
    both = [stored("frames"), stored("frames", True)]
    train(run_of(job, both, kinds, output=str(tmp_path / "stored"), phase={"passes": 1}))
    theirs = losses(tmp_path / "online")
    assert len(theirs) > 4 and min(theirs) > 0
    np.testing.assert_allclose(losses(tmp_path / "stored"), theirs, rtol=0.03)


def test_codes_of_two_teachers_are_guessed_together(
    job: Job, stored: Callable[..., str], units: Units, tmp_path: Path
) -> None:
    both = [stored("codes"), stored("codes", True)]
    settings, *alone = (
        run_of(job, sets, {"codes": [LAYERS]}, phase={"passes": 12, "learning_rate": 0.03}) for sets in (both, *both)
    )
    for batch, one, other in zip(*(batches(each, units)[1] for each in (settings, *alone)), strict=True):
        parts = [each.parts["codes.layer.1"].values for each in (one, other)]
        assert [part.shape[1] for part in parts] == [3, 2]
        assert torch.equal(batch.parts["codes.layer.1"].values, torch.cat(parts, 1))
    train(settings)
    curve = losses(tmp_path / "run")
    assert abs(curve[0] - np.log(256)) < 0.5 and np.mean(curve[-5:]) < 0.8 * curve[0]


def test_an_utterance_that_one_teacher_lacks_is_left_out_of_hidden_states(
    job: Job, stored: Callable[..., str], units: Units, tmp_path: Path
) -> None:
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in Path(stored("frames", True)).glob("*.tar"):
        metadata, utterances = read_labelled_shard(path)
        kept = [one for one in utterances if one.key != "u4"]
        count = metadata.statistics.model_copy(
            update={"utterances": len(kept), "frames": sum(one.target.frames for one in kept)}
        )
        bad = {"u4": "bad"} if len(kept) < metadata.statistics.utterances else {}
        hidden = {one.key: one.hidden or b"" for one in kept}
        changed = metadata.model_copy(update={"statistics": count, "quarantined": bad})
        write_target_shard(fewer / path.name, changed, [(one.key, one.target) for one in kept], hidden)
    settings = run_of(job, [stored("frames"), str(fewer)], {"near": [LAYERS]}, max_bad_share=0.1)
    stream, found = batches(settings, units)
    assert stream.sources[0].met.unused == ("u4", f"no soft target in {fewer}")
    assert stream.sources[0].met.ends[0].unused == 2 and sum(len(batch.lengths) for batch in found) == 18  # two passes


def test_events_of_several_teachers_are_refused(job: Job, stored: Callable[..., str], units: Units) -> None:
    both = [stored("frames"), stored("events", True)]
    with pytest.raises(
        UserError,
        match=rf"targets: {both[1]} holds hidden states of its own teacher's spikes.*keep=frames or keep=codes",
    ):
        PhaseStream(run_of(job, both, {"near": [LAYERS]}), 0, units)


@pytest.mark.parametrize("keep", ["events", "codes", "two"])
def test_killed_and_resumed_to_the_same_bits(
    job: Job, stored: Callable[..., str], tmp_path: Path, resumed: Callable[..., None], keep: str
) -> None:
    source = {"soft": 0.5, "augment": {"stretch": 0.2}}
    source |= {"near": [LAYERS]} if keep == "events" else {"codes": [LAYERS], "near": [LAYERS | {"samples": "frames"}]}
    sets = [stored("codes"), stored("codes", True)] if keep == "two" else stored(keep)
    train(run_of(job, sets, source, output=str(tmp_path / "whole"), phase={"passes": 1}))
    again = run_of(job, sets, source, output=str(tmp_path / "again"), loader_workers=1, phase={"passes": 1})
    resumed(again, 2)
    assert state(tmp_path / "again") == state(tmp_path / "whole")


def test_two_processes_of_which_one_dies(job: Job, stored: Callable[..., str], tmp_path: Path) -> None:
    settings = job(
        lanes=2, phase={"passes": 3}, batch_frames=60, bucket_utterances=3,
        source={"targets": stored("codes"), "soft": 0.0, "codes": [LAYERS]},
    )  # fmt: skip
    assert_a_death_changes_nothing(settings, tmp_path)


def test_chunks_have_the_codes_of_their_frames() -> None:
    codes = np.arange(20, dtype=np.uint8).reshape(10, 2)
    posteriors = SparsePosteriors.from_alignment(np.zeros(10, np.int64), 3)
    example = Example(
        "a", np.zeros((10, 4), np.float16), targets=posteriors, hidden=HiddenStates("codes", 10, {"layer.1": codes})
    )
    pieces = cut(example, ChunkSettings(frames=4, left=2, right=2))
    both = SideBySide([HiddenStates("codes", 10, {"layer.1": one}) for one in (codes, codes[:, :1])])
    np.testing.assert_array_equal(both[2:5].of_frames("codes.layer.1"), codes[2:5][:, [0, 1, 0]])
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
    job: Job, stored: Callable[..., str], targets: str, units: Units, keep: str, source: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        PhaseStream(run_of(job, stored(keep) if keep else targets, source), 0, units)


@pytest.mark.parametrize(
    ("folders", "source", "message"),
    [
        ("a", {"resample": True}, "resample changes soft targets alone, not hidden states"),
        (["a", "b"], {"near": [], "relations": [{"kind": "attention", "student": "attention.1", "teacher": "attention.1"}]}, "attention relations need one teacher"),
        (None, {"teacher": "average", "near": [], "codes": [LAYERS]}, "codes:layer-1:layer-1 learns from stored targets alone"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(job: Job, folders: Any, source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_of(job, folders, {"near": [LAYERS]} | source, ema_decay=0.5)


def test_a_shard_of_another_kind_is_refused(
    job: Job, stored: Callable[..., str], teacher: str, audio: str, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed"
    label(LabelSettings(teacher=teacher, audio=audio, output=str(mixed), mode="hidden", taps=["layer.1"], device="cpu"))
    other = Path(stored("frames")) / "shard-000002.tar"
    write_members(mixed / other.name, list(read_members(other)))
    with pytest.raises(UserError, match=r"shard-000002\.tar: holds other hidden states than the first shard"):
        train(run_of(job, str(mixed), {"near": [LAYERS]}))
