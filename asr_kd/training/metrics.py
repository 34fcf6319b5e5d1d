"""What a run measures as it goes: `metrics.jsonl`, and what loggers are told."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import IO

from asr_kd.files import write_whole
from asr_kd.loggers import Loggers


class Metrics:
    """`metrics.jsonl`, and loggers; as a context manager it closes both.

    Args:
        step: what was written after this step is removed, as a resumed run measures it again.
        loggers: are told the same figures; they have started.
        write: whether anything is written; only the first process does.
    """

    def __init__(self, run: Path, step: int, loggers: Loggers, write: bool = True) -> None:
        self.path = run / "metrics.jsonl"
        self._file: IO[str] | None = None
        self._loggers, self._open = loggers, contextlib.ExitStack()
        if not write:
            return
        kept = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    break  # cut off by a crash: all that follows is newer than the saved state
        with write_whole(self.path, "w") as file:
            file.writelines(line + "\n" for line in kept)
        self._file = self._open.enter_context(self.path.open("a", encoding="utf-8"))
        self._open.push(loggers)

    def add(self, step: int, **values: float) -> None:
        """Write one line. Loggers hear a loss a second time under the name of its source, where a phase has several."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        told = {name: value for name, value in values.items() if name != "source"}
        if "source" in values:
            told[f"loss/phases.{values['phase']}.sources.{values['source']}"] = values["loss"]
        self._loggers.scalars(step, told)

    def flush(self) -> None:
        """Sync to disk; called before a state that refers to these lines is saved."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(*error)  # type: ignore[arg-type]
