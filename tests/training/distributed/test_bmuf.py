"""BMUF over processes against the same algebra in one, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asr_kd.training.distributed.bmuf import Bmuf
from asr_kd.training.distributed.ranks import Ranks, gather
from asr_kd.training.settings import BmufSettings

STEPS = 14
FREE = {"block_steps": 4, "warmup_steps": 0}

#: name: settings, optimiser
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "classical": ({**FREE, "nesterov": False}, "sgd"),
    "nesterov": ({**FREE, "nesterov": True}, "sgd"),
    "own momentum and rate": ({**FREE, "block_momentum": 0.3, "block_rate": 0.7}, "sgd"),
    "model averaging": ({**FREE, "block_momentum": 0.0}, "sgd"),
    "after a warm-up": ({"block_steps": 3, "warmup_steps": 4}, "sgd"),
    "keep": ({**FREE, "optimizer_state": "keep"}, "adamw"),
    "average": ({**FREE, "optimizer_state": "average"}, "adamw"),
    "reset": ({**FREE, "optimizer_state": "reset"}, "adamw"),
}


def cases(world: int) -> list[str]:
    """What is looked at: with four ranks, only where their number matters."""
    return list(CASES) if world == 2 else ["nesterov", "after a warm-up", "average"]


def network() -> nn.Module:
    torch.manual_seed(3)
    # no bias before the norm: its gradient would be rounding error, which AdamW scales up
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), 0.1)
    return torch.optim.AdamW(model.parameters(), 0.05, betas=(0.9, 0.98))


def frames(rank: int, step: int) -> int:
    """Ranks see different numbers of frames; all but the first see none in the third block of four."""
    return 0 if rank and 8 <= step < 12 else 2 + (3 * rank + 2 * step) % 5


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(100 * step + rank)
    count = frames(rank, step) or 2
    return tuple(torch.randn(count, size, generator=random, dtype=torch.float64) for size in (3, 2))  # type: ignore[return-value]


def mean_loss(model: nn.Module, rank: int, step: int) -> Tensor:
    inputs, wanted = batch(rank, step)
    return ((model(inputs) - wanted) ** 2).mean()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters()])


def statistics(model: nn.Module) -> Tensor:
    return torch.cat(
        [one.double().flatten() for name, one in model.named_buffers() if name.split(".")[-1] != "num_batches_tracked"]
    )


def train(bmuf: Bmuf, steps: range) -> None:
    for step in steps:
        own, everyone = frames(bmuf.ranks.rank, step), sum(frames(rank, step) for rank in range(bmuf.ranks.world))
        share = bmuf.begin_step(own, everyone)
        bmuf.optimizer.zero_grad()
        (share * mean_loss(bmuf.network, bmuf.ranks.rank, step)).backward()
        bmuf.average_gradients()
        bmuf.optimizer.step()
        bmuf.end_step()


def job(ranks: Ranks) -> dict[str, Any]:
    """What each process does: every case; then one again that is stopped within a block."""
    results: dict[str, Any] = {}
    for name in cases(ranks.world):
        settings, kind = CASES[name]
        model = network()
        bmuf = Bmuf(model, optimizer(kind, model), BmufSettings(**settings), ranks)
        train(bmuf, range(STEPS))
        before, local = bmuf.traffic.reduced, flat(model)
        with bmuf.global_weights():
            unsettled = flat(model)
        assert torch.equal(local, flat(model)) and not bmuf.settled
        bmuf.settle()
        meeting = bmuf.traffic.reduced - before
        with bmuf.global_weights():
            results[name] = {
                "weights": flat(model),
                "unsettled": unsettled,
                "start": local,
                "statistics": statistics(model),
            }
        results[name] |= {"look-ahead": flat(model), "meeting": meeting, "settled": bmuf.settled}
        bmuf.settle()
        assert bmuf.traffic.reduced == before + meeting, "nothing to meet for"
    model = network()
    first = Bmuf(model, optimizer("adamw", model), BmufSettings(**FREE), ranks)
    train(first, range(10))
    saved = copy.deepcopy((model.state_dict(), first.optimizer.state_dict(), first.state_dict()))
    train(first, range(10, STEPS))
    other = network()
    second = Bmuf(other, optimizer("adamw", other), BmufSettings(**FREE), ranks)
    for owner, state in zip((other, second.optimizer, second), saved, strict=True):
        owner.load_state_dict(state)
    train(second, range(10, STEPS))
    first.settle()
    second.settle()
    results["resumed"] = torch.equal(flat(model), flat(other)) and first.traffic == second.traffic
    second.restart()
    with second.global_weights():
        results["restarted"] = torch.equal(flat(model), flat(other))
    results["gathered"] = gather({"rank": ranks.rank, "text": "é" * ranks.rank}, ranks)
    return results


def reference(world: int, settings: BmufSettings, kind: str) -> dict[str, Tensor]:
    """The algebra of the docstring, with a model for each rank in one process."""
    models = [network() for _ in range(world)]
    optimizers = [optimizer(kind, model) for model in models]
    momentum = 1 - 1 / world if settings.block_momentum is None else settings.block_momentum
    weights = start = flat(models[0])
    change = torch.zeros_like(weights)
    seen = [0] * world

    def put(vector: Tensor) -> None:
        for model in models:
            nn.utils.vector_to_parameters(vector.clone(), model.parameters())

    def mean(values: list[Tensor]) -> Tensor:
        return sum((count * value for count, value in zip(seen, values, strict=True)), torch.zeros(())) / sum(seen)

    def meet() -> None:
        nonlocal weights, start, change, seen
        change = momentum * change + settings.block_rate * mean([flat(model) - start for model in models])
        weights = weights + change
        start = weights + momentum * change if settings.nesterov else weights
        put(start)
        for buffers in zip(*(model.buffers() for model in models), strict=True):
            if buffers[0].is_floating_point():
                value = mean([one.clone() for one in buffers])
                for one in buffers:
                    one.copy_(value)
        for index, own in enumerate(optimizers):
            if settings.optimizer_state == "reset":
                own.state.clear()
            elif settings.optimizer_state == "average" and own.state and index == 0:
                for places in zip(*(one.param_groups[0]["params"] for one in optimizers), strict=True):
                    for name in ("exp_avg", "exp_avg_sq"):
                        states = [one.state[place] for one, place in zip(optimizers, places, strict=True)]
                        value = mean([state[name].clone() for state in states])
                        for state in states:
                            state[name].copy_(value)
        seen = [0] * world

    for step in range(STEPS):
        counts = [frames(rank, step) for rank in range(world)]
        losses = [mean_loss(model, rank, step) for rank, model in enumerate(models)]
        if step < settings.warmup_steps:
            places = [list(model.parameters()) for model in models]
            each = [torch.autograd.grad(loss, own) for loss, own in zip(losses, places, strict=True)]
            for index in range(len(places[0])):
                gradient = sum(count * own[index] for count, own in zip(counts, each, strict=True)) / sum(counts)
                for own in places:
                    own[index].grad = torch.as_tensor(gradient).clone()
        else:
            for rank, loss in enumerate(losses):
                optimizers[rank].zero_grad()
                (loss * (counts[rank] > 0)).backward()
                seen[rank] += counts[rank]
        for one in optimizers:
            one.step()
        if step + 1 == settings.warmup_steps:
            weights = start = flat(models[0])
        done = step + 1 - settings.warmup_steps
        if done > 0 and done % settings.block_steps == 0:
            meet()
    unsettled = weights
    meet()
    return {"weights": weights, "unsettled": unsettled, "look-ahead": start, "statistics": statistics(models[0])}


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, together: Any) -> list[dict[str, Any]]:
    return together(request.param, job)


def test_global_model_and_look_ahead_follow_the_algebra(results: list[dict[str, Any]]) -> None:
    for name in cases(len(results)):
        _follows_the_algebra(results, name)


def _follows_the_algebra(results: list[dict[str, Any]], name: str) -> None:
    settings, kind = CASES[name]
    expected = reference(len(results), BmufSettings(**settings), kind)
    for rank in results:
        for what, value in expected.items():
            torch.testing.assert_close(
                rank[name][what], value, rtol=1e-12, atol=1e-12, msg=lambda text, what=what: f"{name}, {what}: {text}"
            )
        for what in expected:
            assert torch.equal(rank[name][what], results[0][name][what]), f"{what} is the same on all ranks to the bit"
    assert results[0][name]["settled"]
    assert not torch.equal(results[0][name]["start"], results[1][name]["start"]), (
        "within a block the ranks go their own ways"
    )


def test_look_ahead_and_global_model_are_two_points(results: list[dict[str, Any]]) -> None:
    for name, apart in (("nesterov", True), ("classical", False), ("model averaging", False)):
        if name in results[0]:
            assert torch.equal(results[0][name]["weights"], results[0][name]["look-ahead"]) != apart


def test_what_a_meeting_sends(results: list[dict[str, Any]]) -> None:
    model = network()
    elements, buffers = len(flat(model)), len(statistics(model))
    alone = 8 * (elements + 1 + buffers + 1)
    counts = 4 * len(list(model.parameters()))  # AdamW keeps one float32 a parameter
    for name, expected in (("keep", alone), ("reset", alone), ("average", alone + 8 * (2 * elements + 1) + counts)):
        if name in results[0]:
            assert results[0][name]["meeting"] == expected


def test_a_run_stopped_within_a_block_goes_on_to_the_bit(results: list[dict[str, Any]]) -> None:
    assert all(rank["resumed"] for rank in results)


def test_a_restart_takes_the_weights_of_now_for_the_global_model(results: list[dict[str, Any]]) -> None:
    assert all(rank["restarted"] for rank in results)


def test_ranks_hear_each_other_in_order(results: list[dict[str, Any]]) -> None:
    said = [{"rank": rank, "text": "é" * rank} for rank in range(len(results))]
    assert all(rank["gathered"] == said for rank in results)


class TwoHeads(nn.Module):
    """The second head is used by some ranks alone, and by them in some steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.trunk, self.first, self.second = (nn.Linear(3, 3).double() for _ in range(3))

    def loss(self, rank: int, step: int, zeros: bool) -> Tensor:
        inputs, _ = batch(rank, step)
        hidden = torch.tanh(self.trunk(inputs))
        loss = (self.first(hidden) ** 2).mean()
        if rank % 2 and step % 3:
            loss = loss + ((self.second(hidden) - 1) ** 2).mean()
        elif zeros:
            loss = loss + 0.0 * self.second(hidden).sum()
        return loss


