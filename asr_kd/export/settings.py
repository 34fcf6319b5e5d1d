"""Settings of `export`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from asr_kd.config.base import Location, Positive, Sets, Settings
from asr_kd.config.knobs import THREADS, Threads

Interface = Literal["stream", "t-one", "zipformer2", "offline"]


class ExportSettings(Settings):
    """A checkpoint → a folder with a graph for other programs, its tokens, a description and a model card."""

    checkpoint: Location = Field(description="folder of a checkpoint or of a run")
    output: Location = Field(description="folder of model.onnx, tokens.txt, export.json and README.md")
    format: Literal["onnx"] = Field("onnx", description="of the graph")
    interface: Interface = Field(
        "stream",
        description="stream: sound in pieces of any length, for onnxruntime in any language; t-one: sound of 8 kHz, for sherpa-onnx; "
        "zipformer2: features of kind kaldi as they come, for sherpa-onnx; offline: whole recordings, any network, for onnxruntime, or on "
        "features of kind kaldi for sherpa-onnx",
    )
    quantize: Literal["int8"] | None = Field(
        None, description="int8: a model.int8.onnx beside it, with rounded matrices; the front end stays as it is"
    )
    check: Sets | None = Field(
        None,
        description="audio shards that the graph must say the same of as the checkpoint; status 1, and no folder, when it does not",
    )
    piece_ms: Annotated[int, Field(ge=1, le=60_000)] = Field(
        100, description="check: sound that is heard at once, in milliseconds"
    )
    report: Location | None = Field(
        None, description="report of `eval` with this checkpoint; its word errors stand in the model card"
    )
    max_seconds: Positive = Field(60.0, description="check: longer audio is left out")
    threads: Threads = THREADS

    @model_validator(mode="after")
    def _fits(self) -> ExportSettings:
        if self.check is None and "piece_ms" in self.model_fields_set:
            raise ValueError("piece_ms is how a check hears its audio; set check, or leave it out")
        return self
