"""A logger that remembers, for tests of who is told."""

from __future__ import annotations

from typing import Any


class Kept:
    """Keeps what it is told, of all that were made."""

    told: list[tuple[Any, ...]] = []  # noqa: RUF012

    def start(self, config: dict[str, Any]) -> None:
        self.told.append(("start", config))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.told.append(("scalars", step, values))

    def end(self, status: str) -> None:
        self.told.append(("end", status))
