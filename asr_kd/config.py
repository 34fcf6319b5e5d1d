"""Settings of every job: one class each, validated, loaded from YAML, overridden by key=value. Every default lives here."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from asr_kd.errors import UserError
from asr_kd.files import read_text, spelled
from asr_kd.typed import Typed, landed, parse_yaml, read


class Settings(BaseModel):
    """A group of settings: immutable, finite, unknown keys refused, no silent conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
#: more than a machine has; torch crashes where the system refuses it as many as were asked for
Threads = Annotated[int, Field(ge=1, le=1024)]
#: of texts, `text.NORMALIZERS`
Normalizing = Literal["none", "basic", "english"]


def _spelled(text: str) -> str:
    try:
        return spelled(text)
    except UserError as error:
        raise ValueError(str(error).removeprefix(f"{text}: ").removeprefix(f"{text!r}: ")) from None


#: of a file or folder: `~` in front is the home folder, a URL is known by its scheme and refused where it is misspelt
Location = Annotated[str, AfterValidator(_spelled)]
#: of a set of shards; it names a folder too
SET_NAME = r"[A-Za-z0-9_-]{1,100}"


def _spelled_once(settings: Settings, frames: str, milliseconds: str) -> None:
    if getattr(settings, milliseconds) is not None and frames in settings.model_fields_set:
        raise ValueError(f"{frames} and {milliseconds} say the same; give one")


class FeatureSettings(Settings):
    """Waveform → log mel filterbank energies, stacked to a lower frame rate."""

    sample_rate: Annotated[int, Field(ge=4000, le=48000)] = Field(
        16000, description="rate in Hz the audio is converted to"
    )
    mels: Annotated[int, Field(ge=8, le=256)] = Field(64, description="mel filters")
    window_ms: Annotated[int, Field(ge=5, le=100)] = Field(25, description="analysis window in milliseconds")
    hop_ms: Annotated[int, Field(ge=1, le=50)] = Field(10, description="hop in milliseconds")
    stack: Annotated[int, Field(ge=1, le=8)] = Field(3, description="neighbouring frames joined into one network input")
    mean_frames: Count = Field(300, description="time constant of the causal mean, in hops")

    @property
    def frame_ms(self) -> int:
        """Period of one network frame in milliseconds."""
        return self.hop_ms * self.stack

    @property
    def dimension(self) -> int:
        """Numbers in one network frame."""
        return self.mels * self.stack


class ModelSettings(Settings):
    """An acoustic model."""

    kind: Literal["lstm", "blstm", "conv", "conformer"] = Field("lstm", description="network family")
    layers: Annotated[int, Field(ge=1, le=1000)] = Field(2, description="layers")
    size: Annotated[int, Field(ge=1, le=100_000)] = Field(160, description="hidden units of a layer (and direction)")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.1, description="dropout between layers")
    delay_frames: Annotated[int, Field(ge=0, le=32)] = Field(
        0, description="frames of future input an `lstm` sees before it answers for a frame"
    )
    delay_ms: Annotated[float, Field(ge=0)] | None = Field(
        None, description="the same in milliseconds, whatever the frame period: as many frames as it takes"
    )
    kernel: Annotated[int, Field(ge=1, le=10_000)] = Field(
        5, description="convolution width in frames (`conv`: each layer; `conformer`: depthwise)"
    )
    heads: Count = Field(4, description="attention heads of a `conformer`")

    @model_validator(mode="after")
    def _fits(self) -> ModelSettings:
        _spelled_once(self, "delay_frames", "delay_ms")
        if self.kind != "lstm" and (self.delay_frames or self.delay_ms):
            raise ValueError("delay_frames belongs to kind lstm alone")
        if self.kind in ("conv", "conformer") and self.kernel % 2 == 0:
            raise ValueError("kernel must be odd")
        if self.kind == "conformer" and self.size % self.heads:
            raise ValueError("size must be a multiple of heads")
        return self

    def in_frames(self, features: FeatureSettings) -> ModelSettings:
        """The network with its delay in frames of these features.

        Raises:
            ValueError: the delay is too long.
        """
        if self.delay_ms is None:
            return self
        frames = math.ceil(self.delay_ms / features.frame_ms)
        if frames > 32:
            raise ValueError(f"delay_ms {self.delay_ms:g} is more than 32 frames of {features.frame_ms} ms; lower it")
        return self.model_copy(update={"delay_frames": frames, "delay_ms": None})


class BmufSettings(Settings):
    """Block-wise model-update filtering: the ranks step alone, meet once a block, and filter how the mean of their models moved."""

    block_steps: Count = Field(50, description="steps that each rank takes alone between two meetings")
    block_momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="share of a block's change that the next one repeats; null takes 1 - 1/ranks"
    )
    block_rate: Annotated[float, Field(gt=0)] = Field(1.0, description="factor on the mean change of a block")
    nesterov: bool = Field(
        True, description="a block starts where the momentum will lead, not at the global model itself"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        100, description="steps before the first block, in which the ranks average every gradient"
    )
    optimizer_state: Literal["keep", "average", "reset"] = Field(
        "average",
        description="what a meeting does to the moments of the optimiser: nothing, their mean, or a new start",
    )


