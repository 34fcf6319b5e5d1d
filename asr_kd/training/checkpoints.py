"""The training state: one safetensors file with everything a run needs to resume exactly."""

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
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from asr_kd.errors import UserError
from asr_kd.files import write_whole
from asr_kd.training.averaging import Scored
from asr_kd.training.batches import Lane
from asr_kd.training.distributed.ranks import Ranks, total

FORMAT = "asr_kd-training-state-3"
#: in a run's folder
STATE = Path("last") / "state.safetensors"


@dataclass
class Position:
    """Progress of a run.

    Attributes:
        cycle: cycle of the schedule, from 0.
        phase: phase of the cycle, from 0.
        turn: the lane whose batch is next.
        scored: the step that was scored last.
        world: number of processes that trained.
        audio_seconds: audio heard in the run.
        phase_seconds: audio heard in this phase of this cycle.
        phase_start: the step at which the phase began.
        start: scores before the first step.
        best: scores of the weights in `best/`.
        last: the latest scores.
        lowest: lowest CTC loss of all scores after the start.
        lanes: for each phase, the position of each lane.
        kept: steps whose checkpoints are kept to be averaged.
    """

    cycle: int = 0
    phase: int = 0
    turn: int = 0
    step: int = 0
    scored: int = 0
    world: int = 1
    audio_seconds: float = 0.0
    phase_seconds: float = 0.0
    phase_start: int = 0
    start: Scored | None = None
    best: Scored | None = None
    last: Scored | None = None
    lowest: float = float("inf")
    finished: bool = False
    lanes: list[list[Lane]] = field(default_factory=list)
    kept: list[Scored] = field(default_factory=list)


def save_state(
    run: Path,
    ranks: Ranks,
    model: nn.Module,
    optimizer: Optimizer,
    position: Position,
    average: AveragedModel | None = None,
    exchange: dict[str, Tensor] | None = None,
) -> None:
    """Write weights, their average, optimiser state, random state and position, atomically.

    With several processes each writes its own file; the first process writes last, and its step tells which files belong
    together.

    Args:
        position: progress of the run; `world` is set here.
        average: moving average of the weights, if there is one.
        exchange: state of the exchange between processes.
    """
    position.world = ranks.world
    tensors = _named("model.", model)
    if average is not None:
        tensors |= _named("average.", average)
    tensors |= {f"exchange.{name}": value for name, value in (exchange or {}).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    # one entry, because safetensors writes several in random order
    metadata = {"position": json.dumps({"format": FORMAT, **asdict(position)})}
    if not ranks.first:
        _write(_of_rank(run, ranks.rank, position.step), tensors, metadata)
    total(torch.zeros(1), ranks)  # wait until all have written
    if ranks.first:
        _write(run / STATE, tensors, metadata)
        current = {_of_rank(run, rank, position.step) for rank in range(1, ranks.world)}
        for stale in set((run / STATE).parent.glob("rank-*.safetensors")) - current:
            stale.unlink(missing_ok=True)


def _of_rank(run: Path, rank: int, step: int) -> Path:
    return (run / STATE).with_name(f"rank-{rank}-{step}.safetensors")


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with write_whole(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))


def load_state(
    run: Path, ranks: Ranks, model: nn.Module, optimizer: Optimizer, average: AveragedModel | None = None
) -> tuple[Position, dict[str, Tensor]]:
    """Restore what `save_state` wrote.

    If the number of processes has changed, all continue from the first one's weights and moments; state that belongs to one
    process (gradients not yet sent, block momentum, random state) is dropped.

    Args: see `save_state`; `model`, `optimizer` and `average` are changed in place.

    Returns:
        the position, and the state of the exchange between processes, empty if it was dropped.

    Raises:
        UserError: when a file is damaged, missing, or belongs to another network.
    """
    path = run / STATE
    position, tensors = _read(path)
    if position.world == ranks.world and not ranks.first:
        path = _of_rank(run, ranks.rank, position.step)
        tensors = _read(path)[1]
    try:
        for owner, prefix in ((model, "model."), (average, "average.")):
            if owner is not None:
                names = _named(prefix, owner)
                if odd := {name for name in tensors if name.startswith(prefix)} ^ names.keys():
                    raise KeyError(min(odd))
                owner.load_state_dict(dict(zip(owner.state_dict(), (tensors[name] for name in names), strict=True)))
        states: dict[int, dict[str, Any]] = {}
        for name, value in _part(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            states.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        if position.world != ranks.world:
            return position, {}
        torch.set_rng_state(tensors["random.cpu"])
        if torch.cuda.is_available() and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"])
        return position, _part(tensors, "exchange.")
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise _damaged(path, error) from None


def _named(prefix: str, owner: nn.Module) -> dict[str, Tensor]:
    """Tensors of a `Pupil`, or of its average, by their names in the file; the student's carry no `student.` prefix."""
    return {prefix + name.replace("student.", "", 1): value for name, value in owner.state_dict().items()}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _read(path: Path) -> tuple[Position, dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        described = {**json.loads(metadata.pop("position", "{}")), **metadata}
        if described.pop("format", None) != FORMAT:
            raise UserError(
                f"{path}: not a training state of this version of asr_kd; remove the run's folder and start again"
            )
        described["lanes"] = [[Lane.from_json(lane) for lane in lanes] for lanes in described["lanes"]]
        described["kept"] = [Scored(**one) for one in described.get("kept", [])]
        for name in ("start", "best", "last"):
            described[name] = Scored(**described[name]) if described.get(name) else None
        return Position(**described), tensors
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{path}: damaged training state ({reason}); remove the run's folder and start again")
