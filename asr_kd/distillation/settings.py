"""Settings of a source: one stream of utterances, and what is learned from it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from asr_kd.audio.settings import AugmentSettings
from asr_kd.config.base import Count, Location, NotNegative, Positive, Settings, Share, check_owners
from asr_kd.config.knobs import Audio
from asr_kd.config.schedule import Scheduled, ScheduleSettings, value_at
from asr_kd.models.settings import ModelSettings
from asr_kd.targets.settings import CombineSettings

#: what somebody must answer, of the needs of kinds
ANSWERED = frozenset({"targets", "hidden"})
#: what a soft loss makes of the mass that targets did not keep
MissingMass = Literal["renormalise", "ghost", "prior", "uniform"]


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


class FeatureMatchSettings(HiddenSettings):
    """Hidden states of the student that resemble those of who answers."""

    make = "asr_kd.distillation.features:Features"

    match: Literal["hint", "cosine", "energy"] = Field(
        "hint",
        description="squared error to the normalised state, absolute error and cosine (both after a projection that is trained beside the "
        "student), or where in the utterance the energy lies (frames alone)",
    )

    @model_validator(mode="after")
    def _samples_fit(self) -> FeatureMatchSettings:
        if self.match == "energy" and self.samples == "events":
            raise ValueError("match energy compares the frames of an utterance; set samples to frames")
        return self

    @property
    def tag(self) -> str:
        """The layers, and how they are compared."""
        return f"{super().tag}:{self.match}:{self.samples}"


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


class CodesSettings(WeighedSettings):
    """Codes of the teacher's hidden states (label mode=hidden keep=codes), guessed from a layer of the student."""

    make = "asr_kd.distillation.codes:Codes"
    needs = frozenset({"targets", "hidden", "stored"})

    student: str = Field(description="layer of the student: layer.1, layer.2, …")
    teacher: str = Field(description="layer of the teacher whose codes are guessed")

    @property
    def tag(self) -> str:
        """The layers, as of `HiddenSettings`."""
        return f":{self.student}:{self.teacher}".replace(".", "-")


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


class SelectSettings(Settings):
    """Which frames are learned of soft targets: those near frames in which the teacher speaks (blank elimination)."""

    before_ms: NotNegative = Field(60.0, description="so long before such a frame")
    after_ms: NotNegative = Field(60.0, description="and so long behind")


class DelaySettings(Settings):
    """The student may say later what the teacher says: of several delays the one that fits an utterance best is learned."""

    most_ms: Positive = Field(120.0, description="longest delay")
    sharpness: NotNegative = Field(
        0.0, description="0 learns the best delay alone; above, nat a frame within which others count too"
    )


class DivergenceSettings(SoftSettings):
    """Soft targets, frame by frame, by another divergence than the cross-entropy; units not kept count as one class."""

    make = "asr_kd.distillation.divergence:Divergent"

    kind: Literal["forward", "reverse", "jensen", "skewed", "skewed_reverse", "variation", "decoupled", "pearson"] = (
        Field(description="which")
    )
    alpha: Scheduled = Field(
        1.0,
        description="skewed, skewed_reverse: share of the distribution itself in what it is compared with (0.1 is usual); decoupled: weight of "
        "the best unit against all others; pearson: of the course over units",
    )
    beta: Scheduled = Field(
        1.0,
        description="jensen: share of the teacher in the mixture (0.5 is usual); decoupled: weight among the other units; pearson: of the "
        "course over frames",
    )
    teacher_share: Scheduled = Field(
        1.0,
        description="share of the teacher in what is learned, the rest is the student's own answer (in log-probabilities): let it rise from 0 to 1",
    )

    @model_validator(mode="after")
    def _fits(self) -> DivergenceSettings:
        skewed, weighed = ("skewed", "skewed_reverse"), ("decoupled", "pearson")
        check_owners(self, "kind", {"alpha": (*skewed, *weighed), "beta": ("jensen", *weighed)})
        if self.kind == "pearson" and self.teacher_share != 1.0:
            raise ValueError("teacher_share belongs to all kinds but pearson")
        for name, kinds in (("alpha", skewed), ("beta", ("jensen",))):
            ends = [value_at(getattr(self, name), done) for done in (0.0, 1.0)]
            if self.kind in kinds and not all(0 < value < 1 for value in ends):
                raise ValueError(f"{self.kind} needs {name} between 0 and 1")
        if max(value_at(self.teacher_share, done) for done in (0.0, 1.0)) > 1:
            raise ValueError("teacher_share must not be above 1")
        return self


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
    best: Count | None = Field(
        None,
        description="of n-best lists: so many best transcripts are learned each time, weighed by their scores, in place of what is drawn",
    )

    @model_validator(mode="after")
    def _fits(self) -> SequenceSettings:
        if self.best and self.draws != 1:
            raise ValueError("draws and best are two ways to learn a list; give one")
        return self


