"""Settings of `plan`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator, model_validator

from asr_kd.audio.settings import FeatureSettings
from asr_kd.config.base import Count, Location, NotNegative, Positive, Sets, Settings
from asr_kd.config.knobs import Threads
from asr_kd.models.settings import ModelSettings


class PlanSettings(Settings):
    """What a large job will take, from a small one that was measured."""

    hours: Positive | None = Field(None, description="hours of audio to plan for, as it lies in shards")
    recording_hours: Positive | None = Field(
        None, description="in place of hours: hours of recordings that prepare is to cut (segment), with their pauses"
    )
    written_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="share of what prepare hears that it writes where it cuts recordings; null takes the measured",
    )
    audio: Sets = Field(description="folder of audio shards like those to come, or a list of them")
    targets: Location = Field(description="folder of a finished label job over them, on a machine like those to come")
    prepare_speed: Positive | None = Field(
        None,
        description="audio hours an hour that one worker prepares, of recordings that are cut their pauses too; null takes the measured, where "
        "audio was prepared",
    )
    prepare_workers: Count = Field(1, description="workers that prepare at the same time")
    workers: Count = Field(1, description="devices that label at the same time")
    label_speed: Positive | None = Field(
        None, description="audio hours an hour that one worker labels; null takes the measured"
    )
    student: Location | None = Field(None, description="folder of a measured training run, to plan the training too")
    train_speed: Positive | None = Field(
        None, description="audio hours an hour that one worker trains on; null takes the measured"
    )
    train_features: FeatureSettings = Field(default_factory=lambda: FeatureSettings())
    train_model: ModelSettings | None = Field(
        None, description="a network whose training step is measured here, to plan the training without such a run"
    )
    train_units: Count | None = Field(None, description="output units of train_model")
    train_batch_frames: Count = Field(2000, description="frames in a batch of train_model")
    device: str = Field("auto", description="where train_model is measured: auto, cpu, cuda or cuda:N")
    threads: Threads = Field(1, description="CPU threads of train_model")
    passes: Count = Field(1, description="of the training over the audio")
    train_workers: Count = Field(1, description="devices that train at the same time")
    measured: Location | None = Field(
        None,
        description="JSONL of hours, wer and seed of students that learned from several amounts of audio: what the planned hours would give, "
        "if these points follow a power law",
    )
    price_per_hour: NotNegative | None = Field(None, description="of one device")
    report: Location | None = Field(None, description="JSON file for the figures")

    @field_validator("train_model")
    @classmethod
    def _delayed(cls, model: ModelSettings | None, info: ValidationInfo) -> ModelSettings | None:
        return model.in_frames(info.data["train_features"]) if model and "train_features" in info.data else model

    @model_validator(mode="after")
    def _fits(self) -> PlanSettings:
        if bool(self.hours) == bool(self.recording_hours):
            raise ValueError("hours are of audio in shards, recording_hours of what is cut first; give one of the two")
        if bool(self.train_model) != bool(self.train_units):
            raise ValueError("train_model and train_units go together")
        if sum(map(bool, (self.student, self.train_speed, self.train_model))) > 1:
            raise ValueError("student, train_speed and train_model all say how fast training is; give one")
        return self
