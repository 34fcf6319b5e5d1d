"""Settings of a source: one stream of utterances, and what is learned from it."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, model_validator

from asr_kd.audio.settings import AugmentSettings
from asr_kd.config.base import Count, Location, NotNegative, Positive, Settings
from asr_kd.config.knobs import Audio
from asr_kd.targets.settings import CombineSettings

#: what somebody must answer, of the needs of kinds
ANSWERED = frozenset({"targets", "hidden"})
#: what a soft loss makes of the mass that targets did not keep
MissingMass = Literal["renormalise", "ghost", "prior", "uniform"]


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


class KnowledgeSettings(Settings):
    """Settings of a kind of knowledge. A new kind is a file in this folder, such a class, and a field of `SourceSettings`.

    Attributes:
        make: module and name of the `Knowledge`, imported only when needed.
        needs: what it needs of an utterance: `text`, `targets` (soft targets), `hidden` (hidden states of who answers), `stored`
            (answers that are there before the step), `lists` (transcripts with scores), `whole` (all frames at once).
    """

    make: ClassVar[str]
    needs: ClassVar[frozenset[str]]


class WeighedSettings(KnowledgeSettings):
    """Base of the kinds with a weight of their own, in place of a setting of the source."""

    weight: Scheduled = Field(1.0, description="of its loss")

    @property
    def tag(self) -> str:
        """What its name has behind that of its setting, where a source may have several."""
        return ""


class HiddenSettings(WeighedSettings):
    """Base of the kinds that compare hidden states of the student and of who answers."""

    needs = frozenset({"targets", "hidden", "whole"})

    student: str = Field(description="layer of the student: layer.1, layer.2, …")
    teacher: str = Field(description="layer of who answers")
    samples: Literal["events", "frames"] = Field(
        "events",
        description="what is compared: each spike of the teacher as one event, whenever the student says it, or each frame",
    )

    @property
    def tag(self) -> str:
        """The layers: a source may compare several pairs."""
        return f":{self.student}:{self.teacher}".replace(".", "-")


#: kinds of relations between the frames of an utterance
OVER_TIME = ("gram", "flow", "attention")


class RelationSettings(HiddenSettings):
    """How samples lie to each other in a layer of the student, as in one of the teacher, which may be of another width."""

    make = "asr_kd.distillation.relations:Relations"

    kind: Literal["similarity", "distance", "angle", "probability", "correlation", "gram", "flow", "classes", "attention"] = Field(
        description="what is alike. Between samples: similarity (inner products), distance, angle, probability (a distribution over "
        "neighbours), correlation (a kernel). Over the frames of an utterance: gram (cosines of frames up to 3 s apart, those of no blank), "
        "flow (products of two layers of the same width, whenever they come), attention (of two Conformers). classes: which units are taken "
        "for which others, by the outputs alone"
    )  # fmt: skip
    student: str = Field(
        "", description="layer of the student: layer.1, layer.2, …; attention.1, … for attention; none for classes"
    )
    teacher: str = Field("", description="layer of who answers")
    student_to: str = Field("", description="flow: to which layer of the student it goes")
    teacher_to: str = Field("", description="flow: to which layer of who answers it goes")
    centre: bool = Field(
        False, description="similarity, probability, correlation: subtract the mean of a batch's samples first"
    )
    heads: Count = Field(4, description="attention: parts of queries, keys and values that are compared each by itself")

    @model_validator(mode="before")
    @classmethod
    def _over_time(cls, values: Any) -> Any:
        over_time = isinstance(values, dict) and values.get("kind") in OVER_TIME
        return {"samples": "frames"} | values if over_time else values

    @model_validator(mode="after")
    def _fits(self) -> RelationSettings:
        if self.kind in OVER_TIME and self.samples == "events":
            raise ValueError(f"{self.kind} compares the frames of an utterance; leave out samples")
        if self.kind == "classes" and (self.student or self.teacher):
            raise ValueError("classes compares outputs; leave out student and teacher")
        if self.kind != "classes" and not (self.student and self.teacher):
            raise ValueError(f"{self.kind} needs student and teacher, a layer of each")
        if (self.kind == "flow", self.kind == "flow") != (bool(self.student_to), bool(self.teacher_to)):
            raise ValueError("student_to and teacher_to belong to flow, which needs both: its second layers")
        if self.kind == "attention" and not all(tap.startswith("attention.") for tap in (self.student, self.teacher)):
            raise ValueError("attention compares attention.1, attention.2, … of two Conformers; name one of each")
        if self.centre and self.kind not in ("similarity", "probability", "correlation"):
            raise ValueError("centre belongs to similarity, probability and correlation; leave it out")
        return self

    @property
    def tag(self) -> str:
        """The kind and the layers."""
        layers = [self.student, self.student_to, self.teacher, self.teacher_to]
        return ":".join(["", self.kind, *filter(None, layers)]).replace(".", "-")


class CtcSettings(KnowledgeSettings):
    """The text, by CTC."""

    make = "asr_kd.distillation.ctc:Ctc"
    needs = frozenset({"text", "whole"})


class CtcWithinTargetsSettings(KnowledgeSettings):
    """The text, by CTC, in the targets' timing."""

    make = "asr_kd.distillation.ctc:CtcWithinTargets"
    needs = frozenset({"text", "targets", "stored", "whole"})


