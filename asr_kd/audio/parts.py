"""What the readers of containers share: the parts of a file that are decoded one by one, and the tags around them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from asr_kd.errors import AudioError

Buffer = bytes | mmap.mmap
GAP = 1 << 20  # bytes of a mapped file that are read at once


@dataclass(frozen=True)
class Pcm:
    """Uncompressed samples in a file: WAV's format tag and bits a sample, big-endian or not."""

    rate: int
    channels: int
    tag: int
    bits: int
    big: bool = False

    @property
    def step(self) -> int:
        """Bytes of a sample of all channels."""
        return self.channels * (-(-self.bits // 8))


@dataclass
class Part:
    """Bytes `start` to `end` of a file.

    Attributes:
        head: bytes to put in front, in place of what was wrong or missing.
        pcm: the format, if they are uncompressed samples; else libsndfile reads them.
        samples: their number, if it is known and libsndfile may find another.
    """

    start: int
    end: int
    head: bytes = b""
    pcm: Pcm | None = None
    samples: int | None = None


@dataclass
class Container:
    """What a file is: its `extension`, and its parts, more than one if recordings were concatenated.

    `plain`: whether every reader finds all of its sound: one part with a right header and nothing in front.
    """

    extension: str
    parts: list[Part]
    plain: bool = True


@contextmanager
def named(name: str) -> Iterator[None]:
    """What is wrong with a recording, which its readers say, begins with its name."""
    try:
        yield
    except AudioError as error:
        raise AudioError(f"{name}: {error}") from None


def convert(ending: str) -> str:
    """The command that converts or repairs a file of a kind."""
    return f"ffmpeg -i bad.{ending} -c:a pcm_s16le good.wav"


def keep(ending: str) -> str:
    """What to do with a cut file: fetch it again, or make a valid file from what is there."""
    return f"fetch the file again, or keep what is there: {convert(ending)}"


def only_zeros(data: Buffer, start: int, end: int) -> bool:
    """Whether there are only zeros between `start` and `end`."""
    return all(not data[at : min(at + GAP, end)].strip(b"\0") for at in range(start, end, GAP))


def tag_size(head: bytes) -> int:
    """Size of the tag that begins with these 32 bytes: ID3v2, APE or ID3v1; 0 if there is none."""
    if head[:3] == b"ID3" and len(head) >= 10 and 2 <= head[3] <= 4 and max(head[6:10]) < 128:
        return 10 + _synchsafe(head[6:10]) + (10 if head[5] & 0x10 else 0)
    if head[:8] == b"APETAGEX" and len(head) >= 32:
        return 32 + (int.from_bytes(head[12:16], "little") if head[23] & 0x20 else 0)
    return 128 if head[:3] == b"TAG" else 0


def behind_tags(data: Buffer, at: int, end: int) -> int:
    """Offset after the tags at `at`: ID3v2, APE, and an ID3v1 or Lyrics3 left between concatenated files."""
    while True:
        head = data[at : at + 32]
        size = tag_size(head)
        if size and (size != 128 or head[:3] != b"TAG" or at + 128 == end or _begins(data, at + 128)):
            at += size
        elif head[:11] == b"LYRICSBEGIN" and (mark := data.find(b"LYRICS200", at, at + GAP)) >= 0:
            at = mark + 9
        else:
            return at


def _begins(data: Buffer, at: int) -> bool:
    """Whether something known begins there: a tag, a container or an MPEG frame."""
    head = data[at : at + 8]
    return head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64", b"fLaC", b"OggS") or head[:3] in (b"ID3", b"TAG", b"APE") or (
        len(head) > 1 and head[0] == 0xFF and head[1] >= 0xE0
    )  # fmt: skip


def before_tags(data: Buffer, start: int, end: int) -> int:
    """Offset of the tags at the end of a file: ID3v1 (and its extension), APE, Lyrics3, ID3v2 with a footer."""
    while True:
        tail = data[max(start, end - 256) : end]
        if tail[-128:][:3] == b"TAG" and len(tail) >= 128:
            size = 128
        elif tail[-227:][:4] == b"TAG+" and len(tail) >= 227:
            size = 227
        elif tail[-32:][:8] == b"APETAGEX":
            size = int.from_bytes(tail[-20:-16], "little") + (32 if tail[-9] & 0x80 else 0)
        elif tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit():
            size = int(tail[-15:-9]) + 15
        elif tail[-10:-7] == b"3DI" and max(tail[-4:]) < 128:
            size = _synchsafe(tail[-4:]) + 20
        else:
            return end
        if size > end - start:
            return end
        end -= size


def _synchsafe(four: bytes) -> int:
    return sum(byte << shift for byte, shift in zip(four, (21, 14, 7, 0), strict=True))
