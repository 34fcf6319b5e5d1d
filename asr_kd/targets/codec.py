"""SparsePosteriors ⇄ bytes. The format is described in README.md beside this file."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from asr_kd.errors import UserError
from asr_kd.targets.posteriors import MAX_KEPT, SparsePosteriors

MAGIC, VERSION = b"AKDP", 2
# Steps between probability 0 and 1 on the scale of square roots. 128 costs 0.0003 nat on 3,700 flat units.
LEVELS = 128
MAX_UNITS = 1 << 16
MAX_FRAMES = (1 << 24) - 1

_HEADER = struct.Struct("<4sBBHIIII")  # magic, version, levels, num_units - 1, frames, distinct units, runs, crc32
_VARINT_BYTES = 4
#: bytes of a body below which two ways to pack it are tried
SMALL = 4096
_DEFLATE_RATIO = 1032  # deflate cannot expand to more than this many times its input


def encode(posteriors: SparsePosteriors, levels: int = LEVELS, draws: int | None = None) -> bytes:
    """Bytes of one utterance's soft targets.

    Probabilities are rounded on the scale of their square roots, where equal steps cost equal divergence; the order of
    a frame's units never reverses (close ones may become equal) and its most probable unit stays the most probable.

    Args:
        levels: steps between probability 0 and 1, 8 to 255.
        draws: of `SparsePosteriors.sampled`; then how often each unit was drawn is kept, exactly.

    Raises:
        ValueError: when the posteriors are outside the format's bounds or contradict themselves.
    """
    _check(posteriors, levels)
    counts = posteriors.counts
    if draws is None:
        codes, tails = rounded(posteriors, levels)
    else:
        levels = 0
        drawn = np.exp(posteriors.log_probs, dtype=np.float64) * draws
        codes, tails = np.rint(drawn).astype(np.int64), np.zeros(posteriors.frames, np.int64)
        if draws > MAX_KEPT or codes.min() < 1 or np.abs(drawn - codes).max() > 1e-3 or posteriors.tail.any():
            raise ValueError(f"the probabilities are not counts of {draws} draws")

    # by unit, then by time: a unit is kept for runs of frames, in which its probability changes slowly
    frames = np.repeat(np.arange(posteriors.frames), counts)
    order = np.argsort((posteriors.units.astype(np.int64) << 24) | frames)
    units, frames, codes = posteriors.units[order].astype(np.int64), frames[order], codes[order]
    new_unit = np.diff(units, prepend=-1) != 0
    new_run = new_unit | (np.diff(frames, prepend=-2) != 1)
    run_starts, unit_starts = np.flatnonzero(new_run), np.flatnonzero(new_unit)
    run_lengths = np.diff(run_starts, append=len(frames))
    first_runs = np.flatnonzero(new_unit[run_starts])
    run_ends = frames[run_starts] + run_lengths
    gaps = frames[run_starts] - np.concatenate([[0], run_ends[:-1]])
    gaps[first_runs] = frames[run_starts][first_runs]
    changes = np.diff(codes, prepend=0)

    columns = [
        _varints(np.diff(units[unit_starts], prepend=-1) - 1),
        _varints(np.diff(first_runs, append=len(run_starts)) - 1),
        _varints(gaps),
        _varints(run_lengths - 1),
        codes[run_starts].astype(np.uint8).tobytes(),
        (changes[~new_run] & 0xFF).astype(np.uint8).tobytes(),
        (np.diff(tails, prepend=0) & 0xFF).astype(np.uint8).tobytes(),
    ]
    body = _deflate(columns)
    header = [MAGIC, VERSION, levels, posteriors.num_units - 1, posteriors.frames, len(unit_starts), len(run_starts)]
    crc = zlib.crc32(body, zlib.crc32(_HEADER.pack(*header, 0)))
    return _HEADER.pack(*header, crc) + body


def rounded(posteriors: SparsePosteriors, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """The codes that stand for the probabilities and for the tails: int64 [entries] and [frames]."""
    codes = np.clip(np.rint(np.exp(0.5 * posteriors.log_probs) * levels), 1, levels).astype(np.int64)
    # equal codes are decoded in the order of units: lift the first above a second with the same code
    several = posteriors.starts[posteriors.counts > 1]
    codes[several] += codes[several] == codes[several + 1]
    tails = np.clip(np.rint(np.sqrt(posteriors.tail) * levels), posteriors.tail > 0, levels).astype(np.int64)
    return codes, tails


def decode(data: bytes, name: str = "soft target") -> SparsePosteriors:
    """The soft targets in `data`; each frame's probabilities and tail add up to 1.

    Args:
        name: opens the message of an error.

    Raises:
        UserError: when `data` is damaged, of another format, or of a newer version.
    """
    if len(data) < _HEADER.size or data[:4] != MAGIC:
        raise UserError(f"{name}: not a soft target of asr_kd; label the audio again")
    _, version, levels, last_unit, frames, distinct, runs, crc = _HEADER.unpack_from(data)
    if not 1 <= version <= VERSION:
        raise UserError(f"{name}: soft target of version {version}, this program reads {VERSION}; use a newer asr_kd")
    body = memoryview(data)[_HEADER.size :]
    if zlib.crc32(body, zlib.crc32(data[: _HEADER.size - 4] + bytes(4))) != crc:
        raise UserError(f"{name}: damaged (the checksum differs); label the audio again")
    try:
        _require(levels or version > 1, "impossible header")  # draws came with version 2
        return _decode_body(body, levels, last_unit + 1, frames, distinct, runs)
    except ValueError as error:
        raise UserError(f"{name}: damaged ({error}); label the audio again") from None


def _decode_body(
    body: memoryview, levels: int, num_units: int, frames: int, distinct: int, runs: int
) -> SparsePosteriors:
    _require(0 < frames <= MAX_FRAMES and 0 < distinct <= min(num_units, runs), "impossible header")
    raw = _inflate(body, 2 * (distinct + runs), frames)
    numbers, rest = _read_varints(raw, 2 * (distinct + runs))
    unit_gaps, run_counts, gaps, lengths = np.split(numbers, [distinct, 2 * distinct, 2 * distinct + runs])
    units, run_counts, lengths = np.cumsum(unit_gaps + 1) - 1, run_counts + 1, lengths + 1
    entries = int(lengths.sum())
    _require(len(rest) == entries + frames, "wrong length")
    _require(units[-1] < num_units and int(run_counts.sum()) == runs, "impossible units")

    # frame of each run's first entry: gaps and lengths added up from the unit's first run on
    ends = np.cumsum(gaps + lengths)
    first_runs = np.cumsum(run_counts) - run_counts
    ends -= np.repeat((ends - gaps - lengths)[first_runs], run_counts)
    _require(ends.max() <= frames, "impossible frames")
    run_starts = np.cumsum(lengths) - lengths
    entry_frames = np.repeat(ends - lengths - run_starts, lengths) + np.arange(entries)

    # codes: changes added up within each run, modulo 256
    is_first = np.zeros(entries, bool)
    is_first[run_starts] = True
    codes = np.empty(entries, np.uint8)
    codes[run_starts] = rest[:runs]
    codes[~is_first] = rest[runs:entries]
    summed = np.cumsum(codes, dtype=np.uint8)
    codes = summed - np.repeat(summed[run_starts] - codes[run_starts], lengths)
    tails = np.cumsum(rest[entries:], dtype=np.uint8)
    _require(codes.min() > 0, "an entry of no probability")

    # one sort orders all: by frame, then by falling code, then by unit
    keys = (entry_frames << 24).astype(np.uint64) | ((255 - codes).astype(np.uint64) << np.uint64(16))
    keys |= np.repeat(np.repeat(units, run_counts), lengths).astype(np.uint64)
    keys.sort()
    codes = (255 - ((keys >> np.uint64(16)) & np.uint64(0xFF))).astype(np.uint8)
    counts = np.bincount(entry_frames, minlength=frames)
    _require(counts.min() > 0 and counts.max() <= MAX_KEPT, "a frame without units or with too many")
    power = 2 if levels else 1
    weights = codes.astype(np.int64) ** power
    tail_squares = tails.astype(np.int64) ** 2
    totals = np.add.reduceat(weights, np.cumsum(counts) - counts) + tail_squares
    logs = power * np.log(np.arange(1, 256))
    log_probs = logs[codes - np.uint8(1)] - np.repeat(np.log(totals), counts)
    return SparsePosteriors(
        counts.astype(np.uint8),
        (keys & np.uint64(0xFFFF)).astype(np.int32),
        log_probs.astype(np.float32),
        (tail_squares / totals).astype(np.float32),
        num_units,
    )


def _check(posteriors: SparsePosteriors, levels: int) -> None:
    counts, units, num_units = posteriors.counts, posteriors.units, posteriors.num_units
    if not (8 <= levels <= 255 and 0 < num_units <= MAX_UNITS and 0 < posteriors.frames <= MAX_FRAMES):
        raise ValueError(f"levels {levels}, {num_units} units or {posteriors.frames} frames are out of bounds")
    sizes = {int(counts.sum()), len(units), len(posteriors.log_probs)}
    if counts.min() == 0 or len(sizes) > 1 or len(posteriors.tail) != len(counts):
        raise ValueError("counts, units, log_probs and tail do not fit each other")
    if units.min() < 0 or units.max() >= num_units:
        raise ValueError(f"a unit outside 0 to {num_units - 1}")
    probs = np.exp(posteriors.log_probs, dtype=np.float64)
    sums = np.add.reduceat(probs, posteriors.starts) + posteriors.tail
    if not (np.abs(sums - 1.0).max() < 0.02 and posteriors.tail.min() >= 0):
        raise ValueError("probabilities and tail of a frame do not add up to 1")
    falling = np.diff(posteriors.log_probs) <= 0
    falling[posteriors.starts[1:] - 1] = True
    if not falling.all():
        raise ValueError("a frame's units are not sorted by falling probability")


def _require(holds: object, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _deflate(columns: list[bytes]) -> bytes:
    """The columns as one raw deflate stream.

    On flat posteriors every column has a Huffman code of its own, and repeated strings are not looked for: they would cost
    more bits than they save. Where little is stored, the other way round is tried too.
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    coded = b"".join(
        part for column in columns for part in (packer.compress(column), packer.flush(zlib.Z_PARTIAL_FLUSH))
    )
    coded += packer.flush()
    if len(coded) > SMALL:
        return coded
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return min(coded, packer.compress(b"".join(columns)) + packer.flush(), key=len)


