"""Settings of `select` and `pair`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from asr_kd.config.base import Count, Location, Natural, NotNegative, Positive, Sets, Settings, Share
from asr_kd.config.knobs import MAX_SECONDS, Audio

#: what utterances can be ranked by
Ranking = Literal["confidence", "disagreement", "variety", "random"]


class SelectionSettings(Settings):
    """Which utterances of unlabelled audio are worth learning from: a list for `only` of a source, with the reasons."""

    audio: Audio
    output: Location = Field(
        description="JSONL, a line an utterance: whether it is kept, its values, and why it is not"
    )
    targets: Location | None = Field(
        None, description="soft targets of the audio: for confidence, and for the pace and variety of their spikes"
    )
    transcripts: Location | None = Field(
        None,
        description="JSONL of key and text: for pace and variety in words, for disagreement, and with n-best lists for confidence",
    )
    against: Location | None = Field(
        None, description="disagreement: other transcripts, of a second teacher or of another search (with lm, without)"
    )
    confidence_at_least: Share = Field(
        0.0,
        description="mean certainty of the targets' spikes (exp of minus the entropy, 1: sure), each where it is strongest; without "
        "targets the probability of the best text within its n-best list; 0 asks for none",
    )
    disagreement_at_most: Share = Field(
        1.0,
        description="word errors between transcripts and against, as a share of the longer text; 1 asks for nothing",
    )
    pace_at_least: NotNegative = Field(
        0.0, description="words (without transcripts: spikes of the targets) a second; 0 asks for none"
    )
    pace_at_most: Positive | None = Field(None, description="the same, at most; null asks for nothing")
    pace_of_median: bool = Field(True, description="pace counts in units of the set's median, not a second")
    by: Ranking = Field(
        "confidence",
        description="which are taken first where not all may be: the highest confidence, the lowest disagreement, what evens out how "
        "often each unit (or word) is heard (variety), or any (random)",
    )
    share: Share = Field(1.0, description="share of the set's audio to keep at most, the best first")
    hours: Positive | None = Field(None, description="the same in hours")
    like: Location | None = Field(None, description="the same: as much audio as this list keeps")
    speaker_hours: Positive | None = Field(None, description="audio of a speaker at most")
    speaker_utterances: Count | None = Field(None, description="utterances of a speaker at most")
    seed: Natural = Field(0, description="of random, and of what is equal otherwise")

    @model_validator(mode="after")
    def _fits(self) -> SelectionSettings:
        sizes = [name for name in ("hours", "like") if getattr(self, name)] + ["share"] * (self.share < 1)
        if len(sizes) > 1:
            raise ValueError(f"{sizes[0]} and {sizes[1]} both say how much is kept; give one")
        if self.share == 0:
            raise ValueError("share 0 keeps nothing; set it above 0")
        if bool(self.against) and not self.transcripts:
            raise ValueError("against is compared with transcripts; give both")
        for name, said, given, what in (
            ("disagreement_at_most", self.disagreement_at_most < 1, self.against, "transcripts and against"),
            ("by: disagreement", self.limits and self.by == "disagreement", self.against, "transcripts and against"),
            ("confidence_at_least", self.confidence_at_least, self.evidence, "targets, or transcripts with n-best lists"),
            ("by: confidence", self.limits and self.by == "confidence", self.evidence, "targets, or transcripts with n-best lists"),
            ("by: variety", self.limits and self.by == "variety", self.evidence, "targets or transcripts"),
            ("pace", self.paced, self.evidence, "targets or transcripts"),
        ):  # fmt: skip
            if said and not given:
                raise ValueError(f"{name} needs {what}; give them")
        if self.pace_at_most is not None and self.pace_at_most < self.pace_at_least:
            raise ValueError(f"pace_at_most {self.pace_at_most:g} is below pace_at_least {self.pace_at_least:g}")
        return self

    @property
    def limits(self) -> bool:
        """Whether it may be that not all can be kept, so that their order counts."""
        return bool(self.share < 1 or self.hours or self.like or self.speaker_hours or self.speaker_utterances)

    @property
    def paced(self) -> bool:
        """Whether something is asked of the pace."""
        return bool(self.pace_at_least or self.pace_at_most is not None)

    @property
    def evidence(self) -> str | None:
        """What tells of an utterance."""
        return self.targets or self.transcripts


class PairSettings(Settings):
    """Two recordings of the same moments, such as close-talk and far-field → which belong together, and how far one is behind."""

    heard: Sets = Field(
        description="folder (or URL, or a list) of the audio shards that the teacher hears and targets answer"
    )
    audio: Sets = Field(description="folder (or URL, or a list) of those that the student hears, with the same keys")
    output: Location = Field(
        description="JSONL, a line an utterance of audio: whether it is paired, its values, and why it is not"
    )
    most_ms: Annotated[float, Field(gt=0, le=60_000)] = Field(
        500.0, description="starts and ends may lie so far apart at most"
    )
    correlation_at_least: Share = Field(
        0.25, description="correlation of the two at their offset, spectra made even; pairs below it are refused"
    )
    drift_ms_at_most: NotNegative = Field(
        15.0, description="change of the offset from start to end (clocks that run apart); pairs above it are refused"
    )
    max_seconds: Positive = MAX_SECONDS
    loader_workers: Natural = Field(0, description="processes that work beside this one; 0: it does all")
