"""Settings of a source: one stream of utterances, and what is learned from it."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, model_validator

from asr_kd.audio.settings import AugmentSettings
from asr_kd.config.base import Count, Location, NotNegative, Positive, Settings
from asr_kd.config.knobs import Audio
from asr_kd.models.settings import ModelSettings
from asr_kd.targets.settings import CombineSettings

#: what somebody must answer, of the needs of kinds
ANSWERED = frozenset({"targets", "hidden"})
#: in a run's folder: checkpoints for other runs
SHARED = "shared"
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


class RunSettings(Settings):
    """Another run that teaches by the checkpoints that it shares (codistillation)."""

    run: Location = Field(description="folder (or URL) of the other run, which has share")
    every: Count = Field(
        200, description="at each multiple of so many steps: learn from what the other run was so many steps before"
    )
    wait: Positive = Field(600.0, description="seconds to wait for it, at most")

    @property
    def name(self) -> str:
        """Where it shares its checkpoints."""
        return f"{self.run.rstrip('/')}/{SHARED}"


def _who(value: object) -> str:
    return (
        "list[teacher]" if isinstance(value, list) else "dict[run]" if isinstance(value, dict | RunSettings) else "str"
    )


#: who answers in the step
Answerer = Annotated[Annotated[Location, Tag("str")] | Annotated[RunSettings, Tag("dict[run]")], Discriminator(_who)]
#: one, or several that are combined
Answerers = Annotated[
    Annotated[Location, Tag("str")]
    | Annotated[RunSettings, Tag("dict[run]")]
    | Annotated[list[Answerer], Tag("list[teacher]")],
    Discriminator(_who),
]


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


class TogetherSettings(WeighedSettings):
    """Base of the kinds that train further learners beside the student, which learn what the source teaches, and from each other."""

    needs = frozenset()

    @property
    def learners(self) -> Settings:
        """Who they are: the settings without those that may differ from source to source."""
        return self.model_copy(update={"weight": 1.0})


class MutualSettings(TogetherSettings):
    """Deep mutual learning: peers are trained beside the student, and all learn from each other's distributions."""

    make = "asr_kd.distillation.mutual:Mutual"

    weight: Scheduled = Field(1.0, description="of what each learns from the others, beside what the source teaches it")
    peers: Count = Field(1, description="networks beside the student; they are not exported")
    model: ModelSettings | None = Field(
        None, description="their shape; null is the student's, with other first weights"
    )


class BranchesSettings(TogetherSettings):
    """Branches on the student's lower layers, of which it is one; all learn from their mixture, which a gate weighs."""

    make = "asr_kd.distillation.branches:Branches"

    weight: Scheduled = Field(
        1.0, description="of what each learns from the mixture, beside what the source teaches it"
    )
    count: Annotated[int, Field(ge=2)] = Field(
        2, description="branches, the student's among them; the others are not exported"
    )
    temperature: Positive = Field(
        3.0, description="logits of the mixture and of the branches against it, divided by it"
    )


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
    teacher: Answerers | None = Field(
        None,
        description="in place of targets, who answers in the step, hearing the audio without noise and masks: a checkpoint folder (or its "
        "URL), average, the run's own (ema_decay), or run, every, wait, another run that shares; a list of them is combined",
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
    mutual: MutualSettings | None = Field(
        None, description="train peers beside the student that all learn from each other; null trains it alone"
    )
    branches: BranchesSettings | None = Field(
        None, description="train further upper layers on the student's lower ones, and learn from the mixture of all"
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
        if self.runs and (asked := next((one for one in self.knowledge() if "hidden" in one.needs), None)):
            raise ValueError(f"{asked.name} needs hidden states, and another run gives its logits alone")
        if self.runs and (
            asked := next((one for one in self.knowledge() if isinstance(one.settings, TogetherSettings)), None)
        ):
            raise ValueError(
                f"{asked.name} trains its learners in this run; leave it out where another run is the teacher"
            )
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
        """Who answers in the step, by name."""
        return [one if isinstance(one, str) else one.name for one in self._answerers]

    @property
    def runs(self) -> list[RunSettings]:
        """Other runs that answer in the step."""
        return [one for one in self._answerers if isinstance(one, RunSettings)]

    @property
    def _answerers(self) -> list[str | RunSettings]:
        return self.teacher if isinstance(self.teacher, list) else [self.teacher] if self.teacher else []

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
        from_lists = isinstance(kind, SequenceSettings) and self.transcripts
        return kind.needs - {"targets"} | {"lists"} if from_lists else kind.needs

    @property
    def needs(self) -> frozenset[str]:
        """What the kinds of knowledge need of an utterance, all together."""
        return frozenset().union(*(asked.needs for asked in self.knowledge()))
