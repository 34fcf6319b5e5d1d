"""What a run measures as it goes: `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from asr_kd.files import write_whole


class Metrics:
    """`metrics.jsonl` and TensorBoard events.

    Args:
        step: what was written after this step is removed, as a resumed run measures it again.
        write: whether anything is written; only the first process does.
    """

    def __init__(self, run: Path, step: int, tensorboard: bool, write: bool = True) -> None:
        self.path = run / "metrics.jsonl"
        self._file: IO[str] | None = None
        self._writer: Any = None
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
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, **values: float) -> None:
        """Write one line."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Sync to disk; called before a state that refers to these lines is saved."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()
