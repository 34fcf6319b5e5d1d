"""WAV, RF64 and BW64: its header, its samples, and what follows them."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from asr_kd.audio import mpeg
from asr_kd.audio.parts import Buffer, Container, Part, Pcm, before_tags, behind_tags, convert, keep, only_zeros
from asr_kd.errors import AudioError

RATES = range(1000, 768001)  # Hz; any other rate means a damaged header
MAX_CHANNELS = 32
RIFFS = (b"RIFF", b"RIFX", b"RF64", b"BW64")
EXTENSIBLE = 0xFFFE
BEHIND = 4096  # bytes that are enough to recognise what follows
TEXT = 1 << 20  # bytes in which to look for the marks of a transfer as text
FEW_LINES = 8  # line feeds that are too few to tell
PCM, FLOAT, A_LAW, MU_LAW, MP3 = 1, 3, 6, 7, 0x55
# encodings of uncompressed samples: tag and bits → numpy's type (8 and 24 bits and the two laws are widened first), full scale
BARE = {
    (PCM, 8): ("i1", 2.0**7), (PCM, 16): ("i2", 2.0**15), (PCM, 24): ("i4", 2.0**31), (PCM, 32): ("i4", 2.0**31),
    (FLOAT, 32): ("f4", 1.0), (FLOAT, 64): ("f8", 1.0), (A_LAW, 8): ("i2", 2.0**15), (MU_LAW, 8): ("i2", 2.0**15),
}  # fmt: skip
CODECS = {
    PCM: "PCM", FLOAT: "floats", 2: "Microsoft ADPCM", 0x11: "IMA ADPCM", 0x31: "GSM 6.10", 0x40: "G.721", 0x45: "G.726", 0x64: "G.726", 0x14: "G.723", 0x22: "TrueSpeech",
    0x28: "G.723.1", 0x38: "Opus", 0x50: "MPEG layer I or II", MP3: "MP3", 0x57: "AMR", 0x61: "DUCK ADPCM", 0x83: "G.729", 0xFF: "AAC", 0x160: "WMA", 0x161: "WMA",
    0x162: "WMA Pro", 0x163: "WMA lossless", 0x1600: "AAC (ADTS)", 0x2000: "AC-3", 0x2001: "DTS", 0x566F: "Vorbis", 0xA106: "AAC", 0xF1AC: "FLAC",
}  # fmt: skip
BY_LIBSNDFILE = (2, 0x11, 0x31)
# chunks that may follow the sound
CHUNKS = frozenset(
    b"LIST|id3 |ID3 |ID32|bext|iXML|cue |smpl|fact|PEAK|JUNK|junk|FLLR|PAD |pad |_PMX|axml|cart|inst|plst|note|labl|ltxt|DISP|acid|strc|afsp|umid|minf|"
    b"elm1|regn|levl|chna|dbmd|ubxt|bxml|SAUR|r64m|CSET|ICMT|wavl|slnt|link|MEXT|qlty|SNDM".split(b"|")
)
_ANOTHER = re.compile(rb"WAVE(fmt |JUNK|junk|bext|LIST|ds64|FLLR|PAD )")


@dataclass
class Header:
    """The header of a WAV. `size`: stated bytes of sound, None if the writer did not know; `read`: bytes of the header."""

    pcm: Pcm
    size: int | None
    fact: int | None
    read: int

    @property
    def bare(self) -> bool:
        return (self.pcm.tag, self.pcm.bits) in BARE


def header(read: Callable[[int], bytes]) -> Header:
    """Read the header of a WAV of any codec up to its sound; `read` gives the next bytes, fewer at the end."""
    riff = read(12)
    order = ">" if riff[:4] == b"RIFX" else "<"
    taken = len(riff)
    format_chunk, fact, long_size = b"", None, None
    while len(head := read(8)) == 8:
        taken += 8
        length = struct.unpack(order + "I", head[4:])[0]
        if head[:4] == b"data":
            break
        body = read(min(left := length + length % 2, 128))
        taken += len(body)
        left -= len(body)
        while left and (more := read(min(left, 1 << 16))):
            taken, left = taken + len(more), left - len(more)
        if left:
            break
        if head[:4] == b"fmt ":
            format_chunk = body
        elif head[:4] == b"fact" and len(body) >= 4:
            fact = struct.unpack_from(order + "I", body)[0]
        elif head[:4] == b"ds64" and len(body) >= 24:
            long_size = struct.unpack_from("<Q", body, 8)[0]
    if head[:4] != b"data" or len(head) < 8:
        raise AudioError("truncated, a WAV header without sound behind it; fetch the file again")
    if len(format_chunk) < 16:
        raise AudioError("damaged, its WAV header does not say the format of the sound; make it again")
    tag, channels, rate, _, block, bits = struct.unpack_from(order + "HHIIHH", format_chunk)
    if tag == EXTENSIBLE and len(format_chunk) >= 26:
        tag = struct.unpack_from(order + "H", format_chunk, 24)[0]
    if rate not in RATES or not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"its header says {rate} Hz and {channels} channels; it is damaged, make it again")
    if tag in (PCM, FLOAT) and (not bits or bits > 64 or block not in (0, channels * -(-bits // 8))):
        raise AudioError(
            f"its header says {bits} bits a sample in {block} bytes for {channels} channels; it is damaged, or unusual: {convert('wav')}"
        )
    if tag == PCM:  # 12 or 20 bits are stored as the upper bits of two or three bytes
        bits = 8 * -(-bits // 8)
    size: int | None = length
    if length == 0xFFFFFFFF and long_size:
        size = long_size
    elif 0x7FFFF000 <= length <= 0x80000000 or length >= 0xFFFF0000 or length == 0:  # values that writers to a pipe use
        size = None
    return Header(Pcm(rate, channels, tag, bits, order == ">"), size, fact, taken)


def check_bare(found: Pcm, remedy: str) -> None:
    """Refuse compressed samples with an AudioError, naming the codec; `remedy`: what to do."""
    if (found.tag, found.bits) not in BARE:
        codec = CODECS.get(found.tag, f"codec 0x{found.tag:04X}")
        bits = f" of {found.bits} bits" if found.bits else ""
        raise AudioError(f"WAV with {codec}{bits} is not read here; {remedy}")


def samples(data: bytes, pcm: Pcm) -> np.ndarray:
    """Bytes of uncompressed samples → float32 [samples, channels], full scale 1; an incomplete last one is dropped."""
    data = data[: len(data) // pcm.step * pcm.step]
    kind, scale = BARE[pcm.tag, pcm.bits]
    width = -(-pcm.bits // 8)
    if pcm.tag in (A_LAW, MU_LAW):
        values = _LAWS[pcm.tag][np.frombuffer(data, np.uint8)]
    elif width == 1:
        values = (np.frombuffer(data, np.uint8) ^ 128).view(np.int8)
    elif width == 3:  # the three bytes are the upper ones of four
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        three = np.frombuffer(data, np.uint8).reshape(-1, 3)
        padded[:, 1:] = three[:, ::-1] if pcm.big else three
        values = padded.view("<i4")[:, 0]
    else:
        values = np.frombuffer(data, (">" if pcm.big else "<") + kind)
    # NaN and infinity are refused later
    with np.errstate(over="ignore", invalid="ignore"):
        floats = values.astype(np.float32) / np.float32(scale)
    return floats.reshape(-1, pcm.channels)


def _a_law() -> np.ndarray:
    code = np.arange(256) ^ 0x55
    step, segment = (code & 15) * 16 + 8, code >> 4 & 7
    size = np.where(segment == 0, step, (step + 256) << np.maximum(segment - 1, 0))
    return np.where(code & 128, size, -size).astype(np.int16)


def _mu_law() -> np.ndarray:
    code = ~np.arange(256)
    size = (((code & 15) * 8 + 132) << (code >> 4 & 7)) - 132
    return np.where(code & 128, -size, size).astype(np.int16)


_LAWS = {A_LAW: _a_law(), MU_LAW: _mu_law()}


def examine(data: Buffer, start: int, end: int) -> Container:
    """The sound of a WAV from `start` to `end`; all of it, even if the header was never finished or states less."""
    parts: list[Part] = []
    plain, at = start == 0, start
    while at < end:
        found, as_stated, at = _one(data, at, end)
        plain = plain and as_stated and not parts
        parts += found
    return Container("wav", parts, plain)


def _one(data: Buffer, start: int, end: int) -> tuple[list[Part], bool, int]:
    """The parts of a recording, whether its header is right, and the offset of the next recording (or the end)."""
    at = start

    def read(size: int) -> bytes:
        nonlocal at
        at += size
        return bytes(data[at - size : min(at, end)])

    found = header(read)
    pcm, sound, size = found.pcm, start + found.read, found.size
    if pcm.tag not in (*BY_LIBSNDFILE, MP3):
        check_bare(pcm, f"convert it: {convert('wav')}")
    before: list[Part] = []
    if size is None:
        stop = sound
        following = _chunks(data, sound, end, pcm.big)  # no sound at all, followed by a chunk
    else:
        stop = _stop(sound, size, end)
        # some writers put a sound into several chunks
        while found.bare and (begin := _more_sound(data, stop + size % 2, end, pcm.big)):
            before.append(Part(sound, stop, pcm=pcm))
            sound, size = begin, int.from_bytes(data[begin - 4 : begin], "big" if pcm.big else "little")
            stop = _stop(sound, size, end)
        following = _behind(data, stop, size % 2, end, pcm.big)
    as_stated = not before
    if following is None:  # what follows is sound: the recorder died, or there are over 4 GiB
        refuse_other(data, behind_tags(data, stop, end))
        _refuse_text_mode(bytes(data[sound : min(end, sound + TEXT)]))
        as_stated = False
        another = _another(data, sound, end)
        following = end if another is None else another
        stop = before_tags(data, sound, end) if another is None else another
        if not found.bare:
            raise AudioError(f"its header states no length of sound ({CODECS[pcm.tag]}); repair it: {convert('wav')}")
    if found.bare:
        return [*before, Part(sound, stop, pcm=pcm)], as_stated, following
    if pcm.tag == MP3:
        return mpeg.examine(data, sound, stop).parts, False, following
    return [Part(start, stop, samples=found.fact)], as_stated, following


def _stop(sound: int, size: int, end: int) -> int:
    """Offset of the end of a sound of the stated size."""
    if size > end - sound:
        raise AudioError(f"truncated, its header says {size} bytes of sound and {end - sound} are there; {keep('wav')}")
    return sound + size


def _more_sound(data: Buffer, at: int, end: int, big: bool) -> int | None:
    """Offset of the sound of another `data` chunk, if there is one here or after chunks of other kinds."""
    while at + 8 < end:
        name = bytes(data[at : at + 4])
        if name == b"data":
            return at + 8
        if name not in CHUNKS:
            return None
        size = int.from_bytes(data[at + 4 : at + 8], "big" if big else "little")
        at += 8 + size + size % 2
    return None


def _behind(data: Buffer, at: int, odd: int, end: int, big: bool) -> int | None:
    """What follows the stated sound: offset of another recording; `end` after chunks, tags or padding; None if it is sound."""
    rest = before_tags(data, at, end)
    if rest - at <= odd or (only_zeros(data, at, min(at + 64, rest)) and only_zeros(data, at, rest)):
        return end
    for padded in (at + 1, at) if odd else (at,):  # padded to an even size, as it should be, or not
        begin = behind_tags(data, padded, rest)
        found = end if begin >= rest else _chunks(data, begin, rest, big)
        if found is not None:
            return end if found == rest else found
    return None


def _chunks(data: Buffer, at: int, end: int, big: bool) -> int | None:
    """Skip chunks: offset of another recording after them, else the end; None if no chunk begins here."""
    first = at
    known = False
    while at + 8 <= end:
        name = bytes(data[at : at + 4])
        if name in RIFFS and data[at + 8 : at + 12] == b"WAVE":
            return at
        if not re.fullmatch(rb"[A-Za-z][A-Za-z0-9 _]{3}", name) or name == b"data":
            break
        known = known or name in CHUNKS
        size = int.from_bytes(data[at + 4 : at + 8], "big" if big else "little")
        at += 8 + size + size % 2
    # unknown names count as chunks if they lead exactly to the end
    if at == first or not (known or at in (end, end + 1)):
        return None
    another = _another(data, first, end)  # after a chunk that is cut, or not padded
    return end if another is None else another


def refuse_other(data: Buffer, at: int) -> None:
    """Refuse, with an AudioError, a recording of another container at an offset, behind the sound of a WAV."""
    head = bytes(data[at : at + BEHIND])
    what = {b"fLaC": "FLAC", b"OggS": "Ogg"}.get(head[:4]) or next(iter(mpeg.recognise(head) or ()), None)
    if what:
        raise AudioError(f"{what} follows the sound of a WAV; write each recording to a file of its own")


def _refuse_text_mode(sound: bytes) -> None:
    """Refuse bytes that went through a program for text, which put a carriage return before each line feed."""
    if (lines := sound.count(b"\n")) >= FEW_LINES and sound.count(b"\r\n") == lines:
        raise AudioError(
            "damaged, it was sent as text (each line feed is two bytes now); fetch it again in binary mode"
        )


def _another(data: Buffer, start: int, end: int) -> int | None:
    """Offset of another WAV, if there is one."""
    found = (match.start() - 8 for match in _ANOTHER.finditer(data, start + 8, end))
    return next((at for at in found if data[at : at + 4] in RIFFS), None)