class ThresholdSettings(Settings):
    """Gradient threshold compression: an element is sent, as plus or minus the threshold, once it has grown to the threshold."""

    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.01,
        description="share of the elements that the threshold is steered to send a step; null holds the threshold",
    )
    threshold: Annotated[float, Field(gt=0)] | None = Field(
        None, description="(first) threshold, rounded to 8 binary digits; null takes the one that the density asks for"
    )
    residual_clip: Annotated[float, Field(ge=1)] | None = Field(
        None, description="thresholds that an element waits with at most, the rest is dropped; null drops nothing"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps with whole gradients before the first")

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

    method: Literal["ddp", "bmuf"] = Field(
        "ddp", description="ddp: every gradient is averaged; bmuf: the models are, once a block"
    )
    compression: Literal["none", "threshold", "powersgd"] = Field("none", description="ddp: how gradients are sent")
    bmuf: BmufSettings = Field(default_factory=lambda: BmufSettings())
    threshold: ThresholdSettings = Field(default_factory=lambda: ThresholdSettings())
    powersgd: PowerSgdSettings = Field(default_factory=lambda: PowerSgdSettings())

    @model_validator(mode="after")
    def _fits(self) -> DistributedSettings:
        if self.method != "ddp" and self.compression != "none":
            raise ValueError(f"compression {self.compression} belongs to method ddp alone")
        for name, chosen in (("bmuf", self.method), ("threshold", self.compression), ("powersgd", self.compression)):
            if name != chosen and getattr(self, name) != type(getattr(self, name))():
                owner = "method" if name == "bmuf" else "compression"
                raise ValueError(f"settings of {name} belong to {owner} {name} alone")
        return self


class PrepareSettings(Settings):
    """Manifest → audio shards."""

    manifest: Location = Field(
        description="JSONL: audio (a path or a URL), and optionally text, key, start and end in seconds, anything else"
    )
    output: Location = Field(description="folder of the shards, or its URL (s3://…, gs://…)")
    samples_per_shard: Count = Field(500, description="utterances in a shard")
    sample_rate: Annotated[int, Field(ge=4000, le=48000)] | None = Field(
        None, description="convert to this rate in Hz; null keeps each file's own"
    )
    max_seconds: Annotated[float, Field(gt=0)] = Field(60.0, description="longer audio is quarantined")
    max_bad_share: Share = Field(0.01, description="the job fails when more than this share was quarantined")
    drop_text: bool = Field(
        False, description="leave transcripts out of the shards, for audio that counts as unlabelled"
    )
    normalizer: Normalizing = Field(
        "none", description="of the texts, as of eval; none: they are written as they stand"
    )


class UnitsSettings(Settings):
    """Labelled text → sentencepiece model."""

    source: Location = Field(
        description="audio shards with text, a manifest (JSON lines) or a text file (a line an utterance)"
    )
    output: Location = Field(description="folder of the units")
    normalizer: Normalizing = Field(
        "none",
        description="what texts go through before they are spelt, here and wherever the units are used; as of eval",
    )
    kind: Literal["unigram", "bpe", "char"] = Field("unigram", description="how text is cut into pieces")
    size: Annotated[int, Field(ge=4, le=65000)] = Field(500, description="pieces at most; with char, an upper bound")


class LmSettings(Settings):
    """Labelled text → its vocabulary and a word n-gram model, for a beam search."""

    source: Location = Field(
        description="audio shards with text, a manifest (JSON lines) or a text file (a line an utterance)"
    )
    output: Location = Field(description="folder of lm.arpa and words.txt")
    units: Location | None = Field(
        None, description="folder of units: words are written as these write them; without: as they are"
    )
    order: Annotated[int, Field(ge=1, le=6)] = Field(2, description="words of an n-gram at most")


#: settings that decide what is kept of a teacher, and the modes in which they do
SELECTION = {
    "k": ("mass", "top_k"),
    "mass": ("mass",),
    "floor": ("mass",),
    "draws": ("sampled",),
    "seed": ("sampled",),
    "temperature": ("mass", "top_k", "sampled"),
    "hold_frames": ("alignment",),
}


#: settings of the labelling engine `ray` alone
RAY = ("ray_address", "min_workers", "max_workers", "worker_cpus", "worker_gpus")


class LabelSettings(Settings):
    """Teacher over audio shards → soft-target shards."""

    teacher: Location = Field(description="checkpoint folder, or its URL")
    audio: Location = Field(description="folder of audio shards, or its URL (s3://…, gs://…)")
    output: Location = Field(description="folder of the soft-target shards, or its URL")
    mode: Literal["mass", "top_k", "sampled", "alignment"] = Field(
        "mass",
        description="of the teacher's distribution the fewest units that reach a mass, the k best, or draws from it; "
        "or its forced alignment to the text",
    )
    transcripts: Location | None = Field(
        None, description="alignment: JSONL of key and text in place of the text in the shards"
    )
    hold_frames: Count = Field(
        1, description="alignment: frames that each unit lasts at least, where the blank follows it"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="the teacher's logits are divided by this; above 1 softens an over-confident teacher"
    )
    k: Annotated[int, Field(ge=1, le=255)] = Field(20, description="mass, top_k: units kept a frame at most")
    mass: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.999, description="mass: enough units are kept for this mass"
    )
    floor: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="mass: units less probable than this are not kept, the best one excepted"
    )
    draws: Annotated[int, Field(ge=1, le=255)] = Field(
        20, description="sampled: units drawn a frame, with replacement; their counts are kept"
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="sampled: fixes what is drawn")
    batch_frames: Count = Field(4000, description="frames in a batch at most")
    max_seconds: Annotated[float, Field(gt=0)] = Field(60.0, description="longer audio is quarantined")
    max_bad_share: Share = Field(0.01, description="the job fails when more than this share was quarantined")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: Threads = Field(1, description="CPU threads of the network")
    loader_workers: Annotated[int, Field(ge=0)] = Field(
        0,
        description="local: processes that decode audio, and as many that encode, beside the teacher; 0 takes threads of the job",
    )
    engine: Literal["local", "ray"] = Field(
        "local", description="who works: this process, or a pool of workers on a Ray cluster (asr-kd[ray])"
    )
    ray_address: str | None = Field(
        None,
        description="ray: auto or host:port of the cluster; without it RAY_ADDRESS, or Ray is started on this machine",
    )
    min_workers: Count = Field(1, description="ray: workers asked for at once, and kept to the end")
    max_workers: Count | None = Field(
        None, description="ray: workers at most while shards wait; null takes all that the cluster has room for"
    )
    worker_cpus: Count = Field(1, description="ray: CPUs of the cluster that a worker takes up")
    worker_gpus: Share = Field(0.0, description="ray: share of a GPU that a worker takes up; 0 labels on CPUs")

    @model_validator(mode="after")
    def _fits(self) -> LabelSettings:
        for name, modes in SELECTION.items():
            if self.mode not in modes and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to mode {' and '.join(modes)} alone")
        for name in RAY:
            if self.engine != "ray" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to engine ray alone")
        if self.max_workers and self.max_workers < self.min_workers:
            raise ValueError(f"max_workers {self.max_workers} must not be below min_workers {self.min_workers}")
        if self.engine == "ray" and self.loader_workers:
            raise ValueError("loader_workers belongs to engine local alone")
        if self.engine == "ray" and self.device.startswith("cuda") and not self.worker_gpus:
            raise ValueError(f"device {self.device} needs worker_gpus above 0 with engine ray")
        return self


