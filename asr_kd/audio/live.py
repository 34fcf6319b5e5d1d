"""Audio as it arrives: raw PCM or WAV through a pipe, or a microphone."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from asr_kd.audio import mpeg, wav
from asr_kd.audio.containers import is_text, recognise
from asr_kd.audio.parts import Pcm, named, tag_size
from asr_kd.audio.waveform import streamed
from asr_kd.errors import AudioError, UserError

PIECE = 1 << 16  # bytes of a pipe that are skipped at once
HEAD = 512  # bytes that are waited for, to recognise a container
TEXT = 32  # printable bytes that are certainly no samples


def pipe_sound(
    stream: IO[bytes], name: str, sample_rate: int, raw_rate: int | None, seconds: float
) -> Iterator[np.ndarray]:
    """Audio from a pipe, passed on as it arrives: WAV, or raw 16-bit little-endian mono.

    Every other known container is refused by its name. Anything else is raw; with `raw_rate`, also what only two or three
    bytes would identify as a container.

    Args:
        stream: a buffered binary stream (`read1`).
        name: of the pipe, for messages.
        sample_rate: wanted rate in Hz.
        raw_rate: rate of raw audio, in Hz; None: `sample_rate`.
        seconds: greatest length of a piece.

    Returns:
        pieces float32 [samples], mono, full scale 1, at `sample_rate`.

    Raises:
        AudioError: when it is neither (FLAC, MP3, MP4; WAV of another encoding) or cut, a sample is not a number, or its
            channels cancel out.
    """
    return streamed(_pieces(_Pipe(stream), name, raw_rate or sample_rate, bool(raw_rate), seconds), sample_rate, name)


def _pieces(pipe: _Pipe, name: str, raw_rate: int, raw_given: bool, seconds: float) -> Iterator[tuple[int, np.ndarray]]:
    """Rate in Hz and float32 [samples, channels] of what arrives."""
    with named(name):
        pipe.pass_tag()
        is_wav, rate = _is_wav(pipe, raw_given), 0
        while True:
            header = wav.header(pipe.read) if is_wav else None
            if header:
                wav.check_bare(header.pcm, "pipe 16-bit PCM: ffmpeg -i FILE.wav -c:a pcm_s16le -f wav -")
            pcm = header.pcm if header else Pcm(raw_rate, 1, wav.PCM, 16)
            if pcm.rate != (rate := rate or pcm.rate):
                raise AudioError(f"a WAV of another sample rate follows ({pcm.rate} Hz); send each by itself")
            for samples in _samples(pipe, pcm, header, seconds):
                yield rate, samples
            if header is None or not pipe.pass_chunks(pcm.big):
                return


class _Pipe:
    """A pipe whose next bytes can be looked at before they are read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._held = stream, b""
        self._read1: Callable[[int], bytes] = getattr(stream, "read1", stream.read)

    def peek(self, size: int) -> bytes:
        """The next `size` bytes without taking them; waits for them; fewer at the end of the pipe."""
        while len(self._held) < size and (more := self._stream.read(size - len(self._held))):
            self._held += more
        return self._held[:size]

    def read(self, size: int) -> bytes:
        """The next `size` bytes; waits for them; fewer at the end of the pipe."""
        taken = self.peek(size)
        self._held = self._held[size:]
        return taken

    def arrived(self, size: int) -> bytes:
        """What has arrived, at most `size` bytes; none at the end of the pipe."""
        if self._held:
            return self.read(min(size, len(self._held)))
        return self._read1(size)

    def skip(self, size: int) -> None:
        """Skip `size` bytes, or to the end."""
        while size and (gone := self.read(min(size, PIECE))):
            size -= len(gone)

    def pass_tag(self) -> bool:
        """Skip a tag, if one follows."""
        head = self.peek(32 if self.peek(3) in (b"ID3", b"APE") else 3)
        size = tag_size(head)
        self.skip(size)
        return size > 0

    def refuse_other(self) -> None:
        """Refuse a recording of another container."""
        size = mpeg.first_size(self.peek(9))
        wav.refuse_other(self.peek(max(9, size + 6 if size else 0)), 0)

    def pass_chunks(self, big: bool) -> bool:
        """Skip what may follow the sound of a WAV; returns whether another WAV follows."""
        while head := self.peek(8):
            if head[:4] in wav.RIFFS:
                return True
            self.refuse_other()
            if not self.pass_tag():
                size = int.from_bytes(head[4:], "big" if big else "little")
                self.skip(8 + size + size % 2)
        return False


