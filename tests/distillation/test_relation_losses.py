"""The algebra of relations: against loops as a textbook has them, and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asr_kd.distillation import relation_losses
from asr_kd.distillation.relation_losses import attention, classes, flow, gram

Loss = Callable[[Tensor, Tensor], Tensor]


def huber(error: float) -> float:
    return error**2 / 2 if abs(error) <= 1 else abs(error) - 0.5


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def similarity_loop(mine: np.ndarray, theirs: np.ndarray) -> float:
    total = 0.0
    for i in range(len(mine)):
        rows = [np.array([x[i] @ other for other in x]) for x in (mine, theirs)]
        total += ((rows[0] / np.linalg.norm(rows[0]) - rows[1] / np.linalg.norm(rows[1])) ** 2).sum()
    return total / len(mine)


def distance_loop(mine: np.ndarray, theirs: np.ndarray) -> float:
    pairs = list(permutations(range(len(mine)), 2))
    apart = [np.array([np.linalg.norm(x[i] - x[j]) for i, j in pairs]) for x in (mine, theirs)]
    psi = [x / x.mean() for x in apart]
    return float(np.mean([huber(a - b) for a, b in zip(*psi, strict=True)]))


def angle_loop(mine: np.ndarray, theirs: np.ndarray) -> float:
    found = [
        huber(cosine(mine[i] - mine[j], mine[k] - mine[j]) - cosine(theirs[i] - theirs[j], theirs[k] - theirs[j]))
        for i, j, k in permutations(range(len(mine)), 3)
    ]
    return float(np.mean(found))


def probability_loop(mine: np.ndarray, theirs: np.ndarray) -> float:
    total = 0.0
    for i in range(len(mine)):
        others = [j for j in range(len(mine)) if j != i]
        p, q = (np.array([(cosine(x[i], x[j]) + 1) / 2 for j in others]) for x in (mine, theirs))
        p, q = p / p.sum(), q / q.sum()
        total += float((q * np.log(q / p)).sum())
    return total / len(mine)


def correlation_loop(mine: np.ndarray, theirs: np.ndarray) -> float:
    def kernel(c: float) -> float:
        return math.exp(-0.8) * sum((0.8 * c) ** p / math.factorial(p) for p in range(3))

    pairs = permutations(range(len(mine)), 2)
    return float(
        np.mean([(kernel(cosine(mine[i], mine[j])) - kernel(cosine(theirs[i], theirs[j]))) ** 2 for i, j in pairs])
    )


LOOPS = {
    "similarity": similarity_loop, "distance": distance_loop, "angle": angle_loop,
    "probability": probability_loop, "correlation": correlation_loop,
}  # fmt: skip
LOSSES: dict[str, Loss] = {name: getattr(relation_losses, name) for name in LOOPS}
every = pytest.mark.parametrize("name", LOSSES)


def points(samples: int, width: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(samples, width)))


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(points(width, width, 9))[0]


@every
@given(samples=st.integers(3, 7), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_it_is_the_loop(name: str, samples: int, seed: int) -> None:
    mine, theirs = points(samples, 4, seed), points(samples, 6, seed + 1)
    expected = LOOPS[name](mine.numpy(), theirs.numpy())
    assert LOSSES[name](mine, theirs).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@every
def test_it_is_of_the_size_of_one_and_0_where_both_agree(name: str) -> None:
    mine, theirs = points(40, 8), points(40, 16, 1)
    assert 1e-3 < LOSSES[name](mine, theirs) < 2
    assert LOSSES[name](mine, mine) == 0
    assert LOSSES[name](mine, theirs) == pytest.approx(LOSSES[name](points(80, 8), points(80, 16, 1)).item(), rel=0.7)


@every
def test_rotation_scale_and_order_change_nothing(name: str) -> None:
    mine, theirs, order = points(9, 5), points(9, 7, 1), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    plain = LOSSES[name](mine, theirs)
    for changed in (
        LOSSES[name](mine @ rotation(5), theirs),
        LOSSES[name](3 * mine, theirs / 5),
        LOSSES[name](mine[order], theirs[order]),
    ):
        torch.testing.assert_close(changed, plain, rtol=1e-6, atol=1e-9)


def test_what_only_some_of_them_leave_out_of_account() -> None:
    mine, theirs, moved = points(9, 5), points(9, 7, 1), points(1, 5, 2)
    each = points(9, 1, 3).sigmoid() + 0.1
    for name, loss in LOSSES.items():
        same = math.isclose(loss(mine + moved, theirs), loss(mine, theirs), rel_tol=1e-5)
        assert same == (name in ("distance", "angle"))
        same = math.isclose(loss(each * mine, theirs), loss(mine, theirs), rel_tol=1e-5)
        assert same == (name in ("probability", "correlation"))


@every
def test_gradient(name: str) -> None:
    torch.autograd.gradcheck(lambda mine: LOSSES[name](mine, points(5, 4, 1)), points(5, 3).requires_grad_(), atol=1e-5)


def crowds() -> dict[str, Tensor]:
    return {
        "twice": torch.cat([points(4, 5), points(4, 5)]),
        "nearly": torch.cat([points(4, 5), points(4, 5) + 1e-6]),
        "all": points(1, 5).expand(8, 5),
        "nothing": torch.zeros(8, 5),
        "one is nothing": torch.cat([points(7, 5), torch.zeros(1, 5)]),
        "opposite": torch.cat([points(1, 5).expand(4, 5), -points(1, 5).expand(4, 5)]),
        "far": points(8, 5) + 1e3,
        "huge": points(8, 5) * 1e6,
        "tiny": points(8, 5) * 1e-6,
    }


@every
@pytest.mark.parametrize("crowd", crowds())
def test_crowds_and_far_off_origins(name: str, crowd: str) -> None:
    mine, theirs = crowds()[crowd].float().clone().requires_grad_(), points(8, 7, 1).float()
    loss = LOSSES[name](mine, theirs)
    assert 0 <= loss < 10
    (gradient,) = torch.autograd.grad(loss, mine)
    assert gradient.isfinite().all()
    assert LOSSES[name](theirs, mine.detach()).isfinite()
    spread = (mine.detach() - mine.detach().mean(0)).square().sum(1).mean().sqrt()
    if crowd != "nothing":
        assert gradient.norm() * spread < 1e4


@pytest.mark.parametrize("name", ["distance", "angle"])
def test_far_from_the_origin_it_is_as_near_it(name: str) -> None:
    mine, theirs = points(12, 8).float(), points(12, 8, 1).float()
    torch.testing.assert_close(LOSSES[name](mine + 1e3, theirs), LOSSES[name](mine, theirs), rtol=1e-3, atol=1e-4)


def test_collapsed_samples_have_no_distances() -> None:
    """Not the mean of nothing, and not one another's mean distance either."""
    at_one = points(1, 5).expand(6, 5)
    assert LOSSES["distance"](at_one, points(6, 7)) > 0.3
    assert LOSSES["distance"](at_one, at_one) == LOSSES["angle"](at_one, at_one) == 0


