"""Settings of the kinds of knowledge: a class a kind. A new kind is a file in this folder, such a class, and a field of `SourceSettings`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from asr_kd.config.base import Count, Location, NotNegative, Positive, Settings, check_owners
from asr_kd.config.schedule import Scheduled, value_at
from asr_kd.models.settings import ModelSettings


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
    def of_oneself(self) -> bool:
        """Whether it is learned from what is trained alone: then silence is as good an answer as any."""
        return False

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
    projection: bool = Field(
        True, description="hint, cosine: false compares the states as they are, which are as wide as each other"
    )

    @model_serializer(mode="wrap")
    def _used(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what came later and is not used, so that runs of earlier versions go on."""
        return {name: value for name, value in write(self).items() if name != "projection" or not value}

    @model_validator(mode="after")
    def _fits(self) -> FeatureMatchSettings:
        if self.match == "energy" and not self.projection:
            raise ValueError("match energy has no projection; leave it out")
        if self.match == "energy" and self.samples == "events":
            raise ValueError("match energy compares the frames of an utterance; set samples to frames")
        return self

    @property
    def tag(self) -> str:
        """The layers, and how they are compared."""
        return f"{super().tag}:{self.match}:{self.samples}" + ("" if self.projection else ":as-it-is")


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
        return ":".join(["", self.kind, *filter(None, layers), self.samples]).replace(".", "-")


class CriticSettings(HiddenSettings):
    """A critic beside the student that tells the teacher's answers from the student's, which learns to be taken for the teacher."""

    make = "asr_kd.distillation.critic:Critic"

    weight: Scheduled = Field(
        0.1,
        description="of what the student learns against the critic, beside what else the source teaches; the critic learns at full rate",
    )
    student: str = Field("", description="layer of the student: layer.1, …; without layers outputs are judged")
    teacher: str = Field("", description="layer of who answers")
    samples: Literal["events", "frames"] = Field(
        "events",
        description="what is judged: what is said in each spike of the teacher, whenever it is said, or each frame near the teacher's speech",
    )

    @model_validator(mode="after")
    def _fits(self) -> CriticSettings:
        if bool(self.student) != bool(self.teacher):
            raise ValueError("critics judge a layer of each, student and teacher, or without both the outputs")
        return self

    @property
    def tag(self) -> str:
        """The layers, or that it judges outputs, and the samples."""
        return f"{super().tag if self.student else ':outputs'}:{self.samples}"


class GeneratedSettings(KnowledgeSettings):
    """Features that are made of noise, in place of those of audio; a teacher in the step says what they are."""

    make = "asr_kd.distillation.generator:Generated"
    needs = frozenset({"targets", "whole"})

    kind: Literal["noise", "adversarial"] = Field(
        description="noise as it is drawn; or made of it by a network beside the student, which seeks what student and teacher say differently"
    )
    utterances: Count = Field(description="in a pass; every pass draws others")
    seconds: Positive = Field(3.0, description="length of each")
    moments: Location | None = Field(
        None,
        description="what the features are to resemble, of the same teacher (asr-kd moments); null, for noise alone: white, of variance 1",
    )
    disagreement: NotNegative = Field(
        0.1, description="adversarial: weight with which the network raises the divergence that the student lowers"
    )
    likeness: NotNegative = Field(
        1.0, description="adversarial: weight of the distance of what it makes from the moments"
    )
    speech: NotNegative = Field(
        1.0, description="adversarial: weight of what the teacher speaks too little or too much of it, in nat"
    )
    speech_least: Positive = Field(
        0.5, description="adversarial: too little is less than so many times its share of speech in the moments"
    )
    speech_most: Positive = Field(2.0, description="adversarial: too much is more than so many times that share")

    @model_validator(mode="after")
    def _fits(self) -> GeneratedSettings:
        own = ("disagreement", "likeness", "speech", "speech_least", "speech_most")
        check_owners(self, "kind", dict.fromkeys(own, ("adversarial",)))
        if self.kind == "adversarial" and not self.moments:
            raise ValueError(
                "adversarial needs moments, or its features become garbage; make them with `asr-kd moments`"
            )
        if self.speech_most < self.speech_least:
            raise ValueError(f"speech_most {self.speech_most:g} is below speech_least {self.speech_least:g}")
        return self

    @property
    def trained(self) -> bool:
        """Whether a network makes them."""
        return self.kind == "adversarial"


class TogetherSettings(WeighedSettings):
    """Base of the kinds that train further learners beside the student, which learn what the source teaches, and from each other."""

    needs = frozenset()

    @property
    def of_oneself(self) -> bool:
        """See `WeighedSettings`."""
        return True

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
    critic: Scheduled = Field(
        0.0,
        description="weight of what each learns against a critic that tells its events from those of the next; 0 trains no critics",
        exclude_if=lambda value: value == 0.0,
    )

    @property
    def learners(self) -> Settings:
        """See `TogetherSettings`."""
        return self.model_copy(update={"weight": 1.0, "critic": 1.0 if self.critic else 0.0})


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


class DivergenceSettings(SoftSettings):
    """Soft targets, frame by frame, by another divergence than the cross-entropy; units not kept count as one class."""

    make = "asr_kd.distillation.divergence:Divergent"

    kind: Literal["forward", "reverse", "jensen", "skewed", "skewed_reverse", "variation", "decoupled", "pearson"] = (
        Field(
            description="which: forward, reverse, jensen, skewed, skewed_reverse, variation (half the sum of differences), decoupled, or pearson "
            "(correlations)"
        )
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
    def of_oneself(self) -> bool:
        """See `WeighedSettings`."""
        return not (self.ctc or self.soft)

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

    @property
    def of_oneself(self) -> bool:
        """See `WeighedSettings`."""
        return True
