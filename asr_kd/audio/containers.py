"""Recognise a container, check its stated length against what is there, and name the command that repairs or converts it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from asr_kd.audio import flac, mpeg, ogg, stated, wav
from asr_kd.audio.parts import Buffer, Container, behind_tags, convert, keep
from asr_kd.errors import AudioError

READ = "WAV, FLAC, MP3, Ogg Vorbis or Opus"
HEAD = 4096  # bytes that are enough to recognise a container
PADDING = 1 << 16  # most zeros before an MP3's first frame

# signatures: offset, bytes, name of the format, and extension of its files
_SOUND: list[tuple[int, bytes, str, str]] = [
    (8, b"AIFF", "AIFF", "aiff"), (8, b"AIFC", "AIFF", "aiff"), (8, b"8SVX", "Amiga 8SVX", "8svx"), (0, b"caff", "CAF", "caf"), (0, b".snd", "AU", "au"),
    (0, b"dns.", "AU", "au"), (0, b"NIST_1A", "NIST SPHERE", "sph"), (0, b"ajkg", "Shorten", "shn"), (0, b"#!AMR-WB", "AMR-WB", "amr"), (0, b"#!AMR", "AMR", "amr"),
    (0, b"#!SILK", "SILK", "silk"), (1, b"#!SILK", "SILK", "silk"), (0, bytes.fromhex("3026b2758e66cf11a6d9"), "WMA (ASF)", "wma"),
    (0, bytes.fromhex("1a45dfa3"), "WebM or Matroska", "webm"), (4, b"ftyp", "MP4 (M4A, AAC)", "m4a"), (4, b"moov", "QuickTime", "mov"), (4, b"mdat", "QuickTime", "mov"),
    (4, b"wide", "QuickTime", "mov"), (0, b"riff\x2e\x91\xcf\x11", "Wave64 (W64)", "w64"), (0, b"MAC ", "Monkey's Audio", "ape"), (0, b"wvpk", "WavPack", "wv"),
    (0, b"TTA1", "True Audio", "tta"), (0, b"DSD ", "DSD", "dsf"), (0, b"FRM8", "DSD", "dff"), (0, b"MPCK", "Musepack", "mpc"), (0, b"MP+", "Musepack", "mpc"),
    (0, b".RMF", "RealMedia", "rm"), (0, b".ra\xfd", "RealAudio", "ra"), (0, b"FLV\1", "Flash video", "flv"), (0, b"Creative Voice File", "VOC", "voc"), (0, b"ADIF", "AAC (ADIF)", "aac"),
    (0, bytes.fromhex("7ffe8001"), "DTS", "dts"), (0, bytes.fromhex("000001ba"), "an MPEG film", "mpg"), (8, b"AVI ", "AVI", "avi"),
    *((0, bytes.fromhex(mark), "IRCAM", "sf") for kind in range(1, 5) for mark in (f"64a30{kind}00", f"000{kind}a364")), (0, b"\2dss", "DSS", "dss"), (0, b"\3ds2", "DSS", "ds2"),
    (0, b" paf", "PARIS", "paf"), (0, b"fap ", "PARIS", "paf"), (0, b"PVF1\n", "PVF", "pvf"), (0, b"2BIT", "AVR", "avr"), (0, b"ALawSoundFile", "Psion WVE", "wve"),
    (0, b"FORM", "IFF", "iff"),
]  # fmt: skip
#: of those in _SOUND, what libsndfile reads
_READERS = {"AIFF": stated.aiff, "AU": stated.au, "NIST SPHERE": stated.sphere, "Wave64 (W64)": stated.wave64}
_OTHER: list[tuple[int, bytes, str]] = [
    (0, b"\x1f\x8b\x08", "gzip; unpack it first: gunzip"), (0, b"PK\3\4", "a zip archive; unpack it first: unzip"), (0, b"BZh", "bzip2; unpack it first: bunzip2"),
    (0, bytes.fromhex("fd377a585a00"), "xz; unpack it first: unxz"), (0, bytes.fromhex("28b52ffd"), "Zstandard; unpack it first: unzstd"), (257, b"ustar", "a tar; unpack it first: tar xf"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first: 7z x"), (0, b"Rar!", "a RAR archive; unpack it first: unrar x"), (0, b"\x89PNG", "a picture; give the sound"),
    (0, b"\xff\xd8\xff", "a picture; give the sound"), (0, b"GIF8", "a picture; give the sound"), (0, b"%PDF", "a PDF; give the sound"), (0, b"\x93NUMPY", "a NumPy array; write it as WAV"),
    (0, b"MThd", "MIDI, notes without sound; give a recording"), (0, b"version https://git-lfs", "a Git LFS pointer; fetch the file: git lfs pull"),
    (0, b"\x80\4\x95", "a pickle; write its sound as WAV"), (0, b"\xef\xbb\xbf", "text with a byte-order mark; fetch the file again"),
    (0, b"MATLAB 5.0", "a MATLAB file; write its sound as WAV"), (0, b"HTTP/", "a server's answer with its headers; fetch the file again"),
]  # fmt: skip
_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml|head|body|error)", re.IGNORECASE)


@dataclass
class Found:
    """What a file is, by its first bytes.

    Attributes:
        what: name of its format, if it is audio.
        ending: extension of such files.
        reader: of the file, if it is supported.
        reason: why it is not audio.
        certain: False if raw samples could begin with the same few bytes.
    """

    what: str = ""
    ending: str = ""
    reader: Callable[[Buffer, int, int], Container] | None = None
    reason: str = ""
    certain: bool = True


def recognise(head: bytes) -> Found | None:
    """Recognise a container by its first bytes after all tags; None if they are unknown."""
    if head[:4] in wav.RIFFS and head[8:12] == b"WAVE":
        return Found("WAV", "wav", wav.examine)
    if head[:4] == b"fLaC":
        return Found("FLAC", "flac", flac.examine)
    if head[:4] == b"OggS":
        return Found(f"Ogg with {ogg.codec(head)[0]}", "ogg", ogg.examine)
    for at, mark, what, ending in _SOUND:
        if head[at : at + len(mark)] == mark and (at != 8 or head[:4] in (b"FORM", b"RIFF")):
            return Found(what, ending, _READERS.get(what))
    if head[:4] == b"RIFF" and len(head) >= 12:
        return Found("RIFF without WAVE", "riff")
    for at, mark, what in _OTHER:
        if head[at : at + len(mark)] == mark:
            return Found(reason=f"not audio but {what}")
    if _PAGE.match(head):
        return Found(reason="not audio but a web page or XML, perhaps a server's error; fetch the file again")
    if head[:1] in (b"{", b"[") and is_text(head):
        return Found(reason="not audio but JSON; give the sound")
    if one := mpeg.recognise(head):
        return Found(*one, reader=mpeg.examine if one[0] == "MP3" else None, certain=False)
    if head[:1] == b"\x47" and head[188:189] == head[376:377] == b"\x47":
        return Found("an MPEG transport stream", "ts")
    if head[:2] == b"\x0b\x77":
        return Found("AC-3", "ac3", certain=False)
    return None


def is_text(head: bytes) -> bool:
    """Whether these are bytes of UTF-8 text, which may be cut within a character."""
    printable = bool(head) and not re.search(rb"[\0-\x08\x0e-\x1f\x7f]", head)
    return printable and len(head.decode("utf-8", "ignore").encode()) > len(head) - 4


def _first_mp3(head: bytes) -> int:
    """Offset of four MP3 frames in a row after other bytes, as in a recorded broadcast; 0 if there are none."""
    at = 0
    while (at := head.find(b"\xff", at + 1)) > 0:
        follows = at
        for _ in range(4):
            one = mpeg.frame(head, follows)
            if one is None:
                break
            follows += one.size
        else:
            return at
    return 0


def examine(data: Buffer) -> Container:
    """Find the sound in the bytes of a whole file, and check that what its header states is there.

    It raises AudioError when it is not audio, not supported, cut or damaged; with a command that repairs or converts it, if any.
    """
    end = len(data)
    if not end:
        raise AudioError("empty (0 bytes); fetch the file again")
    start = behind_tags(data, 0, end)
    if start > end:
        raise AudioError("truncated, it ends within the tag in front of its sound; fetch the file again")
    found = recognise(data[start : start + HEAD])
    if found is None and start + 4 < end and data[start] == 0:  # padding in front of an MP3
        zeros = data[start : start + PADDING]
        padding = len(zeros) - len(zeros.lstrip(b"\0"))
        found = recognise(data[start + padding : start + padding + HEAD])
        start += padding
        found = found if found and found.reader is mpeg.examine else None
    if found is None and (at := _first_mp3(data[start : start + PADDING])):
        raise AudioError(f"damaged, {at} bytes stand before its first MP3 frame; {keep('mp3')}")
    if found is None:
        what = "not audio but text" if start == 0 and is_text(data[:HEAD]) else "not audio that can be read"
        raise AudioError(f"{what}; give {READ}")
    if found.reason:
        raise AudioError(found.reason)
    if found.reader is None:
        raise AudioError(f"{found.what} is not read here; give {READ}, e.g. by {convert(found.ending)}")
    return found.reader(data, start, end)
