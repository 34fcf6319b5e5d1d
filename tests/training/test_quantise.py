"""The verb that rounds the weights of a trained network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from asr_kd.errors import UserError
from asr_kd.models.acoustic import blank_held_back, build_model, load_checkpoint, save_checkpoint
from asr_kd.models.rounded import rounded
from asr_kd.models.settings import ModelSettings
from asr_kd.training.development import score_development
from asr_kd.training.quantise import quantise
from asr_kd.training.quantise_settings import QuantiseSettings
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import Units
from tests.training.conftest import FEATURES

Job = Callable[..., TrainSettings]
FULL = ModelSettings(kind="lstm", layers=2, size=12, delay_frames=3)


@pytest.fixture
def full(units: Units, tmp_path: Path) -> Path:
    """A run with a network of random weights, whose blank is far from calibrated."""
    torch.manual_seed(0)
    model = build_model(FULL, FEATURES.dimension, units.size)
    with blank_held_back(model, -3.0):
        save_checkpoint(
            tmp_path / "run" / "best", model, units, FEATURES, FULL, {"step": 7, "development_wer": 0.5, "blank_offset": 1.0}
        )  # fmt: skip
    return tmp_path / "run"


def test_a_trained_network_is_quantised(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = QuantiseSettings(checkpoint=str(full), output=str(tmp_path / "small"), bits=4)
    before = load_checkpoint(full)
    written = []
    for _ in range(2):  # again, it writes the same
        quantise(wanted)
        assert capsys.readouterr().out == f"{tmp_path}/small: weights of 4 bits, 3.0 kB in place of 12.5 kB\n"
        written.append({path.name: path.read_bytes() for path in (tmp_path / "small").iterdir() if path.is_file()})
    assert written[0] == written[1]
    small = load_checkpoint(tmp_path / "small")
    assert small.settings == FULL.model_copy(update={"bits": 4})
    origin = {"folder": str(full), "fingerprint": before.fingerprint}
    assert small.training == {"step": 7, "blank_offset": 1.0, "quantised_from": origin}
    for (name, weight), expected in zip(small.model.named_parameters(), before.model.parameters(), strict=True):
        assert torch.equal(weight, rounded(expected, 4) if weight.dim() > 1 else expected), name


def test_its_blank_is_calibrated_as_after_a_training(job: Job, units: Units, tmp_path: Path) -> None:
    settings = job(phase={"passes": 8}, model=FULL.model_dump())
    train(settings)
    best, full = load_checkpoint(settings.output), tmp_path / "full"
    with blank_held_back(best.model, -4.0):  # as if it had not been calibrated
        save_checkpoint(full, best.model, units, FEATURES, FULL, {"blank_offset": 1.0})
    quantise(
        QuantiseSettings(checkpoint=str(full), output=str(tmp_path / "small"), bits=8, development=settings.development)
    )
    small = load_checkpoint(tmp_path / "small")
    offset = small.training["blank_offset"] - 1.0
    assert offset > 1.0
    before = load_checkpoint(full).model.state_dict()["output.bias"]
    assert small.model.state_dict()["output.bias"][0] == before[0] - offset
    assert torch.equal(small.model.state_dict()["output.bias"][1:], before[1:])
    found = score_development(settings, small)
    assert found.blank_offset == 0
    assert found.loss == pytest.approx(small.training["development_loss"], rel=1e-4)
    assert found.wer == small.training["development_wer"]


def test_a_training_that_learns_nothing_ends_in_the_same_network(job: Job, tmp_path: Path) -> None:
    """After training, or as the start of a training with bits: the same rounding, the same scores."""
    train(job(output=str(tmp_path / "full"), model={"layers": 2, "size": 12, "delay_frames": 2}, phase={"passes": 4}))
    settings = job(
        output=str(tmp_path / "run"), init=str(tmp_path / "full"), phase={"passes": 1, "learning_rate": 1e-12},
        model={"layers": 2, "size": 12, "delay_frames": 2, "bits": 4},
    )  # fmt: skip
    train(settings)
    small = QuantiseSettings(
        checkpoint=str(tmp_path / "full"), output=str(tmp_path / "small"), bits=4, development=settings.development
    )
    quantise(small)
    started, found = load_checkpoint(settings.output).training["started_from"], load_checkpoint(small.output).training
    assert (found["development_wer"], found["development_loss"]) == (started["wer"], started["loss"])


def test_what_cannot_be_quantised(full: Path, tmp_path: Path) -> None:
    wanted = QuantiseSettings(checkpoint=str(full), output=str(tmp_path / "small"), bits=4)
    quantise(wanted)
    again = QuantiseSettings(checkpoint=str(tmp_path / "small"), output=str(tmp_path / "smaller"), bits=2)
    with pytest.raises(UserError, match="is quantised to 4 bits already; give the one it was made from"):
        quantise(again)
    with pytest.raises(UserError, match=r"belongs to other settings \(bits was 4, now 8\)"):
        quantise(wanted.model_copy(update={"bits": 8}))
    with pytest.raises(UserError, match="none: there is no such folder"):
        quantise(wanted.model_copy(update={"checkpoint": str(tmp_path / "none")}))