class PlanSettings(Settings):
    """What a large job will take, from a small one that was measured."""

    hours: Annotated[float, Field(gt=0)] = Field(description="hours of audio to plan for")
    audio: Location = Field(description="folder of audio shards like those to come")
    targets: Location = Field(description="folder of a finished label job over them, on a machine like those to come")
    workers: Count = Field(1, description="devices that label at the same time")
    label_speed: Annotated[float, Field(gt=0)] | None = Field(
        None, description="audio hours an hour that one worker labels; null takes the measured"
    )
    student: Location | None = Field(None, description="folder of a measured training run, to plan the training too")
    train_speed: Annotated[float, Field(gt=0)] | None = Field(
        None, description="audio hours an hour that one worker trains on; null takes the measured"
    )
    train_features: FeatureSettings = Field(default_factory=lambda: FeatureSettings())
    train_model: ModelSettings | None = Field(
        None, description="a network whose training step is measured here, to plan the training without such a run"
    )
    train_units: Count | None = Field(None, description="output units of train_model")
    train_batch_frames: Count = Field(2000, description="frames in a batch of train_model")
    device: str = Field("auto", description="where train_model is measured: auto, cpu, cuda or cuda:N")
    threads: Threads = Field(1, description="CPU threads of train_model")
    passes: Count = Field(1, description="of the training over the audio")
    train_workers: Count = Field(1, description="devices that train at the same time")
    price_per_hour: Annotated[float, Field(ge=0)] | None = Field(None, description="of one device")
    report: Location | None = Field(None, description="JSON file for the figures")

    @field_validator("train_model")
    @classmethod
    def _delayed(cls, model: ModelSettings | None, info: ValidationInfo) -> ModelSettings | None:
        return model.in_frames(info.data["train_features"]) if model and "train_features" in info.data else model

    @model_validator(mode="after")
    def _fits(self) -> PlanSettings:
        if bool(self.train_model) != bool(self.train_units):
            raise ValueError("train_model and train_units go together")
        if sum(map(bool, (self.student, self.train_speed, self.train_model))) > 1:
            raise ValueError("student, train_speed and train_model all say how fast training is; give one")
        return self

    @property
    def trains(self) -> bool:
        """Whether the training is planned too."""
        return bool(self.student or self.train_speed or self.train_model)


