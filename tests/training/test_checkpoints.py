from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from asr_kd.errors import UserError
from asr_kd.training.averaging import Scored
from asr_kd.training.batches import Lane
from asr_kd.training.checkpoints import FORMAT, STATE, load_state, save_state
from asr_kd.training.distributed.exchange import Exchange
from asr_kd.training.distributed.ranks import Ranks
from asr_kd.training.sources import Cursor
from asr_kd.training.step import Learner, Position


def learner(seed: int, size: int = 5, **more: Any) -> Learner:
    torch.manual_seed(seed)
    model: Any = nn.Sequential(nn.Linear(3, size), nn.Dropout(0.5), nn.BatchNorm1d(size), nn.Linear(size, 2))
    settings: Any = None
    return Learner(settings, model, torch.optim.AdamW(model.parameters(), lr=0.1), Exchange(model, Ranks()), **more)


def steps(one: Learner, count: int) -> None:
    for _ in range(count):
        loss = (one.exchange.network(torch.randn(4, 3)) ** 2).mean()
        one.optimizer.zero_grad()
        loss.backward()
        one.optimizer.step()


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
    one = learner(0, position=POSITION)
    steps(one, 3)
    save_state(tmp_path, one)
    return tmp_path / STATE


def test_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    one = learner(0, position=POSITION)
    steps(one, 3)
    one.exchange.traffic.gathered = 7
    save_state(tmp_path, one)
    steps(one, 4)
    expected, drawn = one.pupil.state_dict(), torch.rand(1)

    other = learner(1)
    steps(other, 1)
    exchange = load_state(tmp_path, other)
    assert other.position == POSITION and exchange["traffic"].tolist() == [0, 7, 0]
    steps(other, 4)
    assert torch.equal(torch.rand(1), drawn)
    for name, value in other.pupil.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_same_state_same_bytes(tmp_path: Path) -> None:
    one = learner(0, position=POSITION)
    steps(one, 1)
    for number in range(6):
        save_state(tmp_path / str(number), one)
    assert len({(tmp_path / str(number) / STATE).read_bytes() for number in range(6)}) == 1


def test_a_fresh_position_survives(tmp_path: Path) -> None:
    save_state(tmp_path, learner(0))
    other = learner(1, position=POSITION)
    load_state(tmp_path, other)
    assert other.position == Position()


def test_reads_a_state_whose_format_stands_apart(state: Path) -> None:
    with safetensors.safe_open(state, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    safetensors.torch.save_file(tensors, state, {"format": FORMAT, "position": json.dumps(asdict(POSITION))})
    other = learner(1)
    load_state(state.parent.parent, other)
    assert other.position == POSITION


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
        load_state(state.parent.parent, learner(0))
    assert str(state) in str(caught.value) and "\n" not in str(caught.value)


def test_another_network_is_refused(state: Path) -> None:
    with pytest.raises(UserError, match="damaged training state") as caught:
        load_state(state.parent.parent, learner(0, size=6))
    assert "\n" not in str(caught.value)
