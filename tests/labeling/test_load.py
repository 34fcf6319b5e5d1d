from __future__ import annotations

from collections.abc import Callable

import numpy as np

from asr_kd.labeling.load import read_features
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models.acoustic import load_checkpoint
from asr_kd.shards.stream import ShardInput, load_features
from asr_kd.shards.tarset import read_index


def test_the_teacher_hears_to_the_bit_what_it_was_trained_on(job: Callable[..., LabelSettings]) -> None:
    settings = job()
    features = load_checkpoint(settings.teacher).features
    for info in read_index(settings.audio):
        heard = read_features(settings, features, info).utterances
        trained = load_features(ShardInput(folder=settings.audio, features=features, max_seconds=60.0), info).items
        assert [one.key for one in heard] == [one.key for one in trained]
        for one, other in zip(heard, trained, strict=True):
            assert one.features is not None and one.features.dtype == other.features.dtype == np.float16
            np.testing.assert_array_equal(one.features, other.features)
