"""Settings of an acoustic model."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from asr_kd.audio.settings import FeatureSettings
from asr_kd.config.base import Count, NotNegative, Settings, check_given_once


class ModelSettings(Settings):
    """An acoustic model."""

    kind: Literal["lstm", "blstm", "conv", "conformer"] = Field("lstm", description="network family")
    layers: Annotated[int, Field(ge=1, le=1000)] = Field(2, description="layers")
    size: Annotated[int, Field(ge=1, le=100_000)] = Field(160, description="hidden units of a layer (and direction)")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.1, description="dropout between layers")
    delay_frames: Annotated[int, Field(ge=0, le=32)] = Field(
        0, description="frames of future input an `lstm` sees before it answers for a frame"
    )
    delay_ms: NotNegative | None = Field(None, description="the same in milliseconds: as many frames as it takes")
    kernel: Annotated[int, Field(ge=1, le=10_000)] = Field(
        5, description="convolution width in frames (`conv`: each layer; `conformer`: depthwise)"
    )
    heads: Count = Field(4, description="attention heads of a `conformer`")
    conditioned: list[Count] = Field(
        default_factory=list,
        description="layers behind which what the output layer would say there is added to what the next layer hears (not for `conv`)",
    )

    @model_validator(mode="after")
    def _fits(self) -> ModelSettings:
        check_given_once(self, "delay_frames", "delay_ms")
        if self.kind != "lstm" and (self.delay_frames or self.delay_ms):
            raise ValueError("delay_frames belongs to kind lstm alone")
        if self.kind in ("conv", "conformer") and self.kernel % 2 == 0:
            raise ValueError("kernel must be odd")
        if self.kind == "conformer" and self.size % self.heads:
            raise ValueError("size must be a multiple of heads")
        if self.conditioned and self.kind == "conv":
            raise ValueError("conditioned belongs to kinds lstm, blstm and conformer")
        if any(layer >= self.layers for layer in self.conditioned):
            raise ValueError("conditioned names layers before the last one; a layer must follow")
        if len(set(self.conditioned)) < len(self.conditioned):
            raise ValueError("conditioned names a layer twice; name each once")
        return self

    @property
    def taps(self) -> dict[str, int]:
        """Hidden states that can be asked for, with their widths: `layer.1` after the first layer, and so on.

        Of a Conformer also `attention.1`, …: queries, keys and values of a layer, one beside the other, all heads together.
        """
        width, layers = self.size * (2 if self.kind == "blstm" else 1), range(1, self.layers + 1)
        found = {f"layer.{layer}": width for layer in layers}
        return found | {f"attention.{layer}": 3 * width for layer in layers if self.kind == "conformer"}

    def in_frames(self, features: FeatureSettings) -> ModelSettings:
        """The network with its delay in frames of these features.

        Raises:
            ValueError: the delay is too long.
        """
        if self.delay_ms is None:
            return self
        frames = math.ceil(self.delay_ms / features.frame_ms)
        if frames > 32:
            raise ValueError(f"delay_ms {self.delay_ms:g} is more than 32 frames of {features.frame_ms} ms; lower it")
        return self.model_copy(update={"delay_frames": frames, "delay_ms": None})