def _inflate(body: memoryview, numbers: int, frames: int) -> bytes:
    # each number and each frame takes at least a byte, so a lying header is found before anything is allocated for it
    _require(numbers + frames <= _DEFLATE_RATIO * len(body), "impossible header")
    unpacker = zlib.decompressobj(-15)
    try:
        raw = unpacker.decompress(body, _VARINT_BYTES * numbers + frames * (MAX_KEPT + 1))
    except zlib.error as error:
        raise ValueError(str(error)) from None
    _require(unpacker.eof and not unpacker.unused_data, "wrong length")
    return raw


def _varints(values: np.ndarray) -> bytes:
    """Numbers below 2**28, seven bits a byte, low bits first, the high bit set on all bytes but a number's last."""
    shifted = values[:, None] >> np.arange(0, 7 * _VARINT_BYTES, 7)
    more = shifted[:, 1:] > 0
    used = np.concatenate([np.ones((len(values), 1), bool), more], axis=1)
    high = np.concatenate([more, np.zeros((len(values), 1), bool)], axis=1)
    return ((shifted & 0x7F) | (high << 7)).astype(np.uint8)[used].tobytes()


def _read_varints(raw: bytes, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` numbers as int64, and the bytes after them as uint8."""
    data = np.frombuffer(raw, np.uint8)
    lasts = np.flatnonzero(data[: count * _VARINT_BYTES] < 0x80)[:count]
    _require(len(lasts) == count, "wrong length")
    sizes = np.diff(lasts, prepend=-1)
    _require(sizes.max() <= _VARINT_BYTES, "an impossible number")
    starts = lasts - sizes + 1
    end = int(lasts[-1]) + 1
    shifts = 7 * (np.arange(end) - np.repeat(starts, sizes))
    return np.add.reduceat((data[:end].astype(np.int64) & 0x7F) << shifts, starts), data[end:]
