"""Sources of generated features in the real loop: drawn by the seed, refused, mixed, resumed, in two processes, and a generator that learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from asr_kd.errors import UserError
from asr_kd.labeling.moments import moments as store_moments
from asr_kd.labeling.settings import MomentsSettings
from asr_kd.models.acoustic import build_model, load_checkpoint, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.targets.moments import Sums, read_moments, write_moments
from asr_kd.training.batches import PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import Units, load_units
from tests.training.conftest import FEATURES
from tests.training.test_critic import teacher
from tests.training.test_processes import METHODS, launched

__all__ = ["teacher"]
Job = Callable[..., TrainSettings]
UTTERANCES = 9


@pytest.fixture(scope="module")
def moments(teacher: str, audio: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("moments") / "moments.safetensors")
    store_moments(MomentsSettings(teacher=teacher, audio=audio, output=path, device="cpu"))
    return path


@pytest.fixture
def made(job: Job, teacher: str, moments: str) -> Callable[..., TrainSettings]:
    """A run on generated features alone, or with other sources behind them."""

    def make(kind: str = "adversarial", source: dict[str, Any] | None = None, others: tuple[dict[str, Any], ...] = (), **changes: Any) -> TrainSettings:  # fmt: skip
        generated = {"kind": kind, "utterances": UTTERANCES, "seconds": 0.6, "moments": moments, **changes.pop("generated", {})}  # fmt: skip
        first = {
            "targets": None,
            "audio": None,
            "teacher": teacher,
            "soft": 1.0,
            "generated": generated,
            **(source or {}),
        }
        phase = {"sources": [first, *others], **changes.pop("phase", {})}
        return job(phase=phase, **changes)

    return make


def labelled(audio: str) -> dict[str, Any]:
    return {"audio": audio, "ctc": 1.0}


def drawn(settings: TrainSettings, units: Units, cycle: int = 0) -> dict[str, np.ndarray]:
    """Features of all utterances of the first source, by key, less what pads them."""
    stream = PhaseStream(settings, 0, units)
    found = {}
    for source in stream.sources[:1]:
        for lane in range(settings.lanes):
            for examples, _ in source.batches(lane, stream.start()[lane].cursors[0], stream.passes):
                found |= {one.key: one.features for one in examples}
    return found


def state(run: Path) -> dict[str, bytes]:
    """What a run has published, less what the second process alone must know."""
    return {
        str(one.relative_to(run)): one.read_bytes() for one in run.rglob("*.safetensors") if "rank-" not in one.name
    }


def rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


@pytest.mark.parametrize("kind", ["noise", "adversarial"])
def test_what_is_drawn_depends_on_seed_pass_and_number_alone(
    made: Callable[..., TrainSettings], units: Units, kind: str
) -> None:
    first = drawn(made(kind), units)
    assert len(first) == 2 * UTTERANCES  # every pass draws others
    assert len({one.tobytes() for one in first.values()}) == len(first)
    assert {one.shape for one in first.values()} == {(20, FEATURES.dimension)}
    for same in (made(kind, lanes=3), made(kind, batch_frames=40, bucket_utterances=2), made(kind, loader_workers=1)):
        assert all(np.array_equal(one, first[key]) for key, one in drawn(same, units).items())
        assert drawn(same, units).keys() == first.keys()
    other = drawn(made(kind, seed=1), units)
    assert not any(np.array_equal(one, first[key]) for key, one in other.items())
    assert len(drawn(made(kind, source={"repeat": 2}), units)) == 4 * UTTERANCES


def test_noise_has_the_moments_and_without_them_is_white(
    made: Callable[..., TrainSettings], units: Units, moments: str
) -> None:
    stored = read_moments(moments, FEATURES.dimension)
    for given, roughness in ((moments, stored.roughness), (None, np.full(FEATURES.dimension, 2.0))):
        settings = made("noise", generated={"moments": given, "utterances": 200, "seconds": 3.0})
        sums = Sums(FEATURES.dimension)
        for features in drawn(settings, units).values():
            sums.add(features, 0.0)
        found = sums.moments("")
        spread = stored.variance[-1] if given else 1.0
        np.testing.assert_allclose(found.variance[-1], spread, rtol=0.1)
        np.testing.assert_allclose(found.mean, stored.mean if given else 0.0, atol=0.1 * spread**0.5)
        assert abs(found.roughness[-1] - roughness[-1]) < 0.2


def test_a_generator_comes_near_the_moments_and_into_the_band_and_the_student_leaves_alone(
    made: Callable[..., TrainSettings], tmp_path: Path, moments: str
) -> None:
    stored = read_moments(moments, FEATURES.dimension)
    train(made(phase={"passes": 40}, generated={"disagreement": 0.2}, evaluate_every=1000))
    steps = rows(tmp_path / "run")
    away = [row["generated:distance"] for row in steps]
    assert np.mean(away[-5:]) < 0.3 * np.mean(away[:3])
    spoken = np.mean([row["generated:spoken"] for row in steps[-5:]])
    assert 0.3 * stored.spoken < spoken < 3 * stored.spoken
    assert all(row["generated:disagreement"] >= 0 for row in steps)
    names = load_checkpoint(tmp_path / "run").model.state_dict()
    assert not any("generated" in name or "beside" in name for name in names)


@pytest.mark.parametrize("kind", ["noise", "adversarial"])
def test_beside_audio_and_stopped_at_any_step_it_goes_on_to_the_same_bits(
    made: Callable[..., TrainSettings],
    audio: str,
    tmp_path: Path,
    kind: str,
    stopped_at_every_step: Callable[..., None],
) -> None:
    settings = made(kind, others=(labelled(audio),), phase={"passes": 1}, ema_decay=0.5)
    run = Path(settings.output)
    train(settings)
    whole, said = state(run), rows(run)
    assert any("generated:disagreement" in row for row in said) == (kind == "adversarial")
    assert any(not any(name.startswith("generated") for name in row) for row in said)  # the labelled source
    run.rename(tmp_path / "whole")
    stopped_at_every_step(settings)
    assert state(run) == whole and [row["loss"] for row in rows(run)] == [row["loss"] for row in said]


@pytest.mark.parametrize("method", [{}, METHODS["blocks"]], ids=["ddp", "blocks"])
def test_processes_train_it_together_and_one_may_die(
    made: Callable[..., TrainSettings], audio: str, tmp_path: Path, method: dict[str, Any]
) -> None:
    settings = made(
        others=(labelled(audio),),
        phase={"passes": 1},
        lanes=2,
        distributed=method,
        batch_frames=60,
        bucket_utterances=3,
    )
    found = {}
    for how in ("lives", "dies"):
        run = launched(settings, tmp_path, 2, how)
        found[how] = state(run)
        run.rename(tmp_path / f"run-{how}")
    assert found["lives"] == found["dies"]


def test_two_processes_take_the_step_of_one(made: Callable[..., TrainSettings], tmp_path: Path) -> None:
    """The student's part is a sum over frames; the generator's own terms are means over what a process draws."""
    still = {"disagreement": 0.0, "likeness": 0.0, "speech": 0.0}
    shape = {
        "model": {"layers": 1, "size": 8, "dropout": 0.0},
        "phase": {"passes": 1},
        "generated": {**still, "utterances": 8},
    }
    both = launched(made(**shape, lanes=2, batch_frames=80), tmp_path, 2)
    ours = safetensors_of(both)
    both.rename(tmp_path / "both")
    train(made(**shape, batch_frames=160, bucket_utterances=8))
    theirs = safetensors_of(tmp_path / "run")
    names = [name for name in theirs if name.startswith("model.")]
    assert len(rows(tmp_path / "run")) == len(rows(tmp_path / "both")) == 1
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)


def safetensors_of(run: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(run / "last" / "state.safetensors")


def test_noise_teaches_other_kinds_and_chunks_too(made: Callable[..., TrainSettings], tmp_path: Path) -> None:
    source = {"spikes": {}, "features": [{"student": "layer.2", "teacher": "layer.1"}]}
    train(made("noise", source=source, phase={"passes": 1}))
    for name, chunks in (("cut", {"frames": 8, "left": 4}), ("carried", {"frames": 8, "carry": True})):
        train(made("noise", output=str(tmp_path / name), phase={"passes": 1, "chunks": chunks}))
        assert len(rows(tmp_path / name)) > 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": {"audio": "somewhere"}}, "give audio, or generated features in its place"),
        ({"source": {"generated": None}}, "give audio, or generated features in its place"),
        ({"source": {"teacher": None}}, "generated features are answered by one checkpoint in the step; set teacher"),
        ({"source": {"teacher": "average"}}, "answered by one checkpoint"),
        ({"source": {"teacher": ["a", "b"]}}, "answered by one checkpoint"),
        ({"source": {"teacher": {"run": "other"}}}, "answered by one checkpoint"),
        ({"source": {"targets": "some"}}, "targets belongs to audio"),
        ({"source": {"only": "list.jsonl"}}, "only belongs to audio"),
        ({"source": {"transcripts": "some.jsonl"}}, "transcripts belongs to audio"),
        ({"source": {"ctc": 1.0}}, "ctc learns text, and generated features have none"),
        ({"source": {"heads": [{"layer": "layer.1", "ctc": 1.0}]}}, "heads:layer-1 learns text"),
        ({"source": {"augment": {"time_masks": 1}}}, "augment changes audio; leave it out"),
        ({"source": {"soft": 0.0}}, "adversarial features teach soft; set it above 0"),
        ({"source": {"spikes": {}}}, "teach soft, frame by frame, and no spikes"),
        ({"source": {"divergence": {"kind": "reverse"}}}, "and no divergence"),
        ({"source": {"mutual": {}}}, "and no mutual"),
        ({"source": {"select": {}}}, "teach every frame; leave out select"),
        ({"source": {"delays": {}}}, "teach every frame; leave out delays"),
        ({"source": {"temperature": 2.0}}, "leave out temperature"),
        ({"generated": {"moments": None}}, "adversarial needs moments, or its features become garbage"),
        ({"generated": {"speech_least": 3.0}}, "speech_most 2 is below speech_least 3"),
        ({"kind": "noise", "generated": {"likeness": 2.0}}, "likeness belongs to kind adversarial alone"),
        ({"generated": {"utterances": 0}}, "greater than or equal to 1"),
        ({"phase": {"chunks": {"frames": 5}}}, "chunks cannot learn from generated, which needs whole utterances"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(made: Callable[..., TrainSettings], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        made(**changes)


def test_one_generator_serves_all_sources(made: Callable[..., TrainSettings], teacher: str, moments: str) -> None:
    other = made(generated={"utterances": 3}).phases[0].sources[0].model_dump()
    with pytest.raises(ValidationError, match="one network makes the features of all sources"):
        made(others=(other,))
    made("noise", others=(other,))


def test_moments_of_another_teacher_are_refused_and_so_is_going_on_with_others(
    made: Callable[..., TrainSettings], letters: Path, tmp_path: Path, moments: str
) -> None:
    units, kind = load_units(letters), ModelSettings(kind="lstm", layers=1, size=4)
    save_checkpoint(tmp_path / "other", build_model(kind, FEATURES.dimension, units.size), units, FEATURES, kind)
    for kinds in ("noise", "adversarial"):
        with pytest.raises(UserError, match=r"generated\.moments: .* was made with teacher \w+, \w+ answers"):
            train(made(kinds, source={"teacher": str(tmp_path / "other")}))
    mine = tmp_path / "moments"
    mine.write_bytes(Path(moments).read_bytes())
    settings = made(generated={"moments": str(mine)}, phase={"passes": 1})
    train(settings)
    found = read_moments(mine, FEATURES.dimension)
    write_moments(
        mine, type(found)(found.mean + 1, found.axes, found.variance, found.change, found.spoken, found.teacher)
    )
    with pytest.raises(UserError, match=r"belongs to other settings .*moments"):
        train(settings)
    with pytest.raises(UserError, match=r"generated\.seconds: 0.01 s are no whole frame of 30 ms"):
        train(made(generated={"seconds": 0.01}))