class SoftSettings(KnowledgeSettings):
    """Soft targets, frame by frame."""

    make = "asr_kd.distillation.response:Soft"
    needs = frozenset({"targets"})

    temperature: Scheduled = Field(1.0, description="the student's logits are divided by it")


class SpikeSettings(KnowledgeSettings):
    """Soft targets of a CTC teacher, learned spike by spike: the student chooses the moment within a stretch around each."""

    removed = frozenset({"before", "after", "temperature", "certainty"})
    make = "asr_kd.distillation.spikes:SoftSpikes"
    needs = frozenset({"targets", "whole"})


class SequenceSettings(KnowledgeSettings):
    """What a teacher says of an utterance as a distribution over transcripts: each time the utterance is heard, one is drawn."""

    make = "asr_kd.distillation.sequences:SoftSequences"
    needs = frozenset({"targets", "whole"})  # or lists: see `SourceSettings.knowledge`

    temperature: Positive = Field(
        1.0, description="below 1 draws what the teacher is sure of more often; towards 0 its best transcript alone"
    )
    draws: Count = Field(1, description="transcripts drawn each time; the loss is their mean, steadier with more")


class MwerSettings(KnowledgeSettings):
    """Minimum expected word error training: candidate transcripts of each utterance, weighed by their word errors."""

    make = "asr_kd.distillation.mwer:Mwer"
    needs = frozenset({"text", "whole"})

    hypotheses: Annotated[int, Field(ge=2)] = Field(4, description="candidates an utterance")
    sampled: bool = Field(False, description="draw the candidates path by path; false takes the best of a beam search")


class Asked(NamedTuple):
    """A kind of knowledge that a source asks for by the setting `name`; `needs` as of `KnowledgeSettings`."""

    name: str
    weight: float | ScheduleSettings
    settings: KnowledgeSettings
    needs: frozenset[str]


