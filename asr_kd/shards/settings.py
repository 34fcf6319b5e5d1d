"""Settings of `prepare`, `index` and `units`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from asr_kd.audio.settings import SampleRate, SpeechSettings
from asr_kd.config.base import Count, Location, Natural, Positive, Sets, Settings, Share, check_owners, is_default
from asr_kd.config.knobs import (
    MAX_BAD_SHARE,
    MAX_SECONDS,
    MAX_WORKERS,
    MIN_WORKERS,
    RAY_ADDRESS,
    WORKER_CPUS,
    Normalizing,
    Texts,
    check_workers,
)

#: beside prepared shards: how fast they were made
TIMING = "timing.json"
#: settings of the engine `ray` alone
RAY = ("ray_address", "min_workers", "max_workers", "worker_cpus")


class SegmentSettings(SpeechSettings):
    """How audio of any length becomes utterances."""

    recordings_per_shard: Count = Field(
        10, description="lines of the manifest whose utterances are a shard, in place of samples_per_shard"
    )
    aligner: Location | None = Field(
        None,
        description="checkpoint that finds the words of recordings with text, which are then cut too where they are longer than max_seconds",
    )
    min_score: Annotated[float, Field(le=0)] = Field(
        -2.0,
        description="aligner: mean log-probability (nat) of the units of a piece, below which its text does not fit",
    )

    @model_validator(mode="after")
    def _fits(self) -> SegmentSettings:
        if self.aligner is None and not is_default(self, "min_score"):
            raise ValueError("min_score belongs to aligner; set that too")
        return self


class PrepareSettings(Settings):
    """Manifest → audio shards."""

    sharing = frozenset({"workers", "engine", *RAY})

    manifest: Location = Field(
        description="JSONL: audio (a path or a URL), and optionally text, key, start and end in seconds, anything else; or what NeMo, Kaldi, Lhotse and others have, or a folder of audio files (asr_kd/shards/README.md)"
    )
    output: Location = Field(description="folder of the shards, or its URL (s3://…, gs://…)")
    samples_per_shard: Count = Field(500, description="utterances in a shard")
    sample_rate: SampleRate | None = Field(None, description="convert to this rate in Hz; null keeps each file's own")
    audio_format: Literal["kept", "flac"] = Field(
        "kept",
        description="flac: WAV files of 8, 16 and 24 bits become FLAC of the same samples, about half as large; kept: they stay as they are",
        exclude_if=lambda value: value == "kept",  # the jobs of before there was a choice stay as they are
    )
    max_seconds: Positive = MAX_SECONDS
    max_bad_share: Share = MAX_BAD_SHARE
    drop_text: bool = Field(
        False, description="leave transcripts out of the shards, for audio that counts as unlabelled"
    )
    normalizer: Normalizing = Field(
        "none", description="of the texts, as of eval; none: they are written as they stand"
    )
    workers: Count = Field(1, description="local: processes that work; several commands at one output share it too")
    engine: Literal["local", "ray"] = Field(
        "local", description="who works: processes of this machine, or a pool of workers on a Ray cluster (asr-kd[ray])"
    )
    ray_address: str | None = RAY_ADDRESS
    min_workers: Count = MIN_WORKERS
    max_workers: Count | None = MAX_WORKERS
    worker_cpus: Count = WORKER_CPUS
    segment: SegmentSettings | None = Field(
        None,
        description="cut unlabelled audio of any length at its pauses; {}: with the defaults; null: an utterance a line",
        exclude_if=lambda value: value is None,  # the jobs of before there was a choice stay as they are
    )

    @model_validator(mode="after")
    def _fits(self) -> PrepareSettings:
        check_owners(self, "engine", {"workers": ("local",), **dict.fromkeys(RAY, ("ray",))})
        check_workers(self.min_workers, self.max_workers)
        if self.segment and self.segment.max_seconds > self.max_seconds:
            raise ValueError("segment.max_seconds must not be above max_seconds, beyond which audio is quarantined")
        if self.segment and not is_default(self, "samples_per_shard"):
            raise ValueError("samples_per_shard is of utterances that are not cut; set segment.recordings_per_shard")
        return self

    @model_serializer(mode="wrap")
    def _used(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what came later and is not used, so that stages of earlier versions count as finished."""
        left_out = {name for name in self.sharing if is_default(self, name)}
        return {name: value for name, value in write(self).items() if name not in left_out}

    @property
    def lines_per_shard(self) -> int:
        """Lines of the manifest that become one shard."""
        return self.segment.recordings_per_shard if self.segment else self.samples_per_shard


class IndexSettings(Settings):
    """WebDataset tars that others wrote, or several sets of shards → an index of them; they stay where they are."""

    audio: Sets = Field(
        description="folder of the tars (.flac, .wav, … with .json, .txt or .cls), or its URL; or a list of sets that have an index, to join them"
    )
    output: Location = Field(description="folder of the index, or its URL")
    text: Annotated[str, Field(pattern=r"^(json\..+|[a-z0-9]+(\.[a-z0-9]+)*)$")] | None = Field(
        None,
        description="where texts stand: in a field of the JSON (json.sentence), or in members with an ending (txt, normalized.txt); "
        "null: json.text, txt or cls, whichever is there",
    )
    classes: Location | None = Field(
        None, description="texts, a line each from 0 on, that the numbers in .cls stand for; null: numbers are no texts"
    )
    keys: bool = Field(
        False,
        description="refuse keys that two utterances have, and note that there are none: lists that go by keys (transcripts of train and label, "
        "transcribe) then need not look themselves",
        exclude_if=lambda value: not value,
    )
    max_bad_share: Share = MAX_BAD_SHARE
    loader_workers: Natural = Field(0, description="processes that read tars side by side; 0: none")

    @model_validator(mode="after")
    def _fits(self) -> IndexSettings:
        if not isinstance(self.audio, str) and (self.text or self.classes):
            raise ValueError(
                "text and classes belong to a folder of tars; sets that are joined have an index that says it"
            )
        if self.text == "json":
            raise ValueError("text: json names no field; write json.FIELD, such as json.text")
        if self.classes and self.text not in (None, "cls"):
            raise ValueError(f"classes belong to cls, and text is {self.text}; leave one out")
        return self


class UnitsSettings(Settings):
    """Labelled text → sentencepiece model; or the units that a teacher has."""

    source: Texts | None = None  # required, but for teacher
    teacher: Location | None = Field(
        None,
        exclude_if=lambda value: (
            value is None
        ),  # a claim of units learned from text is as it was before there was a choice
        description="in place of source: the units of this teacher (a checkpoint, or one from outside, as of label)",
    )
    output: Location = Field(description="folder of the units")
    normalizer: Normalizing = Field(
        "none",
        description="what texts go through before they are spelt, here and wherever the units are used; as of eval",
    )
    kind: Literal["unigram", "bpe", "char"] = Field("unigram", description="how text is cut into pieces")
    size: Annotated[int, Field(ge=4, le=65000)] = Field(500, description="pieces at most; with char, an upper bound")

    @model_validator(mode="after")
    def _fits(self) -> UnitsSettings:
        if bool(self.source) == bool(self.teacher):
            raise ValueError("units are learned from source, or those of teacher; give one of the two")
        if self.teacher and (
            changed := next((one for one in ("normalizer", "kind", "size") if not is_default(self, one)), None)
        ):
            raise ValueError(f"{changed} is for units that are learned from source; leave it out with teacher")
        return self
