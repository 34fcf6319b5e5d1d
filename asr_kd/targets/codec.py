"""SparsePosteriors ⇄ bytes. The format is described in README.md beside this file."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

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
#: below this size in bytes a body is packed in two ways, and the shorter result taken
SMALL = 4096
#: natural logarithm of every code; code 0 does not occur
_LOGS = np.log(np.arange(256).clip(1))
_DEFLATE_RATIO = 1032  # deflate cannot expand to more than this many times its input


def encode(posteriors: SparsePosteriors, levels: int = LEVELS, draws: int | None = None) -> bytes:
    """Bytes of one utterance's soft targets; a ValueError when they are outside the format's bounds or inconsistent.

    Probabilities are rounded on the scale of their square roots, where equal steps cost equal divergence. The order of a
    frame's units is never reversed (close ones may become equal), and its most probable unit stays the most probable.

    Args:
        levels: steps between probability 0 and 1, 8 to 255.
        draws: as of `SparsePosteriors.sampled`, whose counts are then stored exactly.
    """
    _check(posteriors, levels)
    counts = posteriors.counts
    if draws is None:
        codes, tails = rounded(posteriors, levels)
    else:
        levels = 0
        drawn = np.exp(posteriors.log_probs, dtype=np.float64) * draws
        codes, tails = np.rint(drawn).astype(np.uint8), np.zeros(posteriors.frames, np.uint8)
        if draws > MAX_KEPT or codes.min() < 1 or np.abs(drawn - codes).max() > 1e-3 or posteriors.tail.any():
            raise ValueError(f"the probabilities are not counts of {draws} draws")

    # by unit, then by time: a unit is kept in runs of frames, within which its probability changes slowly
    frame_bits = posteriors.frames.bit_length()
    kind = _key_type(frame_bits, (posteriors.num_units - 1).bit_length())
    keys = posteriors.units.astype(kind) << (frame_bits + 8)
    keys |= np.repeat(np.arange(posteriors.frames, dtype=kind) << 8, counts)
    keys |= codes
    keys.sort()
    codes = keys.astype(np.uint8)
    keys >>= 8
    steps = keys[1:] - keys[:-1]
    if not steps.all():
        raise ValueError("a frame has a unit twice")
    inner, run_starts = np.flatnonzero(steps == 1), _starts(steps != 1)
    run_keys = keys[run_starts].astype(np.int64)
    ids, starts = run_keys >> frame_bits, run_keys & ((1 << frame_bits) - 1)
    lengths = np.diff(run_starts, append=len(codes))
    first_runs = _starts(ids[1:] != ids[:-1])
    gaps = starts.copy()
    gaps[1:] -= starts[:-1] + lengths[:-1]
    gaps[first_runs] = starts[first_runs]

    columns = [
        _varints(np.diff(ids[first_runs], prepend=-1) - 1),
        _varints(np.diff(first_runs, append=len(run_starts)) - 1),
        _varints(gaps),
        _varints(lengths - 1),
        codes[run_starts].tobytes(),
        (codes[1:] - codes[:-1])[inner].tobytes(),
        np.diff(tails, prepend=np.uint8(0)).tobytes(),
    ]
    body = _deflate(columns)
    header = [MAGIC, VERSION, levels, posteriors.num_units - 1, posteriors.frames, len(first_runs), len(run_starts)]
    crc = zlib.crc32(body, zlib.crc32(_HEADER.pack(*header, 0)))
    return _HEADER.pack(*header, crc) + body


def rounded(posteriors: SparsePosteriors, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """The codes of the probabilities and of the tails: uint8 [entries] and [frames]."""
    codes = np.clip(np.rint(np.exp(0.5 * posteriors.log_probs) * levels), 1, levels).astype(np.uint8)
    # equal codes are decoded in the order of units: raise the first above a second with the same code
    several = posteriors.starts[posteriors.counts > 1]
    codes[several] += codes[several] == codes[several + 1]
    tails = np.clip(np.rint(np.sqrt(posteriors.tail) * levels), posteriors.tail > 0, levels).astype(np.uint8)
    return codes, tails


def _key_type(frame_bits: int, unit_bits: int) -> Any:
    """The integer type that holds a frame, a unit and a code; 32 bits are sorted in half the time."""
    return np.uint32 if frame_bits + unit_bits + 8 <= 32 else np.uint64


def _starts(changed: np.ndarray) -> np.ndarray:
    """Indices where runs start, given for all indices but 0 whether a run starts there."""
    return np.concatenate([[0], np.flatnonzero(changed) + 1])


def decode(data: bytes, name: str = "soft target") -> SparsePosteriors:
    """The soft targets in `data`, a result of `encode`; each frame's probabilities and tail add up to 1.

    A UserError that begins with `name` says when `data` is damaged, of another format, or of a newer version.
    """
    return decode_all([(name, data)])[0]


def decode_all(members: Sequence[tuple[str, bytes]]) -> list[SparsePosteriors]:
    """As `decode`, for several pairs of name and data: faster, as numpy's calls are shared. The results share memory."""
    read = [_read_columns(data, name) for name, data in members]
    if len({(columns.num_units, columns.power) for columns in read}) == 1:
        try:
            return _assemble(read)
        except ValueError as error:
            if len(members) == 1:
                raise UserError(f"{members[0][0]}: damaged ({error}); label the audio again") from None
    return [decode(data, name) for name, data in members]  # one is damaged, or they are of different kinds


