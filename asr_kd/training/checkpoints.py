"""The training state: one safetensors file with everything a run needs to resume exactly."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from asr_kd.distillation.answers import CYCLE
from asr_kd.distillation.guard import Watch
from asr_kd.errors import UserError
from asr_kd.files import write_whole
from asr_kd.training.averaging import Scored
from asr_kd.training.batches import Lane
from asr_kd.training.distributed.ranks import total
from asr_kd.training.step import Learner, Position

FORMAT = "asr_kd-training-state-3"
#: in a run's folder
STATE = Path("last") / "state.safetensors"


def save_state(run: Path, learner: Learner) -> None:
    """Write weights, their averages, the run's own teachers, optimiser state, random state and position, atomically.

    With several processes each writes its own file; the first process writes last, and its step tells which files belong
    together.
    """
    ranks, position = learner.ranks, learner.position
    position.world = ranks.world
    tensors = _named("model.", learner.pupil)
    if learner.average is not None:
        tensors |= _named("average.", learner.average)
    if learner.taught_by is not None:
        tensors |= _named("taught_by.", learner.taught_by)
    if CYCLE in learner.teachers:
        tensors |= _named("cycle.", learner.teachers[CYCLE])
    for source, watch in learner.watches.items():
        tensors[f"watch.{source}"] = torch.tensor(astuple(watch), dtype=torch.float64)
    tensors |= {f"exchange.{name}": value for name, value in learner.exchange.state_dict().items()}
    for index, state in learner.optimizer.state_dict()["state"].items():
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


def load_state(run: Path, learner: Learner) -> dict[str, Tensor]:
    """Restore what `save_state` wrote, but for the exchange between processes, whose state is returned.

    If the number of processes has changed, all continue from the first one's weights and moments; state that belongs to one
    process (gradients not yet sent, block momentum, random state, what a guard has seen) is dropped.

    Raises:
        UserError: when a file is damaged, missing, or belongs to another network.
    """
    path, ranks, optimizer = run / STATE, learner.ranks, learner.optimizer
    position, tensors = _read(path)
    if position.world == ranks.world and not ranks.first:
        path = _of_rank(run, ranks.rank, position.step)
        tensors = _read(path)[1]
    learner.position = position
    try:
        if any(name.startswith("cycle.") for name in tensors):
            learner.teachers[CYCLE] = deepcopy(learner.pupil.student)
        owners = {
            "model.": learner.pupil, "average.": learner.average, "taught_by.": learner.taught_by,
            "cycle.": learner.teachers.get(CYCLE),
        }  # fmt: skip
        for prefix, owner in owners.items():
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
            return {}
        watched = _part(tensors, "watch.").items()
        learner.watches = {int(source): Watch(*values.tolist()) for source, values in watched}
        torch.set_rng_state(tensors["random.cpu"])
        if torch.cuda.is_available() and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"])
        return _part(tensors, "exchange.")
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