class SourceSettings(Settings):
    """One stream of utterances to learn from, and what is learned from it."""

    audio: Audio
    targets: Location | list[Location] | None = Field(
        None, description="folder (or URL) of soft-target shards beside it; a list of them, one a teacher, is combined"
    )
    teacher: Location | list[Location] | None = Field(
        None,
        description="in place of targets, who answers in the step, hearing the audio without noise and masks: a checkpoint folder (or its "
        "URL), or average, the run's own (ema_decay); a list of them is combined",
    )
    temperature: Scheduled = Field(
        1.0,
        description="logits of who answers in the step, and the student's against them, are divided by it (and the loss multiplied by its "
        "square); stored targets have that of their labelling",
    )
    combine: CombineSettings = Field(default_factory=lambda: CombineSettings())
    resample: bool = Field(
        False,
        description="lay targets of another frame period or offset on the learner's frames, by the time they share",
    )
    transcripts: Location | None = Field(None, description="JSONL of key and text, in place of the text in the shards")
    ctc: Scheduled = Field(0.0, description="weight of the CTC loss on the text")
    mwer: MwerSettings | None = Field(
        None, description="minimise the expected word errors too, with weight 1 beside ctc's; null leaves them out"
    )
    soft: Scheduled = Field(0.0, description="weight of the cross-entropy against the soft targets")
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
    relations: list[RelationSettings] = Field(
        default_factory=list, description="how samples lie to each other in the layers of who answers: a list of kinds"
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
        if not self.knowledge():
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
        if self.sequences and bool(self.targets or self.teacher) == bool(self.transcripts):
            raise ValueError(
                "sequences are drawn from targets (or a teacher) or from transcripts (n-best lists); give one of the two"
            )
        self._check_answers()
        names = [asked.name for asked in self.knowledge()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} is asked for twice; name each once, and weigh it by its weight")
        return self

    def _check_answers(self) -> None:
        """Refuse what does not fit who answers: stored targets, or teachers in the step."""
        if self.targets and self.teacher:
            raise ValueError("targets and teacher both answer; give one of the two")
        if bool(self.needs & ANSWERED) != bool(self.targets or self.teacher):
            raise ValueError("targets (or a teacher) go together with a soft weight above 0 or ctc_within_targets")
        if self.teacher and (asked := next((one for one in self.knowledge() if "stored" in one.needs), None)):
            raise ValueError(f"{asked.name} learns from stored targets alone; give targets of that teacher")
        if self.temperature != 1.0:
            if not self.teacher:
                raise ValueError("temperature needs a teacher in the step; stored targets have that of their labelling")
            if value_at(self.temperature, 0.0) <= 0 or value_at(self.temperature, 1.0) <= 0:
                raise ValueError("temperature must be above 0")
        if self.resample and not self.targets:
            raise ValueError("resample needs targets")
        for name, several in (("targets", self.target_sets), ("teacher", self.teachers)):
            if twice := next((folder for folder in several if several.count(folder) > 1), None):
                raise ValueError(f"{name} names {twice} twice; name each once, and weigh it by combine.weights")
        if len(self.teachers) > 1 and any(one.kind == "attention" for one in self.relations):
            raise ValueError("attention relations need one teacher; give one, or take another kind of relations")
        several, weights = self.target_sets or self.teachers, self.combine.weights
        if len(several) < 2 and self.combine != CombineSettings():
            raise ValueError("combine needs a list of two or more targets (or teachers)")
        if weights is not None and len(weights) != len(several):
            raise ValueError(
                f"combine.weights has {len(weights)} weights for {len(several)} targets; give one for each"
            )

    @property
    def target_sets(self) -> list[str]:
        """Folders of soft-target shards, one a teacher."""
        return [self.targets] if isinstance(self.targets, str) else self.targets or []

    @property
    def teachers(self) -> list[str]:
        """Who answers in the step."""
        return [self.teacher] if isinstance(self.teacher, str) else self.teacher or []

    def knowledge(self) -> list[Asked]:
        """What is learned, in the order in which the losses are added; for `ctc` and `soft` the setting is the weight."""
        asked: list[tuple[str, float | ScheduleSettings, KnowledgeSettings]] = []
        if self.ctc:
            within = self.ctc_within_targets
            asked.append(("ctc_within_targets", self.ctc, CtcWithinTargetsSettings()) if within else ("ctc", self.ctc, CtcSettings()))  # fmt: skip
        if self.mwer:
            asked.append(("mwer", 1.0, self.mwer))
        if self.soft and self.sequences:
            asked.append(("sequences", self.soft, self.sequences))
        elif self.soft and self.spikes:
            asked.append(("spikes", self.soft, self.spikes))
        elif self.soft:
            asked.append(("soft", self.soft, SoftSettings(temperature=self.temperature)))
        for name in type(self).model_fields:
            value = getattr(self, name)
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, WeighedSettings):
                    asked.append((name + one.tag, one.weight, one))
        return [Asked(*one, self._needs(one[2])) for one in asked]

    def _needs(self, kind: KnowledgeSettings) -> frozenset[str]:
        if isinstance(kind, RelationSettings) and kind.kind == "classes":
            return kind.needs - {"hidden"}
        from_lists = isinstance(kind, SequenceSettings) and self.transcripts
        return kind.needs - {"targets"} | {"lists"} if from_lists else kind.needs

    @property
    def needs(self) -> frozenset[str]:
        """What the kinds of knowledge need of an utterance, all together."""
        return frozenset().union(*(asked.needs for asked in self.knowledge()))