class _Columns(NamedTuple):
    """An utterance as it is stored: numbers int64, codes uint8.

    Attributes:
        power: probabilities are proportional to this power of the codes.
        run_counts: [distinct units], number of runs of each of `ids`.
        gaps: [runs], frames between the unit's previous run, or frame 0, and the run.
        lengths: [runs], frames of each.
        firsts: [runs], first code of each.
        changes: [entries - runs], change of the code, modulo 256, within runs.
        tails: [frames], code of the tail.
    """

    num_units: int
    power: int
    ids: np.ndarray
    run_counts: np.ndarray
    gaps: np.ndarray
    lengths: np.ndarray
    firsts: np.ndarray
    changes: np.ndarray
    tails: np.ndarray


def _read_columns(data: bytes, name: str) -> _Columns:
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
        _require(0 < frames <= MAX_FRAMES and 0 < distinct <= min(last_unit + 1, runs), "impossible header")
        numbers, rest = _read_varints(_inflate(body, 2 * (distinct + runs), frames), 2 * (distinct + runs))
        ids = numbers[:distinct].cumsum() + np.arange(distinct)
        run_counts, lengths = numbers[distinct : 2 * distinct] + 1, numbers[2 * distinct + runs :] + 1
        entries = int(lengths.sum())
        _require(len(rest) == entries + frames, "wrong length")
        _require(ids[-1] <= last_unit and int(run_counts.sum()) == runs, "impossible units")
    except ValueError as error:
        raise UserError(f"{name}: damaged ({error}); label the audio again") from None
    return _Columns(
        last_unit + 1, 2 if levels else 1, ids, run_counts, numbers[2 * distinct : 2 * distinct + runs], lengths,
        rest[:runs], rest[runs:entries], rest[entries:].cumsum(dtype=np.uint8),
    )  # fmt: skip