class VerifySettings(Settings):
    """Soft targets against their audio and their teacher."""

    targets: Location = Field(description="folder of the soft-target shards, or its URL")
    audio: Location = Field(description="folder of the audio shards that they answer, or its URL")
    teacher: Location = Field(description="checkpoint folder of the teacher, or its URL")
    shards: Count | None = Field(10, description="shards that are read whole and labelled again; null takes all")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="which shards are drawn")
    transcripts: Location | None = Field(None, description="of an alignment: the texts that it was made from")
    max_difference: Share = Field(0.03, description="largest difference of a probability that still holds")
    max_top1_share: Share = Field(0.001, description="share of frames whose best unit may differ")
    report: Location | None = Field(None, description="JSON file for all that was found")
    batch_frames: Count = Field(4000, description="frames in a batch at most")
    max_seconds: Annotated[float, Field(gt=0)] = Field(
        60.0, description="of the labelling: longer audio is quarantined"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: Threads = Field(1, description="CPU threads of the network")


class InspectSettings(Settings):
    """Soft targets for a person to look at."""

    targets: Location = Field(description="a soft-target shard, or a folder of them, or a URL")
    key: str | None = Field(None, description="utterance to show; without it the shard is listed")
    units: Location | None = Field(None, description="folder of the units, for their names in place of numbers")
    audio: Location | None = Field(None, description="folder of the audio shards, for the spectrogram")
    png: Location | None = Field(None, description="file for a picture of the utterance")
    rows: Count = Field(20, description="lines of the table at most")

    @model_validator(mode="after")
    def _fits(self) -> InspectSettings:
        if (self.png or self.audio) and not self.key:
            raise ValueError("png and audio need a key")
        return self


class NoiseSettings(Settings):
    """What is done to the sound that the learner hears, before its features; length and timing stay, and so do the targets."""

    share: Share = Field(0.7, description="share of the utterances that noise is added to")
    kinds: list[Literal["white", "pink", "brown", "babble", "files"]] = Field(
        ["white", "pink", "brown", "babble"],
        min_length=1,
        description="noises to draw from, evenly; name one twice to hear it twice as often. babble: other utterances of the "
        "shard, of other speakers where they are known; files: those in `folder`",
    )
    snr_min: Annotated[float, Field(ge=-30, le=60)] = Field(
        0.0, description="lowest signal-to-noise ratio in dB; the speech is measured without its pauses"
    )
    snr_max: Annotated[float, Field(ge=-30, le=60)] = Field(20.0, description="highest signal-to-noise ratio in dB")
    talkers_min: Count = Field(3, description="babble: voices at least")
    talkers_max: Count = Field(7, description="babble: voices at most")
    folder: Location | None = Field(
        None, description="files: a folder with noises (WAV, FLAC, MP3, Ogg, Opus; any rate; ten minutes each at most)"
    )
    reverb: Share = Field(0.3, description="share of the utterances that are put into a room")
    rt60_min: Annotated[float, Field(ge=0.02, le=5)] = Field(0.1, description="shortest reverberation time in seconds")
    rt60_max: Annotated[float, Field(ge=0.02, le=5)] = Field(0.7, description="longest reverberation time in seconds")
    direct_min: Annotated[float, Field(ge=-30, le=30)] = Field(
        -3.0, description="lowest ratio of the direct sound to the reverberation in dB"
    )
    direct_max: Annotated[float, Field(ge=-30, le=30)] = Field(10.0, description="highest such ratio in dB")

    @model_validator(mode="after")
    def _fits(self) -> NoiseSettings:
        for name in ("snr", "talkers", "rt60", "direct"):
            if getattr(self, f"{name}_min") > getattr(self, f"{name}_max"):
                raise ValueError(f"{name}_min must not be above {name}_max")
        if not self.share and not self.reverb:
            raise ValueError("set share or reverb above 0, or leave noise out")
        if bool(self.folder) != ("files" in self.kinds):
            raise ValueError("folder and the kind files go together; set both or neither")
        return self


class AugmentSettings(Settings):
    """What is done to the learner's input only; time is stretched together with the targets, or not at all."""

    stretch: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="length is changed by up to this share, targets with it"
    )
    mel_warp: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="the mel axis is scaled by up to this share"
    )
    time_masks: Annotated[int, Field(ge=0)] = Field(0, description="time masks an utterance")
    time_frames: Annotated[int, Field(ge=0)] = Field(8, description="longest time mask, in network frames")
    time_ms: Annotated[float, Field(ge=0)] | None = Field(
        None, description="the same in milliseconds, whatever the frame period"
    )
    mel_masks: Annotated[int, Field(ge=0)] = Field(0, description="masks over mel bands an utterance")
    mel_bands: Annotated[int, Field(ge=0)] = Field(12, description="widest mel mask")
    noise: NoiseSettings | None = Field(
        None, description="noise and reverberation on the sound itself; null: the clean sound"
    )

    @model_validator(mode="after")
    def _fits(self) -> AugmentSettings:
        _spelled_once(self, "time_frames", "time_ms")
        return self

    def mask_frames(self, frame_ms: int) -> int:
        """Network frames of the longest time mask."""
        return self.time_frames if self.time_ms is None else round(self.time_ms / frame_ms)


