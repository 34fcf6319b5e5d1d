from __future__ import annotations

from typing import Any

import pytest

from asr_kd.evaluation.earlier import EarlierSettings
from asr_kd.evaluation.formats import decoder


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "greedy"),
        ({"decoder": "greedy", "beam": 8}, "greedy"),
        ({"decoder": "beam", "beam": 16}, "prefix beam search, beam 16"),
        ({"decoder": "torchaudio", "beam": 8}, "beam search of torchaudio, beam 8"),
        (
            {"decoder": "beam", "beam": 8, "lm": "lm/a.arpa", "lm_weight": 0.2, "word_bonus": 1.0, "lexicon": None},
            "prefix beam search, beam 8, language model lm/a.arpa with weight 0.2, word bonus 1",
        ),
        (
            {"decoder": "torchaudio", "lexicon": "words.txt"},
            "beam search of torchaudio, beam 8, lexicon words.txt, word bonus 0",
        ),
    ],
)
def test_the_decoder_is_named_with_all_that_it_had(settings: dict[str, Any], said: str) -> None:
    assert decoder(EarlierSettings(**settings)) == said
