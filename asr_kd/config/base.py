"""What settings are made of: their base class, types, the knobs that several jobs have, and rules that several groups have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from asr_kd.errors import UserError
from asr_kd.files import spelled


class Settings(BaseModel):
    """A group of settings: immutable, finite, unknown keys refused, no silent conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
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
Audio = Annotated[Location, Field(description="folder of audio shards, or its URL (s3://…, gs://…)")]
Texts = Annotated[
    Location, Field(description="audio shards with text, a manifest (JSON lines) or a text file (a line an utterance)")
]

# what several jobs have with the same default; a job that says more of it declares its own
BATCH_FRAMES: Any = Field(4000, description="frames in a batch at most")
MAX_SECONDS: Any = Field(60.0, description="longer audio is quarantined")
MAX_BAD_SHARE: Any = Field(0.01, description="the job fails when more than this share was quarantined")
DEVICE: Any = Field("auto", description="auto, cpu, cuda or cuda:N")
THREADS: Any = Field(1, description="CPU threads of the network")


def is_default(settings: Settings, name: str) -> bool:
    """Whether a setting is as if it had not been given."""
    default = type(settings).model_fields[name].get_default(call_default_factory=True)
    return bool(getattr(settings, name) == default)


def check_given_once(settings: Settings, frames: str, milliseconds: str) -> None:
    """Refuse a length that is given in frames and in milliseconds; for validators, as `check_owners`."""
    if getattr(settings, milliseconds) is not None and not is_default(settings, frames):
        raise ValueError(f"{frames} and {milliseconds} say the same; give one")


def check_owners(settings: Settings, chooser: str, owners: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse a setting that was changed, where another value of `chooser` was chosen than those it belongs to.

    Args:
        owners: name of a setting: the values that it belongs to.
    """
    for name, values in owners.items():
        if getattr(settings, chooser) not in values and not is_default(settings, name):
            belongs = (
                f"settings of {name} belong" if isinstance(getattr(settings, name), Settings) else f"{name} belongs"
            )
            raise ValueError(f"{belongs} to {chooser} {' and '.join(values)} alone")


def group_of(annotation: Any) -> type[Settings] | None:
    """The group of settings that a field holds: itself, or in a list or an option."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((found for part in get_args(annotation) if (found := group_of(part))), None)