class SpikeSettings(Settings):
    """Soft targets of a CTC teacher, learned spike by spike: the student chooses the moment within a stretch around each."""

    before: Annotated[int, Field(ge=0)] = Field(
        5, description="frames before a spike from which on the student may emit"
    )
    after: Count = Field(7, description="frames after a spike's start within which it may, where no other comes first")
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="above 1 softens what the teacher emits in a spike; the frames outside stay as they are"
    )
    certainty: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="a spike weighs as much as its most probable emission, to this power: where the teacher is unsure, the student "
        "is left to itself; 0 weighs all alike",
    )


class SequenceSettings(Settings):
    """What a teacher says of an utterance as a distribution over transcripts: each time the utterance is heard, one is drawn."""

    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="below 1 draws what the teacher is sure of more often; towards 0 its best transcript alone"
    )
    draws: Count = Field(
        1, description="transcripts drawn each time; the loss is their mean, steadier the more there are"
    )


class CombineSettings(Settings):
    """The soft targets of several teachers as one."""

    mode: Literal["mean", "log_mean", "confidence"] = Field(
        "mean",
        description="mean of the probabilities, of the log-probabilities, or of the probabilities weighted by how certain each "
        "teacher is of the frame",
    )
    weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, description="of the teachers, in the order of targets; null weighs all alike"
    )


class MwerSettings(Settings):
    """Minimum expected word error training: candidate transcripts of each utterance, weighed by their word errors."""

    hypotheses: Annotated[int, Field(ge=2)] = Field(4, description="candidates an utterance")
    sampled: bool = Field(
        False, description="draw the candidates from the model, path by path; false takes the best of a beam search"
    )


