"""Compressed gradients over processes: what is sent, what stays behind, and that all ranks end up with the same."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from asr_kd.training.distributed import Exchange, compression, make_exchange
from asr_kd.training.distributed.compression import ThresholdCompression, pack, round_threshold, take, unpack
from asr_kd.training.distributed.ranks import Ranks
from asr_kd.training.settings import DistributedSettings

DENSITY = 0.02
LEARNING = 200
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "threshold": {"compression": "threshold", "threshold": {"density": DENSITY, "warmup_steps": 3}},
    "powersgd": {"compression": "powersgd", "powersgd": {"warmup_steps": 3}},
}
FIXED = {"compression": "threshold", "threshold": {"density": None, "threshold": 0.003, "warmup_steps": 0}}


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 8))


def flat(tensors: Any) -> Tensor:
    return torch.cat([one.detach().flatten() for one in tensors]).clone()


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Something that can be learned; the ranks' batches differ in size."""
    inputs = torch.randn(16 + 8 * ((rank + step) % 2), 16, generator=torch.Generator().manual_seed(1000 * step + rank))
    return inputs, torch.tanh(inputs[:, :8] - inputs[:, 8:].roll(1, dims=1) * 0.5)


def frames(ranks: Ranks, step: int) -> tuple[int, int]:
    """Of this rank's batch, and of all."""
    return len(batch(ranks.rank, step)[0]), sum(len(batch(rank, step)[0]) for rank in range(ranks.world))


def mean_loss(model: nn.Module, rank: int, step: int) -> Tensor:
    inputs, wanted = batch(rank, step)
    return ((model(inputs) - wanted) ** 2).mean()


def start(settings: dict[str, Any], ranks: Ranks) -> tuple[nn.Module, torch.optim.Optimizer, Exchange]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, make_exchange(model, optimizer, DistributedSettings.model_validate(settings), ranks)


