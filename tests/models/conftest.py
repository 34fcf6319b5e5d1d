from __future__ import annotations

import pytest
import torch

from asr_kd.audio.settings import FeatureSettings
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.texts import train_units
from asr_kd.units import Units

FEATURES = FeatureSettings(sample_rate=8000, mels=8)


@pytest.fixture(scope="session")
def units(tmp_path_factory: pytest.TempPathFactory) -> Units:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("units")
    (folder / "text.txt").write_text("one two three\nfour five six\n" * 3)
    source, output = str(folder / "text.txt"), str(folder / "units")
    return train_units(UnitsSettings(source=source, output=output, kind="char", size=40))
