"""Settings of a source: one stream of utterances, and what is learned from it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from asr_kd.audio.settings import AugmentSettings
from asr_kd.config.base import Count, Location, Natural, NotNegative, Positive, Settings
from asr_kd.config.knobs import Audio
from asr_kd.targets.settings import CombineSettings


class SpikeSettings(Settings):
    """Soft targets of a CTC teacher, learned spike by spike: the student chooses the moment within a stretch around each."""

    before: Natural = Field(5, description="frames before a spike from which on the student may emit")
    after: Count = Field(7, description="frames after a spike's start within which it may, where no other comes first")
    temperature: Positive = Field(
        1.0, description="above 1 softens what the teacher emits in a spike; the frames outside stay as they are"
    )
    certainty: NotNegative = Field(
        0.0,
        description="a spike weighs as much as its most probable emission, to this power: where the teacher is unsure, the student "
        "is left to itself; 0 weighs all alike",
    )


class SequenceSettings(Settings):
    """What a teacher says of an utterance as a distribution over transcripts: each time the utterance is heard, one is drawn."""

    temperature: Positive = Field(
        1.0, description="below 1 draws what the teacher is sure of more often; towards 0 its best transcript alone"
    )
    draws: Count = Field(
        1, description="transcripts drawn each time; the loss is their mean, steadier the more there are"
    )


class MwerSettings(Settings):
    """Minimum expected word error training: candidate transcripts of each utterance, weighed by their word errors."""

    hypotheses: Annotated[int, Field(ge=2)] = Field(4, description="candidates an utterance")
    sampled: bool = Field(
        False, description="draw the candidates from the model, path by path; false takes the best of a beam search"
    )


class SourceSettings(Settings):
    """One stream of utterances to learn from, and what is learned from it."""

    audio: Audio
    targets: Location | list[Location] | None = Field(
        None, description="folder (or URL) of soft-target shards beside it; a list of them, one a teacher, is combined"
    )
    combine: CombineSettings = Field(default_factory=lambda: CombineSettings())
    resample: bool = Field(
        False,
        description="lay targets of another frame period or offset on the learner's frames, by the time they share",
    )
    transcripts: Location | None = Field(None, description="JSONL of key and text, in place of the text in the shards")
    ctc: NotNegative = Field(0.0, description="weight of the CTC loss on the text")
    mwer: MwerSettings | None = Field(
        None, description="minimise the expected word errors too, with weight 1 beside ctc's; null leaves them out"
    )
    soft: NotNegative = Field(0.0, description="weight of the cross-entropy against the soft targets")
    spikes: SpikeSettings | None = Field(
        None, description="learn each spike of the targets as one event; null learns every frame by itself"
    )
    sequences: SequenceSettings | None = Field(
        None,
        description="learn transcripts, by CTC, drawn from the targets or from n-best lists given as transcripts "
        "(transcribe nbest=…); null learns frames (or spikes)",
    )
    ctc_within_targets: bool = Field(
        False, description="CTC only over paths whose units the targets hold at that frame, which fixes its timing"
    )
    repeat: Count = Field(1, description="times it is read in a pass")
    weight: Positive | None = Field(
        None,
        description="its share of the audio of a phase with hours, against the others; null: its own hours × repeat",
    )
    batch_frames: Count | None = Field(None, description="frames in a batch at most; null takes the run's")
    augment: AugmentSettings = Field(default_factory=lambda: AugmentSettings())

    @model_validator(mode="after")
    def _fits(self) -> SourceSettings:
        if not self.ctc and not self.soft:
            raise ValueError("set ctc or soft (or both) above 0")
        if self.ctc_within_targets and not self.ctc:
            raise ValueError("ctc_within_targets needs a ctc weight above 0")
        if self.mwer and not self.ctc:
            raise ValueError("mwer needs a ctc weight above 0: it smooths the expected word errors and reads the text")
        for name in ("spikes", "sequences"):
            if getattr(self, name) and not self.soft:
                raise ValueError(f"{name} needs a soft weight above 0")
        if self.spikes and self.sequences:
            raise ValueError("spikes and sequences are two ways to learn soft targets; give one")
        if self.sequences and bool(self.targets) == bool(self.transcripts):
            raise ValueError("sequences are drawn from targets or from transcripts (n-best lists); give one of the two")
        if self.reads_targets != bool(self.targets):
            raise ValueError("targets go together with a soft weight above 0 or ctc_within_targets")
        if self.resample and not self.targets:
            raise ValueError("resample needs targets")
        sets, weights = self.target_sets, self.combine.weights
        if twice := next((folder for folder in sets if sets.count(folder) > 1), None):
            raise ValueError(f"targets names {twice} twice; name each set once, and weigh it by combine.weights")
        if len(sets) < 2 and self.combine != CombineSettings():
            raise ValueError("combine needs a list of two or more targets")
        if weights is not None and len(weights) != len(sets):
            raise ValueError(f"combine.weights has {len(weights)} weights for {len(sets)} targets; give one for each")
        return self

    @property
    def target_sets(self) -> list[str]:
        """Folders of soft-target shards, one a teacher."""
        return [self.targets] if isinstance(self.targets, str) else self.targets or []

    @property
    def reads_targets(self) -> bool:
        """Whether the loss looks at soft-target shards."""
        return (bool(self.soft) and not self.reads_lists) or self.ctc_within_targets

    @property
    def reads_lists(self) -> bool:
        """Whether the transcripts are n-best lists to draw from."""
        return bool(self.sequences and self.transcripts)
