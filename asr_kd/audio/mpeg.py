"""MP3: its frames, the length stated in its first one, and concatenated recordings."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from asr_kd.audio.parts import Buffer, Container, Part, before_tags, behind_tags, keep, only_zeros
from asr_kd.errors import AudioError

_HALF = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
#: kbit/s by the bits of the layer (1 is III, 2 is II), and whether it is MPEG 1
_KBPS = {
    (1, True): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, True): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, False): _HALF,
    (2, False): _HALF,
}
_MARK = re.compile(rb"Xing|Info|VBR(?=I)")  # of a frame that states a length
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


def _size(header: int, layer: int) -> int:
    """Bytes of the frame of a layer that has this header; 0 if it is none."""
    version, kbps, rate = header >> 19 & 3, header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or header >> 17 & 3 != layer or kbps in (0, 15) or rate == 3:
        return 0
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]  # MPEG 1, 2 and 2.5
    factor = 72000 if layer == 1 and version != 3 else 144000
    return factor * _KBPS[layer, version == 3][kbps] // hertz + (header >> 9 & 1)


def frame(data: Buffer, at: int) -> Frame | None:
    """The layer III frame that begins at an offset, if any."""
    header = int.from_bytes(data[at : at + 4], "big")
    size = _size(header, 1)
    return Frame(header, size, 1152 if header >> 19 & 3 == 3 else 576) if size else None


def first_size(head: bytes) -> int:
    """Size in bytes of the frame of MP3, MPEG layer II or AAC (ADTS) that begins so; 0 if it is none."""
    header = int.from_bytes(head[:4], "big")
    if (size := _size(header, 1)) or len(head) < 6:
        return size
    if header >> 16 & 0xFFF6 == 0xFFF0:
        return (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return _size(header, 2)


def recognise(head: bytes) -> tuple[str, str] | None:
    """Name and extension of the format that begins so, by two frames in a row if `head` is long enough."""
    size = first_size(head)
    if not size or (size + 6 <= len(head) and (not first_size(head[size:]) or head[size + 1] & 0xFE != head[1] & 0xFE)):
        return None
    layers = {0: ("AAC (ADTS)", "aac"), 1: ("MP3", "mp3"), 2: ("MPEG audio of layer II", "mp2")}
    return layers[head[1] >> 1 & 3]


def _info(data: Buffer, at: int, one: Frame) -> tuple[int | None, int | None] | None:
    """Of a first frame that holds no sound but a length: number of frames that follow, and bytes; None if not stated."""
    for offset in (at + 4 + one.side, at + 6 + one.side):  # two bytes later if there is a checksum
        head = data[offset : offset + 16]
        if head[:4] in (b"Xing", b"Info") and len(head) == 16:
            flags, first, second = struct.unpack_from(">III", head, 4)
            frames = first if flags & 1 else None
            return frames, (second if flags & 1 else first) if flags & 2 else None
    head = data[at + 36 : at + 54]
    if head[:4] == b"VBRI" and len(head) == 18:
        size, frames = struct.unpack_from(">II", head, 10)
        return frames, size
    return None


def examine(data: Buffer, start: int, end: int) -> Container:
    """The recordings of an MP3 from `start` to `end`, more than one if files were concatenated.

    libsndfile decodes as many frames as the first one states, or guesses from its size if it states nothing. If that would be
    wrong, a frame with the right length is put in front.
    """
    parts: list[Part] = []
    plain, at = True, start
    stop = before_tags(data, start, end)
    while at < stop:
        at = behind_tags(data, at, stop)
        if at >= stop or only_zeros(data, at, stop):  # padding
            break
        found, part_plain, at = _one(data, at, stop)
        plain = plain and part_plain
        parts += found
    return Container("mp3", parts, plain and len(parts) == 1)


def _one(data: Buffer, start: int, end: int) -> tuple[list[Part], bool, int]:
    """A recording (two, if the stated length ends in the middle), whether its stated length is right, and its end."""
    opening = frame(data, start)
    if opening is None:
        raise AudioError(f"damaged at byte {start} (no MP3 frame begins there); {keep('mp3')}")
    info = _info(data, start, opening)
    stated, stated_bytes = info or (None, None)
    marks = _marks(data, start + opening.size, end)
    at, frames, split = start, 0, 0
    while one := frame(data, at):
        other = (one.header ^ opening.header) & SAME or one.side != opening.side
        if at != start and (other or (at in marks and _info(data, at, one))):
            break  # another recording begins
        if stated and frames == stated + 1:
            split = at
        at += one.size
        frames += 1
        if at >= end:
            break
    if at > end:
        raise AudioError(f"truncated, its last MP3 frame lacks {at - end} bytes; {keep('mp3')}")
    if info is None:
        return [_stated(data, start, at, opening, frames)], True, at
    there, first = frames - 1, start + opening.size
    # both must be less, for encoders differ in what they count
    if stated is not None and stated_bytes is not None and there < stated and at - start < stated_bytes:
        what = "truncated" if at == end else f"damaged at byte {at}"
        raise AudioError(f"{what}, it states {stated} MP3 frames and {there} are there; {keep('mp3')}")
    if stated is not None and stated - 1 <= there <= stated + 1:
        return [Part(start, at)], True, at
    if there == 0:
        return [], False, at  # a frame with a length, and no sound
    following = frame(data, first)
    assert following is not None
    if stated and split and _independent(data, split):  # a recording without a stated length was appended
        return [Part(start, split), _stated(data, split, at, following, frames - stated - 1)], False, at
    return [_stated(data, first, at, following, there)], False, at


def _marks(data: Buffer, start: int, end: int) -> set[int]:
    """Offsets at which frames that state a length may begin."""
    offsets = (13, 15, 21, 23, 36, 38)  # of the mark within such a frame
    return {found.start() - offset for found in _MARK.finditer(data, start, end) for offset in offsets}


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