class SourceSettings(Settings):
    """One stream of utterances to learn from, and what is learned from it."""

    audio: Location = Field(description="folder of audio shards, or its URL (s3://…, gs://…)")
    targets: Location | list[Location] | None = Field(
        None, description="folder (or URL) of soft-target shards beside it; a list of them, one a teacher, is combined"
    )
    combine: CombineSettings = Field(default_factory=lambda: CombineSettings())
    resample: bool = Field(
        False,
        description="lay targets of another frame period or offset on the learner's frames, by the time they share",
    )
    transcripts: Location | None = Field(None, description="JSONL of key and text, in place of the text in the shards")
    ctc: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of the CTC loss on the text")
    mwer: MwerSettings | None = Field(
        None, description="minimise the expected word errors too, with weight 1 beside ctc's; null leaves them out"
    )
    soft: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of the cross-entropy against the soft targets")
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
    weight: Annotated[float, Field(gt=0)] | None = Field(
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


class ChunkSettings(Settings):
    """Backpropagation through a stretch of time that is shorter than an utterance."""

    frames: Count = Field(description="frames of a chunk")
    carry: bool = Field(
        False,
        description="the chunks of an utterance follow each other, a step each, and the network's state is carried over "
        "(`lstm` alone); else each chunk is an example of its own, in random order",
    )
    left: Annotated[int, Field(ge=0)] = Field(
        0, description="frames before a chunk that the network hears and does not answer for (without carry)"
    )
    right: Annotated[int, Field(ge=0)] = Field(0, description="the same behind a chunk (without carry)")

    @model_validator(mode="after")
    def _fits(self) -> ChunkSettings:
        if self.carry and (self.left or self.right):
            raise ValueError("with carry the state is the context; leave out left and right")
        return self


class PhaseSettings(Settings):
    """A stretch of training: so many passes over these sources, or hours of them, with one learning-rate rule."""

    sources: list[SourceSettings] = Field(description="streams that are mixed, batch by batch", min_length=1)
    passes: Count | None = Field(None, description="passes over all sources; give these or hours")
    hours_at_least: Annotated[float, Field(ge=0)] = Field(
        0.0, description="audio to hear at least: as many more passes as that takes, where there is little audio"
    )
    hours: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="hours of audio: a slice of streams that need not end; in the next cycle they go on where they stopped",
    )
    chunks: ChunkSettings | None = Field(None, description="learn stretches of utterances; null learns whole ones")
    frozen: list[str] = Field(
        default_factory=list, description="beginnings of the names of weights that are left as they are"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(0.002, description="peak rate of AdamW")
    final_rate: Annotated[float, Field(ge=0)] = Field(
        0.01, description="rate at the end, as a share of the peak (cosine)"
    )
    warmup: Share = Field(0.1, description="share of the phase's audio with a rising rate")

    @model_validator(mode="after")
    def _fits(self) -> PhaseSettings:
        if (self.passes is None) == (self.hours is None):
            raise ValueError("give passes or hours, one of the two")
        if self.hours_at_least and self.passes is None:
            raise ValueError("hours_at_least goes with passes; leave it out where hours say how much is heard")
        if self.hours is None and any(source.weight is not None for source in self.sources):
            raise ValueError("weight needs hours: in a pass each source is read whole; use repeat")
        if self.chunks:
            for source in self.sources:
                if source.ctc or source.spikes or source.sequences:
                    raise ValueError("chunks cannot learn from ctc, spikes or sequences, which need whole utterances")
                if source.augment.stretch:
                    raise ValueError("chunks cannot be stretched; set augment.stretch to 0")
        return self


class AverageSettings(Settings):
    """Scored checkpoints whose mean is scored at the end of a run, and kept when it is the best of all."""

    last: Annotated[int, Field(ge=2)] | None = Field(None, description="so many that were scored last; this or best")
    best: Annotated[int, Field(ge=2)] | None = Field(
        None, description="so many with the best scores on the development set (choose)"
    )

    @model_validator(mode="after")
    def _fits(self) -> AverageSettings:
        if bool(self.last) == bool(self.best):
            raise ValueError("give last or best, one of the two")
        return self


class TrainSettings(Settings):
    """One trainer for teachers and students."""

    output: Location = Field(description="folder of the run, on a local disk")
    units: Location = Field(description="folder of the units")
    development: Location = Field(
        description="labelled audio shards that choose the best checkpoint and calibrate its blank (folder or URL)"
    )
    phases: list[PhaseSettings] = Field(min_length=1, description="what is learned, in order")
    cycles: Count = Field(1, description="times all phases are gone through")
    cycle_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="learning rates are multiplied by this from cycle to cycle"
    )
    distributed: DistributedSettings = Field(default_factory=lambda: DistributedSettings())
    lanes: Count = Field(
        1, description="parts in which every stream is read side by side; the number of processes must divide it"
    )
    init: Location | None = Field(
        None, description="checkpoint folder (or URL) to start from; without it fresh weights are drawn"
    )
    features: FeatureSettings = Field(default_factory=lambda: FeatureSettings())
    model: ModelSettings = Field(default_factory=lambda: ModelSettings())
    batch_frames: Count = Field(2000, description="frames in a batch at most, padding included")
    bucket_utterances: Count = Field(400, description="utterances held to sort by length: the shuffle buffer")
    max_seconds: Annotated[float, Field(gt=0)] = Field(60.0, description="longer audio is left out and counted")
    max_bad_share: Share = Field(0.01, description="the run fails when more than this share could not be used")
    blank_weight: Annotated[float, Field(gt=0)] = Field(
        1.0, description="weight in the soft loss of frames whose best target is the blank"
    )
    missing_mass: Literal["renormalise", "ghost", "prior", "uniform"] = Field(
        "ghost",
        description="what the soft loss makes of the mass that was not kept: nothing, one class of all units not kept, or "
        "spread over them like their shard's prior, or evenly",
    )
    clip: Annotated[float, Field(gt=0)] = Field(1.0, description="gradient norm is clipped to this")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="AdamW weight decay")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="decay a step of an exponential moving average of the weights, scored and kept in their place; 0: none",
    )
    average: AverageSettings | None = Field(
        None, description="checkpoints of the run whose mean is tried at its end; null: none"
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
    seed: Annotated[int, Field(ge=0)] = Field(0, description="fixes weights, order, dropout and masks")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: Threads = Field(1, description="CPU threads of the network")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of the network's arithmetic in training (autocast); auto: bfloat16 on a GPU, float32 on a CPU",
    )
    loader_workers: Annotated[int, Field(ge=0)] = Field(
        0,
        description="processes that read beside the trainer: one that makes the batches, and others that decode audio for it; "
        "0 does it in a thread",
    )
    ready_batches: Count = Field(4, description="batches that are made ready while the network is at work")
    tensorboard: bool = Field(True, description="write TensorBoard events beside metrics.jsonl")

    @field_validator("model")
    @classmethod
    def _delayed(cls, model: ModelSettings, info: ValidationInfo) -> ModelSettings:
        return model.in_frames(info.data["features"]) if "features" in info.data else model

    @model_validator(mode="after")
    def _fits(self) -> TrainSettings:
        if self.model.kind != "lstm" and any(phase.chunks and phase.chunks.carry for phase in self.phases):
            raise ValueError("chunks.carry needs model.kind lstm, whose state can be carried over")
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
    lm_weight: Annotated[float, Field(ge=0)] = Field(
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
        defaults = type(self).model_fields
        if self.decoder == "greedy":
            for name in ("lm", "lexicon", "nbest"):
                if getattr(self, name) != defaults[name].default:
                    raise ValueError(f"{name} needs a beam search; set decoder to beam")
        if not self.lm and self.lm_weight != defaults["lm_weight"].default:
            raise ValueError("lm_weight needs a language model; set lm")
        if not (self.lm or self.lexicon) and self.word_bonus:
            raise ValueError("word_bonus needs a language model or a lexicon; set lm or lexicon")
        if self.nbest > self.beam:
            raise ValueError(f"nbest {self.nbest} must not be above beam {self.beam}")
        return self


class EvalSettings(DecodingSettings):
    """Checkpoints over test shards → WER report."""

    systems: dict[str, Location] = Field(min_length=1, description="name: checkpoint folder, or its URL")
    audio: Location | dict[str, Location] = Field(
        description="folder of labelled audio shards, or its URL (s3://…, gs://…); or of several, as name: folder"
    )
    output: Location = Field(description="folder of the report")
    baseline: str | None = Field(None, description="system that changes are counted from")
    teacher: str | None = Field(None, description="system that sets the gap to recover")
    student: str | None = Field(None, description="system the verdict is about; without it the best one")
    normalizer: Normalizing = Field(
        "basic",
        description="basic: lower case, punctuation removed, spaces joined; english: as Whisper, also figures and spelling",
    )
    bootstrap: Annotated[int, Field(ge=0)] = Field(1000, description="resamples behind the confidence intervals")
    batch_frames: Count = Field(4000, description="frames in a batch at most")
    max_seconds: Annotated[float, Field(gt=0)] = Field(60.0, description="longer audio is quarantined")
    max_bad_share: Share = Field(0.01, description="the job fails when more than this share was quarantined")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="fixes the resampling")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: Threads = Field(1, description="CPU threads of the network")
    workers: Annotated[int, Field(ge=0, le=256)] = Field(
        0,
        description="processes that read audio ahead, and with a beam search as many that decode, while the network runs; 0: none",
    )

    @field_validator("audio", mode="before")
    @classmethod
    def _names_sets(cls, value: Any) -> Any:
        if not isinstance(value, str | dict) or not value:
            raise ValueError("give a folder of audio shards, or of several as {name: folder}")
        for name in value if isinstance(value, dict) else ():
            if not re.fullmatch(SET_NAME, str(name)):
                raise ValueError(
                    f"{name!r} cannot name a set, whose scores have a folder; use letters, digits, - and _"
                )
        return value

    @property
    def sets(self) -> dict[str, str]:
        """Folders of audio shards by the name of the set; a single folder is named by itself."""
        if isinstance(self.audio, dict):
            return self.audio
        return {
            re.sub(r"[^A-Za-z0-9_-]+", "-", self.audio.rstrip("/").rpartition("/")[2]).strip("-") or "test": self.audio
        }


