"""Settings of Whisper and Moonshine, which give text and no posteriors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from asr_kd.config.base import Count, Location, Positive, Settings, Share, is_default
from asr_kd.config.knobs import Normalizing


class WhisperSettings(Settings):
    """Of a Whisper or Moonshine model, how it transcribes and which of its texts are kept."""

    language: Annotated[str, Field(pattern="^[a-z]{2,3}$")] | None = Field(
        None, description="what is spoken, e.g. en; null: the model's guess, piece by piece"
    )
    beam: Count = Field(5, description="hypotheses kept by its beam search; 1 is greedy")
    numerals: bool = Field(
        True, description="whether it may write figures and signs of currency; false: numbers come as words"
    )
    piece_seconds: Annotated[float, Field(ge=5, le=30)] = Field(
        30.0, description="longer audio is cut into pieces of at most this length, at quiet places"
    )
    normalizer: Normalizing = Field("basic", description="what is done to its texts: none, basic or english")
    units: Location | None = Field(
        None,
        description="folder of the student's units: texts get their case, without punctuation that they lack; what they cannot write otherwise "
        "is left out",
    )
    min_avg_logprob: float | None = Field(
        -1.0, description="a text is left out when the mean log-probability of its tokens is lower; null: never"
    )
    max_no_speech_prob: Share | None = Field(
        0.6,
        description="such a text is one that nobody speaks where the probability of that is higher; without min_avg_logprob that alone leaves it out",
    )
    max_compression_ratio: Positive | None = Field(
        2.4, description="or when it is more repetitive than this: its bytes, divided by those that zlib makes of them"
    )
    compute: Literal["float32", "float16", "bfloat16", "int8"] = Field(
        "float32", description="numbers that the network computes with; int8 needs a CTranslate2 model"
    )

    padding_seconds: Annotated[float, Field(ge=1, lt=30)] | None = Field(
        None,
        description="CTranslate2 alone: silence that the network hears behind a piece; null fills its 30 s, as it was trained. Short utterances "
        "take less time with 10; below 5 it repeats itself",
        exclude_if=lambda value: value is None,
    )

    @model_validator(mode="after")
    def _fits(self) -> WhisperSettings:
        if self.units and not is_default(self, "normalizer"):
            raise ValueError("units bring their own normaliser; leave out normalizer")
        return self
