"""Settings of what reads soft targets: their combination, and `inspect`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from asr_kd.config.base import Count, Location, Positive, Settings

#: what is kept of a teacher's hidden states: of each spike one vector, of each frame one, or of each frame codes
Keep = Literal["events", "frames", "codes"]


class CombineSettings(Settings):
    """The soft targets of several teachers as one."""

    mode: Literal["mean", "log_mean", "confidence"] = Field(
        "mean",
        description="mean of the probabilities, of the log-probabilities, or of the probabilities weighted by how certain each "
        "teacher is of the frame",
    )
    weights: list[Positive] | None = Field(
        None, description="of the teachers, in the order of targets; null weighs all alike"
    )


class InspectSettings(Settings):
    """Soft targets for a person to look at."""

    targets: Location = Field(description="a soft-target shard, or a folder of them, or a URL")
    key: str | None = Field(None, description="utterance to show; without it the shard is listed")
    units: Location | None = Field(None, description="folder of the units, for their names in place of numbers")
    audio: Location | None = Field(None, description="folder of the audio shards, for the spectrogram")
    png: Location | None = Field(None, description="file for a picture of the utterance")
    rows: Count = Field(20, description="lines of the table at most")

    @model_validator(mode="after")
    def _fits(self) -> InspectSettings:
        if (self.png or self.audio) and not self.key:
            raise ValueError("png and audio need a key")
        return self