class TranscribeSettings(DecodingSettings):
    """Audio → text, with any checkpoint: of files given on the command line, of sound as it arrives, or of a whole set of shards."""

    checkpoint: Location = Field(description="checkpoint or run folder, or its URL")
    audio: Location | None = Field(None, description="folder of audio shards (or its URL), in place of files")
    output: Location | None = Field(None, description="JSONL of key and text, for a set of shards")
    details: bool = Field(
        False,
        description="JSON lines with the words, their times and confidences, and the n-best texts, in place of text",
    )
    stream: bool = Field(
        False,
        description="(or --stream) print words as sound arrives from a file, standard input (-: WAV or raw 16-bit mono) or "
        "the microphone; needs a model of kind lstm",
    )
    piece_ms: Annotated[int, Field(ge=1, le=60_000)] = Field(
        100, description="stream: sound that is heard at once, in milliseconds"
    )
    raw_rate: Annotated[int, Field(ge=1000, le=768000)] | None = Field(
        None, description="stream: rate in Hz of raw sound on standard input; null takes the model's"
    )
    window_seconds: Annotated[float, Field(ge=5)] = Field(
        60.0,
        description="longer files are decoded in bounded memory: by an lstm as it hears them, by others in overlapping windows of "
        "this length",
    )
    batch_frames: Count = Field(4000, description="frames in a batch at most")
    max_seconds: Annotated[float, Field(gt=0)] = Field(
        3600.0, description="of a set of shards: longer audio is left out"
    )
    max_bad_share: Share = Field(0.01, description="a set fails when more than this share could not be read")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: Threads = Field(1, description="CPU threads of the network")

    @model_validator(mode="after")
    def _fits(self) -> TranscribeSettings:
        if bool(self.audio) != bool(self.output):
            raise ValueError("audio (a set of shards) and output (a JSONL file) go together")
        if self.stream and self.audio:
            raise ValueError("stream hears a file, - or the microphone; leave out audio and output")
        if self.raw_rate and not self.stream:
            raise ValueError("raw_rate is of raw sound on standard input; add --stream and give -, or leave it out")
        return self


class ScriptSettings(Settings):
    """A recipe's own Python script; it is called with --output and these arguments."""

    file: Location = Field(description="the script")
    output: Location = Field(description="folder or file that it writes")
    arguments: list[str | int | float] = Field(default_factory=list, description="further arguments")


#: the settings of each job: of a verb of the command line, or of a stage of a pipeline
SETTINGS: dict[str, type[Settings]] = {
    "prepare": PrepareSettings, "units": UnitsSettings, "lm": LmSettings, "train": TrainSettings, "label": LabelSettings,
    "transcribe": TranscribeSettings, "eval": EvalSettings, "script": ScriptSettings, "verify": VerifySettings,
    "inspect": InspectSettings, "plan": PlanSettings,
}  # fmt: skip


class StageSettings(Settings):
    """One stage of a pipeline."""

    verb: Literal["script", "prepare", "units", "lm", "train", "label", "transcribe", "eval"] = Field(
        description="what runs"
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="the verb's settings; for a script: file, output and arguments"
    )


