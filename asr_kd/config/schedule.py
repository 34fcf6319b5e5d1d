"""A setting that may change while a phase of training runs."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from asr_kd.config.base import NotNegative, Settings


class ScheduleSettings(Settings):
    """A value that changes while a phase runs, with the share of the phase's audio that was heard."""

    start: NotNegative = Field(description="value when the phase begins")
    end: NotNegative = Field(description="value from `until` on")
    until: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of the phase's audio")
    shape: Literal["linear", "cosine"] = Field(
        "linear", description="how it moves: evenly, or slowly at both ends and fast between"
    )


def _number_or_schedule(value: object) -> str:
    return "schedule" if isinstance(value, dict | ScheduleSettings) else "number"


#: a number, or how it changes over the phase
Scheduled = Annotated[
    Annotated[NotNegative, Tag("number")] | Annotated[ScheduleSettings, Tag("schedule")],
    Discriminator(_number_or_schedule),
]


def value_at(value: float | ScheduleSettings, done: float) -> float:
    """What a setting is when the share `done` of a phase's audio was heard."""
    if not isinstance(value, ScheduleSettings):
        return value
    share = min(done / value.until, 1.0)
    if value.shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return value.start + (value.end - value.start) * share
