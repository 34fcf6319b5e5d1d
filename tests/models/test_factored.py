"""Thin LSTMs: matrices of low rank, projections, and what becomes of a trained network that is thinned."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from asr_kd.models.acoustic import build_model, collate, load_checkpoint, parameters, save_checkpoint
from asr_kd.models.factored import FactoredLstm, ProjectedLstm, apart, jointly
from asr_kd.models.lstm import LstmModel
from asr_kd.models.settings import ModelSettings
from asr_kd.units import Units
from tests.models.test_acoustic import FEATURES, lively, make_checkpoint, noise, reach

FULL = ModelSettings(kind="lstm", layers=3, size=12, delay_frames=2, dropout=0.0)


def thin(settings: ModelSettings, units: Units) -> LstmModel:
    model = build_model(settings, FEATURES.dimension, units.size).eval()
    assert isinstance(model, LstmModel)
    return model


def test_a_layer_of_low_rank_is_an_lstm_with_the_product() -> None:
    torch.manual_seed(0)
    layer, plain = FactoredLstm(7, 10, 3), nn.LSTM(7, 10, batch_first=True)
    layer.initialise()
    with torch.no_grad():
        plain.weight_ih_l0.copy_(layer.weight_ih.left @ layer.weight_ih.right)
        plain.weight_hh_l0.copy_(layer.weight_hh.left @ layer.weight_hh.right)
        plain.bias_ih_l0.copy_(layer.bias_ih)
        plain.bias_hh_l0.copy_(layer.bias_hh)
    assert torch.linalg.matrix_rank(plain.weight_ih_l0) == torch.linalg.matrix_rank(plain.weight_hh_l0) == 3
    assert layer.bias_ih.tolist() == [0] * 10 + [1] * 10 + [0] * 20
    heard = torch.randn(4, 9, 7)
    (one, state), (other, expected) = layer(heard), plain(heard)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(state, expected)
    torch.testing.assert_close(layer(heard, state), plain(heard, expected))
    (one.square().sum() + state[1].sum()).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in layer.parameters())


def test_the_product_is_kept_where_nothing_is_learned_until_a_factor_changes() -> None:
    layer, heard = FactoredLstm(7, 10, 3), torch.randn(1, 4, 7)
    layer.initialise()
    with torch.no_grad():
        first = layer(heard)[0]
        kept = layer.weight_hh()
        assert layer.weight_hh() is kept
        with torch.autocast("cpu", torch.bfloat16):
            layer.bias_ih.add_(0.0)
            layer.weight_hh.left.mul_(1.0)
            assert layer.weight_hh().dtype == torch.float32
        layer.weight_hh.left.mul_(3.0)
        assert (layer(heard)[0] - first).abs().max() > 1e-3
        torch.testing.assert_close(layer.weight_hh(), layer.weight_hh.left @ layer.weight_hh.right)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(2):
        layer(heard)[0].sum().backward()
        optimizer.step()
        with torch.inference_mode():
            torch.testing.assert_close(layer.weight_ih(), layer.weight_ih.left @ layer.weight_ih.right)
    other = deepcopy(layer)
    with torch.no_grad():
        other.weight_ih.right.zero_()
        assert other.weight_ih().abs().sum() == 0 < layer.weight_ih().abs().sum()


@pytest.mark.parametrize("frames", [1, 9])
def test_a_projection_is_that_of_torch(frames: int) -> None:
    layer = ProjectedLstm(7, 10, 4)
    heard = torch.randn(3, frames, 7)
    for state in (None, (torch.randn(1, 3, 4), torch.randn(1, 3, 10))):
        torch.testing.assert_close(layer(heard, state), nn.LSTM.forward(layer, heard, state))
    slopes = []
    for run in (layer, lambda heard: nn.LSTM.forward(layer, heard)):
        layer.zero_grad()
        run(heard)[0].square().sum().backward()
        slopes.append([weight.grad.clone() for weight in layer.parameters() if weight.grad is not None])
    assert len(slopes[0]) == 5
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("kind", ["lstm", "blstm"])
@pytest.mark.parametrize("bits", [None, 8])
def test_of_full_rank_it_is_the_same_function(kind: str, bits: int | None, units: Units) -> None:
    settings = FULL.model_copy(update={"kind": kind, "delay_frames": 0})
    full, wide = lively(settings, units), settings.model_copy(update={"rank": 24})
    model, features = thin(wide, units), collate([noise(20), noise(9)])
    model.begin_as(full)  # type: ignore[arg-type]
    expected = full(*features).logits
    torch.testing.assert_close(model(*features).logits, expected, rtol=0, atol=1e-5)
    if bits:  # rounded, it is near
        rough = build_model(wide.model_copy(update={"bits": bits}), FEATURES.dimension, units.size).eval()
        rough.begin_as(model)
        assert 1e-4 < (rough(*features).logits - expected).abs().max() < 0.3


def test_each_matrix_becomes_the_nearest_of_its_rank(units: Units) -> None:
    full = lively(FULL, units).state_dict()
    found = apart(full, 4)
    for name in ("forwards.0.weight_ih", "forwards.2.weight_hh"):
        values = torch.linalg.svdvals(full[f"{name}_l0"].double())
        left, right = found[f"{name}.left"], found[f"{name}.right"]
        assert left.shape == (48, 4) and right.shape[0] == 4
        error = (full[f"{name}_l0"] - left @ right).square().sum()
        torch.testing.assert_close(error, values[4:].square().sum().float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))  # evenly shared
    assert torch.equal(found["output.weight"], full["output.weight"])
    assert apart(found, 4).keys() == found.keys()


@pytest.mark.parametrize("kind", ["lstm", "blstm"])
def test_states_of_which_no_more_is_heard_are_projected_without_a_loss(kind: str, units: Units) -> None:
    settings = FULL.model_copy(update={"kind": kind, "delay_frames": 0})
    full, outputs = lively(settings, units), 5
    with torch.no_grad():  # all that hears a state hears five directions of it
        bases = [torch.linalg.qr(torch.randn(12, outputs)).Q for _ in range(6)]
        for name, weight in full.named_parameters():
            if "weight_hh" in name:
                basis = bases[int(name.split(".")[1]) + (3 if "backwards" in name else 0)]
                weight.copy_(weight @ basis @ basis.T)
            elif name == "output.weight" or ("weight_ih" in name and ".0." not in name):
                below = 2 if name == "output.weight" else int(name.split(".")[1]) - 1
                for at, part in enumerate(weight.split(12, 1)):
                    basis = bases[below + 3 * at]
                    part.copy_(part @ basis @ basis.T)
    model = thin(settings.model_copy(update={"projection": outputs}), units)
    model.begin_as(full)  # type: ignore[arg-type]
    features = collate([noise(20), noise(9)])
    torch.testing.assert_close(model(*features).logits, full(*features).logits, rtol=0, atol=2e-5)
    weights = model.state_dict()
    projection = weights["forwards.1.weight_hr_l0"]
    torch.testing.assert_close(projection @ projection.T, torch.eye(outputs), rtol=0, atol=1e-5)
    assert jointly(weights, outputs).keys() == weights.keys()


def test_thinner_is_smaller_and_its_states_too(units: Units, tmp_path: Path) -> None:
    inputs, size, outputs, rank = FEATURES.dimension, 12, 5, 4
    counts = {}
    for name, change in {"full": {}, "projection": {"projection": outputs}, "rank": {"rank": rank}}.items():
        settings = FULL.model_copy(update=change)
        save_checkpoint(tmp_path / name, lively(settings, units), units, FEATURES, settings)
        loaded = load_checkpoint(tmp_path / name)
        counts[name], width = parameters(loaded.model), outputs if name == "projection" else size
        assert loaded.model.taps == {f"layer.{layer}": width for layer in (1, 2, 3)}
        assert loaded.lookahead_ms == 2 * 30 + 15
    biases, above = 3 * 8 * size, units.size
    assert counts == {
        "full": 4 * size * (inputs + 5 * size) + biases + above * (size + 1),
        "projection": 4 * size * (inputs + 5 * outputs) + 3 * outputs * size + biases + above * (outputs + 1),
        "rank": rank * (3 * 8 * size + inputs + 5 * size) + biases + above * (size + 1),
    }


@pytest.mark.parametrize("change", [{"projection": 5}, {"rank": 4}])
def test_nothing_behind_the_delay_is_heard(change: dict[str, int], units: Units) -> None:
    checkpoint = make_checkpoint(FULL.model_copy(update=change), units)
    for changed in (0, 8, 19):
        assert min(reach(checkpoint, 20, changed)) == max(0, changed - 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "conv", "rank": 3}, "rank belongs to kind lstm and blstm alone"),
        ({"kind": "conformer", "projection": 3}, "projection belongs to kind lstm and blstm alone"),
        ({"projection": 3, "rank": 3}, "projection and rank both thin an LSTM's matrices; give one"),
        ({"size": 12, "projection": 12}, "projection must be below size"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"bits": 16}, "should be 2, 4 or 8"),
    ],
)
def test_what_does_not_belong_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSettings.model_validate(settings)
