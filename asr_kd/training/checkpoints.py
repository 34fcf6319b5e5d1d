"""The training checkpoint: one safetensors file with everything that a run needs to go on as if never stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from asr_kd.errors import UserError
from asr_kd.files import write_whole
from asr_kd.training.batches import Lane

FORMAT = "asr_kd-training-state-2"


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        cycle, phase: of the schedule; turn: the lane whose batch is next; lanes: of each phase, where each lane stands.
    """

    cycle: int = 0
    phase: int = 0
    turn: int = 0
    step: int = 0
    audio_seconds: float = 0.0
    phase_seconds: float = 0.0
    best_wer: float = float("inf")
    best_loss: float = float("inf")
    finished: bool = False
    lanes: list[list[Lane]] = field(default_factory=list)


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    position: Position,
    average: AveragedModel | None = None,
) -> None:
    """Write weights, their average, optimiser state, random state and position, whole or not at all."""
    tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in model.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    # one entry, because safetensors writes several in random order
    metadata = {"position": json.dumps({"format": FORMAT, **asdict(position)})}
    with write_whole(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel | None = None
) -> Position:
    """Restore what `save_state` wrote and return the position.

    Raises:
        UserError: when the file is damaged or belongs to another network.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        described = {**json.loads(metadata.pop("position", "{}")), **metadata}
        if described.pop("format", None) != FORMAT:
            raise UserError(
                f"{path}: not a training state of this version of asr_kd; remove the run's folder and start again"
            )
        for owner, prefix in ((model, "model."), (average, "average.")):
            if owner is not None:
                saved = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
                owner.load_state_dict(saved)
        states: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                states.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["random.cpu"])
        if torch.cuda.is_available() and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"])
        described["lanes"] = [[Lane.from_json(lane) for lane in lanes] for lanes in described["lanes"]]
        return Position(**described)
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged training state ({reason}); remove the run's folder and start again") from None