def test_a_pair_has_a_distance_of_one_mean_and_no_angle() -> None:
    mine, theirs = points(2, 5), points(2, 7, 1)
    assert LOSSES["distance"](mine, theirs) == LOSSES["angle"](mine, theirs) == 0


def test_the_kernel_is_near_the_exact_one() -> None:
    cosines = torch.linspace(-1, 1, 101, dtype=torch.float64)
    exact = (-relation_losses.GAMMA * (2 - 2 * cosines)).exp()
    assert (relation_losses._kernel(cosines) - exact).abs().max() < 0.05


def classes_loop(mine: np.ndarray, theirs: np.ndarray, unit: np.ndarray) -> float:
    found = []
    for one in set(unit.tolist()):
        if (unit == one).sum() >= 2:
            p, q = (x[unit == one].mean(0) + 1e-6 for x in (mine, theirs))
            found.append(float((q * np.log(q / p)).sum()))
    return sum(found) / max(len(found), 1)


@given(samples=st.integers(0, 12), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_classes_are_the_loop_and_names_do_not_matter(samples: int, seed: int) -> None:
    mine, theirs = points(samples, 5, seed).softmax(-1), points(samples, 5, seed + 1).softmax(-1)
    unit = torch.from_numpy(np.random.default_rng(seed).integers(0, 5, samples))
    loss = classes(mine, theirs, unit)
    assert loss.item() == pytest.approx(classes_loop(mine.numpy(), theirs.numpy(), unit.numpy()), abs=1e-9)
    assert loss >= 0 and classes(mine, mine, unit) == 0
    names = torch.tensor([3, 0, 4, 1, 2])
    renamed = classes(mine[:, names.argsort()], theirs[:, names.argsort()], names[unit])
    torch.testing.assert_close(renamed, loss)


def test_gradient_of_classes() -> None:
    unit = torch.tensor([1, 2, 1, 2, 0])
    theirs = points(5, 4, 1).softmax(-1)
    torch.autograd.gradcheck(lambda x: classes(x.softmax(-1), theirs, unit), points(5, 4).requires_grad_())


def over_time(frames: list[int], width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Utterances [batch, frames, width], 0 in the padding, and which frames are inside."""
    inside = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    values = points(len(frames) * max(frames), width, seed).view(len(frames), max(frames), width)
    return values * inside[..., None], inside


@pytest.mark.parametrize("band", [2, 3, 100])
def test_gram_is_the_loop(monkeypatch: pytest.MonkeyPatch, band: int) -> None:
    monkeypatch.setattr(relation_losses, "BAND", band)
    (mine, inside), (theirs, _) = over_time([11, 4, 1], 3, 0), over_time([11, 4, 1], 5, 1)
    weights = points(3, 11, 2).sigmoid() * inside
    weights[1] *= 0.01  # nearly silent
    for found, a, b, w, frames in zip(gram(mine, theirs, weights), mine, theirs, weights, [11, 4, 1], strict=True):
        error = total = 0.0
        for t in range(frames):
            for u in range(t + 1, min(t + band, frames - 1) + 1):
                total += float(w[t] * w[u])
                error += (
                    float(w[t] * w[u]) * (cosine(a[t].numpy(), a[u].numpy()) - cosine(b[t].numpy(), b[u].numpy())) ** 2
                )
        assert found.item() == pytest.approx(error / max(total, 1.0), abs=1e-7)
    assert not gram(mine, mine, weights).any()


def test_gradient_of_gram() -> None:
    (mine, inside), (theirs, _) = over_time([5, 3], 3, 0), over_time([5, 3], 4, 1)
    inside = inside.double()
    torch.autograd.gradcheck(lambda x: gram(x * inside[..., None], theirs, inside), mine.requires_grad_())


def flow_of(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], frames: list[int]) -> Tensor:
    return flow(mine, theirs, torch.tensor(frames))


def test_flow_is_the_loop_and_does_not_ask_when() -> None:
    frames = [6, 4, 0]
    (a, inside), b = over_time(frames, 3, 0), over_time(frames, 2, 1)[0]
    c, d = over_time(frames, 3, 2)[0], over_time(frames, 2, 3)[0]
    found = flow_of((a, b), (c, d), frames)
    for utterance, size in enumerate(frames[:2]):
        products = [
            sum(np.outer(x[utterance, t], y[utterance, t]) for t in range(size)) / size for x, y in ((a, b), (c, d))
        ]
        assert found[utterance].item() == pytest.approx(float(((products[0] - products[1]) ** 2).mean()))
    assert found[2] == 0 and not flow_of((a, b), (a, b), frames).any()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    mixed = flow_of((a[:1, order], b[:1, order]), (c[:1], d[:1]), frames[:1])
    torch.testing.assert_close(mixed, found[:1])
    # a delay of 3 frames loses the edge alone
    shifted = torch.roll(torch.cat([a[:1], 0 * a[:1]], 1), 3, 1), torch.roll(torch.cat([b[:1], 0 * b[:1]], 1), 3, 1)
    torch.testing.assert_close(flow_of(shifted, (c[:1], d[:1]), [6]), found[:1])
    torch.autograd.gradcheck(lambda x, y: flow_of((x, y), (c, d), frames), (a.requires_grad_(), b.requires_grad_()))
    assert inside.any()


def test_attention_is_the_loop() -> None:
    frames, heads = [5, 3, 0], 2
    (mine, inside), theirs = over_time(frames, 3 * 4, 0), over_time(frames, 3 * 6, 1)[0]
    found = attention(mine, theirs, inside, heads)
    for utterance, size in enumerate(frames[:2]):
        total = 0.0
        for which in range(3):
            for head in range(heads):
                rows = []
                for x in (mine, theirs):
                    width = x.shape[2] // 3
                    begin = which * width + head * width // heads
                    part = x[utterance, :size, begin : begin + width // heads]
                    rows.append((part @ part.T / math.sqrt(width // heads)).log_softmax(-1))
                total += float((rows[1].exp() * (rows[1] - rows[0])).sum()) / size
        assert found[utterance].item() == pytest.approx(total / (3 * heads))
    assert found[2] == 0 and not attention(mine, mine, inside, heads).any()
    torch.autograd.gradcheck(lambda x: attention(x, theirs, inside, heads), mine.requires_grad_())


@pytest.mark.parametrize("name", ["gram", "flow", "attention"])
def test_over_time_padding_and_batch_mates_change_nothing(name: str) -> None:
    def losses(frames: list[int], longest: int, only: int | None = None) -> Tensor:
        (mine, inside), (theirs, _) = over_time(frames, 12, 0), over_time(frames, 12, 1)
        room = (0, 0, 0, longest - mine.shape[1])
        mine, theirs = torch.nn.functional.pad(mine, room), torch.nn.functional.pad(theirs, room)
        inside = torch.nn.functional.pad(inside, room[2:])
        if only is not None:
            mine, theirs, inside = (x[only : only + 1, : frames[only]] for x in (mine, theirs, inside))
        if name == "gram":
            return gram(mine, theirs, inside.double())
        if name == "flow":
            return flow((mine, mine), (theirs, theirs), inside.sum(1))
        return attention(mine, theirs, inside, 2)

    together = losses([120, 7, 1], 120)
    torch.testing.assert_close(losses([120, 7, 1], 330), together)
    for utterance in range(3):
        torch.testing.assert_close(losses([120, 7, 1], 120, utterance)[0], together[utterance])


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_attention_far_from_the_origin_is_finite(shift: float) -> None:
    (mine, inside), theirs = over_time([5, 0], 12, 0), over_time([5, 0], 12, 1)[0]
    mine = (mine + shift).float().requires_grad_()
    loss = attention(mine, theirs.float() - shift, inside, 2).sum()
    assert loss.isfinite() and torch.autograd.grad(loss, mine)[0].isfinite().all()
