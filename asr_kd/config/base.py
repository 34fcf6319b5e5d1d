"""Settings: their base class, their types, and rules that several of them share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from asr_kd.errors import UserError
from asr_kd.files import spelled


class Settings(BaseModel):
    """A group of settings: immutable, finite, unknown keys refused, no silent conversion between types.

    Attributes:
        removed: settings of earlier versions, which files may still name.
        sharing: settings that say who does the work, or is told of it, and change nothing of what comes out.
    """

    removed: ClassVar[frozenset[str]] = frozenset()
    sharing: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


def _spelled(text: str) -> str:
    try:
        return spelled(text)
    except UserError as error:
        raise ValueError(str(error).removeprefix(f"{text}: ").removeprefix(f"{text!r}: ")) from None


#: name of a file or folder: `~` in front is the home folder; a URL is recognised by its scheme, and refused if misspelt
_PLACE = AfterValidator(_spelled)
Location = Annotated[str, _PLACE]


class Several(list[str]):
    """Folders of several sets of shards, which are read as one."""

    def __str__(self) -> str:
        return " + ".join(self)

    def __hash__(self) -> int:  # type: ignore[override]  # settings are immutable
        return hash(tuple(self))


#: folder of a set of shards, or those of several
Sets = Location | Annotated[list[Location], Field(min_length=1), AfterValidator(Several)]


def folders_of(sets: str | list[str]) -> list[str]:
    """The folders that such a setting names."""
    return [sets] if isinstance(sets, str) else sets


def is_default(settings: Settings, name: str) -> bool:
    """Whether a setting has its default value."""
    default = type(settings).model_fields[name].get_default(call_default_factory=True)
    return bool(getattr(settings, name) == default)


def check_given_once(settings: Settings, frames: str, milliseconds: str) -> None:
    """Refuse a length that is given both in frames and in milliseconds; for validators, like `check_owners`."""
    if getattr(settings, milliseconds) is not None and not is_default(settings, frames):
        raise ValueError(f"{frames} and {milliseconds} say the same; give one")


def check_owners(settings: Settings, chooser: str, owners: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse a setting that was changed though it does not belong to the chosen value of `chooser`.

    Args:
        chooser: name of the setting that chooses, such as `mode`.
        owners: name of a setting → the values of `chooser` that it belongs to.
    """
    for name, values in owners.items():
        value = getattr(settings, name)
        if getattr(settings, chooser) not in values and not is_default(settings, name):
            what = f"settings of {name} belong" if isinstance(value, Settings) else f"{name} belongs"
            raise ValueError(f"{what} to {chooser} {' and '.join(values)} alone")


def group_of(annotation: Any) -> type[Settings] | None:
    """The group of settings in the type of a field: itself, in a list, or optional."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((found for part in get_args(annotation) if (found := group_of(part))), None)


def named_places(settings: Settings) -> Iterator[tuple[str, str]]:
    """Of every `Location` in settings and their groups: the path of its key, such as `phases.0.sources.0.audio`, and its text."""
    for name, field in type(settings).model_fields.items():
        is_place = any(map(_is_place, (field.annotation, *field.metadata)))
        yield from _places(name, getattr(settings, name), is_place)


def _is_place(annotation: Any) -> bool:
    """Whether a type is `Location`, or has it among its parts."""
    return annotation is _PLACE or any(map(_is_place, get_args(annotation)))


def _places(path: str, value: Any, is_place: bool) -> Iterator[tuple[str, str]]:
    if isinstance(value, Settings):
        yield from ((f"{path}.{key}", text) for key, text in named_places(value))
    elif isinstance(value, dict | list):
        for step, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(f"{path}.{step}", item, is_place)
    elif is_place and isinstance(value, str):
        yield path, value