class MwerSettings(KnowledgeSettings):
    """Minimum expected word error training: candidate transcripts of each utterance, weighed by their word errors."""

    make = "asr_kd.distillation.mwer:Mwer"
    needs = frozenset({"text", "whole"})

    hypotheses: Annotated[int, Field(ge=2)] = Field(4, description="candidates an utterance")
    sampled: bool = Field(False, description="draw the candidates path by path; false takes the best of a beam search")


class HeadSettings(WeighedSettings):
    """A head on a lower layer of the student, dropped when the student leaves; each of its losses has its own weight."""

    make = "asr_kd.distillation.heads:Head"
    needs = frozenset()  # text or targets too, by its weights: see `SourceSettings.knowledge`

    layer: str = Field(description="layer of the student: layer.1, layer.2, …")
    ctc: Scheduled = Field(0.0, description="weight of the CTC loss on the text")
    soft: Scheduled = Field(0.0, description="weight of the cross-entropy against the soft targets")
    top: Scheduled = Field(0.0, description="weight of the divergence from what the student says at its last layer")
    temperature: Positive = Field(1.0, description="top: the logits of both are divided by it")
    shared: bool = Field(
        False,
        description="the output layer is the head, of a layer that the network is conditioned on (model.conditioned)",
    )

    @model_validator(mode="after")
    def _fits(self) -> HeadSettings:
        if not (self.ctc or self.soft or self.top):
            raise ValueError("a head learns nothing without a weight; set ctc, soft or top above 0")
        return self

    @property
    def tag(self) -> str:
        """The layer: a source may have a head on each."""
        return f":{self.layer}{':shared' if self.shared else ''}".replace(".", "-")


