"""Settings of `label`, `verify` and `moments`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from asr_kd.config.base import Count, Location, Natural, Positive, Sets, Settings, Share, check_owners
from asr_kd.config.knobs import (
    BATCH_FRAMES,
    DEVICE,
    FEATURES_ON,
    LOG,
    MAX_BAD_SHARE,
    MAX_SECONDS,
    MAX_WORKERS,
    MIN_WORKERS,
    PRECISION,
    RAY_ADDRESS,
    THREADS,
    WORKER_CPUS,
    Audio,
    FeaturesOn,
    Precision,
    Threads,
    check_workers,
)
from asr_kd.targets.settings import Keep

#: settings that decide what is kept of a teacher's distribution, and the modes they belong to
SELECTION = {
    "k": ("mass", "top_k", "occupancy", "hidden"),
    "mass": ("mass", "occupancy", "hidden"),
    "floor": ("mass", "occupancy", "hidden"),
    "draws": ("sampled",),
    "seed": ("sampled",),
    "temperature": ("mass", "top_k", "sampled", "hidden"),
    "hold_frames": ("alignment",),
}
#: modes that need the text of every utterance
OF_TEXT = ("alignment", "occupancy")
#: settings that decide what is kept of a teacher's hidden states, of mode hidden alone; and those of codes alone
HIDDEN, CODES = ("taps", "keep", "codebooks", "quantiser_frames"), ("codebooks", "quantiser_frames")
#: settings of the labelling engine `ray` alone
RAY = ("ray_address", "min_workers", "max_workers", "worker_cpus", "worker_gpus")


class LabelSettings(Settings):
    """Teacher over audio shards → soft-target shards."""

    sharing = frozenset({"log"})

    teacher: Location = Field(description="checkpoint folder, or its URL")
    audio: Audio
    output: Location = Field(description="folder of the soft-target shards, or its URL")
    mode: Literal["mass", "top_k", "sampled", "alignment", "occupancy", "hidden"] = Field(
        "mass",
        description="of the teacher's distribution the fewest units that reach a mass, the k best, or draws from it; "
        "or its forced alignment to the text; or how likely each unit is in each frame given the text (occupancy, kept as in mode mass); or what "
        "mass keeps, and hidden states (taps) beside it",
    )
    transcripts: Location | None = Field(
        None, description="alignment, occupancy: JSONL of key and text in place of the text in the shards"
    )
    hold_frames: Count = Field(
        1, description="alignment: frames that each unit lasts at least, where the blank follows it"
    )
    temperature: Positive = Field(
        1.0, description="the teacher's logits are divided by this; above 1 softens an over-confident teacher"
    )
    k: Annotated[int, Field(ge=1, le=255)] = Field(
        20, description="mass, top_k, occupancy, hidden: units kept a frame at most"
    )
    mass: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.999, description="mass, occupancy, hidden: enough units are kept for this mass"
    )
    floor: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="mass, occupancy, hidden: units less probable than this are not kept, the best one excepted"
    )
    draws: Annotated[int, Field(ge=1, le=255)] = Field(
        20, description="sampled: units drawn a frame, with replacement; their counts are kept"
    )
    seed: Natural = Field(0, description="sampled: fixes what is drawn")
    taps: list[str] = Field([], description="hidden: layers whose states are kept: layer.1, layer.2, …")
    keep: Keep = Field(
        "events",
        description="hidden: of each spike one vector (for samples: events), of each frame one, or codes of each frame: a byte a codebook",
    )
    codebooks: Annotated[int, Field(ge=1, le=64)] = Field(8, description="codes: bytes a frame and layer")
    quantiser_frames: Count = Field(
        50_000,
        description="codes: frames of the audio that the quantiser is trained on, before the first shard is labelled",
    )
    batch_frames: Count = BATCH_FRAMES
    max_seconds: Positive = MAX_SECONDS
    max_bad_share: Share = MAX_BAD_SHARE
    precision: Precision = PRECISION
    device: str = DEVICE
    features_on: FeaturesOn = FEATURES_ON
    threads: Threads = THREADS
    loader_workers: Natural = Field(
        0,
        description="local: processes that decode audio, and as many that encode, beside the teacher; 0 takes threads of the job",
    )
    engine: Literal["local", "ray"] = Field(
        "local", description="who works: this process, or a pool of workers on a Ray cluster (asr-kd[ray])"
    )
    ray_address: str | None = RAY_ADDRESS
    min_workers: Count = MIN_WORKERS
    max_workers: Count | None = MAX_WORKERS
    worker_cpus: Count = WORKER_CPUS
    log: list[str] = LOG
    worker_gpus: Share = Field(0.0, description="ray: share of a GPU that a worker takes up; 0 labels on CPUs")

    @model_validator(mode="after")
    def _fits(self) -> LabelSettings:
        check_owners(self, "mode", SELECTION | dict.fromkeys(HIDDEN, ("hidden",)))
        check_owners(self, "keep", dict.fromkeys(CODES, ("codes",)))
        if bool(self.taps) != (self.mode == "hidden"):
            raise ValueError("mode hidden needs taps: the layers whose states are kept, such as taps=[layer.1]")
        if twice := next((tap for tap in self.taps if self.taps.count(tap) > 1), None):
            raise ValueError(f"taps names {twice} twice; name each layer once")
        check_owners(self, "engine", dict.fromkeys(RAY, ("ray",)))
        check_workers(self.min_workers, self.max_workers)
        check_owners(self, "engine", {"loader_workers": ("local",)})
        if self.engine == "ray" and self.device.startswith("cuda") and not self.worker_gpus:
            raise ValueError(f"device {self.device} needs worker_gpus above 0 with engine ray")
        return self


class VerifySettings(Settings):
    """Soft targets against their audio and their teacher."""

    targets: Location = Field(description="folder of the soft-target shards, or its URL")
    audio: Sets = Field(description="folder of the audio shards that they answer, or its URL, or a list as of label")
    teacher: Location = Field(description="checkpoint folder of the teacher, or its URL")
    shards: Count | None = Field(10, description="shards that are read whole and labelled again; null takes all")
    seed: Natural = Field(0, description="which shards are drawn")
    transcripts: Location | None = Field(
        None, description="of an alignment or occupancy: the texts that it was made from"
    )
    max_difference: Share = Field(0.03, description="largest difference of a probability that still holds")
    max_top1_share: Share = Field(0.001, description="share of frames whose best unit may differ")
    report: Location | None = Field(None, description="JSON file for all that was found")
    batch_frames: Count = BATCH_FRAMES
    max_seconds: Positive = Field(60.0, description="of the labelling: longer audio is quarantined")
    precision: Precision = PRECISION
    device: str = DEVICE
    threads: Threads = THREADS


class MomentsSettings(Settings):
    """Audio that a teacher knows → moments of its features, which stand for the audio where students have none."""

    teacher: Location = Field(description="checkpoint folder, or its URL")
    audio: Audio
    output: Location = Field(description="file of the moments (.safetensors)")
    batch_frames: Count = BATCH_FRAMES
    max_seconds: Positive = MAX_SECONDS
    max_bad_share: Share = MAX_BAD_SHARE
    device: str = DEVICE
    threads: Threads = THREADS
