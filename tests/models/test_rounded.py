"""Networks that run on rounded matrices: the rounding, what is stored, and that both are the same network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from asr_kd.errors import UserError
from asr_kd.models.acoustic import build_model, collate, load_checkpoint, save_checkpoint, stored_weights
from asr_kd.models.rounded import _from_bytes, _in_bytes, _Rounding, packed, rounded, shaped, steps_of, unpacked
from asr_kd.models.settings import ModelSettings
from asr_kd.units import Units
from tests.models.test_acoustic import FEATURES, lively, noise

BITS = (2, 4, 8)
KINDS: dict[str, dict[str, Any]] = {
    "lstm": {}, "separable": {}, "chunked_conformer": {"heads": 2}, "emformer": {"heads": 2, "right_frames": 2, "memory": 1},
    "blstm": {}, "conv": {}, "conformer": {"heads": 2},
}  # fmt: skip
LSTM = ModelSettings(kind="lstm", layers=2, size=12, delay_frames=3, bits=4)


@pytest.mark.parametrize("bits", BITS)
def test_weights_become_the_nearest_multiple_of_a_step_of_their_row(bits: int) -> None:
    weight, most = torch.randn(7, 30, generator=torch.Generator().manual_seed(1)), 2 ** (bits - 1) - 1
    for row, made in zip(weight.tolist(), rounded(weight, bits).tolist(), strict=True):
        step = max(map(abs, row)) / most
        for before, after in zip(row, made, strict=True):
            assert abs(after / step - round(after / step)) < 1e-2
            assert abs(after - before) <= step / 2 * (1 + 1e-3)
            assert abs(round(after / step)) <= most
    assert rounded(weight, bits).abs().amax(1).tolist() == pytest.approx(weight.abs().amax(1).tolist(), rel=2**-14)


def test_ties_go_to_the_even_multiple_and_zero_stays_zero() -> None:
    step = torch.ones(1, 1)
    ties = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0, -0.0]])
    made = _Rounding.apply(ties, step, 7)
    assert made.tolist() == [[0, 2, 2, 0, -2, -2, 0, 0]]
    assert not made.signbit()[0, [0, 3, 6, 7]].any()
    zeros = torch.zeros(3, 5)
    assert torch.equal(rounded(zeros, 4), zeros) and steps_of(zeros, 4).tolist() == [[1.0]] * 3
    assert torch.equal(rounded(torch.full((1, 2), 1e-44), 2), torch.zeros(1, 2))  # too small for a step


def test_the_gradient_is_one_inside_and_none_where_it_is_cut_off() -> None:
    weight = torch.tensor([[0.0, 0.49, 1.2, 3.4, 3.6, 9.0, -3.4, -4.0]], requires_grad=True)
    _Rounding.apply(weight, torch.ones(1, 1), 3).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [[1, 1, 1, 1, 0, 0, 1, 0]]
    whole = torch.randn(4, 9, requires_grad=True)
    rounded(whole, 2).square().sum().backward()  # the step is that of the largest: nothing is cut off
    torch.testing.assert_close(whole.grad, 2 * rounded(whole.detach(), 2))


@pytest.mark.parametrize("bits", BITS)
def test_what_is_rounded_once_stays(bits: int) -> None:
    weight = torch.randn(300, 40, generator=torch.Generator().manual_seed(2)) * torch.logspace(-20, 20, 300)[:, None]
    once = rounded(weight, bits)
    assert torch.equal(rounded(once, bits), once)
    assert torch.equal(steps_of(once, bits), steps_of(weight, bits))


def test_a_fine_step_is_nearly_float32() -> None:
    weight = torch.randn(20, 50)
    assert (rounded(weight, 16) - weight).abs().max() < 1e-4


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 3, 4, 7, 8])
def test_whole_numbers_in_bytes(bits: int, columns: int) -> None:
    most = 2 ** (bits - 1) - 1
    codes = torch.randint(-most, most + 1, (5, columns), dtype=torch.int16)
    data = _in_bytes(codes, bits)
    assert data.shape == (5, -(-columns * bits // 8)) and data.dtype == torch.uint8
    back = _from_bytes(data, bits)
    assert torch.equal(back[:, :columns], codes) and not back[:, columns:].any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_stored_network_is_the_one_that_runs(kind: str, bits: int, units: Units, tmp_path: Path) -> None:
    settings = ModelSettings.model_validate({"kind": kind, "layers": 2, "size": 12, "bits": bits, **KINDS[kind]})
    model = lively(settings, units)
    mark = save_checkpoint(tmp_path / "a", model, units, FEATURES, settings)
    loaded = load_checkpoint(tmp_path / "a")
    features = collate([noise(20), noise(7)])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(*features).logits, model(*features).logits, rtol=0, atol=0)
    own = {name: weight for name, weight in model.named_parameters() if weight.dim() > 1}
    for name, weight in loaded.model.state_dict().items():
        expected = rounded(own[name], bits) if name in own else model.state_dict()[name]
        assert torch.equal(weight, expected)
    # an unchanged network that is rounded again is written as the same bytes
    assert save_checkpoint(tmp_path / "b", loaded.model, units, FEATURES, settings) == mark
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("bits", BITS)
def test_it_is_that_small(bits: int, units: Units, tmp_path: Path) -> None:
    settings = ModelSettings(kind="lstm", layers=2, size=96)
    model = build_model(settings, FEATURES.dimension, units.size)
    save_checkpoint(tmp_path / "full", model, units, FEATURES, settings)
    save_checkpoint(tmp_path / "small", model, units, FEATURES, settings.model_copy(update={"bits": bits}))
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    others = sum(weight.numel() for weight in model.parameters() if weight.dim() == 1)
    expected = sum(weight.numel() * bits // 8 + 4 * len(weight) for weight in matrices) + 4 * others
    assert (
        sum(one.nbytes for one in stored_weights(model, settings.model_copy(update={"bits": bits})).values())
        == expected
    )
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "small")}
    assert sizes["small"] - expected < 2000  # names and shapes
    assert sizes["small"] / sizes["full"] < bits / 32 + 0.06


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_reaches_what_it_says_and_the_slope_every_weight(kind: str, units: Units) -> None:
    """An LSTM keeps a list of its own weights: with those it would run as if nothing was rounded."""
    plain = ModelSettings.model_validate({"kind": kind, "layers": 2, "size": 12, "dropout": 0.0, **KINDS[kind]})
    model, features = lively(plain, units), collate([noise(20), noise(9)])
    exact, said = model(*features).logits, {}
    for bits in BITS:
        rough = build_model(plain.model_copy(update={"bits": bits}), FEATURES.dimension, units.size).eval()
        rough.load_state_dict(model.state_dict())
        said[bits] = rough(*features).logits
        by_hand = lively(plain, units)
        with torch.no_grad():
            for weight in by_hand.parameters():
                if weight.dim() > 1:
                    weight.copy_(rounded(weight, bits))
        torch.testing.assert_close(said[bits], by_hand(*features).logits, rtol=1e-5, atol=1e-5)
        rough(*features).logits.square().sum().backward()
        by_hand(*features).logits.square().sum().backward()
        for one, other in zip(rough.parameters(), by_hand.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)
            assert one.is_leaf
    errors = [(said[bits] - exact).abs().mean().item() for bits in BITS]
    assert errors[0] > errors[1] > 5 * errors[2] > 0
    with torch.no_grad():  # another weight, another step
        rough.output.weight[0, 0] += 30.0
        assert (rough(*features).logits - said[8]).abs().max() > 1


def test_a_copy_and_a_moving_average_run_on_their_own_rounded_weights(units: Units) -> None:
    model, features = lively(LSTM, units), collate([noise(12)])
    model(*features)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    average.update_parameters(model)
    by_hand = build_model(LSTM.model_copy(update={"bits": None}), FEATURES.dimension, units.size).eval()
    by_hand.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        for weight in by_hand.parameters():
            if weight.dim() > 1:
                weight.copy_(rounded(weight, 4))
        torch.testing.assert_close(average.module.eval()(*features).logits, by_hand(*features).logits)


@pytest.mark.parametrize("bits", BITS)
def test_a_minute_in_pieces_does_not_drift(bits: int, units: Units, tmp_path: Path) -> None:
    settings = LSTM.model_copy(update={"bits": bits})
    save_checkpoint(tmp_path, lively(settings, units), units, FEATURES, settings)
    for model in (load_checkpoint(tmp_path).model, lively(settings, units)):
        features, lengths = collate([noise(2000)])
        heard, state = [], None
        with torch.no_grad():
            whole = model(features, lengths).logits
            for piece in torch.nn.functional.pad(features, (0, 0, 0, model.delay)).split(17, 1):
                logits, state = model.stream(piece, state)
                heard.append(logits)
        torch.testing.assert_close(torch.cat(heard, 1)[:, model.delay :], whole, rtol=0, atol=2e-5)


def change(name: str, value: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        if value is None:
            del weights[name]
        else:
            weights[name] = value(weights[name]).contiguous()
        safetensors.torch.save_file(weights, folder / "model.safetensors")

    return damage


def settings_say(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "checkpoint.json"
        said = json.loads(path.read_text())
        said["model"] = {name: value for name, value in {**said["model"], **changes}.items() if value is not None}
        path.write_text(json.dumps(said))

    return damage


FIT, BELONG = "do not fit the settings", "do not belong together"
DAMAGE = {
    "no codes": (change("output.weight.codes", None), FIT),
    "no steps": (change("output.weight.steps", None), FIT),
    "too few steps": (change("output.weight.steps", lambda steps: steps[:-1]), FIT),
    "steps of another type": (change("output.weight.steps", lambda steps: steps.double()), FIT),
    "one step for all": (change("output.weight.steps", lambda steps: steps[0]), FIT),
    "codes of another type": (change("output.weight.codes", lambda codes: codes.int()), FIT),
    "codes cut": (change("output.weight.codes", lambda codes: codes[:, :-1]), FIT),
    "codes flat": (change("output.weight.codes", lambda codes: codes.flatten()), FIT),
    "a step changed": (change("output.weight.steps", lambda steps: steps * 1.001), BELONG),
    "a step is no number": (change("output.weight.steps", lambda steps: steps * torch.nan), BELONG),
    "a code changed": (change("output.weight.codes", lambda codes: codes ^ 1), BELONG),
    # with a projection to 5: half a byte of each row is left
    "a filling changed": (change("output.weight.codes", lambda codes: codes | torch.tensor([0, 0, 0x80], dtype=torch.uint8)), FIT),
    "other bits": (settings_say(bits=8), FIT),
    "no bits": (settings_say(bits=None), FIT),
    "bits that there are not": (settings_say(bits=3), "bits: input should be 2, 4 or 8"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_sentence(damage: str, units: Units, tmp_path: Path) -> None:
    settings = LSTM.model_copy(update={"projection": 5}) if "filling" in damage else LSTM
    save_checkpoint(tmp_path, lively(settings, units), units, FEATURES, settings)
    load_checkpoint(tmp_path)
    do, message = DAMAGE[damage]
    do(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_are_not_numbers_are_found_in_the_stored_ones(units: Units, tmp_path: Path) -> None:
    model = lively(LSTM, units)
    with torch.no_grad():
        model.output.weight[2, 3] = torch.nan
    save_checkpoint(tmp_path, model, units, FEATURES, LSTM)
    with pytest.raises(UserError, match="has weights that are not numbers"):
        load_checkpoint(tmp_path)


def test_a_network_without_a_number_is_saved_for_the_loss_to_tell(units: Units, tmp_path: Path) -> None:
    """Also where columns fill a byte: what is not a number times nothing is not a number."""
    odd = ModelSettings(kind="lstm", layers=1, size=9, bits=4)
    model = lively(odd, units)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(torch.nan)
    save_checkpoint(tmp_path, model, units, FEATURES, odd)
    with pytest.raises(UserError, match="has weights that are not numbers"):
        load_checkpoint(tmp_path)


def test_a_bias_of_attention_is_not_rounded(units: Units) -> None:
    settings = ModelSettings(kind="chunked_conformer", layers=1, size=12, heads=2, bits=2)
    stored = stored_weights(lively(settings, units), settings)
    assert stored["layers.0.attention.bias"].dtype == torch.float32
    assert stored["layers.0.attention.query.weight.codes"].dtype == torch.uint8


def test_what_is_not_used_is_not_written_so_no_hash_changes(units: Units, tmp_path: Path) -> None:
    plain = ModelSettings(kind="conv", layers=1, size=4)
    assert not {"bits", "rank", "projection"} & plain.model_dump().keys()
    assert LSTM.model_dump()["bits"] == 4 and LSTM.model_dump(include={"bits"}) == {"bits": 4}
    assert ModelSettings.model_validate(LSTM.model_dump()) == LSTM
    marks = {
        bits: save_checkpoint(tmp_path / str(bits), lively(kind, units), units, FEATURES, kind)
        for bits in (None, *BITS)
        if (kind := plain.model_copy(update={"bits": bits}))
    }
    assert len(set(marks.values())) == 4


def test_shapes_that_do_not_fit_are_refused() -> None:
    model = torch.nn.Linear(5, 3)
    stored = packed(model, 4)
    assert torch.equal(shaped(unpacked(stored, 4), model, 4)["weight"], rounded(model.weight, 4).detach())
    with pytest.raises(ValueError, match="weight is not of 3 rows of 6"):
        shaped(unpacked(stored, 4) | {"weight": torch.zeros(3, 8)}, torch.nn.Linear(6, 3), 4)
