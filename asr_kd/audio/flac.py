"""FLAC: compare the number of samples in its header with that of its last frame."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from asr_kd.audio.parts import Buffer, Container, Part, before_tags, behind_tags, convert, keep, only_zeros
from asr_kd.errors import AudioError

BITS = (8, 16, 24)  # libsndfile reads no others
SEARCHED = 1 << 20  # bytes before the end in which the last frame must begin
_START = re.compile(rb"fLaC[\0\x80]\0\0\x22")


def _table(polynomial: int, bits: int) -> tuple[int, ...]:
    top, mask, table = 1 << (bits - 1), (1 << bits) - 1, []
    for value in range(256):
        value <<= bits - 8
        for _ in range(8):
            value = (value << 1 ^ polynomial if value & top else value << 1) & mask
        table.append(value)
    return tuple(table)


_TABLES = {bits: _table(polynomial, bits) for bits, polynomial in ((8, 0x07), (16, 0x8005))}


def _crc(data: bytes, bits: int) -> int:
    table, mask, value = _TABLES[bits], (1 << bits) - 1, 0
    for byte in data:
        value = (value << 8 & mask) ^ table[value >> bits - 8 ^ byte]
    return value


@dataclass
class _Info:
    """The fields of STREAMINFO, 0 if unknown; `frames`: offset of the first frame."""

    block: int
    max_frame: int
    rate: int
    bits: int
    total: int
    frames: int


def examine(data: Buffer, start: int, end: int) -> Container:
    """The sound of a FLAC from `start` to `end`; all of it, even if its header states no length or less."""
    starts = [start, *(found.start() for found in _START.finditer(data, start + 8, end))]
    parts, plain = [], start == 0 and len(starts) == 1
    for first, following in zip(starts, [*starts[1:], end], strict=True):
        stop = following
        tag = data.rfind(b"ID3", first, following) if following < end else -1
        if tag >= 0 and behind_tags(data, tag, following) == following:  # of the FLAC that follows
            stop = tag
        part = _one(data, first, before_tags(data, first, stop))
        plain = plain and not part.head
        parts.append(part)
    return Container("flac", parts, plain)


def _one(data: Buffer, start: int, end: int) -> Part:
    info = _info(data, start, end)
    if info.bits not in BITS:
        raise AudioError(f"FLAC of {info.bits} bits is not read here; convert it: {convert('flac')}")
    found = _last_frame(data, info, end)
    if found is None:
        if info.total:
            return Part(start, end)  # decoding will show how much of it is there
        raise AudioError(f"truncated or damaged, it does not end with a whole FLAC frame; {keep('flac')}")
    if info.total > found:
        raise AudioError(
            f"truncated, its header says {info.total / info.rate:.3f} s and {found / info.rate:.3f} s are there; {keep('flac')}"
        )
    if info.total == found:
        return Part(start, end)
    head = bytearray(data[start : start + 26])  # the number of samples is the last 36 bits
    head[21] = head[21] & 0xF0 | found >> 32
    head[22:26] = struct.pack(">I", found & 0xFFFFFFFF)
    return Part(start + 26, end, bytes(head))


def _info(data: Buffer, start: int, end: int) -> _Info:
    at, last, stream = start + 4, False, b""
    while not last:
        if at + 4 > end:
            raise AudioError(f"truncated, it ends within its FLAC header; {keep('flac')}")
        last, kind, size = bool(data[at] & 0x80), data[at] & 0x7F, int.from_bytes(data[at + 1 : at + 4], "big")
        at += 4
        if kind == 0 and size >= 34 and at + 34 <= end:
            stream = data[at : at + 34]
        at += size
    packed = int.from_bytes(stream[10:18], "big")
    rate, bits, total = packed >> 44, (packed >> 36 & 31) + 1, packed & (1 << 36) - 1
    if not rate:
        raise AudioError("damaged, its FLAC header does not say how the sound is stored; make it again")
    if at > end:
        raise AudioError(f"truncated, it ends within its FLAC header; {keep('flac')}")
    return _Info(int.from_bytes(stream[2:4], "big"), int.from_bytes(stream[7:10], "big"), rate, bits, total, at)


def _last_frame(data: Buffer, info: _Info, end: int) -> int | None:
    """Number of samples up to the end of the last complete frame; None if none is found.

    A frame that ends at the stated length is accepted if nothing else follows; any other one only by its checksum.
    """
    at, least, most = end, max(info.frames, end - SEARCHED), 0
    sync = data[info.frames : info.frames + 2]  # the same in every frame
    while sync in (b"\xff\xf8", b"\xff\xf9") and (at := data.rfind(sync, least, at + 1)) >= 0:
        samples = _frame_end(data[at : at + 20], info)
        if samples is not None and samples == info.total and info.max_frame:
            stop = at + info.max_frame
            if stop < end and not only_zeros(data, stop, end):
                raise AudioError(
                    f"{end - stop} bytes follow its last FLAC frame that are neither sound nor a tag; write it anew: {convert('flac')}"
                )
            return samples
        if samples is not None and not _crc(bytes(data[at:end]), 16):
            return samples
        most = max(most, samples or 0)
        at -= 1
    if most > info.total > 0:
        raise AudioError(
            f"damaged, more FLAC frames follow than its header states, and no whole one ends it; {keep('flac')}"
        )
    return 0 if info.frames == end else None


_BLOCKS = {1: 192, **{code: 576 << code - 2 for code in range(2, 6)}, **{code: 1 << code for code in range(8, 16)}}


def _frame_end(head: bytes, info: _Info) -> int | None:
    """Number of samples up to the end of a frame, by its header; None if this is not a frame."""
    if len(head) < 6 or head[3] & 1:
        return None
    variable, block, rate = head[1] & 1, head[2] >> 4, head[2] & 15
    length = next((n for n in range(8) if not head[4] & 0x80 >> n), 8) or 1  # of a number written as UTF-8 writes it
    size = 4 + length + {6: 1, 7: 2}.get(block, 0) + {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if block == 0 or rate == 15 or length == 8 or len(head) <= size or _crc(head[:size], 8) != head[size]:
        return None
    number = head[4] if length == 1 else head[4] & (0x7F >> length)
    for byte in head[5 : 4 + length]:
        number = number << 6 | byte & 63
    here = 4 + length
    samples = head[here] + 1 if block == 6 else int.from_bytes(head[here : here + 2], "big") + 1 if block == 7 else _BLOCKS[block]  # fmt: skip
    return number + samples if variable else number * info.block + samples
