"""tokens.txt: a unit and its number in each line."""

from __future__ import annotations

from asr_kd.errors import UserError
from asr_kd.units import Units

BLANK = "<blk>"
#: the highest byte of a table that sherpa-onnx takes for one of bytes written as letters (its letters end with ơ, ư, ǃ)
LAST_OF_BYTES = 0xC6


def tokens_of(units: Units, interface: str, for_sherpa: bool) -> str:
    """The lines of tokens.txt, the blank first.

    Args:
        units: whose pieces they are.
        interface: that reads them.
        for_sherpa: whether sherpa-onnx does, which parts a line at white space.

    Raises:
        UserError: when the file cannot hold a piece; it names an interface that can, if one can.
    """
    pieces = [BLANK, *(units.piece(unit) for unit in range(1, units.size))]
    if (broken := next((one for one in pieces if "\n" in one or "\r" in one or not one), None)) is not None:
        raise UserError(
            f"checkpoint: its unit {broken!r} does not fit into a line of tokens.txt; no interface can hold it"
        )
    if BLANK in pieces[1:]:
        raise UserError(
            f"checkpoint: it has a unit {BLANK}, which names the blank in tokens.txt; train with units without it"
        )
    if for_sherpa:
        remedy = (
            "export it as stream"
            if interface == "t-one"
            else "train on features of kind own, whose graphs onnxruntime runs"
        )
        if (spaced := next((one for one in pieces if one.split() != [one]), None)) is not None:
            raise UserError(
                f"interface: {interface} cannot hold the unit {spaced!r}, tokens.txt parts its lines at spaces; {remedy}"
            )
        # what begins a word is a space there, and does not count
        if max(byte for one in pieces for byte in one.removeprefix("▁").encode()) == LAST_OF_BYTES:
            letter = next(one for one in pieces if LAST_OF_BYTES in one.encode())
            raise UserError(
                f"interface: {interface} would take these units for bytes because of {letter!r} (sherpa-onnx guesses so by the "
                f"letters of the table); {remedy}"
            )
    return "".join(f"{piece} {number}\n" for number, piece in enumerate(pieces))
