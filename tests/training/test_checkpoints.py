from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from asr_kd.errors import UserError
from asr_kd.training.averaging import Scored
from asr_kd.training.batches import Lane
from asr_kd.training.checkpoints import FORMAT, STATE, Position, load_state, save_state
from asr_kd.training.distributed.ranks import Ranks
from asr_kd.training.sources import Cursor


def learner(seed: int, size: int = 5) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, size), nn.Dropout(0.5), nn.BatchNorm1d(size), nn.Linear(size, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def steps(model: nn.Module, optimizer: torch.optim.AdamW, count: int) -> None:
    for _ in range(count):
        loss = (model(torch.randn(4, 3)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


POSITION = Position(
    cycle=3,
    phase=1,
    turn=2,
    step=40,
    audio_seconds=5.25,
    phase_seconds=0.1,
    phase_start=20,
    start=Scored(0, 1.0, 2.5, 6),
    best=Scored(20, 0.5, 1e-9, 2, 1),
    last=Scored(40, 1.0, 0.25),
    lowest=1e-9,
    lanes=[[Lane(3, [Cursor(number=2, shard=1, item=4, seconds=0.25, unused=1)])], [Lane(), Lane(0, [Cursor()])]],
    kept=[Scored(20, 0.5, 1e-9), Scored(40, 1.0, 0.25)],
)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    model, optimizer = learner(0)
    steps(model, optimizer, 3)
    save_state(tmp_path, Ranks(), model, optimizer, POSITION)
    return tmp_path / STATE


def test_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    model, optimizer = learner(0)
    steps(model, optimizer, 3)
    save_state(tmp_path, Ranks(), model, optimizer, POSITION, exchange={"residual": torch.arange(3.0)})
    steps(model, optimizer, 4)
    expected, drawn = model.state_dict(), torch.rand(1)

    other, other_optimizer = learner(1)
    steps(other, other_optimizer, 1)
    position, exchange = load_state(tmp_path, Ranks(), other, other_optimizer)
    assert position == POSITION and exchange["residual"].tolist() == [0, 1, 2]
    steps(other, other_optimizer, 4)
    assert torch.equal(torch.rand(1), drawn)
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_same_state_same_bytes(tmp_path: Path) -> None:
    model, optimizer = learner(0)
    steps(model, optimizer, 1)
    for number in range(6):
        save_state(tmp_path / str(number), Ranks(), model, optimizer, POSITION)
    assert len({(tmp_path / str(number) / STATE).read_bytes() for number in range(6)}) == 1


def test_a_fresh_position_survives(tmp_path: Path) -> None:
    model, optimizer = learner(0)
    save_state(tmp_path, Ranks(), model, optimizer, Position())
    assert load_state(tmp_path, Ranks(), *learner(1)) == (Position(), {})


def test_reads_a_state_whose_format_stands_apart(state: Path) -> None:
    with safetensors.safe_open(state, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    safetensors.torch.save_file(tensors, state, {"format": FORMAT, "position": json.dumps(asdict(POSITION))})
    assert load_state(state.parent.parent, Ranks(), *learner(1))[0] == POSITION


def cut(share: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def described(**changes: object) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        tensors = safetensors.torch.load_file(path)
        position = {name: value for name, value in (asdict(POSITION) | changes).items() if value is not None}
        safetensors.torch.save_file(tensors, path, {"position": json.dumps(position)})

    return change


def without(prefix: str) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = {
            name: value for name, value in safetensors.torch.load_file(path).items() if not name.startswith(prefix)
        }
        safetensors.torch.save_file(tensors, path, metadata)

    return change


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("unpickled",)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda path: path.unlink(), "damaged training state"),
    "empty": (cut(0), "damaged training state"),
    "cut in the header": (cut(0.1), "damaged training state"),
    "cut in the weights": (cut(0.9), "damaged training state"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Bomb())), "damaged training state"),
    "another format": (described(format="asr_kd-training-state-9"), "not a training state of this version"),
    "no format": (described(), "not a training state of this version"),
    "unknown position": (described(format=FORMAT, epoch=1), "damaged training state"),
    "bare weights": (lambda path: safetensors.torch.save_file({"w": torch.zeros(1)}, path), "not a training state"),
    "no random state": (without("random.cpu"), "damaged training state"),
    "a weight missing": (without("model.0.weight"), "damaged training state"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_sentence(damage: str, state: Path) -> None:
    change, message = DAMAGE[damage]
    change(state)
    with pytest.raises(UserError, match=message) as caught:
        load_state(state.parent.parent, Ranks(), *learner(0))
    assert str(state) in str(caught.value) and "\n" not in str(caught.value)


def test_another_network_is_refused(state: Path) -> None:
    with pytest.raises(UserError, match="damaged training state") as caught:
        load_state(state.parent.parent, Ranks(), *learner(0, size=6))
    assert "\n" not in str(caught.value)
