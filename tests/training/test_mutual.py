"""Learners beside the student in the real loop: peers, and branches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from asr_kd.distillation.knowledge import Pupil
from asr_kd.models.acoustic import build_model, load_checkpoint, parameters
from asr_kd.training.batches import PhaseStream
from asr_kd.training.distributed.exchange import Exchange
from asr_kd.training.distributed.ranks import Ranks
from asr_kd.training.settings import TrainSettings
from asr_kd.training.step import Learner, step
from asr_kd.training.trainer import train
from asr_kd.units import Units
from tests.training.test_processes import assert_a_death_changes_nothing

Job = Callable[..., TrainSettings]

KINDS: dict[str, dict[str, Any]] = {
    "mutual": {"mutual": {"weight": 0.5, "model": {"layers": 1, "size": 8}}},
    "branches": {"branches": {"weight": {"start": 0.0, "end": 1.0}, "count": 3}},
}


def state(run: Path) -> bytes:
    return (run / "last" / "state.safetensors").read_bytes()


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def all_sources(job: Job, **changes: Any) -> TrainSettings:
    """A source with peers, one with branches, and one that teaches the student alone."""
    sources = [job(source=one).phases[0].sources[0].model_dump() for one in KINDS.values()]
    alone = job(source={"targets": None, "soft": 0.0, "ctc": 1.0}).phases[0].sources[0].model_dump()
    return job(phase={"sources": [*sources, alone], "passes": 1}, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_learned_and_the_student_leaves_alone(job: Job, tmp_path: Path, kind: str) -> None:
    settings = job(source={"ctc": 1.0, **KINDS[kind]}, phase={"passes": 8})
    train(settings)
    run = Path(settings.output)
    found = losses(run)
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    train(job(output=str(tmp_path / "alone"), phase={"passes": 1}))
    assert parameters(load_checkpoint(run).model) == parameters(load_checkpoint(tmp_path / "alone").model)


def test_killed_and_resumed_to_the_same_bits(job: Job, tmp_path: Path, resumed: Callable[..., None]) -> None:
    train(all_sources(job, output=str(tmp_path / "whole"), ema_decay=0.8))
    settings = all_sources(job, output=str(tmp_path / "run"), ema_decay=0.8)
    resumed(settings)
    assert state(tmp_path / "run") == state(tmp_path / "whole")
    held = safetensors.torch.load_file(tmp_path / "run" / "last" / "state.safetensors")
    for kind in KINDS:
        assert any(name.startswith("average.") and f"beside.{kind}." in name for name in held)


def test_two_processes_of_which_one_dies(job: Job, tmp_path: Path) -> None:
    settings = all_sources(job, lanes=2, evaluate_every=6, batch_frames=80, bucket_utterances=3)
    assert_a_death_changes_nothing(settings, tmp_path)


def test_the_student_s_own_steps_do_not_change_with_peers_that_it_does_not_hear(job: Job, tmp_path: Path) -> None:
    """Its first weights, its clipping and its batches are those of a run without peers."""
    plain = {"model": {"layers": 2, "size": 12, "delay_frames": 2, "dropout": 0.0}, "phase": {"passes": 2}}
    train(job(output=str(tmp_path / "with"), source={"mutual": {"weight": 0.0}}, **json.loads(json.dumps(plain))))
    train(job(output=str(tmp_path / "without"), **json.loads(json.dumps(plain))))
    with_it, without = (load_checkpoint(tmp_path / name).model.state_dict() for name in ("with", "without"))
    for name, value in with_it.items():
        torch.testing.assert_close(value, without[name], rtol=0, atol=0)


def test_exchanging_student_and_peer_exchanges_what_they_become(job: Job, units: Units) -> None:
    """Also where one has gradients that are clipped."""
    settings = job(source={"mutual": {}}, model={"layers": 1, "size": 6, "dropout": 0.0}, clip=0.3)
    stream = PhaseStream(settings, 0, units)
    batch = next(filter(None, stream.batches(stream.start(), 0)))
    become = []
    for seeds in ((0, 1), (1, 0)):
        pupil = Pupil(build_model(settings.model, settings.features.dimension, units.size), stream.lessons[0].kinds)
        for seed, one in zip(seeds, pupil.clipped, strict=True):
            torch.manual_seed(seed)
            first = build_model(settings.model, settings.features.dimension, units.size).state_dict()
            one.load_state_dict({name: (1 + 4 * seed) * value for name, value in first.items()})
        learner = Learner(settings, pupil, torch.optim.SGD(pupil.parameters(), lr=1.0), Exchange(pupil, Ranks()))
        for _ in range(3):
            step(learner, batch, stream.lessons, 0.1)
        become.append([one.state_dict() for one in pupil.clipped])
    for name in become[0][0]:
        torch.testing.assert_close(become[0][0][name], become[1][1][name])
        torch.testing.assert_close(become[0][1][name], become[1][0][name])
        assert not torch.equal(become[0][0][name], become[0][1][name])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"targets": None, "soft": 0.0, "mutual": {}}], "ends in silence; teach one source ctc or soft"),
        ([{"mutual": {}}, {"mutual": {"peers": 2}}], "mutual trains the same learners in all sources"),
        ([{"mutual": {}}, {"mutual": {"critic": 0.1}}], "mutual trains the same learners in all sources"),
    ],
)
def test_what_does_not_go_together(job: Job, sources: list[dict[str, Any]], message: str) -> None:
    plain = job().phases[0].sources[0].model_dump()
    with pytest.raises(ValueError, match=message):
        job(phase={"sources": [plain | source for source in sources]})


def test_another_weight_in_another_source_is_fine(job: Job) -> None:
    plain = job().phases[0].sources[0].model_dump()
    job(phase={"sources": [plain | {"mutual": {"weight": weight, "critic": weight}} for weight in (0.5, 1.0)]})
