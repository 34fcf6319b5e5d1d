"""Settings of an acoustic model."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from asr_kd.audio.settings import FeatureSettings
from asr_kd.config.base import Count, NotNegative, Settings, check_given_once, check_owners, is_default
from asr_kd.config.knobs import PRECISION, Precision

#: bits of a weight
Bits = Literal[2, 4, 8]
#: kinds that can run while audio arrives
STREAMING = ("lstm", "separable", "chunked_conformer", "emformer")
#: kinds whose first layer hears features, and not, as the others, what is as wide as a layer
HEARS_FEATURES = ("lstm", "blstm", "conv")
#: settings that came later, which some kinds alone have
OWNERS: dict[str, tuple[str, ...]] = {
    "chunk_frames": ("chunked_conformer", "emformer"), "left_frames": ("chunked_conformer", "emformer"),
    "right_frames": ("emformer",), "memory": ("emformer",), "projection": ("lstm", "blstm"), "rank": ("lstm", "blstm"),
}  # fmt: skip
#: settings that came later, and are not written where they are not used
LATER = frozenset({"projection", "rank", "bits"})
Frames = Annotated[int, Field(ge=0, le=10_000)]


class OutsideSettings(Settings):
    """A network that another program has trained."""

    kind: Literal["outside"] = Field("outside", description="a network from outside")
    family: str = Field(description="who runs it: huggingface, torchaudio, …")
    network: str = Field(description="its class there, or its name")
    precision: Precision = PRECISION

    @property
    def shape(self) -> str:
        """What it is, in a few words."""
        return f"{self.network} ({self.family}{'' if self.precision == 'float32' else f', {self.precision}'})"

    @property
    def bits(self) -> None:
        """Bits of a weight; None: as they are."""
        return None


class ModelSettings(Settings):
    """An acoustic model."""

    kind: Literal["lstm", "separable", "chunked_conformer", "emformer", "blstm", "conv", "conformer"] = Field(
        "lstm",
        description="network family; `lstm`, `separable`, `chunked_conformer` and `emformer` can run while audio arrives, `blstm`, `conv` "
        "and `conformer` hear whole utterances",
    )
    layers: Annotated[int, Field(ge=1, le=1000)] = Field(2, description="layers")
    size: Annotated[int, Field(ge=1, le=100_000)] = Field(160, description="hidden units of a layer (and direction)")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.1, description="dropout between layers")
    delay_frames: Annotated[int, Field(ge=0, le=32)] = Field(
        0, description="frames of future input an `lstm` or `separable` sees before it answers for a frame"
    )
    delay_ms: NotNegative | None = Field(None, description="the same in milliseconds: as many frames as it takes")
    kernel: Annotated[int, Field(ge=1, le=10_000)] = Field(5, description="convolution width in frames, of each layer")
    heads: Count = Field(4, description="attention heads")
    conditioned: list[Count] = Field(
        default_factory=list,
        description="layers behind which what the output layer would say there is added to what the next layer hears (not for `conv`)",
    )
    projection: Count | None = Field(
        None,
        description="outputs of a layer (and direction) of an `lstm` or `blstm`, fewer than size: a smaller network, and a faster stream; null: size",
    )
    rank: Count | None = Field(
        None,
        description="rank of the matrices of an `lstm` or `blstm`: a smaller network where it is below four fifths of size; null: full",
    )
    bits: Bits | None = Field(
        None,
        description="bits of a weight: the network runs on matrices rounded by output row, in training too; null: float32",
    )

    chunk_frames: Annotated[int, Field(ge=1, le=10_000)] = Field(
        5,
        description="`chunked_conformer`, `emformer`: frames that hear each other; a frame waits for the last of its chunk "
        "(and for right_frames)",
    )
    left_frames: Frames = Field(
        30, description="`chunked_conformer`, `emformer`: frames before a chunk that attention hears, in each layer"
    )
    right_frames: Frames = Field(0, description="`emformer`: frames behind a chunk that it hears")
    memory: Frames = Field(0, description="`emformer`: earlier chunks that it hears as one summary each")

    @model_serializer(mode="wrap")
    def _own(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the settings of other kinds and those not used, so that no fingerprint changes when new ones come."""
        said = {name: value for name, value in write(self).items() if self.kind in OWNERS.get(name, (self.kind,))}
        return {name: value for name, value in said.items() if value is not None or name not in LATER}

    @model_validator(mode="after")
    def _fits(self) -> ModelSettings:
        check_given_once(self, "delay_frames", "delay_ms")
        if self.kind not in ("lstm", "separable") and (self.delay_frames or self.delay_ms):
            raise ValueError("delay_frames belongs to kind lstm and separable alone")
        check_owners(self, "kind", OWNERS)
        if self.kind == "emformer" and not is_default(self, "kernel"):
            raise ValueError("kernel: an emformer has no convolution; leave it out")
        if self.kind == "separable" and not is_default(self, "heads"):
            raise ValueError("heads: a separable network has no attention; leave it out")
        if self.kind in ("conv", "conformer") and self.kernel % 2 == 0:
            raise ValueError("kernel must be odd")
        if self.kind in ("conformer", "chunked_conformer", "emformer") and self.size % self.heads:
            raise ValueError("size must be a multiple of heads")
        if self.conditioned and self.kind == "conv":
            raise ValueError("conditioned does not go with kind conv, an aligner; leave it out")
        if any(layer >= self.layers for layer in self.conditioned):
            raise ValueError("conditioned names layers before the last one; a layer must follow")
        if len(set(self.conditioned)) < len(self.conditioned):
            raise ValueError("conditioned names a layer twice; name each once")
        if self.projection and self.rank:
            raise ValueError("projection and rank both thin an LSTM's matrices; give one")
        if self.projection and self.projection >= self.size:
            raise ValueError("projection must be below size; leave it out to keep all outputs")
        return self

    @property
    def shape(self) -> str:
        """What it is, in a few words."""
        return f"{self.kind} {self.layers} × {self.size}"

    @property
    def width(self) -> int:
        """Outputs of a layer, of both directions together."""
        return (self.projection or self.size) * (2 if self.kind == "blstm" else 1)

    @property
    def taps(self) -> dict[str, int]:
        """Hidden states that can be asked for, with their widths: `layer.1` after the first layer, and so on.

        Of a Conformer also `attention.1`, …: queries, keys and values of a layer, one beside the other, all heads together.
        """
        width, layers = self.width, range(1, self.layers + 1)
        found = {f"layer.{layer}": width for layer in layers}
        return found | {f"attention.{layer}": 3 * width for layer in layers if self.kind == "conformer"}

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
