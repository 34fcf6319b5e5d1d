"""Ogg: its pages, their checksums, and concatenated streams."""

from __future__ import annotations

import struct
import zlib

from asr_kd.audio.parts import Buffer, Container, Part, before_tags, behind_tags, convert, keep, only_zeros
from asr_kd.errors import AudioError

#: first bytes of a stream → its codec, and the extension if it is supported
CODECS = {
    b"\1vorbis": ("Vorbis", "ogg"), b"OpusHead": ("Opus", "opus"), b"\x7fFLAC": ("FLAC", None), b"Speex   ": ("Speex", None),
    b"\x80theora": ("Theora, a film", None), b"fishead\0": ("a film", None), b"BBCD\0": ("Dirac, a film", None), b"\x80kate": ("Kate, subtitles", None),
    b"CELT    ": ("CELT", None), b"PCM     ": ("PCM", None),
}  # fmt: skip
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _checksum(page: bytes) -> int:
    # Ogg's CRC is zlib's with every bit order reversed, start 0 and no final inversion
    value = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)


def codec(page: bytes) -> tuple[str, str | None]:
    """The codec named in the first page of a stream, and its extension; None if it is not supported."""
    body = page[27 + page[26] :] if len(page) > 26 else b""
    return next((value for mark, value in CODECS.items() if body.startswith(mark)), ("something unknown", None))


def examine(data: Buffer, start: int, end: int) -> Container:
    """The streams of an Ogg from `start` to `end`, one after another (chained, as by `cat`)."""
    parts: list[Part] = []
    extension, at, first, last, before = "", start, start, 4, -1
    stop = before_tags(data, start, end)
    while at < stop:
        if data[at : at + 4] != b"OggS"[: stop - at]:
            if last & 4 and only_zeros(data, at, stop):
                break
            what = "bytes that are no Ogg follow its sound" if last & 4 else "no Ogg page begins there"
            raise AudioError(f"damaged at byte {at} ({what}); {keep('ogg')}")
        body = at + 27 + data[at + 26] if at + 27 <= stop else stop + 1
        following = body + sum(data[at + 27 : body])
        if following > stop:
            raise AudioError(
                f"truncated, its last Ogg page needs {following - at} bytes and {stop - at} are there; {keep('ogg')}"
            )
        page = data[at : at + 22] + bytes(4) + data[at + 26 : following]
        if _checksum(page) != struct.unpack_from("<I", data, at + 22)[0]:
            raise AudioError(f"damaged at byte {at} (an Ogg page differs from its checksum); {keep('ogg')}")
        begins = data[at + 5] & 2
        if begins and not last & 4:
            raise AudioError(
                f"holds several streams beside each other, or one without an end; write the sound anew: {convert('ogg')}"
            )
        if begins:
            what, read_as = codec(page)
            if read_as is None:
                raise AudioError(f"Ogg with {what} is not read here; convert it: {convert('ogg')}")
            extension, first = extension or read_as, at
        elif last & 4:
            raise AudioError(f"damaged at byte {at} (an Ogg stream without a beginning); {keep('ogg')}")
        (number,) = struct.unpack_from("<I", data, at + 18)
        # decoders lose what follows; a gap is a recording of a broadcast that began before it
        if not begins and number <= before:
            raise AudioError(f"damaged at byte {at} (an Ogg page comes twice); {keep('ogg')}")
        before, last, at = number, data[at + 5], following
        if last & 4:
            parts.append(Part(first, at))
            at = behind_tags(data, at, stop)
    if not last & 4:
        raise AudioError(f"truncated, it ends before its last Ogg page; {keep('ogg')}")
    return Container(extension, parts, start == 0 and len(parts) == 1)
