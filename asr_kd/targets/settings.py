"""Settings of what reads soft targets: their combination, and `inspect`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from asr_kd.config.base import Count, Location, Positive, Sets, Settings

#: what is kept of a teacher's hidden states: of each spike one vector, of each frame one, or of each frame codes
Keep = Literal["events", "frames", "codes"]


#: weights by how well each teacher did on development audio
DEVELOPMENT: Literal["development"] = "development"


class CombineSettings(Settings):
    """The soft targets of several teachers as one."""

    mode: Literal["mean", "log_mean", "confidence", "surest"] = Field(
        "mean",
        description="mean of the probabilities, of the log-probabilities, or of the probabilities weighted by how certain each "
        "teacher is of the frame; or those of the teacher that is the surest of the frame",
    )
    weights: (
        Annotated[
            Annotated[Literal["development"], Tag("str")] | Annotated[list[Positive], Tag("list[weight]")],
            Discriminator(lambda value: "str" if isinstance(value, str) else "list[weight]"),
        ]
        | None
    ) = Field(
        None,
        description="of the teachers, in the order of targets; development: 1 / WER on development audio, as each teacher's checkpoint (or the "
        "report.json of its targets) has it; null weighs all alike",
    )

    def numbers(self, teachers: int) -> list[float]:
        """A weight for each of so many teachers; those of `development` must have been looked up before."""
        if isinstance(self.weights, str):
            raise ValueError("weights by development score were not looked up")
        return self.weights or [1.0] * teachers


class InspectSettings(Settings):
    """Soft targets for a person to look at."""

    targets: Location = Field(description="a soft-target shard, or a folder of them, or a URL")
    key: str | None = Field(None, description="utterance to show; without it the shard is listed")
    units: Location | None = Field(None, description="folder of the units, for their names in place of numbers")
    audio: Sets | None = Field(None, description="folder of the audio shards (or a list), for the spectrogram")
    png: Location | None = Field(None, description="file for a picture of the utterance")
    rows: Count = Field(20, description="lines of the table at most")

    @model_validator(mode="after")
    def _fits(self) -> InspectSettings:
        if (self.png or self.audio) and not self.key:
            raise ValueError("png and audio need a key")
        return self
