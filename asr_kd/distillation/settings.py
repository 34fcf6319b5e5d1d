"""Settings of a source: one stream of utterances, and what is learned from it."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, model_validator

from asr_kd.audio.settings import AugmentSettings
from asr_kd.config.base import Count, Location, NotNegative, Positive, Settings, Share
from asr_kd.config.knobs import Audio
from asr_kd.config.schedule import Scheduled, ScheduleSettings, value_at
from asr_kd.distillation.kind_settings import (
    BranchesSettings,
    CodesSettings,
    CriticSettings,
    CtcSettings,
    CtcWithinTargetsSettings,
    DivergenceSettings,
    FeatureMatchSettings,
    GeneratedSettings,
    HeadSettings,
    KnowledgeSettings,
    MutualSettings,
    MwerSettings,
    RelationSettings,
    SequenceSettings,
    SoftSettings,
    SpikeSettings,
    TogetherSettings,
    ViewSettings,
    WeighedSettings,
)
from asr_kd.targets.settings import DEVELOPMENT, CombineSettings

#: what somebody must answer, of the needs of kinds
ANSWERED = frozenset({"targets", "hidden"})
#: in a run's folder: checkpoints for other runs
SHARED = "shared"
#: what a soft loss makes of the mass that targets did not keep
MissingMass = Literal["renormalise", "ghost", "prior", "uniform"]


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


class OpinionSettings(Settings):
    """What a language model thinks of each spike of stored targets, by the units left and right of it, has a say in them."""

    lm: Location = Field(description="ARPA model of the units' pieces (lm pieces=true)")
    weight: NotNegative = Field(
        0.2, description="exponent of its probabilities; much more teaches what it expects, not what was said"
    )


class RunSettings(Settings):
    """Another run that teaches by the checkpoints that it shares (codistillation)."""

    run: Location = Field(description="folder (or URL) of the other run, which has share")
    every: Count = Field(
        200, description="at each multiple of so many steps: learn from what the other run was so many steps before"
    )
    # what is learned does not depend on it: a run that waited in vain may go on with a longer one
    wait: Positive = Field(600.0, exclude=True, description="seconds to wait for it, at most")

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


class Asked(NamedTuple):
    """A kind of knowledge that a source asks for by the setting `name`; `needs` as of `KnowledgeSettings`."""

    name: str
    weight: float | ScheduleSettings
    settings: KnowledgeSettings
    needs: frozenset[str]


class SourceSettings(Settings):
    """One stream of utterances to learn from, and what is learned from it."""

    audio: Audio | None = Field(
        None,
        description="folder of audio shards, or its URL (s3://…, gs://…); or a list of them, which are read as one set",
    )
    generated: GeneratedSettings | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="in place of audio, features made of noise, for the teacher in the step to answer; beside sources of audio, or alone",
    )
    only: Location | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="list of the utterances to learn from, as `asr-kd select` writes it; null learns from all",
    )
    targets: Location | list[Location] | None = Field(
        None, description="folder (or URL) of soft-target shards beside it; a list of them, one a teacher, is combined"
    )
    pairs: Location | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="where the targets answer other recordings of the same moments (close-talk, clean, another rate): which, and how far "
        "these are behind, as `asr-kd pair` writes it; null: they answer this audio",
    )
    teacher: Answerers | None = Field(
        None,
        description="in place of targets, who answers in the step, hearing the audio without noise and masks: a checkpoint folder (or its "
        "URL), average, the run's own (ema_decay or teacher_decay), cycle, its best checkpoint at the end of the last cycle (in the first, nobody), "
        "or run, every, wait: another run that shares; a list of them is combined",
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
    opinion: OpinionSettings | None = Field(
        None,
        description="a language model has a say in the spikes of the targets; null leaves them as they are",
        exclude_if=lambda value: value is None,
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
    relations: list[RelationSettings] = Field(
        default_factory=list, description="how samples lie to each other in the layers of who answers: a list of kinds"
    )
    critics: list[CriticSettings] = Field(
        default_factory=list,
        description="critics that tell the teacher's answers from the student's, which learns to be taken for the teacher",
        exclude_if=lambda value: not value,
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
        if bool(self.audio) == bool(self.generated):
            raise ValueError("give audio, or generated features in its place")
        if self.generated:
            self._check_generated(self.generated)
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
            raise ValueError("views are to differ by their masks; set augment.time_masks or augment.mel_masks")
        self._check_answers()
        names = [asked.name for asked in self.knowledge()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} is asked for twice; name each once, and weigh it by its weight")
        return self

    def _check_generated(self, generated: GeneratedSettings) -> None:
        """Refuse what features without audio cannot have."""
        given = ("only", "targets", "pairs", "resample", "opinion", "transcripts")
        if name := next((name for name in given if getattr(self, name)), None):
            raise ValueError(f"{name} belongs to audio, and generated features have none; leave it out")
        if self.augment != AugmentSettings():
            raise ValueError("augment changes audio; leave it out with generated features")
        if not isinstance(self.teacher, str) or self.teacher in ("average", "cycle"):
            raise ValueError("generated features are answered by one checkpoint in the step; set teacher to its folder")
        if asked := next((one for one in self.knowledge() if one.needs & {"text", "lists"}), None):
            raise ValueError(f"{asked.name} learns text, and generated features have none; learn soft from them")
        if generated.trained:
            names = [asked.name for asked in self.knowledge() if asked.name != "generated"]
            if odd := next((name for name in names if name != "soft"), None):
                raise ValueError(
                    f"generated: adversarial features teach soft, frame by frame, and no {odd}; leave it out"
                )
            for name in ("select", "delays"):
                if getattr(self, name):
                    raise ValueError(f"generated: adversarial features teach every frame; leave out {name}")
            if self.temperature != 1.0:
                raise ValueError(
                    "generated: adversarial features are learned as the teacher says them; leave out temperature"
                )
            if not self.soft:
                raise ValueError("generated: adversarial features teach soft; set it above 0")

    def _check_answers(self) -> None:
        """Refuse what does not fit who answers: stored targets, or teachers in the step."""
        if self.sequences and self.sequences.best and not self.transcripts:
            raise ValueError(
                "sequences.best takes the best of n-best lists; give them as transcripts (transcribe nbest=…)"
            )
        if self.targets and self.teacher:
            raise ValueError("targets and teacher both answer; give one of the two")
        asking = next((one.name for one in self.knowledge() if one.needs & ANSWERED), None)
        if asking and not (self.targets or self.teacher):
            raise ValueError(f"{asking} learns what somebody answers; give targets or a teacher")
        if (self.targets or self.teacher) and not asking:
            raise ValueError(
                f"nothing is learned from {'targets' if self.targets else 'teacher'}; set soft above 0 (or another kind that learns "
                "answers), or leave it out"
            )
        if self.teacher and (asked := next((one for one in self.knowledge() if "stored" in one.needs), None)):
            raise ValueError(f"{asked.name} learns from stored targets alone; give targets of that teacher")
        if self.runs and (asked := next((one for one in self.knowledge() if "hidden" in one.needs), None)):
            raise ValueError(f"{asked.name} needs hidden states, and another run gives its logits alone")
        silent = "another run" if self.runs else "cycle" if "cycle" in self.teachers else "guard" if self.guard else ""
        together = next((one for one in self.knowledge() if isinstance(one.settings, TogetherSettings)), None)
        if silent and together:
            raise ValueError(
                f"{together.name} needs an answer in every batch, and with {silent} there are some without; leave one of the two out"
            )
        if self.temperature != 1.0:
            if not self.teacher:
                raise ValueError("temperature needs a teacher in the step; stored targets have that of their labelling")
            if value_at(self.temperature, 0.0) <= 0 or value_at(self.temperature, 1.0) <= 0:
                raise ValueError("temperature must be above 0")
            classes = "relations of classes" if any(one.kind == "classes" for one in self.relations) else None
            judged = "critics of outputs" if any(not one.student for one in self.critics) else None
            if (
                name := classes
                or judged
                or next((name for name in ("spikes", "sequences") if getattr(self, name)), None)
            ):
                raise ValueError(
                    f"temperature is for soft targets that are learned frame by frame; leave it out with {name}"
                )
        changed = (
            "temperature" if self.temperature != 1.0 else "select" if self.select else "delays" if self.delays else ""
        )
        if changed and any(head.soft for head in self.heads):
            raise ValueError(f"heads learn soft targets as they are; leave out {changed}, or the head's soft")
        if self.guard and self.teachers != ["average"]:
            raise ValueError("guard watches teacher: average, alone; leave it out for other teachers")
        if "cycle" in self.teachers and len(self.teachers) > 1:
            raise ValueError("teacher: cycle answers alone, and not in the first cycle; give it without others")
        for name in ("resample", "opinion"):
            if getattr(self, name) and not self.targets:
                raise ValueError(f"{name} needs targets")
        if self.pairs and not self.targets:
            raise ValueError("pairs say which other recordings the targets answer; give targets")
        if self.pairs and self.only:
            raise ValueError("pairs already name the utterances to learn from; leave out only, and set kept in pairs")
        changing = {"resample changes": self.resample, "opinion changes": self.opinion, "pairs move": self.pairs}
        if "hidden" in self.needs and any(changing.values()):
            what = next(name for name, changes in changing.items() if changes)
            raise ValueError(f"{what} soft targets alone, not hidden states; give targets with the student's frames")
        if (self.resample or self.opinion or len(self.target_sets) > 1) and any(
            not one.student for one in self.critics
        ):
            what = (
                "resample changes"
                if self.resample
                else "opinion changes"
                if self.opinion
                else "a list of targets combines"
            )
            raise ValueError(
                f"{what} stored targets, and critics of outputs need them as they were stored; give the targets of one teacher with the student's "
                "frames, or let it answer in the step"
            )
        for name, several in (("targets", self.target_sets), ("teacher", self.teachers)):
            if twice := next((folder for folder in several if several.count(folder) > 1), None):
                raise ValueError(f"{name} names {twice} twice; name each once, and weigh it by combine.weights")
        if max(len(self.teachers), len(self.target_sets)) > 1 and any(
            one.kind == "attention" for one in self.relations
        ):
            raise ValueError("attention relations need one teacher; give one, or take another kind of relations")
        several, weights = self.target_sets or self.teachers, self.combine.weights
        if len(several) < 2 and self.combine != CombineSettings():
            raise ValueError("combine needs a list of two or more targets (or teachers)")
        if weights == DEVELOPMENT:
            unscored = [name for name in ("average", "cycle") if name in self.teachers] + [one.run for one in self.runs]
            if unscored:
                raise ValueError(
                    f"combine.weights: development takes scores from before the run, and {unscored[0]} has none; give weights as numbers"
                )
        elif weights is not None and len(weights) != len(several):
            raise ValueError(
                f"combine.weights has {len(weights)} weights for {len(several)} targets; give one for each"
            )

    @property
    def name(self) -> str:
        """What it is called in messages: the folder of its audio, or that it has none."""
        return str(self.audio or "generated")

    @property
    def drawn(self) -> bool:
        """Whether a network makes its features of noise in the step."""
        return bool(self.generated and self.generated.trained)

    @property
    def copies(self) -> int:
        """How often an utterance stands in its batch."""
        return 2 if self.views else 1

    @property
    def target_sets(self) -> list[str]:
        """Folders of soft-target shards, one a teacher."""
        return [self.targets] if isinstance(self.targets, str) else self.targets or []

    @property
    def texts(self) -> list[str]:
        """Files of text, or made of text, that it reads beside the shards."""
        return [name for name in (self.transcripts, self.opinion and self.opinion.lm) if name]

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
        elif self.soft and self.divergence:
            asked.append(("divergence", self.soft, self.divergence))
        elif self.soft and self.spikes:
            asked.append(("spikes", self.soft, self.spikes))
        elif self.soft:
            asked.append(("soft", self.soft, SoftSettings()))
        if self.generated and self.generated.trained:
            asked.append(("generated", 1.0, self.generated))
        for name in type(self).model_fields:
            value = getattr(self, name)
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, WeighedSettings):
                    asked.append((name + one.tag, one.weight, one))
        return [Asked(*one, self._needs(one[2])) for one in asked]

    def _needs(self, kind: KnowledgeSettings) -> frozenset[str]:
        outputs = isinstance(kind, RelationSettings) and kind.kind == "classes"
        if outputs or (isinstance(kind, CriticSettings) and not kind.student):
            return kind.needs - {"hidden"}
        if isinstance(kind, HeadSettings):
            return frozenset({"text", "whole"} if kind.ctc else ()) | frozenset({"targets"} if kind.soft else ())
        if isinstance(kind, SequenceSettings) and self.transcripts:
            return kind.needs - {"targets"} | {"lists"}
        return kind.needs | {"whole"} if isinstance(kind, SoftSettings) and self.delays else kind.needs

    @property
    def needs(self) -> frozenset[str]:
        """What the kinds of knowledge need of an utterance, all together."""
        return frozenset().union(*(asked.needs for asked in self.knowledge()))
