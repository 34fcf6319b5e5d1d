"""Self-distillation in the real loop: heads on lower layers, views that agree, the run's own average and last cycle as teachers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from asr_kd.ending import Stopped
from asr_kd.models.acoustic import load_checkpoint
from asr_kd.training import phase
from asr_kd.training.batches import PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import Units

Job = Callable[..., TrainSettings]

HEADS = {"ctc": 0.5, "heads": [{"layer": "layer.1", "ctc": 0.3, "soft": 0.5, "top": {"start": 0.0, "end": 0.5}}]}


def state(run: Path) -> bytes:
    return (run / "last" / "state.safetensors").read_bytes()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "last" / "state.safetensors")


def rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)]


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainSettings, int], None]:
    """Trains, with an interruption before one step."""

    def run(settings: TrainSettings, at: int) -> None:
        real, steps = phase.step, iter(range(1000))

        def interrupted(*arguments: Any) -> float:
            if next(steps) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments)

        monkeypatch.setattr(phase, "step", interrupted)
        with pytest.raises(Stopped):
            train(settings)
        monkeypatch.setattr(phase, "step", real)
        train(settings)

    return run


def test_a_head_is_learned_and_left_behind(job: Job) -> None:
    train(job(source=HEADS, phase={"passes": 20}))
    run = Path(job().output)
    assert losses(run)[-1] < 0.5 * losses(run)[0]
    assert {name for name in weights(run) if name.startswith("model.beside")} == {
        "model.beside.heads:layer-1.weight", "model.beside.heads:layer-1.bias",
    }  # fmt: skip
    assert not any("head" in name for name in load_checkpoint(run).model.state_dict())


def test_a_head_without_weight_to_speak_of_changes_nothing(job: Job, tmp_path: Path) -> None:
    train(job(output=str(tmp_path / "without")))
    train(job(output=str(tmp_path / "with"), source={"heads": [{"layer": "layer.1", "ctc": 1e-30, "top": 1e-30}]}))
    without = weights(tmp_path / "without")
    for name, value in weights(tmp_path / "with").items():
        if name.startswith("model.") and "beside" not in name:
            torch.testing.assert_close(value, without[name])


def test_a_head_is_resumed_to_the_same_bits(job: Job, tmp_path: Path, resumed: Callable[..., None]) -> None:
    train(job(source=HEADS, output=str(tmp_path / "whole")))
    resumed(job(source=HEADS, output=str(tmp_path / "run")), 4)
    assert state(tmp_path / "run") == state(tmp_path / "whole")


@pytest.mark.parametrize("missing", ["prior", "uniform"])
def test_a_head_alone_learns_with_any_policy_for_missing_mass(job: Job, missing: str) -> None:
    settings = job(source={"soft": 0.0, "heads": [{"layer": "layer.1", "soft": 1.0}]}, missing_mass=missing)
    train(settings)
    assert losses(Path(settings.output))[-1] < losses(Path(settings.output))[0]


CONDITIONED = {"layers": 2, "size": 12, "delay_frames": 2, "conditioned": [1]}
SHARED = {"ctc": 0.5, "heads": [{"layer": "layer.1", "ctc": 0.5, "shared": True}]}


def test_a_conditioned_network_learns_through_its_one_output_layer(
    job: Job, tmp_path: Path, resumed: Callable[..., None]
) -> None:
    settings = job(model=CONDITIONED, source=SHARED, ema_decay=0.5, output=str(tmp_path / "whole"), phase={"passes": 5})
    train(settings)
    assert losses(tmp_path / "whole")[-1] < 0.8 * losses(tmp_path / "whole")[0]
    assert weights(tmp_path / "whole")["model.condition.project.weight"].any()
    assert not any("beside" in name for name in weights(tmp_path / "whole"))
    assert "condition.project.weight" in load_checkpoint(tmp_path / "whole").model.state_dict()
    resumed(settings.model_copy(update={"output": str(tmp_path / "run")}), 4)
    assert state(tmp_path / "run") == state(tmp_path / "whole")


def test_a_head_cannot_share_the_output_layer_of_a_network_that_is_not_conditioned(job: Job) -> None:
    with pytest.raises(
        ValueError, match=r"layer\.1 shares the output layer, but .* name its number in model\.conditioned"
    ):
        job(source=SHARED)


MASKS = {"time_masks": 2, "mel_masks": 1, "stretch": 0.2}
VIEWS = {"ctc": 0.5, "views": {"weight": {"start": 0.0, "end": 0.5, "until": 0.3}}, "augment": MASKS}


def test_a_batch_holds_every_utterance_twice_with_other_masks(job: Job, units: Units) -> None:
    plain, doubled = (
        PhaseStream(
            job(source={"ctc": 0.5, "augment": MASKS, "batch_frames": frames, **source}, phase={"passes": 1}), 0, units
        )
        for frames, source in ((50, {}), (100, {"views": {}}))
    )
    batches = [list(filter(None, stream.batches(stream.start(), 0))) for stream in (plain, doubled)]
    for one, two in zip(*batches, strict=True):
        assert (one.seconds, one.after) == (two.seconds, two.after)
        assert two.frames == 2 * one.frames and torch.equal(two.lengths, one.lengths.repeat(2))
        for name, part in one.parts.items():
            values = two.parts[name].values
            assert torch.equal(values, part.values if part.whole else torch.cat([part.values] * 2))
        first, second = two.features.chunk(2)
        assert torch.equal(first, one.features)
        both = (first != 0) & (second != 0)
        assert torch.equal(first[both], second[both]) and not torch.equal(first, second)


def test_views_are_learned_and_resumed_to_the_same_bits(job: Job, tmp_path: Path, resumed: Callable[..., None]) -> None:
    train(job(source=VIEWS, output=str(tmp_path / "whole")))
    resumed(job(source=VIEWS, output=str(tmp_path / "run")), 4)
    assert state(tmp_path / "run") == state(tmp_path / "whole")


def test_views_of_chunks_are_refused(job: Job) -> None:
    with pytest.raises(ValueError, match="chunks cannot learn from views, which needs whole utterances"):
        job(source={"views": {}, "augment": {"time_masks": 1}}, phase={"chunks": {"frames": 5}})
