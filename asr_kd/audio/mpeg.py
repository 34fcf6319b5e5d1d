"""MP3: its frames, the length stated in its first one, and concatenated recordings."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from asr_kd.audio.parts import Buffer, Container, Part, before_tags, behind_tags, keep, only_zeros
from asr_kd.errors import AudioError

_KBPS = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
SAME = 0xFFFE0C00  # header bits that do not change within a recording: sync, version, layer and rate


@dataclass
class Frame:
    """A frame of layer III: its header, bytes and samples."""

    header: int
    size: int
    samples: int

    @property
    def side(self) -> int:
        """Bytes of side information after the header."""
        mono, first = self.header >> 6 & 3 == 3, self.header >> 19 & 3 == 3
        return (17 if mono else 32) if first else (9 if mono else 17)


def frame(data: Buffer, at: int) -> Frame | None:
    """The layer III frame that begins at an offset, if any."""
    if at + 4 > len(data):
        return None
    header = struct.unpack_from(">I", data, at)[0]
    version, layer, kbps, rate = header >> 19 & 3, header >> 17 & 3, header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or layer != 1 or kbps in (0, 15) or rate == 3:
        return None
    first = version == 3  # MPEG 1; else 2 or 2.5
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    size = (144 if first else 72) * 1000 * _KBPS[3 if first else 2][kbps] // hertz + (header >> 9 & 1)
    return Frame(header, size, 1152 if first else 576)


_LAYER_II = (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)


def first_size(head: bytes) -> int:
    """Size in bytes of the frame of MP3, MPEG layer II or AAC (ADTS) that begins so; 0 if it is none."""
    if one := frame(head, 0):
        return one.size
    if len(head) < 6 or head[0] != 0xFF:
        return 0
    if head[1] & 0xF6 == 0xF0:
        return (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    version, kbps, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if head[1] & 0xE6 != 0xE4 or version == 1 or kbps in (0, 15) or rate == 3:
        return 0
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    return 144000 * (_LAYER_II if version == 3 else _KBPS[2])[kbps] // hertz + (head[2] >> 1 & 1)


def recognise(head: bytes) -> tuple[str, str] | None:
    """Name and extension of the format that begins so, by two frames in a row if `head` is long enough."""
    size = first_size(head)
    if not size or (size + 6 <= len(head) and (not first_size(head[size:]) or head[size + 1] & 0xFE != head[1] & 0xFE)):
        return None
    return ("AAC (ADTS)", "aac") if head[1] & 0xF6 == 0xF0 else ("MP3", "mp3") if head[1] & 6 == 2 else ("MPEG audio of layer II", "mp2")  # fmt: skip


@dataclass
class _Info:
    """A first frame that holds no sound but a length: number of frames that follow, and bytes; None if not stated."""

    frames: int | None
    bytes: int | None


def _info(data: Buffer, at: int, one: Frame) -> _Info | None:
    for offset in (at + 4 + one.side, at + 6 + one.side):  # two bytes later if there is a checksum
        head = data[offset : offset + 16]
        if head[:4] in (b"Xing", b"Info") and len(head) == 16:
            flags, first, second = struct.unpack_from(">III", head, 4)
            frames = first if flags & 1 else None
            return _Info(frames, (second if flags & 1 else first) if flags & 2 else None)
    head = data[at + 36 : at + 54]
    if head[:4] == b"VBRI" and len(head) == 18:
        size, frames = struct.unpack_from(">II", head, 10)
        return _Info(frames, size)
    return None


def examine(data: Buffer, start: int, end: int, name: str) -> Container:
    """The recordings of an MP3, more than one if files were concatenated.

    libsndfile decodes as many frames as the first one states, or guesses from its size if it states nothing. If that would be
    wrong, a frame with the right length is put in front.

    Args:
        start: offset of the MP3 in `data`, which is read up to `end`; `name` as of `containers.examine`.

    Raises:
        AudioError: when it is cut or damaged.
    """
    parts: list[Part] = []
    plain, at = True, start
    stop = before_tags(data, start, end)
    while at < stop:
        at = behind_tags(data, at, stop)
        if at >= stop or only_zeros(data, at, stop):  # padding
            break
        found, part_plain, at = _one(data, at, stop, name)
        plain = plain and part_plain
        parts += found
    return Container("mp3", parts, plain and len(parts) == 1)


def _one(data: Buffer, start: int, end: int, name: str) -> tuple[list[Part], bool, int]:
    """A recording (two, if the stated length ends in the middle), whether its stated length is right, and its end."""
    opening = frame(data, start)
    if opening is None:
        raise AudioError(f"{name}: damaged at byte {start} (no MP3 frame begins there); {keep('mp3')}")
    info = _info(data, start, opening)
    marks = _marks(data, start + opening.size, end)
    at, frames, split = start, 0, 0
    while one := frame(data, at):
        other = (one.header ^ opening.header) & SAME or one.side != opening.side
        if at != start and (other or (at in marks and _info(data, at, one))):
            break  # another recording begins
        if info and info.frames and frames == info.frames + 1:
            split = at
        at += one.size
        frames += 1
        if at >= end:
            break
    if at > end:
        raise AudioError(f"{name}: truncated, its last MP3 frame lacks {at - end} bytes; {keep('mp3')}")
    if info is None:
        return [_stated(data, start, at, opening, frames)], True, at
    there, first = frames - 1, start + opening.size
    # both must be less, for encoders differ in what they count
    if info.frames is not None and info.bytes is not None and there < info.frames and at - start < info.bytes:
        what = "truncated" if at == end else f"damaged at byte {at}"
        raise AudioError(f"{name}: {what}, it states {info.frames} MP3 frames and {there} are there; {keep('mp3')}")
    if info.frames is not None and there <= info.frames + 1 and there + 1 >= info.frames:
        return [Part(start, at)], True, at
    if there == 0:
        return [], False, at  # a frame with a length, and no sound
    following = frame(data, first)
    assert following is not None
    if split and _independent(data, split):  # a recording without a stated length was appended
        return [Part(start, split), _stated(data, split, at, following, frames - info.frames - 1)], False, at  # type: ignore[operator]
    return [_stated(data, first, at, following, there)], False, at


def _marks(data: Buffer, start: int, end: int) -> set[int]:
    """Offsets at which frames that state a length may begin."""
    marks: set[int] = set()
    offsets = (13, 15, 21, 23, 36, 38)  # of the mark within such a frame
    for mark in (b"Xing", b"Info", b"VBRI"):
        at = data.find(mark, start, end)
        while at >= 0:
            marks.update(at - offset for offset in offsets)
            at = data.find(mark, at + 4, end)
    return marks


def _independent(data: Buffer, at: int) -> bool:
    """Whether a frame uses no bits of earlier frames, like the first one of a recording."""
    one = frame(data, at)
    assert one is not None
    side = at + (4 if one.header >> 16 & 1 else 6)
    return data[side] == 0 and (one.samples == 576 or data[side + 1] < 128)


def _stated(data: Buffer, start: int, end: int, opening: Frame, frames: int) -> Part:
    """A part with a frame in front that states its length, of the lowest bit rate with room for it."""
    header = (opening.header | 1 << 16) & ~(15 << 12 | 1 << 9)  # without checksum and padding
    sizes = ((frame(struct.pack(">I", header | kbps << 12), 0), kbps) for kbps in range(1, 15))
    size, kbps = next((one.size, kbps) for one, kbps in sizes if one and one.size >= 20 + opening.side)
    stated = b"Info" + struct.pack(">III", 3, frames, size + end - start)
    head = struct.pack(">I", header | kbps << 12) + bytes(opening.side) + stated
    return Part(start, end, head.ljust(size, b"\0"))
