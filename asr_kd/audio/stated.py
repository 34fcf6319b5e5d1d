"""AIFF, AU, Wave64 and NIST SPHERE, which libsndfile decodes: compare the sound that their headers state with what is there."""

from __future__ import annotations

import re
import struct

from asr_kd.audio.parts import Buffer, Container, Part, before_tags, convert, keep, only_zeros
from asr_kd.errors import AudioError

#: AIFF-C's uncompressed kinds, whose size is known: COMM's bits say it, as in AIFF
_AIFF_BARE = (b"NONE", b"twos", b"sowt", b"fl32", b"FL32", b"fl64", b"FL64", b"in24", b"in32", b"raw ")
_AIFF_CODED = (b"ulaw", b"ULAW", b"alaw", b"ALAW", b"ima4", b"GSM ")
#: what the identifiers of Wave64's chunks have behind their four letters
_W64 = bytes.fromhex("f3acd3118cd100c04f8edb8a")


def aiff(data: Buffer, start: int, end: int) -> Container:
    """AIFF and AIFF-C: chunk by chunk, and COMM's number of samples against the size of SSND."""
    at, frame, frames, sound = start + 12, 0, 0, -1
    end_of_chunks = before_tags(data, start, end)
    while at + 8 <= end_of_chunks and not only_zeros(data, at, end_of_chunks):
        name, size = bytes(data[at : at + 4]), int.from_bytes(data[at + 4 : at + 8], "big")
        if name == b"FORM" or not re.fullmatch(rb"[ -~]{4}", name):
            _follows(end - at, "aiff", joined=name == b"FORM")
        if name != b"SSND" and at + 8 + size > end:
            raise AudioError(f"truncated, it ends within its AIFF header; {keep('aiff')}")
        if name == b"COMM" and size >= 18:
            channels, frames, bits = struct.unpack_from(">HIH", data[at + 8 : at + 16])
            compression = bytes(data[at + 26 : at + 30]) if data[start + 8 : start + 12] == b"AIFC" else b"NONE"
            if compression not in (*_AIFF_BARE, *_AIFF_CODED):
                raise AudioError(f"AIFF with {compression.decode('latin-1')!a} is not read here; convert it: {convert('aiff')}")  # fmt: skip
            frame = channels * -(-bits // 8) if compression in _AIFF_BARE else 0
        if name == b"SSND":
            _check_there(size, end - at - 8, "aiff")
            sound = size - 8 - int.from_bytes(data[at + 8 : at + 12], "big")
        at += 8 + size + size % 2
    if sound < 0:
        raise AudioError(f"truncated or damaged, an AIFF without sound; {keep('aiff')}")
    _check_rest(data, at, end_of_chunks, "aiff")
    if frame:
        _check_there(frames * frame, sound, "aiff")
        if sound > frames * frame + 1:  # some writers count the byte that makes it even
            _follows(sound - frames * frame, "aiff")
    return _whole("aiff", start, min(at, end))


def au(data: Buffer, start: int, end: int) -> Container:
    """AU of either byte order; a size of 2³²-1 means all that follows."""
    order = ">" if data[start : start + 4] == b".snd" else "<"
    if end - start < 24:
        raise AudioError(f"truncated, it ends within its AU header; {keep('au')}")
    offset, size = struct.unpack_from(order + "II", data[start + 4 : start + 12])
    stop = end if size == 0xFFFFFFFF else _stop(data, start + offset, size, end, "au")
    return _whole("au", start, stop)


def sphere(data: Buffer, start: int, end: int) -> Container:
    """NIST SPHERE: lines of text, padded to the size that the second one says, and the sound."""
    head = bytes(data[start : start + 1024])
    if b"shorten" in head or b"wavpack" in head:
        raise AudioError("NIST SPHERE packed by Shorten is not read here; unpack it: sph2pipe -f wav bad.sph good.wav")
    lines = dict(re.findall(rb"^(\w+) -\w+ (\S+)", head, re.MULTILINE))
    try:
        offset = int(head.split(b"\n")[1])
        samples, width = int(lines[b"sample_count"]), int(lines[b"sample_n_bytes"])
        size = samples * width * int(lines.get(b"channel_count", 1))
        if offset < len(b"NIST_1A\n   1024\n") or size < 0:
            raise ValueError
    except (IndexError, KeyError, ValueError):
        raise AudioError("truncated or damaged, its NIST SPHERE header does not say how much sound follows; fetch the file again") from None  # fmt: skip
    return _whole("sph", start, _stop(data, start + offset, size, end, "sph"))


def wave64(data: Buffer, start: int, end: int) -> Container:
    """Sony's Wave64: chunks with identifiers of 16 bytes and sizes of 8, which count both."""
    at, stop = start + 40, 0
    end_of_chunks = before_tags(data, start, end)
    while at + 24 <= end_of_chunks and not only_zeros(data, at, end_of_chunks):
        name, size = bytes(data[at : at + 16]), int.from_bytes(data[at + 16 : at + 24], "little")
        if name[4:] != _W64 or size < 24:
            _follows(end - at, "w64", joined=name.startswith(b"riff"))
        _check_there(size - 24, end - at - 24, "w64")
        if name.startswith(b"data"):
            stop = at + size  # libsndfile would take what follows for sound
        at += -(-size // 8) * 8
    if not stop:
        raise AudioError(f"truncated or damaged, a Wave64 without sound; {keep('w64')}")
    _check_rest(data, at, end_of_chunks, "w64")
    return _whole("w64", start, stop)


def _whole(ending: str, start: int, end: int) -> Container:
    # not plain: shards hold FLAC in place of it, which every reader of shards knows
    return Container(ending, [Part(start, end)], plain=False)


def _stop(data: Buffer, at: int, size: int, end: int, ending: str) -> int:
    """Where the stated sound ends; refuse a file in which more or less follows, but for zeros and tags."""
    _check_there(size, end - at, ending)
    _check_rest(data, at + size, before_tags(data, at + size, end), ending)
    return at + size


def _check_rest(data: Buffer, at: int, end: int, ending: str) -> None:
    if not only_zeros(data, at, end):
        _follows(end - at, ending)


def _check_there(size: int, there: int, ending: str) -> None:
    if size > there:
        raise AudioError(
            f"truncated, its header says {size} bytes of sound and {max(there, 0)} are there; {keep(ending)}"
        )


def _follows(size: int, ending: str, joined: bool = False) -> None:
    if joined:
        raise AudioError("several recordings are joined in it; write each to a file of its own")
    raise AudioError(
        f"{size} bytes follow the sound that its header states, or the header was never finished; write it anew: {convert(ending)}"
    )