class PipelineSettings(Settings):
    """Stages in order; a later one may read what an earlier one wrote."""

    variables: dict[str, Any] = Field(
        default_factory=dict, description="names for ${name} in the stages; overridden by name=value"
    )
    shared: dict[str, Any] = Field(default_factory=dict, description="a place for YAML anchors")
    stages: dict[str, StageSettings] = Field(min_length=1, description="name: stage")


S = TypeVar("S", bound=Settings)


def load_yaml(path: Path | str, as_typed: bool = False) -> dict[str, Any]:
    """Read a YAML mapping, safely: no tags that build objects, and every key once.

    Args:
        as_typed: words keep their spelling, for `build` to take them as the settings do that they belong to.

    Raises:
        UserError: when the file is missing, not YAML or not a mapping.
    """
    value = parse_yaml(read_text(path, "settings file"), str(path), as_typed)
    value = read(value) if isinstance(value, Typed) else value
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold `key: value` settings, not a {type(value).__name__}")
    return value


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply `a.b=value` assignments (a number steps into a list) to a copy of `values`.

    The value is kept as it was typed, for `build` to take as text, or as YAML, as its setting does.

    Raises:
        UserError: when an assignment has no `=`, or steps into something that has no keys.
    """
    import copy

    values = copy.deepcopy(values)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise UserError(f"{assignment}: not an override; write key=value, e.g. seed=1 or model.layers=3")
        here: Any = values
        *parents, last = path.split(".")
        for step in parents:
            here = _step(here, step, assignment)
        if isinstance(here, list):
            _step(here, last, assignment)
            here[int(last)] = Typed(text, source=assignment)
        elif isinstance(here, dict):
            here[last] = Typed(text, source=assignment)
        else:
            raise UserError(f"{assignment}: {last} cannot be set inside a {_kind(here)}")
    return values


def _kind(value: Any) -> str:
    return type(read(value) if isinstance(value, Typed) else value).__name__


def _step(here: Any, step: str, assignment: str) -> Any:
    if isinstance(here, list):
        if not step.isdigit() or int(step) >= len(here):
            raise UserError(f"{assignment}: {step} is not a position in a list of {len(here)} (they count from 0)")
        place: Any = int(step)
    elif isinstance(here, dict):
        place = step
        here.setdefault(step, {})
    else:
        raise UserError(f"{assignment}: {step} cannot be looked up inside a {_kind(here)}")
    if isinstance(here[place], Typed) and here[place].source:  # a group given whole just before
        inside = read(here[place])
        here[place] = inside if isinstance(inside, dict | list) else here[place]
    return here[place]


def build(kind: type[S], values: dict[str, Any], where: str, assignments: Iterable[str] = ()) -> S:
    """Validate `values` as settings of `kind`; `where` (a file, a command) opens every message.

    Args:
        assignments: `a.b=value` that went into `values` from the command line, which opens a message about one of them.

    Raises:
        UserError: naming the first wrong key or value, with the nearest valid key for an unknown one.
    """
    try:
        return kind.model_validate(landed(values, kind))
    except RecursionError:  # a YAML alias within itself
        raise UserError(f"{where}: nested too deeply; fix it") from None
    except ValidationError as error:
        # a misspelt key is also a missing one: name the misspelling
        first = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    # without what pydantic calls the alternatives of a type
    path = [str(step) for step in first["loc"] if not re.fullmatch(r"str|(list|dict|function-after)\[.*\]", str(step))]
    # of settings that do not fit together the job is named, not a class
    name = ".".join(path) or next((verb for verb, one in SETTINGS.items() if one is kind), kind.__name__)
    if any(f"{name}.".startswith(f"{assignment.partition('=')[0]}.") for assignment in assignments):
        where = "command line"
    if first["type"] == "extra_forbidden":
        known = _fields_at(kind, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
        raise UserError(f"{where}: unknown key {name}; {hint}")
    if first["type"] == "missing":
        raise UserError(f"{where}: the key {name} is missing; set it ({kind_help(kind, path)})")
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    shown = "" if isinstance(given, dict) else f" (given: {given!r})"
    raise UserError(f"{where}: {name}: {message[0].lower() + message[1:]}{shown}")


def group_of(annotation: Any) -> type[Settings] | None:
    """The group of settings that a field holds: itself, or in a list or an option."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((found for part in get_args(annotation) if (found := group_of(part))), None)


def _model_at(kind: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for step in path:
        field = kind.model_fields.get(step)
        if field is None:
            continue  # a position in a list, or a key of a mapping
        for candidate in [field.annotation, *get_args(field.annotation)]:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                kind = candidate
    return kind


def _fields_at(kind: type[BaseModel], path: list[str]) -> list[str]:
    return list(_model_at(kind, path).model_fields)


def kind_help(kind: type[BaseModel], path: list[str]) -> str:
    """The documentation of the setting at `path`."""
    field = _model_at(kind, path[:-1]).model_fields.get(path[-1])
    return (field.description if field else None) or "see `asr-kd --help`"
