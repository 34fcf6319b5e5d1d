"""Settings of `doctor`."""

from __future__ import annotations

from pydantic import Field

from asr_kd.config.base import Location, Settings
from asr_kd.config.knobs import DEVICE


class DoctorSettings(Settings):
    """What is looked at."""

    folder: Location = Field(
        ".", description="where jobs will write, or its URL: whether it can be written, and how much space it has"
    )
    device: str = DEVICE
    test: bool = Field(
        True, description="prepare, label, train and transcribe two seconds of noise, in a temporary folder"
    )
    details: bool = Field(False, description="one JSON object in place of text")
