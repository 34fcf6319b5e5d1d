from __future__ import annotations

import pytest

from asr_kd.errors import UserError
from asr_kd.export.tokens import tokens_of
from asr_kd.units import ModelProto, Units, learn_units


def with_piece(piece: str) -> Units:
    model = ModelProto.FromString(learn_units(["ab ba"], "char", 10).model)
    model.pieces[-1].piece = piece
    return Units(model.SerializeToString())


def test_a_line_a_unit(units: Units) -> None:
    lines = tokens_of(units, "t-one", True).splitlines()
    assert lines[0] == "<blk> 0"
    assert lines[1:] == [f"{units.piece(number)} {number}" for number in range(1, units.size)]


@pytest.mark.parametrize("interface", ["t-one", "stream", "offline"])
def test_what_no_table_can_hold(interface: str) -> None:
    with pytest.raises(UserError, match=r"unit 'a\\nb' does not fit into a line of tokens.txt"):
        tokens_of(with_piece("a\nb"), interface, interface == "t-one")
    with pytest.raises(UserError, match="a unit <blk>, which names the blank"):
        tokens_of(with_piece("<blk>"), interface, interface == "t-one")


def test_a_space_within_a_unit_is_for_our_own_interfaces() -> None:
    with pytest.raises(UserError, match=r"t-one cannot hold the unit 'a b'.*export it as stream"):
        tokens_of(with_piece("a b"), "t-one", True)
    with pytest.raises(UserError, match=r"offline cannot hold the unit 'a b'.*train on features of kind own"):
        tokens_of(with_piece("a b"), "offline", True)
    assert "\na b 4\n" in tokens_of(with_piece("a b"), "stream", False)


def test_letters_that_sherpa_onnx_takes_for_bytes() -> None:
    trap = learn_units(["bơ", "ơb"], "char", 10)  # its ▁ is a space there
    with pytest.raises(UserError, match=r"t-one would take these units for bytes because of 'ơ'.*export it as stream"):
        tokens_of(trap, "t-one", True)
    assert "ơ" in tokens_of(trap, "stream", False)
    assert "字" in tokens_of(learn_units(["bơ字", "ơb"], "char", 10), "t-one", True)  # a higher byte: no such table
