"""Settings shared by several jobs, declared once: type, default, help. A job with another help text declares its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from asr_kd.config.base import Location

#: upper bound: torch aborts when the system refuses to create the threads
Threads = Annotated[int, Field(ge=1, le=1024)]
#: keys of `text.NORMALIZERS`
Normalizing = Literal["none", "basic", "english"]
Audio = Annotated[Location, Field(description="folder of audio shards, or its URL (s3://…, gs://…)")]
Texts = Annotated[
    Location, Field(description="audio shards with text, a manifest (JSON lines) or a text file (a line an utterance)")
]

BATCH_FRAMES: Any = Field(4000, description="frames in a batch at most")
MAX_SECONDS: Any = Field(60.0, description="longer audio is quarantined")
MAX_BAD_SHARE: Any = Field(0.01, description="the job fails when more than this share was quarantined")
DEVICE: Any = Field("auto", description="auto, cpu, cuda or cuda:N")
THREADS: Any = Field(1, description="CPU threads of the network")
