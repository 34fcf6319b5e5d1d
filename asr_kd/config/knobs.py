"""Settings shared by several jobs, declared once: type, default, help. A job with another help text declares its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from asr_kd.config.base import Sets

FeaturesOn = Literal["auto", "loader", "device"]
#: upper bound: torch aborts when the system refuses to create the threads
Threads = Annotated[int, Field(ge=1, le=1024)]
#: keys of `text.NORMALIZERS`
Normalizing = Literal["none", "basic", "english"]
Audio = Annotated[
    Sets,
    Field(
        description="folder of audio shards, or its URL (s3://…, gs://…); or a list of them, which are read as one set"
    ),
]
Texts = Annotated[
    Sets,
    Field(
        description="audio shards with text (a folder, or a list of them), a manifest (JSON lines) or a text file (a line an utterance)"
    ),
]

#: arithmetic of a network
Precision = Literal["float32", "bfloat16"]

BATCH_FRAMES: Any = Field(4000, description="frames in a batch at most")
MAX_SECONDS: Any = Field(60.0, description="longer audio is quarantined")
MAX_BAD_SHARE: Any = Field(0.01, description="the job fails when more than this share was quarantined")
DEVICE: Any = Field("auto", description="auto, cpu, cuda or cuda:N")
PRECISION: Any = Field(
    "float32",
    description="arithmetic of a network from outside: float32, or bfloat16 (autocast); its fingerprint tells them apart",
    exclude_if=lambda value: value == "float32",
)
FEATURES_ON: Any = Field(
    "auto",
    exclude_if=lambda value: value == "auto",
    description="where features are made: loader, beside the audio's decoding; or device, where the network is, of the sound that the "
    "loader has decoded; auto: device if that is a GPU",
)
LOG: Any = Field(
    [],
    exclude_if=lambda value: not value,  # jobs of before there was a choice stay as they are
    description="who is told the figures while it runs: tensorboard, wandb, mlflow, or what another package offers (asr_kd/README.md)",
)
THREADS: Any = Field(1, description="CPU threads of the network")
RAY_ADDRESS: Any = Field(
    None, description="ray: auto or host:port of the cluster; without it RAY_ADDRESS, or Ray is started on this machine"
)
MIN_WORKERS: Any = Field(1, description="ray: workers asked for at once, and kept to the end")
MAX_WORKERS: Any = Field(
    None, description="ray: workers at most while shards wait; null takes all that the cluster has room for"
)
WORKER_CPUS: Any = Field(1, description="ray: CPUs of the cluster that a worker takes up")


def made_on_device(wanted: FeaturesOn, device: str) -> bool:
    """Whether features are made where the network is, on a device of this type."""
    return wanted == "device" or (wanted == "auto" and device != "cpu")


def check_workers(least: int, most: int | None) -> None:
    """Refuse a pool whose upper bound is below the lower one; for validators."""
    if most and most < least:
        raise ValueError(f"max_workers {most} must not be below min_workers {least}")
