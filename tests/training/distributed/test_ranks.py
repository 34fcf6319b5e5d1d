from __future__ import annotations

import socket

import pytest
import torch
from torch import nn

from asr_kd.config.load import build
from asr_kd.errors import UserError
from asr_kd.training.distributed import make_exchange
from asr_kd.training.distributed.exchange import Traffic
from asr_kd.training.distributed.ranks import Ranks, gather, joined, total
from asr_kd.training.settings import DistributedSettings

CPU = torch.device("cpu")
WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_one_process_joins_nothing_and_hears_itself(environment: dict[str, str]) -> None:
    with joined(CPU, environment) as ranks:
        assert ranks == Ranks() and ranks.first
        assert not torch.distributed.is_initialized()
        values = torch.tensor([1.0, 2.0])
        assert torch.equal(total(values, ranks), values) and total(values, ranks) is not values
        assert gather({"a": 1}, ranks) == [{"a": 1}]


@pytest.mark.parametrize(
    ("change", "device", "message"),
    [
        ({"RANK": ""}, "cpu", "RANK is not set though WORLD_SIZE is; start the processes with torchrun"),
        ({"WORLD_SIZE": "two"}, "cpu", "WORLD_SIZE: 'two' is not a number"),
        ({"RANK": "2"}, "cpu", "RANK 2 is not below WORLD_SIZE 2"),
        ({}, "cuda:0", "device: cuda:0 is one GPU for 2 processes; set device=cuda"),
        ({"LOCAL_RANK": "64"}, "cuda", "GPUs and more processes"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(change: dict[str, str], device: str, message: str) -> None:
    with pytest.raises(UserError, match=message), joined(torch.device(device), {**WHOLE, **change}):
        pass


def test_others_that_do_not_answer_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {**WHOLE, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    from datetime import timedelta

    monkeypatch.setattr("asr_kd.training.distributed.ranks.PATIENCE", timedelta(milliseconds=200))
    with pytest.raises(UserError, match=f"127.0.0.1:{port}: process 1 of 2 could not join the others"), joined(CPU):
        pass


def test_a_single_process_trains_plainly_whatever_the_method() -> None:
    for values in ({"method": "bmuf"}, {"compression": "threshold"}):
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        exchange = make_exchange(model, optimizer, DistributedSettings.model_validate(values), Ranks())
        assert exchange.network is model and exchange.begin_step(7, 7) == 1.0 and exchange.settled
        expected = (model.weight - 0.1 * torch.ones(1, 2)).detach()
        exchange.network(torch.ones(1, 2)).sum().backward()
        exchange.average_gradients()
        optimizer.step()
        exchange.end_step()
        exchange.settle()
        with exchange.global_weights():
            assert torch.equal(model.weight, expected)
        assert exchange.traffic == Traffic(1)
        exchange.load_state_dict(exchange.state_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "bmuf", "compression": "threshold"}, "compression threshold belongs to method ddp alone"),
        ({"bmuf": {"block_steps": 9}}, "settings of bmuf belong to method bmuf alone"),
        ({"compression": "powersgd", "threshold": {"density": 0.1}}, "settings of threshold belong to compression"),
        ({"compression": "threshold", "threshold": {"density": None}}, "set threshold or density"),
        ({"method": "bmuf", "bmuf": {"block_momentum": 1.0}}, "bmuf.block_momentum"),
        ({"compression": "powersgd", "powersgd": {"warmup_steps": 1}}, "powersgd.warmup_steps"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(DistributedSettings, values, "here")
