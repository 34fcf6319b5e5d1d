"""Files that earlier versions wrote, and the present one, which every later one reads. They are never written again.

`targets-v1.tar` and `targets-v2.tar` are by the programs of these versions, `checkpoint-v1-first` by the first that wrote
checkpoints of version 1, the others by the program of the day on which they were added. A report of version 2 is in
`evaluation/report-v2`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from asr_kd.models.acoustic import build_model, infer, load_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.targets.hidden import decode_hidden
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.quantiser import read_quantiser
from asr_kd.targets.store import read_labelled_shard, read_metadata, read_target_shard, tail_prior
from asr_kd.training.averaging import Scored
from asr_kd.training.batches import Lane
from asr_kd.training.checkpoints import STATE, load_state
from asr_kd.training.settings import TrainSettings
from asr_kd.training.sources import Cursor
from asr_kd.training.step import Position
from tests.learning import learner_of

GOLDEN = Path(__file__).parent / "golden"
#: what the soft targets were made from: of each frame at most three units that reach a mass of 0.95
KEPT = [{0: 0.7, 1: 0.2, 2: 0.06}, {1: 0.9, 0: 0.05}, {2: 0.3, 3: 0.3, 4: 0.2}]
TARGETS = {"a": KEPT, "b": [KEPT[2], KEPT[1]]}


def frames_of(target: SparsePosteriors) -> list[dict[int, float]]:
    units, probs = target.padded(3)
    return [dict(list(zip(*row, strict=True))[:count]) for *row, count in zip(units, probs, target.counts, strict=True)]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_soft_targets(version: int) -> None:
    path = GOLDEN / f"targets-v{version}.tar"
    metadata, pairs = read_target_shard(path, "abcd", 5, 30)
    found = dict(pairs)
    assert metadata == read_metadata(path)
    assert list(found) == list(TARGETS)
    for key, frames in TARGETS.items():
        for frame, kept, tail in zip(frames_of(found[key]), frames, found[key].tail, strict=True):
            assert list(frame) == list(kept)
            assert frame == pytest.approx(kept, abs=0.01)
            assert tail == pytest.approx(1 - sum(kept.values()), abs=0.01)
    assert (metadata.version, metadata.codec.version, metadata.codec.levels) == (version, min(version, 2), 128)
    assert metadata.selection.model_dump(exclude_none=True, exclude={"floor"}) == {
        "mode": "mass", "k": 3, "mass": 0.95, "temperature": 1.0,
    }  # fmt: skip
    assert (metadata.teacher, metadata.quarantined, metadata.features.dimension) == ("feedc0de", {"c": "empty"}, 192)
    assert (metadata.statistics.frames, metadata.statistics.mean_kl) == (5, 0.01)
    assert metadata.heard == ("float16" if version == 3 else None)
    if version > 1:
        halvings = 2.0 ** -np.array([0, 1, 2, 0, 0.5])
        np.testing.assert_allclose(tail_prior(path, metadata), halvings / halvings.sum())


@pytest.mark.parametrize("keep", ["events", "frames", "codes"])
def test_soft_targets_with_hidden_states(keep: str) -> None:
    path = GOLDEN / "targets-v4" / f"{keep}.tar"
    metadata, utterances = read_labelled_shard(path, "abcd", 5, 30)
    held = metadata.hidden
    assert metadata.version == 4 and held is not None and (held.keep, held.taps) == (keep, {"layer.1": 2})
    quantiser = read_quantiser(path.parent, held.quantiser) if held.quantiser else None
    states = {}
    for key, target, data in utterances:
        assert list(map(list, frames_of(target))) == list(map(list, TARGETS[key]))
        states[key] = decode_hidden(data or b"", held, key, quantiser)
    first = [0, 0] if keep == "events" else [1, -1]
    assert states["a"].of_frames("layer.1").tolist() == [first, [0.5, 0.25], [0, 2]]
    assert states["b"].of_frames("layer.1").tolist() == ([[0, 0]] * 2 if keep == "events" else [[0, 2], [-3, 0]])
    if keep == "codes":
        assert states["b"].of_frames("codes.layer.1").tolist() == [[2], [3]]


@pytest.mark.parametrize(
    ("name", "fingerprint"), [("checkpoint-v1-first", "9f55cead6032fc02"), ("checkpoint-v1", "ad861ba12dd38840")]
)
def test_a_checkpoint(name: str, fingerprint: str) -> None:
    """Whatever settings came since: its fingerprint stays, by which soft targets know their teacher."""
    checkpoint = load_checkpoint(GOLDEN / name)
    assert checkpoint.fingerprint == fingerprint
    assert checkpoint.training == {"step": 40, "development_wer": 0.125}
    assert (checkpoint.frame_ms, checkpoint.lookahead_ms, checkpoint.units.size) == (30, 45, 5)
    assert checkpoint.units.encode("ab ba") == [4, 2, 3, 4, 3, 2] and checkpoint.units.decode([2, 0, 3]) == "ab"
    features = np.sin(np.arange(3 * 24)).reshape(3, 24).astype(np.float32)
    expected = [[-2.0831, -1.8772, -1.4445, -1.3088, -1.5305], [-2.1388, -2.0283, -1.4536, -1.1967, -1.5385]]
    np.testing.assert_allclose(infer(checkpoint, [features])[0][:2], expected, atol=1e-3)


def test_a_training_state(tmp_path: Path) -> None:
    (tmp_path / STATE).parent.mkdir()
    (tmp_path / STATE).write_bytes((GOLDEN / "state-v3.safetensors").read_bytes())
    learner = learner_of(None, build_model(ModelSettings(kind="conv", layers=1, size=2, kernel=3), 4, 3))
    pupil, learner.optimizer = learner.pupil, torch.optim.AdamW(learner.pupil.parameters(), lr=0.1)
    optimizer, average = learner.optimizer, AveragedModel(pupil)
    learner.average = average
    exchange = load_state(tmp_path, learner)
    assert learner.position == Position(
        cycle=3, phase=1, turn=2, step=40, scored=40, audio_seconds=5.25, phase_seconds=0.5, phase_start=20,
        start=Scored(0, 1.0, 2.5, 6), best=Scored(20, 0.5, 0.25, 2, 1), last=Scored(40, 1.0, 0.25), lowest=0.25,
        lanes=[[Lane(3, [Cursor(number=2, shard=1, item=4, seconds=0.25, unused=1)])], [Lane()]],
        kept=[Scored(20, 0.5, 0.25), Scored(40, 1.0, 0.25)],
    )  # fmt: skip
    assert exchange["residual"].tolist() == [0, 1, 2]
    assert pupil.student.output.weight.tolist() == [[2.0, 2.5], [3.0, 3.5], [4.0, 4.5]]
    assert average.module.student.output.bias.tolist() == [1.5, 1.75, 2.0]
    for state in optimizer.state.values():
        assert {name: set(value.flatten().tolist()) for name, value in state.items()} == {
            "step": {40.0}, "exp_avg": {0.125}, "exp_avg_sq": {0.0625},
        }  # fmt: skip
    torch.testing.assert_close(torch.rand(2), torch.tensor([0.5349, 0.1988]), atol=1e-4, rtol=0)


def test_settings_that_came_later_are_not_written_where_they_are_not_used() -> None:
    """Or a run begun before them would be refused as one of other settings. The file holds what 84445df made of these settings."""
    said = json.loads((GOLDEN / "train-settings.json").read_text())
    assert TrainSettings.model_validate(said["given"]).model_dump(mode="json") == said["dump"]