class ViewSettings(WeighedSettings):
    """Every utterance of a batch twice, each time with masks and dropout of its own: what the student says of both is to agree."""

    make = "asr_kd.distillation.views:Views"
    needs = frozenset({"whole"})

    weight: Scheduled = Field(
        0.2, description="of the divergence between the two; best rising from 0 at the start of a phase"
    )


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
        "URL), or average, the run's own (ema_decay or teacher_decay); a list of them is combined; or cycle: the best checkpoint at the end of the "
        "last cycle, in the first cycle nobody",
    )
    temperature: Scheduled = Field(
        1.0,
        description="logits of who answers in the step, and the student's against them, are divided by it (and the loss multiplied by its "
        "square); stored targets have that of their labelling",
    )
    guard: Share = Field(
        0.0,
        description="teacher: average: nothing is learned from it while it speaks (is not blank) in less than this share of the frames in "
        "which it spoke at the start of the phase; 0: no guard against its falling silent",
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
    divergence: DivergenceSettings | None = Field(
        None, description="learn the soft targets by another divergence; null takes the cross-entropy"
    )
    select: SelectSettings | None = Field(
        None, description="learn only frames near those in which the teacher speaks; null learns all"
    )
    delays: DelaySettings | None = Field(
        None, description="learn soft targets at the delay that fits each utterance best; null learns them as they are"
    )
    spikes: SpikeSettings | None = Field(
        None, description="learn each spike of the targets as one event; null learns every frame by itself"
    )
    sequences: SequenceSettings | None = Field(
        None,
        description="learn transcripts, by CTC, drawn from the targets or from n-best lists given as transcripts "
        "(transcribe nbest=…); null learns frames (or spikes)",
    )
    features: list[FeatureMatchSettings] = Field(
        default_factory=list, description="pairs of layers, the student's to resemble the teacher's"
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
    heads: list[HeadSettings] = Field(
        default_factory=list,
        description="heads on lower layers, beside the student, that learn the text, the soft targets or the student's last layer",
    )
    views: ViewSettings | None = Field(
        None,
        description="hear every utterance twice, under different masks, and agree with oneself (a batch holds half as many); null hears it once",
    )
    codes: list[CodesSettings] = Field([], description="guess stored codes of the teacher's hidden states")
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
        for name in ("divergence", "select", "delays", "spikes", "sequences"):
            if getattr(self, name) and not self.soft:
                raise ValueError(f"{name} needs a soft weight above 0")
        ways = [name for name in ("divergence", "spikes", "sequences") if getattr(self, name)]
        if len(ways) > 1:
            raise ValueError(f"{ways[0]} and {ways[1]} are two ways to learn soft targets; give one")
        if (framewise := self.select or self.delays) and (self.spikes or self.sequences):
            name = "select" if framewise is self.select else "delays"
            raise ValueError(
                f"{name} is for soft targets that are learned frame by frame; leave out spikes and sequences"
            )
        if self.sequences and bool(self.targets or self.teacher) == bool(self.transcripts):
            raise ValueError(
                "sequences are drawn from targets (or a teacher) or from transcripts (n-best lists); give one of the two"
            )
        if self.views and not (self.augment.time_masks or self.augment.mel_masks):
            raise ValueError("views teach nothing where both are equal; set augment.time_masks or augment.mel_masks")
        self._check_answers()
        names = [asked.name for asked in self.knowledge()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} is asked for twice; name each once, and weigh it by its weight")
        return self

    def _check_answers(self) -> None:
        """Refuse what does not fit who answers: stored targets, or teachers in the step."""
        if self.sequences and self.sequences.best and not self.transcripts:
            raise ValueError(
                "sequences.best takes the best of n-best lists; give them as transcripts (transcribe nbest=…)"
            )
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
            if any(head.soft for head in self.heads):
                raise ValueError("heads learn soft targets as they are; leave out temperature, or the head's soft")
        if self.guard and "average" not in self.teachers:
            raise ValueError("guard watches teacher: average; leave it out for teachers that do not change")
        if "cycle" in self.teachers and len(self.teachers) > 1:
            raise ValueError("teacher: cycle answers alone, and not in the first cycle; give it without others")
        if self.resample and not self.targets:
            raise ValueError("resample needs targets")
        if "hidden" in self.needs and (self.resample or len(self.target_sets) > 1):
            what = "resample changes" if self.resample else "a list of targets combines"
            raise ValueError(
                f"{what} soft targets alone, not hidden states; give the targets of one teacher with the student's frames"
            )
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
    def copies(self) -> int:
        """How often an utterance stands in its batch."""
        return 2 if self.views else 1

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
        elif self.soft and self.divergence:
            asked.append(("divergence", self.soft, self.divergence))
        elif self.soft and self.spikes:
            asked.append(("spikes", self.soft, self.spikes))
        elif self.soft:
            asked.append(("soft", self.soft, SoftSettings()))
        for name in type(self).model_fields:
            value = getattr(self, name)
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, WeighedSettings):
                    asked.append((name + one.tag, one.weight, one))
        return [Asked(*one, self._needs(one[2])) for one in asked]

    def _needs(self, kind: KnowledgeSettings) -> frozenset[str]:
        if isinstance(kind, HeadSettings):
            return frozenset({"text", "whole"} if kind.ctc else ()) | frozenset({"targets"} if kind.soft else ())
        if isinstance(kind, SequenceSettings) and self.transcripts:
            return kind.needs - {"targets"} | {"lists"}
        return kind.needs | {"whole"} if isinstance(kind, SoftSettings) and self.delays else kind.needs

    @property
    def needs(self) -> frozenset[str]:
        """What the kinds of knowledge need of an utterance, all together."""
        return frozenset().union(*(asked.needs for asked in self.knowledge()))