def _is_wav(pipe: _Pipe, raw_given: bool) -> bool:
    """Whether the pipe holds WAV, not raw audio; AudioError when it is another container, naming it."""
    head = pipe.peek(HEAD)
    if size := mpeg.first_size(head):  # certain once a second frame follows the first
        head = pipe.peek(max(HEAD, size + 6))
    found = recognise(head)
    if found is None and len(head) >= TEXT and is_text(head):
        raise AudioError("not audio but text; pipe WAV, or raw 16-bit mono")
    if found is None or (raw_given and not found.certain):
        return False
    if found.what == "WAV":
        return True
    if found.reason:
        raise AudioError(found.reason)
    raise AudioError(
        f"{found.what}, where WAV or raw PCM is heard as it comes; pipe WAV: ffmpeg -i FILE.{found.ending} -f wav -"
        + (", or give the file itself in place of -" if found.reader else "")
    )


def _samples(pipe: _Pipe, pcm: Pcm, header: wav.Header | None, seconds: float) -> Iterator[np.ndarray]:
    """The sound up to its stated length, or further if what follows is not a chunk."""
    piece = max(1, int(seconds * pcm.rate)) * pcm.step
    size = header.size if header else None
    left, waiting = size, b""
    while True:
        if left == 0:
            if _ends(pipe, size or 0):
                break
            pipe.refuse_other()
            left = None  # the header states less than there is: the recorder died, or there are over 4 GiB
        data = pipe.arrived(piece if left is None else min(left, piece))
        if not data:
            break
        left = None if left is None else left - len(data)
        data = waiting + data
        whole = len(data) - len(data) % pcm.step
        waiting = data[whole:]
        yield wav.samples(data[:whole], pcm)
    if header and left:
        raise AudioError("ends before the length that its WAV header states; send the whole file")
    if not header and waiting:
        raise AudioError("ends within a sample; raw sound must be 16-bit mono")


def _ends(pipe: _Pipe, size: int) -> bool:
    """Whether the sound ends at its stated length: nothing follows, or a chunk, or another WAV."""
    head = pipe.peek(9)
    for shift in (1, 0) if size % 2 else (0,):
        begin = head[shift:]
        if not begin or begin[:4] in wav.CHUNKS or begin[:4] in wav.RIFFS or begin[:3] in (b"ID3", b"TAG", b"APE"):
            pipe.skip(shift)
            return True
    return False


def microphone_sound(sample_rate: int, seconds: float) -> Iterator[np.ndarray]:
    """Audio of the default microphone, in pieces float32 [samples] of `seconds` seconds, until interrupted.

    It raises UserError when the extra is not installed, or the machine has no microphone at that rate.
    """
    try:
        import sounddevice
    except ImportError:
        raise UserError("microphone: needs the extra mic; install it with pip install 'asr-kd[mic]'") from None
    except OSError:
        raise UserError("microphone: the library PortAudio is missing; install it (Debian: libportaudio2)") from None
    heard: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()

    def hear(samples: np.ndarray, frames: int, time: Any, status: Any) -> None:
        heard.put(samples[:, 0].copy())

    try:
        with sounddevice.InputStream(
            sample_rate, blocksize=int(seconds * sample_rate), channels=1, dtype="float32", callback=hear
        ):
            while True:
                yield heard.get()
    except KeyboardInterrupt:
        return
    except sounddevice.PortAudioError as error:
        raise UserError(
            f"microphone: cannot be opened at {sample_rate} Hz ({error}); connect one, or pipe sound in and give -"
        ) from None
