"""Settings of `quantise`."""

from __future__ import annotations

from pydantic import Field

from asr_kd.config.base import Count, Location, Positive, Sets, Settings
from asr_kd.config.knobs import THREADS, Threads
from asr_kd.models.settings import Bits


class QuantiseSettings(Settings):
    """A trained network with its weights rounded to few bits, as a checkpoint of its own."""

    checkpoint: Location = Field(description="folder of a checkpoint or of a run, of float32 weights")
    output: Location = Field(description="folder of the quantised checkpoint")
    bits: Bits = Field(8, description="bits of a weight, each output row with a step of its own")
    development: Sets | None = Field(
        None,
        description="labelled audio shards that calibrate the blank anew, as after a training; without: it stays as it was",
    )
    feature_cache: Location | None = Field(None, description="as of train")
    max_seconds: Positive = Field(60.0, description="longer audio of the development set is refused")
    batch_frames: Count = Field(2000, description="half the frames in a batch at most")
    threads: Threads = THREADS

    @property
    def calibrate_blank(self) -> bool:
        """That is what the development set is for."""
        return True
