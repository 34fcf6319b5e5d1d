from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.models.outside.fbank import ICEFALL, NEMO, NEMO_AS_IT_IS, WENET, FrontEnd

ALL = {"icefall": ICEFALL, "wenet": WENET, "nemo": NEMO, "nemo as it is": NEMO_AS_IT_IS}


def noise(samples: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32))


@given(st.sampled_from(sorted(ALL)), st.integers(400, 4000), st.sampled_from([8000, 16000]))
def test_the_number_of_frames_is_known_before(name: str, samples: int, rate: int) -> None:
    found = ALL[name].compute(noise(samples), rate, 20)
    assert found.shape == (ALL[name].frames(samples, rate), 20) and bool(found.isfinite().all())


@pytest.mark.parametrize("front_end", ALL.values(), ids=ALL)
def test_a_click_is_heard_where_its_frames_are(front_end: FrontEnd) -> None:
    sound = torch.full((16000,), 0.0)
    sound[8000] = 0.5
    loudest = int(front_end.compute(sound + 1e-4 * noise(16000), 16000, 40).mean(1).argmax())
    middle = front_end.start_ms + 10 * loudest + 12.5
    assert abs(middle - 500) <= 10


def test_nemo_is_what_transformers_computes_for_parakeet() -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    sound = noise(20000)
    theirs = transformers.ParakeetFeatureExtractor()(sound.numpy(), sampling_rate=16000, return_tensors="pt")
    wanted = theirs.input_features[0][theirs.attention_mask[0].bool()]
    assert torch.allclose(NEMO.compute(sound, 16000, 80), wanted, atol=1e-3)