def train(exchange: Exchange, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        share = exchange.begin_step(*frames(exchange.ranks, step))
        optimizer.zero_grad()
        (share * mean_loss(exchange.network, exchange.ranks.rank, step)).backward()
        exchange.average_gradients()
        optimizer.step()
        exchange.end_step()


def counted(message: Tensor, elements: int) -> Tensor:
    """1 for each element that a message has with a plus, -1 for each with a minus."""
    places, negative = unpack(message, elements)
    return torch.zeros(elements).index_add(0, places, 1.0 - 2.0 * negative)


def job(ranks: Ranks) -> dict[str, Any]:
    """What each process does."""
    dist._DEFAULT_FIRST_BUCKET_BYTES = 4000  # two buckets or more, which DDP sorts anew after its first step
    results: dict[str, Any] = {"resumed": {}}
    for name, settings in CASES.items():
        model, optimizer, exchange = start(settings, ranks)
        states = []
        for steps in (range(2), range(2, 8), range(8, 14)):  # it stops within the warm-up, and after it
            train(exchange, optimizer, steps)
            states.append(copy.deepcopy((model.state_dict(), optimizer.state_dict(), exchange.state_dict())))
        holds = []
        for stop, state in zip((2, 8), states, strict=False):
            again, other_optimizer, other = start(settings, ranks)
            for owner, saved in zip((again, other_optimizer, other), state, strict=True):
                owner.load_state_dict(saved)
            train(other, other_optimizer, range(stop, 14))
            holds.append(torch.equal(flat(model.parameters()), flat(again.parameters())))
            holds.append(exchange.traffic == other.traffic)
        results["resumed"][name] = all(holds)
        results[name] = {"weights": flat(model.parameters()), "traffic": vars(exchange.traffic)}
    results["exact"], results["bytes"] = _follow_messages(ranks)
    results["learned"] = _learn(ranks) if ranks.world == 2 else {}
    results["not finite"] = _one_bad_gradient(ranks)
    results["clipped"] = _clip(ranks)
    results["freed"] = [_freed(settings, ranks) for settings in CASES.values()]
    return results


def _freed(settings: dict[str, Any], ranks: Ranks) -> bool:
    """Whether nothing of an exchange stays behind when its phase is over."""
    _, optimizer, exchange = start(settings, ranks)
    train(exchange, optimizer, range(5))
    gone = weakref.ref(exchange)
    del exchange
    gc.collect()
    return gone() is None


def _follow_messages(ranks: Ranks) -> tuple[list[bool], tuple[int, int]]:
    """With what went over the wire noted: is sent + residual the gradients' sum, and the gradient what all have sent?"""
    model, optimizer, exchange = start(FIXED, ranks)
    assert isinstance(exchange, ThresholdCompression)
    sent: list[list[Tensor]] = []
    send = compression.gather_uneven

    def note(message: Tensor, ranks: Ranks) -> list[Tensor]:
        sent.append(send(message, ranks))
        return sent[-1]

    compression.gather_uneven = note
    holds = []
    for step in range(12):
        share = exchange.begin_step(*frames(ranks, step))
        twin = copy.deepcopy(model)
        (share * mean_loss(twin, ranks.rank, step)).backward()
        accumulated = exchange.residual + flat(one.grad for one in twin.parameters())
        optimizer.zero_grad()
        (share * mean_loss(exchange.network, ranks.rank, step)).backward()
        counts = [counted(message, len(accumulated)) for message in sent[-1]]
        threshold = round_threshold(0.003)
        own = counts[ranks.rank].double() * threshold
        holds.append(own.abs().max() > 0 and torch.equal(own + exchange.residual.double(), accumulated.double()))
        applied = sum(counts[1:], counts[0]) * (threshold / ranks.world)
        holds.append(torch.equal(flat(one.grad for one in model.parameters()), applied))
        optimizer.step()
    compression.gather_uneven = send
    return [bool(one) for one in holds], (
        exchange.traffic.gathered + exchange.traffic.broadcast,
        sum(4 + sum(map(len, step)) for step in sent),
    )


def _learn(ranks: Ranks) -> dict[str, Any]:
    """A longer training with each hook: the loss on data of no rank, the bytes, and the density of the last half."""
    results: dict[str, Any] = {}
    for name, settings in CASES.items():
        model, optimizer, exchange = start(settings, ranks)
        sent = 0
        for step in range(LEARNING):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / LEARNING)
            train(exchange, optimizer, range(step, step + 1))
            if step >= LEARNING // 2:
                sent += getattr(exchange, "sent", 0)
        with torch.no_grad():
            loss = sum(mean_loss(model, 99, step).item() for step in range(20)) / 20
        density = sent / (LEARNING // 2) / ranks.world / len(flat(model.parameters()))
        payload = exchange.traffic.reduced + exchange.traffic.gathered + exchange.traffic.broadcast
        results[name] = {"loss": loss, "payload": payload, "density": density}
    return results


def _one_bad_gradient(ranks: Ranks) -> bool:
    """Whether a gradient that is not finite on the last rank alone is seen by this one."""
    model, _, exchange = start(FIXED, ranks)
    loss = mean_loss(exchange.network, ranks.rank, 0)
    (loss * (math.inf if ranks.rank == ranks.world - 1 else 1.0)).backward()
    return not any(bool(one.grad.isfinite().any()) for one in model.parameters() if one.grad is not None)


def _clip(ranks: Ranks) -> tuple[list[float], list[float], bool]:
    """What three waiting elements send and leave behind, and whether a restart forgets them."""
    clipping = {"density": None, "threshold": 1.0, "residual_clip": 2.0}
    _, _, exchange = start({"compression": "threshold", "threshold": clipping}, ranks)
    assert isinstance(exchange, ThresholdCompression)
    exchange.residual[:3] = torch.tensor([10.0, 0.5, -9.0])
    sent, left = exchange._exchange()[:3].tolist(), exchange.residual[:3].tolist()
    exchange.restart()
    return sent, left, not exchange.residual.any()


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, together: Any) -> list[dict[str, Any]]:
    return together(request.param, job)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_hold_the_same_weights_to_the_bit(results: list[dict[str, Any]], name: str) -> None:
    for rank in results[1:]:
        assert torch.equal(rank[name]["weights"], results[0][name]["weights"])


def test_plain_ddp_is_one_process_with_all_batches_in_one(results: list[dict[str, Any]]) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(14):
        parts = [batch(rank, step) for rank in range(len(results))]
        inputs, wanted = (torch.cat(one) for one in zip(*parts, strict=True))
        optimizer.zero_grad()
        ((model(inputs) - wanted) ** 2).mean().backward()
        optimizer.step()
    torch.testing.assert_close(results[0]["plain"]["weights"], flat(model.parameters()), rtol=1e-4, atol=1e-5)


