"""Networks that stream: piece by piece as the whole, no further ahead than they say, and each family against a reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asr_kd.config.load import build
from asr_kd.errors import UserError
from asr_kd.models.acoustic import NETWORKS, collate
from asr_kd.models.chunked_conformer import ChunkedAttention
from asr_kd.models.network import AcousticModel, detached
from asr_kd.models.settings import STREAMING, ModelSettings
from asr_kd.units import Units
from tests.models.test_acoustic import FEATURES, KINDS, lively, noise

STREAMS = [kind for kind in KINDS if KINDS[kind].kind in STREAMING]


def streamed(model: AcousticModel, features: Tensor, pieces: list[int]) -> Tensor:
    """Answers [batch, frames, units] to features [batch, frames, inputs] that arrive in pieces, the last size again and again."""
    assert model.lookahead_frames is not None
    rest, state, said = torch.nn.functional.pad(features, (0, 0, 0, model.lookahead_frames)), None, []
    while rest.shape[1]:
        size = pieces[min(len(said), len(pieces) - 1)]
        logits, state = model.stream(rest[:, :size], state)
        said.append(logits)
        rest = rest[:, size:]
    return torch.cat(said, 1)[:, model.delay :][:, : features.shape[1]]


def test_kinds_that_stream_say_so(units: Units) -> None:
    assert {lively(one, units).streams for one in KINDS.values() if one.kind in STREAMING} == {True}
    assert {lively(one, units).streams for one in KINDS.values() if one.kind not in STREAMING} == {False}
    assert {one.kind for one in KINDS.values()} == set(NETWORKS)


@pytest.mark.parametrize("kind", STREAMS)
@torch.no_grad()
def test_piece_by_piece_it_says_what_it_says_of_the_whole(kind: str, units: Units) -> None:
    model = lively(KINDS[kind], units)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(1, 40), st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 3))
    def holds(frames: int, pieces: list[int], batch: int) -> None:
        features, lengths = collate([noise(frames, seed) for seed in range(batch)])
        torch.testing.assert_close(
            streamed(model, features, pieces), model(features, lengths).logits, rtol=0, atol=1e-4
        )

    holds()
    for frames in (1, 2, 13):  # shorter than a chunk, too
        features, lengths = collate([noise(frames)])
        torch.testing.assert_close(streamed(model, features, [1]), model(features, lengths).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", STREAMS)
@torch.no_grad()
def test_a_longer_batch_mate_changes_nothing_of_what_is_streamed(kind: str, units: Units) -> None:
    model = lively(KINDS[kind], units)
    features, lengths = collate([noise(7), noise(31, 1)])
    features[0, 7:] = 5.0  # padding may hold anything
    whole = model(features, lengths).logits
    torch.testing.assert_close(streamed(model, features[:1, :7], [3]), whole[:1, :7], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", STREAMS)
@torch.no_grad()
def test_the_look_ahead_is_what_it_says_and_no_frame_more(kind: str, units: Units) -> None:
    model, frames = lively(KINDS[kind], units), 24
    features, lengths = collate([noise(frames)])
    whole, ahead = model(features, lengths).logits[0], model.lookahead_frames
    assert ahead is not None
    furthest = 0
    for changed in range(1, frames):
        other = features.clone()
        other[:, changed:] += 1.0  # all the future at once
        said = model(other, lengths).logits[0]
        first = int((said != whole).any(1).nonzero()[0])
        assert first >= changed - ahead
        other[:, changed + 1 :] = features[:, changed + 1 :]  # one frame alone
        assert int((model(other, lengths).logits[0] != whole).any(1).nonzero()[0]) == first
        furthest = max(furthest, changed - first)
    assert furthest == ahead


@pytest.mark.parametrize("kind", STREAMS)
@torch.no_grad()
def test_a_frame_is_answered_for_as_soon_as_what_it_hears_is_there(kind: str, units: Units) -> None:
    model, frames = lively(KINDS[kind], units), 24
    features, _ = collate([noise(frames)])
    state, answered = None, -model.delay
    for at in range(frames):
        logits, state = model.stream(features[:, at : at + 1], state)
        answered += logits.shape[1]
        assert at - model.lookahead_frames < answered <= at + 1
    if KINDS[kind].kind == "emformer":
        chunk = KINDS[kind].chunk_frames
        assert answered == (frames - KINDS[kind].right_frames) // chunk * chunk


@pytest.mark.parametrize("kind", STREAMS)
def test_a_state_can_be_gone_on_from_twice_and_lets_go_of_its_gradient(kind: str, units: Units) -> None:
    model = lively(KINDS[kind], units)
    features, _ = collate([noise(30)])
    _, state = model.stream(features[:, :11], None)
    state = detached(state)
    once, twice = (model.stream(features[:, 11:], state)[0] for _ in range(2))
    torch.testing.assert_close(once, twice, rtol=0, atol=0)
    once.sum().backward()
    model.stream(features[:, 11:], state)[0].sum().backward()  # no graph behind the state was freed

    def tensors(value: Any) -> list[Tensor]:
        inner = value if isinstance(value, tuple | list) else []
        return [value] if isinstance(value, Tensor) else [one for part in inner for one in tensors(part)]

    assert tensors(state) and not any(one.requires_grad for one in tensors(state))


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("frames", [1, 2, 17])
def test_every_weight_gets_a_gradient(kind: str, frames: int, units: Units) -> None:
    """As DDP expects, however short the utterances are."""
    model = lively(KINDS[kind], units).train()
    features, lengths = collate([noise(frames), noise(1)])
    model(features, lengths).logits.sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("kind", STREAMS)
def test_half_precision_comes_near(kind: str, units: Units) -> None:
    model = lively(KINDS[kind], units)
    features, lengths = collate([noise(21)])
    whole = model(features, lengths).logits.softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        half, pieces = model(features, lengths).logits, streamed(model, features, [5, 3])
    assert (half.float().softmax(-1) - whole).abs().mean() < 0.02
    assert (pieces.float().softmax(-1) - whole).abs().mean() < 0.02
    half.float().sum().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("kind", ["emformer", "emformer-plain"])
@torch.no_grad()
def test_the_emformer_is_torchaudios(kind: str, units: Units) -> None:
    model, asked = lively(KINDS[kind], units), KINDS[kind]
    features = torch.from_numpy(noise(19))[None]
    lengths = torch.tensor([19])
    whole = -(-19 // asked.chunk_frames) * asked.chunk_frames
    padded = torch.nn.functional.pad(features, (0, 0, 0, whole + asked.right_frames - 19))
    encoded, _ = model.encoder(model.input(padded), torch.tensor([whole]))
    torch.testing.assert_close(model(features, lengths).logits, model.output(encoded)[:, :19], rtol=0, atol=0)


@torch.no_grad()
def test_chunked_attention_against_a_loop() -> None:
    torch.manual_seed(0)
    heads, chunk, left, width = 2, 3, 4, 3
    asked = ModelSettings(
        kind="chunked_conformer", size=heads * width, heads=heads, chunk_frames=chunk, left_frames=left
    )
    attention = ChunkedAttention(asked).double()
    attention.bias.normal_()
    frames = torch.randn(2, 9, heads * width, dtype=torch.float64)
    key, value = attention.key_value(frames).chunk(2, -1)
    expected = torch.zeros_like(frames)
    for at in range(9):
        heard = range(max(0, at // chunk * chunk - left), (at // chunk + 1) * chunk)
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            query = attention.query(frames[:, at])[:, own]
            scores = [
                (query * key[:, other, own]).sum(-1) / width**0.5 + attention.bias[head, other - at + left + chunk - 1]
                for other in heard
            ]
            shares = torch.stack(scores, -1).softmax(-1)
            expected[:, at, own] = sum(shares[:, i, None] * value[:, other, own] for i, other in enumerate(heard))
    torch.testing.assert_close(attention(frames, 0, None)[0], attention.output(expected))


@torch.no_grad()
def test_the_separable_network_against_a_loop(units: Units) -> None:
    model = lively(KINDS["separable"], units).double()
    features = torch.from_numpy(noise(10)).double()
    hidden = model.input(torch.nn.functional.pad(features, (0, 0, 0, 2)))
    for layer in model.layers:
        weight, bias = layer.over_time.convolution.weight[:, 0, 0], layer.over_time.convolution.bias
        new = []
        for at in range(12):
            heard = bias.clone()
            for back in range(3):
                if at - back >= 0:
                    heard += weight[:, 2 - back] * hidden[at - back]
            new.append(hidden[at] + torch.relu(layer.norm(layer.over_channels(heard))))
        hidden = torch.stack(new)
    expected = model.output(hidden[2:])
    torch.testing.assert_close(model(features[None], torch.tensor([10])).logits[0], expected)


@torch.no_grad()
def test_how_far_back_they_hear(units: Units) -> None:
    """Separable: layers * (kernel - 1) frames. A chunked Conformer without left context: its chunk, and what its convolutions hear."""
    for kind, last in (("separable", 4 - 2), ("chunked-conditioned", 2)):
        model = lively(KINDS[kind], units)
        features, lengths = collate([noise(24)])
        whole = model(features, lengths).logits[0]
        features[:, 12] += 1.0
        changed = (model(features, lengths).logits[0] != whole).any(1).nonzero().flatten()
        assert int(changed[-1]) == 12 + last


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "lstm", "chunk_frames": 8}, "chunk_frames belongs to kind chunked_conformer and emformer alone"),
        ({"kind": "separable", "left_frames": 8}, "left_frames belongs to kind chunked_conformer and emformer alone"),
        ({"kind": "chunked_conformer", "right_frames": 1}, "right_frames belongs to kind emformer alone"),
        ({"kind": "conformer", "memory": 1}, "memory belongs to kind emformer alone"),
        ({"kind": "emformer", "delay_frames": 1}, "delay_frames belongs to kind lstm and separable alone"),
        ({"kind": "chunked_conformer", "delay_ms": 30.0}, "delay_frames belongs to kind lstm and separable alone"),
        ({"kind": "emformer", "kernel": 3}, "an emformer has no convolution; leave it out"),
        ({"kind": "separable", "heads": 2}, "a separable network has no attention; leave it out"),
        ({"kind": "emformer", "size": 10, "heads": 4}, "size must be a multiple of heads"),
        ({"kind": "chunked_conformer", "size": 10, "heads": 4}, "size must be a multiple of heads"),
    ],
)
def test_settings_of_another_kind_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(ModelSettings, given, "x")


def test_a_kind_writes_its_own_settings_alone() -> None:
    """So that fingerprints, and claims of folders, are those of before the others came."""
    common = {"kind", "layers", "size", "dropout", "delay_frames", "delay_ms", "kernel", "heads", "conditioned"}
    for kind in ("lstm", "blstm", "conv", "conformer", "separable"):
        assert ModelSettings(kind=kind).model_dump().keys() == common
    assert ModelSettings(kind="chunked_conformer").model_dump().keys() == common | {"chunk_frames", "left_frames"}
    said = KINDS["emformer"].model_dump()
    assert said.keys() == common | {"chunk_frames", "left_frames", "right_frames", "memory"}
    assert ModelSettings.model_validate(said) == KINDS["emformer"]


def test_delay_in_milliseconds(units: Units) -> None:
    settings = ModelSettings(kind="separable", delay_ms=100.0).in_frames(FEATURES)
    assert settings.delay_frames == 4
