from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asr_kd.audio.settings import FeatureSettings
from asr_kd.models.acoustic import OwnCheckpoint, build_model, load_checkpoint, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.units import Units
from tests.models.conftest import FEATURES, units

__all__ = ["FEATURES", "STUDENT", "Saved", "saved", "units"]

STUDENT: dict[str, Any] = {"kind": "lstm", "layers": 2, "size": 12, "delay_frames": 3}
Saved = Callable[..., OwnCheckpoint]


@pytest.fixture
def saved(units: Units, tmp_path: Path) -> Saved:
    """Writes a checkpoint `checkpoint` with random weights, of a lively network, and loads it."""

    def save(features: FeatureSettings = FEATURES, units: Units = units, **changes: Any) -> OwnCheckpoint:
        torch.manual_seed(0)
        settings = ModelSettings(**(changes or STUDENT))
        model = build_model(settings, features.dimension, units.size)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "project" in name or name.endswith("attention.bias"):
                    weight.normal_(0, 0.3)  # these begin as zeros
            for name, buffer in model.named_buffers():
                if "running" in name:
                    buffer.uniform_(0.5, 1.5)
            model.output.weight *= 4  # else every frame says the same
            model.output.bias[0] -= 0.3
            model.output.bias[units.unknown] = -20.0  # a trained network does not say it
        save_checkpoint(tmp_path / "checkpoint", model, units, features, settings, {"development_wer": 0.25})
        return load_checkpoint(tmp_path / "checkpoint")

    return save


def sound(seconds: float, seed: int = 0, rate: int = 8000) -> np.ndarray:
    """Noise that swells and ebbs, of 16 bits: float32 [samples]."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    wave = rng.normal(0, 0.1, len(time)) * np.abs(np.sin(4 * time + seed)) + 0.1 * np.sin(2000 * time * (1 + time % 1))
    found: np.ndarray = (np.round(wave * 32768).clip(-32768, 32767) / 32768).astype(np.float32)
    return found
