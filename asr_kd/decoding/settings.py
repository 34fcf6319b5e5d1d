"""Settings of `lm`, `transcribe`, and of every decoder."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from asr_kd.audio.settings import SpeechSettings
from asr_kd.config.base import Count, Location, NotNegative, Positive, Sets, Settings, Share, is_default
from asr_kd.config.knobs import BATCH_FRAMES, DEVICE, PRECISION, THREADS, Precision, Texts, Threads
from asr_kd.decoding.whisper_settings import WhisperSettings


class LmSettings(Settings):
    """Labelled text → its vocabulary and a word n-gram model, for a beam search."""

    source: Texts
    output: Location = Field(description="folder of lm.arpa and words.txt")
    units: Location | None = Field(
        None, description="folder of units: words are written as these write them; without: as they are"
    )
    pieces: bool = Field(
        False,
        description="n-grams of the units' pieces in place of words, for a source's opinion in training",
        exclude_if=lambda value: not value,
    )
    order: Annotated[int, Field(ge=1, le=6)] = Field(2, description="words of an n-gram at most")

    @model_validator(mode="after")
    def _fits(self) -> LmSettings:
        if self.pieces and not self.units:
            raise ValueError("pieces are those of units; give units")
        return self


class DecodingSettings(Settings):
    """How posteriors become words."""

    decoder: Literal["greedy", "beam"] = Field(
        "greedy", description="greedy: the best unit of every frame; beam: prefix beam search"
    )
    beam: Count = Field(8, description="hypotheses kept by a beam search from frame to frame")
    nbest: Count = Field(1, description="hypotheses given at most")
    lm: Location | None = Field(
        None,
        description="word n-gram model for a beam search: an ARPA file, or a KenLM binary (asr-kd[lm], with a lexicon)",
    )
    lexicon: Location | None = Field(
        None,
        description="the words that a beam search may find, a line each, behind a word its pieces where they are not "
        "those of the units; without it any",
    )
    lm_weight: NotNegative = Field(
        0.5, description="factor on the language model's log-probabilities (natural logarithm, as the network's)"
    )
    word_bonus: float = Field(0.0, description="added to the score for each word, with a language model or lexicon")

    @field_validator("decoder", mode="before")
    @classmethod
    def _is_ours(cls, value: Any) -> Any:
        if value == "torchaudio":
            raise ValueError(
                "torchaudio's beam search is not among the decoders any more; set beam, which finds the same texts"
            )
        return value

    @model_validator(mode="after")
    def _decodes(self) -> DecodingSettings:
        for name in ("lm", "lexicon", "nbest"):
            if self.decoder == "greedy" and not is_default(self, name):
                raise ValueError(f"{name} needs a beam search; set decoder to beam")
        if not self.lm and not is_default(self, "lm_weight"):
            raise ValueError("lm_weight needs a language model; set lm")
        if not (self.lm or self.lexicon) and self.word_bonus:
            raise ValueError("word_bonus needs a language model or a lexicon; set lm or lexicon")
        if self.nbest > self.beam:
            raise ValueError(f"nbest {self.nbest} must not be above beam {self.beam}")
        return self


class TranscribeSettings(DecodingSettings):
    """Audio → text, with any checkpoint: of files given on the command line, of sound as it arrives, or of a whole set of shards."""

    checkpoint: Location = Field(
        description="checkpoint or run folder, or its URL; or a Whisper or Moonshine model: its folder, or hf:owner/name@revision"
    )
    audio: Sets | None = Field(None, description="folder of audio shards (or its URL, or a list), in place of files")
    output: Location | None = Field(None, description="JSONL of key and text, for a set of shards")
    details: bool = Field(
        False,
        description="JSON lines with the words, their times and confidences, and the n-best texts, in place of text",
    )
    stream: bool = Field(
        False,
        description="(or --stream) print words as sound arrives from a file, standard input (-: WAV or raw 16-bit mono) or "
        "the microphone; needs a model of a kind that streams",
    )
    piece_ms: Annotated[int, Field(ge=1, le=60_000)] = Field(
        100, description="stream: sound that is heard at once, in milliseconds"
    )
    raw_rate: Annotated[int, Field(ge=1000, le=768000)] | None = Field(
        None, description="stream: rate in Hz of raw sound on standard input; null takes the model's"
    )
    window_seconds: Annotated[float, Field(ge=5)] = Field(
        60.0,
        description="longer files are decoded in bounded memory: as they are heard by a model that streams, by others in overlapping windows of "
        "this length",
    )
    segment: SpeechSettings | None = Field(
        None,
        description="cut files of any length at their pauses, as prepare does, and hear each utterance by itself; {}: with the defaults; "
        "null: hear a file as one",
        exclude_if=lambda value: value is None,  # the jobs of before there was a choice stay as they are
    )
    batch_frames: Count = BATCH_FRAMES
    max_seconds: Positive = Field(3600.0, description="of a set of shards: longer audio is left out")
    max_bad_share: Share = Field(0.01, description="a set fails when more than this share could not be read")
    precision: Precision = PRECISION
    device: str = DEVICE
    threads: Threads = THREADS
    whisper: WhisperSettings = Field(WhisperSettings(), exclude_if=lambda value: value == WhisperSettings())

    @model_validator(mode="after")
    def _fits(self) -> TranscribeSettings:
        if bool(self.audio) != bool(self.output):
            raise ValueError("audio (a set of shards) and output (a JSONL file) go together")
        if self.stream and self.audio:
            raise ValueError("stream hears a file, - or the microphone; leave out audio and output")
        if self.segment and (self.audio or self.stream):
            raise ValueError(
                "segment cuts files; a set of shards is cut by prepare segment={}, and a stream is heard as it comes"
            )
        if self.raw_rate and not self.stream:
            raise ValueError("raw_rate is of raw sound on standard input; add --stream and give -, or leave it out")
        return self