def test_sent_and_residual_are_the_gradients_and_all_apply_what_all_sent(results: list[dict[str, Any]]) -> None:
    assert all(all(rank["exact"]) and len(rank["exact"]) == 24 for rank in results)


def test_bytes_are_those_of_the_messages(results: list[dict[str, Any]]) -> None:
    elements = len(flat(network().parameters()))
    around = 4 * 6  # which of the six parameters were used
    for rank in results:
        counted, sent = rank["bytes"]
        assert counted == sent
        traffic = rank["plain"]["traffic"]
        assert traffic["reduced"] == 14 * (4 * elements + around) and not traffic["gathered"]
        whole = 3 * 4 * elements + 14 * around
        assert rank["threshold"]["traffic"]["reduced"] == whole + 8  # 8: the first threshold
        thin = 2 * (16 + 48 + 48 + 48 + 48 + 8) + 48 + 48 + 8
        assert rank["powersgd"]["traffic"]["reduced"] == whole + 11 * 4 * thin


def test_threshold_holds_the_density_and_learns_as_plain_ddp_does(results: list[dict[str, Any]]) -> None:
    learned = results[0]["learned"]
    if not learned:
        return  # two ranks say it
    assert learned["threshold"]["density"] == pytest.approx(DENSITY, rel=0.15)
    assert learned["threshold"]["payload"] < learned["plain"]["payload"] / 15
    untrained = sum(mean_loss(network(), 99, step).item() for step in range(20)) / 20
    for name in ("threshold", "powersgd"):
        recovered = (untrained - learned[name]["loss"]) / (untrained - learned["plain"]["loss"])
        assert recovered > 0.95, (name, untrained, learned)


def test_a_gradient_that_is_not_finite_reaches_all_ranks(results: list[dict[str, Any]]) -> None:
    assert all(rank["not finite"] for rank in results)


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_goes_on_to_the_bit(results: list[dict[str, Any]], name: str) -> None:
    assert all(rank["resumed"][name] for rank in results)


@given(
    st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=40),
    st.floats(0.001, 50),
)
def test_what_is_taken_and_what_stays_are_the_whole(values: list[float], threshold: float) -> None:
    residual = torch.tensor(values)
    before, threshold = residual.double(), round_threshold(threshold)
    counts = counted(pack(*take(residual, threshold), len(values)), len(values))
    assert torch.equal(counts.double() * threshold + residual.double(), before)
    assert counts.tolist() == [0.0 if abs(one) < threshold else math.copysign(1, one) for one in before.tolist()]


@given(st.floats(1e-9, 1e9))
def test_a_rounded_threshold_is_near_and_short(threshold: float) -> None:
    rounded = round_threshold(threshold)
    assert rounded == pytest.approx(threshold, rel=2**-8)
    assert (math.frexp(rounded)[0] * 256).is_integer()


@given(st.data(), st.integers(1, 300_000))
def test_a_message_holds_any_places(data: st.DataObject, elements: int) -> None:
    taken = data.draw(st.dictionaries(st.integers(0, elements - 1), st.booleans(), max_size=50))
    places, negative = (
        torch.tensor(sorted(taken), dtype=torch.int64),
        torch.tensor([taken[one] for one in sorted(taken)]).bool(),
    )
    message = pack(places, negative, elements)
    for found, packed in zip(unpack(message, elements), (places, negative), strict=True):
        assert torch.equal(found, packed)


@pytest.mark.parametrize(("share", "bits"), [(1.0, 3.0), (0.01, 9.6), (0.002, 12.0)])
def test_a_message_is_short(share: float, bits: float) -> None:
    elements = 200_000
    places = torch.randperm(elements, generator=torch.Generator().manual_seed(0))[: int(share * elements)].sort().values
    message = pack(places, places % 2 == 0, elements)
    assert torch.equal(unpack(message, elements)[0], places)
    assert 8 * (len(message) - 4) <= bits * len(places) + 8


def test_a_residual_is_clipped_where_asked_and_forgotten_at_a_restart(results: list[dict[str, Any]]) -> None:
    assert all(rank["clipped"] == ([1.0, 0.0, -1.0], [2.0, 0.5, -2.0], True) for rank in results)


def test_an_exchange_that_is_over_leaves_nothing_behind(results: list[dict[str, Any]]) -> None:
    assert all(all(rank["freed"]) for rank in results)
