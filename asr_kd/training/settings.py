"""Settings of `train`: the run, its phases, and how several processes train one model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from asr_kd.audio.settings import FeatureSettings
from asr_kd.config.base import Count, Location, Natural, NotNegative, Positive, Sets, Settings, Share, check_owners
from asr_kd.config.knobs import DEVICE, FEATURES_ON, LOG, THREADS, FeaturesOn, Threads
from asr_kd.distillation.kind_settings import TogetherSettings, WeighedSettings
from asr_kd.distillation.settings import MissingMass, SourceSettings
from asr_kd.models.settings import HEARS_FEATURES, STREAMING, ModelSettings


class BmufSettings(Settings):
    """Block-wise model-update filtering: the ranks step alone, meet once a block, and filter how the mean of their models moved."""

    block_steps: Count = Field(50, description="steps that each rank takes alone between two meetings")
    block_momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="share of a block's change that the next one repeats; null takes 1 - 1/ranks"
    )
    block_rate: Positive = Field(1.0, description="factor on the mean change of a block")
    nesterov: bool = Field(True, description="a block starts where the momentum will lead, not at the global model")
    warmup_steps: Natural = Field(100, description="steps before the first block; in them every gradient is averaged")
    optimizer_state: Literal["keep", "average", "reset"] = Field(
        "average",
        description="what a meeting does to the moments of the optimiser: nothing, their mean, or a new start",
    )


class ThresholdSettings(Settings):
    """Gradient threshold compression: an element is sent, as plus or minus the threshold, once it has grown to the threshold."""

    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.01, description="share of the elements that the threshold is steered to send a step; null holds the threshold"
    )
    threshold: Positive | None = Field(
        None, description="(first) threshold, rounded to 8 binary digits; null takes the one that the density asks for"
    )
    residual_clip: Annotated[float, Field(ge=1)] | None = Field(
        None, description="thresholds that an element waits with at most, the rest is dropped; null drops nothing"
    )
    warmup_steps: Natural = Field(0, description="steps with whole gradients before the first")

    @model_validator(mode="after")
    def _fits(self) -> ThresholdSettings:
        if self.density is None and self.threshold is None:
            raise ValueError("set threshold or density")
        return self


class PowerSgdSettings(Settings):
    """Gradients sent as products of two thin matrices."""

    rank: Count = Field(2, description="columns of the thin matrices")
    warmup_steps: Annotated[int, Field(ge=2)] = Field(100, description="steps with whole gradients before the first")


class DistributedSettings(Settings):
    """How several ranks train one model; a run of a single process does not look at it."""

    method: Literal["ddp", "bmuf"] = Field("ddp", description="ddp averages gradients; bmuf models, once a block")
    compression: Literal["none", "threshold", "powersgd"] = Field("none", description="ddp: how gradients are sent")
    bmuf: BmufSettings = Field(default_factory=lambda: BmufSettings())
    threshold: ThresholdSettings = Field(default_factory=lambda: ThresholdSettings())
    powersgd: PowerSgdSettings = Field(default_factory=lambda: PowerSgdSettings())

    @model_validator(mode="after")
    def _fits(self) -> DistributedSettings:
        if self.method != "ddp" and self.compression != "none":
            raise ValueError(f"compression {self.compression} belongs to method ddp alone")
        check_owners(self, "method", {"bmuf": ("bmuf",)})
        check_owners(self, "compression", {"threshold": ("threshold",), "powersgd": ("powersgd",)})
        return self


class ChunkSettings(Settings):
    """Backpropagation through a stretch of time that is shorter than an utterance."""

    frames: Count = Field(description="frames of a chunk")
    carry: bool = Field(
        False,
        description="the chunks of an utterance follow each other, a step each, and the network's state is carried over "
        "(of a network that streams); else each chunk is an example of its own, in random order",
    )
    left: Natural = Field(0, description="frames heard before a chunk, and not answered for (without carry)")
    right: Natural = Field(0, description="the same behind a chunk (without carry)")

    @model_validator(mode="after")
    def _fits(self) -> ChunkSettings:
        if self.carry and (self.left or self.right):
            raise ValueError("with carry the state is the context; leave out left and right")
        return self


class PhaseSettings(Settings):
    """A stretch of training: so many passes over these sources, or hours of them, with one learning-rate rule."""

    sources: list[SourceSettings] = Field(description="streams that are mixed, batch by batch", min_length=1)
    passes: Count | None = Field(None, description="passes over all sources; give these or hours")
    hours_at_least: NotNegative = Field(
        0.0, description="audio to hear at least: as many more passes as that takes, where there is little audio"
    )
    hours: Positive | None = Field(
        None,
        description="hours of audio: a slice of streams that need not end; in the next cycle they go on where they stopped",
    )
    chunks: ChunkSettings | None = Field(None, description="learn stretches of utterances; null learns whole ones")
    frozen: list[str] = Field(default_factory=list, description="beginnings of the names of weights to leave unchanged")
    learning_rate: Positive = Field(0.002, description="peak rate of AdamW")
    final_rate: NotNegative = Field(0.01, description="rate at the end, as a share of the peak (cosine)")
    warmup: Share = Field(0.1, description="share of the phase's audio with a rising rate")

    @model_validator(mode="after")
    def _fits(self) -> PhaseSettings:
        if (self.passes is None) == (self.hours is None):
            raise ValueError("give passes or hours, one of the two")
        if self.hours_at_least and self.passes is None:
            raise ValueError("hours_at_least goes with passes; leave it out where hours say how much is heard")
        if self.hours is None and any(source.weight is not None for source in self.sources):
            raise ValueError("weight needs hours: in a pass each source is read whole; use repeat")
        learned = [asked.settings for source in self.sources for asked in source.knowledge()]
        if all(isinstance(one, WeighedSettings) and one.of_oneself for one in learned):
            raise ValueError(
                "who learns from himself or from his like alone ends in silence; teach one source ctc or soft"
            )
        if self.chunks:
            for source in self.sources:
                for asked in source.knowledge():
                    if "whole" in asked.needs:
                        raise ValueError(f"chunks cannot learn from {asked.name}, which needs whole utterances")
                if source.augment.stretch:
                    raise ValueError("chunks cannot be stretched; set augment.stretch to 0")
        return self


class AverageSettings(Settings):
    """Scored checkpoints whose mean is scored at the end of a run, and kept when it is the best of all."""

    last: Annotated[int, Field(ge=2)] | None = Field(None, description="so many that were scored last; this or best")
    best: Annotated[int, Field(ge=2)] | None = Field(None, description="so many with the best scores (choose)")

    @model_validator(mode="after")
    def _fits(self) -> AverageSettings:
        if bool(self.last) == bool(self.best):
            raise ValueError("give last or best, one of the two")
        return self


class ShareSettings(Settings):
    """Checkpoints for other runs that learn from this one, in `shared/`; they stay."""

    every: Count = Field(200, description="steps between two; that of the teacher of the others")


#: settings that came later, and are not written where they are not used
LATER = frozenset({"init_layers"})


class TrainSettings(Settings):
    """One trainer for teachers and students."""

    removed = frozenset({"blank_weight"})
    sharing = frozenset({"log"})

    output: Location = Field(description="folder of the run, on a local disk")
    units: Location = Field(description="folder of the units")
    development: Sets = Field(
        description="labelled audio shards that choose the best checkpoint and calibrate its blank (folder or URL, or a list)"
    )
    phases: list[PhaseSettings] = Field(min_length=1, description="what is learned, in order")
    cycles: Count = Field(1, description="times all phases are gone through")
    cycle_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="learning rates are multiplied by this from cycle to cycle"
    )
    distributed: DistributedSettings = Field(default_factory=lambda: DistributedSettings())
    lanes: Count = Field(1, description="parts of each stream, read side by side; a multiple of the processes")
    init: Location | None = Field(None, description="checkpoint folder (or URL) to start from; null: fresh weights")
    init_layers: list[Count] | None = Field(
        None,
        description="layers of init that the network's layers begin as, in order: [1, 4]; input and output are init's; "
        "null: all",
    )
    features: FeatureSettings = Field(default_factory=lambda: FeatureSettings())
    model: ModelSettings = Field(default_factory=lambda: ModelSettings())
    batch_frames: Count = Field(2000, description="frames in a batch at most, padding included")
    bucket_utterances: Count = Field(400, description="utterances held to sort by length: the shuffle buffer")
    max_seconds: Positive = Field(60.0, description="longer audio is left out and counted")
    max_bad_share: Share = Field(0.01, description="the run fails when more than this share could not be used")
    missing_mass: MissingMass = Field(
        "ghost",
        description="what the soft loss makes of the mass that was not kept: nothing, one class of all units not kept, or "
        "spread over them like their shard's prior, or evenly",
    )
    clip: Positive = Field(1.0, description="gradient norm is clipped to this")
    weight_decay: NotNegative = Field(0.01, description="AdamW weight decay")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="decay a step of an exponential moving average of the weights, scored and kept in their place; 0: none",
    )
    teacher_decay: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="decay a step of another average, the one that answers as teacher: average; null: that of ema_decay does",
    )
    average: AverageSettings | None = Field(None, description="checkpoints whose mean is tried at the end; null: none")
    share: ShareSettings | None = Field(
        None, description="leave checkpoints for other runs, whose teacher is this run; null: none"
    )
    evaluate_every: Count = Field(200, description="steps between development scores and checkpoints")
    calibrate_blank: bool = Field(
        True,
        description="find on the development set what must be taken off the blank for greedy decoding; scores count with it, "
        "checkpoints have it in their weights, the weights in training do not",
    )
    choose: Literal["wer", "loss", "both"] = Field(
        "both",
        description="the best checkpoint has the lowest WER on the development set (then CTC loss), loss (then WER), or product "
        "of the two",
    )
    feature_cache: Location | None = Field(
        None,
        description="local folder that keeps computed features between passes and runs; without it they are computed every time",
    )
    seed: Natural = Field(0, description="fixes weights, order, dropout and masks")
    device: str = DEVICE
    features_on: FeaturesOn = FEATURES_ON
    threads: Threads = THREADS
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of the network's arithmetic in training (autocast); auto: bfloat16 on a GPU, float32 on a CPU",
    )
    loader_workers: Natural = Field(
        0,
        description="processes that read beside the trainer: one that makes the batches, and others that decode audio for it; "
        "0 does it in a thread",
    )
    ready_batches: Count = Field(4, description="batches that are made ready while the network is at work")
    tensorboard: bool = Field(
        True, description="write TensorBoard events beside metrics.jsonl, where it is installed; as log does by name"
    )
    log: list[str] = LOG

    @model_serializer(mode="wrap")
    def _used(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what came later and is not used, so that runs of earlier versions go on."""
        return {name: value for name, value in write(self).items() if value is not None or name not in LATER}

    @field_validator("model")
    @classmethod
    def _delayed(cls, model: ModelSettings, info: ValidationInfo) -> ModelSettings:
        return model.in_frames(info.data["features"]) if "features" in info.data else model

    @model_validator(mode="after")
    def _fits(self) -> TrainSettings:
        if self.model.kind not in STREAMING and any(phase.chunks and phase.chunks.carry for phase in self.phases):
            raise ValueError(
                f"chunks.carry needs a network that streams, whose state can be carried over; set model.kind to {', '.join(STREAMING)}"
            )
        if self.model.bits and self.average:
            raise ValueError(
                "average takes checkpoints, and those of a model with bits are rounded already; use ema_decay"
            )
        self._check_runs()
        self._check_start()
        if self.features_on == "device":
            self._check_sound()
        conditioned = {f"layer.{layer}" for layer in self.model.conditioned}
        for head in (head for phase in self.phases for source in phase.sources for head in source.heads):
            if head.shared and head.layer not in conditioned:
                raise ValueError(
                    f"heads: {head.layer} shares the output layer, but the network is not conditioned there; name its number in "
                    "model.conditioned, or leave out shared"
                )
        asked = {name for phase in self.phases for source in phase.sources for name in source.teachers}
        if "average" in asked and not (self.ema_decay or self.teacher_decay):
            raise ValueError(
                "teacher: average needs ema_decay above 0 (or teacher_decay), a moving average that can answer"
            )
        if self.teacher_decay is not None and "average" not in asked:
            raise ValueError("teacher_decay is of teacher: average; no source has it")
        if "cycle" in asked and self.cycles < 2:
            raise ValueError("teacher: cycle needs cycles of 2 or more; in the first nobody answers")
        if self.missing_mass != "ghost" and any(source.divergence for phase in self.phases for source in phase.sources):
            raise ValueError("a divergence counts what was not kept as one class; set missing_mass to ghost")
        learned = [one for phase in self.phases for source in phase.sources for one in source.knowledge()]
        made = [one.settings for one in learned if one.name == "generated"]
        if any(one != made[0] for one in made):
            raise ValueError("generated: one network makes the features of all sources; give the same settings in each")
        together = [(one.name, one.settings.learners) for one in learned if isinstance(one.settings, TogetherSettings)]
        if odd := next((name for name, learners in together if learners != dict(together)[name]), None):
            raise ValueError(
                f"{odd} trains the same learners in all sources; give it the same settings in each, but for the weight"
            )
        return self

    def _check_start(self) -> None:
        """Refuse layers to begin as that no checkpoint of this kind of network can give."""
        layers, model = self.init_layers, self.model
        if layers is None:
            return
        if self.init is None:
            raise ValueError("init_layers are layers of init; give init, the checkpoint whose they are")
        if len(layers) != model.layers:
            raise ValueError(
                f"init_layers names {len(layers)} layers and the network has {model.layers}; name one for each"
            )
        if model.kind in HEARS_FEATURES and [at for at, layer in enumerate(layers) if layer == 1] != [0]:
            raise ValueError(
                f"init_layers: the first layer of kind {model.kind} hears features, the others hear a layer; name 1 first, and nowhere else"
            )

    def _check_sound(self) -> None:
        """Refuse what cannot have its features made on the network's device."""
        if self.feature_cache:
            raise ValueError(
                "features_on device makes features of the sound every time, and feature_cache keeps those of the loader; leave one of them out"
            )
        if any(phase.chunks and not phase.chunks.carry for phase in self.phases):
            raise ValueError(
                "features_on device makes the features of whole utterances, and chunks without carry are stretches of them; leave it out"
            )

    def _check_runs(self) -> None:
        """Refuse what cannot learn from other runs, or teach them."""
        runs = [(phase, run) for phase in self.phases for source in phase.sources for run in source.runs]
        if (self.share or runs) and self.distributed.method == "bmuf":
            raise ValueError(
                "runs that share checkpoints need distributed.method=ddp, whose processes agree at every step"
            )
        if any(phase.chunks and phase.chunks.carry for phase, _ in runs):
            raise ValueError("chunks.carry cannot learn from another run; leave carry out")
        by_name = {run.name: run for _, run in runs}
        if odd := next((run for _, run in runs if run != by_name[run.name]), None):
            raise ValueError(
                f"teacher: {odd.run} is asked for in two ways; give its every and wait the same in all sources"
            )