def unused_job(ranks: Ranks) -> dict[str, Any]:
    """With weights that a rank's loss does not reach, and with gradients of nought in their place; the last rank begins late."""
    results: dict[str, Any] = {}
    for name, settings in (("warm-up", {"block_steps": 3, "warmup_steps": 4}), ("blocks", {**FREE, "block_steps": 3})):
        for zeros in (False, True):
            model = TwoHeads()
            bmuf = Bmuf(model, optimizer("adamw", model), BmufSettings(**settings), ranks)
            for step in range(9):
                idle = ranks.rank == ranks.world - 1 and step < 3
                everyone = 2 * (ranks.world - (step < 3))
                share = bmuf.begin_step(0 if idle else 2, everyone)
                bmuf.optimizer.zero_grad()
                if not idle or bmuf.averages:
                    (share * model.loss(ranks.rank, step, zeros)).backward()
                    bmuf.average_gradients()
                    bmuf.optimizer.step()
                bmuf.end_step()
            assert bmuf.settled or not bmuf.settle()
            results[f"{name} {zeros}"] = flat(model)
    return results


def test_weights_that_a_rank_does_not_use_have_gradients_of_nought(together: Any) -> None:
    results = together(2, unused_job)
    for name in ("warm-up", "blocks"):
        for rank in results:
            assert torch.equal(rank[f"{name} False"], results[0][f"{name} False"])
        torch.testing.assert_close(results[0][f"{name} False"], results[0][f"{name} True"], rtol=1e-12, atol=1e-12)
    assert not torch.equal(results[0]["warm-up False"], flat(TwoHeads()))
