"""Which asr_kd this is."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    """The version of the installed package; `unknown` where its source alone is on the path."""
    try:
        return importlib.metadata.version("asr-kd")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
