"""What lies on disk, and how it streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asr_kd.shards.samples import Position as Position
    from asr_kd.shards.samples import dataset as dataset


def __getattr__(name: str) -> Any:  # settings and workers that need neither load this room at once
    if name in ("Position", "dataset"):
        from asr_kd.shards import samples

        return getattr(samples, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
