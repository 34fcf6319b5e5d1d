"""Settings of `eval`."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, field_validator

from asr_kd.config.base import Count, Location, Natural, Positive, Sets, Share, folders_of
from asr_kd.config.knobs import (
    BATCH_FRAMES,
    DEVICE,
    LOG,
    MAX_BAD_SHARE,
    MAX_SECONDS,
    PRECISION,
    THREADS,
    Normalizing,
    Precision,
    Threads,
)
from asr_kd.decoding.settings import DecodingSettings

SET_NAME = r"[A-Za-z0-9_-]{1,100}"  # of a set of shards; it names a folder too


class EvalSettings(DecodingSettings):
    """Checkpoints over test shards → WER report."""

    sharing = frozenset({"log"})

    systems: dict[str, Location] = Field(min_length=1, description="name: checkpoint folder, or its URL")
    audio: Sets | dict[str, Sets] = Field(
        description="folder of labelled audio shards, or its URL (s3://…, gs://…); or of several, as name: folder; a list of folders is read as one"
    )
    output: Location = Field(description="folder of the report")
    baseline: str | None = Field(None, description="system that changes are counted from")
    teacher: str | None = Field(None, description="system that sets the gap to recover")
    student: str | None = Field(None, description="system the verdict is about; without it the best one")
    normalizer: Normalizing = Field(
        "basic",
        description="basic: lower case, punctuation removed, spaces joined; english: as Whisper, also figures and spelling",
    )
    bootstrap: Natural = Field(1000, description="resamples behind the confidence intervals")
    batch_frames: Count = BATCH_FRAMES
    max_seconds: Positive = MAX_SECONDS
    max_bad_share: Share = MAX_BAD_SHARE
    precision: Precision = PRECISION
    seed: Natural = Field(0, description="fixes the resampling")
    device: str = DEVICE
    threads: Threads = THREADS
    log: list[str] = LOG
    workers: Annotated[int, Field(ge=0, le=256)] = Field(
        0,
        description="processes that read audio ahead, and with a beam search as many that decode, while the network runs; 0: none",
    )

    @field_validator("audio", mode="before")
    @classmethod
    def _names_sets(cls, value: Any) -> Any:
        if not isinstance(value, str | list | dict) or not value:
            raise ValueError("give a folder of audio shards, or of several as {name: folder}")
        for name in value if isinstance(value, dict) else ():
            if not re.fullmatch(SET_NAME, str(name)):
                said = "cannot name a set, whose scores have a folder; use letters, digits, - and _"
                raise ValueError(f"{name!r} {said}")
        return value

    @property
    def sets(self) -> dict[str, str | list[str]]:
        """Folders of audio shards by the name of the set; a single folder is named by itself."""
        if isinstance(self.audio, dict):
            return self.audio
        folder = "-".join(one.rstrip("/").rpartition("/")[2] for one in folders_of(self.audio))[:100]
        return {re.sub(r"[^A-Za-z0-9_-]+", "-", folder).strip("-") or "test": self.audio}
