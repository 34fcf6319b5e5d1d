"""What is to be measured of a task, where it lies, and which values the development set chooses."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import Arm, filled, student_of, task_of

from asr_kd.files import read_json


@dataclass(frozen=True)
class Plan:
    """What is to be measured of a task.

    Attributes:
        root: folder of all tasks.
        variables: in place of those of the task's file.
    """

    task: str
    arms: list[Arm]
    seeds: range
    tuned: range
    root: Path
    variables: dict[str, Any]

    def run(self, seed: int) -> Path:
        """Folder of a seed."""
        return self.root / self.task / f"seed{seed}"

    def value(self, arm: Arm) -> Any:
        """The value of an arm's setting with the lowest development WER over the tuning seeds; then the lowest loss."""
        return min(arm.values, key=lambda value: self.development(arm, value)) if len(arm.values) > 1 else arm.values[0]

    def development(self, arm: Arm, value: Any) -> tuple[float, float]:
        """Development WER and CTC loss of an arm with a value, means of the tuning seeds."""
        said = [
            read_json(self.run(seed) / arm.stage(value) / "best" / "checkpoint.json")["training"] for seed in self.tuned
        ]
        wer, loss = (statistics.mean(one[f"development_{name}"] for one in said) for name in ("wer", "loss"))
        return wer, loss

    def settings(self, arm: Arm) -> dict[str, Any]:
        """Settings of `train` of an arm with the first seed and its chosen value."""
        described = task_of(self.task, self.seeds[0], self.variables, str(self.root))
        return dict(filled(student_of(described["stages"], arm, self.value(arm)), described["values"]))