def _assemble(read: Sequence[_Columns]) -> list[SparsePosteriors]:
    """Utterances with the same number of units, decoded together as if they were one long one; raises ValueError if one is damaged."""
    (num_units, *_), (power, *_), *columns = zip(*read, strict=True)
    ids, run_counts, gaps, lengths, firsts, changes, tails = map(np.concatenate, columns)
    frames, entries, runs = len(tails), len(firsts) + len(changes), len(firsts)
    own_frames, own_runs = np.array([(len(columns.tails), len(columns.firsts)) for columns in read]).T

    # first frame of each run: gaps and lengths added up from the unit's first run
    ends = (gaps + lengths).cumsum()
    first_runs = run_counts.cumsum() - run_counts
    ends -= (ends - gaps - lengths)[first_runs].repeat(run_counts)
    _require((ends <= own_frames.repeat(own_runs)).all(), "impossible frames")
    ends += (own_frames.cumsum() - own_frames).repeat(own_runs)
    starts = ends - lengths
    counts = (np.bincount(starts, minlength=frames)[:frames] - np.bincount(ends, minlength=frames)[:frames]).cumsum()
    _require(counts.min() > 0 and counts.max() <= MAX_KEPT, "a frame without units or with too many")

    # codes: changes added up within each run, modulo 256
    run_starts = lengths.cumsum() - lengths
    is_first = np.zeros(entries, bool)
    is_first[run_starts] = True
    codes = np.empty(entries, np.uint8)
    codes[run_starts] = firsts
    codes[np.flatnonzero(~is_first)] = changes
    codes = codes.cumsum(dtype=np.uint8)
    run = np.arange(runs).repeat(lengths)
    codes -= (codes[run_starts] - firsts)[run]
    _require(codes.min() > 0, "an entry of no probability")

    # one sort orders all: by frame, then by falling code, then by unit
    bits = (num_units - 1).bit_length()
    kind = _key_type(frames.bit_length(), bits)
    run_keys = ((starts - run_starts) << (bits + 8)) + ids.repeat(run_counts)
    keys = run_keys.astype(kind)[run]  # some are negative; unsigned sums wrap to the right value
    keys += np.arange(entries, dtype=kind) << (bits + 8)
    keys |= (~codes).astype(kind) << bits
    keys.sort()
    codes = ~(keys >> bits).astype(np.uint8)
    tail_squares = tails.astype(np.int64) ** 2
    first_entries = counts.cumsum() - counts
    totals = np.add.reduceat(codes.astype(np.int32) ** power, first_entries) + tail_squares
    log_probs = ((power * _LOGS).take(codes) - np.log(totals).repeat(counts)).astype(np.float32)
    ids = (keys & ((1 << bits) - 1)).astype(np.int32)
    counts, tail = counts.astype(np.uint8), (tail_squares / totals).astype(np.float32)
    frame_edges = np.append(0, own_frames.cumsum())
    entry_edges = np.append(first_entries, entries)[frame_edges]
    return [
        SparsePosteriors(counts[begin:end], ids[first:last], log_probs[first:last], tail[begin:end], num_units)
        for (begin, end), (first, last) in zip(
            itertools.pairwise(frame_edges.tolist()), itertools.pairwise(entry_edges.tolist()), strict=True
        )
    ]


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

    Each column gets its own Huffman code, and repeated strings are not searched for: on flat posteriors they cost more bits
    than they save. Small bodies are also packed the usual way, and the shorter result is taken.
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
    # each number and each frame takes at least a byte, so a wrong header is found before memory is allocated for it
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
    if values.max() < 0x80:
        return values.astype(np.uint8).tobytes()
    sizes = np.ones(len(values), np.int64)
    for size in range(1, _VARINT_BYTES):
        sizes += values >= 1 << 7 * size
    offsets = np.cumsum(sizes) - sizes
    data = np.empty(sizes.sum(), np.uint8)
    while len(values):
        data[offsets] = (values & 0x7F) | (values >= 0x80) << 7
        long = values >= 0x80
        offsets, values = offsets[long] + 1, values[long] >> 7
    return data.tobytes()


def _read_varints(raw: bytes, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` numbers as int64, and the bytes after them as uint8."""
    data = np.frombuffer(raw, np.uint8)
    lasts = np.flatnonzero(data[: count * _VARINT_BYTES] < 0x80)[:count]
    _require(len(lasts) == count, "wrong length")
    end = int(lasts[-1]) + 1
    values = data[lasts].astype(np.int64)
    if end > count:
        before = np.empty_like(lasts)
        before[0], before[1:] = -1, lasts[:-1]
        long = np.flatnonzero(lasts - before > 1)
        offsets = lasts[long]
        for _ in range(1, _VARINT_BYTES):
            if not len(long):
                break
            offsets -= 1
            values[long] = (values[long] << 7) | (data[offsets] & 0x7F)
            more = (offsets > 0) & (data[offsets - 1] >= 0x80)
            long, offsets = long[more], offsets[more]
        _require(not len(long), "an impossible number")
    return values, data[end:]
